"""What a run folder says of the run, read for a page: settings, reports, notes and the first pairs."""

import functools
import math
import os
from array import array
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from declip_cli.config import RunConfig
from declip_cli.config_files import flatten, list_recipes, load_recipe, merge_into, to_plain
from declip_cli.errors import EvaluateError
from declip_cli.files import parse_json, read_json
from declip_cli.pages.charts import Series

SAMPLES_FILE = "samples.json"
"""The first pairs of a run, as its model saw them: a list of `views` and `texts`, each with its `kind`."""
_TIME_CHARS = len("2026-01-31 12:00:00 ")
"""Before each line of the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """The files of one run, read leniently: what is missing is empty."""

    name: str
    asked: dict[str, Any]
    """Setting with its section → what was asked for."""
    settings: dict[str, Any]
    """The same as settled."""
    facts: dict[str, Any]
    """What data and machine add."""
    versions: dict[str, Any]
    reports: "Reports"
    notes: list[str]
    """Lines of the log but for those of steps: what the run said, with advice."""
    samples: list[dict[str, Any]]


@dataclass(slots=True)
class Reports:
    """The lines of `metrics.jsonl` as columns; a long run adds what is new to those of before."""

    columns: dict[tuple[str, ...], dict[str, "array[float]"]] = field(default_factory=dict)
    """Where a number stands in a report → its `step`, `samples_seen` and `y` in all reports that have it."""
    last: dict[str, Any] = field(default_factory=dict)
    """The newest report; empty before the first."""
    num_damaged: int = 0
    """Lines that cannot be read."""
    _read: tuple[int, int] = (0, 0)
    """The file, by its number on the disk, and the bytes of it that are read."""

    def update(self, path: Path) -> None:
        """Read the lines that are new, or all where the file is another one; it may be missing."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._read[0] or status.st_size < self._read[1]:
                    self.columns, self.last, self.num_damaged, self._read = {}, {}, 0, (status.st_ino, 0)
                file.seek(self._read[1])
                whole = file.read().rpartition(b"\n")[0]  # what follows the last line end is not written whole
        except OSError:
            return
        self._read = self._read[0], self._read[1] + len(whole) + bool(whole)
        for line in whole.split(b"\n") if whole else ():
            try:
                self._add(parse_json(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                self.num_damaged += 1

    def _add(self, report: dict[str, Any]) -> None:
        step, seen = float(report["step"]), float(report["samples_seen"])
        for path, value in _numbers((), report):
            column = self.columns.setdefault(path, {"step": array("d"), "samples_seen": array("d"), "y": array("d")})
            column["step"].append(step)
            column["samples_seen"].append(seen)
            column["y"].append(value)
        self.last = report

    def names_of(self, group: str) -> list[str]:
        """Name the values of a group of the reports, such as `losses`, in the order in which they came."""
        return [path[1] for path in self.columns if path[0] == group and len(path) == 2]

    def curve(self, path: tuple[str, ...], name: str, *, x: str = "step") -> Series | None:
        """Return one value over `step` or `samples_seen`; None where no report has a number there."""
        column = self.columns.get(path)
        if column is None or all(map(math.isnan, column["y"])):
            return None
        return Series(name, np.asarray(column[x]), np.asarray(column["y"]))

    def scores(self) -> list[tuple[str, ...]]:
        """List the scores in [0, 1] that were taken, as `curve` takes them."""
        return [path for path in self.columns if path[0] == "evaluations" and self._is_score(path)]

    def _is_score(self, path: tuple[str, ...]) -> bool:
        if path[-1] == "score":
            return (*path[:-1], "top1") not in self.columns  # else it is one of the others
        return path[-1].startswith(("top", "mean_per_class", "recall_at_"))


def _numbers(path: tuple[str, ...], value: object) -> Iterator[tuple[tuple[str, ...], float]]:
    """Walk through all numbers of a report; None, which stands for what was none, is NaN."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers((*path, str(name)), item)
    elif value is None:
        yield path, math.nan
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def read_run_files(path: Path, reports: Reports | None = None) -> RunFiles:
    """Read what a run folder says; `reports` of before spare the lines they have.

    Raises:
        EvaluateError: there is no run.
    """
    try:
        content = read_json(path / "config.json")
        asked, settings, facts = (dict(content[key]) for key in ("asked", "config", "run"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluateError(
            f"no run at {path}: cannot read config.json ({error})",
            remedy="name run folders, as declip pretrain names one when it starts",
        ) from error
    reports = reports or Reports()
    reports.update(path / "metrics.jsonl")
    lines = _read_text(path / "log.txt").splitlines()
    try:
        samples = list(read_json(path / SAMPLES_FILE))
    except (OSError, ValueError, TypeError):
        samples = []
    return RunFiles(
        name=path.resolve().name,
        asked=flatten(asked),
        settings=flatten(settings),
        facts=facts,
        versions=dict(content.get("versions") or {}),
        reports=reports,
        notes=[line for line in lines if not line.startswith("step ", _TIME_CHARS)],
        samples=samples,
    )


def differences(asked: Mapping[str, Any]) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Say in what the settings asked for differ from the recipe, or the defaults, to which they are nearest.

    Returns:
        The recipe's name, empty for the defaults; and setting, value there, value asked for. `absent` stands for a
        setting that only one of the two has.
    """
    found = {name: list(_differing(base, asked)) for name, base in _bases().items()}
    nearest = min(found, key=lambda name: len(found[name]))  # of equals the first, which are the defaults
    return nearest, found[nearest]


def _differing(base: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(base.keys() | asked.keys()):
        there, here = base.get(key, "absent"), asked.get(key, "absent")
        if there != here:
            yield key, there, here


@functools.cache
def _bases() -> dict[str, dict[str, Any]]:
    defaults = to_plain(RunConfig())
    bases = {"": flatten(defaults)}
    for name in list_recipes():
        settings = deepcopy(defaults)
        merge_into(settings, load_recipe(name))
        bases[name] = flatten(settings)
    return bases


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
