"""Data sets in memory, for tests."""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from declip_cli.assets import asset_path
from declip_cli.data.dataset import Classes, Dataset, Example, Pixels, Skips


class MemoryDataset(Dataset):
    """Images that are given, or functions that return them or raise."""

    fingerprint = "in memory"

    def __init__(
        self,
        images: Sequence[bytes | Pixels | Callable[[], bytes]],
        *,
        keys: Sequence[str] | None = None,
        captions: Sequence[tuple[str, ...]] = (),
        labels: Sequence[int] = (),
        classes: Classes | None = None,
        name: str = "made up",
        fold_size: int = 0,
    ) -> None:
        self.images = images
        self.keys = keys or [f"{number}.jpg" for number in range(len(images))]
        self.texts = captions
        self.labels, self.classes, self.name, self.fold_size = labels, classes, name, fold_size
        self.skipped = Skips()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, number: int) -> Example:
        image = self.images[number]
        return Example(self.key(number), image() if callable(image) else image, self.captions(number))

    def key(self, number: int) -> str:
        return self.keys[number]

    def captions(self, number: int) -> tuple[str, ...]:
        return self.texts[number] if self.texts else ()

    def stamp(self, number: int) -> str:
        return ""  # nothing vouches for what a function returns


def demo_metadata() -> Iterator[dict[str, Any]]:
    """What stands beside each image in the shards of the demo, and its key."""
    for path in sorted(asset_path("demo").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name.endswith(".json") else None
                if content is not None:
                    yield json.loads(content.read()) | {"key": member.name.removesuffix(".json")}
