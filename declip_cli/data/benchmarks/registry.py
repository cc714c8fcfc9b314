"""Open a classification set by name or folder, say what is there, download what can be downloaded."""

import dataclasses
import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path

from declip_cli.data.benchmarks.base import (
    Benchmark,
    ClassificationSet,
    FilePictures,
    names_from_assets,
    resolve_data_root,
    templates_from_assets,
)
from declip_cli.data.benchmarks.folders import folder_splits, open_class_folder, read_class_names
from declip_cli.data.benchmarks.known import KNOWN
from declip_cli.data.demo import demo_records
from declip_cli.errors import EvaluateError

_TORCHVISION_SPLITS = {
    "OxfordIIITPet": ("trainval", "test"),
    "GTSRB": ("train", "test"),
    "PCAM": ("train", "val", "test"),
    "STL10": ("train", "test"),
}
"""torchvision downloads these split by split; the others come whole."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of `declip zeroshot --list`."""

    name: str
    task: str
    num_classes: int
    metric: str
    expected: str
    """Path that shows that the set is there."""
    is_there: bool


def open_classification(
    name: str, *, data_root: Path | None = None, split: str = "test", classes_file: Path | None = None
) -> ClassificationSet:
    """Open one split of a classification data set.

    Args:
        name: a known name, `demo`, or a folder with one subfolder per class (or with `train/`, `val/`,
            `test/` that have them).
        data_root: where known sets lie; None takes `$DECLIP_DATA`, else `data/`.
        split: `train`, `val` or `test`; see `available_splits`.
        classes_file: class names in place of the set's own, one a line.

    Returns:
        The split; its pictures are read when needed.

    Raises:
        EvaluateError: unknown name, missing files, or no such split; says what to do.
    """
    if name == "demo":
        opened = _open_demo(split)
    elif name in KNOWN:
        opened = _open_known(KNOWN[name], resolve_data_root(data_root), split)
    else:
        _check_known_or_folder(name)
        return _checked(open_class_folder(Path(name), split=split, classes_file=classes_file))
    if classes_file is not None:
        names = tuple(read_class_names(classes_file))
        if len(names) != len(opened.class_names):
            raise EvaluateError(
                f"{classes_file} names {len(names)} classes, {name} has {len(opened.class_names)}",
                remedy="write one name a line, in the order of the data set's labels",
            )
        opened = _checked(dataclasses.replace(opened, class_names=names))
    return opened


def available_splits(name: str, *, data_root: Path | None = None) -> tuple[str, ...]:
    """Say which splits a data set has.

    Args:
        name: as of `open_classification`.
        data_root: as of `open_classification`.

    Returns:
        Of `train`, `val`, `test`; empty for a folder of class folders without splits.

    Raises:
        EvaluateError: there is no such set or folder.
    """
    if name == "demo":
        return ("train", "val", "test")
    if name in KNOWN:
        return KNOWN[name].splits
    _check_known_or_folder(name)
    return tuple(folder_splits(Path(name)))


