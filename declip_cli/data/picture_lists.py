"""The pictures that a search looks through: a folder, shards, a list, the demo, or a known set."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from declip_cli.data import storage
from declip_cli.data.benchmarks.base import is_picture, read_file
from declip_cli.data.demo import demo_records
from declip_cli.data.retrieval_sets import KNOWN_RETRIEVAL, has_shards, open_retrieval, read_image
from declip_cli.data.samples import SampleStore
from declip_cli.data.sources.folder import find_lists, read_lists
from declip_cli.data.sources.records import FileRecord
from declip_cli.data.stores import open_samples
from declip_cli.errors import DataError, EvaluateError


@dataclass(frozen=True, slots=True)
class ListedPicture:
    """One picture to be searched."""

    path: str
    """Its file, or the key of a sample in a shard."""
    read: Callable[[], bytes]
    stamp: str
    """Changes when the picture may have changed; cheap to make."""
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureList:
    """The pictures of one source."""

    name: str
    """As the user typed it."""
    pictures: list[ListedPicture]
    """In a fixed order, each path once."""
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    """What was listed and is no picture: cause → (count, first)."""


def list_pictures(source: str, *, lines: Iterable[str] = (), data_root: Path | None = None) -> PictureList:
    """List the pictures of a source.

    Args:
        source: a folder, read with its subfolders; a picture; prepared shards; `demo`; a known retrieval set; or
            `-` for the paths in `lines`.
        lines: one path a line.
        data_root: where known sets lie.

    Returns:
        The pictures with the captions that stand in a `captions.jsonl` beside them or in the shards.

    Raises:
        EvaluateError: nothing there, or no picture in it.
        DataError: shards that cannot be read.
    """
    if source == "-":
        found = _from_lines(lines)
    elif source == "demo":
        found = PictureList(
            name=source,
            pictures=[_file(str(record.path), record.caption) for record in demo_records("test")],
        )
    elif source in KNOWN_RETRIEVAL:
        found = _from_known(source, data_root)
    elif not storage.is_folder(source) and not storage.is_file(source):
        raise EvaluateError(
            f"there is no folder named {source!r} to search",
            remedy="name a folder of pictures, a folder of shards, `demo`, or - to read paths from stdin",
        )
    elif has_shards(source):
        found = _from_store(source, open_samples([source], together=False))
    else:
        found = _from_files(source)
    if not found.pictures:
        raise EvaluateError(
            f"no pictures found in {'the list on stdin' if source == '-' else source}",
            remedy="pictures end in .jpg, .png, .webp, .gif, .bmp or .tif; subfolders are searched too",
        )
    return found


def _file(path: str, caption: str = "") -> ListedPicture:
    try:
        status = os.stat(path)
        stamp = f"{status.st_size}:{status.st_mtime_ns}"
    except (OSError, ValueError):
        stamp = ""
    return ListedPicture(path, partial(read_file, path), stamp, caption)


def _from_lines(lines: Iterable[str]) -> PictureList:
    paths = dict.fromkeys(line.rstrip("\r\n") for line in lines)
    skipped: dict[str, tuple[int, str]] = {}
    pictures: list[ListedPicture] = []
    for path in filter(None, paths):
        if os.path.isfile(path):
            pictures.append(_file(path))
        else:
            cause = "folder" if os.path.isdir(path) else "missing file"
            count, first = skipped.get(cause, (0, path))
            skipped[cause] = (count + 1, first)
    if not pictures and skipped:
        cause, (count, first) = next(iter(skipped.items()))
        raise EvaluateError(
            f"none of the {len(paths)} paths on stdin is a picture (the first: {first}, {cause})",
            remedy="write one path a line, as `find . -name '*.jpg'` does",
        )
    return PictureList(name="-", pictures=pictures, skipped=skipped)


def _from_known(name: str, data_root: Path | None) -> PictureList:
    known = open_retrieval(name, data_root=data_root)
    first_captions: dict[int, str] = {}
    for text, owner in zip(known.texts, known.owners, strict=True):
        first_captions.setdefault(owner, text)
    pictures = [_file(path, first_captions.get(number, "")) for number, (path, _) in enumerate(known.pictures)]
    return PictureList(name=name, pictures=pictures)


def _from_store(name: str, store: SampleStore) -> PictureList:
    pictures: list[ListedPicture] = []
    skipped = dict(store.skipped)
    for number in range(len(store)):
        try:
            sample = store.read(number)
        except DataError as error:
            count, first = skipped.get(error.cause, (0, str(number)))
            skipped[error.cause] = (count + 1, first)
            continue
        stamp = f"{store.fingerprint}:{number}"
        pictures.append(ListedPicture(sample.key, partial(read_image, store, number), stamp, sample.captions[0]))
    return PictureList(name=name, pictures=_unique(pictures), skipped=skipped)


def _from_files(source: str) -> PictureList:
    if storage.is_file(source):
        return PictureList(name=source, pictures=[_file(source)] if is_picture(Path(source).name) else [])
    captions: dict[str, str] = {}
    for record in read_lists(find_lists(source), root=source):
        if isinstance(record, FileRecord) and record.captions and isinstance(record.captions[0], str):
            captions[os.path.normpath(record.path)] = record.captions[0]
    pictures = []
    for name in storage.walk(source):
        if is_picture(name.rpartition("/")[2]):
            path = storage.join(source, name)
            pictures.append(_file(path, captions.get(os.path.normpath(path), "")))
    return PictureList(name=source, pictures=pictures)


def _unique(pictures: list[ListedPicture]) -> list[ListedPicture]:
    return list({picture.path: picture for picture in pictures}.values())
