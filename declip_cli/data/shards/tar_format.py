"""Tar archives as bytes: headers in, headers out, with the byte offsets that random access needs."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from declip_cli.errors import DataError

BLOCK_BYTES = 512
_MAX_HEADER_BYTES = 1 << 20  # a longer "long name" is no name but an attack or damage
_MAX_FILE_BYTES = 1 << 60
_ZEROS = bytes(BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive."""

    name: str
    start: int
    """Offset of its first header block, extended headers included."""
    data_start: int
    num_bytes: int
    is_file: bool

    @property
    def end(self) -> int:
        """Offset behind its last, padded block."""
        return self.data_start + padded(self.num_bytes)


def padded(num_bytes: int) -> int:
    """Round a size up to whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _damage(cause: str, name: str, offset: int) -> DataError:
    return DataError(
        f"{name} is a {cause} at byte {offset:,}", remedy="download or pack this archive again", cause=cause
    )


def read_members(
    file: BinaryIO, name: str, *, wants: Callable[[Member], bool], has_end_mark: bool = True
) -> Iterator[tuple[Member, bytes]]:
    """Go through an archive from front to back.

    Args:
        file: open at the first header; read and sought forwards only.
        name: of the archive, for messages.
        wants: says whose contents are to be read; the others are skipped over.
        has_end_mark: false for a piece of an archive, which may stop after any member.

    Yields:
        Each member that is there whole, and its content, empty where not wanted.

    Raises:
        DataError: the archive ends too early or a header is damaged; members before that have been yielded.

    Source: POSIX.1-2001 ustar and pax; GNU long names (type L) and base-256 sizes.
    """
    start = offset = 0
    long_name, long_size = "", -1
    while True:
        header = file.read(BLOCK_BYTES)
        if header == _ZEROS or (not header and not has_end_mark):
            return
        if len(header) < BLOCK_BYTES:
            raise _damage("truncated tar", name, offset + len(header))
        if not _is_header(header):
            raise _damage("damaged tar", name, offset)
        num_bytes, kind = _number(header[124:136]), header[156:157]
        offset += BLOCK_BYTES
        if kind in (b"L", b"x", b"g", b"K"):
            if num_bytes > _MAX_HEADER_BYTES:
                raise _damage("damaged tar", name, offset)
            extended = file.read(padded(num_bytes))[:num_bytes]
            if kind == b"L":
                long_name = extended.rstrip(b"\0").decode("utf-8", "replace")
            elif kind == b"x":
                long_name, long_size = _pax(extended, long_name)
            offset += padded(num_bytes)
            continue
        num_bytes = long_size if long_size >= 0 else num_bytes
        is_file = kind in (b"0", b"\0", b"7")
        member = Member(long_name or _short_name(header), start, offset, num_bytes, is_file)
        data = _content(file, member, wants(member), name)
        yield member, data
        offset = start = member.end
        long_name, long_size = "", -1


def plain_members(piece: bytes) -> list[tuple[str, bytes]]:
    """Cut a few members out of memory, fast.

    Args:
        piece: whole members, headers included.

    Returns:
        Name and content of each; nothing at all if one of them is not a plain file with a short name and a
        right checksum, for `read_members` to say why.
    """
    members, at = [], 0
    while at < len(piece):
        header = piece[at : at + BLOCK_BYTES]
        is_plain = header[156:157] == b"0" and header[257:262] == b"ustar" and not header[345]
        if len(header) < BLOCK_BYTES or not is_plain or not _is_header(header):
            return []
        num_bytes, start = _number(header[124:136]), at + BLOCK_BYTES
        at = start + padded(num_bytes)
        name = header[: header.find(b"\0", 0, 100)] if header[99] == 0 else header[:100]
        members.append((name.decode("utf-8", "replace"), piece[start : start + num_bytes]))
    return members if at == len(piece) else []


def _content(file: BinaryIO, member: Member, is_wanted: bool, archive: str) -> bytes:
    if is_wanted:
        data = file.read(padded(member.num_bytes))
        is_whole = len(data) >= member.num_bytes
    else:
        data = b""
        if member.end > member.data_start:
            file.seek(member.end - 1)
        is_whole = member.end == member.data_start or bool(file.read(1))
    if not is_whole:
        raise _damage("truncated tar", archive, member.data_start + len(data))
    return data[: member.num_bytes]


def _is_header(block: bytes) -> bool:
    """Say whether a block has the checksum of a header and numbers where they should be."""
    try:
        expected, num_bytes = _number(block[148:156]), _number(block[124:136])
    except ValueError:
        return False
    if num_bytes > _MAX_FILE_BYTES:
        return False
    return sum(block[:148]) + sum(block[156:]) + 8 * 32 == expected


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _short_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "replace")


def _pax(extended: bytes, name: str) -> tuple[str, int]:
    size = -1
    while extended:
        length, space, rest = extended.partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "replace")
        elif key == b"size" and value.isdigit() and len(value) < 19:
            size = int(value)
        extended = extended[int(length) :]
    return name, size


class TarWriter:
    """Write an archive whose bytes depend on names and contents only, never on time or user.

    Args:
        file: open for reading and writing; what is in it already is kept and written behind.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        file.seek(0)
        while block := file.read(1 << 20):
            self._digest.update(block)
            self.num_bytes += len(block)

    @property
    def sha256(self) -> str:
        """Of what has been written so far, in hexadecimal."""
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes) -> None:
        """Append one file.

        Args:
            name: at most 100 bytes of UTF-8.
            data: its content.
        """
        self._write(_header(name, len(data)) + data + bytes(padded(len(data)) - len(data)))

    def finish(self) -> str:
        """Write the end mark.

        Returns:
            Sha256 of the whole archive, in hexadecimal.
        """
        self._write(_ZEROS + _ZEROS)
        return self.sha256

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


def _header(name: str, num_bytes: int) -> bytes:
    encoded = name.encode()
    if len(encoded) > 100:
        raise ValueError(f"name of more than 100 bytes: {name}")
    front = encoded.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % num_bytes
    front += b"%011o\0" % 0
    back = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(155 + 12)
    checksum = sum(front) + 8 * 32 + sum(back)
    return front + b"%06o\0 " % checksum + back
