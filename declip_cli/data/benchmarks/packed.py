"""Sets that come along in tar shards, with the class of each image in a table beside them."""

import csv
import hashlib
from dataclasses import replace
from pathlib import Path

from declip_cli.assets import asset_path
from declip_cli.data.benchmarks.known import Known
from declip_cli.data.dataset import Classes, Dataset
from declip_cli.data.files_dataset import Subset
from declip_cli.data.shards.store import open_shards


def read_packed(known: Known, root: Path, split: str, classes: Classes) -> Dataset:
    """Read one split of a set in `assets/`.

    Args:
        known: its splits name the `tars`; `label` is the column of `classes.tsv` that is the class. `dealt` are
            the bounds between 0 and 1 of a split that takes only some of the names, so that what an image
            shows is in one split whoever drew it.
        root: not looked at.
        split: which one.
        classes: the set's prompts.

    Returns:
        The shards, or a part of them.
    """
    facts = known.splits[split]
    folder = asset_path("demo")
    with (folder / "classes.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [row for tar in facts["tars"] for row in rows if row["key"].startswith(f"{tar}/")]
    values = [row[known.label] for row in rows]
    names = tuple(sorted(set(values)) if "dealt" in facts else dict.fromkeys(values))
    numbers = {name: number for number, name in enumerate(names)}
    found = open_shards([str(folder / f"{tar}.tar") for tar in facts["tars"]])
    found.classes = replace(classes, names=names)
    found.labels = [numbers[value] for value in values]
    if "dealt" not in facts:
        return found
    first, last = facts["dealt"]
    return Subset(found, [number for number, row in enumerate(rows) if first <= _place(row["name"]) < last])


def _place(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
