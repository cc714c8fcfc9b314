"""Evaluations while a model is trained: sets are opened once, each model is scored on all of them by all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from declip_cli.config_files import flatten
from declip_cli.data.catalog import classified, evaluation_split, has_captions, open_dataset
from declip_cli.data.dataset import Dataset
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.metrics import Ranks
from declip_cli.evaluate.retrieve import both_directions, num_folds, retrieve
from declip_cli.evaluate.zeroshot import has_top5, zeroshot
from declip_cli.model.checkpoint import PretrainedModel

Scores: TypeAlias = dict[str, Any]
_OMITTED = {"dataset", "split", "model", "metric", "score", "note", "skipped", "seconds"}
_OMITTED |= {"num_templates", "templates", "precision"}
"""Fields that stay the same all through a run, or say nothing of the model."""
_FALLING = ("median_rank", "mean_rank")
"""Scores of which less is better."""


class Evaluator:
    """Score models on sets that are open already; see `make_evaluator`."""

    def __init__(self, parts: Sequence["Evaluation"], options: FeatureOptions) -> None:
        self._parts = parts
        self._options = options

    @property
    def names(self) -> tuple[str, ...]:
        """What is evaluated, as the user named it."""
        return tuple(dict.fromkeys(part.name for part in self._parts))

    @property
    def score_paths(self) -> tuple[str, ...]:
        """Every score there will be of which more is better, as `train.keep_best` takes it: `imagenet.top1`, …."""
        return tuple(f"{part.name}.{path}" for part in self._parts for path in part.score_paths())

    def __call__(self, model: PretrainedModel) -> dict[str, Scores]:
        """Score a model, also an unfinished one, with the other ranks of the process group if there is one.

        Each rank encodes a share of the images and texts, so all of them must call this with the same model.

        Returns:
            The scores of each name, the same on every rank.

        Raises:
            EvaluateError: none of a set's images can be read; raised on every rank.
        """
        scores: dict[str, Scores] = {}
        for part in self._parts:
            scores.setdefault(part.name, {}).update(part.score(model, self._options))
        return scores


def make_evaluator(names: Sequence[str], *, data_root: Path | None = None, threads: int = 0) -> Evaluator:
    """Open evaluation sets now, so that a wrong name is reported before training, and score models on them later.

    Args:
        names: as `zeroshot` and `retrieve` take them: known names, folders of class folders, folders and shards
            with captions. What has classes and captions is scored both ways.
        data_root: where known sets lie; None takes `$DECLIP_DATA`, else `data/`.
        threads: threads of this rank that read and decode images; 0 takes one for each core that it may use.

    Raises:
        DataError: a set is unknown or not there.
    """
    parts = [part for name in dict.fromkeys(names) for part in _open(name, data_root)]
    return Evaluator(parts, FeatureOptions(threads=threads, split_over_ranks=True))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of an open set: zero-shot classification or retrieval."""

    name: str
    dataset: Dataset
    is_retrieval: bool

    def score(self, model: PretrainedModel, options: FeatureOptions) -> Scores:
        """Score a model, without the fields that say nothing of it."""
        report = (retrieve if self.is_retrieval else zeroshot)(model, self.dataset, options=options)
        return {key: value for key, value in report.to_json().items() if key not in _OMITTED}

    def score_paths(self) -> list[str]:
        """Return every score there will be of which more is better."""
        if not self.is_retrieval:
            has_five = self.dataset.classes is not None and has_top5(len(self.dataset.classes.names))
            return ["top1", *(["top5"] if has_five else []), "mean_per_class"]
        one = torch.ones(1)
        scores = both_directions(Ranks(image_to_text=one, text_to_image=one))
        paths = [path for path in flatten(scores) if not path.endswith(_FALLING)]
        folds = num_folds(len(self.dataset), self.dataset.fold_size)
        return paths + [f"mean_of_{folds}_folds.{path}" for path in paths if folds]


def _open(name: str, data_root: Path | None) -> list[Evaluation]:
    dataset = open_dataset(name, evaluation_split(name), data_root=data_root)
    is_retrieval = has_captions(dataset)
    is_classification = dataset.classes is not None or not is_retrieval
    parts = [Evaluation(name, classified(dataset), is_retrieval=False)] if is_classification else []
    return parts + ([Evaluation(name, dataset, is_retrieval=True)] if is_retrieval else [])
