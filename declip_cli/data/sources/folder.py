"""Folders of images with a list in `captions.jsonl` or text files beside them, and folders packed as tar archives."""

import gzip
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import BinaryIO, cast

from declip_cli.data import storage
from declip_cli.data.shards.tar_samples import IMAGE_EXTENSIONS, captions_of, captions_of_row, read_groups
from declip_cli.data.sources.records import Found, Record, Rejected, file_record
from declip_cli.data.sources.table import PROBLEM, json_row
from declip_cli.errors import DataError

CAPTIONS_FILE = "captions.jsonl"
TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz")
_BESIDE = ("json", "txt", "caption")


def find_lists(folder: str) -> list[str]:
    """Find every `captions.jsonl` in a folder, local or remote, and below, in a fixed order."""
    names = (name for name in storage.walk(folder) if name.rpartition("/")[2] == CAPTIONS_FILE)
    return [storage.join(folder, name) for name in names]


def read_lists(lists: list[str], *, root: str) -> Iterator[Found]:
    """Read pairs from lists of `{"file": …, "caption": …}` or `{"file": …, "captions": […]}`.

    Args:
        lists: paths of `captions.jsonl` files; images are named relative to each.
        root: keys are relative to this folder.

    Yields:
        One record per line, or why the line cannot be read.
    """
    for path in lists:
        folder = storage.parent(path)
        below = folder[len(root.rstrip("/")) :].strip("/") if folder.startswith(root) else ""
        prefix = f"{below}/" if below else ""
        with storage.open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row, where = json_row(line), f"{prefix}{CAPTIONS_FILE}:{number}"
                name = next((row[word] for word in ("file", "file_name", "filename", "image") if word in row), None)
                if PROBLEM in row or name is None:
                    yield Rejected(where, row.get(PROBLEM, "missing file name"))
                else:
                    yield file_record(folder, name, captions_of_row(row), prefix=prefix)


def group_by_stem(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find the caption files among names: name without extension → extensions of its caption files, as written."""
    stems: dict[str, tuple[str, ...]] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        if extension.lower() in _BESIDE:
            stems[stem] = (*stems.get(stem, ()), extension)
    return stems


def read_folder(folder: str, *, skip: str = "") -> Iterator[Found]:
    """Read pairs from images with a `.txt` or `.json` of the same name beside them.

    Args:
        folder: local path or URL; read with all its subfolders.
        skip: subfolder to leave alone, because the shards go there.

    Yields:
        One record per image; images without captions and captions without an image are left out.
    """
    shown = (name for name in storage.walk(folder) if not (skip and name.startswith(f"{skip}/")))
    for _, group in groupby(shown, key=lambda name: name.rpartition("/")[0]):
        names = list(group)
        texts, images = group_by_stem(names), dict[str, list[str]]()
        for name in names:
            stem, _, extension = name.rpartition(".")
            found = images.setdefault(stem, [])
            if extension.lower() in IMAGE_EXTENSIONS:
                found.append(name)
        for stem, found in images.items():
            beside = texts.get(stem, ())
            for name in found:
                record = Record(name, storage.join(folder, name), beside=beside)
                yield record if beside else Rejected(name, "missing caption")
            if beside and not found:
                yield Rejected(f"{stem}.{beside[0]}", "text without image", is_bad=False)


def tars_in(path: str) -> list[str]:
    """List the tar archives directly in a folder, local or remote; a file is the only one."""
    if not storage.is_folder(path):
        return [path]
    return [storage.join(path, name) for name in storage.names_in(path) if name.endswith(TAR_EXTENSIONS)]


def read_tars(shards: list[str]) -> Iterator[Found]:
    """Read pairs from `.tar` and `.tar.gz` archives of WebDataset and img2dataset, without unpacking them.

    Yields:
        One record per sample; what is none, and the end of an archive that ends too early, is left out.
    """
    for shard in shards:
        name = os.path.basename(shard)
        with storage.open_binary(shard) as raw:
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if shard.endswith("gz") else raw
            try:
                for group in read_groups(file, name, with_images=True):
                    key = f"{name}/{group.key}" if group.key != name else name
                    try:
                        image = group.parts.get(group.image_extension, b"")
                        problem, captions = group.problem, () if group.problem else captions_of(group)
                    except DataError as error:
                        problem = error.cause
                    yield Rejected(key, problem) if problem else Record(key, image, captions)
            except (EOFError, gzip.BadGzipFile):
                yield Rejected(name, "truncated tar")
