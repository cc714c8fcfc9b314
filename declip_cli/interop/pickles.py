"""PyTorch's checkpoint files, read without PyTorch's loaders: tensors and plain values come out, no code runs.

Three layouts: zip archives of `torch.save`, TorchScript archives, and the files of `torch.save` before 1.6.
"""

import io
import mmap
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from declip_cli.errors import ModelError

_AGAIN = "check the path, or copy the file again"
_SAFER = "where you trust it, save its weights alone: safetensors.torch.save_file(model.state_dict(), FILE)"
_OPCODE_WORDS = """
PROTO FRAME MARK STOP POP POP_MARK DUP EMPTY_DICT EMPTY_LIST EMPTY_TUPLE EMPTY_SET DICT LIST TUPLE TUPLE1 TUPLE2 TUPLE3
APPEND APPENDS SETITEM SETITEMS ADDITEMS FROZENSET NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
BINBYTES8 GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ NEWOBJ_EX BINPERSID PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET
LONG_BINGET
"""
_OPCODES = frozenset(_OPCODE_WORDS.split())
"""What checkpoints are made of. The rest takes memory before its bytes are there, or classes from other registries."""
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_INERT_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.dtypes", "pathlib", "_codecs")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DIMS = 8
_MAX_MODULES = 10_000
_MAX_PICKLE_BYTES = 2**24
"""Of all but the numbers; checkpoints of the largest models have a tenth of it. A byte can become a dict of 64."""


