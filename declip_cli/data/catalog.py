"""Open a data set by name or path; all commands go through here."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from declip_cli.data import storage
from declip_cli.data.benchmarks import imagenet
from declip_cli.data.benchmarks.captions import read_captions, read_packed
from declip_cli.data.benchmarks.folders import folder_splits, open_folder, read_class_folders
from declip_cli.data.benchmarks.known import Known, known_sets, read_lines, resolve_data_root
from declip_cli.data.benchmarks.torchvision_sets import read_torchvision
from declip_cli.data.dataset import Dataset
from declip_cli.data.files_dataset import Subset, is_image, open_list
from declip_cli.data.shards.files import Shard
from declip_cli.data.shards.indexing import Log
from declip_cli.data.shards.store import CACHE_GB, MANIFEST, NoShardsError, open_shards
from declip_cli.errors import DataError

_READERS: dict[str, Callable[[Known, Path, str], Dataset]] = {
    "packed": read_packed,
    "torchvision": read_torchvision,
    "class_folders": read_class_folders,
    "captions": read_captions,
    "imagenet": imagenet.read_imagenet,
    "imagenetv2": imagenet.read_imagenetv2,
    "imagenet_subset": imagenet.read_subset,
    "imagenet_sketch": imagenet.read_sketch,
    "objectnet": imagenet.read_objectnet,
    "sun397": imagenet.read_sun397,
}
"""From a row of the table, the folder that holds a marker, and a split to the images, read when needed; a
`DataError` says what is missing or damaged."""


def open_dataset(
    name_or_path: str | Sequence[str],
    split: str | None = None,
    *,
    data_root: Path | None = None,
    cache_dir: str | None = None,
    log: Log | None = None,
    should_count: Callable[[Sequence[Shard]], bool] | None = None,
    cache_gb: float = CACHE_GB,
) -> Dataset:
    """Open what the user names: a known set, shards, a folder of images, or an image.

    Args:
        name_or_path: a known name such as `demo`; a folder made by `declip prepare`, a `.tar` or a pattern such as
            `cc3m/{00000..00331}.tar`, several of which are joined; a folder of images; an image; or fsspec URLs.
        split: such as `train` or `test`; see `splits_of`. None opens all that a folder of images holds, the
            training split of shards, and `evaluation_split` of a known set.
        data_root: where known sets lie; None takes `$DECLIP_DATA`, else `data/`.
        cache_dir: where remote shards and indexes are kept; None takes `$DECLIP_CACHE`, else `~/.cache/declip`.
        log: receives notes on damaged indexes, and the progress of indexing shards for the first time.
        should_count: decides whether to go first through shards without an index, as in `open_shards`.
        cache_gb: how many gigabytes of remote shards may be in the cache.

    Returns:
        The examples, read when needed.

    Raises:
        DataError: there is nothing with this name, no such split, or it cannot be read; says what to do.
    """
    names = [name_or_path] if isinstance(name_or_path, str) else list(name_or_path)
    if not names:
        raise DataError("no data given", remedy="--data SHARDS, or --data demo for the pairs that come with declip")
    known = [name for name in names if name in known_sets() and not _is_own(name)]
    if known and len(names) > 1:
        raise DataError(
            f"{known[0]} cannot be joined with other data (got {', '.join(names)})",
            remedy=f"omit {known[0]}, or put its pairs into shards with declip prepare first",
        )
    if known:
        opened = _open_known(known_sets()[known[0]], resolve_data_root(data_root), split)
    else:
        try:
            opened = open_shards(
                names, split=split, cache_dir=cache_dir, log=log, should_count=should_count, cache_gb=cache_gb
            )
        except NoShardsError as error:
            opened = _open_images(names, split, error)
    opened.name, opened.split = names[0], opened.split or split or ""
    return opened


def _open_images(names: Sequence[str], split: str | None, error: NoShardsError) -> Dataset:
    name, *more = names
    if more:
        raise error
    if storage.is_folder(name):
        return open_folder(name, split)
    if is_image(name) and storage.is_file(name):
        return open_list([name])
    raise _unknown(name)


def _open_known(known: Known, root: Path, split: str | None) -> Dataset:
    split = split or _first_split(known.splits)
    if split not in known.splits:
        raise DataError(
            f"{known.name} has no split {split!r}, only {', '.join(known.splits)}", remedy="choose one of these"
        )
    folder = known.locate(root) if known.markers else root
    if folder is None:
        raise DataError(f"{known.name} is not there: expected {root / known.markers[0]}", remedy=known.how_to_get(root))
    opened = _READERS[known.reader](known, folder, split)
    opened.split, opened.fold_size, opened.note = split, known.fold_size, opened.note or known.note
    found = len(opened.classes.names) if opened.classes is not None else 0
    if known.markers and (found != known.num_classes or not len(opened) or max(opened.labels, default=-1) >= found > 0):
        raise DataError(
            f"{known.name} in {folder} has {found} class names and {len(opened)} images, "
            f"expected {known.num_classes} classes",
            remedy=known.how_to_get(root),
        )
    return opened


def _is_own(name: str) -> bool:
    """Return whether a known name is a folder of shards here, which then counts; our own come first."""
    return bool(known_sets()[name].markers) and has_shards(name)


def _unknown(name: str) -> DataError:
    close = difflib.get_close_matches(name.lower(), known_sets(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return DataError(
        f"there is no data set, folder or shard named {name!r}",
        remedy=f"{hint}`declip zeroshot --list` shows the known names; else name a folder or a .tar that is there",
    )


def has_shards(path: str) -> bool:
    """Return whether a path is a folder of tar shards, one shard, or a pattern of several."""
    if path.endswith(".tar") or storage.is_file(storage.join(path, MANIFEST)):
        return True
    return storage.is_folder(path) and any(name.endswith(".tar") for name in storage.names_in(path))


def splits_of(name: str) -> tuple[str, ...]:
    """Name the splits of a data set; there are none in shards and in a folder that is not divided.

    Raises:
        DataError: there is nothing with this name.
    """
    if name in known_sets():
        return tuple(known_sets()[name].splits)
    if has_shards(name) or is_image(name):
        return ()
    if not storage.is_folder(name):
        raise _unknown(name)
    return tuple(folder_splits(name))


def evaluation_split(name: str) -> str | None:
    """Choose the split that a data set is scored on: `test`, else `val`, else `train`; None if it has none."""
    return _first_split(splits_of(name)) or None


def _first_split(splits: Iterable[str]) -> str:
    return next((split for split in ("test", "val", "train") if split in tuple(splits)), "")


def classified(dataset: Dataset, classes_file: Path | None = None) -> Dataset:
    """Take the examples that belong to a class.

    Args:
        dataset: any.
        classes_file: class names in place of the set's own, one a line in the order of the labels; or lines
            `name<TAB>class name`, where the name is that of the subfolder.

    Returns:
        A data set with classes, each of another name.

    Raises:
        DataError: there are no classes or no image in them, or the names do not fit.
    """
    name = dataset.name
    if dataset.classes is None or not dataset.labels:
        has_captions = name in known_sets() or bool(len(dataset) and _has_captions(dataset, 0))
        raise DataError(
            f"{name} has captions and no classes, so there is nothing to classify"
            if has_captions
            else f"{name} has no subfolders, so there are no classes",
            remedy=f"declip retrieve {name}"
            if has_captions
            else f"put the images of each class into a folder of its own, such as {storage.join(name, 'red_panda')}",
        )
    indices = [index for index, label in enumerate(dataset.labels) if label >= 0]
    if not indices:
        raise DataError(
            f"the {len(dataset.classes.names)} class folders of {name} hold no images",
            remedy="put JPEG, PNG, WebP, BMP, GIF or TIFF files into them",
        )
    classes = dataset.classes
    if classes_file is not None:
        classes = replace(classes, names=_read_names(classes_file, classes.names, name))
    if len(set(classes.names)) < len(classes.names) and not (classes_file is None and name in known_sets()):
        twice = next(word for index, word in enumerate(classes.names) if word in classes.names[:index])
        raise DataError(
            f"two classes of {name} have the same name {twice!r}, so they cannot be distinguished",
            remedy="rename one of them, or name the classes with --classes FILE",
        )
    if classes is dataset.classes and len(indices) == len(dataset):
        return dataset
    return Subset(dataset, indices, classes=classes)


def _read_names(path: Path, names: Sequence[str], name: str) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(f"there is no file of class names {path}", remedy="check the path of --classes")
    lines = read_lines(path)
    if any("\t" in line for line in lines):
        table = {key.replace("_", " "): value for key, _, value in (line.partition("\t") for line in lines)}
        if missing := [word for word in names if word not in table]:
            raise DataError(
                f"{path} names no class for {missing[0]!r} of {name} ({len(missing)} of {len(names)} are missing)",
                remedy=f"add a line `{missing[0]}<TAB>class name`",
            )
        return tuple(table[word].strip() for word in names)
    if len(lines) != len(names):
        raise DataError(
            f"{path} names {len(lines)} classes, {name} has {len(names)}",
            remedy="write one name a line in the order of the labels, or lines `subfolder<TAB>class name`",
        )
    return tuple(lines)


def has_captions(dataset: Dataset) -> bool:
    """Return whether a data set is one of captions, by its first examples."""
    return any(_has_captions(dataset, index) for index in range(min(len(dataset), 100)))


def _has_captions(dataset: Dataset, index: int) -> bool:
    try:
        return bool(dataset.captions(index))
    except DataError:
        return True
