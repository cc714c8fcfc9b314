"""Flickr30k and Flickr8k as their authors give them: a `.token` file beside a folder of pictures."""

import re
from collections.abc import Iterator
from itertools import groupby

from declip_cli.data import storage
from declip_cli.data.sources.locate import locate_pictures
from declip_cli.data.sources.records import BadRecord, Record, file_record

_LINE = re.compile(rb"([^\t#]+)#\w+\t(.*)")


def find_lists(folder: str) -> list[str]:
    """Find the caption file of Flickr30k in a folder: Karpathy's JSON if there, else the `.token` file.

    Args:
        folder: local path or URL.

    Returns:
        At most one path.
    """
    names = storage.names_in(folder)
    karpathy = [name for name in names if name.startswith("dataset_") and name.endswith(".json")]
    tokens = [name for name in names if is_token_file(name)]
    return [storage.join(folder, name) for name in (karpathy + tokens)[:1]]


def is_token_file(path: str) -> bool:
    """Say whether a name is that of a `.token` file, such as `results_20130124.token`."""
    return path.endswith((".token", ".token.txt"))


def read_tokens(path: str, *, images: str = "") -> Iterator[Record]:
    """Read pairs from lines of `name.jpg#0<TAB>caption`.

    Args:
        path: local path or URL of the list.
        images: folder of the pictures; empty looks around the file.

    Yields:
        One record per picture with its captions, which stand in consecutive lines.

    Raises:
        DataError: the pictures cannot be found.
    """
    names = (name for name, _, _ in _lines(path))
    first = [name for name, _ in zip(names, range(100), strict=False)]
    return _records(path, locate_pictures(path, first, images=images))


def _records(path: str, folder: str) -> Iterator[Record]:
    for name, group in groupby(_lines(path), key=lambda line: line[0] or f"line {line[2]}"):
        lines = list(group)
        if not lines[0][0]:
            yield BadRecord(name, "damaged line")
            continue
        try:
            yield file_record(folder, name, [caption.decode("utf-8") for _, caption, _ in lines])
        except UnicodeDecodeError:
            yield BadRecord(name, "caption not UTF-8")


def _lines(path: str) -> Iterator[tuple[str, bytes, int]]:
    """Yield name, caption and line number; an empty name for a line of another form."""
    with storage.open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            found = _LINE.match(line)
            if found:
                yield found[1].decode("utf-8", "replace"), found[2], number
            elif line.strip():
                yield "", b"", number
