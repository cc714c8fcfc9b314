"""A model for Python: encoder, preprocessing and tokenizer, in OpenCLIP's manner."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from declip_cli.data.tokenizer import Tokenizer
from declip_cli.interop.assumptions import parse_assumptions
from declip_cli.interop.read import load_model
from declip_cli.interop.sample import view_of
from declip_cli.model.clip import Encoder


def load(
    path: str | PathLike[str] | None = None, *, device: str | torch.device = "cpu", assume: Sequence[str] = ()
) -> tuple[Encoder, Callable[[Image.Image], Tensor], Callable[[str | Sequence[str]], Tensor]]:
    """Open a model with all that it takes to use it.

    Args:
        path: a run folder, a model folder, a checkpoint of another project or a name of OpenCLIP's; None takes the
            newest run.
        device: where to put the model.
        assume: what the checkpoint does not say, as `--assume` takes it: `activation=gelu`. What has to be assumed
            is a warning.

    Returns:
        The model in evaluation mode, with `encode_image`, `encode_text` and `logit_scale`; a function from an image
        to what `encode_image` takes, normalized, (3, S, S); and one from texts to what `encode_text` takes, (B, L).

    Raises:
        ModelError: there is no model, or it cannot be read.
    """
    place = None if path is None else Path(path)
    given = parse_assumptions(assume)
    model = load_model(place, device=device, option="load", given=given, log=partial(warnings.warn, stacklevel=4))
    preprocessing = model.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))

    def preprocess(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(view_of(image, preprocessing)).permute(2, 0, 1)  # (3, S, S)
        return (pixels.float() / 255 - mean) / std

    def tokenize(texts: str | Sequence[str]) -> Tensor:
        return tokenizer.encode([texts] if isinstance(texts, str) else texts)

    tokenizer = model.tokenizer or Tokenizer(model.context_length)
    return model.encoder, preprocess, tokenize
