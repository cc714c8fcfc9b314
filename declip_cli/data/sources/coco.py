"""COCO captions, and the files of Andrej Karpathy's splits of COCO, Flickr8k and Flickr30k."""

from collections.abc import Iterator
from typing import Any

from declip_cli.data import storage
from declip_cli.data.sources.locate import locate_pictures
from declip_cli.data.sources.records import BadRecord, Record, file_record
from declip_cli.errors import DataError
from declip_cli.files import parse_json

_SPLITS = {"": "", "train": "", "restval": "", "val": "val", "test": "test"}


def find_annotations(folder: str) -> list[str]:
    """Find COCO's caption files in a folder or in its `annotations` folder.

    Args:
        folder: local path or URL.

    Returns:
        Paths of `captions_*.json`.
    """
    found = []
    for below in (folder, storage.join(folder, "annotations")):
        names = storage.names_in(below) if storage.is_folder(below) else []
        is_captions = (n for n in names if n.startswith("captions_") and n.endswith(".json"))
        found += [storage.join(below, name) for name in is_captions]
    return found


def read_json(path: str) -> dict[str, Any]:
    """Read a whole JSON file with a list of `images`, and perhaps one of `annotations`.

    Args:
        path: local path or URL.

    Returns:
        The object.

    Raises:
        DataError: it is not such a file.
    """
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


def read_annotations(path: str, *, images: str = "", split: str | None = None) -> Iterator[Record]:
    """Read pairs from a caption file of COCO or of Karpathy's splits.

    Args:
        path: local path or URL of a JSON file.
        images: folder of the pictures; empty looks around the file.
        split: the only one of Karpathy's splits that is wanted; None takes all.

    Yields:
        One record per picture with all its captions. Pictures of Karpathy's `val` and `test` splits get these
        as their part, so that no training run sees them.

    Raises:
        DataError: the file is of another kind, or the pictures cannot be found.
    """
    content = read_json(path)
    if "annotations" in content:
        return _coco_records(content, path, images)
    rows = [row for row in content["images"] if split is None or row.get("split") == split]
    return _karpathy_records(rows, path, images)


def _coco_records(content: dict[str, Any], path: str, images: str) -> Iterator[Record]:
    captions: dict[str, list[object]] = {}
    for annotation in content["annotations"]:
        if "caption" in annotation:
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation["caption"])
    rows = content["images"]
    folder = locate_pictures(path, [str(row.get("file_name")) for row in rows[:100]], images=images)
    return (file_record(folder, row.get("file_name"), captions.get(str(row.get("id")), [])) for row in rows)


def _karpathy_records(rows: list[dict[str, Any]], path: str, images: str) -> Iterator[Record]:
    names = [_karpathy_name(row) for row in rows[:100]]
    folder = locate_pictures(path, names, images=images)
    for row in rows:
        sentences = row.get("sentences")
        captions: list[object] = [
            sentence.get("raw") if isinstance(sentence, dict) else sentence
            for sentence in (sentences if isinstance(sentences, list) else [])
        ]
        split = str(row.get("split", ""))
        if split not in _SPLITS:
            yield BadRecord(_karpathy_name(row), "unknown split")
        else:
            yield file_record(folder, _karpathy_name(row), captions, part=_SPLITS[split])


def _karpathy_name(row: dict[str, Any]) -> str:
    below, name = row.get("filepath", ""), str(row.get("filename", ""))
    return f"{below}/{name}" if below else name