def _check_known_or_folder(name: str) -> None:
    if Path(name).is_dir():
        return
    close = difflib.get_close_matches(name.lower(), ["demo", *KNOWN], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise EvaluateError(
        f"there is no data set or folder named {name!r}",
        remedy=f"{hint}`declip zeroshot --list` shows the known names; a folder needs one subfolder per class",
    )


def _open_demo(split: str) -> ClassificationSet:
    part = {"train": "fit", "val": "validation"}.get(split, split)
    records = demo_records(part)
    names = tuple(dict.fromkeys(record.name for record in records))
    numbers = {name: number for number, name in enumerate(names)}
    return ClassificationSet(
        name="demo",
        split=split,
        class_names=names,
        templates=("{}",),
        metric="accuracy",
        pictures=FilePictures([record.path for record in records]),
        labels=[numbers[record.name] for record in records],
    )


def _open_known(benchmark: Benchmark, root: Path, split: str) -> ClassificationSet:
    if split not in benchmark.splits:
        raise EvaluateError(
            f"{benchmark.name} has no split {split!r}, only {', '.join(benchmark.splits)}",
            remedy="choose another data set",
        )
    folder = _locate(benchmark, root)
    if folder is None:
        raise EvaluateError(
            f"{benchmark.name} is not there: expected {root / benchmark.marker}",
            remedy=_how_to_get(benchmark, root),
        )
    listing = benchmark.read(folder, split)
    names = listing.class_names or names_from_assets()[_names_key(benchmark)]
    if len(names) != benchmark.num_classes or not listing.labels or max(listing.labels) >= len(names):
        raise EvaluateError(
            f"{benchmark.name} in {folder} has {len(names)} class names and {len(listing.labels)} pictures, "
            f"expected {benchmark.num_classes} classes",
            remedy=_how_to_get(benchmark, root),
        )
    return ClassificationSet(
        name=benchmark.name,
        split=split,
        class_names=names,
        templates=templates_from_assets().get(benchmark.name, ()),
        metric=benchmark.metric,
        pictures=listing.pictures,
        labels=listing.labels,
        note=listing.note,
    )


def _names_key(benchmark: Benchmark) -> str:
    return "imagenet" if benchmark.num_classes == len(names_from_assets()["imagenet"]) else benchmark.name


def _locate(benchmark: Benchmark, root: Path) -> Path | None:
    places = (root, root / benchmark.name)
    markers = (benchmark.marker, *benchmark.other_markers)
    return next((p for p in places for marker in markers if (p / marker).exists()), None)


def _how_to_get(benchmark: Benchmark, root: Path) -> str:
    command = (
        f"declip zeroshot {benchmark.name} --data-root {root} --download, or " if benchmark.torchvision_name else ""
    )
    return f"{command}put into {root}/: {benchmark.wants}. Source: {benchmark.source}"


def _checked(opened: ClassificationSet) -> ClassificationSet:
    seen: set[str] = set()
    for name in opened.class_names:
        if name in seen:
            raise EvaluateError(
                f"two classes of {opened.name} have the same name {name!r}, so they cannot be told apart",
                remedy="rename one of them, or name the classes with --classes FILE",
            )
        seen.add(name)
    return opened


def list_known(data_root: Path | None = None) -> list[Listed]:
    """List the known classification sets.

    Args:
        data_root: as of `open_classification`.

    Returns:
        One entry per set, the demo first.
    """
    folder = resolve_data_root(data_root)
    listed = [
        Listed(
            "demo",
            "zero-shot, linear-probe, retrieve",
            len(_open_demo("test").class_names),
            "accuracy",
            "built in",
            True,
        )
    ]
    for known in KNOWN.values():
        found = _locate(known, folder)
        expected = str((found or folder) / known.marker)
        task = "zero-shot, linear-probe" if "train" in known.splits else "zero-shot"
        listed.append(Listed(known.name, task, known.num_classes, known.metric, expected, found is not None))
    return listed


def download(name: str, *, data_root: Path | None = None) -> Path:
    """Fetch a known set over the network with torchvision.

    Args:
        name: a known name.
        data_root: as of `open_classification`; made if it does not exist.

    Returns:
        The folder it went into.

    Raises:
        EvaluateError: unknown name, no download works for this set, or the download failed.
    """
    if name == "demo":
        return Path()
    if name not in KNOWN:
        raise EvaluateError(
            f"{name!r} is not a known data set, so it cannot be downloaded",
            remedy="`declip zeroshot --list` shows the known names",
        )
    benchmark, folder = KNOWN[name], data_root or resolve_data_root(data_root)
    if not benchmark.torchvision_name:
        raise EvaluateError(f"{name} has no download that works", remedy=_how_to_get(benchmark, folder))
    folder.mkdir(parents=True, exist_ok=True)
    datasets = importlib.import_module("torchvision.datasets")
    try:
        for arguments in _download_arguments(benchmark):
            getattr(datasets, benchmark.torchvision_name)(str(folder), download=True, **arguments)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise EvaluateError(f"the download of {name} failed: {error}", remedy=_how_to_get(benchmark, folder)) from error
    return folder


def _download_arguments(benchmark: Benchmark) -> list[dict[str, str]]:
    splits = _TORCHVISION_SPLITS.get(benchmark.torchvision_name)
    return [{"split": split} for split in splits] if splits else [{}]
