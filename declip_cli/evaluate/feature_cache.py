"""Features kept on disk, keyed by the weights, the preprocessing and the content that made them."""

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def cache_folder() -> Path:
    """Return where features are kept: `$DECLIP_CACHE/features`, else `~/.cache/declip/features`."""
    root = os.environ.get("DECLIP_CACHE") or Path.home() / ".cache" / "declip"
    return Path(root) / "features"


def content_key(parts: Iterable[str | bytes]) -> str:
    """Condense everything that decides a result into a file name.

    Args:
        parts: model fingerprint, preprocessing, texts, digests of pictures; their order and borders count.

    Returns:
        64 hexadecimal digits (sha256).
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def load_features(key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Fetch what was stored under a key.

    Args:
        key: from `content_key`.

    Returns:
        Tensors by name and notes by name; None where nothing usable is stored.
    """
    path = _path(key)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return tensors, dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None


def store_features(key: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Keep tensors under a key; a full or read-only disk only means that nothing is kept.

    Args:
        key: from `content_key`.
        tensors: by name.
        notes: short texts by name.
    """
    path = _path(key)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(notes))
        temporary.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _path(key: str) -> Path:
    return cache_folder() / key[:2] / f"{key}.safetensors"


def cached_tensor(key: str) -> Tensor | None:
    """Fetch a single stored tensor.

    Args:
        key: from `content_key`.

    Returns:
        The tensor stored by `store_features(key, {"features": …}, {})`, or None.
    """
    found = load_features(key)
    return found[0].get("features") if found else None


def to_bytes(features: Tensor) -> bytes:
    """Return a tensor's values as bytes, for `content_key`."""
    return features.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
