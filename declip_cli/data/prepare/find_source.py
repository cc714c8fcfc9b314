"""Recognise what a source is by looking at it, and open it."""

import os
from collections.abc import Iterator

from declip_cli.config_checks import require
from declip_cli.data import storage
from declip_cli.data.benchmarks.known import known_sets
from declip_cli.data.catalogue import has_captions, open_dataset
from declip_cli.data.prepare import urls
from declip_cli.data.prepare.config import PrepareConfig, SourceKind
from declip_cli.data.sources import coco, flickr30k, folder, table, tars, yfcc15m
from declip_cli.data.sources.locate import locate_pictures
from declip_cli.data.sources.records import BytesRecord, Record, Source
from declip_cli.errors import DataError
from declip_cli.files import parse_json

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
    known = known_sets().get(config.source)
    if known is not None and not (known.markers and storage.is_folder(config.source)):
        return _open_known(known.name)
    path = config.source.rstrip("/") or "/"
    paths = storage.expand(path)
    missing = [found for found in paths if not storage.is_file(found) and not storage.is_folder(found)]
    if missing or not paths:
        raise DataError(f"no such file or folder: {(missing or [path])[0]}", remedy=f"SOURCE is {_HELP}")
    skip = _below(path, config.out)
    kind = config.kind or recognise(paths[0])
    if len(paths) > 1 and kind != "tars":
        raise DataError(f"{path} means {len(paths)} files; only tars may be several", remedy="give one file")
    _refuse_options(kind, config)
    return _open(kind, path, paths, config, skip)


def _open(kind: SourceKind, path: str, paths: list[str], config: PrepareConfig, skip: str) -> Source:
    images = config.images
    match kind:
        case "captions":
            lists = _need([path] if storage.is_file(path) else folder.find_lists(path), path, folder.CAPTIONS_FILE)
            root = storage.parent(path) if storage.is_file(path) else path
            return Source(kind, folder.read_lists(lists, root=root), sum(map(_num_lines, lists)))
        case "tars":
            return Source(
                kind, tars.read_tars(_need([tar for found in paths for tar in _tars_in(found)], path, ".tar"))
            )
        case "table":
            image, captions = config.image_column, config.caption_columns
            return Source(kind, table.read_table(path, image_column=image, caption_columns=captions, images=images))
        case "declip":
            return Source(kind, _read_declip(path, images), _num_lines(path))
        case "coco":
            lists = coco.find_annotations(path) if storage.is_folder(path) else [path]
            return Source(kind, _annotations(_need(lists, path, "captions_*.json"), images))
        case "flickr30k":
            lists = flickr30k.find_lists(path) if storage.is_folder(path) else [path]
            return Source(kind, _annotations(_need(lists, path, "dataset_*.json or .token"), images))
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
        remedy="omit --images, or say --kind",
    )


def _open_known(name: str) -> Source:
    """Read the training and the test split of a known set that has both, and captions."""
    if "train" not in known_sets()[name].splits:
        raise DataError(f"{name} has no training pairs to prepare", remedy="name the file with its captions")
    parts = {"": open_dataset(name, "train"), "test": open_dataset(name, "test")}
    if not has_captions(parts[""]):
        raise DataError(f"{name} has classes and no captions to prepare", remedy="declip zeroshot " + name)

    def records() -> Iterator[Record]:
        for part, dataset in parts.items():
            for number in range(len(dataset)):
                found = dataset.read(number)
                yield BytesRecord(found.key, found.encoded, found.captions, part)

    return Source(name, records(), sum(map(len, parts.values())))


def _read_declip(path: str, images: str) -> Iterator[Record]:
    rows = (row for row in table.read_rows(path) if isinstance(row.get("filename"), str))
    names = [row["filename"] for row, _ in zip(rows, range(100), strict=False)]
    try:
        images = locate_pictures(path, names, images=images)
    except DataError as error:
        raise DataError(error.message, remedy="--images FOLDER, or --kind urls to download the images") from error
    return table.read_table(path, image_column="filename", caption_columns=["caption"], images=images)


def _annotations(lists: list[str], images: str) -> Iterator[Record]:
    for path in lists:
        if flickr30k.is_token_file(path):
            yield from flickr30k.read_tokens(path, images=images)
        else:
            yield from coco.read_annotations(path, images=images)


def _below(path: str, out: str) -> str:
    """Return the output folder relative to the source, where it lies inside it."""
    if storage.is_remote(path) or storage.is_remote(out):
        return out.removeprefix(path + "/").rstrip("/") if out.startswith(path + "/") else ""
    relative = os.path.relpath(out, path)
    if relative == ".":
        raise DataError(f"source and output are the same folder {path}", remedy="choose another --out")
    return "" if relative.startswith("..") else relative.replace(os.sep, "/")


def _need(found: list[str], path: str, what: str) -> list[str]:
    if not found:
        raise DataError(f"no {what} file in {path}", remedy="check the path, or omit --kind")
    return found


def _tars_in(path: str) -> list[str]:
    if not storage.is_folder(path):
        return [path]
    names = [name for name in storage.names_in(path) if name.endswith(tars.TAR_EXTENSIONS)]
    return [storage.join(path, name) for name in names]


def _num_lines(path: str) -> int:
    """Count lines for the progress bar, where that does not mean a download; 0 is unknown."""
    if storage.is_remote(path) or path.endswith(".parquet"):
        return 0
    with storage.open_binary(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def recognise(path: str) -> SourceKind:
    """Tell what kind of source a path is.

    Args:
        path: of a file or folder that exists.

    Returns:
        The kind.

    Raises:
        DataError: it is like none.
    """
    name = path.rpartition("/")[2]
    if storage.is_folder(path):
        return _recognise_folder(path)
    if name.endswith(tars.TAR_EXTENSIONS):
        return "tars"
    if name == folder.CAPTIONS_FILE:
        return "captions"
    if flickr30k.is_token_file(name):
        return "flickr30k"
    if name.endswith(".json") and not _is_json_lines(path):
        return "coco"
    if name.endswith(".tsv") and yfcc15m.is_list(path):
        return "yfcc15m"
    if name.endswith(table.TABLE_EXTENSIONS):
        return _recognise_table(path)
    raise DataError(f"cannot tell what {path} is", remedy=f"SOURCE is {_HELP}")


def _recognise_folder(path: str) -> SourceKind:
    if _tars_in(path):
        return "tars"
    if coco.find_annotations(path):
        return "coco"
    if flickr30k.find_lists(path):
        return "flickr30k"
    return "captions" if folder.find_lists(path) else "folder"


def _is_json_lines(path: str) -> bool:
    with storage.open_binary(path) as file:
        line = file.readline(1 << 20)
    try:
        return isinstance(parse_json(line), dict) and b'"images"' not in line
    except ValueError:
        return False


def _recognise_table(path: str) -> SourceKind:
    columns = table.columns_of(path)
    if {"filename", "caption", "url"} <= set(columns):
        return "declip"
    lower = {column.lower() for column in columns}
    has_pictures = bool(lower & set(table.IMAGE_COLUMNS))
    return "urls" if lower & set(table.URL_COLUMNS) and not has_pictures else "table"
