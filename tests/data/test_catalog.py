"""One door: known sets, folders, shards, lists and images, and what is said of what is not there."""

import csv
import io
import json
import tarfile
from pathlib import Path

import fsspec
import pytest
from torchvision import datasets

from declip_cli.assets import asset_path
from declip_cli.data.benchmarks.folders import hashed_split
from declip_cli.data.benchmarks.known import known_sets, list_known, resolve_data_root
from declip_cli.data.benchmarks.torchvision_sets import download
from declip_cli.data.catalog import (
    classified,
    evaluation_split,
    has_captions,
    open_dataset,
    splits_of,
)
from declip_cli.data.dataset import Dataset
from declip_cli.data.files_dataset import Subset, open_list
from declip_cli.errors import DataError
from tests import set_layouts
from tests.data_sets import demo_metadata


def names_of(opened: Dataset) -> list[str]:
    return [Path(opened.key(number)).name for number in range(len(opened))]


def captions_of(opened: Dataset) -> list[tuple[str, ...]]:
    return [opened.captions(number) for number in range(len(opened))]


@pytest.fixture
def photos(tmp_path: Path, make_image) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(("b.jpg", "a.PNG", "sub/c.webp", ".hidden.jpg", "notes.md")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_image(number))
    return folder


def test_a_folder_is_read_with_its_subfolders(photos: Path, make_image):
    opened = open_dataset(str(photos))
    assert names_of(opened) == ["a.PNG", "b.jpg", "c.webp"]
    example = opened.read(1)
    assert (example.key, example.image, example.captions) == (str(photos / "b.jpg"), make_image(0), ())
    with pytest.raises(IndexError):
        opened.read(3)


def test_stamp_and_fingerprint_change_with_the_file(photos: Path, make_image):
    before = open_dataset(str(photos))
    facts = before.stamp(1), before.fingerprint
    (photos / "b.jpg").write_bytes(make_image(9, width=50))
    after = open_dataset(str(photos))
    assert after.stamp(1) != facts[0]
    assert after.fingerprint != facts[1]


def test_captions_stand_in_a_list_and_what_it_says_wrong_is_counted(photos: Path):
    lines = [
        {"file": "sub/c.webp", "captions": ["first", " second "]},
        {"file": "b.jpg", "caption": "  "},
        {"file": "gone.jpg", "caption": "x"},
    ]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    opened = open_dataset(str(photos))
    assert [opened.captions(0), opened.captions(2)] == [(), ("first", "second")]
    with pytest.raises(DataError) as error:
        opened.captions(1)
    assert error.value.cause == "empty caption"
    assert opened.read(1).captions == ()
    assert opened.skipped == {"missing file": (1, "gone.jpg"), "damaged line": (1, "captions.jsonl:4")}


def test_captions_stand_beside_the_images(photos: Path):
    (photos / "b.txt").write_text("a bus")
    (photos / "sub" / "c.json").write_text('{"captions": ["c", "see"]}')
    assert captions_of(open_dataset(str(photos))) == [(), ("a bus",), ("c", "see")]


def test_a_list_of_paths_is_taken_once_and_what_is_missing_is_counted(photos: Path):
    lines = [f"{photos}/b.jpg\n", f"{photos}/gone.jpg\n", "\n", f"{photos}/b.jpg\n", f"{photos}/sub\n"]
    opened = open_list(lines)
    assert names_of(opened) == ["b.jpg"]
    assert opened.skipped == {"missing file": (1, f"{photos}/gone.jpg"), "folder": (1, f"{photos}/sub")}
    with pytest.raises(DataError, match="none of the 1 paths in the list is an image .*missing file: 1, first nope"):
        open_list(["nope.jpg\n"])


def test_a_single_image_is_a_data_set_too(photos: Path):
    assert names_of(open_dataset(str(photos / "b.jpg"))) == ["b.jpg"]


