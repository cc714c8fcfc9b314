"""The known data sets as `assets/catalogue.toml` lists them: where each lies, who reads it, how papers score it."""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from declip_cli.assets import asset_path
from declip_cli.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One row of the table; its head says what the fields mean."""

    name: str
    reader: str
    splits: Mapping[str, Mapping[str, Any]]
    num_classes: int = 0
    metric: str = "accuracy"
    markers: tuple[str, ...] = ()
    wants: str = ""
    source: str = ""
    torchvision: str = ""
    names_in_files: bool = False
    can_download: bool = True
    needs: str = ""
    note: str = ""
    fold_size: int = 0
    label: str = ""
    templates: tuple[str, ...] = ()
    probe: str = ""
    raw_pixels: bool = False
    try_next: tuple[str, ...] = ()

    @property
    def tasks(self) -> str:
        """Which commands score it, for people."""
        if not self.num_classes:
            return "retrieval"
        has_captions = self.reader == "packed"
        return ", ".join(
            (
                "zero-shot",
                *(("linear-probe",) if "train" in self.splits else ()),
                *(("retrieval",) if has_captions else ()),
            )
        )

    def locate(self, root: Path) -> Path | None:
        """Find the folder that a marker lies in: the data root, or the one of the set's name in it; None if neither.

        Args:
            root: the data root.
        """
        places = (root, root / self.name)
        return next((place for marker in self.markers for place in places if (place / marker).exists()), None)

    def how_to_get(self, root: Path) -> str:
        """Say which files to put where, for people."""
        can_download = self.torchvision and self.can_download
        command = f"declip zeroshot {self.name} --data-root {root} --download, or " if can_download else ""
        return f"{command}put into {root}/: {self.wants}. Source: {self.source}"


@cache
def known_sets() -> Mapping[str, Known]:
    """Return the known data sets by name, in the order of the table."""
    table = tomllib.loads(asset_path("catalogue.toml").read_text(encoding="utf-8"))
    lists = ("markers", "templates", "try_next")
    known: dict[str, Known] = {}
    for name, row in table.items():
        fields: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in row.items()}
        known[name] = Known(name=name, **fields)
    return known


def resolve_data_root(given: Path | None) -> Path:
    """Return where evaluation sets are looked for.

    Args:
        given: the option `--data-root`, or None.

    Returns:
        That folder, else `$DECLIP_DATA`, else `data/`.

    Raises:
        DataError: a folder was named that does not exist.
    """
    told = given or (Path(os.environ["DECLIP_DATA"]) if os.environ.get("DECLIP_DATA") else None)
    if told is not None and not told.is_dir():
        raise DataError(
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
        DataError: the file is missing or is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise missing_file(path) from error
    return [line.strip() for line in lines if line.strip()]


def missing_file(path: Path) -> DataError:
    """Make the error for a file that a data set lacks."""
    return DataError(
        f"the data set is incomplete: cannot read {path}",
        remedy="unpack the data set again; `declip zeroshot --list` shows what is expected where",
    )


def need_package(package: str, what: str) -> None:
    """Raise where a package of the extra `eval` is not installed.

    Args:
        package: its name, such as `scipy`; empty needs none.
        what: what is read with it, for the message.

    Raises:
        DataError: it is missing.
    """
    if package:
        try:
            __import__(package)
        except ImportError as error:
            raise DataError(f"{what} needs the package {package}", remedy="pip install 'declip[eval]'") from error


@cache
def names_from_assets() -> Mapping[str, tuple[str, ...]]:
    """Return the class names of the known data sets, by set, in label order."""
    table = json.loads(asset_path("class_names.json").read_text(encoding="utf-8"))
    return {name: tuple(names) for name, names in table.items()}


@cache
def templates_from_assets() -> Mapping[str, tuple[str, ...]]:
    """Return the prompt templates of the known data sets, by set."""
    table = json.loads(asset_path("templates.json").read_text(encoding="utf-8"))
    return {name: tuple(templates) for name, templates in table.items()}
