"""Lists of captions as benchmarks publish them: COCO, Karpathy's splits, the `.token` files of Flickr30k and 8k."""

import re
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

from declip_cli.data import storage
from declip_cli.data.sources.records import Found, LeftOut, file_record, locate_pictures
from declip_cli.errors import DataError
from declip_cli.files import parse_json

_PART_OF_SPLIT = {"": "", "train": "", "restval": "", "val": "val", "test": "test"}
_TOKEN_LINE = re.compile(rb"([^\t#]+)#\w+\t(.*)")
_NUM_NAMES = 100


def find_coco(folder: str) -> list[str]:
    """Find COCO's `captions_*.json` in a folder, local or remote, or in its `annotations` folder."""
    return [
        storage.join(below, name)
        for below in (folder, storage.join(folder, "annotations"))
        for name in storage.names_in(below)
        if name.startswith("captions_") and name.endswith(".json")
    ]


def find_flickr(folder: str) -> list[str]:
    """Find at most one caption file of Flickr30k in a folder: Karpathy's JSON if there, else the `.token` file."""
    names = storage.names_in(folder)
    karpathy = [name for name in names if name.startswith("dataset_") and name.endswith(".json")]
    return [storage.join(folder, name) for name in (karpathy + list(filter(is_token_file, names)))[:1]]


def is_token_file(path: str) -> bool:
    """Say whether a name is that of a `.token` file, such as `results_20130124.token`."""
    return path.endswith((".token", ".token.txt"))


def read_annotations(path: str, *, images: str = "", split: str | None = None) -> Iterator[Found]:
    """Read pairs from a caption file of COCO, of Karpathy's splits, or with lines of `name.jpg#0<TAB>caption`.

    Args:
        path: local path or URL.
        images: folder of the images; empty looks around the file.
        split: the only one of Karpathy's splits that is wanted; None takes all.

    Yields:
        One record per image with all its captions. Images of Karpathy's `val` and `test` splits get these as
        their part, so that no training run sees them.

    Raises:
        DataError: the file is of another kind, or the images cannot be found.
    """
    if is_token_file(path):
        first = list(islice((name for name, _, _ in _token_lines(path)), _NUM_NAMES))
        return _token_records(path, locate_pictures(path, first, images=images))
    content = _read_json(path)
    if "annotations" in content:
        return _coco_records(content, path, images)
    rows = [row for row in content["images"] if split is None or row.get("split") == split]
    return _karpathy_records(rows, path, images)


def _read_json(path: str) -> dict[str, Any]:
    """Read a whole JSON file with a list of `images`, and perhaps one of `annotations`."""
    try:
        content = parse_json(storage.read_bytes(path))
        for rows in (content["images"], content.get("annotations", [])):
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise TypeError("a list of objects is expected")
        return dict(content)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is neither COCO captions nor a Karpathy split: no list of images ({error})",
            remedy="say what it is with --kind",
        ) from error


def _coco_records(content: dict[str, Any], path: str, images: str) -> Iterator[Found]:
    captions: dict[str, list[object]] = {}
    for annotation in content["annotations"]:
        if "caption" in annotation:
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation["caption"])
    rows = content["images"]
    folder = locate_pictures(path, [str(row.get("file_name")) for row in rows[:_NUM_NAMES]], images=images)
    return (file_record(folder, row.get("file_name"), captions.get(str(row.get("id")), [])) for row in rows)


def _karpathy_records(rows: list[dict[str, Any]], path: str, images: str) -> Iterator[Found]:
    folder = locate_pictures(path, [_karpathy_name(row) for row in rows[:_NUM_NAMES]], images=images)
    for row in rows:
        sentences, name, split = row.get("sentences"), _karpathy_name(row), str(row.get("split", ""))
        if split not in _PART_OF_SPLIT:
            yield LeftOut(name, "unknown split")
            continue
        found = sentences if isinstance(sentences, list) else []
        captions = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in found]
        yield file_record(folder, name, captions, part=_PART_OF_SPLIT[split])


def _karpathy_name(row: dict[str, Any]) -> str:
    below, name = row.get("filepath", ""), str(row.get("filename", ""))
    return f"{below}/{name}" if below else name


def _token_records(path: str, folder: str) -> Iterator[Found]:
    """Make one record of the consecutive lines of an image."""
    for name, group in groupby(_token_lines(path), key=lambda line: line[0] or f"line {line[2]}"):
        lines = list(group)
        if not lines[0][0]:
            yield LeftOut(name, "damaged line")
            continue
        try:
            yield file_record(folder, name, [caption.decode("utf-8") for _, caption, _ in lines])
        except UnicodeDecodeError:
            yield LeftOut(name, "caption not UTF-8")


def _token_lines(path: str) -> Iterator[tuple[str, bytes, int]]:
    """Yield name, caption and line number; an empty name for a line of another form."""
    with storage.open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if found := _TOKEN_LINE.match(line):
                yield found[1].decode("utf-8", "replace"), found[2], number
            elif line.strip():
                yield "", b"", number
