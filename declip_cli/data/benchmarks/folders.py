"""Folders of images: one subfolder per class, or captions beside the images, or neither."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from declip_cli.data import storage
from declip_cli.data.benchmarks.known import Known, missing_file
from declip_cli.data.dataset import Classes, Dataset, Skips
from declip_cli.data.files_dataset import FilesDataset, is_image
from declip_cli.data.shards.tar_samples import clean_captions
from declip_cli.data.sources.folder import CAPTIONS_FILE, group_by_stem, read_lists
from declip_cli.data.sources.records import Rejected, captions_beside
from declip_cli.errors import DataError

_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def open_folder(folder: str, split: str | None = None) -> FilesDataset:
    """Open all images in and below a folder.

    The subfolders are classes, `_` read as a space, unless there is a `captions.jsonl` beside them or they are
    splits. Captions stand in files `captions.jsonl`, else in text files beside the images.

    Args:
        folder: local path or URL.
        split: one of `folder_splits`; None opens all that is there.

    Returns:
        The images in a fixed order; the label of those in no class is -1.

    Raises:
        DataError: no such split, or no image.
    """
    places = folder_splits(folder)
    if split == "train" and not places:
        split = None  # all of it is the training split, as in shards that are not divided
    if split is not None and split not in places:
        raise DataError(
            f"{folder} has no split {split!r}, only {', '.join(places) or 'all its images'}",
            remedy=f"make a folder {storage.join(folder, split)} with one subfolder per class",
        )
    root = places[split] if split is not None else folder
    names = list(storage.walk(root))
    images = [name for name in names if is_image(name)]
    if not images:
        raise DataError(
            f"there is no image in {root}",
            remedy="images end in .jpg, .png, .webp, .gif, .bmp, .tif or .avif; subfolders are searched too",
        )
    folders = [] if CAPTIONS_FILE in names or (places and split is None) else class_folders(root)
    labels = {name: label for label, name in enumerate(folders)}
    found = _with_captions(root, names, images)
    if labels:
        found.labels = [labels.get(name.partition("/")[0], -1) if "/" in name else -1 for name in images]
        found.classes = Classes(names=tuple(name.replace("_", " ") for name in folders))
    return found


def _with_captions(root: str, names: Sequence[str], images: Sequence[str]) -> FilesDataset:
    paths = [storage.join(root, name) for name in images]
    lists = [storage.join(root, name) for name in names if name.rpartition("/")[2] == CAPTIONS_FILE]
    if lists:
        return _from_lists(root, lists, paths)
    texts = group_by_stem(names)
    beside = {index: texts[stem] for index, name in enumerate(images) if (stem := name.rpartition(".")[0]) in texts}
    if not beside:
        return FilesDataset(paths)
    return FilesDataset(
        paths, captions=lambda index: captions_beside(paths[index], beside[index]) if index in beside else ()
    )


def _from_lists(root: str, lists: list[str], paths: list[str]) -> FilesDataset:
    """Take captions from lists; lines that cannot be used, or name no image that is there, are skipped."""
    captions: dict[str, tuple[str, ...]] = {os.path.normpath(path): () for path in paths}
    failed: dict[str, list[DataError]] = {}
    skipped = Skips()
    for record in read_lists(lists, root=root):
        if isinstance(record, Rejected):
            skipped.add(record.cause, record.key)
            continue
        path = os.path.normpath(str(record.image))
        try:
            found = clean_captions(list(record.captions), record.key)
        except DataError as error:
            failed.setdefault(path, []).append(error)
            continue
        if path in captions:
            captions[path] += found
        else:
            skipped.add("missing file", record.key)
    for path, errors in failed.items():
        for reason in errors[0 if captions.get(path, True) else 1 :]:  # the first of an image without others is raised
            skipped.add(reason.cause, path)

    def captions_of(index: int) -> tuple[str, ...]:
        path = os.path.normpath(paths[index])
        if path in failed and not captions[path]:
            raise failed[path][0]
        return captions[path]

    return FilesDataset(paths, captions=captions_of, skipped=skipped)


def folder_splits(folder: str) -> dict[str, str]:
    """Find `train/`, `val/`, `test/` (or their longer names) in a user's folder: split → its folder.

    Empty where any other subfolder stands beside them, as these are then classes.
    """
    subfolders = class_folders(folder)
    found = {
        split: storage.join(folder, name)
        for split, names in _SPLIT_FOLDERS.items()
        for name in subfolders
        if name.lower() in names
    }
    return found if len(found) == len(subfolders) else {}


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """List the subfolders of a folder, sorted; hidden ones are omitted."""
    root = os.fspath(root)
    return [name for name in storage.folders_in(root) if not name.startswith("__")] if storage.is_folder(root) else []


def list_classes(root: Path, folders: Sequence[str], classes: Classes) -> FilesDataset:
    """List the images of known class folders; the label is the place in `folders`."""
    files = [(path, label) for label, name in enumerate(folders) for path in list_images(root / name)]
    return FilesDataset([path for path, _ in files], labels=[label for _, label in files], classes=classes)


def list_images(folder: Path) -> list[str]:
    """List the image files directly in a folder of a known set, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if is_image(entry.name) and entry.is_file())
    except OSError as error:
        raise missing_file(folder) from error


def read_class_folders(known: Known, root: Path, split: str) -> Dataset:
    """Read one split of a set of class folders that was published without any: so many files per class.

    The splits say `per_class`, -1 for the rest; one marker is the folder itself.
    """
    base = next((root / marker for marker in known.markers if (root / marker).is_dir()), root / known.markers[0])
    sizes = {name: int(facts["per_class"]) for name, facts in known.splits.items()}
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_folders(base)):
        files = {f"{name}/{os.path.basename(path)}": path for path in list_images(base / name)}
        chosen = hashed_split(list(files), sizes)[split]
        paths += [files[key] for key in chosen]
        labels += [label] * len(chosen)
    return FilesDataset(paths, labels=labels, classes=known.classes)


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
    for split, size in sorted(sizes.items(), key=lambda item: item[1] < 0):
        dealt[split] = set(ranked if size < 0 else ranked[:size])
        ranked = ranked[size:] if size >= 0 else []
    return {split: [name for name in names if name in chosen] for split, chosen in dealt.items()}
