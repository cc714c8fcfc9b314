"""What every evaluation set of classification hands on, and how its files are found."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, TypeAlias, overload

from declip_cli.assets import asset_path
from declip_cli.errors import EvaluateError

Metric: TypeAlias = Literal["accuracy", "mean_per_class"]
Picture: TypeAlias = tuple[str, Callable[[], bytes]]
"""A key that names the picture, and how to read its encoded bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationSet:
    """One split of a data set whose pictures each belong to one class."""

    name: str
    """As the user typed it: `cifar10`, `demo` or a folder."""
    split: str
    """`train`, `val`, `test`, or empty where a folder has no splits."""
    class_names: tuple[str, ...]
    """As they appear in a prompt; the label is the position."""
    templates: tuple[str, ...]
    """The set's own prompts, with {} where the class name goes."""
    metric: Metric
    """What papers report for this set."""
    pictures: Sequence[Picture]
    """N pictures, read when needed."""
    labels: Sequence[int]
    """The class of each picture, N numbers in [0, C)."""
    note: str = ""
    """What a reader of the score should know, such as a split of our own."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a reader finds in the files of one split."""

    pictures: Sequence[Picture]
    labels: Sequence[int]
    class_names: tuple[str, ...] = ()
    """Names read from the files; empty takes those of `assets/class_names.json`."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One known data set: where it lies, how it is read, how it is scored."""

    name: str
    num_classes: int
    metric: Metric
    splits: tuple[str, ...]
    """The official ones, of train, val, test."""
    marker: str
    """A path below the data root that is there when the set is."""
    read: Callable[[Path, str], Listing]
    """Folder that holds the marker's first part, split → pictures and labels."""
    wants: str
    """Which files to put where, for people."""
    source: str
    """Where they come from, for people."""
    other_markers: tuple[str, ...] = ()
    """Paths that show the same in other layouts."""
    torchvision_name: str = ""
    """The class whose download works; empty where none does."""


class FilePictures(Sequence[Picture]):
    """Pictures that are files, kept as plain paths so that a million of them stay small."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, number: int) -> Picture: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Picture]: ...
    def __getitem__(self, number: int | slice) -> Picture | Sequence[Picture]:
        if isinstance(number, slice):
            return FilePictures(self._paths[number])
        path = self._paths[number]
        return path, partial(read_file, path)


def read_file(path: str) -> bytes:
    """Return a file's bytes; a name that no file can have, with a zero byte in it, counts as a missing file."""
    try:
        return Path(path).read_bytes()
    except ValueError as error:
        raise FileNotFoundError(str(error)) from error


def list_folder(folder: Path) -> list[Path]:
    """List the picture files directly in a folder, sorted by name.

    Args:
        folder: an existing folder.

    Returns:
        Paths of files with a picture's suffix; hidden files are left out.
    """
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if is_picture(e.name) and e.is_file())
    return [folder / name for name in names]


def is_picture(name: str) -> bool:
    """Say whether a file name looks like that of a picture."""
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".avif")
    return name.lower().endswith(suffixes) and not name.startswith(".")


def resolve_data_root(given: Path | None) -> Path:
    """Return where evaluation sets are looked for.

    Args:
        given: the option `--data-root`, or None.

    Returns:
        That folder, else `$DECLIP_DATA`, else `data/`.

    Raises:
        EvaluateError: a folder was named that does not exist.
    """
    told = given or (Path(os.environ["DECLIP_DATA"]) if os.environ.get("DECLIP_DATA") else None)
    if told is not None and not told.is_dir():
        raise EvaluateError(
            f"the data root {told} is not a folder", remedy="name the folder that holds the evaluation sets"
        )
    return told or Path("data")


def read_lines(path: Path) -> list[str]:
    """Read the non-empty lines of a list that belongs to a data set.

    Args:
        path: a text file.

    Returns:
        Lines without surrounding white space.

    Raises:
        EvaluateError: the file is missing or is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise missing_file(path) from error
    return [line.strip() for line in lines if line.strip()]


def missing_file(path: Path) -> EvaluateError:
    """Make the error for a file that a data set lacks."""
    return EvaluateError(
        f"the data set is incomplete: cannot read {path}",
        remedy="unpack the data set again; `declip zeroshot --list` shows what is expected where",
    )


@cache
def names_from_assets() -> dict[str, tuple[str, ...]]:
    """Return the class names of the known data sets, by set, in label order."""
    table = json.loads(asset_path("class_names.json").read_text(encoding="utf-8"))
    return {name: tuple(names) for name, names in table.items()}


@cache
def templates_from_assets() -> dict[str, tuple[str, ...]]:
    """Return the prompt templates of the known data sets, by set."""
    table = json.loads(asset_path("templates.json").read_text(encoding="utf-8"))
    return {name: tuple(templates) for name, templates in table.items()}
