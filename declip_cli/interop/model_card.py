"""The model card beside an export: `README.md` as the Hugging Face Hub reads it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

from declip_cli import __version__
from declip_cli.config_files import flatten
from declip_cli.interop.run_facts import RunFacts
from declip_cli.interop.snippets import snippet
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.dims import VitDims
from declip_cli.model.preprocessing import Preprocessing

_LIBRARIES = {"openclip": "open_clip", "huggingface": "transformers", "onnx": "onnx"}
_SETTINGS = (
    ("method", "name"),
    ("model", "arch"),
    ("train", "batch_size"),
    ("train", "precision"),
    ("optim", "optimizer"),
    ("optim", "learning_rate_peak"),
    ("optim", "weight_decay"),
    ("train", "seed"),
)
_PREPARED_ELSEWHERE = {
    "openclip": "OpenCLIP's transform gives the same pixels, but for images that are transparent, which declip lays "
    "over white, or turned by their EXIF data.",
    "huggingface": "`CLIPImageProcessor` resizes by torchvision, so that pixels are up to 2 levels of 255 apart "
    "(`CLIPImageProcessorPil` of transformers 5 is exact), and of an odd margin it may cut one pixel less on the left "
    "or at the top. declip lays transparent images over white.",
    "onnx": "The graph takes the square as bytes and normalizes it; resizing and cutting are the caller's, as above.",
}
_NOT_REPAIRED = (
    "Before that, declip repairs broken Unicode, curly quotes and HTML entities, as OpenAI's tokenizer does. That of "
    "transformers does not: for the same ids pass `html.unescape(html.unescape(ftfy.fix_text(text)))`."
)
_TEXTS = {
    "openclip": "OpenCLIP's tokenizer gives the same ids.",
    "huggingface": _NOT_REPAIRED,
    "onnx": _NOT_REPAIRED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card says beyond the model itself."""

    name: str
    license: str = ""
    """As the Hub names it, such as `mit`; empty where it is not known."""
    facts: RunFacts = RunFacts()
    differences: Mapping[str, float] = field(default_factory=dict)
    """What the comparison found."""


def model_card(model: PretrainedModel, to: str, card: Card) -> str:
    """Write the card of an exported model.

    Args:
        model: what was exported.
        to: `openclip`, `huggingface` or `onnx`.
        card: the rest.

    Returns:
        Front matter of the Hub and Markdown.
    """
    front: dict[str, Any] = {"license": card.license} if card.license else {}
    front |= {
        "library_name": _LIBRARIES[to],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": list(dict.fromkeys(["clip", "declip", model.method])),
    }
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# {card.name}",
        f"A dual encoder of images and texts, trained by the method `{model.method}` and exported by "
        f"declip {__version__}.",
        "## Use",
        f"```python\n{snippet(to, model)}```",
        "## Model",
        _table(("", ""), _dimensions(model)),
        *_training(card.facts),
        *_scores(card.facts),
        "## Preprocessing",
        f"{describe_preprocessing(model.preprocessing)} {_PREPARED_ELSEWHERE[to]}",
        "## Texts",
        "OpenAI's byte-pair encoding, lower-cased; texts longer than "
        f"{model.context_length} tokens are cut. {_TEXTS[to]}",
        "## Comparison",
        "Embeddings of images and texts, read back from this folder, against declip's own, in float32:",
        _table(("", "value"), [(name, f"{value:.2g}") for name, value in card.differences.items()]),
        "## License",
        card.license or "Not stated.",
    ]
    return "\n\n".join(parts) + "\n"


def describe_preprocessing(how: Preprocessing) -> str:
    """Say in a sentence or two how images are prepared."""
    side = how.image_side_px
    if how.resize_mode == "squash":
        shape = f"Both sides are resized to {side} px"
    else:
        rest = ", half an odd margin rounded down" if how.crop_at == "floor" else ""
        shape = (
            f"The shorter side is resized to {how.resize_px} px, the {side} × {side} px in the middle are cut out{rest}"
        )
    return f"{shape} ({how.interpolation}, antialiased). Mean {list(how.mean)}, standard deviation {list(how.std)}."


def _dimensions(model: PretrainedModel) -> Iterator[tuple[str, str]]:
    architecture = model.towers.architecture
    vision, text = asdict(architecture.vision), asdict(architecture.text)
    kind = "vision transformer" if isinstance(architecture.vision, VitDims) else "modified ResNet of CLIP"
    millions = sum(value.numel() for value in model.towers.parameters()) / 1e6
    yield "architecture", f"`{model.arch}`, {millions:.1f} M parameters"
    yield "image tower", f"{kind}: {_listed(vision)}"
    yield "text tower", _listed(text)
    yield "image", f"{architecture.image_side_px} × {architecture.image_side_px} px"
    yield "embedding", f"{architecture.embed_dim} numbers"
    yield "logit scale", f"{float(model.towers.logit_scale.detach().exp()):.4g}"
    if model.towers.logit_bias is not None:
        yield "logit bias", f"{float(model.towers.logit_bias.detach()):.4g} (sigmoid loss; not kept by CLIPModel)"
    if model.towers.token_wise is not None and not model.token_wise:
        yield "not included", "token-wise heads, which only training uses"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _training(facts: RunFacts) -> list[str]:
    if not facts.config:
        return []
    paths = facts.config.get("data", {}).get("path") or []
    rows = [("data", ", ".join(PurePath(str(path)).name for path in paths))]  # folders of this machine say nothing
    rows += [("pairs", f"{facts.run['num_pairs']:,}")] if isinstance(facts.run.get("num_pairs"), int) else []
    rows += [("samples seen", f"{facts.samples_seen:,}"), ("steps", f"{facts.steps:,}")]
    for section, key in _SETTINGS:
        value = facts.config.get(section, {}).get(key)
        rows += [(f"{section}.{key}", str(value))] if value is not None else []
    rows += [("processes", str(facts.run.get("world_size", 1)))]
    weights = facts.config.get("method", {}).get("weights")
    rows += [("loss weights", _listed(weights))] if isinstance(weights, Mapping) and weights else []
    return ["## Training", _table(("", ""), rows)]


def _scores(facts: RunFacts) -> list[str]:
    found = ((name, *one) for name, scores in facts.evaluations.items() for one in flatten(scores).items())
    rows = [(name, key, f"{value:.4g}") for name, key, value in found if type(value) in (int, float)]
    if not rows:
        return []
    return [f"## Scores\n\nAfter step {facts.evaluated_at_step:,}.", _table(("data set", "score", "value"), rows)]


def _table(head: tuple[str, ...], rows: Any) -> str:  # noqa: ANN401  (an iterable of tuples as long as the head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in line)} |" for line in lines
    )
