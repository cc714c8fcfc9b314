"""Sets that are one subfolder of pictures per class: the user's own, and known ones that come that way."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from declip_cli.data.benchmarks.base import (
    ClassificationSet,
    FilePictures,
    Listing,
    is_picture,
    list_folder,
    read_lines,
)
from declip_cli.errors import EvaluateError

_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def open_class_folder(folder: Path, *, split: str, classes_file: Path | None = None) -> ClassificationSet:
    """Open the user's own folder with one subfolder per class.

    Args:
        folder: holds the class folders, or `train/`, `val/`, `test/` that hold them.
        split: which of these; a folder without them is all there is, whatever the split.
        classes_file: class names in the order of the sorted subfolders, one a line; or lines
            `subfolder<TAB>class name`. None reads names off the subfolders, `_` as a space.

    Returns:
        The set, with no templates of its own.

    Raises:
        EvaluateError: no folder, no such split, no class, no picture, or names that do not fit.
    """
    places = folder_splits(folder)
    if places and split not in places:
        raise EvaluateError(
            f"{folder} has no split {split!r}, only {', '.join(places)}",
            remedy=f"make a folder {folder / split} with one subfolder per class",
        )
    root = places.get(split, folder)
    classes = class_folders(root)
    if not classes:
        raise EvaluateError(f"{root} has no subfolders, so there are no classes", remedy=_remedy(root))
    names = _class_names(root, classes, classes_file)
    files = [(path, label) for label, name in enumerate(classes) for path in walk_pictures(root / name)]
    if not files:
        raise EvaluateError(
            f"the {len(classes)} class folders of {root} hold no pictures",
            remedy="put JPEG, PNG, WebP, BMP, GIF or TIFF files into them",
        )
    return ClassificationSet(
        name=str(folder),
        split=split if places else "",
        class_names=names,
        templates=(),
        metric="accuracy",
        pictures=FilePictures([path for path, _ in files]),
        labels=[label for _, label in files],
    )


def _remedy(root: Path) -> str:
    if (root / "captions.jsonl").exists():
        return f"a folder with captions.jsonl is scored by: declip retrieve {root}"
    return f"put the pictures of each class into a folder of its own, such as {root / 'red_panda'}"


def folder_splits(folder: Path) -> dict[str, Path]:
    """Find the split folders of a user's folder.

    Args:
        folder: may hold `train/`, `val/`, `test/` (or their longer names).

    Returns:
        Split → its folder; empty where any other subfolder stands beside them, as these are then classes.
    """
    subfolders = class_folders(folder)
    found = {
        split: folder / name for split, names in _SPLIT_FOLDERS.items() for name in subfolders if name.lower() in names
    }
    return found if len(found) == len(subfolders) else {}


def class_folders(root: Path) -> list[str]:
    """List the subfolders of a folder, sorted; hidden ones are left out."""
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__")))


def walk_pictures(folder: Path) -> list[str]:
    """List the picture files in and below a folder, in a fixed order."""
    found: list[str] = []
    for place, subfolders, names in os.walk(folder):
        subfolders.sort()
        found += [os.path.join(place, name) for name in sorted(names) if is_picture(name)]
    return found


def _class_names(root: Path, classes: list[str], classes_file: Path | None) -> tuple[str, ...]:
    if classes_file is None:
        names = [name.replace("_", " ") for name in classes]
    else:
        names = read_class_names(classes_file)
        if any("\t" in line for line in names):
            names = _by_folder(classes_file, names, root, classes)
        if len(names) != len(classes):
            raise EvaluateError(
                f"{classes_file} names {len(names)} classes, {root} has {len(classes)} class folders",
                remedy="write one name per subfolder in sorted order, or lines `subfolder<TAB>class name`",
            )
    return tuple(names)


def _by_folder(classes_file: Path, lines: list[str], root: Path, classes: list[str]) -> list[str]:
    table = dict(line.split("\t", 1) for line in lines if "\t" in line)
    without = [name for name in classes if name not in table]
    if without:
        raise EvaluateError(
            f"{classes_file} names no class for the folder {without[0]!r} of {root} "
            f"({len(without)} of {len(classes)} are missing)",
            remedy=f"add a line `{without[0]}<TAB>class name`",
        )
    return [table[name].strip() for name in classes]


def read_class_names(path: Path) -> list[str]:
    """Read a user's file of class names.

    Args:
        path: one name a line.

    Returns:
        The names; empty lines are left out.

    Raises:
        EvaluateError: the file cannot be read or names nothing.
    """
    if not path.is_file():
        raise EvaluateError(f"there is no file of class names {path}", remedy="check the path of --classes")
    lines = read_lines(path)
    if not lines:
        raise EvaluateError(f"{path} names no classes", remedy="write one class name a line")
    return lines


def list_classes(root: Path, classes: tuple[str, ...]) -> Listing:
    """List the pictures of known class folders; the label is the place in `classes`."""
    files = [(path, label) for label, name in enumerate(classes) for path in list_folder(root / name)]
    return Listing(pictures=FilePictures([path for path, _ in files]), labels=[label for _, label in files])


def hashed_split(names: list[str], sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Deal the files of one class to splits, the same way on every machine.

    Args:
        names: what identifies each file, without the folder it happens to lie in.
        sizes: split → how many files; one split may have -1 and takes the rest.

    Returns:
        Split → its names, in the order given.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    dealt: dict[str, set[str]] = {}
    for split, size in sizes.items():
        dealt[split] = set(ranked[:size] if size >= 0 else [])
        ranked = ranked[size:] if size >= 0 else ranked
    for split, size in sizes.items():
        if size < 0:
            dealt[split] = set(ranked)
    return {split: [name for name in names if name in chosen] for split, chosen in dealt.items()}


def own_split(root: Path, split: str, sizes: Mapping[str, int], note: str) -> Listing:
    """List one split of a set that was published without any.

    Args:
        root: holds the class folders, sorted in label order.
        split: which part.
        sizes: split → files per class; -1 takes the rest.
        note: says that the split is ours.

    Returns:
        The split's pictures and labels.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_folders(root)):
        files = {f"{name}/{path.name}": path for path in list_folder(root / name)}
        chosen = hashed_split(list(files), sizes)[split]
        paths += [files[key] for key in chosen]
        labels += [label] * len(chosen)
    return Listing(pictures=FilePictures(paths), labels=labels, note=note)


