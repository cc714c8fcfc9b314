"""The YFCC15M list of CLIP: line numbers, photo ids and hashes that pick rows of the YFCC100M metadata."""

import bz2
import re
from collections.abc import Iterator
from typing import BinaryIO, cast
from urllib.parse import unquote_plus

import numpy as np
from numpy.typing import NDArray

from declip_cli.data import storage
from declip_cli.data.sources.locate import locate_pictures
from declip_cli.data.sources.records import BadRecord, FileRecord, Record
from declip_cli.errors import DataError

_METADATA = "yfcc100m_dataset"
_ID, _HASH, _TITLE, _DESCRIPTION, _MARKER = 1, 2, 8, 9, 24
_NUM_COLUMNS = 25
_TAG = re.compile(r"<[^<]+?>")
_LIST_LINE = re.compile(rb"\d+\t\d+\t[0-9a-f]{32}\s*")


def is_list(path: str) -> bool:
    """Say whether a file is CLIP's list: lines of line number, photo id and hash."""
    with storage.open_binary(path) as file:
        return bool(_LIST_LINE.fullmatch(file.readline(200)))


def read_yfcc15m(path: str, *, images: str = "") -> Iterator[Record]:
    """Read pairs that the list picks from the metadata beside it.

    Pictures are looked for as `abc/def/abcdef….jpg`, as the public bucket names them by hash. The title and the
    description are two captions of one picture, as in SLIP's training.

    Args:
        path: local path or URL of `yfcc100m_subset_data.tsv`; `yfcc100m_dataset` or `yfcc100m_dataset.bz2`
            lies in the same folder.
        images: folder of the pictures; empty looks around the list.

    Yields:
        One record per picture of the list that the metadata know.

    Raises:
        DataError: the metadata or the pictures are not there.

    Source: the list of CLIP, arXiv 2103.00020, section 2.2; SLIP, arXiv 2112.12750, appendix.
    """
    ids = _read_ids(path)
    names = [name for name in storage.names_in(storage.parent(path)) if name.startswith(_METADATA)]
    if not names:
        raise DataError(
            f"the list {path} holds no captions: {_METADATA} of YFCC100M is not beside it",
            remedy=f"download {_METADATA}.bz2 and put it into {storage.parent(path)}",
        )
    with storage.open_binary(path) as file:
        first = [_name(line.split(b"\t")[2].strip().decode()) for line, _ in zip(file, range(100), strict=False)]
    folder = locate_pictures(path, first, images=images)
    return _records(storage.join(storage.parent(path), names[0]), ids, folder)


def _read_ids(path: str) -> NDArray[np.int64]:
    with storage.open_binary(path) as file:
        ids = np.fromiter((int(line.split(b"\t")[1]) for line in file if line.strip()), dtype=np.int64)
    ids.sort()
    return ids


def _name(hashed: str) -> str:
    return f"{hashed[:3]}/{hashed[3:6]}/{hashed}.jpg"


def _records(metadata: str, ids: NDArray[np.int64], folder: str) -> Iterator[Record]:
    with storage.open_binary(metadata) as raw:
        file = cast(BinaryIO, bz2.BZ2File(raw)) if metadata.endswith(".bz2") else raw
        for number, line in enumerate(file, start=1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != _NUM_COLUMNS or not fields[_ID].isdigit():
                yield BadRecord(f"{metadata}:{number}", "damaged line")
                continue
            at = int(np.searchsorted(ids, int(fields[_ID])))
            if at < len(ids) and ids[at] == int(fields[_ID]):
                yield _record(fields, folder)


def _record(fields: list[bytes], folder: str) -> Record:
    key = fields[_ID].decode()
    if fields[_MARKER] == b"1":
        return BadRecord(key, "video")
    texts = [_clean(fields[column]) for column in (_TITLE, _DESCRIPTION)]
    return FileRecord(key, storage.join(folder, _name(fields[_HASH].decode())), tuple(filter(None, texts)))


def _clean(field: bytes) -> str:
    return " ".join(_TAG.sub(" ", unquote_plus(field.decode("utf-8", "replace"))).split())
