"""Where the pictures lie that a list names."""

import itertools
from collections.abc import Iterator, Sequence

from declip_cli.data import storage
from declip_cli.errors import DataError

_NUM_TRIED = 20


def locate_pictures(path: str, names: Sequence[str], *, images: str = "") -> str:
    """Find the folder that the names of a list start from.

    Args:
        path: of the list.
        names: of pictures; the first few are looked for.
        images: the folder if the user says so; empty looks beside the list, in the folders beside it, and in
            those beside its own folder, two deep, as COCO and Flickr30k are unpacked.

    Returns:
        The folder, in which at least one of the pictures is.

    Raises:
        DataError: none is anywhere, or `images` is no folder.
    """
    if images:
        if not storage.is_folder(images):
            raise DataError(f"no such folder: {images}", remedy="check --images")
        return images
    beside = storage.parent(path)
    tried = list(names[:_NUM_TRIED])
    for folder in itertools.chain([beside], _folders_in(beside, 2), _folders_in(_above(beside), 2)):
        if any(storage.is_file(storage.join(folder, name)) for name in tried):
            return folder
    first = tried[0] if tried else "any picture"
    raise DataError(
        f"cannot find the pictures of {path}: no {first} in the folders around it", remedy="--images FOLDER"
    )


def _above(folder: str) -> str:
    return storage.parent(folder.rstrip("/")) if storage.is_remote(folder) else storage.join(folder, "..")


def _folders_in(folder: str, depth: int) -> Iterator[str]:
    for name in storage.folders_in(folder):
        below = storage.join(folder, name)
        yield below
        if depth > 1:
            yield from _folders_in(below, depth - 1)
