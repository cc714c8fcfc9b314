"""Models that OpenCLIP knows by name and has downloaded before; nothing is fetched over the network."""

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from declip_cli.errors import ModelError
from declip_cli.model.open_clip_towers import read_installed_config

_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)/([A-Za-z0-9][A-Za-z0-9._-]*)")
_DEFAULT_FILE = "open_clip_pytorch_model.bin"
_SAFE_FILE = "open_clip_model.safetensors"


def find_cached(name: str) -> tuple[Path, dict[str, Any]] | None:
    """Find the weights of a model of OpenCLIP's in its caches.

    Args:
        name: `MODEL/PRETRAINED`, such as `ViT-B-32/laion2b_s34b_b79k`.

    Returns:
        The file, and what its configuration would be; None where OpenCLIP is not installed or knows no such model.

    Raises:
        ModelError: OpenCLIP knows it, but has not downloaded it.
    """
    words = _NAME.fullmatch(name)
    if words is None or importlib.util.find_spec("open_clip") is None:
        return None
    known: Mapping[str, Any] = importlib.import_module("open_clip.pretrained").get_pretrained_cfg(*words.groups())
    if not known:
        return None
    path = next((path for path in _places(known) if path.is_file()), None)
    if path is None:
        raise ModelError(
            f"OpenCLIP knows {name}, but its weights are not on this machine",
            remedy=f"fetch them: python -c \"import open_clip; open_clip.create_model('{words[1]}', "
            f"pretrained='{words[2]}')\"",
        )
    # The weights decide on the activation; OpenCLIP only warns where the model's configuration has another.
    model_config = read_installed_config(words[1]) | {"quick_gelu": bool(known.get("quick_gelu", False))}
    fields = ("mean", "std", "interpolation", "resize_mode")
    pixels = {key: list(known[key]) if isinstance(known[key], tuple) else known[key] for key in fields if key in known}
    return path, {"model_cfg": model_config, "preprocess_cfg": pixels}


def _places(known: Mapping[str, Any]) -> Iterator[Path]:
    """Name the files in which OpenCLIP's downloads end, in its order.

    Source: open_clip/pretrained.py, `download_pretrained`.
    """
    repository, file = os.path.split(known.get("hf_hub", ""))
    if repository and importlib.util.find_spec("huggingface_hub") is not None:
        hub = importlib.import_module("huggingface_hub")
        file = file or _DEFAULT_FILE
        safe = _SAFE_FILE if file == _DEFAULT_FILE else f"{os.path.splitext(file)[0]}.safetensors"
        for name in (safe, file):
            found = hub.try_to_load_from_cache(repository, name)
            if isinstance(found, str):
                yield Path(found)
    if known.get("url"):
        yield Path("~/.cache/clip").expanduser() / os.path.basename(known["url"])
