"""Data sets of image files and of pixels in memory, and parts of other data sets."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from declip_cli.data import storage
from declip_cli.data.dataset import Classes, Dataset, Example, Pixels, Skips
from declip_cli.data.shards.tar_samples import PICTURE_EXTENSIONS
from declip_cli.data.sources.records import read_picture
from declip_cli.errors import DataError

_SUFFIXES = tuple(f".{extension}" for extension in PICTURE_EXTENSIONS)


def is_image(path: str) -> bool:
    """Say whether a file name looks like that of an image."""
    return path.lower().endswith(_SUFFIXES) and not path.rpartition("/")[2].startswith(".")


class FilesDataset(Dataset):
    """Images that are files, kept as plain paths so that a million of them stay small.

    Args:
        paths: local paths or URLs, N.
        labels: as of `Dataset`, as `classes` and `skipped` are.
        classes: what the labels mean.
        captions: number → captions, read when asked; None where there are none.
        skipped: what is in the files but in no example.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        labels: Sequence[int] = (),
        classes: Classes | None = None,
        captions: Callable[[int], tuple[str, ...]] | None = None,
        skipped: Skips | None = None,
    ) -> None:
        self._paths = [os.fspath(path) for path in paths]
        self.labels, self.classes = labels, classes
        self._captions = captions
        self.skipped = Skips() if skipped is None else skipped

    @cached_property
    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        digest = hashlib.sha256()
        for number, path in enumerate(self._paths):
            digest.update(f"{path}\0{self.stamp(number)}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, number: int) -> Example:
        """See `Dataset.read`; captions that cannot be read leave the image without any."""
        path = self.key(number)
        try:
            captions = self.captions(number)
        except DataError:
            captions = ()
        return Example(path, read_picture(path), captions, self.labels[number] if self.labels else -1)

    def key(self, number: int) -> str:
        """Return the path of one image."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._paths[number]

    def captions(self, number: int) -> tuple[str, ...]:
        """See `Dataset.captions`."""
        return self._captions(number) if self._captions is not None else ()

    def stamp(self, number: int) -> str:
        """See `Dataset.stamp`: size and time of the file."""
        try:
            return storage.facts(self.key(number)).stamp
        except (OSError, ValueError, DataError):
            return ""


class PixelsDataset(Dataset):
    """Images that are pixels in memory or in one large file.

    Args:
        name: begins the keys.
        pixels: number → one image; called from several threads.
        labels: as of `Dataset`, as `classes` and `fingerprint` are.
        classes: what the labels mean.
        fingerprint: of the whole.
    """

    fingerprint = ""

    def __init__(
        self, name: str, pixels: Callable[[int], Pixels], labels: Sequence[int], *, classes: Classes, fingerprint: str
    ) -> None:
        self._prefix, self._pixels = name, pixels
        self.labels, self.classes, self.fingerprint = labels, classes, fingerprint
        self.skipped = Skips()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int) -> Example:
        """See `Dataset.read`."""
        return Example(self.key(number), self._pixels(number), (), self.labels[number])

    def key(self, number: int) -> str:
        """See `Dataset.key`."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return f"{self._prefix}/{number}"


class Subset(Dataset):
    """Some examples of another data set, perhaps with other labels.

    Args:
        whole: where they come from.
        numbers: of the examples, in the order wanted, N.
        labels: N classes; None keeps those of `whole`.
        classes: what the labels mean; None keeps those of `whole`.
    """

    def __init__(
        self,
        whole: Dataset,
        numbers: Sequence[int],
        *,
        labels: Sequence[int] | None = None,
        classes: Classes | None = None,
    ) -> None:
        self._whole, self._numbers = whole, numbers
        self.name, self.split, self.note, self.fold_size = whole.name, whole.split, whole.note, whole.fold_size
        self.skipped = whole.skipped
        self.classes = classes or whole.classes
        kept = [whole.labels[number] for number in numbers] if whole.labels else ()
        self.labels = kept if labels is None else labels

    @cached_property
    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        return hashlib.sha256(repr((self._whole.fingerprint, list(self._numbers))).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int) -> Example:
        """See `Dataset.read`."""
        found = self._whole.read(self._number(number))
        return Example(found.key, found.image, found.captions, self.labels[number] if self.labels else -1)

    def key(self, number: int) -> str:
        """See `Dataset.key`."""
        return self._whole.key(self._number(number))

    def captions(self, number: int) -> tuple[str, ...]:
        """See `Dataset.captions`."""
        return self._whole.captions(self._number(number))

    def stamp(self, number: int) -> str:
        """See `Dataset.stamp`."""
        return self._whole.stamp(self._number(number))

    def _number(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._numbers[number]


def open_list(lines: Iterable[str]) -> FilesDataset:
    """Make a data set of the images that a list names, a path or URL a line; what is no file is counted as skipped.

    Raises:
        DataError: none of them is.
    """
    paths = [path for path in dict.fromkeys(line.rstrip("\r\n") for line in lines) if path]
    skipped, found = Skips(), []
    for path in paths:
        if storage.is_file(path):
            found.append(path)
        else:
            skipped.add("folder" if storage.is_folder(path) else "missing file", path)
    if not found:
        raise DataError(
            f"none of the {len(paths)} paths in the list is an image{f' ({skipped})' if skipped else ''}",
            remedy="write one path a line, as `find . -name '*.jpg'` does",
        )
    dataset = FilesDataset(found, skipped=skipped)
    dataset.name = "-"
    return dataset