def test_a_folder_in_a_store_is_read_as_one_on_the_disk(photos: Path, make_image):
    store = fsspec.filesystem("memory")
    store.put(str(photos), "/door/photos", recursive=True)
    try:
        opened = open_dataset("memory://door/photos")
        assert names_of(opened) == ["a.PNG", "b.jpg", "c.webp"]
        assert opened.key(1) == "memory://door/photos/b.jpg"
        assert opened.read(1).image == make_image(0)
        assert opened.stamp(1) == open_dataset("memory://door/photos").stamp(1) != ""
    finally:
        store.rm("/door", recursive=True)


def test_shards_give_keys_and_captions(tmp_path: Path, make_image):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key in ("x", "y"):
            for name, data in ((f"{key}.jpg", make_image(1)), (f"{key}.txt", key.encode() * 3)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    opened = open_dataset(str(tmp_path))
    assert [opened.key(0), opened.key(1)] == ["x", "y"]
    assert captions_of(opened) == [("xxx",), ("yyy",)]
    assert opened.read(1).image == make_image(1)
    assert splits_of(str(tmp_path)) == ()


def test_a_folder_of_shards_goes_before_a_known_set_of_its_name(tmp_path: Path, make_image, monkeypatch):
    (tmp_path / "coco").mkdir()
    with tarfile.open(tmp_path / "coco" / "0.tar", "w") as tar:
        for name, data in (("x.jpg", make_image(1)), ("x.txt", b"words")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    assert open_dataset(("coco",), "train").captions(0) == ("words",)


def test_subfolders_are_classes(tmp_path: Path):
    set_layouts.put_classes(tmp_path, ["red_panda", "cat"], 2)
    set_layouts.put_image(tmp_path / "cat" / "deeper" / "c.webp")
    set_layouts.put_image(tmp_path / "beside.jpg")
    (tmp_path / ".hidden").mkdir()
    opened = open_dataset(str(tmp_path))
    assert opened.labels == [-1, 0, 0, 0, 1, 1]
    within = classified(opened)
    assert within.classes is not None
    assert within.classes.names == ("cat", "red panda")
    assert (within.classes.templates, within.classes.metric) == ((), "accuracy")
    assert names_of(within) == ["cat_0.jpg", "cat_1.jpg", "c.webp", "red_panda_0.jpg", "red_panda_1.jpg"]
    assert within.read(3).label == within.labels[3] == 1
    assert (evaluation_split(str(tmp_path)), has_captions(opened)) == (None, False)


def test_split_folders_are_found_by_their_usual_names(tmp_path: Path):
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        set_layouts.put_classes(tmp_path / split, ["a", "b"], count)
    assert set(splits_of(str(tmp_path))) == {"train", "val", "test"}
    assert evaluation_split(str(tmp_path)) == "test"
    assert [len(open_dataset(str(tmp_path), split)) for split in ("train", "val", "test", None)] == [6, 4, 2, 12]
    assert open_dataset(str(tmp_path)).classes is None


def test_a_class_called_train_is_a_class_when_others_stand_beside_it(tmp_path: Path):
    set_layouts.put_classes(tmp_path, ["train", "bus"], 1)
    classes = open_dataset(str(tmp_path)).classes
    assert classes is not None
    assert classes.names == ("bus", "train")


def test_a_missing_split_is_named(tmp_path: Path):
    set_layouts.put_classes(tmp_path / "train", ["a", "b"], 1)
    with pytest.raises(DataError, match="has no split 'test', only train"):
        open_dataset(str(tmp_path), "test")
    with pytest.raises(DataError, match="cifar10 has no split 'val', only train, test"):
        open_dataset("cifar10", "val", data_root=tmp_path)


def test_class_names_come_from_a_file_in_order_or_by_folder(tmp_path: Path):
    set_layouts.put_classes(tmp_path / "data", ["n_2", "n_1"], 1)
    opened, names = open_dataset(str(tmp_path / "data")), tmp_path / "names.txt"
    for text in ("tench\ngoldfish\n", "n_2\tgoldfish\nn_1\ttench\nn_3\tnot there\n"):
        names.write_text(text)
        renamed = classified(opened, names).classes
        assert renamed is not None
        assert renamed.names == ("tench", "goldfish")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ntwo\nthree\n", "names 3 classes, .* has 2"),
        ("n01\ttench\n", "names no class for 'n02'"),
        ("same\nsame\n", "have the same name 'same'"),
        ("\n", "names 0 classes"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str):
    set_layouts.put_classes(tmp_path / "data", ["n02", "n01"], 1)
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        classified(open_dataset(str(tmp_path / "data")), tmp_path / "names.txt")


def test_what_has_no_classes_says_what_to_do(tmp_path: Path, make_image):
    with pytest.raises(DataError, match="there is no image in"):
        open_dataset(str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(make_image(0))
    with pytest.raises(DataError, match="has no subfolders"):
        classified(open_dataset(str(tmp_path)))
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="hold no images"):
        classified(open_dataset(str(tmp_path)))
    (tmp_path / "captions.jsonl").write_text('{"file": "a.jpg", "caption": "a"}')
    with pytest.raises(DataError, match="captions and no classes") as error:
        classified(open_dataset(str(tmp_path)))
    assert "declip retrieve" in error.value.remedy


def test_an_unknown_name_gets_a_suggestion():
    for ask in (open_dataset, splits_of):
        with pytest.raises(DataError, match="no data set, folder or shard named 'cifar-10'") as error:
            ask("cifar-10")
        assert "did you mean cifar10?" in error.value.remedy


def test_nothing_and_mixed_data_are_errors():
    with pytest.raises(DataError, match="no data given"):
        open_dataset([])
    with pytest.raises(DataError, match="demo cannot be joined with other data"):
        open_dataset(["demo", "shards"])


def test_a_set_that_is_not_there_says_which_files_to_put_where(tmp_path: Path):
    for name, can_download in (("pets", True), ("cars", False), ("coco", False)):
        with pytest.raises(DataError, match=f"{name} is not there: expected {tmp_path}") as error:
            open_dataset(name, data_root=tmp_path)
        assert str(tmp_path) in error.value.remedy
        assert ("--download" in error.value.remedy) == can_download
    assert "dataset_coco.json" in error.value.remedy


def test_torchvision_has_the_classes_that_the_table_names():
    names = [known.torchvision for known in known_sets().values() if known.torchvision]
    assert all(issubclass(getattr(datasets, name), datasets.VisionDataset) for name in names)


def test_a_set_may_lie_in_a_folder_of_its_own_name(tmp_path: Path):
    set_layouts.mnist(tmp_path / "mnist")
    assert len(open_dataset("mnist", data_root=tmp_path)) == 3


def test_the_data_root_is_the_option_else_the_variable_else_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve_data_root(None) == Path("data")
    monkeypatch.setenv("DECLIP_DATA", str(tmp_path))
    assert resolve_data_root(None) == tmp_path
    assert resolve_data_root(tmp_path / "..") == tmp_path / ".."
    with pytest.raises(DataError, match="is not a folder"):
        resolve_data_root(tmp_path / "missing")


def test_the_list_says_what_is_there(tmp_path: Path):
    set_layouts.mnist(tmp_path)
    entries = {entry["name"]: entry for entry in list_known(tmp_path)}
    assert entries["mnist"]["is_there"]
    assert (entries["demo"]["is_there"], entries["demo"]["num_classes"]) == (True, 1217)
    assert not entries["imagenet"]["is_there"]
    assert entries["imagenet"]["expected"] == str(tmp_path / "imagenet" / "val")
    assert entries["pets"]["metric"] == "mean_per_class"
    assert (entries["coco"]["task"], entries["imagenetv2"]["task"]) == ("retrieval", "zero-shot")


def test_download_calls_torchvision_and_words_its_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, dict[str, object]]] = []

    def fail(root: str, **arguments: object) -> None:
        calls.append((root, arguments))
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(datasets, "DTD", fail)
    with pytest.raises(DataError, match="download of dtd failed: File not found") as error:
        download("dtd", data_root=tmp_path / "new")
    assert calls == [(str(tmp_path / "new"), {"download": True, "split": "train"})]
    assert "dtd-r1.0.1.tar.gz" in error.value.remedy
    for kind in ("GTSRB", "EuroSAT"):
        monkeypatch.setattr(datasets, kind, lambda root, **arguments: calls.append((root, arguments)))
    assert download("gtsrb", data_root=tmp_path) == f"{tmp_path}/"
    download("eurosat", data_root=tmp_path)
    assert [arguments.get("split") for _, arguments in calls[1:]] == ["train", "test", None]


