"""A round trip for every kind of source: written as its authors do, prepared, read back."""

import bz2
import gzip
import io
import json
import os
import tarfile
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from declip_cli.data.catalog import open_dataset
from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.find_source import open_source
from declip_cli.data.prepare.pipeline import prepare
from declip_cli.errors import ConfigError, DataError


def round_trip(source, tmp_path, *, out="out", **options):
    """Prepare a source; return its kind, its pairs by original key, and the report."""
    options.setdefault("max_bad", 0.0)
    config = PrepareConfig(source=str(source), out=str(tmp_path / out), workers=1, **options)
    for report in prepare(config):
        last = report
    pairs = {}
    for part in [name for name in last.splits if name != "train" or last.splits["train"]]:
        store = open_dataset(str(tmp_path / out), part)
        for number in range(len(store)):
            sample = store.read(number)
            pairs.setdefault(part, []).append((sample.image, sample.captions))
    return last.kind, pairs, last


def write_images(folder, make_image, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_image(number))


def test_captions_jsonl_in_nested_folders(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "a/x.jpg", "b/c/deep/y.jpg")
    (tmp_path / "in/a/captions.jsonl").write_text('{"file": "x.jpg", "caption": "an x"}\n\n')
    (tmp_path / "in/b/c/captions.jsonl").write_text('{"file": "deep/y.jpg", "captions": ["a y", "ypsilon"]}')
    kind, pairs, _ = round_trip(tmp_path / "in", tmp_path)
    assert kind == "captions"
    assert pairs["train"] == [(make_image(0), ("an x",)), (make_image(1), ("a y", "ypsilon"))]
    one = round_trip(tmp_path / "in/b/c/captions.jsonl", tmp_path, out="one")
    assert one[0] == "captions"
    assert one[1]["train"] == pairs["train"][1:]


def test_images_with_text_or_json_beside(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "a.jpg", "a-1.JPG", "sub/b.jpeg", "sub/c.jpg", "z.jpg")
    (tmp_path / "in/a.txt").write_text("plain a\n")
    (tmp_path / "in/a-1.txt").write_text("a minus one")
    (tmp_path / "in/sub/b.json").write_text('{"captions": ["b", "bee"]}')
    (tmp_path / "in/sub/lonely.txt").write_text("no image")
    (tmp_path / "in/sub/c.json").write_text("{")
    (tmp_path / "in/.hidden.jpg").write_bytes(b"")
    kind, pairs, report = round_trip(tmp_path / "in", tmp_path, max_bad=1.0)
    assert kind == "folder"
    assert pairs["train"] == [
        (make_image(1), ("a minus one",)),
        (make_image(0), ("plain a",)),
        (make_image(2), ("b", "bee")),
    ]
    assert report.skipped == {
        "missing caption": (1, "z.jpg"),
        "text without image": (1, "sub/lonely.txt"),
        "damaged metadata": (1, "sub/c.jpg"),
    }


def test_the_output_folder_may_lie_in_the_source(tmp_path, make_image):
    write_images(tmp_path, make_image, "a.jpg")
    (tmp_path / "a.txt").write_text("a")
    assert round_trip(tmp_path, tmp_path)[2].num_read == 1
    assert round_trip(tmp_path, tmp_path, force=True)[2].num_read == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'id,file,caption\n1,a.jpg,"one, with comma"\n2,b.jpg,two\n'),
        ("t.csv", ',file,caption\n0,a.jpg,"one, with comma"\n1,b.jpg,two\n'),  # with the row numbers of pandas
        ("t.csv", "\ufefffile;caption\na.jpg;one, with comma\nb.jpg;two\n"),
        ("t.tsv", "caption\timage\none, with comma\ta.jpg\ntwo\tb.jpg\n"),
        ("t.jsonl", '{"path": "a.jpg", "text": "one, with comma"}\n{"path": "b.jpg", "text": "two"}\n'),
    ],
)
def test_tables_as_text(tmp_path, make_image, name, text):
    write_images(tmp_path, make_image, "a.jpg", "b.jpg")
    (tmp_path / name).write_text(text)
    kind, pairs, _ = round_trip(tmp_path / name, tmp_path)
    assert kind == "table"
    assert pairs["train"] == [(make_image(0), ("one, with comma",)), (make_image(1), ("two",))]


