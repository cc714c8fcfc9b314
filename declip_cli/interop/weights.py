"""A checkpoint's parameters by name, whatever file they lie in; on demand their shapes alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from declip_cli.errors import ModelError
from declip_cli.files import MAX_JSON_BYTES, parse_json, read_json
from declip_cli.interop.pickles import Record, read_pickled, walk_tensors

_AGAIN = "copy the file again"
_MAX_HEADER_BYTES = MAX_JSON_BYTES
"""The safetensors library allows more, but a thousand parameters take a tenth of a megabyte."""
_SHORTEST = 16
"""Bytes of the smallest file of safetensors and more."""
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_SHARED = 4
"""Largest ratio of all tensors' bytes to the file's; more would be many tensors made of one storage."""
_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(safetensors|bin|pt)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a file of weights holds."""

    paths: tuple[Path, ...]
    """The files it was read from."""
    container: str
    """`safetensors`, `zip`, `torchscript` or `legacy`."""
    state: dict[str, Tensor]
    """Parameters by name; without storage (`meta`) where only shapes were asked for."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the file says, plain values only: epoch, step, options of the training."""


def read_checkpoint(path: Path, *, shapes_only: bool = False) -> Checkpoint:
    """Read a file of safetensors or of PyTorch, recognized by its content.

    Args:
        path: the file, or the index of one in several parts (`….index.json`).
        shapes_only: leave the numbers out.

    Returns:
        Its parameters, prefixes of wrappers (`module.`) removed.

    Raises:
        ModelError: it cannot be read, is damaged, or holds no parameters by name.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ModelError(f"{path} is not a file", remedy="name a checkpoint file or a folder")
    if path.name.endswith(".index.json"):
        return _read_parts(path, shapes_only=shapes_only)
    if _is_safetensors(path):
        state = _read_header(path) if shapes_only else _read_safetensors(path)
        return Checkpoint(paths=(path,), container="safetensors", state=_named(state))
    content, container = read_pickled(path, shapes_only=shapes_only)
    state, facts = {}, {}
    if container == "torchscript":
        try:
            walk_tensors(content, state.__setitem__)
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {error}", remedy=_AGAIN) from error
    else:
        facts = _facts(content)
        state = _parameters(content, path)
    if sum(value.nbytes for value in state.values()) > _MAX_SHARED * path.stat().st_size:
        raise ModelError(f"{path} is damaged: its tensors are larger than the file", remedy=_AGAIN)
    return Checkpoint(paths=(path,), container=container, state=_named(state), facts=facts)


def _named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_PREFIX.sub("", name): value for name, value in state.items()}


def _parameters(content: object, path: Path) -> dict[str, Tensor]:
    """Find the parameters in what `torch.save` was given: itself, or under `model` or `state_dict`."""
    for wrapper in ("model", "state_dict"):
        inner = content.get(wrapper) if isinstance(content, Mapping) else None
        if inner is not None and not isinstance(inner, str):  # under `model` some write its name
            content = inner
    if not isinstance(content, Mapping):
        raise ModelError(
            f"{path} holds a {type(content).__name__}, not parameters by name",
            remedy="save a state dict: torch.save(model.state_dict(), FILE)",
        )
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _facts(content: object) -> dict[str, Any]:
    """Take the plain values beside the parameters."""
    if not isinstance(content, Mapping):
        return {}
    facts: dict[str, Any] = {}
    for key, value in content.items():
        values = value.values() if isinstance(value, Record) else value
        if key in ("args", "config", "hparams") and isinstance(values, Mapping):
            facts[str(key)] = {str(name): _plain(item) for name, item in values.items() if _is_plain(item)}
        elif _is_plain(value):
            facts[str(key)] = _plain(value)
    return facts


def _is_plain(value: object, depth: int = 0) -> bool:
    """Return whether a value is a number, a text or a short list of them; lists of one list many times have no end."""
    is_short = isinstance(value, list | tuple) and len(value) <= 16 and depth < 2
    is_list = is_short and all(_is_plain(item, depth + 1) for item in value)  # type: ignore[attr-defined]
    return is_list or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:  # noqa: ANN401
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# --- safetensors


def _is_safetensors(path: Path) -> bool:
    """Tell by the length of the header and its first byte."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", remedy="check the path") from error
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[:2] != b"PK")


def read_json_header(path: Path) -> dict[str, Any]:
    """Read the header of a file of safetensors and nothing else.

    Raises:
        ModelError: there is none, or it claims what the file does not hold.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < _SHORTEST or length > min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(
                f"{path} is damaged: its header would take {length:,} of the {size:,} bytes there are", remedy=_AGAIN
            )
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {error}", remedy=_AGAIN) from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} is damaged: its header is not a JSON object", remedy=_AGAIN)
    return header


def _read_header(path: Path) -> dict[str, Tensor]:
    """Read names and shapes."""
    header, state = read_json_header(path), {}
    end = path.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], [int(length) for length in entry["shape"]]
            first, last = entry["data_offsets"]
            state[name] = torch.empty(shape, dtype=dtype, device="meta")
            if not 0 <= first <= last <= end or state[name].nbytes != last - first:
                raise ValueError("its length is not that of its shape")
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ModelError(f"{path} is damaged: {name[:80]}: {error}", remedy=_AGAIN) from error
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_json_header(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}", remedy=_AGAIN) from error


def _read_parts(path: Path, *, shapes_only: bool) -> Checkpoint:
    """Read weights that lie in several files, as an index names them."""
    try:
        names = sorted(set(read_json(path)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", remedy=_AGAIN) from error
    if not names or not all(isinstance(name, str) and _PART.fullmatch(name) for name in names):
        raise ModelError(f"{path} is damaged: it names other files than weights in its folder", remedy=_AGAIN)
    parts = [read_checkpoint(path.parent / name, shapes_only=shapes_only) for name in names]
    state = {name: value for part in parts for name, value in part.state.items()}
    return Checkpoint(paths=(path, *(part.paths[0] for part in parts)), container=parts[0].container, state=state)
