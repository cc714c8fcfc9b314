"""Tables with an image and one or several captions a row: CSV, TSV, JSON lines, Parquet."""

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from declip_cli.data import storage
from declip_cli.data.shards.tar_samples import IMAGE_EXTENSIONS, is_unicode
from declip_cli.data.sources.records import SPLIT_NAMES, Found, Record, Rejected
from declip_cli.errors import DataError
from declip_cli.files import parse_json

TABLE_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".parquet", ".json")
IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "image_path", "filepath", "path", "img", "image_name")
CAPTION_COLUMNS = ("caption", "captions", "text", "caption_text", "title", "comment", "sentence", "alt_text")
URL_COLUMNS = ("url", "image_url", "img_url", "image_link")

Row: TypeAlias = dict[str, Any]
PROBLEM = "\0"
"""The only column of a row that cannot be read; its value says why."""
_MAX_FIELD_CHARS = 1 << 24
_IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


def read_rows(path: str) -> Iterator[Row]:
    """Read a table row by row, in constant memory.

    Args:
        path: local path or URL; the extension says the format.

    Raises:
        DataError: there is no header, or pyarrow is needed and missing.
    """
    if path.endswith(".parquet"):
        return _parquet_rows(path)
    return _json_rows(path) if path.endswith((".jsonl", ".json")) else _text_rows(path)


def find_tables(folder: str) -> list[str]:
    """Find Parquet files in a folder, local or remote, or in its folder `data`, as Hugging Face has them.

    Parquet beside images or other folders, as img2dataset writes it, is about these and not a table of its own.
    """
    names = storage.names_in(folder)
    if set(storage.folders_in(folder)) - {"data"} or any(name.lower().endswith(_IMAGE_SUFFIXES) for name in names):
        return []
    places = (folder, storage.join(folder, "data"))
    found = [[storage.join(where, n) for n in storage.names_in(where) if n.endswith(".parquet")] for where in places]
    return found[0] or found[1]


def columns_of(path: str) -> list[str]:
    """List the columns of a table: its header, or the keys of its first JSON object; errors as in `read_rows`."""
    if path.endswith(".parquet"):
        with _open_parquet(path) as table:
            return [str(name) for name in table.schema_arrow.names]
    if path.endswith((".jsonl", ".json")):
        return next((list(row) for row in _json_rows(path) if PROBLEM not in row), [])
    with storage.open_binary(path) as raw:
        return _header(raw.readline(_MAX_FIELD_CHARS).decode("utf-8-sig", "replace"), path)[0]


def _header(line: str, path: str) -> tuple[list[str], str, bool]:
    """Return column names, the delimiter, and whether the line is a header at all.

    Lists of URLs such as CC3M and CC12M have none: two columns, one of which is a URL.
    """
    if not line.strip():
        raise DataError(f"the table {path} is empty", remedy="its first line must name the columns")
    delimiter = "\t" if path.endswith(".tsv") else max(",;\t|", key=line.count)
    names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    is_url = [name.startswith(("http://", "https://")) for name in names]
    if len(names) == 2 and sum(is_url) == 1:
        return ["url" if yes else "caption" for yes in is_url], delimiter, False
    return names, delimiter, True


