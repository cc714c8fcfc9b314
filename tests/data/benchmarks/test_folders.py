"""The user's own folders, the demo, and what is said about sets that are not there."""

from pathlib import Path

import pytest
from torchvision import datasets

from declip_cli.data.benchmarks import available_splits, open_classification
from declip_cli.data.benchmarks.base import resolve_data_root
from declip_cli.data.benchmarks.folders import hashed_split
from declip_cli.data.benchmarks.known import KNOWN
from declip_cli.data.benchmarks.registry import download, list_known
from declip_cli.errors import EvaluateError
from tests import set_layouts


def test_a_folder_is_read_with_one_class_per_subfolder(tmp_path: Path):
    set_layouts.put_classes(tmp_path, ["red_panda", "cat"], 2)
    set_layouts.put_picture(tmp_path / "cat" / "deeper" / "c.webp")
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden").mkdir()
    opened = open_classification(str(tmp_path))
    assert opened.class_names == ("cat", "red panda")
    assert list(opened.labels) == [0, 0, 0, 1, 1]
    assert [Path(key).name for key, _ in opened.pictures] == [
        "cat_0.jpg", "cat_1.jpg", "c.webp", "red_panda_0.jpg", "red_panda_1.jpg",
    ]  # fmt: skip
    assert (opened.split, opened.templates, opened.metric) == ("", (), "accuracy")
    assert available_splits(str(tmp_path)) == ()


def test_split_folders_are_found_by_their_usual_names(tmp_path: Path):
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        set_layouts.put_classes(tmp_path / split, ["a", "b"], count)
    assert set(available_splits(str(tmp_path))) == {"train", "val", "test"}
    sizes = [len(open_classification(str(tmp_path), split=split)) for split in ("train", "val", "test")]
    assert sizes == [6, 4, 2]


def test_a_class_called_train_is_a_class_when_others_stand_beside_it(tmp_path: Path):
    set_layouts.put_classes(tmp_path, ["train", "bus"], 1)
    assert open_classification(str(tmp_path)).class_names == ("bus", "train")


def test_a_missing_split_is_named(tmp_path: Path):
    set_layouts.put_classes(tmp_path / "train", ["a", "b"], 1)
    with pytest.raises(EvaluateError, match="has no split 'test', only train"):
        open_classification(str(tmp_path))
    with pytest.raises(EvaluateError, match="cifar10 has no split 'val', only train, test"):
        open_classification("cifar10", data_root=tmp_path, split="val")


def test_class_names_come_from_a_file_in_order_or_by_folder(tmp_path: Path):
    set_layouts.put_classes(tmp_path / "data", ["n02", "n01"], 1)
    names = tmp_path / "names.txt"
    names.write_text("tench\ngoldfish\n")
    assert open_classification(str(tmp_path / "data"), classes_file=names).class_names == ("tench", "goldfish")
    names.write_text("n02\tgoldfish\nn01\ttench\nn03\tnot there\n")
    assert open_classification(str(tmp_path / "data"), classes_file=names).class_names == ("tench", "goldfish")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ntwo\nthree\n", "names 3 classes, .* has 2 class folders"),
        ("n01\ttench\n", "names no class for the folder 'n02'"),
        ("same\nsame\n", "have the same name 'same'"),
        ("\n", "names no classes"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str):
    set_layouts.put_classes(tmp_path / "data", ["n02", "n01"], 1)
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(EvaluateError, match=message):
        open_classification(str(tmp_path / "data"), classes_file=tmp_path / "names.txt")


