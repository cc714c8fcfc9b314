"""Sets whose splits are lists of files: pets, food101, sun397, flowers102, cars, aircraft, dtd, gtsrb."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from declip_cli.data.benchmarks.base import FilePictures, Listing, missing_file, read_lines
from declip_cli.data.benchmarks.folders import class_folders, list_classes
from declip_cli.data.benchmarks.matlab import Value, read_mat, to_int
from declip_cli.errors import EvaluateError
from declip_cli.files import parse_json


def _listing(paths: Sequence[Path], labels: Sequence[int], class_names: Sequence[str] = ()) -> Listing:
    return Listing(pictures=FilePictures(paths), labels=labels, class_names=tuple(class_names))


def read_pets(root: Path, split: str) -> Listing:
    """Read `oxford-iiit-pet/annotations/{trainval,test}.txt`: lines `name class species breed`."""
    base = root / "oxford-iiit-pet"
    lines = read_lines(base / "annotations" / {"train": "trainval.txt"}.get(split, f"{split}.txt"))
    rows = [line.split() for line in lines]
    return _listing([base / "images" / f"{row[0]}.jpg" for row in rows], [int(row[1]) - 1 for row in rows])


def read_food101(root: Path, split: str) -> Listing:
    """Read `food-101/meta/{train,test}.json`: class → list of `class/number`."""
    base = root / "food-101"
    path = base / "meta" / f"{split}.json"
    try:
        table = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise missing_file(path) from error
    classes = sorted(table)
    pairs = [(base / "images" / f"{name}.jpg", n) for n, c in enumerate(classes) for name in table[c]]
    names = [name.replace("_", " ") for name in classes]
    return _listing([path for path, _ in pairs], [label for _, label in pairs], names)


def read_sun397(root: Path, split: str) -> Listing:
    """Read `SUN397/ClassName.txt` and the official `Training_01.txt` / `Testing_01.txt`.

    The lists come in `Partitions.zip` of the data set's page and may lie in `SUN397/`,
    `SUN397/Partitions/` or `Partitions/`. Each has 50 pictures per class; of the ten such pairs, papers use
    the first.
    """
    base = root / "SUN397"
    classes = read_lines(base / "ClassName.txt")  # "/a/abbey"
    name = {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
    places = [base / name, base / "Partitions" / name, root / "Partitions" / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise EvaluateError(
            f"{base} lacks the official split {name}; without it the score cannot be compared",
            remedy=f"unpack Partitions.zip of the SUN397 page into {base / 'Partitions'}",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    files = read_lines(path)  # "/a/abbey/sun_aaalbzqrimafwbiv.jpg"
    labels = [numbers[file.rpartition("/")[0]] for file in files]
    return _listing([base / file.lstrip("/") for file in files], labels, [_sun_name(c) for c in classes])


def _sun_name(folder: str) -> str:
    return folder[3:].replace("_", " ").replace("/", " ")


def read_flowers102(root: Path, split: str) -> Listing:
    """Read `flowers-102/{imagelabels,setid}.mat` and `jpg/image_00001.jpg`."""
    base = root / "flowers-102"
    labels = _numbers(read_mat(base / "imagelabels.mat")["labels"])
    part = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    numbers = _numbers(read_mat(base / "setid.mat")[part])
    return _listing(
        [base / "jpg" / f"image_{number:05d}.jpg" for number in numbers],
        [labels[number - 1] - 1 for number in numbers],
    )


def _numbers(value: Value) -> list[int]:
    assert isinstance(value, np.ndarray)
    return [int(number) for number in value.tolist()]


def read_cars(root: Path, split: str) -> Listing:
    """Read `stanford_cars/`: `cars_test_annos_withlabels.mat`, `devkit/`, `cars_train/`, `cars_test/`."""
    base = root / "stanford_cars"
    names = read_mat(base / "devkit" / "cars_meta.mat")["class_names"]
    where = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}[split]
    annotations = read_mat(base / where)["annotations"]
    assert isinstance(annotations, dict)
    return _listing(
        [base / f"cars_{split}" / str(name) for name in annotations["fname"]],
        [to_int(number) - 1 for number in annotations["class"]],
        [str(name) for name in names],
    )


def read_aircraft(root: Path, split: str) -> Listing:
    """Read `fgvc-aircraft-2013b/data/images_variant_{train,val,test}.txt`: lines `number class name`."""
    base = root / "fgvc-aircraft-2013b" / "data"
    classes = read_lines(base / "variants.txt")
    rows = [line.split(" ", 1) for line in read_lines(base / f"images_variant_{split}.txt")]
    labels = [classes.index(name) for _, name in rows]
    return _listing([base / "images" / f"{number}.jpg" for number, _ in rows], labels, classes)


def read_dtd(root: Path, split: str) -> Listing:
    """Read `dtd/dtd/labels/{train,val,test}1.txt`, the first of ten partitions: lines `class/file`."""
    base = root / "dtd" / "dtd" if (root / "dtd" / "dtd").is_dir() else root / "dtd"
    classes = class_folders(base / "images")
    files = read_lines(base / "labels" / f"{split}1.txt")
    labels = [classes.index(file.partition("/")[0]) for file in files]
    return _listing([base / "images" / file for file in files], labels)


def read_gtsrb(root: Path, split: str) -> Listing:
    """Read `gtsrb/`: `GTSRB/Training/00000/*.ppm`, or `GTSRB/Final_Test/Images/` with `GT-final_test.csv`."""
    base = root / "gtsrb"
    if split == "train":
        folder = base / "GTSRB" / "Training"
        return list_classes(folder, tuple(class_folders(folder)))
    path = base / "GT-final_test.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
    except OSError as error:
        raise missing_file(path) from error
    folder = base / "GTSRB" / "Final_Test" / "Images"
    return _listing([folder / row["Filename"] for row in rows], [int(row["ClassId"]) for row in rows])
