"""Images and a model → features, kept in a store by their content."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from declip_cli.data.dataset import Dataset, Skips
from declip_cli.data.shards.store import default_cache_dir
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.encoding import DEFAULTS, Encode, FeatureOptions, Part, encode_images, encode_shares
from declip_cli.evaluate.vectors import Encoded, Rows, StoreError, VectorStore, use_store
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import resolve_precision

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Features of the readable images, in their order."""

    features: Tensor
    """float32, (N', D), N' <= N."""
    kept: list[int]
    """For each row, the image's number in the data set."""
    skipped: Skips
    """Unreadable images."""


@dataclass(frozen=True, slots=True)
class Update:
    """The state of a data set's images in a store."""

    rows: Rows
    """The row of each image, (N,), -1 where it cannot be read."""
    skipped: Skips
    num_read: int
    """Images that were not in the store with the same stamp."""
    num_changed: int
    """Those of them that were there with another."""
    num_encoded: int
    """Contents that were not in the store."""


def image_features(
    model: PretrainedModel,
    dataset: Dataset,
    *,
    projected: bool = True,
    normalize: bool = True,
    options: FeatureOptions = DEFAULTS,
) -> ImageFeatures:
    """Encode images, skipping and counting those that cannot be read.

    Args:
        model: the encoder and its preprocessing.
        dataset: N images.
        projected: the shared embedding, of width D; else the tower's own features, of width E.
        normalize: make each row unit length.
        options: how features are computed.

    Raises:
        EvaluateError: there is no image, or none of them can be read.
    """
    # Zero-shot, retrieval and search share the features of unit length in the shared embedding.
    label = "embedding" if projected and normalize else f"projected={projected} unit={normalize}"
    encode = embedder(model, projected=projected, normalize=normalize)
    return map_images(model, dataset, encode, label=label, options=options)


def embedder(model: PretrainedModel, *, projected: bool = True, normalize: bool = True) -> Encode:
    """Return the function that encodes images (B, S, S, 3) as vectors (B, D); arguments as in `image_features`."""

    def encode(images: Tensor) -> Tensor:
        features = model.encoder.encode_image(images, projected=projected).float()  # (B, D)
        return F.normalize(features, dim=-1) if normalize else features

    return encode


def map_images(
    model: PretrainedModel, dataset: Dataset, encode: Encode, *, label: str, options: FeatureOptions = DEFAULTS
) -> ImageFeatures:
    """Apply a function of the encoder to images: read, decode, crop, batch, encode, store.

    Args:
        model: where the encoder lies, and its preprocessing.
        dataset: N images.
        encode: what is computed of them.
        label: names what `encode` does, to tell the store's kinds apart.
        options: how features are computed.

    Raises:
        EvaluateError: there is no image, or none of them can be read.
    """
    if not len(dataset):
        raise EvaluateError("there is no image to encode", remedy="check the path of the data set")

    def stored(store: VectorStore) -> ImageFeatures:
        found = update_store(store, model, dataset, encode, options)
        kept = np.flatnonzero(found.rows >= 0)  # (N',)
        features = torch.from_numpy(np.asarray(store.vectors()[found.rows[kept]]))  # (N', D)
        return ImageFeatures(features, kept.tolist(), found.skipped)

    def computed() -> ImageFeatures:
        found = encode_shares(len(dataset), partial(_encode_share, model, dataset, encode), options)
        return ImageFeatures(found.rows, found.indices.tolist(), _skips(dataset, found.causes))

    found = _with_store(model, label, stored, computed, options)
    if not found.kept:
        causes = ", ".join(f"{cause} ({count}, first {first})" for cause, (count, first) in found.skipped.items())
        raise EvaluateError(
            f"none of the {len(dataset)} images can be read: {causes}", remedy="check that the files are images"
        )
    return found


