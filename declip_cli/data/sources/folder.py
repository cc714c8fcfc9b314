"""Folders of pictures: with a list in `captions.jsonl`, or with a text file beside each picture."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from declip_cli.data import storage
from declip_cli.data.shards.tar_samples import PICTURE_EXTENSIONS, captions_of_row
from declip_cli.data.sources.records import BadRecord, FileRecord, Record, file_record
from declip_cli.files import parse_json

CAPTIONS_FILE = "captions.jsonl"
_BESIDE = ("json", "txt", "caption")


def find_lists(folder: str) -> list[str]:
    """Find every `captions.jsonl` in a folder and below, in a fixed order.

    Args:
        folder: local path or URL.

    Returns:
        Paths.
    """
    names = (name for name in storage.walk(folder) if name.rpartition("/")[2] == CAPTIONS_FILE)
    return [storage.join(folder, name) for name in names]


def read_lists(lists: list[str], *, root: str) -> Iterator[Record]:
    """Read pairs from lists of `{"file": …, "caption": …}` or `{"file": …, "captions": […]}`.

    Args:
        lists: paths of `captions.jsonl` files; pictures are named relative to each.
        root: keys are relative to this folder.

    Yields:
        One record per line, a bad one for a line that cannot be read.
    """
    for path in lists:
        folder = storage.parent(path)
        below = folder[len(root.rstrip("/")) :].strip("/") if folder.startswith(root) else ""
        prefix = f"{below}/" if below else ""
        with storage.open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _read_line(line, folder, prefix, f"{prefix}{CAPTIONS_FILE}:{number}")


def _read_line(line: bytes, folder: str, prefix: str, place: str) -> Record:
    try:
        row = parse_json(line)
    except UnicodeDecodeError:
        return BadRecord(place, "caption not UTF-8")
    except ValueError:
        return BadRecord(place, "damaged line")
    if not isinstance(row, dict):
        return BadRecord(place, "damaged line")
    name = next((row[word] for word in ("file", "file_name", "filename", "image") if word in row), None)
    if name is None:
        return BadRecord(place, "missing file name")
    record = file_record(folder, name, captions_of_row(row))
    if not prefix or isinstance(record, BadRecord):
        return record
    return file_record(folder[: -len(prefix)] or ".", prefix + str(name), captions_of_row(row))


def group_by_stem(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find the caption files that stand beside images.

    Args:
        names: of all files, relative to one folder.

    Returns:
        Name without extension → extensions of its caption files, as written.
    """
    stems: dict[str, tuple[str, ...]] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        if extension.lower() in _BESIDE:
            stems[stem] = (*stems.get(stem, ()), extension)
    return stems


def read_folder(folder: str, *, skip: str = "") -> Iterator[Record]:
    """Read pairs from images with a `.txt` or `.json` of the same name beside them.

    Args:
        folder: local path or URL; read with all its subfolders.
        skip: subfolder to leave alone, because the shards go there.

    Yields:
        One record per image, and a bad one for each caption without an image.
    """
    shown = (name for name in storage.walk(folder) if not (skip and name.startswith(f"{skip}/")))
    for _, names in groupby(shown, key=lambda name: name.rpartition("/")[0]):
        yield from _read_names(folder, list(names))


def _read_names(root: str, names: list[str]) -> Iterator[Record]:
    texts = group_by_stem(names)
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(name.rpartition(".")[0], []).append(name)
    for stem, found in stems.items():
        images = [name for name in found if name.rpartition(".")[2].lower() in PICTURE_EXTENSIONS]
        for name in images:
            if stem in texts:
                yield FileRecord(name, storage.join(root, name), beside=texts[stem])
            else:
                yield BadRecord(name, "missing caption")
        if stem in texts and not images:
            yield BadRecord(f"{stem}.{texts[stem][0]}", "text without picture", is_bad=False)
