"""Pictures or texts and a model → features: batched, in bfloat16 where native, cached by content."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from declip_cli.data.image_views import evaluation_view
from declip_cli.data.tokenizer import END, Tokenizer
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.feature_cache import cached_tensor, content_key, load_features, store_features
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import Precision, autocast, resolve_precision

ImageInput: TypeAlias = tuple[str, Callable[[], bytes]]
"""A picture's key, for messages, and how to read its encoded bytes (JPEG, PNG, …)."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with how many are done and how many there are."""

BLOCK_SIZE = 256
"""Pictures per cache file: what is read, hashed and looked up together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureOptions:
    """How features are computed; none of it changes what they mean."""

    batch_size: int = 128
    """Pictures per forward pass."""
    text_batch_size: int = 256
    """Texts per forward pass."""
    precision: Precision = "auto"
    """`auto`: bf16 where the processor computes it natively, else fp32."""
    threads: int = 0
    """Threads that read and decode pictures; 0 takes the cores there are."""
    use_cache: bool = True
    """Look results up in, and add them to, the cache on disk; never done for a model still in training."""
    progress: Progress | None = None
    """Told after every batch."""


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
    job = _ImageJob(model, encode, label, options)
    rows: list[Tensor] = []
    kept: list[int] = []
    skipped: dict[str, Skipped] = {}
    device = next(model.encoder.parameters()).device
    with job.pool, torch.inference_mode(), autocast(options.precision, device):
        for start, block in job.blocks(inputs):
            features, good, causes = job.run(block, start, len(inputs))
            rows.append(features)
            kept += [start + number for number in good]
            for number, cause in causes.items():
                seen = skipped.get(cause, Skipped(0, inputs[start + number][0]))
                skipped[cause] = Skipped(seen.count + 1, seen.first)
    if not kept:
        causes_told = ", ".join(f"{cause} ({s.count}, first {s.first})" for cause, s in skipped.items())
        raise EvaluateError(
            f"none of the {len(inputs)} pictures can be read: {causes_told}",
            remedy="check that the files are pictures",
        )
    return ImageFeatures(features=torch.cat([row for row in rows if len(row)]), kept=kept, skipped=skipped)


class _ImageJob:
    """One pass over pictures: threads read and decode ahead while the encoder works."""

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
        self.pool = ThreadPoolExecutor(options.threads or os.cpu_count() or 1)
        precision = resolve_precision(options.precision, self.device)
        self.use_cache = options.use_cache and bool(model.fingerprint)
        view = f"{model.image_side_px} {model.resize_px} {model.interpolation}"
        self.key_parts = ("images", model.fingerprint, view, precision, label)

    def blocks(self, inputs: Sequence[ImageInput]) -> Iterator[tuple[int, list["Future[bytes | str]"]]]:
        """Yield the number of each block's first picture and its reads, one block read ahead."""
        pending: list[tuple[int, list[Future[bytes | str]]]] = []
        for start in range(0, len(inputs), BLOCK_SIZE):
            block = inputs[start : start + BLOCK_SIZE]
            pending.append((start, [self.pool.submit(_read, load) for _, load in block]))
            if len(pending) > 1:
                yield pending.pop(0)
        yield from pending

    def run(
        self, block: list["Future[bytes | str]"], num_done: int, num_all: int
    ) -> tuple[Tensor, list[int], dict[int, str]]:
        """Return a block's rows, the numbers of its readable pictures and the causes of the others."""
        contents = [future.result() for future in block]
        digests = [hashlib.sha256(c).digest() if isinstance(c, bytes) else c for c in contents]
        key = content_key([*self.key_parts, *digests])
        found = load_features(key) if self.use_cache else None
        if found is not None:
            causes = {int(number): cause for number, cause in json.loads(found[1]["causes"]).items()}
            self._tell(num_done + len(block), num_all)
            return found[0]["features"], found[0]["kept"].tolist(), causes
        rows, kept, causes = self._encode(contents, num_done, num_all)
        if self.use_cache:
            tensors = {"features": rows, "kept": torch.tensor(kept, dtype=torch.int64)}
            store_features(key, tensors, {"causes": json.dumps(causes)})
        return rows, kept, causes

    def _encode(
        self, contents: list[bytes | str], num_done: int, num_all: int
    ) -> tuple[Tensor, list[int], dict[int, str]]:
        decoded = [self.pool.submit(self._decode, content) for content in contents]
        rows: list[Tensor] = [torch.empty(0, 0)]
        kept: list[int] = []
        causes: dict[int, str] = {}
        for start in range(0, len(decoded), self.options.batch_size):
            views: list[Tensor] = []
            for number, future in enumerate(decoded[start : start + self.options.batch_size], start):
                view = future.result()
                if isinstance(view, str):
                    causes[number] = view
                else:
                    views.append(view)
                    kept.append(number)
            if views:
                images = torch.stack(views).to(self.device, non_blocking=True)  # (B, S, S, 3)
                rows.append(self.encode(images).float().cpu())  # (B, D)
            self._tell(num_done + min(start + self.options.batch_size, len(decoded)), num_all)
        return torch.cat(rows[1:] or rows), kept, causes

    def _decode(self, content: bytes | str) -> Tensor | str:
        if isinstance(content, str):
            return content
        try:
            view = evaluation_view(
                content,
                side_px=self.model.image_side_px,
                resize_px=self.model.resize_px,
                interpolation=self.model.interpolation,
            )  # (S, S, 3)
        except DataError as error:
            return error.cause
        return torch.from_numpy(view)

    def _tell(self, num_done: int, num_all: int) -> None:
        if self.options.progress is not None:
            self.options.progress(num_done, num_all)


def _read(load: Callable[[], bytes]) -> bytes | str:
    """Return a picture's bytes, or the cause why there are none."""
    try:
        return load()
    except DataError as error:
        return error.cause
    except FileNotFoundError:
        return "missing file"
    except OSError as error:
        return f"unreadable file: {error.strerror}"


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
    use_cache = options.use_cache and bool(model.fingerprint)
    features = cached_tensor(key) if use_cache else None
    if features is None:
        features = _encode_texts(model, texts, device, options)
        if use_cache:
            store_features(key, {"features": features}, {})
    return F.normalize(features, dim=-1) if normalise else features


def _encode_texts(
    model: PretrainedModel, texts: Sequence[str], device: torch.device, options: FeatureOptions
) -> Tensor:
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
    return features


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
