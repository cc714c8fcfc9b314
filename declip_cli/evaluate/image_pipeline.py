"""Images → rows of features: threads read, hash and decode ahead while the encoder works."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from declip_cli.cores import own_cores
from declip_cli.data.dataset import Dataset, Pixels
from declip_cli.data.image_views import evaluation_view
from declip_cli.distributed import world_size
from declip_cli.errors import DataError
from declip_cli.evaluate.vectors import Encoded
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import Precision, autocast

Progress: TypeAlias = Callable[[int, int], None]
"""Called with how many are done and how many there are."""
_AHEAD = 2
"""Batches that are read and decoded while one is encoded."""


def _keep_quiet(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureOptions:
    """How features are computed; none of it changes what they mean."""

    batch_size: int = 128
    """Images per forward pass; of texts, which are short, twice as many."""
    precision: Precision = "auto"
    """`auto`: bf16 where the processor computes it natively, else fp32."""
    threads: int = 0
    """Threads that read and decode images; 0 takes one for each core that this process may use."""
    use_cache: bool = True
    """Look results up in, and add them to, the store on disk; see `caches`."""
    progress: Progress | None = None
    """Told after every batch."""
    say: Callable[[str], None] = _keep_quiet
    """Told what the user should know, such as that a damaged store is made anew."""
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
        """Say whether the store is used.

        Never for a model still in training, nor on several ranks: what one finds another may not, and those that
        encode would wait for those that do not.
        """
        return self.use_cache and bool(model.fingerprint) and self.num_shares == 1


def encode_images(
    model: PretrainedModel,
    dataset: Dataset,
    numbers: Sequence[int],
    encode: Callable[[Tensor], Tensor],
    options: FeatureOptions,
    *,
    is_known: Callable[[bytes], bool] | None = None,
) -> Iterator[list[Encoded]]:
    """Encode images of a data set, batch by batch, in order.

    Args:
        model: where the encoder lies, and its preprocessing.
        dataset: the images.
        numbers: which of them.
        encode: uint8 images (B, S, S, 3) on the encoder's device → (B, D).
        options: batch size, precision, threads, progress.
        is_known: from several threads, whether a content needs no encoding; None leaves contents unhashed.

    Yields:
        What became of each image of a batch.
    """
    device = next(model.encoder.parameters()).device
    batches: deque[list[Future[tuple[Encoded, Tensor | None]]]] = deque()
    num_done = 0
    pool = ThreadPoolExecutor(options.threads or len(own_cores()))
    try:
        for first in range(0, len(numbers) + _AHEAD * options.batch_size, options.batch_size):
            batch = numbers[first : first + options.batch_size]
            batches.append([pool.submit(_prepare, model, dataset, number, is_known) for number in batch])
            if len(batches) > _AHEAD and (ready := batches.popleft()):
                prepared = [future.result() for future in ready]
                with torch.inference_mode(), autocast(options.precision, device):
                    encoded = _encode(prepared, encode, device)
                yield encoded
                num_done += len(encoded)
                if options.progress is not None:
                    options.progress(num_done, len(numbers))
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(
    prepared: list[tuple[Encoded, Tensor | None]], encode: Callable[[Tensor], Tensor], device: torch.device
) -> list[Encoded]:
    views = [view for _, view in prepared if view is not None]
    if not views:
        return [one for one, _ in prepared]
    images = torch.stack(views).to(device, non_blocking=True)  # (B, S, S, 3)
    rows = iter(encode(images).float().cpu().numpy())  # (B, D)
    return [one if view is None else Encoded(one.number, one.digest, next(rows)) for one, view in prepared]


def _prepare(
    model: PretrainedModel, dataset: Dataset, number: int, is_known: Callable[[bytes], bool] | None
) -> tuple[Encoded, Tensor | None]:
    digest = b""
    try:
        image = dataset.read(number).image
        if is_known is not None:
            digest = _digest(image)
            if is_known(digest):
                return Encoded(number, digest), None
        how = model.preprocessing
        view = evaluation_view(
            image,
            side_px=how.image_side_px,
            resize_px=how.resize_px,
            interpolation=how.interpolation,
            is_squashed=how.resize_mode == "squash",
        )  # (S, S, 3)
    except DataError as error:
        return Encoded(number, digest, cause=error.cause), None
    return Encoded(number, digest), torch.from_numpy(view)


def _digest(image: bytes | Pixels) -> bytes:
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.tobytes())
    return digest.digest()