def read_caltech101(root: Path, split: str) -> Listing:
    """Read `101_ObjectCategories/`, background class included as in CLIP: 30 per class to train."""
    note = "own split: 30 pictures per class to train, the others to test"
    return own_split(
        _first(root, "caltech101", "caltech-101") / "101_ObjectCategories",
        split,
        {"train": 30, "test": -1},
        note,
    )


def read_eurosat(root: Path, split: str) -> Listing:
    """Read `eurosat/2750/`: of each class 1,000 to train, 500 to validate, 500 to test."""
    note = "own split: per class 1,000 pictures to train, 500 to validate, 500 to test"
    return own_split(root / "eurosat" / "2750", split, {"test": 500, "val": 500, "train": 1000}, note)


def read_resisc45(root: Path, split: str) -> Listing:
    """Read `NWPU-RESISC45/`: of each class 70 to train, 70 to validate, 560 to test."""
    note = "own split: per class 70 pictures to train, 70 to validate, 560 to test"
    return own_split(root / "NWPU-RESISC45", split, {"train": 70, "val": 70, "test": -1}, note)


def read_country211(root: Path, split: str) -> Listing:
    """Read `country211/{train,valid,test}/`, one folder per country code."""
    folder = root / "country211" / {"val": "valid"}.get(split, split)
    return list_classes(folder, tuple(class_folders(folder)))


def read_sst2(root: Path, split: str) -> Listing:
    """Read `rendered-sst2/{train,valid,test}/{negative,positive}/`."""
    folder = root / "rendered-sst2" / {"val": "valid"}.get(split, split)
    return list_classes(folder, ("negative", "positive"))


def _first(root: Path, *names: str) -> Path:
    return next((root / name for name in names if (root / name).is_dir()), root / names[0])
