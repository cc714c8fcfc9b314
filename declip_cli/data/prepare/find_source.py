"""Recognize what a source is by looking at it, and open it."""

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial

from declip_cli.data import storage
from declip_cli.data.benchmarks.known import known_sets
from declip_cli.data.catalog import has_captions, open_dataset
from declip_cli.data.prepare import urls
from declip_cli.data.prepare.config import PrepareConfig, SourceKind
from declip_cli.data.sources import annotations, folder, table, yfcc15m
from declip_cli.data.sources.records import Found, Record, Source, locate_images
from declip_cli.errors import DataError, require
from declip_cli.files import parse_json

_HELP = "a folder, a table, a .tar pattern, a COCO or Flickr30k file, or a list of URLs; or set --kind"
_IN_FOLDERS: dict[SourceKind, tuple[Callable[[str], list[str]], str]] = {
    "tars": (folder.tars_in, ".tar"),
    "coco": (annotations.find_coco, "captions_*.json"),
    "flickr30k": (annotations.find_flickr, "dataset_*.json, .token or results.csv"),
    "captions": (folder.find_lists, folder.CAPTIONS_FILE),
    "table": (table.find_tables, ".parquet"),
}
"""What finds the files of a kind in a folder, and what they are called; the first kind that is there counts."""


def open_source(config: PrepareConfig) -> Source:
    """Open the source of a run, of which source, kind, columns, image folder and output count here.

    Raises:
        DataError: it is missing, or cannot be read as any kind or as the kind asked for.
    """
    known = known_sets().get(config.source)
    if known is not None and not (known.markers and storage.is_folder(config.source)):
        return _open_known(known.name)
    path = config.source.rstrip("/") or "/"
    paths = storage.expand(path)
    missing = [found for found in paths if not storage.is_file(found) and not storage.is_folder(found)]
    if missing or not paths:
        raise DataError(f"no such file or folder: {(missing or [path])[0]}", remedy=f"SOURCE is {_HELP}")
    skip = _below(path, config.out)
    kind = config.kind or recognize(paths[0])
    if len(paths) > 1 and kind != "tars":
        raise DataError(f"{path} means {len(paths)} files; only tars may be several", remedy="give one file")
    _refuse_options(kind, config)
    return _open(kind, path, paths, config, skip)


def _open(kind: SourceKind, path: str, paths: list[str], config: PrepareConfig, skip: str) -> Source:
    image, captions, images = config.image_column, config.caption_columns, config.images
    match kind:
        case "captions":
            lists, root = _files(kind, path), path if storage.is_folder(path) else storage.parent(path)
            return Source(kind, folder.read_lists(lists, root=root), sum(map(_num_lines, lists)))
        case "tars":
            return Source(kind, folder.read_tars([tar for found in paths for tar in _files(kind, found)]))
        case "table":
            read = partial(table.read_table, image_column=image, caption_columns=captions, images=images)
            return Source(kind, itertools.chain.from_iterable(map(read, _files(kind, path))))
        case "declip":
            return Source(kind, _read_declip(path, images), _num_lines(path))
        case "coco" | "flickr30k":
            splits = (annotations.read_annotations(found, images=images) for found in _files(kind, path))
            return Source(kind, itertools.chain.from_iterable(splits))
        case "yfcc15m":
            return Source(kind, yfcc15m.read_yfcc15m(path, images=images))
        case "urls":
            return Source(kind, urls.read_urls(path, config), _num_lines(path), is_download=True)
    return Source(kind, folder.read_folder(path, skip=skip))


def _refuse_options(kind: SourceKind, config: PrepareConfig) -> None:
    """Raise ConfigError for options that this kind of source would not look at."""
    has_columns = bool(config.image_column or config.caption_columns)
    require(
        kind in ("table", "urls") or not has_columns,
        f"--image-column and --caption-column are for tables, but {config.source} is taken for: {kind}",
        remedy="omit them, or --kind table",
    )
    require(
        kind in ("table", "declip", "coco", "flickr30k", "yfcc15m") or not config.images,
        f"--images is for lists of file names, but {config.source} is taken for: {kind}",
        remedy="omit --images, or set --kind",
    )