def test_several_caption_columns_and_rows_are_kept(tmp_path, make_image):
    write_images(tmp_path / "pictures", make_image, "a.jpg", "b.jpg")
    table = tmp_path / "t.csv"
    table.write_text("image,short,long\na.jpg,a,an a\na.jpg,A,a big a\nb.jpg,b,\n")
    options = {"caption_columns": ("short", "long"), "images": str(tmp_path / "pictures")}
    _, pairs, report = round_trip(table, tmp_path, **options)
    assert pairs["train"] == [(make_image(0), ("a", "an a", "A", "a big a")), (make_image(1), ("b",))]
    assert report.num_read == 2


def test_parquet_with_images_inside_as_hugging_face_writes_them(tmp_path, make_image):
    rows = {
        "image": [{"bytes": make_image(0), "path": "a.jpg"}, {"bytes": make_image(1), "path": None}],
        "caption": [["one", "two"], ["three"]],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    kind, pairs, _ = round_trip(tmp_path / "t.parquet", tmp_path)
    assert kind == "table"
    assert pairs["train"] == [(make_image(0), ("one", "two")), (make_image(1), ("three",))]


def test_parquet_with_paths(tmp_path, make_image):
    write_images(tmp_path, make_image, "a.jpg")
    pyarrow.parquet.write_table(
        pyarrow.table({"filepath": ["a.jpg", None], "title": ["one", "two"]}), tmp_path / "t.parquet"
    )
    _, pairs, report = round_trip(tmp_path / "t.parquet", tmp_path, max_bad=0.5)
    assert pairs["train"] == [(make_image(0), ("one",))]
    assert report.skipped == {"missing file name": (1, "row 2")}
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="is not a Parquet file"):
        round_trip(tmp_path / "broken.parquet", tmp_path, out="out2")


def test_damaged_rows_of_a_table_are_counted(tmp_path, make_image):
    write_images(tmp_path, make_image, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "t.csv").write_bytes(
        b"image,caption\na.jpg,one\nb.jpg,one,too many\nc.jpg,caf\xe9\n,no name\n\nc.jpg,\n"
    )
    _, pairs, report = round_trip(tmp_path / "t.csv", tmp_path, max_bad=1.0)
    assert len(pairs["train"]) == 1
    assert report.skipped == {
        "wrong number of columns": (1, "row 2"),
        "caption not UTF-8": (1, "row 3"),
        "missing file name": (1, "row 4"),
        "empty caption": (1, "c.jpg"),
    }


def test_columns_that_are_not_there_are_errors(tmp_path):
    (tmp_path / "t.csv").write_text("picture,words\na.jpg,one\n")
    with pytest.raises(DataError, match=r"no column of a usual name such as 'image' \(it has: picture, words\)"):
        round_trip(tmp_path / "t.csv", tmp_path)
    with pytest.raises(DataError, match=r"no column 'txt' \(it has: picture, words\)"):
        round_trip(tmp_path / "t.csv", tmp_path, image_column="picture", caption_columns=("words", "txt"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty.csv is empty"):
        round_trip(tmp_path / "empty.csv", tmp_path)


def test_coco_captions(tmp_path, make_image):
    write_images(tmp_path / "coco", make_image, "val2017/000000000139.jpg", "val2017/000000000285.jpg")
    content = {
        "images": [{"id": 285, "file_name": "000000000285.jpg"}, {"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 139, "caption": "A room."},
            {"id": 2, "image_id": 285, "caption": "A bear.\n"},
            {"id": 3, "image_id": 139, "caption": "Chairs."},
        ],
    }
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "coco/annotations/captions_val2017.json").write_text(json.dumps(content))
    for source in ("coco", "coco/annotations/captions_val2017.json"):
        kind, pairs, _ = round_trip(tmp_path / source, tmp_path, out=source.replace("/", "-") + "-out")
        assert kind == "coco"
        assert pairs["train"] == [(make_image(1), ("A bear.",)), (make_image(0), ("A room.", "Chairs."))]


def test_karpathy_splits_keep_test_images_out_of_training(tmp_path, make_image):
    names = ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    write_images(tmp_path / "flickr30k/flickr30k-images", make_image, *names)
    splits = ["train", "test", "val", "restval"]
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": f"{name} one"}, {"raw": f"{name} two"}]}
        for name, split in zip(names, splits, strict=True)
    ]
    (tmp_path / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "x"}))
    kind, pairs, _ = round_trip(tmp_path / "flickr30k", tmp_path)
    assert kind == "flickr30k"
    assert {part: [captions[0] for _, captions in found] for part, found in pairs.items()} == {
        "train": ["1.jpg one", "4.jpg one"],
        "test": ["2.jpg one"],
        "val": ["3.jpg one"],
    }


