"""The first pairs of a run as its model sees them, kept for the run's page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from declip_cli.batch import Batch
from declip_cli.config import Views
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.files import write_json
from declip_cli.pages.frame import thumbnail

_NUM_PAIRS = 8
_SIDE_PX = 96
_QUALITY = 75


def observe_first(batches: Iterator[Batch], observe: Callable[[Batch], None]) -> Iterator[Batch]:
    """Pass batches on, the first one after somebody has seen it."""
    first = next(batches)
    observe(first)
    yield first
    yield from batches


def write_first_pairs(path: Path, batch: Batch, views: Views) -> None:
    """Write small copies of the views, and the texts as their tokens read, of the first pairs of a batch on the CPU."""
    read: Callable[[Any], str] = Tokenizer().decode
    pairs = [
        {
            "views": [
                {"kind": kind, "image": thumbnail(image.numpy(), _SIDE_PX, quality=_QUALITY)}
                for kind, image in zip(views.images, images, strict=True)  # (S, S, 3)
            ],
            "texts": [
                {"kind": kind, "text": read(row.tolist())}
                for kind, row in zip(views.texts, rows, strict=True)  # (L,)
            ],
        }
        for images, rows in zip(batch.images[:_NUM_PAIRS], batch.tokens[:_NUM_PAIRS], strict=True)
    ]
    write_json(path, pairs)
