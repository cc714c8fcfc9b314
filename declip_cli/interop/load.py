"""A model for Python: encoder, preprocessing and tokenizer, in OpenCLIP's manner."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from declip_cli.data.tokenizer import Tokenizer
from declip_cli.interop.pictures import view_of
from declip_cli.interop.read import load_model
from declip_cli.model.clip import DualEncoder


def load(
    path: str | PathLike[str] | None = None, *, device: str | torch.device = "cpu"
) -> tuple[DualEncoder, Callable[[Image.Image], Tensor], Callable[[str | Sequence[str]], Tensor]]:
    """Open a model with all that it takes to use it.

    Args:
        path: a run folder, a model folder or a checkpoint of another project; None takes the newest run.
        device: where to put the model.

    Returns:
        The model in evaluation mode, with `encode_image`, `encode_text` and `logit_scale`; a function from a picture
        to what `encode_image` takes, normalized, (3, S, S); and one from texts to what `encode_text` takes, (B, L).

    Raises:
        ModelError: there is no model, or it cannot be read.
    """
    model = load_model(None if path is None else Path(path), device=device, option="load")
    how = model.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))

    def preprocess(picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(view_of(picture, how)).permute(2, 0, 1)  # (3, S, S)
        return (pixels.float() / 255 - mean) / std

    def tokenize(texts: str | Sequence[str]) -> Tensor:
        return tokenizer.encode(texts)

    tokenizer = Tokenizer(model.context_length)
    return model.encoder, preprocess, tokenize
