"""What every source yields: where a picture and its captions lie, still unread."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from declip_cli.data import storage
from declip_cli.data.dataset import Example
from declip_cli.data.shards.tar_samples import MAX_MEMBER_BYTES, Group, captions_of, clean_captions
from declip_cli.errors import DataError


class Record(Protocol):
    """One pair of a source. Small, and fit to be sent to another process."""

    @property
    def key(self) -> str:
        """Where it stands in the source; unique if the source is in order."""
        ...

    @property
    def part(self) -> str:
        """Part of the data it belongs to by the source's own word; empty is the training part."""
        ...

    def load(self) -> Example:
        """Read the picture and its captions.

        Raises:
            DataError: this pair cannot be used; `.cause` says why.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileRecord:
    """An image in a file of its own, with captions known already or in files of the same name beside it."""

    key: str
    path: str
    captions: tuple[object, ...] = ()
    part: str = ""
    beside: tuple[str, ...] = ()
    """Extensions of the caption files, as written; they count where there are any."""

    def load(self) -> Example:
        """Read the pair; see `Record.load`."""
        image = read_picture(self.path)
        if self.beside:
            return Example(self.key, image, captions_beside(self.path, self.beside))
        return Example(self.key, image, clean_captions(list(self.captions), self.key))


@dataclass(frozen=True, slots=True)
class BytesRecord:
    """A picture already in memory."""

    key: str
    image: bytes
    captions: tuple[object, ...]
    part: str = ""

    def load(self) -> Example:
        """Read the pair; see `Record.load`."""
        return Example(self.key, self.image, clean_captions(list(self.captions), self.key))


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A sample of a tar archive."""

    key: str
    group: Group
    part: str = ""

    def load(self) -> Example:
        """Read the pair; see `Record.load`."""
        return Example(self.key, self.group.parts[self.group.picture_extension], captions_of(self.group))


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Something that stands in the source and is no pair; it is counted, never dropped in silence."""

    key: str
    cause: str
    part: str = ""
    is_bad: bool = True
    """False for what may well lie there, such as a note among pictures; it is no reason to stop."""

    def load(self) -> Example:
        """Raise the reason; see `Record.load`."""
        raise DataError(f"{self.key}: {self.cause}", remedy="mend it or leave it out", cause=self.cause)


@dataclass(frozen=True, slots=True)
class Source:
    """A source that has been recognised."""

    kind: str
    records: Iterator[Record]
    """All of them, once, always in the same order."""
    total: int = 0
    """Number of records where it is cheap to know, for the progress bar; 0 is unknown."""
    is_download: bool = False
    """True if records come from the network, where failures are usual and no reason to stop."""


def read_picture(path: str) -> bytes:
    """Read a picture's file.

    Args:
        path: local path or URL.

    Returns:
        Its bytes.

    Raises:
        DataError: it is missing, too big or cannot be read.
    """
    try:
        if not storage.is_remote(path):
            with open(path, "rb") as file:
                data = file.read(MAX_MEMBER_BYTES + 1)
        else:
            data = storage.read_bytes(path)  # in one request
        if len(data) > MAX_MEMBER_BYTES:
            raise DataError(f"{path} is too big for an image", remedy="omit it", cause="too big")
        return data
    except (FileNotFoundError, ValueError) as error:  # ValueError: no file can have this name
        raise DataError(
            f"no image at {path}", remedy="check the path and the list that names it", cause="missing file"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}", remedy="check the file", cause="unreadable file") from error


def captions_beside(path: str, extensions: Iterable[str]) -> tuple[str, ...]:
    """Read the captions of an image from the files beside it.

    Args:
        path: of the image.
        extensions: of the caption files, as written.

    Returns:
        At least one caption.

    Raises:
        DataError: there is none, or none that can be read; `.cause` says why.
    """
    stem = path.rpartition(".")[0]
    group = Group(path)
    for extension in extensions:
        group.parts[extension.lower()] = read_picture(f"{stem}.{extension}")
    return captions_of(group)


def file_record(folder: str, name: object, captions: list[object], *, part: str = "") -> Record:
    """Make the record of a picture that a list names.

    Args:
        folder: where names start from.
        name: what the list says.
        captions: what the list says.
        part: as of `Record.part`.

    Returns:
        The record; a bad one if the name is missing or leads out of the folder.
    """
    if not isinstance(name, str) or not name:
        return BadRecord(f"{folder} (no file name)", "missing file name", part)
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or storage.is_remote(name):
        return BadRecord(name, "path traversal", part)
    return FileRecord(name, storage.join(folder, name), tuple(captions), part)
