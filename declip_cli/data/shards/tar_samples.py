"""Which members of a tar archive make one image-text pair, in the layout of WebDataset and img2dataset."""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias, cast

from declip_cli.errors import DataError
from declip_cli.files import parse_json

IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "ppm", "pgm", "jfif", "avif"
)  # fmt: skip
CAPTION_EXTENSIONS = ("json", "txt", "caption")
MAX_MEMBER_BYTES = 256 << 20
"""Larger members are no photographs; they are counted, not read."""
Span: TypeAlias = tuple[int, int]
"""Offset of a member's content in its archive, and size, in bytes."""
_MAX_HEADER_BYTES = 1 << 20  # a longer "long name" is no name but an attack or damage
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_TRUNCATED, _DAMAGED = "truncated tar", "damaged tar"


@dataclass(slots=True)
class Group:
    """Consecutive members whose names differ in the extension only: one sample."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Extension in lower case, without the first dot → content, empty where not read."""
    spans: dict[str, Span] = field(default_factory=dict)
    """Extension → where that member lies."""
    problem: str = ""
    """Why this is no sample, in the words it is counted under; empty if all is well."""

    @property
    def image_extension(self) -> str:
        """Extension of the image, empty if there is none."""
        return next((extension for extension in IMAGE_EXTENSIONS if extension in self.parts), "")

    @property
    def has_captions(self) -> bool:
        """Return whether there is a member for captions."""
        return any(extension in self.parts for extension in CAPTION_EXTENSIONS)


def split_name(name: str) -> tuple[str, str]:
    """Divide a member's name such as `a/1.seg.PNG` into its sample's key, `a/1`, and the extension, `seg.png`."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


class _Headers:
    """What tarfile reads headers from; refuses names and records so long that only an attack has them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header of more than a megabyte")
        self.last = self._file.read(size)
        return self.last


