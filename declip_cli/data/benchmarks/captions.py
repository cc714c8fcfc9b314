"""Sets with captions: test splits in the files in which they are distributed, and what comes along in shards."""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from declip_cli.assets import asset_path
from declip_cli.data.benchmarks.known import Known, read_lines
from declip_cli.data.dataset import Dataset, Skips
from declip_cli.data.files_dataset import FilesDataset, Subset
from declip_cli.data.shards.store import open_shards
from declip_cli.data.shards.tar_samples import clean_captions
from declip_cli.data.sources.annotations import read_annotations
from declip_cli.data.sources.records import Found, Record, Rejected, file_record, locate_images
from declip_cli.errors import DataError

MAX_CAPTIONS = 5
"""Captions that count per image; COCO has a few more for some."""
_VAL2017 = "COCO's val2017, not Karpathy's test split, which papers score"


def read_captions(known: Known, root: Path, split: str) -> FilesDataset:
    """Read Karpathy's test split or, with a note, COCO's val2017.

    The markers of the set are the files that name the images and their captions; the first that is there counts.
    """
    path = next(root / marker for marker in known.markers if (root / marker).is_file())
    try:
        records = list(_records(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error!r}", remedy=known.how_to_get(root)) from error
    files, skipped = [record for record in records if isinstance(record, Record)], Skips()
    for record in records:
        if isinstance(record, Rejected):
            skipped.add(record.cause, record.key)
    if not files:
        raise DataError(f"{path} names no test image", remedy=known.how_to_get(root))

    def captions_of(index: int) -> tuple[str, ...]:
        record = files[index]
        return clean_captions(list(record.captions), record.key)[:MAX_CAPTIONS]

    found = FilesDataset([str(record.image) for record in files], captions=captions_of, skipped=skipped)
    found.note = _VAL2017 if path.name == "captions_val2017.json" else ""
    return found


def _records(path: Path) -> Iterator[Found]:
    if path.suffix == ".json":
        return read_annotations(str(path), split="test" if path.name.startswith("dataset_") else None)
    if path.name == "Flickr_8k.testImages.txt":
        wanted = set(read_lines(path))
        records = read_annotations(str(path.with_name("Flickr8k.token.txt")))
        return (record for record in records if record.key in wanted)
    return _comma_lines(path)


def _comma_lines(path: Path) -> Iterator[Found]:
    """Read lines `name.jpg,caption` with a heading, as the annotations of CLIP_benchmark come."""
    captions: dict[str, list[object]] = {}
    for line in read_lines(path)[1:]:
        name, _, caption = line.partition(".jpg,")
        captions.setdefault(f"{name}.jpg", []).append(caption)
    folder = locate_images(str(path), list(captions))
    return (file_record(folder, name, texts) for name, texts in captions.items())


def read_packed(known: Known, root: Path, split: str) -> Dataset:
    """Read one split of a set in `assets/`, of tar shards with the class of each image in a table beside them.

    The splits name the `tars`; `label` is the column of `classes.tsv` that is the class. `dealt` are the bounds
    between 0 and 1 of a split that takes only some of the names, so that what an image shows is in one split whoever
    drew it.
    """
    facts = known.splits[split]
    folder = asset_path("demo")
    with (folder / "classes.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [row for tar in facts["tars"] for row in rows if row["key"].startswith(f"{tar}/")]
    values = [row[known.label] for row in rows]
    names = tuple(sorted(set(values)) if "dealt" in facts else dict.fromkeys(values))
    indices = {name: index for index, name in enumerate(names)}
    found = open_shards([str(folder / f"{tar}.tar") for tar in facts["tars"]])
    found.classes = replace(known.classes, names=names)
    found.labels = [indices[value] for value in values]
    if "dealt" not in facts:
        return found
    first, last = facts["dealt"]
    places = [int.from_bytes(hashlib.sha256(row["name"].encode()).digest()[:4]) / 2**32 for row in rows]
    return Subset(found, [index for index, place in enumerate(places) if first <= place < last])