def test_flickr30k_token_file(tmp_path, make_image):
    write_images(tmp_path / "flickr30k/flickr30k-images", make_image, "1.jpg", "2.jpg")
    lines = b"1.jpg#0\tOne .\n1.jpg#1\tUno .\n2.jpg#0\tTwo .\nno tab here\n2.jpg#0\tcaf\xe9\n"
    (tmp_path / "flickr30k/results_20130124.token").write_bytes(lines)
    kind, pairs, report = round_trip(tmp_path / "flickr30k", tmp_path, max_bad=1.0)
    assert kind == "flickr30k"
    assert pairs["train"] == [(make_image(0), ("One .", "Uno .")), (make_image(1), ("Two .",))]
    assert report.skipped == {"damaged line": (1, "line 4"), "caption not UTF-8": (1, "2.jpg")}


def test_flickr30ks_results_csv_is_no_comma_table(tmp_path, make_image):
    write_images(tmp_path / "flickr30k/flickr30k_images", make_image, "1.jpg", "2.jpg")
    lines = ["image_name| comment_number| comment", "1.jpg| 0| One , two | three .", "1.jpg| 1| Uno ."]
    lines += ["2.jpg| 4   A dog .", "no bar here"]  # the published file has one such line
    table = tmp_path / "flickr30k/results.csv"
    table.write_text("\n".join(lines))
    for source in (tmp_path / "flickr30k", table):
        kind, pairs, report = round_trip(source, tmp_path, out=f"out-{source.name}", max_bad=1.0)
        assert kind == "flickr30k"
        assert pairs["train"] == [(make_image(0), ("One , two | three .", "Uno .")), (make_image(1), ("A dog .",))]
        assert report.skipped == {"damaged line": (1, "line 5")}


def test_a_table_of_ones_own_may_be_called_results_csv(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "1.jpg")
    (tmp_path / "in/results.csv").write_text("image,caption\n1.jpg,a bear\n")
    kind, pairs, _ = round_trip(tmp_path / "in/results.csv", tmp_path)
    assert (kind, pairs["train"]) == ("table", [(make_image(0), ("a bear",))])


def test_hugging_faces_folder_of_parquet_with_splits(tmp_path, make_image):
    rows = [
        {
            "image": {"bytes": make_image(number), "path": f"{number}.jpg"},
            "caption": [f"{number} {word}" for word in ("one", "two", "three", "four", "five")],
            "split": split,
            "filename": f"{number}.jpg",
        }
        for number, split in enumerate(["train", "test", "val", "validation"])
    ]
    (tmp_path / "in/data").mkdir(parents=True)
    for part in (0, 1):
        table = pyarrow.Table.from_pylist(rows[2 * part : 2 * part + 2])
        pyarrow.parquet.write_table(table, tmp_path / f"in/data/test-0000{part}-of-00002.parquet")
    kind, pairs, _ = round_trip(tmp_path / "in", tmp_path)
    assert kind == "table"
    assert {part: [captions for _, captions in found] for part, found in pairs.items()} == {
        "train": [tuple(rows[0]["caption"])],
        "test": [tuple(rows[1]["caption"])],
        "val": [tuple(rows[2]["caption"]), tuple(rows[3]["caption"])],
    }


def test_parquet_beside_images_is_not_taken_for_their_table(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "00000/a.jpg")
    (tmp_path / "in/00000/a.txt").write_text("plain a")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"url": "x"}]), tmp_path / "in/00000.parquet")
    assert round_trip(tmp_path / "in", tmp_path)[0] == "folder"


def test_images_that_are_nowhere_around_a_list_ask_for_the_folder(tmp_path, make_image):
    write_images(tmp_path / "far/away/from/here", make_image, "1.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/results.token").write_text("1.jpg#0\tOne .\n")
    with pytest.raises(DataError, match=r"cannot find the images of .*: no 1.jpg") as caught:
        round_trip(tmp_path / "in", tmp_path)
    assert caught.value.remedy == "--images FOLDER"
    images = str(tmp_path / "far/away/from/here")
    assert round_trip(tmp_path / "in", tmp_path, images=images)[2].num_pairs == 1
    with pytest.raises(DataError, match="no such folder"):
        round_trip(tmp_path / "in", tmp_path, images="/nowhere", out="out2")


