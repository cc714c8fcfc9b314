"""Sets that torchvision reads: files by its list of samples, pixels by its arrays."""

import hashlib
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from declip_cli.data.benchmarks.known import Known, known_sets, need_package, resolve_data_root
from declip_cli.data.dataset import Dataset
from declip_cli.data.files_dataset import FilesDataset, PixelsDataset
from declip_cli.errors import DataError


def read_torchvision(known: Known, root: Path, split: str) -> Dataset:
    """Read one split with the class of torchvision that the table names; its arguments stand under the split."""
    need_package(known.needs, known.name)
    try:
        data = _class_of(known)(str(root), **known.splits[split])
        listed = _files(data)
        if listed is None:
            labels = _labels(data)
    except (RuntimeError, OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"{known.name} in {root} is incomplete or damaged: {error}", remedy=known.how_to_get(root)
        ) from error
    classes = known.classes
    if known.names_in_files:
        classes = replace(classes, names=tuple(name.replace("_", " ") for name in data.classes))
    if listed is not None:
        return FilesDataset(listed[0], labels=listed[1], classes=classes)
    return PixelsDataset(
        f"{known.name}/{split}",
        lambda index: np.asarray(data[index][0].convert("RGB")),
        labels,
        classes=classes,
        fingerprint=_fingerprint(root / known.markers[0], split),
    )


def download(name: str, *, data_root: Path | None = None) -> str:
    """Fetch all splits of a known set over the network.

    Args:
        name: a known name.
        data_root: as in `open_dataset`; made if it does not exist.

    Returns:
        Where it is, for people.

    Raises:
        DataError: unknown name, no download works for this set, or the download failed.
    """
    known, root = known_sets().get(name), data_root or resolve_data_root(data_root)
    if known is None:
        raise DataError(
            f"{name!r} is not a known data set, so it cannot be downloaded",
            remedy="`declip zeroshot --list` shows the known names",
        )
    if not known.markers:
        return "built in"
    if not known.torchvision or not known.can_download:
        raise DataError(f"{name} has no download that works", remedy=known.how_to_get(root))
    root.mkdir(parents=True, exist_ok=True)
    try:
        for split in known.splits.values() if known.reader == "torchvision" else [{}]:
            _class_of(known)(str(root), download=True, **split)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise DataError(f"the download of {name} failed: {error}", remedy=known.how_to_get(root)) from error
    return f"{root}/"


def _class_of(known: Known) -> Any:  # noqa: ANN401  (one of torchvision's classes)
    return getattr(importlib.import_module("torchvision.datasets"), known.torchvision)


def _files(data: Any) -> tuple[list[str], list[int]] | None:  # noqa: ANN401
    """Return paths and labels where torchvision keeps them, under the names that it has for them."""
    samples = getattr(data, "samples", None) or getattr(data, "_samples", None)
    if samples is not None:
        return [str(path) for path, _ in samples], [int(label) for _, label in samples]
    files = getattr(data, "_image_files", None) or getattr(data, "_images", None)
    return ([str(path) for path in files], [int(label) for label in data._labels]) if files is not None else None


def _labels(data: Any) -> list[int]:  # noqa: ANN401
    if hasattr(data, "h5py"):  # PCAM, which reopens its file for every label
        with data.h5py.File(data._base_folder / data._FILES[data._split]["targets"][0]) as file:
            return [int(label) for label in np.asarray(file["y"]).reshape(-1)]
    labels = data.targets if hasattr(data, "targets") else data.labels
    return [int(label) for label in labels]


def _fingerprint(folder: Path, split: str) -> str:
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    return hashlib.sha256(repr((split, facts)).encode()).hexdigest()
