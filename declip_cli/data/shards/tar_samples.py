"""Which members of a tar archive make one image-text pair, in the layout of WebDataset and img2dataset."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from declip_cli.data.shards.tar_format import Member, plain_members, read_members
from declip_cli.errors import DataError
from declip_cli.files import parse_json

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "ppm", "jfif")
CAPTION_EXTENSIONS = ("json", "txt", "caption")
MAX_MEMBER_BYTES = 256 << 20
"""Larger members are no photographs; they are counted, not read."""


@dataclass(slots=True)
class Group:
    """Consecutive members whose names differ in the extension only: one sample."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Extension in lower case, without the first dot → content, empty where not read."""
    start: int = 0
    end: int = 0
    problem: str = ""
    """Why this is no sample, in the words it is counted under; empty if all is well."""

    @property
    def picture_extension(self) -> str:
        """Extension of the picture, empty if there is none."""
        return next((extension for extension in PICTURE_EXTENSIONS if extension in self.parts), "")

    @property
    def has_caption(self) -> bool:
        """Say whether any member may hold a caption."""
        return any(extension in self.parts for extension in CAPTION_EXTENSIONS)


def split_name(name: str) -> tuple[str, str]:
    """Divide a member's name into the sample's key and the extension.

    Args:
        name: such as `a/0001.seg.png`.

    Returns:
        The key `a/0001`, and the extension in lower case from the first dot of the last part on, `seg.png`.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def read_groups(file: BinaryIO, archive: str, *, with_contents: bool, has_end_mark: bool = True) -> Iterator[Group]:
    """Go through the samples of a tar archive; what is no sample comes with its `problem`.

    Args:
        file: open at the first header.
        archive: its name, for messages and as the key of problems of the whole archive.
        with_contents: read pictures and captions; else only where they stand.
        has_end_mark: as of `tar_format.read_members`.

    Yields:
        Samples in the order of the archive.
    """
    finish = _finisher()
    group = Group("")
    try:
        wants = _is_wanted if with_contents else _wants_nothing
        for member, data in read_members(file, archive, wants=wants, has_end_mark=has_end_mark):
            key, extension = split_name(member.name)
            if not member.is_file or _is_hidden(member.name):
                continue
            if _leaves_folder(member.name):
                yield Group(member.name, problem="path traversal")
                continue
            if key != group.key or extension in group.parts:
                if group.parts:
                    yield finish(group)
                group = Group(key, start=member.start)
            group.parts[extension] = data
            group.end = member.end
            if member.num_bytes > MAX_MEMBER_BYTES and _may_be_needed(extension):
                group.problem = "too big"
    except DataError as error:
        if group.parts and group.picture_extension and group.has_caption:
            yield finish(group)
        yield Group(archive, problem=error.cause)
        return
    if group.parts:
        yield finish(group)


def group_of(piece: bytes, name: str) -> Group:
    """Read the one sample that a piece of an archive holds.

    Args:
        piece: its members, headers included.
        name: for messages.

    Returns:
        The sample; if the piece is no longer one, its `problem` says why.
    """
    members = plain_members(piece)
    split = [(*split_name(member), data) for member, data in members]
    parts = {extension: data for _, extension, data in split}
    if members and len(parts) == len(members) and len({key for key, _, _ in split}) == 1:
        group = Group(split[0][0], parts)
        if group.picture_extension and group.has_caption:
            return group
    groups = list(read_groups(io.BytesIO(piece), name, with_contents=True, has_end_mark=False))
    if len(groups) == 1:
        return groups[0]
    return Group(name, problem=groups[-1].problem or "damaged tar" if groups else "truncated tar")


def _finisher() -> Callable[[Group], Group]:
    seen: set[int] = set()

    def finish(group: Group) -> Group:
        if hash(group.key) in seen:
            group.problem = "duplicate key"
        elif not group.picture_extension:
            group.problem = "missing image"
        elif not group.has_caption:
            group.problem = "missing caption"
        seen.add(hash(group.key))
        return group

    return finish


def _may_be_needed(extension: str) -> bool:
    return extension in PICTURE_EXTENSIONS or extension in CAPTION_EXTENSIONS


def _is_wanted(member: Member) -> bool:
    return member.num_bytes <= MAX_MEMBER_BYTES and _may_be_needed(split_name(member.name)[1])


def _wants_nothing(member: Member) -> bool:
    return False


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") or name.startswith("__MACOSX/")


def _leaves_folder(name: str) -> bool:
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")


def captions_of(group: Group) -> tuple[str, ...]:
    """Read the captions of one sample.

    Args:
        group: a sample with the contents of its caption members.

    Returns:
        At least one caption, surrounding white space removed, empty ones left out.

    Raises:
        DataError: there is none, or none that can be read; `.cause` says why.
    """
    captions: list[Any] = []
    metadata = group.parts.get("json", b"")
    if metadata and (b'"captions"' in metadata or not group.parts.keys() & {"txt", "caption"}):
        captions = captions_of_row(_parse_json(metadata, group.key))
    if not captions:
        texts = (group.parts[extension] for extension in ("txt", "caption") if extension in group.parts)
        captions = [decode_text(text, group.key) for text in texts][:1]
    return clean_captions(captions, group.key)


def captions_of_row(row: dict[str, Any]) -> list[Any]:
    """Take the captions out of a JSON object: `captions`, else `caption`, else `text`.

    Args:
        row: any JSON object.

    Returns:
        What stands there, as a list, unchecked.
    """
    for name in ("captions", "caption", "text"):
        value = row.get(name)
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


def clean_captions(captions: list[Any], key: str) -> tuple[str, ...]:
    """Strip captions and leave out empty ones.

    Args:
        captions: texts, or anything else that a file holds in their place.
        key: of the sample, for messages.

    Returns:
        At least one caption.

    Raises:
        DataError: none is left, or one is no text.
    """
    if any(not isinstance(caption, str) for caption in captions):
        raise DataError(f"a caption of {key} is not text", remedy="write captions as strings", cause="caption not text")
    if not all(map(is_unicode, captions)):
        raise _not_utf8(key)
    stripped = tuple(text for caption in captions if (text := " ".join(caption.replace("\0", " ").split())))
    if not stripped:
        raise DataError(f"{key} has no caption", remedy="give it a caption or leave it out", cause="empty caption")
    return stripped


def decode_text(data: bytes, key: str) -> str:
    """Decode a caption, byte order mark removed.

    Args:
        data: UTF-8.
        key: of the sample, for messages.

    Returns:
        The text.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(key) from error


def _not_utf8(key: str) -> DataError:
    return DataError(
        f"the caption of {key} is not UTF-8",
        remedy="convert it with iconv -t utf-8",
        cause="caption not UTF-8",
    )


def is_unicode(value: object) -> bool:
    """Say whether a value can be written as UTF-8, as text with half of a surrogate pair cannot.

    Args:
        value: a text; anything else is taken as it is.

    Returns:
        False for a text from bytes that were not UTF-8, read with `surrogateescape`, or from broken JSON escapes.
    """
    try:
        return not isinstance(value, str) or value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _parse_json(data: bytes, key: str) -> dict[str, Any]:
    try:
        row = parse_json(decode_text(data, key))
    except ValueError as error:
        raise DataError(
            f"the metadata of {key} is not JSON: {error}",
            remedy="mend or delete it",
            cause="damaged metadata",
        ) from error
    return row if isinstance(row, dict) else {}
