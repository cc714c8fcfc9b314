"""Class names × prompt templates → one vector per class, or one matrix for token-wise models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from declip_cli.assets import asset_path
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.features import FeatureOptions, by_content, content_key
from declip_cli.evaluate.shares import Part, encode_shares, take
from declip_cli.evaluate.texts import length_sorted_batches, text_features
from declip_cli.files import parse_json
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.precision import autocast

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

    def owners(self) -> Tensor:
        """Return the class of each text of `flat`, int64."""
        return torch.repeat_interleave(torch.tensor([len(texts) for texts in self.by_class]))


def make_prompts(class_names: Sequence[str], templates: str | Sequence[str]) -> Prompts:
    """Put class names into templates.

    Args:
        class_names: C names.
        templates: `1`, `6`, `8` or `80` for an ensemble that comes along; the path of a text file with one
            template a line, or of a JSON file with a list of texts for each class name; or the templates.

    Returns:
        The texts of each class.

    Raises:
        EvaluateError: no such ensemble or file, a template without a place for the class name, or a class
            without texts.
    """
    if isinstance(templates, str):
        if templates.endswith(".json"):
            return _own_texts(class_names, Path(templates))
        templates = load_templates(templates)
    _check_templates(templates)
    return Prompts(tuple(tuple(_fill(t, name) for t in templates) for name in class_names))


def load_templates(choice: str) -> tuple[str, ...]:
    """Read a prompt ensemble that comes along, or the user's file of templates.

    Args:
        choice: `1`, `6`, `8`, `80`, or a path.

    Returns:
        Templates with {} for the class name.

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


def _check_templates(templates: Sequence[str]) -> None:
    for template in templates:
        if not any(place in template for place in _PLACEHOLDERS):
            raise EvaluateError(
                f"the template {template!r} has no place for the class name",
                remedy="write {} where the class name goes: a photo of a {}.",
            )


def _fill(template: str, name: str) -> str:
    place = next(place for place in _PLACEHOLDERS if place in template)
    return template.replace(place, name)


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


def build_classifier(model: PretrainedModel, prompts: Prompts, *, options: FeatureOptions | None = None) -> Tensor:
    """Encode all prompts together and average them by class.

    Args:
        model: the encoder.
        prompts: the texts of C classes.
        options: batch size, precision, store.

    Returns:
        One unit vector per class, float32, (C, D).

    Source: the mean of unit vectors, made unit length again, as in the original (P/solver/clip_solver.py) and
        in OpenAI's notebook.
    """
    options = options or FeatureOptions()

    def encode(numbers: Sequence[int]) -> Tensor:
        chosen = Prompts(tuple(prompts.by_class[number] for number in numbers))
        features = text_features(model, chosen.flat(), options=replace(options, use_cache=False))
        sums = torch.zeros(len(numbers), features.shape[1])  # (n, D)
        return F.normalize(sums.index_add_(0, chosen.owners(), features), dim=-1)

    digests = [bytes.fromhex(content_key(texts)) for texts in prompts.by_class]
    return by_content(model, "classes", digests, encode, options)


@dataclass(frozen=True, slots=True)
class TokenClassifier:
    """Token-wise features of each class."""

    tokens: Tensor
    """Of unit Frobenius norm per class, float32, (C, L, Q)."""
    mask: Tensor
    """True where a class has a token, bool, (C, L)."""

    def to(self, device: torch.device) -> "TokenClassifier":
        """Move both tensors to a device."""
        return TokenClassifier(self.tokens.to(device), self.mask.to(device))

    def score(self, image_tokens: Tensor, *, chunk_classes: int = 64) -> Tensor:
        """Score pictures against classes: best token for each patch, averaged over patches.

        Args:
            image_tokens: patch features, (B, P, Q).
            chunk_classes: classes compared at a time.

        Returns:
            Scores, (B, C).

        Source: FILIP's zero-shot evaluation in the original (P/solver/filip_solver.py, get_logits).
        """
        patches = F.normalize(image_tokens.float(), dim=-1)  # (B, P, Q)
        scores = []
        for tokens, mask in zip(self.tokens.split(chunk_classes), self.mask.split(chunk_classes), strict=True):
            similarity = torch.einsum("bpq,clq->bpcl", patches, tokens)  # (B, P, C', L)
            best = similarity.masked_fill(~mask, float("-inf")).amax(dim=-1)  # (B, P, C')
            scores.append(best.mean(dim=1))  # (B, C')
        return torch.cat(scores, dim=1)


def build_token_classifier(
    model: PretrainedModel, prompts: Prompts, *, options: FeatureOptions | None = None
) -> TokenClassifier:
    """Encode all prompts token by token and average them by class and position.

    Args:
        model: an encoder with token-wise heads.
        prompts: the texts of C classes.
        options: batch size, precision.

    Returns:
        The classes, on the CPU.

    Source: protocol of FILIP in the original (P/solver/filip_solver.py, evaluate); tokens are unit length
        before the mean, the mean is divided by its Frobenius norm.
    """
    found = encode_shares(len(prompts.by_class), partial(_sum_tokens, model, prompts), options or FeatureOptions())
    sums, counts = found.rows[..., :-1], found.rows[..., -1]  # (C, L, Q), (C, L)
    means = sums / counts.clamp(min=1)[..., None]
    norms = means.flatten(1).norm(dim=1)  # (C,)
    longest = int((counts.sum(dim=0) > 0).sum())
    return TokenClassifier((means / norms[:, None, None])[:, :longest], counts[:, :longest] > 0)


def _sum_tokens(model: PretrainedModel, prompts: Prompts, own: range, options: FeatureOptions) -> Part:
    """Add up the unit tokens of each class of a share by position; the last column counts them, (C, L, Q + 1)."""
    device = next(model.encoder.parameters()).device
    prompts = Prompts(tuple(take(prompts.by_class, own)))
    num_classes, length = len(prompts.by_class), model.context_length
    owners = prompts.owners()
    sums = counts = torch.zeros(0)
    with torch.inference_mode(), autocast(options.precision, device):
        for numbers, ids in length_sorted_batches(prompts.flat(), length, options.text_batch_size):
            tokens, mask = model.encoder.encode_text_tokens(ids.to(device))  # (B, L, Q), (B, L)
            if not len(sums):
                sums = torch.zeros(num_classes, length, tokens.shape[-1])  # (C, L, Q)
                counts = torch.zeros(num_classes, length)  # (C, L)
            weights = mask.float().cpu()
            units = F.normalize(tokens.float(), dim=-1).cpu() * weights[..., None]
            used = ids.shape[1]
            sums[:, :used].index_add_(0, owners[numbers], units)
            counts[:, :used].index_add_(0, owners[numbers], weights)
    return Part(torch.cat([sums, counts[..., None]], dim=-1), torch.tensor(own))
