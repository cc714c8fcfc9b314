"""Every known set, read from a miniature of its real layout; the labels are those that torchvision reads."""

import importlib.util
import inspect
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from declip_cli.data.benchmarks import available_splits, open_classification
from declip_cli.data.benchmarks.imagenet import subset_labels, wordnet_ids
from declip_cli.data.benchmarks.known import KNOWN
from declip_cli.errors import EvaluateError
from tests import set_layouts

LISTED = [
    "pets", "food101", "sun397", "flowers102", "cars", "aircraft", "dtd", "gtsrb", "country211", "sst2",
    "cifar10", "cifar100", "stl10", "mnist", "imagenet", "imagenetv2", "objectnet",
]  # fmt: skip
"""Sets whose miniature says which pictures and labels to expect, in order."""


def read(name: str, root: Path, split: str = "test") -> list[tuple[str, int]]:
    opened = open_classification(name, data_root=root, split=split)
    assert len(opened.class_names) == KNOWN[name].num_classes
    assert opened.metric == KNOWN[name].metric
    assert all("{}" in template for template in opened.templates)
    return [(key, label) for (key, _), label in zip(opened.pictures, opened.labels, strict=True)]


@pytest.mark.parametrize("name", LISTED)
def test_test_split_has_the_pictures_and_labels_of_the_layout(name: str, tmp_path: Path):
    expected = getattr(set_layouts, name)(tmp_path)
    found = read(name, tmp_path)
    assert [label for _, label in found] == [label for _, label in expected]
    for (key, _), (end, _) in zip(found, expected, strict=True):
        assert key.endswith(end)


@pytest.mark.parametrize("name", [*LISTED, "caltech101", "eurosat", "resisc45"])
def test_every_picture_of_every_split_can_be_read(name: str, tmp_path: Path):
    getattr(set_layouts, name)(tmp_path)
    for split in available_splits(name):
        if name == "eurosat" and split != "test":
            continue  # the miniature has too few pictures for three splits
        opened = open_classification(name, data_root=tmp_path, split=split)
        assert len(opened) == len(opened.pictures) > 0
        for _, load in opened.pictures:
            pixels = cv2.imdecode(np.frombuffer(load(), np.uint8), cv2.IMREAD_COLOR)
            assert pixels is not None


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("pets", lambda root: datasets.OxfordIIITPet(root, split="test")),
        ("food101", lambda root: datasets.Food101(root, split="test")),
        ("cars", lambda root: datasets.StanfordCars(root, split="test")),
        ("aircraft", lambda root: datasets.FGVCAircraft(root, split="test")),
        ("dtd", lambda root: datasets.DTD(root, split="test")),
        ("gtsrb", lambda root: datasets.GTSRB(root, split="test")),
        ("gtsrb train", lambda root: datasets.GTSRB(root, split="train")),
        ("country211", lambda root: datasets.Country211(root, split="test")),
        ("sst2", lambda root: datasets.RenderedSST2(root, split="test")),
        ("mnist", lambda root: datasets.MNIST(root, train=False)),
    ],
)
def test_pixels_and_labels_equal_those_of_torchvision(
    name: str, build: Callable[[Path], datasets.VisionDataset], tmp_path: Path
):
    name, _, split = name.partition(" ")
    getattr(set_layouts, name)(tmp_path)
    peer = make_peer(build, tmp_path)
    opened = open_classification(name, data_root=tmp_path, split=split or "test")
    assert len(opened) == len(peer)
    for (_, load), label, (picture, peer_label) in zip(opened.pictures, opened.labels, peer, strict=True):
        pixels = cv2.imdecode(np.frombuffer(load(), np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.abs(pixels.astype(int) - np.asarray(picture.convert("RGB"))).max() <= 3  # two JPEG decoders
        assert label == peer_label


def make_peer(build: Callable[[Path], datasets.VisionDataset], root: Path) -> list[tuple[object, int]]:
    peer = build(root)
    return [peer[number] for number in range(len(peer))]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "flowers102"])
