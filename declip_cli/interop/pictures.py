"""Pictures and texts that two programs are compared on, and what this one makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from declip_cli.data.catalogue import open_dataset
from declip_cli.data.dataset import Pixels
from declip_cli.data.decode import decode_image, pixels_of
from declip_cli.data.image_views import evaluation_view
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.clip import unit
from declip_cli.model.preprocessing import Preprocessing

_NUM_PICTURES = 24
_LONG_TEXT = "a very long text that goes on " * 20
"""Longer than any context, so that cutting is compared, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What two programs are given."""

    pictures: Sequence[Image.Image]
    """RGB, upright, of several shapes."""
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.pictures) + len(self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What a program makes of a sample: N pictures, M texts, each row (and each token's) of unit length."""

    images: Tensor
    """(N, D); of models that compare token by token, (N, P, Q)."""
    texts: Tensor
    """(M, D); of models that compare token by token, (T, Q): the tokens of all texts, without padding."""

    def difference(self, other: "Embedded") -> float:
        """Return the largest absolute difference of any number; infinity where shapes differ or one is not finite."""
        largest = 0.0
        for one, another in ((self.images, other.images), (self.texts, other.texts)):
            if one.shape != another.shape or not another.isfinite().all():
                return float("inf")
            largest = max(largest, float((one - another).abs().max()))
        return largest


def demo_sample() -> Sample:
    """Take pictures of several shapes from the demo, their captions, an empty text and one that is too long."""
    demo = open_dataset("demo", "train")
    numbers = range(0, len(demo), -(-len(demo) // _NUM_PICTURES))
    pictures = [Image.fromarray(decode_image(demo.read(number).encoded)) for number in numbers]
    captions = [demo.captions(number)[0] for number in numbers]
    return Sample(pictures=pictures, texts=[*captions, "", _LONG_TEXT])


def view_of(picture: Image.Image | bytes, how: Preprocessing) -> Pixels:
    """Prepare a picture for the image tower but for the normalisation.

    Args:
        picture: opened by Pillow, or an encoded file.
        how: size, cut and filter.

    Returns:
        RGB, uint8, (S, S, 3).

    Raises:
        DataError: it cannot be decoded.
    """
    return evaluation_view(picture if isinstance(picture, bytes) else pixels_of(picture), **how.view_options())


def views_of(pictures: Sequence[Image.Image], how: Preprocessing) -> Tensor:
    """Prepare N pictures, → uint8 (N, S, S, 3)."""
    return torch.stack([torch.from_numpy(view_of(picture, how)) for picture in pictures])


def embed(model: PretrainedModel, sample: Sample) -> Embedded:
    """Encode a sample here, in float32.

    Args:
        model: on the CPU, in evaluation mode.
        sample: N pictures, M texts.
    """
    encoder, views = model.towers, views_of(sample.pictures, model.preprocessing)
    tokens = Tokenizer(model.context_length).encode(list(sample.texts))  # (M, L)
    with torch.inference_mode():
        if not model.token_wise:
            return Embedded(images=unit(encoder.encode_image(views)), texts=unit(encoder.encode_text(tokens)))
        text_tokens, mask = encoder.encode_text_tokens(tokens)  # (M, L, Q), (M, L)
        return Embedded(images=unit(encoder.encode_image_tokens(views)), texts=unit(text_tokens)[mask])
