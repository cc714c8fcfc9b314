"""A model of another project, translated: parameters under our names, dimensions, preprocessing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.interop.assumptions import Assumptions
from declip_cli.interop.weights import Checkpoint
from declip_cli.model.clip import DualEncoder
from declip_cli.model.dims import Architecture, describe_architecture
from declip_cli.model.heads import TOKEN_WISE_DIM
from declip_cli.model.open_clip_layout import VOCABULARY_SIZE
from declip_cli.model.preprocessing import Preprocessing, read_preprocessing
from declip_cli.model.shapes import Untraced, infer_architecture

DAMAGED = "copy the model again"
_AFFINE = r"\.(weight|bias)"
_OURS = re.compile(
    rf"logit_(scale|bias)|token_wise\.(image|text)_mapping{_AFFINE}|(visual|text)\.positional_embedding"
    rf"|(visual|text)\.transformer\.resblocks\.\d+\.(ln_[12]{_AFFINE}|mlp\.c_(fc|proj){_AFFINE}|attn\.out_proj{_AFFINE}"
    r"|attn\.in_proj_(weight|bias))"
    rf"|visual\.(class_embedding|proj|conv1\.weight|ln_(pre|post){_AFFINE})"
    rf"|text\.(token_embedding\.weight|ln_final{_AFFINE}|text_projection{_AFFINE})"
    r"|visual\.(layer[1-4]\.\d+\.)?(conv|bn)[123]\.\w+|visual\.layer[1-4]\.\d+\.downsample\.[01]\.\w+"
    rf"|visual\.attnpool\.(positional_embedding|[qkvc]_proj{_AFFINE})"
)
"""Names of a `DualEncoder`'s parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignModel:
    """All that is known about it, without a module."""

    project: str
    """`open_clip`, `openai`, `huggingface`, `original` (DeCLIP) or `slip`."""
    method: str
    state: dict[str, Tensor]
    """Of a `DualEncoder`; on the device `meta` where only shapes were read."""
    architecture: Architecture
    preprocessing: Preprocessing
    container: str
    paths: tuple[Path, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the file says about its training."""
    assumed: tuple[str, ...] = ()
    """A sentence about each thing that it does not say."""

    @property
    def is_token_wise(self) -> bool:
        """Whether it was trained to be compared token by token."""
        return self.method == "filip"

    @property
    def context_length(self) -> int:
        """Longest text in tokens."""
        return self.architecture.text.context_length

    def describe(self) -> dict[str, Any]:
        """Write the architecture as plain values."""
        return describe_architecture(self.architecture)

    def tokenizer(self) -> None:
        """Return nothing: texts are of CLIP's vocabulary, of any length up to the context."""

    def build(self) -> DualEncoder:
        """Make the encoder, in evaluation mode.

        Raises:
            ModelError: the parameters do not fit each other.
        """
        has_heads = any(name.startswith("token_wise.") for name in self.state)
        with torch.device("meta"):  # neither memory nor time for random weights
            encoder = DualEncoder(self.architecture, token_wise_dim=TOKEN_WISE_DIM if has_heads else 0)
        try:
            encoder.load_state_dict(self.state, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{self.paths[0]} does not fit together: {reason:.300}", remedy=DAMAGED) from error
        encoder.pixel_mean, encoder.pixel_std = torch.zeros(3), torch.zeros(3)
        encoder.set_pixels(self.preprocessing.mean, self.preprocessing.std)
        return encoder.eval()


def translated(
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    untraced: Untraced,
    *,
    project: str,
    method: str,
    pixels: Mapping[str, Any],
    assumptions: Assumptions,
) -> ForeignModel:
    """Put a translated model together.

    Args:
        checkpoint: where it comes from.
        state: under our names, of any floating type.
        untraced: what its shapes do not tell.
        project: see `ForeignModel`.
        method: see `ForeignModel`.
        pixels: fields of `Preprocessing` but for sizes that follow from the shapes.
        assumptions: what the user said of the preprocessing overrides it.

    Returns:
        The model.

    Raises:
        ModelError: parts are missing or contradict each other.
    """
    _check_names(state)
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    try:
        architecture = infer_architecture(floats, untraced)
        side = architecture.image_side_px
        sizes = {"image_side_px": side, "resize_px": pixels.get("resize_px", side)}
        known = read_preprocessing(dict(pixels) | sizes, remedy=DAMAGED)
        preprocessing = changed_preprocessing(known, assumptions.given)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ModelError(f"{checkpoint.paths[0]} is not a complete CLIP model: {what:.200}", remedy=DAMAGED) from error
    return ForeignModel(
        project=project,
        method=method,
        state=floats,
        architecture=architecture,
        preprocessing=preprocessing,
        container=checkpoint.container,
        paths=checkpoint.paths,
        facts=checkpoint.facts,
        assumed=tuple(assumptions.notes),
    )


def _check_names(state: Mapping[str, Tensor]) -> None:
    """Refuse parts that our towers do not have; what a file leaves out shows elsewhere."""
    other = next((name for name in state if not _OURS.fullmatch(name)), None)
    if other is not None:
        raise ModelError(
            f"it has a part that CLIP's towers do not have: {other:.100}",
            remedy="use a model whose towers are CLIP's own, such as ViT-B-32, ViT-L-14 or RN50",
        )


def changed_preprocessing(known: Preprocessing, given: Mapping[str, Any]) -> Preprocessing:
    """Override what is known of the images by what the user said.

    Raises:
        ModelError: images cannot be prepared like that.
    """
    names = {"mean": "mean", "std": "std", "interpolation": "interpolation", "crop": "crop_at", "resize": "resize_px"}
    values = known.to_json() | {name: given[key] for key, name in names.items() if key in given}
    if "resize" in given:
        values["resize_mode"] = "shortest"
    return read_preprocessing(values, remedy=f"--assume resize={known.image_side_px}")


def with_mask_token(rows: Tensor) -> Tensor:
    """Add the embedding of our mask token, which other projects have not: the mean of all, (V, E) → (V + 1, E).

    Raises:
        ModelError: it is another vocabulary than CLIP's.
    """
    if rows.ndim != 2 or len(rows) != VOCABULARY_SIZE:
        raise ModelError(
            f"its vocabulary has {len(rows) if rows.ndim else 0:,} words, CLIP's has {VOCABULARY_SIZE:,}",
            remedy="use a model with CLIP's tokenizer",
        )
    return torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype)])
