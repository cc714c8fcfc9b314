"""Images and texts that two programs are compared on, and what this one makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from declip_cli.data.catalog import open_dataset
from declip_cli.data.dataset import Pixels
from declip_cli.data.decode import decode_image, pixels_of
from declip_cli.data.image_views import eval_transform
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.clip import normalize
from declip_cli.model.preprocessing import Preprocessing

_NUM_IMAGES = 24
_LONG_TEXT = "a very long text that goes on " * 20
"""Longer than any context, so that cutting is compared, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What two programs are given."""

    images: Sequence[Image.Image]
    """RGB, upright, of several shapes."""
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.images) + len(self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What a program makes of a sample: N images, M texts, each row (and each token's) of unit length."""

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
    """Take images of several shapes from the demo, their captions, an empty text and one that is too long."""
    demo = open_dataset("demo", "train")
    indices = range(0, len(demo), -(-len(demo) // _NUM_IMAGES))
    images = [Image.fromarray(decode_image(demo.read(index).encoded)) for index in indices]
    captions = [demo.captions(index)[0] for index in indices]
    return Sample(images=images, texts=[*captions, "", _LONG_TEXT])


def view_of(image: Image.Image | bytes, preprocessing: Preprocessing) -> Pixels:
    """Prepare an image for the image tower but for the normalization.

    Args:
        image: opened by Pillow, or an encoded file.
        preprocessing: size, cut and filter.

    Returns:
        RGB, uint8, (S, S, 3).

    Raises:
        DataError: it cannot be decoded.
    """
    return eval_transform(image if isinstance(image, bytes) else pixels_of(image), **preprocessing.transform_options())


def views_of(images: Sequence[Image.Image], preprocessing: Preprocessing) -> Tensor:
    """Prepare N images, → uint8 (N, S, S, 3)."""
    return torch.stack([torch.from_numpy(view_of(image, preprocessing)) for image in images])


def embed(model: PretrainedModel, sample: Sample) -> Embedded:
    """Encode a sample here, in float32.

    Args:
        model: on the CPU, in evaluation mode.
        sample: N images, M texts.
    """
    encoder, views = model.towers, views_of(sample.images, model.preprocessing)
    tokens = Tokenizer(model.context_length).encode(list(sample.texts))  # (M, L)
    with torch.inference_mode():
        if not model.token_wise:
            return Embedded(images=normalize(encoder.encode_image(views)), texts=normalize(encoder.encode_text(tokens)))
        text_tokens, mask = encoder.encode_text_tokens(tokens)  # (M, L, Q), (M, L)
        return Embedded(images=normalize(encoder.encode_image_tokens(views)), texts=normalize(text_tokens)[mask])
