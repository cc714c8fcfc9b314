"""Encoded pictures → rows of features: read, hashed, looked up, decoded and encoded block by block."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor

from declip_cli.cores import own_cores
from declip_cli.data.dataset import Pixels
from declip_cli.data.image_views import evaluation_view
from declip_cli.distributed import world_size
from declip_cli.errors import DataError
from declip_cli.evaluate.feature_cache import content_key, load_features, store_features
from declip_cli.files import parse_json
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import Precision, resolve_precision

ImageInput: TypeAlias = tuple[str, Callable[[], bytes | Pixels]]
"""A picture's key, for messages, and how to read its encoded bytes (JPEG, PNG, …)."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with how many are done and how many there are."""

BLOCK_SIZE = 256
"""Pictures per cache file: what is read, hashed and looked up together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureOptions:
    """How features are computed; none of it changes what they mean."""

    batch_size: int = 128
    """Pictures per forward pass; of texts, which are short, twice as many."""
    precision: Precision = "auto"
    """`auto`: bf16 where the processor computes it natively, else fp32."""
    threads: int = 0
    """Threads that read and decode pictures; 0 takes one for each core that this process may use."""
    use_cache: bool = True
    """Look results up in, and add them to, the cache on disk; see `caches`."""
    progress: Progress | None = None
    """Told after every batch."""
    split_over_ranks: bool = False
    """Encode a share on each rank of the process group and end with the same on all; every rank must take part."""

    @property
    def text_batch_size(self) -> int:
        """Texts per forward pass."""
        return 2 * self.batch_size

    @property
    def num_shares(self) -> int:
        """Processes that encode together."""
        return world_size() if self.split_over_ranks else 1

    def caches(self, model: PretrainedModel) -> bool:
        """Say whether the cache is used.

        Never for a model still in training, nor on several ranks: what one finds another may not, and those that
        encode would wait for those that do not.
        """
        return self.use_cache and bool(model.fingerprint) and self.num_shares == 1


@dataclass(frozen=True, slots=True)
class _Content:
    """A picture's bytes with their digest, or the cause why there are none."""

    data: bytes | Pixels
    digest: bytes
    cause: str = ""


@dataclass(frozen=True, slots=True)
class _Block:
    """Pictures on their way: looked up in the cache, and being decoded if they were not there."""

    start: int
    size: int
    key: str
    found: tuple[dict[str, Tensor], dict[str, str]] | None
    views: list["Future[Tensor | str]"]


@dataclass(frozen=True, slots=True)
class Rows:
    """What became of a block."""

    start: int
    features: Tensor
    """(B', D)."""
    kept: list[int]
    """Numbers of the readable pictures within the block, (B',)."""
    causes: dict[int, str]
    """Why the others are not."""


class ImageJob:
    """One pass over pictures: threads read two blocks ahead and decode one ahead while the encoder works."""

    def __init__(
        self,
        model: PretrainedModel,
        encode: Callable[[Tensor], Tensor],
        label: str,
        options: FeatureOptions,
    ) -> None:
        self.model = model
        self.encode = encode
        self.options = options
        self.device = next(model.encoder.parameters()).device
        self.pool = ThreadPoolExecutor(options.threads or len(own_cores()))
        precision = resolve_precision(options.precision, self.device)
        self.use_cache = options.caches(model)
        view = f"{model.image_side_px} {model.resize_px} {model.interpolation}"
        self.key_parts = ("images", model.fingerprint, view, precision, label)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def run(self, inputs: Sequence[ImageInput]) -> Iterator[Rows]:
        """Yield the rows of one block after the other."""
        reading: deque[tuple[int, list[Future[_Content]]]] = deque()
        decoding: deque[_Block] = deque()
        for start in range(0, len(inputs), BLOCK_SIZE):
            block = inputs[start : start + BLOCK_SIZE]
            reading.append((start, [self.pool.submit(_read, load) for _, load in block]))
            if len(reading) > 1:
                decoding.append(self._decode_block(*reading.popleft()))
            if len(decoding) > 1:
                yield self._encode_block(decoding.popleft(), len(inputs))
        decoding.extend(self._decode_block(*block) for block in reading)
        while decoding:
            yield self._encode_block(decoding.popleft(), len(inputs))

    def _decode_block(self, start: int, reads: list["Future[_Content]"]) -> _Block:
        contents = [future.result() for future in reads]
        key = content_key([*self.key_parts, *(content.digest for content in contents)])
        found = load_features(key) if self.use_cache else None
        views = [] if found else [self.pool.submit(self._decode, content) for content in contents]
        return _Block(start, len(contents), key, found, views)

    def _decode(self, content: _Content) -> Tensor | str:
        if content.cause:
            return content.cause
        try:
            view = evaluation_view(
                content.data,
                side_px=self.model.image_side_px,
                resize_px=self.model.resize_px,
                interpolation=self.model.interpolation,
            )  # (S, S, 3)
        except DataError as error:
            return error.cause
        return torch.from_numpy(view)

    def _encode_block(self, block: _Block, num_all: int) -> Rows:
        if block.found is not None:
            tensors, notes = block.found
            self._tell(block.start + block.size, num_all)
            causes = {int(number): cause for number, cause in parse_json(notes["causes"]).items()}
            return Rows(block.start, tensors["features"], tensors["kept"].tolist(), causes)
        rows = self._encode_views(block, num_all)
        if self.use_cache:
            tensors = {"features": rows.features, "kept": torch.tensor(rows.kept, dtype=torch.int64)}
            store_features(block.key, tensors, {"causes": json.dumps(rows.causes)})
        return rows

    def _encode_views(self, block: _Block, num_all: int) -> Rows:
        rows: list[Tensor] = []
        kept: list[int] = []
        causes: dict[int, str] = {}
        for start in range(0, block.size, self.options.batch_size):
            views: list[Tensor] = []
            for number, future in enumerate(block.views[start : start + self.options.batch_size], start):
                view = future.result()
                if isinstance(view, str):
                    causes[number] = view
                else:
                    views.append(view)
                    kept.append(number)
            if views:
                images = torch.stack(views).to(self.device, non_blocking=True)  # (B, S, S, 3)
                rows.append(self.encode(images).float())  # (B, D)
            self._tell(block.start + min(start + self.options.batch_size, block.size), num_all)
        features = torch.cat(rows).cpu() if rows else torch.empty(0, 0)
        return Rows(block.start, features, kept, causes)

    def _tell(self, num_done: int, num_all: int) -> None:
        if self.options.progress is not None:
            self.options.progress(num_done, num_all)


def _read(load: Callable[[], bytes | Pixels]) -> _Content:
    try:
        data = load()
    except DataError as error:
        return _without_data(error.cause)
    except FileNotFoundError:
        return _without_data("missing file")
    except OSError as error:
        return _without_data(f"unreadable file: {error.strerror}")
    return _Content(data, hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).digest())


def _without_data(cause: str) -> _Content:
    return _Content(b"", cause.encode(), cause)
