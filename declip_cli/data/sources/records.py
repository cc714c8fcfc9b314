"""What every source yields: where an image and its captions are, still unread, or why something is not a pair."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from declip_cli.data import storage
from declip_cli.data.dataset import Example
from declip_cli.data.shards.tar_samples import MAX_MEMBER_BYTES, Group, captions_of, clean_captions
from declip_cli.errors import DataError

SPLIT_NAMES = {"": "", "train": "", "restval": "", "val": "val", "validation": "val", "test": "test"}
"""Names of splits in lists and tables, and the splits of shards that they become; empty is the training split."""
_NUM_TRIED = 20


@dataclass(frozen=True, slots=True)
class Record:
    """One pair of a source, fit to be sent to another process."""

    key: str
    """Where it stands in the source; unique if the source is in order."""
    image: str | bytes
    """Path or URL of the image, or the encoded image."""
    captions: tuple[object, ...] = ()
    """What stands where captions should; `load` checks it."""
    split: str = ""
    """Split that the source says it belongs to; empty is the training split."""
    beside: tuple[str, ...] = ()
    """Extensions, as written, of the files of the same name that hold the captions; none where they are known."""

    def load(self) -> Example:
        """Read the image and its captions.

        Raises:
            DataError: this pair cannot be used; `.cause` says why.
        """
        image = self.image if isinstance(self.image, bytes) else read_image(self.image)
        if self.beside and isinstance(self.image, str):
            return Example(self.key, image, captions_beside(self.image, self.beside))
        return Example(self.key, image, clean_captions(list(self.captions), self.key))


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something in the source that makes no pair; it is counted, never dropped silently."""

    key: str
    cause: str
    is_bad: bool = True
    """False for what was filtered out, or may well lie there as a note among images: no reason to stop."""


Found: TypeAlias = Record | Rejected


@dataclass(frozen=True, slots=True)
class Source:
    """A source that has been recognized."""

    kind: str
    records: Iterator[Found]
    """All of them, once, always in the same order."""
    total: int = 0
    """Number of records where it is cheap to know, for the progress bar; 0 is unknown."""
    is_download: bool = False
    """True if records come from the network, where failures are usual and no reason to stop."""


def read_image(path: str) -> bytes:
    """Read an image's file, local or remote.

    Raises:
        DataError: it is missing, too big or cannot be read.
    """
    try:
        if storage.is_remote(path):
            data = storage.read_bytes(path)  # in one request
            num_bytes = len(data)
        else:
            with open(path, "rb", buffering=0) as file:
                num_bytes = os.fstat(file.fileno()).st_size
                data = file.read() if num_bytes <= MAX_MEMBER_BYTES else b""
        if num_bytes > MAX_MEMBER_BYTES:
            raise DataError(f"{path} is too big for an image", remedy="omit it", cause="too big")
        return data
    except (FileNotFoundError, ValueError) as error:  # ValueError: no file can have this name
        raise DataError(
            f"no image at {path}", remedy="check the path and the list that names it", cause="missing file"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}", remedy="check the file", cause="unreadable file") from error


def captions_beside(path: str, extensions: Iterable[str]) -> tuple[str, ...]:
    """Read the captions of an image from files of the same name with these extensions, as written.

    Raises:
        DataError: there is none, or none that can be read; `.cause` says why.
    """
    stem = path.rpartition(".")[0]
    return captions_of(Group(path, {suffix.lower(): read_image(f"{stem}.{suffix}") for suffix in extensions}))


def file_record(folder: str, name: object, captions: Sequence[object], *, split: str = "", prefix: str = "") -> Found:
    """Make the record of an image that a list names, unless the name is not text or leads out of the folder.

    The key is the name behind `prefix`; `split` is as in `Record.split`.
    """
    if not isinstance(name, str) or not name:
        return Rejected(f"{folder} (no file name)", "missing file name")
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or storage.is_remote(name):
        return Rejected(name, "path traversal")
    return Record(prefix + name, storage.join(folder, name), tuple(captions), split)


def locate_images(path: str, names: Sequence[str], *, images: str = "") -> str:
    """Find the folder that the names of a list start from.

    Args:
        path: of the list.
        names: of images; the first few are looked for.
        images: the folder if the user says so; empty looks beside the list, in the folders beside it, and in
            those beside its own folder, two deep, as COCO and Flickr30k are unpacked.

    Raises:
        DataError: none of the images is anywhere, or `images` is no folder.
    """
    if images:
        if not storage.is_folder(images):
            raise DataError(f"no such folder: {images}", remedy="check --images")
        return images
    beside = storage.parent(path)
    above = storage.parent(beside.rstrip("/")) if storage.is_remote(beside) else storage.join(beside, "..")
    for folder in itertools.chain([beside], _folders_in(beside, 2), _folders_in(above, 2)):
        if any(storage.is_file(storage.join(folder, name)) for name in names[:_NUM_TRIED]):
            return folder
    first = names[0] if names else "any image"
    raise DataError(f"cannot find the images of {path}: no {first} in the folders around it", remedy="--images FOLDER")


def _folders_in(folder: str, depth: int) -> Iterator[str]:
    for name in storage.folders_in(folder):
        below = storage.join(folder, name)
        yield below
        if depth > 1:
            yield from _folders_in(below, depth - 1)
