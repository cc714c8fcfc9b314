"""The evaluation sets: where they lie on disk, their classes, prompts, metric and splits."""

from declip_cli.data.benchmarks.base import ClassificationSet
from declip_cli.data.benchmarks.registry import available_splits, open_classification

__all__ = ["ClassificationSet", "available_splits", "open_classification"]
