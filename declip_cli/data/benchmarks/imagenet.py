"""ImageNet and its relatives: v2, A, R, Sketch, ObjectNet."""

import csv
import json
from functools import cache
from pathlib import Path

from declip_cli.assets import asset_path
from declip_cli.data.benchmarks.base import (
    FilePictures,
    Listing,
    list_folder,
    missing_file,
    names_from_assets,
    read_lines,
)
from declip_cli.data.benchmarks.folders import class_folders, list_classes
from declip_cli.data.benchmarks.matlab import read_mat, to_int
from declip_cli.errors import EvaluateError
from declip_cli.files import parse_json


@cache
def wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet identifiers of the 1,000 classes, in label order."""
    return tuple(asset_path("imagenet_wordnet_ids.txt").read_text(encoding="utf-8").split())


@cache
def subset_labels(name: str) -> tuple[int, ...]:
    """Return the ImageNet labels that a relative uses, in order."""
    return tuple(json.loads(asset_path("class_subsets.json").read_text(encoding="utf-8"))[name])


def read_imagenet(root: Path, split: str) -> Listing:
    """Read ImageNet-1k; `test` is the validation set of 50,000, as in every paper.

    Args:
        root: holds `imagenet/` (with `train/`, `val/` of one folder per WordNet identifier; or a flat `val/`
            beside `ILSVRC2012_devkit_t12/`), or Kaggle's `ILSVRC/` with `LOC_val_solution.csv`.
        split: `train` or `test`.

    Returns:
        Pictures and labels.

    Raises:
        EvaluateError: the layout is none of these.
    """
    base = root / "imagenet" if (root / "imagenet").is_dir() else root
    folder = base / {"test": "val"}.get(split, split)
    kaggle = base / "ILSVRC" / "Data" / "CLS-LOC"
    if not folder.is_dir() and kaggle.is_dir():
        folder = kaggle / folder.name
    if set(class_folders(folder)) & set(wordnet_ids()):
        return list_classes(folder, wordnet_ids_in(folder, wordnet_ids()))
    files = list_folder(folder) if folder.is_dir() else []
    if not files:
        raise missing_file(folder)
    return Listing(pictures=FilePictures(files), labels=_flat_labels(base, files))


def wordnet_ids_in(folder: Path, expected: tuple[str, ...]) -> tuple[str, ...]:
    """Check that a folder has one subfolder for every expected class.

    Args:
        folder: holds the class folders.
        expected: their names, in label order.

    Returns:
        The expected names.

    Raises:
        EvaluateError: some are missing.
    """
    missing = sorted(set(expected) - set(class_folders(folder)))
    if missing:
        raise EvaluateError(
            f"{folder} lacks {len(missing)} of {len(expected)} class folders, the first is {missing[0]}",
            remedy="unpack the data set again; scores over fewer pictures cannot be compared",
        )
    return expected


def _flat_labels(base: Path, files: list[Path]) -> list[int]:
    """Look up the labels of a validation folder without class folders."""
    table = base / "LOC_val_solution.csv"
    labels = {name: label for label, name in enumerate(wordnet_ids())}
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as file:
            rows = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        return [labels[rows[path.stem]] for path in files]
    kit = base / "ILSVRC2012_devkit_t12" / "data"
    if not kit.is_dir():
        raise EvaluateError(
            f"the pictures in {files[0].parent} are not in class folders and their labels are missing",
            remedy=f"put ILSVRC2012_devkit_t12/ or LOC_val_solution.csv into {base}",
        )
    synsets = read_mat(kit / "meta.mat")["synsets"]
    assert isinstance(synsets, dict)
    by_number = dict(zip(map(to_int, synsets["ILSVRC2012_ID"]), map(str, synsets["WNID"]), strict=True))
    truth = [int(line) for line in read_lines(kit / "ILSVRC2012_validation_ground_truth.txt")]
    return [labels[by_number[truth[int(path.stem.rpartition("_")[2]) - 1]]] for path in files]


def read_imagenetv2(root: Path, split: str) -> Listing:
    """Read `imagenetv2-matched-frequency-format-val/`, one folder per label number."""
    names = ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency")
    folder = next((root / name for name in names if (root / name).is_dir()), root / names[0])
    return list_classes(folder, wordnet_ids_in(folder, tuple(str(label) for label in range(1000))))


def read_sketch(root: Path, split: str) -> Listing:
    """Read `imagenet-sketch/` or `sketch/`, one folder per WordNet identifier."""
    folder = next((root / n for n in ("imagenet-sketch", "sketch") if (root / n).is_dir()), root / "sketch")
    return list_classes(folder, wordnet_ids_in(folder, wordnet_ids()))


def read_subset(root: Path, split: str, *, name: str) -> Listing:
    """Read `imagenet-a/` or `imagenet-r/`: 200 of the 1,000 classes; only these are told apart.

    Args:
        root: holds the folder.
        split: only `test`.
        name: `imagenet-a` or `imagenet-r`.

    Returns:
        Pictures, labels among the 200, and their names.
    """
    labels = subset_labels(name)
    folder = root / name
    names = names_from_assets()["imagenet"]
    listing = list_classes(folder, wordnet_ids_in(folder, tuple(wordnet_ids()[label] for label in labels)))
    return Listing(
        pictures=listing.pictures,
        labels=listing.labels,
        class_names=tuple(names[label] for label in labels),
        note=f"only the {len(labels)} classes of this set are told apart",
    )


def read_objectnet(root: Path, split: str) -> Listing:
    """Read `objectnet-1.0/`: the 113 classes that ImageNet has too, named as ObjectNet does.

    The tables in `mappings/` come in the same archive.
    """
    base = root / "objectnet-1.0"
    tables = []
    for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"):
        path = base / "mappings" / name
        try:
            tables.append(parse_json(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise missing_file(path) from error
    label_of_folder, imagenet_names = tables
    folders = tuple(sorted(f for f, label in label_of_folder.items() if label in imagenet_names))
    listing = list_classes(base / "images", wordnet_ids_in(base / "images", folders))
    return Listing(
        pictures=listing.pictures,
        labels=listing.labels,
        class_names=tuple(label_of_folder[folder].lower() for folder in folders),
        note=f"only the {len(folders)} classes that ImageNet has too are told apart",
    )
