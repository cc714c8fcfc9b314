"""Read the MATLAB 5 files that some data sets keep their labels in: numbers, text, cells, structs."""

import struct
import zlib
from pathlib import Path
from typing import TypeAlias

import numpy as np

from declip_cli.errors import EvaluateError

Value: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.generic]] | str | list[Value] | dict[str, list[Value]]"
"""Numbers as an array, text as str, a cell array as a list, a struct array as field → one value each."""

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_HEADER_BYTES = 128


def read_mat(path: Path) -> dict[str, Value]:
    """Read all variables of a MATLAB file (format 5, as saved by version 6 and 7, little-endian).

    Args:
        path: the file.

    Returns:
        Variable → value; arrays keep MATLAB's order of elements, flattened column by column.

    Raises:
        EvaluateError: the file is missing or is of another format.

    Source: MAT-File Format (The MathWorks), chapter 1: level 5 MAT-files.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EvaluateError(
            f"the data set is incomplete: cannot read {path}", remedy="unpack the data set again"
        ) from error
    if len(data) < _HEADER_BYTES or data[126:128] != b"IM":
        raise EvaluateError(f"{path} is not a MATLAB 5 file in little-endian order", remedy="download the file again")
    try:
        return dict(_variables(data))
    except (struct.error, zlib.error, KeyError, IndexError, ValueError, UnicodeDecodeError) as error:
        raise EvaluateError(f"{path} is damaged: {error}", remedy="download the file again") from error


def to_int(value: Value) -> int:
    """Return the one number of an array.

    Args:
        value: an array of one element.

    Returns:
        The number.

    Raises:
        ValueError: it is text, a cell array or a struct.
    """
    if not isinstance(value, np.ndarray):
        raise ValueError(f"a number was expected (got {value!r})")
    return int(value[0].item())


def _variables(data: bytes) -> list[tuple[str, Value]]:
    found = []
    position = _HEADER_BYTES
    while position + 8 <= len(data):
        kind, payload, position = _element(data, position)
        if kind == _COMPRESSED:
            kind, payload, _ = _element(zlib.decompress(payload), 0)
        if kind == _MATRIX:
            found.append(_matrix(payload))
    return found


def _element(data: bytes, position: int) -> tuple[int, bytes, int]:
    """Return the kind, the payload and the position after one data element."""
    kind, size = struct.unpack_from("<II", data, position)
    if kind >> 16:  # the small format: size in the upper half, up to four bytes in place
        return kind & 0xFFFF, data[position + 4 : position + 4 + (kind >> 16)], position + 8
    start = position + 8
    if start + size > len(data):
        raise ValueError("it ends too early")
    padding = 0 if kind == _COMPRESSED else -size % 8
    return kind, data[start : start + size], start + size + padding


def _matrix(data: bytes) -> tuple[str, Value]:
    """Decode one array: flags, dimensions, name, then contents by class."""
    if not data:
        return "", np.empty(0)
    _, flags, position = _element(data, 0)
    _, sizes, position = _element(data, position)
    _, name, position = _element(data, position)
    count = int(np.prod(np.frombuffer(sizes, "<i4")))
    array_class = flags[0]
    value: Value
    if array_class == _CELL:
        value = _cells(data, position, count)
    elif array_class == _STRUCT:
        value = _struct(data, position, count)
    else:
        kind, payload, _ = _element(data, position)
        value = _text(kind, payload) if array_class == _CHAR else np.frombuffer(payload, "<" + _NUMBERS[kind])
    return name.decode("ascii"), value


def _cells(data: bytes, position: int, count: int) -> list[Value]:
    values: list[Value] = []
    for _ in range(count):
        _, payload, position = _element(data, position)
        values.append(_matrix(payload)[1])
    return values


def _struct(data: bytes, position: int, count: int) -> dict[str, list[Value]]:
    _, length, position = _element(data, position)
    _, names, position = _element(data, position)
    width = int.from_bytes(length, "little")
    fields = [names[i : i + width].split(b"\0")[0].decode("ascii") for i in range(0, len(names), width)]
    values = _cells(data, position, count * len(fields))  # element by element, field by field
    return {field: values[number :: len(fields)] for number, field in enumerate(fields)}


def _text(kind: int, payload: bytes) -> str:
    if kind in _TEXTS:
        return payload.decode(_TEXTS[kind])
    return "".join(map(chr, np.frombuffer(payload, "<" + _NUMBERS[kind]).tolist()))
