"""Evaluations while a model is trained: sets are opened once, each model is scored on all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from declip_cli.data.benchmarks import ClassificationSet, available_splits, open_classification
from declip_cli.data.benchmarks.folders import class_folders
from declip_cli.data.benchmarks.known import KNOWN
from declip_cli.data.preparing.sources.folder import CAPTIONS_FILE
from declip_cli.data.retrieval_sets import KNOWN_RETRIEVAL, RetrievalSet, has_shards, open_retrieval
from declip_cli.evaluate.retrieve import retrieve
from declip_cli.evaluate.zeroshot import zeroshot
from declip_cli.model.checkpoint import PretrainedModel

Scores: TypeAlias = dict[str, Any]
Evaluator: TypeAlias = Callable[[PretrainedModel], dict[str, Scores]]
_LEFT_OUT = {"dataset", "split", "model", "metric", "score", "note", "skipped", "seconds"} | {
    "num_templates",
    "templates",
    "precision",
}
"""Fields that stay the same all through a run, or say nothing of the model."""


def make_evaluator(names: Sequence[str], *, data_root: Path | None = None) -> Evaluator:
    """Open evaluation sets now, so that a wrong name is told before training, and score models on them later.

    Args:
        names: as `zeroshot` and `retrieve` take them: known names, `demo` (both), folders of class folders,
            folders with captions.
        data_root: where known sets lie; None takes `$DECLIP_DATA`, else `data/`.

    Returns:
        A function of a model, also an unfinished one; it returns the scores of each name.

    Raises:
        EvaluateError: a set is unknown or not there.
    """
    parts = [(name, part) for name in dict.fromkeys(names) for part in _open(name, data_root)]

    def evaluate(model: PretrainedModel) -> dict[str, Scores]:
        scores: dict[str, Scores] = {}
        for name, part in parts:
            scores.setdefault(name, {}).update(part.score(model))
        return scores

    return evaluate


class _Part(Protocol):
    def score(self, model: PretrainedModel) -> Scores: ...


@dataclass(frozen=True, slots=True)
class _Classification:
    dataset: ClassificationSet

    def score(self, model: PretrainedModel) -> Scores:
        return _that_change(zeroshot(model, self.dataset).to_json())


@dataclass(frozen=True, slots=True)
class _Retrieval:
    dataset: RetrievalSet

    def score(self, model: PretrainedModel) -> Scores:
        return _that_change(retrieve(model, self.dataset).to_json())


def _that_change(report: dict[str, Any]) -> Scores:
    return {key: value for key, value in report.items() if key not in _LEFT_OUT}


def _open(name: str, data_root: Path | None) -> list[_Part]:
    if name == "demo":
        retrieval = _Retrieval(open_retrieval(name, data_root=data_root))
        return [_Classification(open_classification(name, data_root=data_root)), retrieval]
    if name in KNOWN_RETRIEVAL or (name not in KNOWN and _has_captions(Path(name))):
        return [_Retrieval(open_retrieval(name, data_root=data_root))]
    splits = available_splits(name, data_root=data_root)
    split = next((split for split in ("test", "val", "train") if split in splits), "test")
    return [_Classification(open_classification(name, data_root=data_root, split=split))]


def _has_captions(folder: Path) -> bool:
    """Say whether a folder holds captions rather than classes."""
    return folder.is_dir() and (
        has_shards(str(folder)) or (folder / CAPTIONS_FILE).exists() or not class_folders(folder)
    )
