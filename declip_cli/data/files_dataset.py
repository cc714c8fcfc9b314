"""Data sets of image files and of pixels in memory, and parts of other data sets."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from declip_cli.data import storage
from declip_cli.data.dataset import Classes, Dataset, Example, Pixels, Skips
from declip_cli.data.shards.tar_samples import IMAGE_EXTENSIONS
from declip_cli.data.sources.records import read_image
from declip_cli.errors import DataError

_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


def is_image(path: str) -> bool:
    """Return whether a file name looks like that of an image."""
    return path.lower().endswith(_SUFFIXES) and not path.rpartition("/")[2].startswith(".")


class FilesDataset(Dataset):
    """Images that are files, kept as plain paths so that a million of them stay small.

    Args:
        paths: local paths or URLs, N.
        labels: as in `Dataset`, as `classes` and `skipped` are.
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
        for index, path in enumerate(self._paths):
            digest.update(f"{path}\0{self.stamp(index)}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Example:
        """See `Dataset.read`; captions that cannot be read leave the image without any."""
        path = self.key(index)
        try:
            captions = self.captions(index)
        except DataError:
            captions = ()
        return Example(path, read_image(path), captions, self.labels[index] if self.labels else -1)

    def key(self, index: int) -> str:
        """Return the path of one image."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._paths[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """See `Dataset.captions`."""
        return self._captions(index) if self._captions is not None else ()

    def stamp(self, index: int) -> str:
        """See `Dataset.stamp`: size and time of the file."""
        try:
            return storage.facts(self.key(index)).stamp
        except (OSError, ValueError, DataError):
            return ""


class PixelsDataset(Dataset):
    """Images that are pixels in memory or in one large file.

    Args:
        name: begins the keys.
        pixels: number → one image; called from several threads.
        labels: as in `Dataset`, as `classes` and `fingerprint` are.
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

    def read(self, index: int) -> Example:
        """See `Dataset.read`."""
        return Example(self.key(index), self._pixels(index), (), self.labels[index])

    def key(self, index: int) -> str:
        """See `Dataset.key`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return f"{self._prefix}/{index}"


class Subset(Dataset):
    """Some examples of another data set, perhaps with other labels.

    Args:
        whole: where they come from.
        indices: of the examples, in the order wanted, N.
        labels: N classes; None keeps those of `whole`.
        classes: what the labels mean; None keeps those of `whole`.
    """

    def __init__(
        self,
        whole: Dataset,
        indices: Sequence[int],
        *,
        labels: Sequence[int] | None = None,
        classes: Classes | None = None,
    ) -> None:
        self._whole, self._indices = whole, indices
        self.name, self.split, self.note, self.fold_size = whole.name, whole.split, whole.note, whole.fold_size
        self.skipped = whole.skipped
        self.classes = classes or whole.classes
        kept = [whole.labels[index] for index in indices] if whole.labels else ()
        self.labels = kept if labels is None else labels

    @cached_property
    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        return hashlib.sha256(repr((self._whole.fingerprint, list(self._indices))).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Example:
        """See `Dataset.read`."""
        found = self._whole.read(self._index(index))
        return Example(found.key, found.image, found.captions, self.labels[index] if self.labels else -1)

    def key(self, index: int) -> str:
        """See `Dataset.key`."""
        return self._whole.key(self._index(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """See `Dataset.captions`."""
        return self._whole.captions(self._index(index))

    def stamp(self, index: int) -> str:
        """See `Dataset.stamp`."""
        return self._whole.stamp(self._index(index))

    def _index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._indices[index]


def open_list(lines: Iterable[str]) -> FilesDataset:
    """Make a data set of the images that a list names, a path or URL a line; what is not a file is counted as skipped.

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