def test_a_known_set_can_take_other_class_names(tmp_path: Path):
    set_layouts.cifar10(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {n}\n" for n in range(10)))
    opened = open_classification("cifar10", data_root=tmp_path, classes_file=names)
    assert opened.class_names[3] == "thing 3"
    names.write_text("thing\n")
    with pytest.raises(EvaluateError, match="names 1 classes, cifar10 has 10"):
        open_classification("cifar10", data_root=tmp_path, classes_file=names)


def test_a_folder_without_classes_or_pictures_says_what_to_do(tmp_path: Path):
    with pytest.raises(EvaluateError, match="has no subfolders"):
        open_classification(str(tmp_path))
    (tmp_path / "captions.jsonl").write_text("{}")
    with pytest.raises(EvaluateError) as error:
        open_classification(str(tmp_path))
    assert "declip retrieve" in error.value.remedy
    (tmp_path / "cat").mkdir()
    with pytest.raises(EvaluateError, match="hold no pictures"):
        open_classification(str(tmp_path))


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(EvaluateError, match="no data set or folder named 'cifar-10'") as error:
        open_classification("cifar-10")
    assert "did you mean cifar10?" in error.value.remedy


def test_the_demo_tests_on_a_vendor_that_it_never_trains_on():
    test = open_classification("demo")
    assert len(test) == len(test.class_names) == 1217
    assert test.templates == ("{}",)
    assert all("twitter" in key for key, _ in test.pictures)
    for split in ("train", "val"):
        assert not any("twitter" in key for key, _ in open_classification("demo", split=split).pictures)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_set_that_is_not_there_says_which_files_to_put_where(name: str, tmp_path: Path):
    with pytest.raises(EvaluateError, match=f"{name} is not there: expected {tmp_path}") as error:
        open_classification(name, data_root=tmp_path)
    assert KNOWN[name].wants in error.value.remedy
    assert ("--download" in error.value.remedy) == bool(KNOWN[name].torchvision_name)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_torchvision_has_the_classes_that_are_said_to_download(name: str):
    kind = KNOWN[name].torchvision_name
    assert not kind or hasattr(datasets, kind)


def test_a_set_may_lie_in_a_folder_of_its_own_name(tmp_path: Path):
    set_layouts.cifar10(tmp_path / "cifar10")
    assert len(open_classification("cifar10", data_root=tmp_path)) == 3


def test_the_data_root_is_the_option_else_the_variable_else_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve_data_root(None) == Path("data")
    monkeypatch.setenv("DECLIP_DATA", str(tmp_path))
    assert resolve_data_root(None) == tmp_path
    assert resolve_data_root(tmp_path / "..") == tmp_path / ".."
    with pytest.raises(EvaluateError, match="is not a folder"):
        resolve_data_root(tmp_path / "missing")


def test_the_list_says_what_is_there(tmp_path: Path):
    set_layouts.mnist(tmp_path)
    listed = {entry.name: entry for entry in list_known(tmp_path)}
    assert listed["mnist"].is_there
    assert listed["demo"].is_there
    assert not listed["imagenet"].is_there
    assert listed["imagenet"].expected == str(tmp_path / "imagenet" / "val")
    assert listed["pets"].metric == "mean_per_class"


def test_download_calls_torchvision_and_words_its_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fail(root: str, **arguments: object) -> None:
        calls.append((root, arguments))
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(datasets, "DTD", fail)
    with pytest.raises(EvaluateError, match="download of dtd failed: File not found") as error:
        download("dtd", data_root=tmp_path / "new")
    assert calls == [(str(tmp_path / "new"), {"download": True})]
    assert "dtd-r1.0.1.tar.gz" in error.value.remedy
    monkeypatch.setattr(datasets, "GTSRB", lambda root, **arguments: calls.append((root, arguments)))
    assert download("gtsrb", data_root=tmp_path) == tmp_path
    assert [arguments["split"] for _, arguments in calls[1:]] == ["train", "test"]


def test_sets_without_a_download_say_where_they_come_from(tmp_path: Path):
    with pytest.raises(EvaluateError, match="no download that works") as error:
        download("cars", data_root=tmp_path)
    assert "cars_test_annos_withlabels.mat" in error.value.remedy
    with pytest.raises(EvaluateError, match="not a known data set"):
        download("nothing", data_root=tmp_path)


def test_hashed_splits_are_disjoint_and_whole():
    names = [f"class/{n}.jpg" for n in range(20)]
    dealt = hashed_split(names, {"train": 5, "test": -1})
    assert len(dealt["train"]) == 5
    assert sorted(dealt["train"] + dealt["test"]) == sorted(names)
    assert hashed_split(names[::-1], {"train": 5, "test": -1})["train"] == dealt["train"][::-1]
