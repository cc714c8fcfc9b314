"""The YFCC15M list of CLIP: line numbers, photo ids and hashes that pick rows of the YFCC100M metadata."""

import bz2
import re
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, cast
from urllib.parse import unquote_plus

import numpy as np
from numpy.typing import NDArray

from declip_cli.data import storage
from declip_cli.data.sources.records import Found, Record, Rejected, locate_images
from declip_cli.errors import DataError

_METADATA = "yfcc100m_dataset"
_ID, _HASH, _TITLE, _DESCRIPTION, _MARKER = 1, 2, 8, 9, 24
_NUM_COLUMNS = 25
_TAG = re.compile(r"<[^<]+?>")
_LIST_LINE = re.compile(rb"\d+\t\d+\t[0-9a-f]{32}\s*")


def is_list(path: str) -> bool:
    """Return whether a file is CLIP's list: lines of line number, photo id and hash."""
    with storage.open_binary(path) as file:
        return bool(_LIST_LINE.fullmatch(file.readline(200)))


def read_yfcc15m(path: str, *, images: str = "") -> Iterator[Found]:
    """Read pairs that the list picks from the metadata beside it.

    Images are looked for as `abc/def/abcdef….jpg`, as the public bucket names them by hash. The title and the
    description are two captions of one image, as in SLIP's training.

    Args:
        path: local path or URL of `yfcc100m_subset_data.tsv`; `yfcc100m_dataset` or `yfcc100m_dataset.bz2`
            lies in the same folder.
        images: folder of the images; empty looks around the list.

    Yields:
        One record per image of the list that the metadata know.

    Raises:
        DataError: the metadata or the images are not there.

    Source: the list of CLIP, arXiv 2103.00020, section 2.2; SLIP, arXiv 2112.12750, appendix.
    """
    beside = storage.parent(path)
    names = [name for name in storage.names_in(beside) if name.startswith(_METADATA)]
    if not names:
        raise DataError(
            f"the list {path} holds no captions: {_METADATA} of YFCC100M is not beside it",
            remedy=f"download {_METADATA}.bz2 and put it into {beside}",
        )
    with storage.open_binary(path) as file:
        first = [_name(line.split(b"\t")[2].strip().decode()) for line in islice(file, 100)]
        file.seek(0)
        ids = np.fromiter((int(line.split(b"\t")[1]) for line in file if line.strip()), dtype=np.int64)
    return _records(storage.join(beside, names[0]), np.sort(ids), locate_images(path, first, images=images))


def _name(hashed: str) -> str:
    return f"{hashed[:3]}/{hashed[3:6]}/{hashed}.jpg"


def _records(metadata: str, ids: NDArray[np.int64], folder: str) -> Iterator[Found]:
    with storage.open_binary(metadata) as raw:
        file = cast(BinaryIO, bz2.BZ2File(raw)) if metadata.endswith(".bz2") else raw
        for number, line in enumerate(file, start=1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != _NUM_COLUMNS or not fields[_ID].isdigit():
                yield Rejected(f"{metadata}:{number}", "damaged line")
                continue
            at = int(np.searchsorted(ids, int(fields[_ID])))
            if at == len(ids) or ids[at] != int(fields[_ID]):
                continue
            key, texts = fields[_ID].decode(), [_clean(fields[column]) for column in (_TITLE, _DESCRIPTION)]
            image = storage.join(folder, _name(fields[_HASH].decode()))
            is_video = fields[_MARKER] == b"1"
            yield Rejected(key, "video") if is_video else Record(key, image, tuple(filter(None, texts)))


def _clean(field: bytes) -> str:
    return " ".join(_TAG.sub(" ", unquote_plus(field.decode("utf-8", "replace"))).split())
