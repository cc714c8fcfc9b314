"""Every known set, read from a miniature of its real layout."""

import importlib.util
import inspect
import json
import shutil
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from declip_cli.data.benchmarks.imagenet import wordnet_ids
from declip_cli.data.benchmarks.known import asset_lists, known_sets
from declip_cli.data.catalog import open_dataset, splits_of
from declip_cli.data.dataset import Dataset
from declip_cli.errors import DataError
from tests import set_layouts

LISTED = [
    "pets", "food101", "sun397", "flowers102", "cars", "aircraft", "dtd", "gtsrb", "country211", "sst2",
    "cifar10", "cifar100", "stl10", "mnist", "pcam", "imagenet", "imagenetv2", "objectnet",
]  # fmt: skip
"""Sets whose miniature says which images and labels to expect, in order."""


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read miniatures where it compares the digests of the real files."""
    for kind in (datasets.CIFAR10, datasets.STL10, datasets.Flowers102):
        monkeypatch.setattr(kind, "_check_integrity", lambda _: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda _: None)


def listed(opened: Dataset) -> list[tuple[str, int]]:
    return [(opened.key(number), opened.labels[number]) for number in range(len(opened))]


def read(name: str, root: Path, split: str = "test") -> list[tuple[str, int]]:
    return listed(open_dataset(name, split, data_root=root))


@pytest.mark.parametrize("name", [*LISTED, "caltech101", "eurosat", "resisc45"])
def test_a_set_has_the_images_and_labels_of_its_layout_and_all_can_be_read(name: str, tmp_path: Path):
    expected = getattr(set_layouts, name)(tmp_path)
    known = known_sets()[name]
    for split in splits_of(name) if name != "eurosat" else ("test",):  # of which the miniature has too few images
        opened = open_dataset(name, split, data_root=tmp_path)
        assert (opened.name, opened.split) == (name, split)
        assert opened.classes is not None
        assert len(opened.classes.names) == known.num_classes
        assert opened.classes.metric == known.metric
        assert all("{}" in template for template in opened.classes.templates)
        for number in range(len(opened)):
            example = opened.read(number)
            pixels = example.image
            if isinstance(pixels, bytes):
                pixels = cv2.imdecode(np.frombuffer(pixels, np.uint8), cv2.IMREAD_COLOR)
            assert pixels.shape[2] == 3
            assert (example.key, example.label) == (opened.key(number), opened.labels[number])
    if expected:
        found = read(name, tmp_path)
        assert [label for _, label in found] == [label for _, label in expected]
        assert all(key.endswith(end) for (key, _), (end, _) in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["food101", "dtd", "resisc45", "gtsrb train", "sst2"])
def test_a_class_is_called_as_its_folder(name: str, tmp_path: Path):
    name, _, split = name.partition(" ")
    getattr(set_layouts, name)(tmp_path)
    opened = open_dataset(name, split or "test", data_root=tmp_path)
    assert opened.classes is not None
    for key, label in listed(opened):
        folder = Path(key).parent.name
        assert label == int(folder) if name == "gtsrb" else opened.classes.names[label] == folder.replace("_", " ")


def test_pixels_are_handed_on_as_they_are(tmp_path: Path):
    set_layouts.pcam(tmp_path)
    set_layouts.mnist(tmp_path)
    with h5py.File(tmp_path / "pcam" / "camelyonpatch_level_2_split_valid_x.h5") as file:
        expected = np.asarray(file["x"])
    opened = open_dataset("pcam", "val", data_root=tmp_path)
    assert list(opened.labels) == [1, 0]
    np.testing.assert_array_equal(opened.read(1).image, expected[1])
    raw = np.fromfile(tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    gray = open_dataset("mnist", "test", data_root=tmp_path).read(2).image
    np.testing.assert_array_equal(gray, np.stack([raw[2]] * 3, axis=2))


def test_pixels_have_a_stamp_that_follows_their_file(tmp_path: Path):
    set_layouts.mnist(tmp_path)
    stamps = [open_dataset("mnist", "test", data_root=tmp_path).stamp(0) for _ in range(2)]
    assert stamps[0] == stamps[1]
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes() + b"0")
    assert open_dataset("mnist", "train", data_root=tmp_path).stamp(0) != stamps[0]


def test_all_five_batches_train_on_cifar10(tmp_path: Path):
    set_layouts.cifar10(tmp_path)
    assert [label for _, label in read("cifar10", tmp_path, "train")] == [
        label for seed in range(1, 6) for label in (seed, 9, 0)
    ]


def test_caltech101_trains_on_30_of_each_class_and_tests_on_the_others(tmp_path: Path):
    set_layouts.caltech101(tmp_path)
    train, test = (read("caltech101", tmp_path, split) for split in ("train", "test"))
    assert [label for _, label in train] == [0] * 30 + [1] * 30 + [2] * 30
    assert [label for _, label in test] == [0, 0, 1, 1, 2, 2]
    assert not {key for key, _ in train} & {key for key, _ in test}
    assert "own split" in open_dataset("caltech101", data_root=tmp_path).note


def test_own_splits_do_not_depend_on_where_the_set_lies(tmp_path: Path):
    set_layouts.resisc45(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (
        {split: [Path(key).name for key, _ in read("resisc45", tmp_path / r, split)] for split in splits_of("resisc45")}
        for r in ("a", "b")
    )
    assert first == second
    assert [len(first[split]) for split in ("train", "val", "test")] == [140, 140, 20]
    assert len({name for names in first.values() for name in names}) == 300


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_relatives_of_imagenet_tell_apart_only_their_own_classes(name: str, tmp_path: Path):
    labels = asset_lists("class_subsets.json")[name]
    assert len(labels) == 200
    for label in labels:
        (tmp_path / name / wordnet_ids()[label]).mkdir(parents=True)
    set_layouts.put_image(tmp_path / name / wordnet_ids()[labels[7]] / "0.1_x.jpg")
    (tmp_path / name / "README.txt").write_text("as distributed")
    opened = open_dataset(name, data_root=tmp_path)
    assert opened.labels == [7]
    names = json.loads((Path(__file__).parents[3] / "assets" / "class_names.json").read_text())["imagenet"]
    assert opened.classes is not None
    assert opened.classes.names == tuple(names[label] for label in labels)


def test_subsets_of_imagenet_are_those_that_timm_lists():
    found = importlib.util.find_spec("timm")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "data" / "_info"
    assert (folder / "imagenet_synsets.txt").read_text().split() == list(wordnet_ids())
    for name in ("a", "r"):
        numbers = (folder / f"imagenet_{name}_indices.txt").read_text().split()
        assert list(map(int, numbers)) == list(asset_lists("class_subsets.json")[f"imagenet-{name}"])


def test_imagenet_validation_as_packed_takes_its_labels_from_the_development_kit(tmp_path: Path):
    base = tmp_path / "imagenet"
    for number in (1, 2, 3):
        set_layouts.put_image(base / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    kit = base / "ILSVRC2012_devkit_t12" / "data"
    set_layouts.put_lines(kit / "ILSVRC2012_validation_ground_truth.txt", ["490", "1", "3"])
    rows = np.zeros((1000, 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_train_images", "O")])
    for number in range(1000):  # the kit numbers classes in an order of its own
        rows[number, 0] = (np.uint16(number + 1), wordnet_ids()[999 - number], np.uint16(1300))
    scipy.io.savemat(kit / "meta.mat", {"synsets": rows}, do_compression=True)
    assert [label for _, label in read("imagenet", tmp_path)] == [999 - 489, 999, 997]


def test_imagenet_as_kaggle_packs_it_takes_its_labels_from_the_table(tmp_path: Path):
    folder = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    for number in (7, 5):
        set_layouts.put_image(folder / f"ILSVRC2012_val_{number:08d}.JPEG")
    set_layouts.put_lines(
        tmp_path / "LOC_val_solution.csv",
        [
            "ImageId,PredictionString",
            f"ILSVRC2012_val_00000007,{wordnet_ids()[3]} 1 2 3 4 {wordnet_ids()[3]} 5 6 7 8",
            f"ILSVRC2012_val_00000005,{wordnet_ids()[990]} 1 2 3 4",
        ],
    )
    assert [label for _, label in read("imagenet", tmp_path)] == [990, 3]


def test_flat_imagenet_without_labels_says_what_is_missing(tmp_path: Path):
    set_layouts.put_image(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match="labels are missing") as error:
        open_dataset("imagenet", data_root=tmp_path)
    assert "ILSVRC2012_devkit_t12" in error.value.remedy


def test_a_missing_class_folder_is_an_error(tmp_path: Path):
    set_layouts.sketch(tmp_path)
    (tmp_path / "sketch" / wordnet_ids()[0]).rmdir()
    with pytest.raises(DataError, match="lacks 1 of 1000 class folders"):
        open_dataset("imagenet-sketch", data_root=tmp_path)


def test_sun397_without_the_official_split_says_where_it_belongs(tmp_path: Path):
    set_layouts.sun397(tmp_path)
    shutil.rmtree(tmp_path / "SUN397" / "Partitions")
    with pytest.raises(DataError, match="Testing_01.txt") as error:
        open_dataset("sun397", data_root=tmp_path)
    assert "Partitions.zip" in error.value.remedy


def test_damaged_files_are_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    set_layouts.cifar10(tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataError, match="cifar10 in .* is incomplete or damaged: .*corrupted") as error:
        open_dataset("cifar10", data_root=tmp_path)
    assert "cifar-10-python.tar.gz" in error.value.remedy


@pytest.mark.parametrize(("name", "package"), [("pcam", "h5py"), ("flowers102", "scipy"), ("cars", "scipy")])
def test_a_missing_package_is_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    getattr(set_layouts, name)(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(DataError, match=f"{name} needs the package {package}") as error:
        open_dataset(name, data_root=tmp_path)
    assert error.value.remedy == "pip install 'declip[eval]'"


def test_gray_and_transparent_files_stay_files(tmp_path: Path):
    set_layouts.sst2(tmp_path)
    path = tmp_path / "rendered-sst2" / "test" / "negative" / "negative_0.png"
    Image.new("LA", (4, 5), (10, 100)).save(path)
    assert open_dataset("sst2", data_root=tmp_path).read(0).image == path.read_bytes()


def test_every_known_set_has_a_miniature():
    written = {name for name, value in vars(set_layouts).items() if inspect.isfunction(value)}
    classified = {name for name, known in known_sets().items() if known.num_classes and known.markers}
    # the miniature of imagenet-sketch is called sketch; the two subsets are made in their own test
    assert classified - written == {"imagenet-sketch", "imagenet-a", "imagenet-r"}
