"""The looks of evaluation images, which must not be trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from declip_cli.data.catalogue import open_dataset
from declip_cli.data.dataset import UNREAD, Dataset
from declip_cli.data.prepare.clean import perceptual_hash
from declip_cli.data.prepare.engines import run_in_threads
from declip_cli.data.prepare.pictures import decode_for_looks
from declip_cli.data.prepare.seen import Looks
from declip_cli.errors import DataError


@dataclass(slots=True)
class Excluded:
    """Images to be kept out."""

    looks: Looks = field(default_factory=Looks)
    num_pictures: int = 0
    num_unreadable: int = 0


def look_at(names: Sequence[str], *, workers: int = 0) -> Excluded:
    """Hash the looks of all images of some data sets.

    Args:
        names: folders of images or of shards, local or URLs, or known sets, as `open_dataset` takes them.
        workers: threads; 0 takes the cores there are.

    Returns:
        Their looks.

    Raises:
        DataError: one is missing, holds no image, or cannot be read for now.
    """
    excluded = Excluded()
    for name in names:
        try:
            data = open_dataset(name)
            hashes = list(run_in_threads(partial(_hashes, data), range(len(data)), workers=workers))
        except DataError as error:
            raise DataError(f"cannot exclude {name}: {error.message}", remedy="check --exclude") from error
        if max(hashes, default=-1) < 0:
            raise DataError(f"no image to exclude in {name}", remedy="check --exclude")
        excluded.num_pictures += len(hashes)
        excluded.num_unreadable += hashes.count(-1)
        for looks_hash in hashes:
            excluded.looks.add(max(looks_hash, 0))
    return excluded


def _hashes(data: Dataset, numbers: Sequence[int]) -> list[int]:
    return [_hash(data, number) for number in numbers]


def _hash(data: Dataset, number: int) -> int:
    """Return the perceptual hash of one image, -1 if the image is damaged."""
    try:
        image = data.read(number).image
        return perceptual_hash(decode_for_looks(image) if isinstance(image, bytes) else image)
    except DataError as error:
        if error.cause == UNREAD:
            raise
        return -1
