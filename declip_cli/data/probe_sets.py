"""The splits that a linear probe needs: training, validation and test pictures of the same classes."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from declip_cli.data.benchmarks.base import ClassificationSet, FilePictures
from declip_cli.data.benchmarks.registry import available_splits, open_classification
from declip_cli.data.demo import DemoRecord, demo_records
from declip_cli.errors import EvaluateError

_TRAIN_SHARE, _VAL_SHARE = 0.4, 0.2
_DEMO_NOTE = "classes are the categories of emoji; tested on other emoji by another vendor than it learns from"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSets:
    """Pictures to learn from and pictures to score, with labels that mean the same."""

    train: ClassificationSet
    val: ClassificationSet | None
    """None where the data set comes without one; a part of `train` is then held out."""
    test: ClassificationSet


def open_probe_sets(name: str, *, data_root: Path | None = None) -> ProbeSets:
    """Open the splits of a classification data set.

    Args:
        name: a known name, `demo`, or a folder with `train/`, `test/` and optionally `val/` that have one
            subfolder per class.
        data_root: where known sets lie; None takes `$DECLIP_DATA`, else `data/`.

    Returns:
        The splits. The demo's classes are the nine categories of emoji. It learns from the vendors google and
        emojione2 and tests on twitter, and no emoji is in two splits: otherwise finding the same emoji by its
        pixels would do.

    Raises:
        EvaluateError: no such set, a split is missing, or the test pictures have classes that were not trained.
    """
    if name == "demo":
        return _open_demo()
    splits = available_splits(name, data_root=data_root)
    for wanted in ("train", "test"):
        if wanted not in splits:
            raise EvaluateError(
                f"{name} has no split {wanted!r} (found: {', '.join(splits) or 'none'})",
                remedy=_remedy(name, wanted),
            )
    train = open_classification(name, data_root=data_root, split="train")
    test = open_classification(name, data_root=data_root, split="test")
    val = open_classification(name, data_root=data_root, split="val") if "val" in splits else None
    return ProbeSets(train=train, val=val and _aligned(val, train), test=_aligned(test, train))


def _remedy(name: str, wanted: str) -> str:
    if Path(name).is_dir():
        return f"put the pictures of each class into {Path(name) / wanted / 'CLASS'}/"
    return "choose a set with training pictures, such as cifar100 or pets"


def _aligned(part: ClassificationSet, train: ClassificationSet) -> ClassificationSet:
    """Number a split's classes as the training split does."""
    if part.class_names == train.class_names:
        return part
    numbers = {name: number for number, name in enumerate(train.class_names)}
    unknown = [name for name in part.class_names if name not in numbers]
    if unknown:
        raise EvaluateError(
            f"the {part.split} pictures of {part.name} have the class {unknown[0]!r}, which has no training pictures "
            f"({len(unknown)} such classes)",
            remedy=f"add training pictures of {unknown[0]!r} or take its {part.split} pictures away",
        )
    labels = [numbers[part.class_names[label]] for label in part.labels]
    return replace(part, class_names=train.class_names, labels=labels)


def _open_demo() -> ProbeSets:
    known = [record for record in demo_records("train") if record.vendor != "openclipart"]
    names = tuple(sorted({record.category for record in known}))
    parts = {"train": known, "val": known, "test": demo_records("test")}
    train, val, test = (
        _demo_set([record for record in records if _demo_split(record) == split], split, names)
        for split, records in parts.items()
    )
    return ProbeSets(train=train, val=val, test=test)


def _demo_split(record: DemoRecord) -> str:
    """Deal the emoji, by what they show, to the splits: two fifths, one fifth, two fifths."""
    place = int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:4]) / 2**32
    return "train" if place < _TRAIN_SHARE else "val" if place < _TRAIN_SHARE + _VAL_SHARE else "test"


def _demo_set(records: list[DemoRecord], split: str, names: tuple[str, ...]) -> ClassificationSet:
    return ClassificationSet(
        name="demo",
        split=split,
        class_names=names,
        templates=(),
        metric="accuracy",
        pictures=FilePictures([record.path for record in records]),
        labels=[names.index(record.category) for record in records],
        note=_DEMO_NOTE,
    )