def test_sets_without_a_download_say_where_they_come_from(tmp_path: Path):
    with pytest.raises(DataError, match="no download that works") as error:
        download("cars", data_root=tmp_path)
    assert "cars_test_annos_withlabels.mat" in error.value.remedy
    with pytest.raises(DataError, match="not a known data set"):
        download("nothing", data_root=tmp_path)
    assert download("demo") == "built in"


def test_hashed_splits_are_disjoint_and_whole():
    names = [f"class/{n}.jpg" for n in range(20)]
    dealt = hashed_split(names, {"train": 5, "test": -1})
    assert len(dealt["train"]) == 5
    assert sorted(dealt["train"] + dealt["test"]) == sorted(names)
    assert hashed_split(names[::-1], {"train": 5, "test": -1})["train"] == dealt["train"][::-1]


def test_the_demo_tests_on_a_vendor_that_it_never_trains_on():
    opened = {split: open_dataset("demo", split) for split in splits_of("demo")}
    assert {split: len(found) for split, found in opened.items()} == {
        "train": 3034, "fit": 1817, "validation": 1217, "test": 1217,
    }  # fmt: skip
    keys = {split: [found.key(number) for number in range(len(found))] for split, found in opened.items()}
    assert {key.partition("/")[0] for key in keys["test"]} == {"twitter"}
    assert {key.partition("/")[0] for key in keys["train"]} == {"google", "emojione2", "openclipart"}
    assert sorted(keys["fit"] + keys["validation"]) == sorted(keys["train"])
    assert len({found.fingerprint for found in opened.values()}) == 4
    classes = opened["test"].classes
    assert classes is not None
    assert len(classes.names) == 1217
    assert classes.templates == ("{}",)
    assert open_dataset("demo").split == "test"


