import fcntl
import hashlib
import io
import json
import shutil
import tarfile
import zlib

import fsspec
import numpy as np
import pytest
from PIL import Image

from declip_cli.data import storage
from declip_cli.data.catalog import open_dataset
from declip_cli.data.prepare import shard_writer
from declip_cli.data.prepare.config import CleanConfig, PrepareConfig
from declip_cli.data.prepare.pipeline import prepare
from declip_cli.data.prepare.state import OutFolder
from declip_cli.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def a_report_for_each_record(monkeypatch):
    monkeypatch.setattr("declip_cli.data.prepare.pipeline._REPORT_EVERY_S", -1.0)


def start(source, out, **options):
    return prepare(PrepareConfig(source=str(source), out=str(out), workers=1, **options))


def run(source, out, **options):
    *_, last = start(source, out, **options)
    return last


def interrupt(source, out, *, after, **options):
    """Start a run and stop it when it has read some records."""
    reports = start(source, out, **options)
    next(report for report in reports if report.num_read >= after)
    reports.close()


def write_pairs(folder, make_image, *, num):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num):
        (folder / f"{number}.jpg").write_bytes(make_image(number))
        lines.append(json.dumps({"file": f"{number}.jpg", "caption": f"image {number}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_are_tars_that_others_read(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=5)
    report = run(source, tmp_path / "out", shard_samples=2)
    assert report.to_json() | {"seconds": 0} == {
        "out": str(tmp_path / "out"),
        "kind": "captions",
        "num_read": 5,
        "num_pairs": 5,
        "num_shards": 3,
        "num_skipped": 0,
        "skipped": {},
        "splits": {"train": 5},
        "parts": {"train": 5},
        "was_there": False,
        "seconds": 0,
    }
    with tarfile.open(tmp_path / "out" / "00001.tar") as tar:
        names = ["000000002.jpg", "000000002.txt", "000000002.json"]
        assert tar.getnames()[:3] == names
        image, caption, facts = (tar.extractfile(name).read() for name in names)
    assert image == make_image(2)
    assert caption == b"image 2"
    assert json.loads(facts)["captions"] == ["image 2"]
    assert json.loads(facts)["key"] == "2.jpg"


def test_shards_are_byte_for_byte_what_tarfile_writes(tmp_path, make_image):
    run(write_pairs(tmp_path / "in", make_image, num=3), tmp_path / "out")
    expected = io.BytesIO()
    with (
        tarfile.open(tmp_path / "out" / "00000.tar") as ours,
        tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as theirs,
    ):
        for member in ours.getmembers():
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            theirs.addfile(info, ours.extractfile(member))
    data = (tmp_path / "out" / "00000.tar").read_bytes()
    assert expected.getvalue().rstrip(b"\0") == data.rstrip(b"\0")
    assert data.endswith(bytes(1024))


def test_the_manifest_holds_counts_and_the_sha256_of_each_shard(tmp_path, make_image):
    run(write_pairs(tmp_path / "in", make_image, num=3), tmp_path / "out", shard_samples=2)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["num_pairs"] for shard in manifest["shards"]] == [2, 1]
    for shard in manifest["shards"]:
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["num_bytes"] == len(data)


def test_the_output_does_not_depend_on_workers(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=50)
    for workers in (1, 5):
        out = str(tmp_path / f"out{workers}")
        list(prepare(PrepareConfig(source=str(source), out=out, workers=workers, split={"val": 0.2})))
    assert contents(tmp_path / "out1") == contents(tmp_path / "out5")


def test_larger_images_shrink_to_the_side_and_smaller_ones_keep_their_bytes(tmp_path, make_image):
    (tmp_path / "a.jpg").write_bytes(make_image(1, width=300, height=200))
    (tmp_path / "b.jpg").write_bytes(make_image(2, width=60, height=50))
    (tmp_path / "c.png").write_bytes(make_image(3, width=70, height=90, format="PNG"))
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    run(tmp_path, tmp_path / "out", image_side_px=64)
    store = open_dataset(str(tmp_path / "out"))
    sizes = [Image.open(io.BytesIO(store.read(number).image)).size for number in range(3)]
    assert sizes == [(96, 64), (60, 50), (64, 82)]
    assert store.read(1).image == make_image(2, width=60, height=50)


def test_several_captions_are_kept(tmp_path, make_image):
    (tmp_path / "a.jpg").write_bytes(make_image(1))
    (tmp_path / "captions.jsonl").write_text('{"file": "a.jpg", "captions": ["one", " ", "two  words"]}')
    run(tmp_path, tmp_path / "out")
    assert open_dataset(str(tmp_path / "out")).read(0).captions == ("one", "two words")


def test_bad_pairs_are_skipped_and_counted_by_cause(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=8)
    (source / "1.jpg").write_bytes(make_image(1)[:300])
    (source / "2.jpg").unlink()
    (source / "3.jpg").write_bytes(b"")
    (source / "4.jpg").write_bytes(b"no image at all")
    with (source / "captions.jsonl").open("ab") as file:
        file.write(b'{"file": "0.jpg", "caption": "  "}\n')
        file.write(b'{"file": "5.jpg", "caption": "caf\xe9"}\n')
        file.write(b'{"file": "../6.jpg", "caption": "outside"}\n')
        file.write(b'{"file": "7.jpg", "caption": "image 7"}\n')
        file.write(b'{"file": "7.jpg", "caption": 7}\n{"file\n')
        file.write(b'{"caption": "no file"}\n')
    report = run(source, tmp_path / "out", max_bad=1.0)
    assert report.num_pairs == 4
    assert report.skipped == {
        "truncated image": (1, "1.jpg"),
        "missing file": (1, "2.jpg"),
        "empty file": (1, "3.jpg"),
        "not an image": (1, "4.jpg"),
        "empty caption": (1, "0.jpg"),
        "caption not UTF-8": (1, "captions.jsonl:10"),
        "path traversal": (1, "../6.jpg"),
        "duplicate key": (1, "7.jpg"),
        "caption not text": (1, "7.jpg"),
        "damaged line": (1, "captions.jsonl:14"),
        "missing file name": (1, "captions.jsonl:15"),
    }
    assert report.num_read == report.num_pairs + report.to_json()["num_skipped"]


def test_too_many_bad_pairs_stop_the_run_and_name_the_first(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=10)
    for number in (3, 6):
        (source / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 10 .*--max-bad 0.1.*3.jpg \(empty file\), 6.jpg") as caught:
        run(source, tmp_path / "out", max_bad=0.1)
    assert "--max-bad" in caught.value.remedy
    report = run(source, tmp_path / "out", max_bad=0.2)
    assert report.was_resumed
    assert (report.num_read, report.num_pairs) == (10, 8)


def test_a_finished_run_does_nothing_the_second_time(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=3)
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    report = run(source, tmp_path / "out")
    assert report.was_there
    assert report.num_pairs == 3
    assert contents(tmp_path / "out") == before


def test_the_output_of_another_command_is_left_alone_unless_forced(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=3)
    run(source, tmp_path / "out", split={"val": 0.9})
    with pytest.raises(DataError, match="holds the result of another command") as caught:
        run(source, tmp_path / "out", quality=50)
    assert "--force" in caught.value.remedy
    assert run(source, tmp_path / "out", quality=50, force=True).num_pairs == 3
    assert not list((tmp_path / "out" / "val").iterdir())


def test_force_deletes_shards_only(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "out" / "thesis.json.tmp").write_text("a draft")
    for name in ("00000.index", "progress.json", "manifest.json"):  # as processes leave them that were killed
        (tmp_path / "out" / f"{name}.0123456789ab.tmp").write_text("half of it")
    with pytest.raises(DataError, match="is not empty"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", force=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"00000.tar", "00000.index", "shards.index", "manifest.json", "thesis.txt", "thesis.json.tmp"}
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("num_before_stop", [1, 30])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, make_image, num_before_stop):
    source = write_pairs(tmp_path / "in", make_image, num=50)
    (source / "7.jpg").write_bytes(b"")
    options = {"shard_samples": 9, "split": {"val": 0.3}}
    run(source, tmp_path / "whole", **options)
    interrupt(source, tmp_path / "out", after=num_before_stop, **options)
    assert (tmp_path / "out" / "progress.json").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()
    report = run(source, tmp_path / "out", **options)
    assert report.was_resumed
    assert report.skipped == {"empty file": (1, "7.jpg")}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_run_goes_on_from_what_it_last_saved(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=20)
    run(source, tmp_path / "whole", shard_samples=8)
    for report in start(source, tmp_path / "out", shard_samples=8):
        if report.num_read == 13:
            shutil.copytree(tmp_path / "out", tmp_path / "killed")
    report = run(source, tmp_path / "killed", shard_samples=8)
    assert report.was_resumed
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_run_killed_between_two_files_goes_on_too(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=20)
    run(source, tmp_path / "whole", shard_samples=8)
    out = tmp_path / "out"
    interrupt(source, out, after=13, shard_samples=8)
    shutil.copy(tmp_path / "whole" / "00001.tar", out)  # finished, but not yet written down
    (out / "unfinished.tar.tmp").unlink()
    assert run(source, out, shard_samples=8).was_resumed
    assert contents(out) == contents(tmp_path / "whole")


def test_an_unfinished_shard_that_is_lost_is_an_error(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=20)
    out = tmp_path / "out"
    for damage in ("is missing", "is damaged"):
        interrupt(source, out, after=13, force=True)
        if damage == "is missing":
            (out / "unfinished.tar.tmp").unlink()
        else:
            (out / "unfinished.tar.tmp").write_bytes(bytes(5000))
        with pytest.raises(DataError, match=damage) as caught:
            run(source, out)
        assert "--force" in caught.value.remedy
    assert run(source, out, force=True).num_pairs == 20


@pytest.mark.parametrize("name", ["progress.json", "progress.memory", "unfinished.tar.tmp"])
def test_a_changed_byte_in_what_an_interrupted_run_left_is_noticed(tmp_path, make_image, name):
    source, out = write_pairs(tmp_path / "in", make_image, num=20), tmp_path / "out"
    interrupt(source, out, after=13)
    data = bytearray((out / name).read_bytes())
    if name == "progress.json":
        data = data.replace(b'"num_read": 13', b'"num_read": 12')
    else:
        data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(DataError, match=r"damaged|of another command") as caught:
        run(source, out)
    assert "--force" in caught.value.remedy
    assert run(source, out, force=True).num_pairs == 20


def test_a_manifest_that_lacks_something_is_an_error(tmp_path, make_image):
    source, out = write_pairs(tmp_path / "in", make_image, num=3), tmp_path / "out"
    run(source, out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["num_shards"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the manifest of .* is damaged"):
        run(source, out)


def test_a_full_disk_is_said_clearly_and_the_run_goes_on_later(tmp_path, make_image, monkeypatch):
    source = write_pairs(tmp_path / "in", make_image, num=20)

    def fail(files, *, start):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("declip_cli.data.prepare.shard_writer.pack", fail)
        with pytest.raises(DataError, match="the disk is full") as caught:
            run(source, tmp_path / "out")
    assert "run the same command again" in caught.value.remedy
    assert run(source, tmp_path / "out").num_pairs == 20


@pytest.mark.parametrize("place", ["shard", "progress"])
def test_a_full_disk_names_what_it_left_behind_and_the_run_goes_on_to_the_same_bytes(
    tmp_path, make_image, monkeypatch, place
):
    source = write_pairs(tmp_path / "in", make_image, num=20)
    run(source, tmp_path / "whole", shard_samples=8)
    pack, num_pairs, write = shard_writer.pack, [], storage.write_whole

    def pack_until_full(files, *, start):
        num_pairs.append(start)
        if place == "shard" and len(num_pairs) > 11:
            raise OSError(28, "No space left on device")
        return pack(files, start=start)

    def write_until_full(path, data):
        with storage.disk_errors(path):
            if place == "progress" and "progress" in path and len(num_pairs) > 11:
                raise OSError(28, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "pack", pack_until_full)
        patch.setattr(storage, "write_whole", write_until_full)
        patch.setattr("declip_cli.data.prepare.pipeline._SAVE_EVERY_S", -1.0)
        with pytest.raises(DataError, match="the disk is full: cannot write") as caught:
            run(source, tmp_path / "out", shard_samples=8)
    assert f"are in {tmp_path / 'out' / 'unfinished.tar.tmp'}" in caught.value.message
    assert caught.value.remedy.startswith("free some space and run the same command again to continue")
    assert run(source, tmp_path / "out", shard_samples=8).was_resumed
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_are_chosen_by_key_and_opened_by_name(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=60)
    report = run(source, tmp_path / "out", split={"val": 0.25, "test": 0.25})
    assert sum(report.splits.values()) == 60
    assert all(6 <= report.splits[split] <= 24 for split in ("val", "test"))
    stores = [open_dataset(str(tmp_path / "out"), split) for split in (None, "val", "test")]
    assert [len(store) for store in stores] == [report.splits[split] for split in ("train", "val", "test")]
    captions = {store.read(number).captions for store in stores for number in range(len(store))}
    assert len(captions) == 60
    (source / "captions.jsonl").write_text('{"file": "0.jpg", "caption": "another text"}\n')
    again = run(source, tmp_path / "again", split={"val": 0.25, "test": 0.25})
    first_key = next(
        split
        for split, store in zip(report.splits, stores, strict=True)
        for n in range(len(store))
        if store.read(n).captions == ("image 0",)
    )
    assert again.splits.get(first_key) == 1


def test_nothing_found_and_nothing_there_are_errors(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no image-text pair found in .*\(it is empty\)"):
        run(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="same folder"):
        run(tmp_path / "empty", tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 0}, "--quality is in"),
        ({"image_side_px": 3}, "--image-side-px must be at least 16"),
        ({"max_bad": 2.0}, "--max-bad is a fraction"),
        ({"split": {"val": 1.0}}, "leaves nothing for the training split"),
        ({"split": {"../x": 0.1}}, "plain name"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(source="a", out="b", **options)


def test_filters_leave_pairs_out_by_cause_and_do_not_count_as_bad(tmp_path, make_image):
    source = tmp_path / "in"
    source.mkdir()
    test_set = tmp_path / "test_set"
    test_set.mkdir()
    leaked = Image.open(io.BytesIO(make_image(50, width=300, height=200)))
    leaked.resize((150, 100)).save(test_set / "leaked.png")
    (test_set / "broken.jpg").write_bytes(b"")
    rows = [
        ("kept", make_image(0, width=80, height=60), "a fine caption"),
        ("copy", make_image(0, width=80, height=60), "an exact copy"),
        ("near", make_image(0, width=80, height=60, format="PNG"), "a near copy"),
        ("leak", make_image(50, width=300, height=200), "a test image"),
        ("tiny", make_image(3, width=20, height=60), "a tiny image"),
        ("wide", make_image(4, width=300, height=60), "a wide image"),
        ("short", make_image(5, width=80, height=60), "hm"),
        ("other", make_image(6, width=80, height=60), "красный автобус"),
        ("again", make_image(7, width=80, height=60), "A fine  caption"),
        ("good", make_image(8, width=80, height=60), "another caption"),
    ]
    lines = []
    for name, image, caption in rows:
        (source / name).write_bytes(image)
        lines.append(json.dumps({"file": name, "caption": caption}))
    (source / "captions.jsonl").write_text("\n".join(lines))
    clean = CleanConfig(
        min_caption_chars=3,
        scripts=("latin",),
        max_caption_repeats=1,
        min_side_px=30,
        max_aspect=3.0,
        duplicates="near",
        exclude=(str(test_set),),
    )
    report = run(source, tmp_path / "out", clean=clean, max_bad=0.0)
    assert report.skipped == {
        "duplicate image": (1, "copy"),
        "near-duplicate image": (1, "near"),
        "excluded image": (1, "leak"),
        "image too small": (1, "tiny"),
        "aspect ratio": (1, "wide"),
        "caption too short": (1, "short"),
        "other script": (1, "other"),
        "repeated caption": (1, "again"),
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_pairs"] == 2
    assert manifest["skipped"]["excluded image"] == {"count": 1, "first": "leak"}
    assert manifest["excluded"] == {"num_images": 2, "num_unreadable": 1}
    assert manifest["clean"]["min_side_px"] == 30
    shards = run(source, tmp_path / "again", clean=CleanConfig(exclude=(str(tmp_path / "out"),)))
    assert shards.skipped["excluded image"][0] == 4  # kept, its copies, and good


def test_a_folder_to_exclude_that_holds_no_image_is_an_error(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=1)
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "there is no image"), ("nowhere", "there is no data set")):
        with pytest.raises(DataError, match=f"cannot exclude .*{name}: .*{message}"):
            run(source, tmp_path / "out", clean=CleanConfig(exclude=(str(tmp_path / name),)))


def test_a_stopped_run_remembers_what_it_has_seen(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=40)
    for number in range(20, 40):
        (source / f"{number}.jpg").write_bytes(make_image(number - 20))
    options = {"shard_samples": 7, "clean": CleanConfig(duplicates="near")}
    run(source, tmp_path / "whole", **options)
    interrupt(source, tmp_path / "out", after=25, **options)
    report = run(source, tmp_path / "out", **options)
    assert report.num_pairs == 20
    assert report.skipped == {"duplicate image": (20, "20.jpg")}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_sources_and_output_may_be_urls(tmp_path, make_image):
    fs = fsspec.filesystem("memory")
    source = write_pairs(tmp_path / "in", make_image, num=12)
    fs.put(f"{source}/", "/bucket/photos/", recursive=True)
    report = run("memory://bucket/photos", "memory://bucket/shards", shard_samples=5, split={"val": 0.3})
    run(source, tmp_path / "local", shard_samples=5, split={"val": 0.3})
    names = sorted(name.removeprefix("/bucket/shards/") for name in fs.find("/bucket/shards"))
    assert names == sorted(str(path) for path in contents(tmp_path / "local"))
    assert fs.cat("/bucket/shards/00000.tar") == (tmp_path / "local/00000.tar").read_bytes()
    assert run("memory://bucket/photos", "memory://bucket/shards", shard_samples=5, split={"val": 0.3}).was_there
    store = open_dataset("memory://bucket/shards", cache_dir=str(tmp_path / "cache"))
    local = open_dataset(str(tmp_path / "local"))
    assert len(store) == len(local) == report.splits["train"]
    assert [store.read(n) for n in range(len(store))] == [local.read(n) for n in range(len(local))]
    again = run("memory://bucket/shards/{00000..00001}.tar", tmp_path / "again")
    assert again.num_pairs == report.splits["train"]
    fs.rm("/bucket", recursive=True)


def test_an_interrupted_run_to_a_url_goes_on(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=40)
    interrupt(source, "memory://resumed", after=25, shard_samples=9)
    report = run(source, "memory://resumed", shard_samples=9)
    assert report.was_resumed
    run(source, tmp_path / "whole", shard_samples=9)
    fs = fsspec.filesystem("memory")
    for path, data in contents(tmp_path / "whole").items():
        if path.suffix == ".tar":
            assert fs.cat(f"/resumed/{path}") == data
    fs.rm("/resumed", recursive=True)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def bomb():
    """A PNG file of 3 kB that claims 50,000 x 50,000 pixels."""
    data = bytearray(encoded(Image.new("1", (1000, 1000)), "PNG"))
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_unusual_images_are_handled_or_counted(tmp_path, make_image):
    red = Image.new("RGB", (40, 30), (200, 30, 40))
    clear = Image.new("RGBA", (40, 30), (200, 30, 40, 0))
    deep = Image.fromarray(np.full((30, 40), 51_400, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 8
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "blue")], "duration": 50}
    images = {
        "cmyk.jpg": encoded(red.convert("CMYK"), "JPEG"),
        "deep.png": encoded(deep, "PNG"),
        "palette.png": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "moving.gif": encoded(red, "GIF", **frames),
        "clear.png": encoded(clear, "PNG"),
        "rotated.jpg": encoded(red, "JPEG", exif=exif),
        "bomb.png": bomb(),
        "wrong_name.png": make_image(0),
    }
    source = tmp_path / "in"
    source.mkdir()
    for name, data in images.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(name)
    report = run(source, tmp_path / "out", max_bad=0.5)
    assert report.skipped == {"too many pixels": (1, "bomb.png")}
    store = open_dataset(str(tmp_path / "out"))
    found = {}
    for number in range(len(store)):
        sample = store.read(number)
        found[sample.captions[0]] = Image.open(io.BytesIO(sample.image)).convert("RGB")
    assert found["rotated.jpg"].size == (30, 40)
    expected = dict.fromkeys(("cmyk.jpg", "palette.png", "moving.gif", "rotated.jpg"), (200, 30, 40))
    expected |= {"deep.png": (200, 200, 200), "clear.png": (255, 255, 255)}
    for name, color in expected.items():
        assert found[name].getpixel((15, 15)) == pytest.approx(color, abs=6), name


def test_two_runs_do_not_write_to_one_folder_at_once(tmp_path, make_image):
    source = write_pairs(tmp_path / "in", make_image, num=40)
    first = start(source, tmp_path / "out")
    next(report for report in first if report.num_read == 5)
    with pytest.raises(DataError, match="another declip prepare is writing to"):
        run(source, tmp_path / "out")
    *_, report = first
    assert report.num_pairs == 40
    assert run(source, tmp_path / "out").was_there
    assert not (tmp_path / "out" / "progress.lock").exists()


def test_forcing_a_run_onto_one_that_works_deletes_nothing(tmp_path, make_image):
    source, out = write_pairs(tmp_path / "in", make_image, num=20), tmp_path / "out"
    reports = start(source, out, shard_samples=8)
    next(report for report in reports if report.num_read == 13)
    before = contents(out)
    with pytest.raises(DataError, match="another declip prepare is writing to"):
        run(source, out, force=True)
    assert contents(out) == before
    *_, last = reports
    assert last.num_pairs == 20


def test_a_lock_that_the_run_before_deletes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    config = PrepareConfig(source=str(tmp_path), out=str(tmp_path / "out"))
    first, second, third = (OutFolder(config).locked() for _ in range(3))
    first.__enter__()
    flock = fcntl.flock

    def late(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)  # after the second has opened the file, before it locks it
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with second, pytest.raises(DataError, match="another declip prepare is writing to"):
        third.__enter__()
    with OutFolder(config).locked():
        pass
    assert not (tmp_path / "out").exists()


def test_a_note_among_the_images_is_no_reason_to_stop(tmp_path, make_image):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jpg").write_bytes(make_image(0))
    (source / "a.txt").write_text("a")
    (source / "README.txt").write_text("my images")
    report = run(source, tmp_path / "out", max_bad=0.0)
    assert report.skipped == {"text without image": (1, "README.txt")}


def test_when_every_image_of_a_list_is_missing_the_folder_is_asked_for(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n}.jpg,image\n" for n in range(60)))
    with pytest.raises(DataError, match="missing file: 51, first 0.jpg") as caught:
        run(tmp_path / "t.csv", tmp_path / "out")
    assert caught.value.remedy.startswith("--images FOLDER")
    assert not (tmp_path / "out").exists()