def _open_known(name: str) -> Source:
    """Read the training and the test split of a known set that has both, and captions."""
    if "train" not in known_sets()[name].splits:
        raise DataError(f"{name} has no training pairs to prepare", remedy="name the file with its captions")
    splits = {"": open_dataset(name, "train"), "test": open_dataset(name, "test")}
    if not has_captions(splits[""]):
        raise DataError(f"{name} has classes and no captions to prepare", remedy="declip zeroshot " + name)

    def records() -> Iterator[Found]:
        for split, dataset in splits.items():
            for index in range(len(dataset)):
                found = dataset.read(index)
                yield Record(found.key, found.encoded, found.captions, split)

    return Source(name, records(), sum(map(len, splits.values())))


def _read_declip(path: str, images: str) -> Iterator[Found]:
    rows = (row for row in table.read_rows(path) if isinstance(row.get("filename"), str))
    names = [row["filename"] for row in itertools.islice(rows, 100)]
    try:
        images = locate_images(path, names, images=images)
    except DataError as error:
        raise DataError(error.message, remedy="--images FOLDER, or --kind urls to download the images") from error
    return table.read_table(path, image_column="filename", caption_columns=["caption"], images=images)


def _below(path: str, out: str) -> str:
    """Return the output folder relative to the source, where it lies inside it."""
    if storage.is_remote(path) or storage.is_remote(out):
        return out.removeprefix(path + "/").rstrip("/") if out.startswith(path + "/") else ""
    relative = os.path.relpath(out, path)
    if relative == ".":
        raise DataError(f"source and output are the same folder {path}", remedy="choose another --out")
    return "" if relative.startswith("..") else relative.replace(os.sep, "/")


def _files(kind: SourceKind, path: str) -> list[str]:
    find, what = _IN_FOLDERS[kind]
    found = find(path) if storage.is_folder(path) else [path]
    if not found:
        raise DataError(f"no {what} file in {path}", remedy="check the path, or omit --kind")
    return found


def _num_lines(path: str) -> int:
    """Count lines for the progress bar, where that does not mean a download; 0 is unknown."""
    if storage.is_remote(path) or path.endswith(".parquet"):
        return 0
    with storage.open_binary(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def recognize(path: str) -> SourceKind:
    """Tell what kind of source a file or folder that exists is.

    Raises:
        DataError: it is like none.
    """
    name = path.rpartition("/")[2]
    if storage.is_folder(path):
        return next((kind for kind, (find, _) in _IN_FOLDERS.items() if find(path)), "folder")
    if name.endswith(folder.TAR_EXTENSIONS):
        return "tars"
    if name == folder.CAPTIONS_FILE:
        return "captions"
    if annotations.is_token_file(path):
        return "flickr30k"
    if name.endswith(".json") and not _is_json_lines(path):
        return "coco"
    if name.endswith(".tsv") and yfcc15m.is_list(path):
        return "yfcc15m"
    if not name.endswith(table.TABLE_EXTENSIONS):
        raise DataError(f"cannot tell what {path} is", remedy=f"SOURCE is {_HELP}")
    columns = table.columns_of(path)
    lower = {column.lower() for column in columns}
    if {"filename", "caption", "url"} <= set(columns):
        return "declip"
    return "urls" if lower & set(table.URL_COLUMNS) and not lower & set(table.IMAGE_COLUMNS) else "table"


def _is_json_lines(path: str) -> bool:
    with storage.open_binary(path) as file:
        line = file.readline(1 << 20)
    try:
        return isinstance(parse_json(line), dict) and b'"images"' not in line
    except ValueError:
        return False
