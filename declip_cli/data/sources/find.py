"""Recognise what a source is by looking at it, and open it."""

import json
import os
from collections.abc import Iterator

from declip_cli.data import storage
from declip_cli.data.prepare_config import PrepareConfig, SourceKind
from declip_cli.data.sources import folder, table, tars
from declip_cli.data.sources.records import Record, Source
from declip_cli.errors import DataError

_HELP = "a folder, a table, a .tar pattern, a COCO or Flickr30k file, or a list of URLs; or say --kind"


def open_source(config: PrepareConfig) -> Source:
    """Open the source of a run.

    Args:
        config: source, kind, columns and picture folder count here.

    Returns:
        Its kind and records.

    Raises:
        DataError: it is missing, or cannot be read as any kind or as the kind asked for.
    """
    path = config.source.rstrip("/") or "/"
    paths = storage.expand(path)
    missing = [found for found in paths if not storage.is_file(found) and not storage.is_folder(found)]
    if missing or not paths:
        raise DataError(f"no such file or folder: {(missing or [path])[0]}", remedy=f"SOURCE is {_HELP}")
    _below(path, config.out)
    kind = config.kind or _recognise(paths)
    if len(paths) > 1 and kind != "tars":
        raise DataError(f"{path} means {len(paths)} files; only tars may be several", remedy="give one file")
    return _open(kind, paths, config)


def _open(kind: SourceKind, paths: list[str], config: PrepareConfig) -> Source:
    path = paths[0]
    if kind == "captions":
        lists = [path] if storage.is_file(path) else folder.find_lists(path)
        _need(lists, path, folder.CAPTIONS_FILE)
        root = storage.parent(path) if storage.is_file(path) else path
        return Source(kind, folder.read_lists(lists, root=root), sum(map(_num_lines, lists)))
    if kind == "folder":
        return Source(kind, folder.read_folder(path, skip=_below(path, config.out)))
    if kind == "tars":
        shards = [shard for found in paths for shard in _tars_in(found)]
        _need(shards, path, ".tar")
        return Source(kind, tars.read_tars(shards))
    return Source(kind, _table(path, config))


def _table(path: str, config: PrepareConfig) -> Iterator[Record]:
    return table.read_table(
        path, image_column=config.image_column, caption_columns=config.caption_columns, images=config.images
    )


def _below(path: str, out: str) -> str:
    """Return the output folder relative to the source, where it lies inside it."""
    if storage.is_remote(path) or storage.is_remote(out):
        return out.removeprefix(path + "/").rstrip("/") if out.startswith(path + "/") else ""
    relative = os.path.relpath(out, path)
    if relative == ".":
        raise DataError(f"source and output are the same folder {path}", remedy="choose another --out")
    return "" if relative.startswith("..") else relative.replace(os.sep, "/")


def _need(found: list[str], path: str, what: str) -> None:
    if not found:
        raise DataError(f"no {what} file in {path}", remedy="check the path, or leave --kind away")


def _tars_in(path: str) -> list[str]:
    if not storage.is_folder(path):
        return [path]
    names = [name for name in storage.names_in(path) if name.endswith(tars.TAR_EXTENSIONS)]
    return [storage.join(path, name) for name in names]


def _num_lines(path: str) -> int:
    with storage.open_binary(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _recognise(paths: list[str]) -> SourceKind:
    path = paths[0]
    if storage.is_folder(path):
        return _recognise_folder(path)
    if path.endswith(tars.TAR_EXTENSIONS):
        return "tars"
    if path.rpartition("/")[2] == folder.CAPTIONS_FILE:
        return "captions"
    if path.endswith(".json"):
        return _recognise_json(path)
    if path.endswith(table.TABLE_EXTENSIONS):
        return "table"
    raise DataError(f"cannot tell what {path} is", remedy=f"SOURCE is {_HELP}")


def _recognise_folder(path: str) -> SourceKind:
    if _tars_in(path):
        return "tars"
    if folder.find_lists(path):
        return "captions"
    return "folder"


def _recognise_json(path: str) -> SourceKind:
    with storage.open_binary(path) as file:
        line = file.readline(1 << 20)
    try:
        return "table" if isinstance(json.loads(line), dict) else "coco"
    except ValueError:
        return "coco"