def test_pixels_and_labels_equal_torchvision_past_its_checksums(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    getattr(set_layouts, name)(tmp_path)
    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "flowers102": "Flowers102"}[name]
    peer_type = getattr(datasets, kind)
    module = inspect.getmodule(peer_type)
    monkeypatch.setattr(module, "check_integrity", lambda *_, **__: True)
    if hasattr(peer_type, "_check_integrity"):
        monkeypatch.setattr(peer_type, "_check_integrity", lambda _: True)
    if hasattr(peer_type, "_load_meta"):
        monkeypatch.setattr(peer_type, "_load_meta", lambda _: None)
    arguments = {"train": False} if name.startswith("cifar") else {"split": "test"}
    peer = make_peer(lambda root: peer_type(root, **arguments), tmp_path)
    opened = open_classification(name, data_root=tmp_path)
    assert opened.labels == [label for _, label in peer]
    for (_, load), (picture, _) in zip(opened.pictures, peer, strict=True):
        pixels = cv2.imdecode(np.frombuffer(load(), np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.abs(pixels.astype(int) - np.asarray(picture)).max() <= 3


@pytest.mark.parametrize("name", ["food101", "dtd", "resisc45", "gtsrb train", "sst2"])
def test_a_class_is_called_as_its_folder(name: str, tmp_path: Path):
    name, _, split = name.partition(" ")
    getattr(set_layouts, name)(tmp_path)
    opened = open_classification(name, data_root=tmp_path, split=split or "test")
    for (key, _), label in zip(opened.pictures, opened.labels, strict=True):
        folder = Path(key).parent.name
        assert label == int(folder) if name == "gtsrb" else opened.class_names[label] == folder.replace("_", " ")


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
    assert "own split" in open_classification("caltech101", data_root=tmp_path).note


def test_own_splits_do_not_depend_on_where_the_set_lies(tmp_path: Path):
    set_layouts.resisc45(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (
        {
            split: [Path(key).name for key, _ in read("resisc45", tmp_path / r, split)]
            for split in KNOWN["resisc45"].splits
        }
        for r in ("a", "b")
    )
    assert first == second
    assert [len(first[split]) for split in ("train", "val", "test")] == [140, 140, 20]
    assert len({name for names in first.values() for name in names}) == 300


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_relatives_of_imagenet_tell_apart_only_their_own_classes(name: str, tmp_path: Path):
    labels = subset_labels(name)
    assert len(labels) == 200
    for label in labels:
        (tmp_path / name / wordnet_ids()[label]).mkdir(parents=True)
    set_layouts.put_picture(tmp_path / name / wordnet_ids()[labels[7]] / "0.1_x.jpg")
    (tmp_path / name / "README.txt").write_text("as distributed")
    opened = open_classification(name, data_root=tmp_path)
    assert opened.labels == [7]
    names = json.loads((Path(__file__).parents[3] / "assets" / "class_names.json").read_text())["imagenet"]
    assert opened.class_names == tuple(names[label] for label in labels)


def test_subsets_of_imagenet_are_those_that_timm_lists():
    found = importlib.util.find_spec("timm")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "data" / "_info"
    assert (folder / "imagenet_synsets.txt").read_text().split() == list(wordnet_ids())
    for name in ("a", "r"):
        listed = (folder / f"imagenet_{name}_indices.txt").read_text().split()
        assert list(map(int, listed)) == list(subset_labels(f"imagenet-{name}"))


def test_imagenet_validation_as_packed_takes_its_labels_from_the_development_kit(tmp_path: Path):
    base = tmp_path / "imagenet"
    for number in (1, 2, 3):
        set_layouts.put_picture(base / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
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
        set_layouts.put_picture(folder / f"ILSVRC2012_val_{number:08d}.JPEG")
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
    set_layouts.put_picture(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(EvaluateError, match="labels are missing") as error:
        open_classification("imagenet", data_root=tmp_path)
    assert "ILSVRC2012_devkit_t12" in error.value.remedy


def test_a_missing_class_folder_is_an_error(tmp_path: Path):
    set_layouts.sketch(tmp_path)
    (tmp_path / "sketch" / wordnet_ids()[0]).rmdir()
    with pytest.raises(EvaluateError, match="lacks 1 of 1000 class folders"):
        open_classification("imagenet-sketch", data_root=tmp_path)


def test_sun397_without_the_official_split_says_where_it_belongs(tmp_path: Path):
    set_layouts.sun397(tmp_path)
    shutil.rmtree(tmp_path / "SUN397" / "Partitions")
    with pytest.raises(EvaluateError, match="Testing_01.txt") as error:
        open_classification("sun397", data_root=tmp_path)
    assert "Partitions.zip" in error.value.remedy


def test_cifar_files_cannot_run_code(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    import pickle

    set_layouts.cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(EvaluateError, match="wants to run builtins.print"):
        open_classification("cifar10", data_root=tmp_path)


def test_pcam_needs_h5py_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "pcam").mkdir()
    with pytest.raises(EvaluateError, match="h5py") as error:
        open_classification("pcam", data_root=tmp_path)
    assert error.value.remedy == "pip install 'declip[pcam]'"


def test_pcam_reads_pixels_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    files = {"x": pixels, "y": np.array([1, 0], dtype=np.uint8).reshape(2, 1, 1, 1)}
    opened_paths: list[str] = []

    def open_file(path: Path, mode: str) -> dict[str, np.ndarray]:
        opened_paths.append(path.name)
        return files

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=open_file))
    (tmp_path / "pcam").mkdir()
    opened = open_classification("pcam", data_root=tmp_path, split="val")
    assert opened_paths == [f"camelyonpatch_level_2_split_valid_{kind}.h5" for kind in "xy"]
    assert opened.labels == [1, 0]
    decoded = cv2.imdecode(np.frombuffer(opened.pictures[1][1](), np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(decoded, pixels[1])


def test_every_known_set_has_a_miniature():
    written = {name for name, value in vars(set_layouts).items() if inspect.isfunction(value)}
    without = set(KNOWN) - written - {"imagenet-a", "imagenet-r", "pcam"}
    assert without == {"imagenet-sketch"}  # whose miniature is called sketch