def _members(
    file: BinaryIO, archive: str, wants: Callable[[tarfile.TarInfo], bool]
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Go through the files of an archive; those wanted come with their content, damage is a DataError at its place."""
    headers, end, is_whole = _Headers(file), 0, True
    try:
        with tarfile.open(fileobj=cast(Any, headers), mode="r:", encoding="utf-8", errors="replace") as tar:
            while is_whole and (info := tar.next()) is not None:
                if info.size < 0 or not end <= info.offset < info.offset_data <= tar.offset:
                    raise tarfile.ReadError("a member points backwards")
                end, data = tar.offset, b""
                if info.type not in _FILES or info.issparse() or _is_hidden(info.name):
                    continue
                is_wanted = wants(info)
                if info.size:
                    file.seek(info.offset_data if is_wanted else info.offset_data + info.size - 1)
                    data = file.read(info.size if is_wanted else 1)
                    is_whole = len(data) == (info.size if is_wanted else 1)
                if is_whole:
                    yield info, data if is_wanted else b""
                    cast(Any, tar).members.clear()  # tarfile would keep them all
        cause = "" if headers.last == bytes(tarfile.BLOCKSIZE) else _DAMAGED
    except (OSError, EOFError, DataError):
        raise
    except Exception:  # whatever tarfile makes of a hostile header
        cause = _DAMAGED
    if not is_whole or len(headers.last) < tarfile.BLOCKSIZE:
        cause = _TRUNCATED
    if cause:
        raise DataError(f"{archive} is a {cause}", remedy="download or pack this archive again", cause=cause)


def read_groups(file: BinaryIO, archive: str, *, with_images: bool) -> Iterator[Group]:
    """Go through the samples of a tar archive in their order; what is no sample comes with its `problem`.

    Args:
        file: open at the first header; it can be sought in, if only forwards.
        archive: its name, for messages and as the key of problems of the whole archive.
        with_images: read images and captions; else captions only.
    """
    seen: set[int] = set()
    group = Group("")
    extensions = CAPTION_EXTENSIONS + (IMAGE_EXTENSIONS if with_images else ())

    def wants(info: tarfile.TarInfo) -> bool:
        return info.size <= MAX_MEMBER_BYTES and split_name(info.name)[1] in extensions

    try:
        for info, data in _members(file, archive, wants):
            if info.name.startswith(("/", "\\")) or ".." in info.name.replace("\\", "/").split("/"):
                yield Group(info.name, problem="path traversal")
                continue
            key, extension = split_name(info.name)
            if key != group.key or extension in group.parts:
                if group.parts:
                    yield _judged(group, seen)
                group = Group(key)
            group.parts[extension], group.spans[extension] = data, (info.offset_data, info.size)
            if info.size > MAX_MEMBER_BYTES and extension in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS:
                group.problem = "too big"
    except DataError as error:
        if group.image_extension and group.has_captions:
            yield _judged(group, seen)
        yield Group(archive, problem=error.cause)
        return
    if group.parts:
        yield _judged(group, seen)


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") or name.startswith("__MACOSX/")


def _judged(group: Group, seen: set[int]) -> Group:
    """Note what keeps a group from being a sample; `seen` holds the hashes of the keys before it."""
    if hash(group.key) in seen:
        group.problem = "duplicate key"
    elif not group.image_extension:
        group.problem = "missing image"
    elif not group.has_captions:
        group.problem = "missing caption"
    seen.add(hash(group.key))
    return group


def captions_of(group: Group) -> tuple[str, ...]:
    """Read the captions of one sample from the contents of its members.

    Returns:
        At least one caption, surrounding white space removed, empty ones omitted.

    Raises:
        DataError: there is none, or none that can be read; `.cause` says why.
    """
    extension = caption_member(group)
    return read_captions(group.parts.get(extension, b""), group.key, is_json=extension == "json")


def caption_member(group: Group) -> str:
    """Name the extension of the member that a sample's captions are in: `json` if it has several, else text."""
    text = next((extension for extension in ("txt", "caption") if extension in group.parts), "")
    data = group.parts.get("json", b"")
    if text and b'"captions"' not in data:
        return text
    try:
        return "json" if not text or captions_of_row(_read_metadata(data, group.key)) else text
    except DataError:
        return "json"


def read_captions(data: bytes, key: str, *, is_json: bool) -> tuple[str, ...]:
    """Read captions from the content of a member; the rest as in `captions_of`."""
    return clean_captions(captions_of_row(_read_metadata(data, key)) if is_json else [_decode(data, key)], key)


def captions_of_row(row: dict[str, Any]) -> list[Any]:
    """Take what stands in a JSON object under `captions`, else `caption`, else `text`, unchecked."""
    for name in ("captions", "caption", "text"):
        value = row.get(name)
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


def clean_captions(captions: list[Any], key: str) -> tuple[str, ...]:
    """Strip captions, which may be anything that a file holds in their place; the rest as in `captions_of`."""
    if any(not isinstance(caption, str) for caption in captions):
        raise DataError(f"a caption of {key} is not text", remedy="write captions as strings", cause="caption not text")
    if not all(map(is_unicode, captions)):
        raise _not_utf8(key)
    stripped = tuple(text for caption in captions if (text := " ".join(caption.replace("\0", " ").split())))
    if not stripped:
        raise DataError(f"{key} has no caption", remedy="add a caption or omit the image", cause="empty caption")
    return stripped


def _decode(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(key) from error


def _not_utf8(key: str) -> DataError:
    remedy = "convert it with iconv -t utf-8"
    return DataError(f"the caption of {key} is not UTF-8", remedy=remedy, cause="caption not UTF-8")


def is_unicode(value: object) -> bool:
    """Return whether a value is no text or can be written as UTF-8, as text from other bytes or broken JSON cannot."""
    try:
        return not isinstance(value, str) or value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _read_metadata(data: bytes, key: str) -> dict[str, Any]:
    """Parse the JSON of a sample; empty if it is no object."""
    try:
        row = parse_json(_decode(data, key))
    except ValueError as error:
        message, cause = f"the metadata of {key} is not JSON: {error}", "damaged metadata"
        raise DataError(message, remedy="repair or delete it", cause=cause) from error
    return row if isinstance(row, dict) else {}
