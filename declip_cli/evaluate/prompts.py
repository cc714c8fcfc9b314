"""Class names × prompt templates → one vector per class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from declip_cli.assets import asset_path
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import DEFAULTS, FeatureOptions
from declip_cli.evaluate.features import by_content, content_key
from declip_cli.evaluate.texts import text_features
from declip_cli.files import parse_json
from declip_cli.model.checkpoint import PretrainedModel

ENSEMBLES = ("1", "6", "8", "80")
"""Prompt ensembles of the original code; 80 is OpenAI's for ImageNet."""
_PLACEHOLDERS = ("{}", "{c}", "{0}")


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is said of each class."""

    by_class: tuple[tuple[str, ...], ...]
    """C classes, each with at least one text."""

    @property
    def num_templates(self) -> int:
        """The largest number of texts of a class."""
        return max(map(len, self.by_class))

    def flat(self) -> list[str]:
        """Return all texts, class after class."""
        return [text for texts in self.by_class for text in texts]

    def class_ids(self) -> Tensor:
        """Return the class of each text of `flat`, int64."""
        return torch.repeat_interleave(torch.tensor([len(texts) for texts in self.by_class]))


def make_prompts(class_names: Sequence[str], templates: str | Sequence[str]) -> Prompts:
    """Put class names into templates.

    Args:
        class_names: C names.
        templates: `1`, `6`, `8` or `80` for an ensemble that comes along; the path of a text file with one
            template a line, or of a JSON file with a list of texts for each class name; or the templates.

    Raises:
        EvaluateError: no such ensemble or file, a template without a place for the class name, or a class
            without texts.
    """
    if isinstance(templates, str):
        if templates.endswith(".json"):
            return _own_texts(class_names, Path(templates))
        templates = load_templates(templates)
    for template in templates:
        if not any(placeholder in template for placeholder in _PLACEHOLDERS):
            raise EvaluateError(
                f"the template {template!r} has no place for the class name",
                remedy="write {} where the class name goes: a photo of a {}.",
            )
    return Prompts(tuple(tuple(_fill(template, name) for template in templates) for name in class_names))


def _fill(template: str, name: str) -> str:
    placeholder = next(placeholder for placeholder in _PLACEHOLDERS if placeholder in template)
    return template.replace(placeholder, name)


def load_templates(choice: str) -> tuple[str, ...]:
    """Read a prompt ensemble that comes along (`1`, `6`, `8`, `80`), or the user's file of templates.

    Raises:
        EvaluateError: there is no such ensemble or file, or it is empty.
    """
    path = asset_path(f"prompts/{choice}.txt") if choice in ENSEMBLES else Path(choice)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(
            f"{choice!r} is neither a prompt ensemble nor a readable file of templates",
            remedy=f"choose from {', '.join(ENSEMBLES)}, or write a file with one template a line",
        ) from error
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise EvaluateError(f"{path} holds no templates", remedy="write one a line: a photo of a {}.")
    return templates


def _own_texts(class_names: Sequence[str], path: Path) -> Prompts:
    try:
        table = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EvaluateError(
            f"cannot read prompts from {path}: {error}",
            remedy='write {"class name": ["a text", "another text"]}',
        ) from error
    without = [name for name in class_names if not isinstance(table, dict) or not table.get(name)]
    if without:
        raise EvaluateError(
            f"{path} has prompts for {len(class_names) - len(without)} of {len(class_names)} classes, "
            f"none for {without[0]!r}",
            remedy=f'add "{without[0]}": ["a text", …]',
        )
    return Prompts(tuple(tuple(map(str, table[name])) for name in class_names))


def build_classifier(model: PretrainedModel, prompts: Prompts, *, options: FeatureOptions = DEFAULTS) -> Tensor:
    """Encode all prompts of C classes together and average them: one unit vector per class, float32, (C, D).

    Source: the mean of unit vectors, normalized again, as in the original (Sense-GVT/DeCLIP,
        prototype/solver/clip_solver.py) and in OpenAI's notebook.
    """

    def encode(indices: Sequence[int]) -> Tensor:
        chosen = Prompts(tuple(prompts.by_class[index] for index in indices))
        features = text_features(model, chosen.flat(), options=replace(options, use_cache=False))
        sums = torch.zeros(len(indices), features.shape[1])  # (n, D)
        return F.normalize(sums.index_add_(0, chosen.class_ids(), features), dim=-1)

    digests = [bytes.fromhex(content_key(texts)) for texts in prompts.by_class]
    return by_content(model, "classes", digests, encode, options)