def test_the_demos_table_of_classes_says_what_its_shards_say():
    with (asset_path("demo/classes.tsv")).open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = list(demo_metadata())
    assert {row["key"]: (row["name"], row["category"]) for row in table} == {
        row["key"]: (row["name"], row["category"]) for row in rows
    }
    assert all(row["licence"] and row["key"].startswith(f"{row['vendor']}/") for row in rows)
    assert len(table) == len(rows) == 4251


def test_no_emoji_is_in_two_splits_of_the_categories():
    opened = [open_dataset("demo-categories", split) for split in ("train", "val", "test")]
    names = [{found.captions(number) for number in range(len(found))} for found in opened]
    assert not names[0] & names[1]
    assert not (names[0] | names[1]) & names[2]
    assert [len(found) for found in opened] == [1000, 438, 498]
    assert len({found.classes for found in opened}) == 1
    assert not {found.key(0).partition("/")[0] for found in opened[:2]} & {"twitter", "openclipart"}


def test_a_part_of_a_data_set_reads_as_the_whole_does(photos: Path):
    (photos / "b.txt").write_text("a bus")
    whole = open_dataset(str(photos))
    part = Subset(whole, [2, 1], labels=[0, 1])
    assert [part.read(n).image for n in (0, 1)] == [whole.read(n).image for n in (2, 1)]
    assert (part.key(1), part.captions(1), part.stamp(1)) == (whole.key(1), ("a bus",), whole.stamp(1))
    assert [part.read(n).label for n in (0, 1)] == [0, 1]
    assert part.fingerprint not in (whole.fingerprint, Subset(whole, [1, 2]).fingerprint)
    with pytest.raises(IndexError):
        part.key(2)
