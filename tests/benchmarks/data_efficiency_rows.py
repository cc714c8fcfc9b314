"""What `data_efficiency.py` compares: named rows of settings, and one small random search that is the same for all."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from declip_cli.config import RunConfig
from declip_cli.errors import DeclipError
from declip_cli.methods.registry import METHODS, build_method
from declip_cli.resolve import resolve_run

_CLIP: dict[str, Any] = {
    "method.name": "declip",
    "method.pairs": 1,
    "method.weights": {"clip": 1.0, "nn": 0.0, "simsiam": 0.0, "mlm": 0.0},
}
ROWS: dict[str, dict[str, Any]] = {
    "clip": _CLIP,
    "clip-plain": {"method.name": "clip"},
    "clip+words": _CLIP | {"method.weights": _CLIP["method.weights"] | {"words": 0.5}},
    "clip+sigmoid": _CLIP | {"method.contrastive": "sigmoid", "method.label_smoothing": 0.0},
    "clip+positives": _CLIP | {"method.positives": "caption"},
    "slip": {"method.name": "slip"},
    "declip": {"method.name": "declip"},
    "declip-paper": {"method.name": "declip", "method.weights": {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn": 0.2}},
    "rocket": {"method.name": "rocket"},
    "aclip": {"method.name": "aclip"},
    "small": {
        "method.name": "declip",
        "method.pairs": 2,
        "method.weights": {"clip": 1.0, "simclr": 0.5, "words": 0.2, "nn": 0.0, "simsiam": 0.0, "mlm": 0.0},
    },
    "declip+simclr": {"method.name": "declip", "method.weights": {"simsiam": 0.0, "simclr": 0.2}},
    "clip+simsiam": {"method.name": "declip", "method.pairs": 1, "method.weights": {"mlm": 0.0, "nn": 0.0}},
    "clip+simsiam+mlm": {"method.name": "declip", "method.pairs": 1, "method.weights": {"nn": 0.0}},
    "clip+simsiam+mlm+views": {"method.name": "declip", "method.weights": {"nn": 0.0}},
    "filip": {"method.name": "filip"},
    "defilip": {"method.name": "defilip"},
}
"""Row → its settings; a row is compared with what the search found for it, if it was tuned.

`clip` has the image augmentation of the others, which helps it; `clip-plain` crops only, as it was published.
"""
ABLATION = ("clip", "clip+simsiam", "clip+simsiam+mlm", "clip+simsiam+mlm+views", "declip")
"""The paper's supervisions one after the other, with its weights: each row has one more than that before it."""
MAIN_ROWS = ("clip", "slip", "rocket", "declip", "small", "declip-paper", "clip-plain")
FIXED_WEIGHTS = ("clip", "clip-plain", "declip-paper")
"""Rows whose weights are part of what they are."""
COMPOSITIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "small": tuple(
        {"method.weights": ROWS["small"]["method.weights"] | weights}
        for weights in (
            {"simclr": 1.0},
            {"words": 0.0},
            {"nn": 0.2},
            {"words": 1.0},
            {"mlm": 0.1},
            {"simclr": 0.0},
            {"simclr": 0.0, "simsiam": 0.2},
            {"simclr": 0.0, "words": 0.0},
        )
    )
}
"""Row → its trials after the first, where a search answers which supervisions add up instead of how strong they are."""
RECIPE_TRIAL = 1
"""The trial of `small` that was best and is the recipe."""
CELL: dict[str, Any] = {
    "model.arch": "vit-tiny32",
    "model.context_length": 16,
    "data.workers": 0,
    "method.queue_size": 1024,
    "method.head_width": 512,
    "method.label_smoothing": 0.1,
    "augment.plain_crop_area_min": 0.7,
    "augment.crop_area_min": 0.7,
    "augment.jitter_probability": 0.8,
    "augment.hue": 0.05,
    "augment.grayscale_probability": 0.0,
    "augment.blur_probability": 0.0,
    "augment.flip_probability": 0.0,
    "optim.learning_rate_peak": 1e-3,
    "optim.learning_rate_start": 1e-5,
    "optim.warmup_steps": 20,
    "train.batch_size": 128,
    "train.ema_decay": 0.97,
    "train.threads": 1,
    "train.processes": 1,
    "train.checkpoint_every_minutes": None,
}
"""Of all rows. What helped CLIP on the demo corpus is given to all; the rate stays at its peak and the weights are
averaged, so that a run may stop at any time."""


def is_known(row: str) -> bool:
    """Say whether this version of the package has all that a row asks for."""
    try:
        asked = resolve(row, {})
        build_method(asked.model, asked.method)
    except DeclipError:
        return False
    return True


def weights_of(row: str) -> dict[str, float]:
    """Return the weight of each term of a row before it is tuned, the contrastive term first."""
    return METHODS[ROWS[row]["method.name"]].default_weights | ROWS[row].get("method.weights", {})


def resolve(row: str, changes: Mapping[str, Any]) -> RunConfig:
    """Put the settings of a run together, weakest first: `CELL`, the row, what was tuned or is asked for now."""
    settings = CELL | ROWS[row] | dict(changes)
    settings.setdefault("optim.learning_rate_end", settings["optim.learning_rate_peak"])
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return resolve_run(None, None, sections, [])[0]


def draw(row: str, trial: int, weights: Mapping[str, float]) -> dict[str, Any]:
    """Draw the settings of one trial; the first are the row's own.

    Compositions are listed, not drawn. The same trial draws the same rate, smoothing, decay and augmentation for
    every other row, near `CELL`, and multiplies the weight of each further loss term by something between 1/2 and 2.

    Args:
        row: its name.
        trial: number from 0.
        weights: of the row's terms by default; the contrastive term, which comes first, stays as it is.
    """
    if trial == 0:
        return {}
    if row in COMPOSITIONS:
        return COMPOSITIONS[row][trial - 1]
    rng = random.Random(f"trial {trial}")
    crop = round(rng.uniform(0.5, 0.9), 2)
    changes: dict[str, Any] = {
        "optim.learning_rate_peak": float(f"{1e-3 * 2 ** rng.uniform(-0.7, 0.7):.2g}"),
        "optim.weight_decay": rng.choice([0.1, 0.3]),
        "method.label_smoothing": rng.choice([0.05, 0.1, 0.2]),
        "augment.plain_crop_area_min": crop,
        "augment.crop_area_min": crop,
        "augment.jitter_probability": round(rng.uniform(0.6, 1.0), 2),
        "augment.hue": round(rng.uniform(0.02, 0.1), 3),
        "augment.grayscale_probability": rng.choice([0.0, 0.1]),
        "augment.blur_probability": rng.choice([0.0, 0.2]),
        "augment.flip_probability": rng.choice([0.0, 0.5]),
        "augment.text_operations": rng.choice([(), ("synonym", "swap", "delete")]),
    }
    if ROWS[row].get("method.contrastive") == "sigmoid":
        del changes["method.label_smoothing"]  # it has none
    terms = [name for name, weight in weights.items() if weight][1:]
    if terms and row not in FIXED_WEIGHTS:
        factors = {name: 2 ** random.Random(f"trial {trial} {name}").uniform(-1, 1) for name in terms}
        changes["method.weights"] = dict(weights) | {n: round(weights[n] * factors[n], 3) for n in terms}
    return changes


def best_trial(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Take the trial with the best validation score; of equal ones the first."""
    return max(lines, key=lambda line: (line["validation"], -line["trial"]))


def digest(settings: Mapping[str, Any]) -> str:
    """Name settings by the first digits of their hash."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
