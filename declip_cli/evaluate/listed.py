"""The images of a data set with all that a search shows of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from declip_cli.data.dataset import Dataset, Pixels, Skips
from declip_cli.errors import DataError


@dataclass(frozen=True, slots=True)
class ListedPicture:
    """One picture to be searched."""

    path: str
    read: Callable[[], bytes | Pixels]
    stamp: str
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureList:
    """The pictures of one source."""

    name: str
    pictures: list[ListedPicture]
    skipped: Skips


def list_dataset(dataset: Dataset) -> PictureList:
    """List the images of a data set, each key once."""
    found: dict[str, ListedPicture] = {}
    skipped = Skips(dataset.skipped)
    for number in range(len(dataset)):
        try:
            key = dataset.key(number)
        except DataError as error:
            skipped.add(error.cause, str(number))
            continue
        found.setdefault(
            key, ListedPicture(key, partial(_read, dataset, number), dataset.stamp(number), _caption(dataset, number))
        )
    return PictureList(name=dataset.name, pictures=list(found.values()), skipped=skipped)


def _caption(dataset: Dataset, number: int) -> str:
    try:
        return next(iter(dataset.captions(number)), "")
    except DataError:
        return ""


def _read(dataset: Dataset, number: int) -> bytes | Pixels:
    return dataset.read(number).image
