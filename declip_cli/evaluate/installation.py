"""What this installation and this machine have: the contents of `declip doctor`."""

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from declip_cli import __version__
from declip_cli.cores import own_cores
from declip_cli.data.benchmarks.known import list_known
from declip_cli.data.shards.store import default_cache_dir
from declip_cli.model.checkpoint import runs_root
from declip_cli.model.precision import has_native_bf16

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def examine(data_root: Path | None = None) -> dict[str, Any]:
    """Collect versions, devices, threads, caches, data sets and packages; nothing is computed or fetched.

    Args:
        data_root: where evaluation sets are looked for; None takes `$DECLIP_DATA`, else `data/`.
    """
    required, optional = _packages()
    return {
        "declip": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(own_cores()),
        "threads": torch.get_num_threads(),
        "devices": [_device(torch.device(name)) for name in _device_names()],
        "cache": _folder(Path(default_cache_dir())),
        "runs": _folder(runs_root()),
        "data_sets": [one["name"] for one in list_known(data_root) if one["is_there"]],
        "packages": required,
        "optional_packages": optional,
    }


def _device_names() -> list[str]:
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def _device(device: torch.device) -> dict[str, Any]:
    """Name a device, its memory in MiB where it has its own, and whether it multiplies bfloat16 natively."""
    facts: dict[str, Any] = {"device": str(device), "name": platform.machine(), "native_bf16": False}
    if device.type == "cuda":
        facts["name"] = torch.cuda.get_device_name(device)
        facts["memory_mib"] = torch.cuda.get_device_properties(device).total_memory // 2**20
    with torch.device(device):
        facts["native_bf16"] = has_native_bf16(device)
    return facts


def _folder(path: Path) -> dict[str, Any]:
    """Measure the files below a folder; one that is not there holds 0 MiB."""
    sizes = [file.lstat().st_size for file in path.rglob("*") if not file.is_dir()]
    return {"path": str(path), "files": len(sizes), "mib": round(sum(sizes) / 2**20, 1)}


def _packages() -> tuple[dict[str, str], dict[str, str]]:
    """Map the packages that declip needs, and those of its extras, to their versions, or to `missing`."""
    required, optional = dict[str, str](), dict[str, str]()
    for line in metadata.requires("declip") or ():
        name = _NAME.match(line)
        if name is None or name[0] == "declip":
            continue
        try:
            version = metadata.version(name[0])
        except metadata.PackageNotFoundError:
            version = "missing"
        (optional if "extra ==" in line else required)[name[0]] = version
    return required, {name: version for name, version in optional.items() if name not in required}
