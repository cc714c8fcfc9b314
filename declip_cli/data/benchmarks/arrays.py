"""Sets whose pictures are pixels in one large file: cifar10, cifar100, stl10, mnist, pcam."""

import gzip
import importlib
import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from declip_cli.data.benchmarks.base import Listing, Picture, missing_file
from declip_cli.errors import EvaluateError

Pixels: TypeAlias = NDArray[np.uint8]


class ArrayPictures(Sequence[Picture]):
    """Pictures cut from an array, handed on as PNG, which loses nothing."""

    def __init__(self, name: str, count: int, pixels: Callable[[int], Pixels]) -> None:
        self._name = name
        self._count = count
        self._pixels = pixels

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Picture: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Picture]: ...
    def __getitem__(self, number: int | slice) -> Picture | Sequence[Picture]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(self._count))]
        if not 0 <= number < self._count:
            raise IndexError(number)
        return f"{self._name}/{number}", partial(self._encode, number)

    def _encode(self, number: int) -> bytes:
        pixels = self._pixels(number)
        if pixels.ndim == 3:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])  # RGB → BGR, as OpenCV writes it
        return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


class _PlainUnpickler(pickle.Unpickler):
    """Reads the pickles that CIFAR is published as, and runs nothing but numpy's array reader."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        known = {("ndarray",), ("dtype",), ("_reconstruct",), ("encode",)}
        root = module.partition(".")[0]
        if root in ("numpy", "_codecs") and (name,) in known:
            module = {"numpy.core.multiarray": "numpy._core.multiarray"}.get(module, module)
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"the file wants to run {module}.{name}")


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        table: dict[bytes, Any] = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise missing_file(path) from error
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError) as error:
        raise EvaluateError(f"{path} is damaged: {error}", remedy="download the data set again") from error
    return table


def read_cifar10(root: Path, split: str) -> Listing:
    """Read `cifar-10-batches-py/{data_batch_1..5,test_batch}`."""
    files = ["test_batch"] if split == "test" else [f"data_batch_{n}" for n in range(1, 6)]
    return _cifar(root / "cifar-10-batches-py", files, b"labels")


def read_cifar100(root: Path, split: str) -> Listing:
    """Read `cifar-100-python/{train,test}`."""
    return _cifar(root / "cifar-100-python", [split], b"fine_labels")


def _cifar(folder: Path, files: list[str], label_key: bytes) -> Listing:
    tables = [_unpickle(folder / name) for name in files]
    data = np.concatenate([table[b"data"] for table in tables]).reshape(-1, 3, 32, 32)  # (N, 3, 32, 32)
    labels = [int(label) for table in tables for label in table[label_key]]
    name = f"{folder.name}/{files[0] if len(files) == 1 else 'data_batch'}"
    return Listing(pictures=ArrayPictures(name, len(data), lambda n: data[n].transpose(1, 2, 0)), labels=labels)


def read_stl10(root: Path, split: str) -> Listing:
    """Read `stl10_binary/{train,test}_{X,y}.bin`: pictures column by column, labels from 1."""
    folder = root / "stl10_binary"
    try:
        data = np.memmap(folder / f"{split}_X.bin", np.uint8, mode="r").reshape(-1, 3, 96, 96)
        labels = np.fromfile(folder / f"{split}_y.bin", np.uint8)
    except OSError as error:
        raise missing_file(folder / f"{split}_X.bin") from error
    pictures = ArrayPictures(f"stl10/{split}", len(data), lambda n: data[n].transpose(2, 1, 0))
    return Listing(pictures=pictures, labels=[int(label) - 1 for label in labels])


def read_mnist(root: Path, split: str) -> Listing:
    """Read `MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte`, packed with gzip or not."""
    folder = root / "MNIST" / "raw"
    part = {"test": "t10k"}.get(split, split)
    images = _idx(folder / f"{part}-images-idx3-ubyte", header_bytes=16).reshape(-1, 28, 28)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte", header_bytes=8)
    pictures = ArrayPictures(f"mnist/{split}", len(images), lambda n: images[n])
    return Listing(pictures=pictures, labels=labels.tolist())


def _idx(path: Path, *, header_bytes: int) -> Pixels:
    packed = path.with_name(path.name + ".gz")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except OSError as error:
        raise missing_file(path) from error
    return np.frombuffer(data, np.uint8, offset=header_bytes)


def read_pcam(root: Path, split: str) -> Listing:
    """Read `pcam/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`; needs the package h5py."""
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise EvaluateError(
            "pcam is stored as HDF5, which needs the package h5py", remedy="pip install 'declip[pcam]'"
        ) from error
    stem = f"camelyonpatch_level_2_split_{ {'val': 'valid'}.get(split, split) }"
    files = [root / "pcam" / f"{stem}_{kind}.h5" for kind in "xy"]
    try:
        images, labels = (h5py.File(path, "r")[kind] for path, kind in zip(files, "xy", strict=True))
    except OSError as error:
        raise missing_file(files[0]) from error
    pictures = ArrayPictures(f"pcam/{split}", len(images), lambda n: np.asarray(images[n]))
    return Listing(pictures=pictures, labels=[int(label) for label in np.asarray(labels).reshape(-1)])