class Record:
    """Stands for an object of any class; keeps its state and does nothing."""

    def __init__(self, *args: object, **options: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def values(self) -> dict[str, Any]:
        """Return the attributes that the object had."""
        return {str(k): v for k, v in self.state.items()} if isinstance(self.state, Mapping) else {}


class Refused(Exception):
    """The file names a class or a function that no checkpoint of weights needs."""


class _Storages(Protocol):
    def __call__(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        """Return a storage's numbers, (numel,)."""


class _Reader(pickle.Unpickler):
    """Knows tensors, plain containers and a few harmless classes, of which it makes `Record`s."""

    def __init__(self, data: bytes, storages: _Storages) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="replace")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if module.startswith("__torch__") or (module, name) == ("argparse", "Namespace"):
            return Record
        if module in _INERT_MODULES:
            return Record
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle":  # build_intlist, restore_type_tag, …: their first argument is the value
            return lambda value, *_: value
        found = _KNOWN.get((module, name))
        if found is None:
            raise Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Tensor:  # noqa: ANN401
        kind, dtype, key, _, numel = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int or numel < 0:
            raise ValueError("an unknown kind of storage")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a view of a storage")
        return _sealed(self._storages(str(key), dtype, numel))


def _rebuild(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
    """Make a tensor of a storage; one that would be larger than the storage is damage, or an attack on the memory."""
    if not (isinstance(storage, Tensor) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise ValueError("a tensor without storage or size")
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride) or len(size) > _MAX_DIMS:
        raise ValueError("a tensor with an impossible size")
    numel = 1
    for length in size:
        numel *= length
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1  # type: ignore[operator]
    if numel and (end > len(storage) or numel > len(storage)):
        raise ValueError("a tensor beyond the end of its storage")
    if storage.is_meta or not numel:
        return _sealed(torch.empty(size, dtype=storage.dtype, device=storage.device))
    return _sealed(torch.as_strided(storage, size, stride, offset))  # type: ignore[arg-type]


def _sealed(tensor: Tensor) -> Tensor:
    """Keep a pickle from giving a tensor another storage or size, for which PyTorch would take memory."""
    vars(tensor)["__setstate__"] = _refuse_state
    return tensor


def _refuse_state(state: object) -> None:
    raise ValueError("a tensor that is changed after it was made")


def _tuple(values: object = ()) -> tuple[object, ...]:
    """Make a tuple, not of a tensor: one with no numbers in 2**40 rows has as many rows."""
    if not isinstance(values, tuple | list):
        raise ValueError("a size that is not a tuple")
    return tuple(values)


def _ordered(values: object = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(_tuple(values))  # type: ignore[arg-type]


def _first(value: object, *_: object) -> object:
    return value


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): lambda *_: {},
    ("copyreg", "_reconstructor"): lambda *_: Record(),
    ("torch", "Size"): _tuple,
    ("torch", "device"): Record,
}


def _check(data: BinaryIO) -> int:
    """Look through a pickle before it is read; return where it ends.

    Raises:
        ValueError: it is cut off, or holds what no checkpoint does.
    """
    for num, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in _OPCODES:
            raise ValueError(f"the operation {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(value or 0) > 2 * num + 256:
            raise ValueError("a memo without end")  # the list of remembered objects would grow to that length
    return data.tell()


def read_pickled(path: Path, *, shapes_only: bool) -> tuple[Any, str]:
    """Read a checkpoint file.

    Args:
        path: the file.
        shapes_only: leave the numbers out: tensors have no storage (`meta`), and the file is hardly read.

    Returns:
        What it holds: containers, tensors, plain values, `Record`s; and its layout: `zip`, `torchscript` or `legacy`.

    Raises:
        ModelError: it is no checkpoint, or damaged, or holds objects that it would take code to make.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start[:2] == b"PK":
                return _read_zip(file, path.stat().st_size, shapes_only=shapes_only)
            return _read_legacy(file, path.stat().st_size, shapes_only=shapes_only), "legacy"
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", remedy="check the path") from error
    except Refused as error:
        raise ModelError(
            f"{path} holds Python objects besides tensors; it is not opened, since that could run code "
            f"(it asks for {str(error)[:80]})",
            remedy=_SAFER,
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{path} is not a model that declip can read: no checkpoint, or a damaged one ({why})", remedy=_AGAIN
        ) from error


def _load(data: bytes, storages: _Storages) -> Any:  # noqa: ANN401
    _check(io.BytesIO(data))
    return _Reader(data, storages).load()


# --- zip archives


def _read_zip(file: BinaryIO, num_bytes: int, *, shapes_only: bool) -> tuple[Any, str]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [
            name.removesuffix("/data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise ValueError("an archive without data.pkl")
        root = roots[0]
        _check_entries(entries, root, num_bytes)
        if entries[f"{root}/data.pkl"].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("a pickle without end")
        order = f"{root}/byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ValueError("numbers in another byte order")
        memo: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
            if key not in memo:
                entry = entries[f"{root}/data/{key}"]
                _check_length(entry.file_size, dtype, numel)
                memo[key] = torch.empty(numel, dtype=dtype, device="meta")
                if not shapes_only and numel:
                    content = bytearray(archive.read(entry))
                    memo[key] = torch.frombuffer(content, dtype=dtype, count=numel)
                elif not shapes_only:
                    memo[key] = torch.empty(0, dtype=dtype)
            return memo[key]

        content = _load(archive.read(f"{root}/data.pkl"), storage)
        return content, "torchscript" if f"{root}/constants.pkl" in entries else "zip"


def _check_entries(entries: Mapping[str, zipfile.ZipInfo], root: str, num_bytes: int) -> None:
    """Refuse archives that PyTorch does not write and that could fill the memory or leave the folder."""
    code = f"{root}/code/"  # of TorchScript, compressed, never read
    for name, entry in entries.items():
        if name.startswith(("/", "\\")) or ".." in name.split("/") or ":" in name:
            raise ValueError(f"a path that leads out of the archive: {name[:60]}")
        if entry.compress_type != zipfile.ZIP_STORED and not name.startswith(code):
            raise ValueError("compressed entries")
    if sum(entry.file_size for entry in entries.values() if not entry.filename.startswith(code)) > num_bytes:
        raise ValueError("entries that are longer than the file")


def _check_length(num_bytes: int, dtype: torch.dtype, numel: int) -> None:
    if num_bytes < numel * dtype.itemsize:
        raise ValueError("a storage that is cut off")


# --- files of torch.save before 1.6


def _read_legacy(file: BinaryIO, num_bytes: int, *, shapes_only: bool) -> Any:  # noqa: ANN401
    """Read pickles of a magic number, the version, the system, the object, the storages' keys; then the storages."""
    file.seek(0)
    pickles = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    storages: dict[str, tuple[torch.dtype, int]] = {}
    memo: dict[str, Tensor] = {}

    def promised(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        if key not in memo:
            storages[key] = (dtype, numel)
            _check_length(num_bytes, torch.uint8, sum(kind.itemsize * num for kind, num in storages.values()))
            memo[key] = torch.empty(numel, dtype=dtype, device="meta" if shapes_only else "cpu")
        return memo[key]

    if _next_pickle(pickles, promised) != _LEGACY_MAGIC:
        raise ValueError("not a PyTorch checkpoint")
    _next_pickle(pickles, promised)
    _next_pickle(pickles, promised)
    content = _next_pickle(pickles, promised)
    if not shapes_only:
        keys = _next_pickle(pickles, promised)
        file.seek(pickles.tell())
        _fill(file, [str(key) for key in keys], storages, memo)
    return content


def _next_pickle(file: BinaryIO, storages: _Storages) -> Any:  # noqa: ANN401
    start = file.tell()
    end = _check(file)
    file.seek(start)
    return _Reader(file.read(end - start), storages).load()


def _fill(
    file: BinaryIO, keys: list[str], storages: Mapping[str, tuple[torch.dtype, int]], memo: Mapping[str, Tensor]
) -> None:
    if set(keys) != set(storages):
        raise ValueError("storages without a tensor, or the other way round")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        start = file.tell()
        for key in keys:
            dtype, numel = storages[key]
            length = dtype.itemsize * numel
            if int.from_bytes(mapped[start : start + 8], "little") != numel or start + 8 + length > len(mapped):
                raise ValueError("a storage that is cut off")
            if numel:
                content = bytearray(mapped[start + 8 : start + 8 + length])
                memo[key].copy_(torch.frombuffer(content, dtype=dtype))
            start += 8 + length


# --- what a checkpoint holds


def walk_tensors(content: object, visit: Callable[[str, Tensor], None]) -> None:
    """Visit the tensors of nested modules of a TorchScript archive by their dotted names.

    Raises:
        ValueError: the modules are nested without end.
    """
    pending, num_modules = [("", content)], 0
    while pending:
        name, module = pending.pop()
        num_modules += 1
        if num_modules > _MAX_MODULES:
            raise ValueError("modules nested without end")
        values = module.values() if isinstance(module, Record) else module if isinstance(module, Mapping) else {}
        for key, value in values.items():
            inner = f"{name}.{key}" if name else str(key)
            if isinstance(value, Tensor):
                visit(inner, value)
            elif isinstance(value, Record):
                pending.append((inner, value))
