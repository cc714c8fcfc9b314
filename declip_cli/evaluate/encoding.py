"""Images through an encoder, batch by batch, on one process or several: threads read, hash and decode ahead."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from declip_cli.cores import own_cores
from declip_cli.data.dataset import Dataset, Pixels
from declip_cli.data.image_views import eval_transform
from declip_cli.distributed import rank, world_size
from declip_cli.errors import DataError
from declip_cli.evaluate.vectors import Encoded
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import Precision, autocast

T = TypeVar("T")
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number done and the total."""
Encode: TypeAlias = Callable[[Tensor], Tensor]
"""From uint8 images (B, S, S, 3) on the encoder's device to vectors (B, D)."""
_AHEAD = 2
"""Batches that are read and decoded while one is encoded."""


def _keep_quiet(*_: object) -> None:
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
    progress: Progress = _keep_quiet
    """Told after every batch."""
    log: Callable[[str], None] = _keep_quiet
    """Receives what the user should know, such as that a damaged store is rebuilt."""
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

    def alone(self) -> Self:
        """Return the options for a single item, of which nothing is kept and no progress reported."""
        return replace(self, use_cache=False, progress=_keep_quiet)

    def caches(self, model: PretrainedModel) -> bool:
        """Return whether the store is used.

        Never for a model still in training, nor on several ranks: what one finds another may not, and those that
        encode would wait for those that do not.
        """
        return self.use_cache and bool(model.fingerprint) and self.num_shares == 1


DEFAULTS = FeatureOptions()


def encode_images(
    model: PretrainedModel,
    dataset: Dataset,
    indices: Sequence[int],
    encode: Encode,
    options: FeatureOptions,
    *,
    is_known: Callable[[bytes], bool] | None = None,
) -> Iterator[list[Encoded]]:
    """Encode the images of some numbers, batch by batch, in order.

    Args:
        model: where the encoder lies, and its preprocessing.
        dataset: the images.
        indices: which of them.
        encode: what is computed of them.
        options: batch size, precision, threads, progress.
        is_known: from several threads, whether a content needs no encoding; None leaves contents unhashed.

    Yields:
        What became of each image of a batch.
    """
    batches: deque[list[Future[tuple[Encoded, Tensor | None]]]] = deque()
    num_done = 0
    pool = ThreadPoolExecutor(options.threads or len(own_cores()))
    try:
        for first in range(0, len(indices) + _AHEAD * options.batch_size, options.batch_size):
            batch = indices[first : first + options.batch_size]
            batches.append([pool.submit(_prepare, model, dataset, index, is_known) for index in batch])
            if len(batches) > _AHEAD and (ready := batches.popleft()):
                prepared = [future.result() for future in ready]
                views = [view for _, view in prepared if view is not None]
                rows = iter(())
                if views:
                    with torch.inference_mode(), autocast(options.precision, model.device):
                        images = torch.stack(views).to(model.device, non_blocking=True)  # (B, S, S, 3)
                        rows = iter(encode(images).float().cpu().numpy())  # (B, D)
                yield [one if view is None else replace(one, vector=next(rows)) for one, view in prepared]
                num_done += len(prepared)
                options.progress(num_done, len(indices))
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(
    model: PretrainedModel, dataset: Dataset, index: int, is_known: Callable[[bytes], bool] | None
) -> tuple[Encoded, Tensor | None]:
    """Read, hash and decode one image; the view (S, S, 3) is None where it is known or cannot be read."""
    digest = b""
    try:
        image = dataset.read(index).image
        if is_known is not None:
            digest = _digest(image)
            if is_known(digest):
                return Encoded(index, digest), None
        view = eval_transform(image, **model.preprocessing.transform_options())
    except DataError as error:
        return Encoded(index, digest, cause=error.cause), None
    return Encoded(index, digest), torch.from_numpy(view)


def _digest(image: bytes | Pixels) -> bytes:
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


@dataclass(frozen=True, slots=True)
class Part:
    """The results of some items."""

    rows: Tensor
    """float32 on the CPU, (R, …); an item has one row, several or none."""
    indices: Tensor
    """The item of each row, ascending, int64, (R,)."""
    causes: dict[int, str] = field(default_factory=dict)
    """Why an item has no row, by its number, ascending."""


def encode_shares(num_items: int, encode: Callable[[range, FeatureOptions], Part], options: FeatureOptions) -> Part:
    """Encode items on this process alone or, where `options.split_over_ranks` says so, a share on each rank.

    Ranks meet once, after each has encoded its share. An error of `encode` is raised on its rank only, so errors
    that depend on the items belong behind this call, where every rank knows the same.

    Args:
        num_items: N, the same on every rank.
        encode: from the numbers of the items to encode, in [0, N), and the options for them; not called for an
            empty share.
        options: the caller's; progress is reported on rank 0, for the ranks together.

    Returns:
        The rows of all N items on every rank.
    """
    num_ranks = options.num_shares
    if num_ranks == 1:
        return encode(range(num_items), options)
    own = range(rank(), num_items, num_ranks)

    def report(num_done: int, _: int) -> None:  # the share of rank 0 is the largest
        options.progress(min(num_done * num_ranks, num_items), num_items)

    shared = replace(options, progress=report if rank() == 0 else _keep_quiet)
    parts: list[Any] = [None] * num_ranks
    dist.all_gather_object(parts, encode(own, shared) if own else Part(torch.empty(0, 0), torch.empty(0).long()))
    indices, order = torch.cat([part.indices for part in parts]).sort(stable=True)  # (R,)
    rows = [part.rows for part in parts if len(part.rows)]
    causes = dict(sorted(item for part in parts for item in part.causes.items()))
    return Part(torch.cat(rows)[order] if rows else torch.empty(0, 0), indices, causes)


def take(items: Sequence[T], own: range) -> Sequence[T]:
    """Return the items of a share."""
    return items[own.start : own.stop : own.step]
