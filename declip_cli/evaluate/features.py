"""Pictures or texts and a model → features: batched, in bfloat16 where native, cached by content."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

from declip_cli.data.dataset import Dataset, Pixels
from declip_cli.data.tokenizer import END, Tokenizer
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.feature_cache import cached_tensor, content_key, store_features
from declip_cli.evaluate.image_pipeline import BLOCK_SIZE, FeatureOptions, ImageInput, ImageJob, Progress
from declip_cli.evaluate.shares import Part, encode_shares, take
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import autocast, resolve_precision

__all__ = [
    "BLOCK_SIZE", "DatasetImages", "FeatureOptions", "ImageFeatures", "ImageInput", "Progress", "Skipped",
    "count_cut", "image_features", "length_sorted_batches", "map_images", "text_features",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Skipped:
    """Pictures that could not be used for one cause."""

    count: int
    first: str
    """Key of the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFeatures:
    """Features of the readable pictures, in their order."""

    features: Tensor
    """float32, (N', D), N' <= N."""
    kept: list[int]
    """For each row, the picture's number among the inputs."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """Unreadable pictures by cause."""

    def skipped_to_json(self) -> dict[str, dict[str, int | str]]:
        """Return the unreadable pictures as nested dicts."""
        return {cause: {"count": s.count, "first": s.first} for cause, s in self.skipped.items()}


class DatasetImages(Sequence[ImageInput]):
    """The images of a data set as inputs of the functions below."""

    def __init__(self, dataset: Dataset, numbers: Sequence[int] | None = None) -> None:
        self._dataset = dataset
        self._numbers = range(len(dataset)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> ImageInput: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[ImageInput]: ...
    def __getitem__(self, number: int | slice) -> ImageInput | Sequence[ImageInput]:
        if isinstance(number, slice):
            return DatasetImages(self._dataset, self._numbers[number])
        return self._dataset.named(self._numbers[number]), partial(self._read, self._numbers[number])

    def _read(self, number: int) -> bytes | Pixels:
        return self._dataset.read(number).image


def image_features(
    model: PretrainedModel,
    inputs: Sequence[ImageInput],
    *,
    projected: bool = True,
    normalise: bool = True,
    options: FeatureOptions | None = None,
) -> ImageFeatures:
    """Encode pictures, skipping and counting those that cannot be read.

    Args:
        model: the encoder and its preprocessing.
        inputs: N pictures as (key, function that returns the encoded bytes).
        projected: the shared embedding, of width D; else the tower's own features, of width E.
        normalise: make each row unit length.
        options: batch size, precision, threads, cache.

    Returns:
        Features on the CPU, (N', D) or (N', E), and what was skipped.

    Raises:
        EvaluateError: there is no picture, or none of them can be read.
    """

    def encode(images: Tensor) -> Tensor:  # (B, S, S, 3) -> (B, D)
        features: Tensor = model.encoder.encode_image(images, projected=projected)
        return features

    result = map_images(model, inputs, encode, label=f"projected={projected}", options=options)
    if not normalise:
        return result
    features = F.normalize(result.features, dim=-1)  # (N', D)
    return ImageFeatures(features=features, kept=result.kept, skipped=result.skipped)


def map_images(
    model: PretrainedModel,
    inputs: Sequence[ImageInput],
    encode: Callable[[Tensor], Tensor],
    *,
    label: str,
    options: FeatureOptions | None = None,
) -> ImageFeatures:
    """Apply a function of the encoder to pictures: read, decode, crop, batch, encode, cache.

    Args:
        model: where the encoder lies, and its preprocessing.
        inputs: N pictures.
        encode: uint8 pictures (B, S, S, 3) on the encoder's device → (B, D).
        label: names what `encode` does, as part of the cache key.
        options: batch size, precision, threads, cache.

    Returns:
        One row per readable picture, float32 on the CPU.

    Raises:
        EvaluateError: there is no picture, or none of them can be read.
    """
    options = options or FeatureOptions()
    if not inputs:
        raise EvaluateError("there is no picture to encode", remedy="check the path of the data set")
    found = encode_shares(len(inputs), partial(_encode_images, model, inputs, encode, label), options)
    skipped: dict[str, Skipped] = {}
    for number, cause in found.causes.items():
        seen = skipped.get(cause, Skipped(0, inputs[number][0]))
        skipped[cause] = Skipped(seen.count + 1, seen.first)
    if not len(found.rows):
        causes_told = ", ".join(f"{cause} ({s.count}, first {s.first})" for cause, s in skipped.items())
        raise EvaluateError(
            f"none of the {len(inputs)} pictures can be read: {causes_told}",
            remedy="check that the files are pictures",
        )
    return ImageFeatures(features=found.rows, kept=found.numbers.tolist(), skipped=skipped)


def _encode_images(
    model: PretrainedModel,
    inputs: Sequence[ImageInput],
    encode: Callable[[Tensor], Tensor],
    label: str,
    own: range,
    options: FeatureOptions,
) -> Part:
    """Encode the images of a share, one row each."""
    rows: list[Tensor] = []
    kept: list[int] = []
    causes: dict[int, str] = {}
    job = ImageJob(model, encode, label, options)
    with job, torch.inference_mode(), autocast(options.precision, job.device):
        for block in job.run(take(inputs, own)):
            rows.append(block.features)
            kept += [own[block.start + number] for number in block.kept]
            causes |= {own[block.start + number]: cause for number, cause in block.causes.items()}
    features = torch.cat([row for row in rows if len(row)]) if kept else torch.empty(0, 0)  # (N', D)
    return Part(features, torch.tensor(kept, dtype=torch.int64), causes)


def text_features(
    model: PretrainedModel,
    texts: Sequence[str],
    *,
    normalise: bool = True,
    options: FeatureOptions | None = None,
) -> Tensor:
    """Encode texts, sorted by length and cut to the longest of each batch.

    Cutting changes nothing: the tower is causal and reads its feature at the end token.

    Args:
        model: the encoder and its context length.
        texts: N texts; longer ones than the context are cut, keeping the end token.
        normalise: make each row unit length.
        options: batch size, precision, cache.

    Returns:
        float32 on the CPU, (N, D), in the order of the texts.

    Raises:
        EvaluateError: there is no text.
    """
    options = options or FeatureOptions()
    if not texts:
        raise EvaluateError("there is no text to encode", remedy="check the captions of the data set")
    device = next(model.encoder.parameters()).device
    precision = resolve_precision(options.precision, device)
    key = content_key(["texts", model.fingerprint, precision, *texts])
    use_cache = options.caches(model)
    features = cached_tensor(key) if use_cache else None
    if features is None:
        features = encode_shares(len(texts), partial(_encode_texts, model, texts), options).rows
        if use_cache:
            store_features(key, {"features": features}, {})
    return F.normalize(features, dim=-1) if normalise else features


def _encode_texts(model: PretrainedModel, texts: Sequence[str], own: range, options: FeatureOptions) -> Part:
    """Encode the texts of a share, one row each."""
    device = next(model.encoder.parameters()).device
    texts = take(texts, own)
    features: Tensor | None = None
    num_done = 0
    with torch.inference_mode(), autocast(options.precision, device):
        for numbers, tokens in length_sorted_batches(texts, model.context_length, options.text_batch_size):
            rows = model.encoder.encode_text(tokens.to(device)).float().cpu()  # (B, D)
            if features is None:
                features = torch.empty(len(texts), rows.shape[1])  # (N, D)
            features[numbers] = rows
            num_done += len(numbers)
            if options.progress is not None:
                options.progress(num_done, len(texts))
    assert features is not None
    return Part(features, torch.tensor(own))


def count_cut(texts: Sequence[str], context_length: int) -> int:
    """Count the texts that are longer than a model reads, and lose their ends.

    Args:
        texts: N texts.
        context_length: longest text in tokens.

    Returns:
        How many are cut.
    """
    tokenizer = Tokenizer(context_length=context_length)
    tokenizer.encode([text for text in texts if not _surely_fits(text, context_length)], pad_to_context=False)
    return tokenizer.num_truncated


def _surely_fits(text: str, context_length: int) -> bool:
    """Say without tokenizing that a text is not cut: a token covers at least one byte, start and end are added.

    Other characters and entities may become more bytes than they were, so nothing is said of them.
    """
    return len(text) <= context_length - 2 and text.isascii() and "&" not in text


def length_sorted_batches(
    texts: Sequence[str], context_length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut texts into batches of similar length, each padded only to its own longest.

    Args:
        texts: N texts.
        context_length: longest text in tokens.
        batch_size: most texts per batch, B.

    Yields:
        The numbers of the texts, (B,), and their tokens, (B, L).
    """
    tokens = Tokenizer(context_length=context_length).encode(texts, pad_to_context=False)  # (N, L)
    lengths = (tokens == END).int().argmax(dim=1) + 1  # (N,); the padding's id 0 is also that of "!"
    for numbers in lengths.argsort(stable=True).split(batch_size):
        longest = int(lengths[numbers].max())
        yield numbers, tokens[numbers, :longest]  # (B,), (B, L)
