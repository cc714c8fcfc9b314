"""Lists of image URLs with captions: img2dataset downloads them into tar shards, which are read as they come."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from declip_cli.cores import own_cores
from declip_cli.data import storage
from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.state import download_folder
from declip_cli.data.shards.tar_samples import is_unicode
from declip_cli.data.sources import table
from declip_cli.data.sources.records import Found, Record, Rejected
from declip_cli.errors import DataError

_URLS_PER_SHARD = 1_000
_SETTINGS = {
    "input_format": "parquet",
    "output_format": "webdataset",
    "save_additional_columns": ["captions", "problem"],
    "disable_all_reencoding": True,
    "resize_mode": "no",
    "extract_exif": False,
    "compute_hash": None,
    "number_sample_per_shard": _URLS_PER_SHARD,
    "thread_count": 64,
    "timeout": 10,
    "retries": 1,
}
_DOWNLOADER = ("-m", "declip_cli.data.prepare.img2dataset_process")
_POLL_S = 0.2
_FAILURES = {
    r"HTTP Error (\d+)": "download: HTTP {}",
    r"(?i)time(?:d )?out": "download: timed out",
    r"Name or service not known|getaddrinfo|nodename": "download: no such host",
    r"refused": "download: connection refused",
    r"(?i)certificate|SSL": "download: no secure connection",
    r"(?i)disallowed|noai|noindex": "download: not allowed by the site",
    r"(?i)unknown url type|no host given|Invalid URL": "download: not a URL",
}


def read_urls(path: str, config: PrepareConfig) -> Iterator[Found]:
    """Read pairs from a table of URLs and captions, downloading the images.

    The originals stay in a folder beside the output until all are prepared (about 250 kB a photograph); a download
    that was interrupted goes on at the first shard that is not whole.

    Args:
        path: a table, local or remote.
        config: columns and output folder count here.

    Returns:
        One record per row, in order, or why an image could not be had.

    Raises:
        DataError: img2dataset is not installed, a column is missing, or, on the way, img2dataset has stopped early.
    """
    if find_spec("img2dataset") is None:
        raise DataError(
            "downloading images needs the package img2dataset (which runs on Python before 3.13)",
            remedy="pip install 'declip[download]'",
        )
    url, captions = table.choose_columns(path, config.image_column, config.caption_columns, usual=table.URL_COLUMNS)
    rows = (_row(row, number, url, captions) for number, row in enumerate(table.read_rows(path), start=1))
    return _read(rows, Path(download_folder(config.out)))


def _row(row: table.Row, number: int, url: str, captions: list[str]) -> dict[str, object]:
    address, texts = row.get(url), [text for column in captions for text in table.as_list(row.get(column))]
    problem = row.get(table.PROBLEM, "")
    if not problem and not (isinstance(address, str) and address and address.isprintable()):
        problem = "missing URL"
    if not problem and not all(isinstance(text, str) for text in texts):
        problem = "caption not text"
    if not problem and not all(map(is_unicode, texts)):
        problem = "caption not UTF-8"
    if problem:  # this is no address, so that nothing is asked for
        return {"url": f"row {number}", "captions": [], "problem": problem}
    return {"url": address, "captions": texts, "problem": ""}


def _read(rows: Iterator[dict[str, object]], folder: Path) -> Iterator[Found]:
    with storage.disk_errors(str(folder)):
        num_shards = -(-_write_list(rows, folder / "list.parquet") // _URLS_PER_SHARD)
        process = _start(folder, max(1, min(num_shards, len(own_cores()))))
    try:
        for number in range(num_shards):
            _wait_for(folder / "shards" / f"{number:05d}_stats.json", process, folder / "log.txt")
            yield from _records(folder / "shards" / f"{number:05d}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write_list(rows: Iterator[dict[str, object]], path: Path) -> int:
    """Write the rows as img2dataset wants them, unless a run before has; return how many there are."""
    import pyarrow
    import pyarrow.parquet

    text, temporary = pyarrow.string(), path.with_suffix(".tmp")
    schema = pyarrow.schema([("url", text), ("captions", pyarrow.list_(text)), ("problem", text)])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            while some := list(islice(rows, 10_000)):
                writer.write_table(pyarrow.Table.from_pylist(some, schema))
        temporary.rename(path)
    return int(pyarrow.parquet.read_metadata(path).num_rows)


def _start(folder: Path, num_processes: int) -> subprocess.Popen[bytes]:
    places = {"url_list": str(folder / "list.parquet"), "output_folder": str(folder / "shards")}
    settings = json.dumps(_SETTINGS | places | {"processes_count": num_processes})
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *_DOWNLOADER, settings],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"},
            start_new_session=True,
        )


def _wait_for(stats: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until img2dataset says that a shard is whole."""
    has_ended = False
    while not stats.exists():
        if has_ended:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise DataError(
                f"img2dataset stopped with exit code {process.returncode}: {lines[-1]}",
                remedy=f"see {log}; the same command continues",
            )
        has_ended = process.poll() is not None
        time.sleep(_POLL_S)


def _records(shard: Path) -> Iterator[Found]:
    """Read a shard in the order of the list, whatever came first; its samples are named by their place in it."""
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(f"{shard}.parquet").to_pylist()
    try:
        with tarfile.open(f"{shard}.tar") as tar:
            members = {member.name: member for member in tar}
            for row in sorted(rows, key=lambda row: str(row["key"])):
                member = members.get(f"{row['key']}.jpg")  # as img2dataset names whatever came
                if row["status"] == "success" and member is not None:
                    yield Record(row["url"], cast(IO[bytes], tar.extractfile(member)).read(), tuple(row["captions"]))
                else:
                    yield Rejected(row["url"], row["problem"] or name_failure(row["error_message"] or ""))
    except tarfile.TarError as error:
        remedy = f"delete {shard}_stats.json to download it again, then run the same command again"
        raise DataError(f"{shard}.tar is damaged: {error}", remedy=remedy) from error


def name_failure(message: str) -> str:
    """Sort img2dataset's message about a failed download under one of a few causes, `download: …`."""
    for pattern, cause in _FAILURES.items():
        if found := re.search(pattern, message):
            return cause.format(*found.groups())
    return "download: failed"
