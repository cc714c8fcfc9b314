"""Lists of captions as benchmarks publish them: COCO, Karpathy's splits, Flickr30k's `.token` and `results.csv`."""

import re
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

from declip_cli.data import storage
from declip_cli.data.sources.records import SPLIT_NAMES, Found, Rejected, file_record, locate_images
from declip_cli.errors import DataError
from declip_cli.files import parse_json

_TOKEN_LINE = re.compile(rb"([^\t#]+)#\w+\t(.*)")
_RESULTS_LINE = re.compile(rb"([^|]+)\|\s*\d+\s*\|?\s*(.*)")
"""One line of the published file lacks its second bar."""
_RESULTS_HEAD = re.compile(rb"(\xef\xbb\xbf)?image_name\s*\|")
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
    """Find at most one caption file of Flickr30k in a folder: Karpathy's JSON if there, else that of all captions."""
    names = storage.names_in(folder)
    karpathy = [name for name in names if name.startswith("dataset_") and name.endswith(".json")]
    lists = (storage.join(folder, name) for name in names if is_token_file(storage.join(folder, name)))
    return [storage.join(folder, name) for name in karpathy[:1]] or list(islice(lists, 1))


def is_token_file(path: str) -> bool:
    """Tell lists with lines of `name.jpg#0<TAB>caption` (`.token`) or `name.jpg| 0| caption` (`results.csv`)."""
    if not path.endswith("results.csv"):
        return path.endswith((".token", ".token.txt"))
    with storage.open_binary(path) as file:
        return bool(_RESULTS_HEAD.match(file.readline(100)))


def read_annotations(path: str, *, images: str = "", split: str | None = None) -> Iterator[Found]:
    """Read pairs from a caption file of COCO, of Karpathy's splits, or one that `is_token_file` knows.

    Args:
        path: local path or URL.
        images: folder of the images; empty looks around the file.
        split: the only one of Karpathy's splits that is wanted; None takes all.

    Yields:
        One record per image with all its captions. Images of Karpathy's `val` and `test` splits get these as
        their split, so that no training run sees them.

    Raises:
        DataError: the file is of another kind, or the images cannot be found.
    """
    if is_token_file(path):
        first = list(islice((name for name, _, _ in _token_lines(path)), _NUM_NAMES))
        return _token_records(path, locate_images(path, first, images=images))
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
            remedy="name its kind with --kind",
        ) from error


def _coco_records(content: dict[str, Any], path: str, images: str) -> Iterator[Found]:
    captions: dict[str, list[object]] = {}
    for annotation in content["annotations"]:
        if "caption" in annotation:
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation["caption"])
    rows = content["images"]
    folder = locate_images(path, [str(row.get("file_name")) for row in rows[:_NUM_NAMES]], images=images)
    return (file_record(folder, row.get("file_name"), captions.get(str(row.get("id")), [])) for row in rows)


def _karpathy_records(rows: list[dict[str, Any]], path: str, images: str) -> Iterator[Found]:
    folder = locate_images(path, [_karpathy_name(row) for row in rows[:_NUM_NAMES]], images=images)
    for row in rows:
        sentences, name, split = row.get("sentences"), _karpathy_name(row), str(row.get("split", ""))
        if split not in SPLIT_NAMES:
            yield Rejected(name, "unknown split")
            continue
        found = sentences if isinstance(sentences, list) else []
        captions = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in found]
        yield file_record(folder, name, captions, split=SPLIT_NAMES[split])


def _karpathy_name(row: dict[str, Any]) -> str:
    below, name = row.get("filepath", ""), str(row.get("filename", ""))
    return f"{below}/{name}" if below else name


def _token_records(path: str, folder: str) -> Iterator[Found]:
    """Make one record of the consecutive lines of an image."""
    for name, group in groupby(_token_lines(path), key=lambda line: line[0] or f"line {line[2]}"):
        lines = list(group)
        if not lines[0][0]:
            yield Rejected(name, "damaged line")
            continue
        try:
            yield file_record(folder, name, [caption.decode("utf-8") for _, caption, _ in lines])
        except UnicodeDecodeError:
            yield Rejected(name, "caption not UTF-8")


def _token_lines(path: str) -> Iterator[tuple[str, bytes, int]]:
    """Yield name, caption and line number; an empty name for a line of another form."""
    pattern = _RESULTS_LINE if path.endswith(".csv") else _TOKEN_LINE
    with storage.open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and _RESULTS_HEAD.match(line):
                continue
            if found := pattern.match(line):
                yield found[1].decode("utf-8", "replace"), found[2], number
            elif line.strip():
                yield "", b"", number
