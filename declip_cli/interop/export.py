"""Export: a model in another project's format, read back there and compared before it is reported."""

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from declip_cli.errors import ModelError
from declip_cli.files import SUMS_FILE, new_folder, write_text
from declip_cli.interop import export_hugging_face, export_onnx, export_open_clip
from declip_cli.interop.model_card import Card, model_card
from declip_cli.interop.sample import Sample, demo_sample, embed
from declip_cli.model.checkpoint import PretrainedModel

ExportFormat: TypeAlias = Literal["openclip", "huggingface", "onnx"]
TOLERANCE = 1e-5
"""Largest difference of any number of a unit vector, in float32, from the same pixels and texts."""
_LEVELS = 3.0
"""Largest difference of a pixel that transformers' processor prepares, in levels of 1/255; bicubic gives up to 2."""
_PACKAGES: dict[ExportFormat, tuple[str, ...]] = {
    "openclip": ("open_clip",),
    "huggingface": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
_WHY_NOT: dict[ExportFormat, Callable[[PretrainedModel], str]] = {
    "openclip": export_open_clip.why_not,
    "huggingface": export_hugging_face.why_not,
    "onnx": export_onnx.why_not,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written and how well it agrees."""

    out: Path
    to: ExportFormat
    differences: Mapping[str, float]
    """`max_abs_difference`, within the tolerance, and what else was measured."""
    num_compared: int
    """Images and texts."""
    seconds: float

    def to_json(self) -> dict[str, str | int | float]:
        """Return the fields of `declip export --json`."""
        compared = dict(self.differences) | {"num_compared": self.num_compared, "seconds": self.seconds}
        return {"out": str(self.out), "to": self.to, **compared}


def export(model: PretrainedModel, to: ExportFormat, out: Path, *, card: Card, force: bool = False) -> ExportReport:
    """Write a model in another project's format, with a model card, and compare it with ours.

    Args:
        model: on the CPU, in evaluation mode, float32.
        to: the format.
        out: the folder; appears whole, or not at all.
        card: what the model card says of data, training and license.
        force: replace an earlier export.

    Returns:
        Where it is and how far its embeddings are from ours.

    Raises:
        ModelError: the format cannot express the model, its package is missing, or the two disagree.
    """
    started, _ = time.perf_counter(), model.towers
    _check_out(out, force=force)
    _check_format(model, to)
    sample = demo_sample()
    try:
        with new_folder(out) as folder:
            {"openclip": export_open_clip, "huggingface": export_hugging_face, "onnx": export_onnx}[to].write(
                model, folder
            )
            differences = _compare(model, to, folder, sample)
            write_text(folder / "README.md", model_card(model, to, replace(card, differences=differences)))
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error}", remedy="choose another --out") from error
    seconds = time.perf_counter() - started
    return ExportReport(out=out, to=to, differences=differences, num_compared=len(sample), seconds=seconds)


def _check_out(out: Path, *, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_export = (out / SUMS_FILE).is_file() and (out / "README.md").is_file()
    if not (force and is_export):
        remedy = "choose another --out" + (", or --force to replace the export there" if is_export else "")
        raise ModelError(f"{out} already exists", remedy=remedy)


def _check_format(model: PretrainedModel, to: ExportFormat) -> None:
    reason = _WHY_NOT[to](model)
    if reason:
        able = [name for name in get_args(ExportFormat) if not _WHY_NOT[name](model)]
        remedy, side = f"--to {' or --to '.join(able)}", model.preprocessing.image_side_px
        words = [f"--assume resize={side}"] if model.preprocessing.resize_px != side else []
        words += ["--assume crop=round"] if model.preprocessing.crop_at != "round" else []
        crop_by_openclip = replace(model.preprocessing, resize_px=side, crop_at="round")
        if words and not _WHY_NOT[to](replace(model, preprocessing=crop_by_openclip)):
            remedy += f"; or {' '.join(words)}, with which the model sees other pixels than it was made for"
        raise ModelError(f"{to} cannot express this model: {reason}", remedy=remedy)
    for package in _PACKAGES[to]:
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"--to {to} is read back with {package}, which is not installed",
                remedy=f"pip install 'declip[{to}]'",
            )


def _compare(model: PretrainedModel, to: ExportFormat, folder: Path, sample: Sample) -> dict[str, float]:
    """Let the other project's package encode a sample and measure how far it is from ours.

    Raises:
        ModelError: too far.
    """
    ours, differences = embed(model, sample), dict[str, float]()
    if to == "huggingface":
        given, by_itself, levels = export_hugging_face.embed(folder, sample, model.preprocessing)
        differences["max_abs_difference"] = ours.difference(given)
        differences["max_abs_difference_with_processor"] = ours.difference(by_itself)
        if not levels <= _LEVELS:
            raise ModelError(
                f"transformers' processor prepares pixels up to {levels:.3g} levels of 255 apart from ours; "
                "nothing was written",
                remedy="pip install --upgrade transformers, or --to openclip",
            )
    else:
        peer = export_open_clip.embed if to == "openclip" else export_onnx.embed
        differences["max_abs_difference"] = ours.difference(peer(folder, sample))
    found = differences["max_abs_difference"]
    if not found <= TOLERANCE:
        raise ModelError(
            f"read back, the exported model differs by up to {found:.3g}, more than {TOLERANCE:g}; nothing was written",
            remedy="export to another format, and report this with the model's architecture",
        )
    return differences
