"""Lists of picture URLs with captions, downloaded piece by piece with img2dataset."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.state import spool_of
from declip_cli.data.shards import storage
from declip_cli.data.shards.tar_format import read_members
from declip_cli.data.shards.tar_samples import is_unicode
from declip_cli.data.sources import table
from declip_cli.data.sources.records import BadRecord, BytesRecord, Record
from declip_cli.errors import DataError

URLS_PER_PIECE = 20_000
"""Bounds the disk taken by originals: two pieces of them, about 10 GB with photographs of 250 kB."""
_URLS_PER_SHARD = 1_000  # a power of ten, so that img2dataset's keys are the row numbers
_DOWNLOADER = ("-m", "declip_cli.data.sources.img2dataset_process")
_TIMEOUT_S = 10
_RETRIES = 1
_THREADS = 64
_FAILURES = (
    (re.compile(r"HTTP Error (\d+)"), "download: HTTP {}"),
    (re.compile(r"timed out|timeout", re.IGNORECASE), "download: timed out"),
    (re.compile(r"Name or service not known|getaddrinfo|nodename"), "download: no such host"),
    (re.compile(r"refused"), "download: connection refused"),
    (re.compile(r"certificate|SSL", re.IGNORECASE), "download: no secure connection"),
    (re.compile(r"disallowed|noai|noindex", re.IGNORECASE), "download: not allowed by the site"),
    (re.compile(r"unknown url type|no host given|Invalid URL", re.IGNORECASE), "download: not a URL"),
)


@dataclass(frozen=True, slots=True)
class _Row:
    url: str
    captions: tuple[object, ...]
    problem: str = ""


def check_list(path: str, config: PrepareConfig) -> tuple[str, list[str]]:
    """Check that a list can be downloaded, before anything is.

    Args:
        path: CSV, TSV, JSON lines or Parquet, local or remote.
        config: columns count here.

    Returns:
        The column of URLs and those of captions.

    Raises:
        DataError: img2dataset is not installed, or a column is missing.
    """
    if find_spec("img2dataset") is None:
        raise DataError(
            "downloading pictures needs the package img2dataset (which runs on Python before 3.13)",
            remedy="pip install 'declip[download]'",
        )
    columns = table.columns_of(path)
    wanted = [config.image_column] if config.image_column else []
    url = table.choose_columns(path, columns, wanted=wanted, usual=table.URL_COLUMNS, option="--image-column")[0]
    captions = table.choose_columns(
        path, columns, wanted=config.caption_columns, usual=table.CAPTION_COLUMNS, option="--caption-column"
    )
    return url, captions


def read_urls(path: str, config: PrepareConfig, *, start: int = 0) -> Iterator[Record]:
    """Read pairs from a table of URLs and captions, downloading the pictures.

    Args:
        path: as of `check_list`.
        config: columns and output folder count here.
        start: number of the first record wanted; whole pieces before it are not downloaded again.

    Yields:
        One record per row, in order; a bad one says why a picture could not be had.

    Raises:
        DataError: as of `check_list`.
    """
    url, captions = check_list(path, config)
    rows = (_row(row, number, url, captions) for number, row in enumerate(table.read_rows(path), start=1))
    return _download_all(rows, os.path.join(spool_of(config.out), "download"), start)


def _row(row: table.Row, number: int, url: str, captions: list[str]) -> _Row:
    if "" in row:
        return _Row(f"row {number}", (), row[""])
    texts = tuple(text for column in captions for text in table.as_list(row.get(column)))
    address = row.get(url)
    if not isinstance(address, str) or not address.isprintable() or not address:
        return _Row(f"row {number}", (), "missing URL")
    if not all(map(is_unicode, (address, *texts))):
        return _Row(f"row {number}", (), "caption not UTF-8")
    return _Row(address, texts)


def _download_all(rows: Iterator[_Row], folder: str, start: int) -> Iterator[Record]:
    first_piece, skip = divmod(start, URLS_PER_PIECE)
    remaining = islice(rows, first_piece * URLS_PER_PIECE, None)
    pieces = (_Piece(list(islice(remaining, URLS_PER_PIECE)), folder, n) for n in _count(first_piece))
    running = [next(pieces)]
    try:
        while running[0].rows:
            running.append(next(pieces))  # downloads while the first one is read
            yield from islice(running[0].records(), skip, None)
            skip = 0
            running.pop(0).delete()
    finally:
        for piece in running:
            piece.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _count(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


class _Piece:
    """Some rows being downloaded by a process of their own; what is there already is not asked for again."""

    def __init__(self, rows: list[_Row], folder: str, number: int) -> None:
        self.rows = rows
        self._folder = Path(folder) / f"piece-{number:05d}"
        self._process: subprocess.Popen[bytes] | None = None
        if rows:
            self._start()

    def _start(self) -> None:
        with storage.disk_errors(str(self._folder)):
            self._folder.mkdir(parents=True, exist_ok=True)
            url_list, settings = self._folder / "urls.jsonl", self._folder / "settings.json"
            addresses = (row.url if not row.problem else "" for row in self.rows)
            content = "".join(json.dumps({"url": address}) + "\n" for address in addresses)
            if url_list.exists() and url_list.read_text() != content:
                self.delete()  # of another list
                self._folder.mkdir(parents=True)
            url_list.write_text(content)
            settings.write_text(json.dumps(self._settings(url_list)))
            with (self._folder / "log.txt").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, *_DOWNLOADER, str(settings)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"},
                    start_new_session=True,
                )

    def _settings(self, url_list: Path) -> dict[str, object]:
        return {
            "url_list": str(url_list),
            "input_format": "jsonl",
            "output_folder": str(self._folder / "pictures"),
            "output_format": "webdataset",
            "disable_all_reencoding": True,
            "resize_mode": "no",
            "extract_exif": False,
            "compute_hash": None,
            "number_sample_per_shard": _URLS_PER_SHARD,
            "processes_count": max(1, min(os.cpu_count() or 1, len(self.rows) // _URLS_PER_SHARD)),
            "thread_count": _THREADS,
            "timeout": _TIMEOUT_S,
            "retries": _RETRIES,
            "incremental_mode": "incremental",
        }

    def records(self) -> Iterator[Record]:
        """Wait for the download, then yield one record per row in order."""
        longest_s = 300 + len(self.rows) * _TIMEOUT_S * (_RETRIES + 1) / _THREADS * 4
        assert self._process is not None
        try:
            self._process.wait(timeout=longest_s)
        except subprocess.TimeoutExpired:
            self.stop()
        found = self._pictures()
        if not found and self._process.returncode not in (0, None) and not self._failures():
            log = (self._folder / "log.txt").read_text(errors="replace").strip().splitlines()
            raise DataError(
                f"img2dataset stopped with exit code {self._process.returncode}: {log[-1] if log else 'no message'}",
                remedy=f"see {self._folder / 'log.txt'}",
            )
        failures = self._failures()
        for number, row in enumerate(self.rows):
            if row.problem:
                yield BadRecord(row.url, row.problem)
            elif number in found:
                tar, start, num_bytes = found[number]
                with tar.open("rb") as file:
                    file.seek(start)
                    yield BytesRecord(row.url, file.read(num_bytes), row.captions)
            else:
                yield BadRecord(row.url, failures.get(number, "download: gave up"))

    def _pictures(self) -> dict[int, tuple[Path, int, int]]:
        """Return row number → where its picture stands."""
        found = {}
        for tar in sorted((self._folder / "pictures").glob("*.tar")):
            with tar.open("rb") as file:
                try:
                    for member, _ in read_members(file, str(tar), wants=lambda member: False):
                        stem, _, extension = member.name.partition(".")
                        if extension == "jpg" and stem.isdigit():
                            found[int(stem)] = (tar, member.data_start, member.num_bytes)
                except DataError:  # cut off with its process; its missing rows are counted below
                    continue
        return found

    def _failures(self) -> dict[int, str]:
        """Return row number → cause, for what img2dataset reports as failed."""
        import pyarrow.parquet

        causes = {}
        for path in sorted((self._folder / "pictures").glob("*.parquet")):
            rows = pyarrow.parquet.read_table(path, columns=["key", "status", "error_message"]).to_pylist()
            for row in rows:
                if row["status"] != "success":
                    causes[int(row["key"])] = name_failure(row["error_message"] or "")
        return causes

    def delete(self) -> None:
        """Free the disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """End the download; what is there stays for the next run."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def name_failure(message: str) -> str:
    """Sort the message of a failed download under one of a few causes.

    Args:
        message: as img2dataset reports it.

    Returns:
        The cause, beginning with `download: `.
    """
    for pattern, cause in _FAILURES:
        found = pattern.search(message)
        if found:
            return cause.format(*found.groups())
    return "download: failed"
