"""The known data sets as `assets/catalog.toml` lists them: where they are, how they are read and scored."""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from declip_cli.assets import asset_path
from declip_cli.data.dataset import Classes
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
        found = ["zero-shot", *(["linear-probe"] if "train" in self.splits else [])]
        return ", ".join([*found, "retrieval"] if self.reader == "packed" else found)

    @property
    def classes(self) -> Classes:
        """The classes, as far as they are not in the files of the set."""
        names = asset_lists("class_names.json")
        return Classes(
            names=names.get("imagenet" if self.num_classes == len(names["imagenet"]) else self.name, ()),
            templates=self.templates or asset_lists("templates.json").get(self.name, ()),
            metric="mean_per_class" if self.metric == "mean_per_class" else "accuracy",
        )

    def locate(self, root: Path) -> Path | None:
        """Find the folder that a marker lies in: the data root, or the one of the set's name in it; None if neither."""
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
    table = tomllib.loads(asset_path("catalog.toml").read_text(encoding="utf-8"))
    lists = ("markers", "templates", "try_next")
    known: dict[str, Known] = {}
    for name, row in table.items():
        fields: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in row.items()}
        known[name] = Known(name=name, **fields)
    return known


def resolve_data_root(given: Path | None) -> Path:
    """Return where evaluation sets are looked for: the option `--data-root`, else `$DECLIP_DATA`, else `data/`.

    Raises:
        DataError: a folder was named that does not exist.
    """
    root = given or (Path(os.environ["DECLIP_DATA"]) if os.environ.get("DECLIP_DATA") else None)
    if root is not None and not root.is_dir():
        raise DataError(
            f"the data root {root} is not a folder", remedy="name the folder that holds the evaluation sets"
        )
    return root or Path("data")


def list_known(data_root: Path | None = None) -> list[dict[str, Any]]:
    """List the known data sets in the order of the table, as `declip zeroshot --list --json` shows them.

    Returns:
        `name`, `task`, `num_classes`, `metric`, `expected` (a path that shows that the set is there), `is_there`.
    """
    root = resolve_data_root(data_root)
    listed = []
    for known in known_sets().values():
        folder = known.locate(root)
        listed.append(
            {
                "name": known.name,
                "task": known.tasks,
                "num_classes": known.num_classes,
                "metric": known.metric,
                "expected": str((folder or root) / known.markers[0]) if known.markers else "built in",
                "is_there": folder is not None or not known.markers,
            }
        )
    return listed


def read_lines(path: Path) -> list[str]:
    """Read the non-empty lines of a list that belongs to a data set, without surrounding white space.

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
    """Make sure that a package of the extra `eval` is installed, if one is named; `what` is read with it.

    Raises:
        DataError: it is missing.
    """
    if package:
        try:
            __import__(package)
        except ImportError as error:
            raise DataError(f"{what} needs the package {package}", remedy="pip install 'declip[eval]'") from error


@cache
def asset_lists(file: str) -> Mapping[str, tuple[Any, ...]]:
    """Read the lists of a JSON file in `assets/`, by the names of data sets."""
    return {name: tuple(found) for name, found in json.loads(asset_path(file).read_text(encoding="utf-8")).items()}
