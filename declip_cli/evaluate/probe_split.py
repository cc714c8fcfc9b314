"""The images that a linear probe learns from, validates and is tested on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from declip_cli.data.benchmarks.known import known_sets
from declip_cli.data.catalog import classified, open_dataset, splits_of
from declip_cli.data.dataset import Dataset, Metric
from declip_cli.data.files_dataset import Subset
from declip_cli.errors import EvaluateError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSets:
    """Images to learn from and images to score, with labels that mean the same."""

    name: str
    """As the user typed it."""
    train: Dataset
    val: Dataset | None
    """None where the data set comes without one; a part of `train` is then held out."""
    test: Dataset
    raw_pixels: bool = False
    """Score the pixels themselves, too, unless set otherwise."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of all three, in label order."""
        return self.train.classes.names if self.train.classes is not None else ()

    @property
    def metric(self) -> Metric:
        """What papers report for the set."""
        return self.train.classes.metric if self.train.classes is not None else "accuracy"


def open_probe_sets(name: str, *, data_root: Path | None = None) -> ProbeSets:
    """Open the splits of a classification data set.

    Args:
        name: a known name, or a folder with `train/`, `test/` and optionally `val/` that have one subfolder per
            class.
        data_root: where known sets lie; None takes `$DECLIP_DATA`, else `data/`.

    Returns:
        The splits; those of the set that the table names for the probe, if it does.

    Raises:
        DataError: there is no such set.
        EvaluateError: a split is missing, or the test images have classes that were not trained.
    """
    known = known_sets().get(name)
    known = known_sets()[known.probe] if known is not None and known.probe else known
    asked = known.name if known is not None else name
    splits = splits_of(asked)
    for wanted in ("train", "test"):
        if wanted not in splits:
            raise EvaluateError(
                f"{name} has no split {wanted!r} (found: {', '.join(splits) or 'none'})",
                remedy="choose a set with training images, such as cifar100 or pets"
                if known is not None
                else f"put the images of each class into {Path(name) / wanted / 'CLASS'}/",
            )
    train, test = (classified(open_dataset(asked, split, data_root=data_root)) for split in ("train", "test"))
    val = classified(open_dataset(asked, "val", data_root=data_root)) if "val" in splits else None
    return ProbeSets(
        name=name,
        train=train,
        val=val and _aligned(val, train),
        test=_aligned(test, train),
        raw_pixels=known is not None and known.raw_pixels,
    )


def _aligned(part: Dataset, train: Dataset) -> Dataset:
    """Number a split's classes as the training split does."""
    assert part.classes is not None
    assert train.classes is not None
    if part.classes.names == train.classes.names:
        return part
    indices = {name: index for index, name in enumerate(train.classes.names)}
    unknown = [name for name in part.classes.names if name not in indices]
    if unknown:
        raise EvaluateError(
            f"the {part.split} images of {part.name} have the class {unknown[0]!r}, which has no training images "
            f"({len(unknown)} such classes)",
            remedy=f"add training images of {unknown[0]!r} or take its {part.split} images away",
        )
    labels = [indices[part.classes.names[label]] for label in part.labels]
    return Subset(part, range(len(part)), labels=labels, classes=train.classes)


def draw_shots(sets: ProbeSets, *, shots: int, seed: int) -> ProbeSets:
    """Hold out validation images where there are none, and take so many training images of each class, 0 for all.

    Raises:
        EvaluateError: there are too few images; see `hold_out` and `choose_shots`.
    """
    indices, val = list(range(len(sets.train))), sets.val
    if val is None:
        indices, held = hold_out(sets.train.labels, seed=seed)
        val = Subset(sets.train, held)
    if shots:
        indices = choose_shots(sets.train.labels, indices, shots=shots, seed=seed, names=sets.class_names)
    return replace(sets, train=Subset(sets.train, indices), val=val)


def hold_out(labels: Sequence[int], *, seed: int) -> tuple[list[int], list[int]]:
    """Keep a fifth of each class for validation.

    Returns:
        Numbers of the images to train on and of those held out, both in order; a class with one image keeps it for
        training, one with two to seven holds out one.

    Raises:
        EvaluateError: no class has two images.
    """
    held: set[int] = set()
    for label, indices in _by_class(labels, range(len(labels))).items():
        count = max(1, round(len(indices) / 5)) if len(indices) > 1 else 0
        held.update(random.Random(f"hold-out {seed} {label}").sample(indices, count))
    if not held:
        raise EvaluateError(
            "no class has two training images, so none can be held out to choose the penalty on",
            remedy="add training images, or a split val/ with one subfolder per class",
        )
    return [index for index in range(len(labels)) if index not in held], sorted(held)


def choose_shots(
    labels: Sequence[int], indices: Sequence[int], *, shots: int, seed: int, names: Sequence[str]
) -> list[int]:
    """Draw the same number of training images of each class; with the same seed, more shots contain the fewer.

    Args:
        labels: the class of each image of the set, N.
        indices: the images to draw from.
        shots: how many of each class.
        seed: draws which ones.
        names: class names, for the message.

    Returns:
        Numbers of the images, in order.

    Raises:
        EvaluateError: a class has too few.
    """
    chosen: list[int] = []
    for label, members in _by_class(labels, indices).items():
        if len(members) < shots:
            raise EvaluateError(
                f"--shots {shots} asks for more training images than the class {names[label]!r} has "
                f"({len(members)} besides the validation images)",
                remedy=f"--shots {len(members)} or fewer",
            )
        order = list(members)
        random.Random(f"shots {seed} {label}").shuffle(order)
        chosen += order[:shots]
    return sorted(chosen)


def _by_class(labels: Sequence[int], indices: Sequence[int]) -> dict[int, list[int]]:
    classes: dict[int, list[int]] = {}
    for index in indices:
        classes.setdefault(labels[index], []).append(index)
    return classes