def write_tar(path, members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_tar_shards_as_img2dataset_writes_them(tmp_path, make_image):
    (tmp_path / "in").mkdir()
    for shard in range(3):
        facts = {"caption": f"text {shard}", "url": "http://x", "key": f"{shard}0", "status": "success"}
        members = [
            (f"{shard:05d}0000.jpg", make_image(shard)),
            (f"{shard:05d}0000.json", json.dumps(facts).encode()),
            (f"{shard:05d}0000.txt", f"text {shard}".encode()),
        ]
        write_tar(tmp_path / f"in/{shard:05d}.tar{'.gz' if shard == 2 else ''}", members)
        (tmp_path / f"in/{shard:05d}_stats.json").write_text("{}")
    kind, pairs, _ = round_trip(tmp_path / "in", tmp_path)
    assert kind == "tars"
    assert pairs["train"] == [(make_image(shard), (f"text {shard}",)) for shard in range(3)]
    some = round_trip(f"{tmp_path}/in/{{00000..00001}}.tar", tmp_path, out="some")
    assert some[1]["train"] == pairs["train"][:2]
    with pytest.raises(DataError, match=r"no such file or folder: .*00004.tar"):
        round_trip(f"{tmp_path}/in/{{00004..00007}}.tar", tmp_path, out="none")


def test_damaged_tars_are_read_as_far_as_they_go(tmp_path, make_image):
    (tmp_path / "in").mkdir()
    members = [member for n in range(4) for member in ((f"{n}.jpg", make_image(n)), (f"{n}.txt", b"text %d" % n))]
    write_tar(tmp_path / "in/a.tar", [*members, ("4.txt", b"alone"), ("../5.jpg", b"x"), *members[:2]])
    write_tar(tmp_path / "in/b.tar", members)
    (tmp_path / "in/b.tar").write_bytes((tmp_path / "in/b.tar").read_bytes()[:3000])
    write_tar(tmp_path / "in/c.tar.gz", members)
    (tmp_path / "in/c.tar.gz").write_bytes((tmp_path / "in/c.tar.gz").read_bytes()[:1000])
    _, pairs, report = round_trip(tmp_path / "in", tmp_path, max_bad=1.0)
    assert [captions for _, captions in pairs["train"]][:5] == [(f"text {n % 4}",) for n in range(5)]
    assert report.skipped["missing image"] == (1, "a.tar/4")
    assert report.skipped["path traversal"] == (1, "a.tar/../5.jpg")
    assert report.skipped["duplicate key"] == (1, "a.tar/0")
    assert report.skipped["truncated tar"] == (2, "b.tar")


def test_the_original_declip_list(tmp_path, make_image):
    write_images(tmp_path / "images", make_image, "ab/cd.jpg", "ef/gh.jpg")
    lines = [
        {"filename": "ab/cd.jpg", "caption": "one", "url": "http://flickr/1"},
        {"filename": "ef/gh.jpg", "caption": "two", "url": "http://flickr/2"},
        {"filename": "gone.jpg", "caption": "three", "url": "http://flickr/3"},
    ]
    path = tmp_path / "yfcc15m_clean_open_data.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kind, pairs, report = round_trip(path, tmp_path, max_bad=0.5)
    assert kind == "declip"
    assert pairs["train"] == [(make_image(0), ("one",)), (make_image(1), ("two",))]
    assert report.skipped == {"missing file": (1, "gone.jpg")}
    (tmp_path / "images/ab/cd.jpg").rename(tmp_path / "moved.jpg")
    (tmp_path / "images/ef/gh.jpg").unlink()
    with pytest.raises(DataError, match="cannot find the images") as caught:
        round_trip(path, tmp_path, out="out2")
    assert "--kind urls" in caught.value.remedy


def test_the_yfcc15m_list_of_clip_takes_captions_from_the_metadata(tmp_path, make_image):
    hashes = ["0123456789abcdef0123456789abcdef", "ffff456789abcdef0123456789abcdef", "9" * 32]

    def row(number, hashed, title, description, *, marker="0"):
        fields = [str(number), str(1000 + number), hashed, *["x"] * 5, title, description, *["x"] * 14, marker]
        return "\t".join(fields)

    write_images(tmp_path / "images", make_image, f"012/345/{hashes[0]}.jpg")
    metadata = [
        row(0, hashes[0], "A+red+%26+blue+bus", "Seen+in+%3Cb%3ERome%3C%2Fb%3E%0A2010"),
        row(1, "0" * 32, "not", "chosen"),
        row(2, hashes[2], "moving", "", marker="1"),
        row(3, hashes[1], "lost", ""),
        "damaged",
    ]
    (tmp_path / "yfcc100m_dataset.bz2").write_bytes(bz2.compress("\n".join(metadata).encode()))
    lines = [f"{n}\t{1000 + n}\t{hashed}\n" for n, hashed in zip((0, 3, 2), hashes, strict=True)]
    path = tmp_path / "yfcc100m_subset_data.tsv"
    path.write_text("".join(lines))
    kind, pairs, report = round_trip(path, tmp_path, max_bad=1.0)
    assert kind == "yfcc15m"
    assert pairs["train"] == [(make_image(0), ("A red & blue bus", "Seen in Rome 2010"))]
    assert report.skipped == {
        "video": (1, "1002"),
        "missing file": (1, "1003"),
        "damaged line": (1, f"{tmp_path}/yfcc100m_dataset.bz2:5"),
    }
    (tmp_path / "yfcc100m_dataset.bz2").unlink()
    with pytest.raises(DataError, match="holds no captions"):
        round_trip(path, tmp_path, out="out2")


def test_a_kind_that_does_not_fit_is_an_error(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "a.jpg")
    (tmp_path / "in/a.txt").write_text("a")
    for kind in ("captions", "tars", "coco", "flickr30k", "table"):
        with pytest.raises(DataError, match="file in"):
            round_trip(tmp_path / "in", tmp_path, kind=kind)
    (tmp_path / "a.xyz").write_text("?")
    with pytest.raises(DataError, match="cannot tell what"):
        round_trip(tmp_path / "a.xyz", tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="neither COCO captions nor"):
        round_trip(tmp_path / "a.json", tmp_path, kind="coco")


def test_the_demo_corpus_is_a_source_whose_test_vendor_is_set_apart(tmp_path):
    source = open_source(PrepareConfig(source="demo", out=str(tmp_path / "out")))
    assert Counter(record.split for record in source.records) == {"": 3034, "test": 1217}
    assert source.total == 3034 + 1217


def test_options_that_a_source_would_not_look_at_are_refused(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "a.jpg")
    (tmp_path / "in/a.txt").write_text("a")
    with pytest.raises(ConfigError, match="are for tables, but .* is taken for: folder"):
        round_trip(tmp_path / "in", tmp_path, image_column="file")
    with pytest.raises(ConfigError, match="--images is for lists of file names"):
        round_trip(tmp_path / "in", tmp_path, images=str(tmp_path))


def test_text_that_is_no_unicode_is_counted_whatever_brought_it(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "a.jpg", "b.jpg")
    os.rename(tmp_path / "in/b.jpg", os.fsencode(tmp_path / "in") + b"/caf\xe9.jpg")
    (tmp_path / "in/captions.jsonl").write_text('{"file": "a.jpg", "caption": "half \\ud83d"}\n')
    with pytest.raises(DataError, match="no image-text pair found .*caption not UTF-8: 1, first a.jpg"):
        round_trip(tmp_path / "in", tmp_path, max_bad=1.0)
    (tmp_path / "in/captions.jsonl").unlink()
    (tmp_path / "in/a.txt").write_bytes(b"caf\xe9")
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt", "wb") as file:
        file.write("a café".encode())
    _, pairs, report = round_trip(tmp_path / "in", tmp_path, out="out2", max_bad=1.0)
    assert pairs["train"] == [(make_image(1), ("a café",))]
    assert report.skipped == {"caption not UTF-8": (1, "a.jpg")}


def test_linked_folders_are_followed_but_not_in_circles(tmp_path, make_image):
    write_images(tmp_path / "far", make_image, "a.jpg")
    (tmp_path / "far/a.txt").write_text("a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "in")
    assert round_trip(tmp_path / "in", tmp_path)[2].num_pairs == 1


def test_an_unknown_split_of_a_list_is_counted(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "1.jpg", "2.jpg")
    images = [{"filename": f"{n}.jpg", "sentences": [{"raw": "x"}], "split": s} for n, s in ((1, "train"), (2, "../x"))]
    (tmp_path / "in/dataset_x.json").write_text(json.dumps({"images": images}))
    _, _, report = round_trip(tmp_path / "in", tmp_path, max_bad=0.5)
    assert report.skipped == {"unknown split": (1, "2.jpg")}


def test_files_too_big_for_a_image_are_counted_unread(tmp_path, make_image):
    write_images(tmp_path / "in", make_image, "a.jpg", "b.jpg")
    for name in "ab":
        (tmp_path / f"in/{name}.txt").write_text(name)
    with (tmp_path / "in/b.jpg").open("r+b") as file:
        file.truncate(300 << 20)  # a hole, which takes no disk
    _, _, report = round_trip(tmp_path / "in", tmp_path, max_bad=0.5)
    assert report.skipped == {"too big": (1, "b.jpg")}