def update_store(
    store: VectorStore,
    model: PretrainedModel,
    dataset: Dataset,
    encode: Encode,
    options: FeatureOptions,
    *,
    is_shared: bool = True,
) -> Update:
    """Bring a store up to date with a data set: only images with a new stamp are read, only new contents encoded.

    Arguments are as in `map_images`. Where the store `is_shared` with other data sets, paths are compared in full
    and captions are not kept.
    """
    rows = np.full(len(dataset), -1, dtype=np.int64)  # (N,)
    is_known = np.zeros(len(dataset), dtype=bool)  # (N,)
    causes: dict[int, str] = {}
    num_there = 0
    for index, row, cause, is_same in store.ask(_asked(dataset, is_shared=is_shared)):
        num_there += 1
        if is_same:
            rows[index], is_known[index] = row, True
            if row < 0:
                causes[index] = cause
    todo: list[int] = np.flatnonzero(~is_known).tolist()
    num_encoded, num_changed = 0, num_there - int(is_known.sum())

    def is_encoded(digest: bytes) -> bool:
        return store.find([digest]) != [None]

    for batch in encode_images(model, dataset, todo, encode, options, is_known=is_encoded):
        num_encoded += store.add(batch)
        for one, found in zip(batch, store.find([one.digest for one in batch]), strict=True):
            rows[one.index], cause = found or (-1, one.cause)
            if rows[one.index] < 0:
                causes[one.index] = cause
    if not todo:
        options.progress(len(dataset), len(dataset))
    return Update(rows, _skips(dataset, causes), len(todo), num_changed, num_encoded)


def _asked(dataset: Dataset, *, is_shared: bool) -> Iterator[tuple[int, str, str, str]]:
    for index in range(len(dataset)):
        try:
            key, stamp = dataset.key(index), dataset.stamp(index)
            caption = "" if is_shared else next(iter(dataset.captions(index)), "")
        except DataError:
            key, stamp, caption = dataset.named(index), "", ""
        yield index, os.path.abspath(key) if is_shared and "://" not in key else key, stamp, caption


def _skips(dataset: Dataset, causes: dict[int, str]) -> Skips:
    skips = Skips()
    for index in sorted(causes):
        skips.add(causes[index], dataset.named(index))
    return skips


def _with_store(
    model: PretrainedModel,
    kind: str,
    stored: Callable[[VectorStore], T],
    computed: Callable[[], T],
    options: FeatureOptions,
) -> T:
    """Work with the store of a kind of features, or without where it is not wanted or cannot be used."""
    if not options.caches(model):
        return computed()
    precision = resolve_precision(options.precision, model.device)
    key = content_key([kind, model.fingerprint, repr(model.preprocessing), precision])
    folder = Path(default_cache_dir()) / "vectors" / key[:32]
    try:
        return use_store(folder, key, model.name, stored, log=options.log)
    except StoreError as error:
        options.log(f"{error.message}; features are computed and not kept")
        return computed()


def content_key(parts: Iterable[str | bytes]) -> str:
    """Condense everything that decides a result into 64 hexadecimal digits; order and borders of the parts count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _encode_share(
    model: PretrainedModel, dataset: Dataset, encode: Encode, own: range, options: FeatureOptions
) -> Part:
    """Encode the images of a share, one row each."""
    found = [one for batch in encode_images(model, dataset, own, encode, options) for one in batch]
    vectors = [one.vector for one in found if one.vector is not None]
    indices = [one.index for one in found if one.vector is not None]
    causes = {one.index: one.cause for one in found if one.vector is None}
    features = torch.from_numpy(np.stack(vectors)) if vectors else torch.empty(0, 0)  # (N', D)
    return Part(features, torch.tensor(indices, dtype=torch.int64), causes)


def by_content(
    model: PretrainedModel,
    kind: str,
    digests: Sequence[bytes],
    encode: Callable[[Sequence[int]], Tensor],
    options: FeatureOptions,
) -> Tensor:
    """Encode what the store of a kind does not hold yet.

    Args:
        model: makes the features.
        kind: names them.
        digests: of what decides each row, N.
        encode: from numbers in [0, N) to their rows, float32 on the CPU, (n, D).
        options: store.

    Returns:
        All rows, (N, D).
    """

    def stored(store: VectorStore) -> Tensor:
        missing = [index for index, found in enumerate(store.find(digests)) if found is None]
        if missing:
            made = encode(missing).numpy()  # (n, D)
            store.add([Encoded(index, digests[index], row) for index, row in zip(missing, made, strict=True)])
        rows = [found[0] for found in store.find(digests) if found is not None]
        return torch.from_numpy(np.asarray(store.vectors()[rows]))

    return _with_store(model, kind, stored, lambda: encode(range(len(digests))), options)
