"""Folders of pictures: with a list in `captions.jsonl`, or with a text file beside each picture."""

from collections.abc import Iterator
from dataclasses import dataclass

from declip_cli.data import storage
from declip_cli.data.samples import RawSample
from declip_cli.data.shards.tar_samples import PICTURE_EXTENSIONS, Group, captions_of, captions_of_row
from declip_cli.data.sources.records import BadRecord, Record, file_record, read_picture
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


@dataclass(frozen=True, slots=True)
class BesideRecord:
    """A picture with its captions in files of the same name beside it."""

    key: str
    path: str
    extensions: tuple[str, ...]
    """Of the caption files, as written."""
    part: str = ""

    def load(self) -> RawSample:
        """Read the pair; see `Record.load`."""
        stem = self.path.rpartition(".")[0]
        group = Group(self.key)
        for extension in self.extensions:
            group.parts[extension.lower()] = read_picture(f"{stem}.{extension}")
        return RawSample(self.key, read_picture(self.path), captions_of(group))


def read_folder(folder: str, *, skip: str = "") -> Iterator[Record]:
    """Read pairs from pictures with a `.txt` or `.json` of the same name beside them.

    Args:
        folder: local path or URL; read with all its subfolders.
        skip: subfolder to leave alone, because the shards go there.

    Yields:
        One record per picture, and a bad one for each caption without a picture.
    """
    below, names = "", list[str]()
    for path in storage.walk(folder):
        folder_of_path, _, name = path.rpartition("/")
        if skip and f"{folder_of_path}/".startswith(f"{skip}/"):
            continue
        if folder_of_path != below:
            yield from _read_names(folder, below, names)
            below, names = folder_of_path, []
        names.append(name)
    yield from _read_names(folder, below, names)


def _read_names(root: str, below: str, names: list[str]) -> Iterator[Record]:
    stems: dict[str, list[str]] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        stems.setdefault(stem, []).append(extension)
    for stem, extensions in stems.items():
        pictures = [extension for extension in extensions if extension.lower() in PICTURE_EXTENSIONS]
        texts = tuple(extension for extension in extensions if extension.lower() in _BESIDE)
        base = f"{below}/{stem}" if below else stem
        for picture in pictures:
            key = f"{base}.{picture}"
            if texts:
                yield BesideRecord(key, storage.join(root, key), texts)
            else:
                yield BadRecord(key, "missing caption")
        if texts and not pictures:
            yield BadRecord(f"{base}.{texts[0]}", "text without picture", is_bad=False)
