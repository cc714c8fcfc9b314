"""The looks of evaluation pictures, which must not be trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from declip_cli.data import storage
from declip_cli.data.prepare.clean import perceptual_hash
from declip_cli.data.prepare.engines import run_in_threads
from declip_cli.data.prepare.pictures import decode_for_looks
from declip_cli.data.prepare.seen import Looks
from declip_cli.data.samples import SampleStore
from declip_cli.data.shards.store import open_shards
from declip_cli.data.shards.tar_samples import PICTURE_EXTENSIONS
from declip_cli.data.sources.records import read_picture
from declip_cli.errors import DataError


@dataclass(frozen=True, slots=True)
class Excluded:
    """Pictures to be kept out."""

    looks: Looks
    num_pictures: int
    num_unreadable: int


def look_at(folders: Sequence[str], *, workers: int = 0) -> Excluded:
    """Hash the looks of all pictures in some folders.

    Args:
        folders: local paths or URLs, each with pictures in it and below, or with tar shards.
        workers: threads; 0 takes the cores there are.

    Returns:
        Their looks.

    Raises:
        DataError: a folder is missing or holds no picture.
    """
    looks, num_pictures, num_unreadable = Looks(), 0, 0
    for folder in folders:
        before = num_pictures
        for looks_hash in _hashes(folder, workers):
            num_pictures += 1
            num_unreadable += looks_hash < 0
            looks.add(max(looks_hash, 0))
        if num_pictures - num_unreadable == before:
            raise DataError(f"no picture to exclude in {folder}", remedy="check --exclude")
    return Excluded(looks, num_pictures, num_unreadable)


def _hashes(folder: str, workers: int) -> Iterator[int]:
    """Yield one hash per picture, -1 for one that cannot be read."""
    if not storage.is_folder(folder):
        raise DataError(f"no such folder: {folder}", remedy="check --exclude")
    if any(name.endswith(".tar") for name in storage.names_in(folder)):
        store = cast(SampleStore, open_shards([folder]))
        numbers = range(len(store))
        yield from run_in_threads(lambda batch: [_sample_hash(store, n) for n in batch], numbers, workers=workers)
        return
    names = (name for name in storage.walk(folder) if name.rpartition(".")[2].lower() in PICTURE_EXTENSIONS)
    paths = (storage.join(folder, name) for name in names)
    yield from run_in_threads(lambda batch: [_file_hash(path) for path in batch], paths, workers=workers)


def _sample_hash(store: SampleStore, number: int) -> int:
    try:
        return _hash(store.read(number).encoded)
    except DataError:
        return -1


def _file_hash(path: str) -> int:
    try:
        return _hash(read_picture(path))
    except DataError:
        return -1


def _hash(data: bytes) -> int:
    return perceptual_hash(decode_for_looks(data))