def _text_rows(path: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    with storage.open_binary(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        first = text.readline(_MAX_FIELD_CHARS)
        names, delimiter, is_header = _header(first, path)
        lines = text if is_header else itertools.chain([first], text)
        if delimiter == "\t":
            reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(lines, delimiter=delimiter)
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield {PROBLEM: f"damaged row: {error}"}
                continue
            if len(values) == len(names):
                yield dict(zip(names, (value.strip() for value in values), strict=True))
            elif values:
                yield {PROBLEM: "wrong number of columns"}


def _json_rows(path: str) -> Iterator[Row]:
    with storage.open_binary(path) as raw:
        yield from (json_row(line) for line in raw if line.strip())


def json_row(line: bytes) -> Row:
    """Parse one line of JSON lines."""
    try:
        row = parse_json(line)
    except UnicodeDecodeError:
        return {PROBLEM: "caption not UTF-8"}
    except ValueError:
        row = None
    return row if isinstance(row, dict) and PROBLEM not in row else {PROBLEM: "damaged line"}


@contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs the package pyarrow", remedy="pip install 'declip[tables]'") from error
    with storage.open_binary(path) as file:
        try:
            yield pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path} is not a Parquet file: {error}", remedy="check the file") from error


def _parquet_rows(path: str) -> Iterator[Row]:
    with _open_parquet(path) as table:
        for batch in table.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def choose_columns(
    path: str, image: str, captions: Sequence[str], *, usual: Sequence[str] = IMAGE_COLUMNS
) -> tuple[str, list[str]]:
    """Find the column that holds images, or their addresses, and those that hold captions.

    What the user asked for counts, else the first usual name that is there, upper and lower case alike.

    Raises:
        DataError: a wanted column is missing, or no usual one is there.
    """
    columns = columns_of(path)
    found = _choose(path, columns, [image] if image else [], usual, "--image-column")
    return found[0], _choose(path, columns, captions, CAPTION_COLUMNS, "--caption-column")


def _choose(path: str, columns: list[str], wanted: Sequence[str], usual: Sequence[str], option: str) -> list[str]:
    there = ", ".join(columns) or "none"
    for name in wanted:
        if name not in columns:
            raise DataError(f"{path} has no column {name!r} (it has: {there})", remedy=f"{option} with one of these")
    lower = {column.lower(): column for column in reversed(columns)}
    found = list(wanted) or [lower[name] for name in usual if name in lower][:1]
    if not found:
        raise DataError(
            f"{path} has no column of a usual name such as {usual[0]!r} (it has: {there})",
            remedy=f"choose one with {option}",
        )
    return found


def read_table(
    path: str, *, image_column: str = "", caption_columns: Sequence[str] = (), images: str = ""
) -> Iterator[Found]:
    """Read pairs from a table; consecutive rows with the same image become one pair with several captions.

    Args:
        path: as in `read_rows`.
        image_column: holds a path, or in Parquet the encoded image; empty looks for a usual name.
        caption_columns: each holds a caption, or in JSON and Parquet a list of them; empty looks for usual names.
        images: folder that paths start from; empty is the table's own.

    Yields:
        One record per image, or why a row cannot be read. Images whose column `split` says `val` or `test` get these
        as their split, as in Hugging Face's Flickr30k, so that no training run sees them.

    Raises:
        DataError: a column is missing.
    """
    image, captions = choose_columns(path, image_column, caption_columns)
    return _records(path, image, captions, images or storage.parent(path))


def _records(path: str, image: str, captions: Sequence[str], folder: str) -> Iterator[Found]:
    numbered = enumerate(read_rows(path), start=1)
    for _, group in itertools.groupby(numbered, key=lambda pair: _sameness(pair, image)):
        rows = list(group)
        number, first = rows[0]
        where, value, problem = f"row {number}", first.get(image), first.get(PROBLEM, "")
        split = SPLIT_NAMES.get(str(first.get("split", "")).lower(), "")
        texts = tuple(text for _, row in rows for column in captions for text in as_list(row.get(column)))
        if isinstance(value, dict) and value.get("bytes"):  # as Hugging Face writes images
            where, value = str(value.get("path") or where), value["bytes"]
        if not problem and not all(map(is_unicode, texts)):
            problem = "caption not UTF-8"
        if problem:
            yield Rejected(f"row {number}", problem)
        elif isinstance(value, bytes):
            yield Record(where, value, texts, split)
        elif isinstance(value, str) and value:
            address = value if storage.is_remote(value) else storage.join(folder, value)
            yield Record(value, address, texts, split)
        else:
            yield Rejected(where, "missing file name")


def _sameness(pair: tuple[int, Row], image: str) -> object:
    number, row = pair
    value = row.get(image)
    return value if isinstance(value, str) and value and PROBLEM not in row else number


def as_list(value: object) -> list[object]:
    """Return what a cell holds as a list: nothing, one value, or the list it is."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
