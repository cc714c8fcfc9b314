import http.server
import json
import sys
import threading

import pytest

from declip_cli.data.catalog import open_dataset
from declip_cli.data.prepare import urls
from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.pipeline import prepare
from declip_cli.data.prepare.urls import name_failure
from declip_cli.errors import DataError


@pytest.fixture
def server(make_image):
    """A web server on this machine with good, slow, broken and missing images; yields its address."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            self.server.asked.append(name)
            if name.startswith("slow"):
                over.wait(30)
                return
            good = name.startswith("good")
            self.send_response(200 if good or name.startswith("broken") else 404)
            self.end_headers()
            if good:
                self.wfile.write(make_image(int(name[4:].partition(".")[0]), width=80, height=64))
            elif name.startswith("broken"):
                self.wfile.write(b"<html>this image has moved</html>")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        over.set()
        running.shutdown()
        thread.join()


def address(server, name):
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="img2dataset, which the extra `download` brings, needs Python before 3.13"
)
def test_a_list_of_urls_is_downloaded_and_failures_are_counted_by_cause(tmp_path, server, make_image, monkeypatch):
    monkeypatch.setitem(urls._SETTINGS, "timeout", 1)
    monkeypatch.setitem(urls._SETTINGS, "retries", 0)
    names = ["good0.jpg", "slow.jpg", "good1.jpg", "broken.jpg", "missing.jpg", "good2.jpg"]
    rows = [{"url": address(server, name), "caption": name, "more": ["and", name]} for name in names]
    rows += [{"url": "ftp:nonsense", "caption": "x", "more": []}, {"url": None, "caption": "x", "more": []}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(
        source=str(tmp_path / "list.jsonl"),
        out=str(tmp_path / "out"),
        caption_columns=("caption", "more"),
        image_side_px=32,
        max_bad=0.0,
    )
    *_, report = prepare(config)
    assert report.kind == "urls"
    assert (report.num_read, report.num_pairs) == (8, 3)
    assert report.skipped == {
        "download: timed out": (1, address(server, "slow.jpg")),
        "not an image": (1, address(server, "broken.jpg")),
        "download: HTTP 404": (1, address(server, "missing.jpg")),
        "download: not a URL": (1, "ftp:nonsense"),
        "missing URL": (1, "row 8"),
    }
    store = open_dataset(str(tmp_path / "out"))
    captions = [store.read(number).captions for number in range(3)]
    assert captions == [(f"good{n}.jpg", "and", f"good{n}.jpg") for n in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.index",
        "00000.tar",
        "manifest.json",
        "shards.index",
    ]


_DOWNLOADER_WITHOUT_NETWORK = """
import io, json, sys, tarfile, time
from pathlib import Path
import pyarrow.parquet
settings, here = json.loads(sys.argv[1]), Path(sys.argv[0]).parent
out = Path(settings["output_folder"])
out.mkdir(exist_ok=True)
rows = pyarrow.parquet.read_table(settings["url_list"]).to_pylist()
for number in range(len(rows) // 2):
    if (out / f"{number:05d}_stats.json").exists():
        continue
    if number == 3 and (here / "fault").exists():
        if (here / "fault").read_text() == "hang":
            time.sleep(60)
        sys.exit("the network is gone")
    rows_of_shard = rows[2 * number : 2 * number + 2]
    with tarfile.open(out / f"{number:05d}.tar", "w") as tar:
        for row, url in enumerate(rows_of_shard):
            with (here / "asked").open("a") as asked:
                asked.write(url["url"] + " ")
            url |= {"key": f"{number}{row}", "status": "success", "error_message": None}
            for extension, data in (("jpg", (here / "picture.jpg").read_bytes()), ("json", json.dumps(url).encode())):
                info = tarfile.TarInfo(f"{url['key']}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of_shard), out / f"{number:05d}.parquet")
    (out / f"{number:05d}_stats.json").touch()
"""


@pytest.mark.parametrize("fault", ["hang", "end"])
def test_an_interrupted_download_goes_on_at_its_shard(tmp_path, make_image, monkeypatch, fault):
    (tmp_path / "fake.py").write_text(_DOWNLOADER_WITHOUT_NETWORK)
    (tmp_path / "picture.jpg").write_bytes(make_image(0))
    (tmp_path / "fault").write_text(fault)
    monkeypatch.setattr(urls, "_DOWNLOADER", (str(tmp_path / "fake.py"),))
    monkeypatch.setattr(urls, "_URLS_PER_SHARD", 2)
    monkeypatch.setattr(urls, "_POLL_S", 0.01)
    monkeypatch.setattr("declip_cli.data.prepare.pipeline._REPORT_EVERY_S", -1.0)
    monkeypatch.setattr("declip_cli.data.prepare.executors._RECORDS_PER_TASK", 1)
    text = "".join(f"http://x/{n}\timage {n}\n" for n in range(14))
    (tmp_path / "Train_GCC-training.tsv").write_text(text)  # without a header, as published
    options = {"source": str(tmp_path / "Train_GCC-training.tsv"), "out": str(tmp_path / "out"), "workers": 1}
    reports = prepare(PrepareConfig(**options))
    if fault == "hang":
        next(report for report in reports if report.num_read == 2)
        reports.close()
    else:
        with pytest.raises(DataError, match="img2dataset stopped with exit code 1: the network is gone") as caught:
            list(reports)
        assert caught.value.remedy.endswith("the same command continues")
    assert (tmp_path / "asked").read_text().split() == [f"http://x/{n}" for n in range(6)]
    (tmp_path / "asked").unlink()
    (tmp_path / "fault").unlink()
    *_, report = prepare(PrepareConfig(**options))
    assert report.was_resumed
    assert (report.num_read, report.num_pairs) == (14, 14)
    assert (tmp_path / "asked").read_text().split() == [f"http://x/{n}" for n in range(6, 14)]
    store = open_dataset(str(tmp_path / "out"))
    assert [store.read(n).captions for n in range(14)] == [(f"image {n}",) for n in range(14)]
    assert not (tmp_path / "out" / "download").exists()


def test_a_downloaded_shard_that_is_cut_off_is_an_error(tmp_path, make_image, monkeypatch):
    damage = '(out / f"{number:05d}.tar").write_bytes((out / f"{number:05d}.tar").read_bytes()[:700])'
    touch = '    (out / f"{number:05d}_stats.json").touch()'
    (tmp_path / "fake.py").write_text(_DOWNLOADER_WITHOUT_NETWORK.replace(touch, f"    {damage}\n{touch}"))
    (tmp_path / "picture.jpg").write_bytes(make_image(0))
    monkeypatch.setattr(urls, "_DOWNLOADER", (str(tmp_path / "fake.py"),))
    monkeypatch.setattr(urls, "_URLS_PER_SHARD", 2)
    (tmp_path / "list.csv").write_text("url,caption\nhttp://x/0,zero\nhttp://x/1,one\n")
    with pytest.raises(DataError, match=r"00000.tar is damaged") as caught:
        list(prepare(PrepareConfig(source=str(tmp_path / "list.csv"), out=str(tmp_path / "out"), workers=1)))
    assert "00000_stats.json to download it again" in caught.value.remedy


def test_without_img2dataset_the_package_to_install_is_named(tmp_path, monkeypatch):
    (tmp_path / "list.csv").write_text("url,caption\nhttp://127.0.0.1/a.jpg,a\n")
    monkeypatch.setattr(urls, "find_spec", lambda name: None)
    config = PrepareConfig(source=str(tmp_path / "list.csv"), out=str(tmp_path / "out"))
    with pytest.raises(DataError, match="needs the package img2dataset") as caught:
        list(prepare(config))
    assert caught.value.remedy == "pip install 'declip[download]'"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("HTTP Error 403: Forbidden", "download: HTTP 403"),
        ("<urlopen error timed out>", "download: timed out"),
        ("<urlopen error [Errno -2] Name or service not known>", "download: no such host"),
        ("<urlopen error [Errno 111] Connection refused>", "download: connection refused"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED]>", "download: no secure connection"),
        ("Use of image disallowed by X-Robots-Tag directive", "download: not allowed by the site"),
        ("Remote end closed connection", "download: failed"),
    ],
)
def test_failures_are_sorted_by_cause(message, cause):
    assert name_failure(message) == cause
