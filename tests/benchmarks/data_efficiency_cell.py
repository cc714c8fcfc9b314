"""One run of `data_efficiency.py`: trained until validation stops rising, then scored once."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from data_efficiency_corpus import FINAL, FURTHER, VALIDATION, Corpus

from declip_cli.config import RunConfig
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.linear_probe import linear_probe
from declip_cli.evaluate.retrieve import retrieve
from declip_cli.evaluate.zeroshot import zeroshot
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.train.run import Request, pretrain

OPTIONS = FeatureOptions(batch_size=256, threads=1, use_cache=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a run ends."""

    max_steps: int
    eval_every: int
    """Steps between looks at the validation vendor."""
    patience: int
    """Looks in a row without a better score after which a run has stopped rising."""


def clock() -> float:
    """Read CPU seconds of this process, or seconds where a GPU does the work."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model in training and what it cost."""

    model: PretrainedModel
    step: int
    seconds: float
    validation: float


@dataclass(slots=True)
class Watch:
    """Scores a run on the validation vendor and keeps the best model; an `Evaluate` of the loop.

    Args:
        score: of a model, more is better.
        eval_every: steps between scores.
        equal_seconds: what another run took to train; the best model up to then is kept, too. None: not wanted.
        clock: seconds, of which those spent in scoring do not count.
    """

    score: Callable[[PretrainedModel], float]
    eval_every: int
    equal_seconds: float | None = None
    clock: Callable[[], float] = clock
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """Step, seconds of training, score."""
    best: Snapshot | None = None
    best_in_time: Snapshot | None = None
    num_since_best: int = 0
    seconds: float = 0.0
    _last: float | None = None

    def start(self) -> None:
        """Start to count the time."""
        self._last = self.clock()

    def __call__(self, model: PretrainedModel) -> dict[str, dict[str, Any]]:
        """Score the model as it is now; it must be a copy that is not trained further."""
        now = self.clock()
        self.seconds += now - (now if self._last is None else self._last)
        score, step = self.score(model), (len(self.curve) + 1) * self.eval_every
        self.curve.append((step, round(self.seconds, 2), round(score, 5)))
        self.num_since_best += 1
        if self.best is None or score > self.best.validation:
            self.best, self.num_since_best = Snapshot(model, step, self.seconds, score), 0
            if self.equal_seconds is not None and self.seconds <= self.equal_seconds:
                self.best_in_time = self.best
        self._last = self.clock()
        return {VALIDATION: {"mean_recall": score}}


def train(corpus: Corpus, asked: RunConfig, limits: Limits, work: Path, *, equal_seconds: float | None) -> Watch:
    """Train one model until its score on the validation vendor, the mean of six recalls, stops rising.

    Args:
        corpus: gives the validation vendor.
        asked: the settings, with the shards and the seed.
        limits: when the run ends.
        work: where each process has a run folder, which is deleted afterwards.
        equal_seconds: as of `Watch`.
    """
    validation = corpus.scored(VALIDATION)
    loop = {"steps": limits.max_steps, "eval_every_steps": limits.eval_every, "log_every_steps": limits.eval_every}
    asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, **loop))
    watch = Watch(
        lambda model: retrieve(model, validation, options=OPTIONS).scores["rsum"] / 6, limits.eval_every, equal_seconds
    )
    path = work / f"run-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    watch.start()
    reports = pretrain(Request(asked=asked, path=path), evaluate=watch, log=lambda line: None)
    for _ in reports:
        if watch.num_since_best >= limits.patience:
            break
    reports.close()
    shutil.rmtree(path, ignore_errors=True)
    return watch


def final_scores(corpus: Corpus, model: PretrainedModel) -> dict[str, float]:
    """Score a model on the vendor that no choice ever saw, and on further images if there are any."""
    probe = linear_probe(model, corpus.probe_sets(), with_baseline=True, options=OPTIONS)
    scores = vendor_scores(corpus, model, FINAL)
    scores |= {"probe_top1": probe.top1, "raw_pixels_top1": (probe.raw_pixels or {})["top1"]}
    if corpus.has_further:
        scores |= {f"{FURTHER}_{name}": score for name, score in vendor_scores(corpus, model, FURTHER).items()}
    return scores


def vendor_scores(corpus: Corpus, model: PretrainedModel, vendor: str) -> dict[str, float]:
    """Find a vendor's emoji by their names, and the names by the emoji."""
    images = corpus.scored(vendor)
    classified, found = zeroshot(model, images, options=OPTIONS), retrieve(model, images, options=OPTIONS).scores
    return {
        "zeroshot_top1": classified.top1,
        "zeroshot_top5": classified.top5 or 0.0,
        "image_to_text_r10": found["image_to_text"]["recall_at_10"],
        "text_to_image_r10": found["text_to_image"]["recall_at_10"],
    }


def snapshot_line(corpus: Corpus, snapshot: Snapshot) -> dict[str, Any]:
    """Return what is written down of a snapshot."""
    facts = {"step": snapshot.step, "seconds": round(snapshot.seconds, 2), "validation": round(snapshot.validation, 5)}
    return facts | {"scores": {name: round(v, 5) for name, v in final_scores(corpus, snapshot.model).items()}}


def run_cell(
    corpus: Corpus, asked: RunConfig, limits: Limits, work: Path, *, equal_seconds: float | None, is_reference: bool
) -> dict[str, Any]:
    """Train and score one cell.

    Args:
        corpus: the data.
        asked: the settings, with the shards and the seed.
        limits: when the run ends.
        work: as in `train`.
        equal_seconds: what the reference took to train; None where that is not known.
        is_reference: whether this is the row whose time the others get.

    Returns:
        `best`, the model with the best validation score; `equal_time`, the best within `equal_seconds` (of the
        reference `best` itself), or None; `seconds` until the run stopped; and the `curve` of validation scores.
    """
    watch = train(corpus, asked, limits, work, equal_seconds=equal_seconds)
    assert watch.best is not None
    best = snapshot_line(corpus, watch.best)
    in_time = watch.best_in_time
    other = None if in_time is None else best if in_time is watch.best else snapshot_line(corpus, in_time)
    return {
        "best": best,
        "equal_time": best if is_reference else other,
        "seconds": round(watch.seconds, 2),
        "has_stopped_rising": watch.num_since_best >= limits.patience,
        "curve": watch.curve,
    }
