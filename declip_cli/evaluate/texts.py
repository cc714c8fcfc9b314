"""Texts and a model → features: sorted by length, cut to the longest of each batch, stored by their content."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from declip_cli.data.tokenizer import END, Tokenizer
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions, Part, encode_shares, take
from declip_cli.evaluate.features import by_content
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.clip import WholeTokenizer
from declip_cli.model.precision import autocast

T = TypeVar("T")


def text_features(
    model: PretrainedModel,
    texts: Sequence[str],
    *,
    normalize: bool = True,
    options: FeatureOptions = DEFAULTS,
) -> Tensor:
    """Encode texts, sorted by length and cut to the longest of each batch.

    Cutting changes nothing: the tower is causal and reads its feature at the end token. A single text is not stored.

    Args:
        model: the encoder and its context length.
        texts: N texts; longer ones than the context are cut, keeping the end token.
        normalize: make each row unit length.
        options: how features are computed.

    Returns:
        float32 on the CPU, (N, D), in the order of the texts.

    Raises:
        EvaluateError: there is no text.
    """
    if not texts:
        raise EvaluateError("there is no text to encode", remedy="check the captions of the data set")

    def encode(indices: Sequence[int]) -> Tensor:
        chosen = [texts[index] for index in indices]
        return encode_shares(len(chosen), partial(_encode_texts, model, chosen), options).rows

    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
    kept = options if len(texts) > 1 else replace(options, use_cache=False)
    features = by_content(model, "texts", digests, encode, kept)
    return F.normalize(features, dim=-1) if normalize else features


def _encode_texts(model: PretrainedModel, texts: Sequence[str], own: range, options: FeatureOptions) -> Part:
    """Encode the texts of a share, one row each."""
    batches = [
        (indices, rows.float().cpu())  # (B,), (B, D)
        for indices, _, rows in encode_batches(model, take(texts, own), model.encoder.encode_text, options)
    ]
    order = torch.cat([indices for indices, _ in batches]).argsort()  # (N,)
    return Part(torch.cat([rows for _, rows in batches])[order], torch.tensor(own))


def encode_batches(
    model: PretrainedModel, texts: Sequence[str], encode: Callable[[Tensor], T], options: FeatureOptions
) -> Iterator[tuple[Tensor, Tensor, T]]:
    """Apply a function of the encoder, of tokens (B, L) on its device, to texts, batch by batch.

    Yields:
        As of `length_sorted_batches`, and what `encode` returns.
    """
    num_done = 0
    with torch.inference_mode(), autocast(options.precision, model.device):
        for indices, tokens in _batches(model, texts, options.text_batch_size):
            yield indices, tokens, encode(tokens.to(model.device))
            num_done += len(indices)
            options.progress(num_done, len(texts))


def _batches(model: PretrainedModel, texts: Sequence[str], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut texts into batches; yields as in `length_sorted_batches`."""
    if model.tokenizer is None:
        yield from length_sorted_batches(texts, model.context_length, batch_size)
        return
    for indices in torch.arange(len(texts)).split(batch_size):
        yield indices, model.tokenizer.encode([texts[index] for index in indices])  # (B,), (B, L)


def length_sorted_batches(
    texts: Sequence[str], context_length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut texts into batches of similar length, each padded only to its own longest.

    Yields:
        The numbers of the texts, (B,), and their tokens, (B, L).
    """
    tokens = Tokenizer(context_length=context_length).encode(texts, pad_to_context=False)  # (N, L)
    lengths = (tokens == END).int().argmax(dim=1) + 1  # (N,); the padding's id 0 is also that of "!"
    for indices in lengths.argsort(stable=True).split(batch_size):
        longest = int(lengths[indices].max())
        yield indices, tokens[indices, :longest]  # (B,), (B, L)


def count_truncated(texts: Sequence[str], context_length: int, other: WholeTokenizer | None = None) -> int:
    """Count the texts that are longer than a model reads, in tokens, and lose their ends."""
    if other is not None:
        return other.count_truncated(texts)

    def surely_fits(text: str) -> bool:  # a token covers at least one byte; other characters may become more bytes
        return len(text) <= context_length - 2 and text.isascii() and "&" not in text

    tokenizer = Tokenizer(context_length=context_length)
    tokenizer.encode([text for text in texts if not surely_fits(text)], pad_to_context=False)
    return tokenizer.num_truncated
