"""ImageNet and its relatives (v2, A, R, Sketch, ObjectNet), and SUN397's official split."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from declip_cli.assets import asset_path
from declip_cli.data.benchmarks.folders import class_folders, list_classes, list_images
from declip_cli.data.benchmarks.known import Known, asset_lists, missing_file, need_package, read_lines
from declip_cli.data.dataset import Classes
from declip_cli.data.files_dataset import FilesDataset
from declip_cli.errors import DataError
from declip_cli.files import parse_json


@cache
def wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet identifiers of the 1,000 classes, in label order."""
    return tuple(asset_path("imagenet_wordnet_ids.txt").read_text(encoding="utf-8").split())


def read_imagenet(known: Known, root: Path, split: str) -> FilesDataset:
    """Read ImageNet-1k; `test` is the validation set of 50,000, as in every paper.

    There is `imagenet/` (with `train/`, `val/` of one folder per WordNet identifier; or a flat `val/` beside
    `ILSVRC2012_devkit_t12/`), or Kaggle's `ILSVRC/` with `LOC_val_solution.csv`.
    """
    base = root / "imagenet" if (root / "imagenet").is_dir() else root
    folder = base / {"test": "val"}.get(split, split)
    kaggle = base / "ILSVRC" / "Data" / "CLS-LOC"
    if not folder.is_dir() and kaggle.is_dir():
        folder = kaggle / folder.name
    if set(class_folders(folder)) & set(wordnet_ids()):
        return _classes_in(folder, wordnet_ids(), known.classes)
    files = list_images(folder)
    if not files:
        raise missing_file(folder)
    return FilesDataset(files, labels=_flat_labels(base, [Path(file).stem for file in files]), classes=known.classes)


def _classes_in(folder: Path, expected: Sequence[str], classes: Classes) -> FilesDataset:
    """List the images of class folders, all of which must be there."""
    missing = sorted(set(expected) - set(class_folders(folder)))
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(expected)} class folders, the first is {missing[0]}",
            remedy="unpack the data set again; scores over fewer images cannot be compared",
        )
    return list_classes(folder, expected, classes)


def _flat_labels(base: Path, stems: Sequence[str]) -> list[int]:
    """Look up the labels of a validation folder without class folders."""
    table = base / "LOC_val_solution.csv"
    labels = {name: label for label, name in enumerate(wordnet_ids())}
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as file:
            rows = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        return [labels[rows[stem]] for stem in stems]
    kit = base / "ILSVRC2012_devkit_t12" / "data"
    if not kit.is_dir():
        raise DataError(
            f"the images in {base} are not in class folders and their labels are missing",
            remedy=f"put ILSVRC2012_devkit_t12/ or LOC_val_solution.csv into {base}",
        )
    need_package("scipy", "the development kit of ImageNet")
    from scipy.io import loadmat

    try:
        synsets = loadmat(kit / "meta.mat", squeeze_me=True)["synsets"]
    except (OSError, ValueError, KeyError) as error:
        raise missing_file(kit / "meta.mat") from error
    by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    truth = [int(line) for line in read_lines(kit / "ILSVRC2012_validation_ground_truth.txt")]
    return [labels[by_number[truth[int(stem.rpartition("_")[2]) - 1]]] for stem in stems]


def read_imagenetv2(known: Known, root: Path, split: str) -> FilesDataset:
    """Read `imagenetv2-matched-frequency-format-val/`, one folder per label number."""
    return _classes_in(_marked(known, root), [str(label) for label in range(1000)], known.classes)


def read_sketch(known: Known, root: Path, split: str) -> FilesDataset:
    """Read `imagenet-sketch/` or `sketch/`, one folder per WordNet identifier."""
    return _classes_in(_marked(known, root), wordnet_ids(), known.classes)


def read_subset(known: Known, root: Path, split: str) -> FilesDataset:
    """Read `imagenet-a/` or `imagenet-r/`: 200 of the 1,000 classes; only these are distinguished."""
    labels, names = asset_lists("class_subsets.json")[known.name], asset_lists("class_names.json")["imagenet"]
    classes = replace(known.classes, names=tuple(names[label] for label in labels))
    found = _classes_in(root / known.name, [wordnet_ids()[label] for label in labels], classes)
    found.note = f"only the {len(labels)} classes of this set are distinguished"
    return found


def read_objectnet(known: Known, root: Path, split: str) -> FilesDataset:
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
    folders = sorted(folder for folder, label in label_of_folder.items() if label in imagenet_names)
    names = tuple(label_of_folder[folder].lower() for folder in folders)
    found = _classes_in(base / "images", folders, replace(known.classes, names=names))
    found.note = f"only the {len(folders)} classes that ImageNet also has are distinguished"
    return found


def _marked(known: Known, root: Path) -> Path:
    return next(root / marker for marker in known.markers if (root / marker).is_dir())


def read_sun397(known: Known, root: Path, split: str) -> FilesDataset:
    """Read `SUN397/ClassName.txt` and the official `Training_01.txt` / `Testing_01.txt`.

    The lists come in `Partitions.zip` of the data set's page and may lie in `SUN397/`,
    `SUN397/Partitions/` or `Partitions/`. Each has 50 images per class; of the ten such pairs, papers use
    the first.
    """
    base = root / "SUN397"
    folders = read_lines(base / "ClassName.txt")  # "/a/abbey"
    name = {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
    places = [base / name, base / "Partitions" / name, root / "Partitions" / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"{base} lacks the official split {name}; without it the score cannot be compared",
            remedy=f"unpack Partitions.zip of the SUN397 page into {base / 'Partitions'}",
        )
    indices = {folder: index for index, folder in enumerate(folders)}
    files = read_lines(path)  # "/a/abbey/sun_aaalbzqrimafwbiv.jpg"
    names = tuple(folder[3:].replace("_", " ").replace("/", " ") for folder in folders)
    return FilesDataset(
        [base / file.lstrip("/") for file in files],
        labels=[indices[file.rpartition("/")[0]] for file in files],
        classes=replace(known.classes, names=names),
    )
