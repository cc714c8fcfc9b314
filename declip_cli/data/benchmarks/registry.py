"""The known evaluation sets of classification: open one by name, list them, download them."""

from collections.abc import Callable
from pathlib import Path

from declip_cli.data.benchmarks.base import (
    Benchmark,
    ClassificationSet,
    data_root,
    names_from_assets,
    templates_from_assets,
)
from declip_cli.data.benchmarks.folders import open_class_folder
from declip_cli.data.demo import demo_records
from declip_cli.data.benchmarks.base import FilePictures
from declip_cli.errors import EvaluateError

SPLITS = ("train", "val", "test")


def open_classification(
    name: str, *, data_root: Path | None = None, split: str = "test", classes_file: Path | None = None
) -> ClassificationSet:
    """Open one split of a classification data set.

    Args:
        name: a known name, `demo`, or a folder with one subfolder per class (or with `train/`, `val/`,
            `test/` that have them).
        data_root: where known sets lie; None takes `$DECLIP_DATA`, else `data/`.
        split: `train`, `val` or `test`; known sets without an official `val` have none.
        classes_file: class names in place of the set's own, one a line.

    Returns:
        The split; its pictures are read when needed.

    Raises:
        EvaluateError: unknown name, missing files, or no such split; says what to do.
    """
    raise NotImplementedError


def available_splits(name: str, *, data_root: Path | None = None) -> tuple[str, ...]:
    """Say which splits a data set has, of train, val and test; see `open_classification`."""
    raise NotImplementedError
