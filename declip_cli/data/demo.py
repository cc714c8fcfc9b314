"""The demo corpus that comes along: 3,651 emoji by three vendors and 600 clip arts, with captions."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from declip_cli.assets import asset_path
from declip_cli.data.samples import RawSample
from declip_cli.errors import DataError

_TEST_VENDOR = "twitter"
_VALIDATION_VENDOR = "emojione2"
_PARTS: dict[str, tuple[str, ...]] = {
    "": ("google", "emojione2", "openclipart"),
    "train": ("google", "emojione2", "openclipart"),
    "fit": ("google", "openclipart"),
    "validation": (_VALIDATION_VENDOR,),
    "test": (_TEST_VENDOR,),
}


@dataclass(frozen=True, slots=True)
class DemoRecord:
    """One picture of the demo corpus."""

    key: str
    path: Path
    caption: str
    """The text it is trained with; keywords are left out, they make the scores worse."""
    name: str
    """What the picture shows, the same words for all vendors; the class in zero-shot classification."""
    category: str
    """One of nine coarse groups of emoji, or of twelve of clip art."""
    vendor: str
    """Who drew it: google, emojione2, twitter or openclipart."""


def demo_records(part: str = "") -> list[DemoRecord]:
    """List the pictures of one part of the demo corpus.

    Args:
        part: empty or `train` for all training pictures (vendors google and emojione2, clip art); `fit`
            (google and clip art) and `validation` (emojione2) divide these by the style of drawing, as the
            test does; `test` is the vendor twitter, never trained on.

    Returns:
        Records in a fixed order.

    Raises:
        DataError: there is no such part.
    """
    if part not in _PARTS:
        raise DataError(
            f"the demo corpus has no part {part!r}", remedy=f"choose from {', '.join(filter(None, _PARTS))}"
        )
    return [record for vendor in _PARTS[part] for record in _by_vendor()[vendor]]


@cache
def _by_vendor() -> Mapping[str, Sequence[DemoRecord]]:
    found: dict[str, list[DemoRecord]] = {}
    for folder in ("emoji", "openclipart"):
        root = asset_path(f"demo/{folder}")
        for line in (root / "captions.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            vendor = row.get("vendor", folder)
            key = f"{vendor}/{Path(row['file']).stem}"
            name = row["title"] if folder == "openclipart" else row["caption"]
            path = root / row["file"]
            record = DemoRecord(key, path, row["caption"], name, row["category"], vendor)
            found.setdefault(vendor, []).append(record)
    return found


class DemoStore:
    """Pairs of the demo corpus by number, held in memory (about 1 kB a picture)."""

    def __init__(self, records: Sequence[DemoRecord]) -> None:
        self._records = list(records)
        self._images = [record.path.read_bytes() for record in self._records]
        digest = hashlib.sha256()
        for record, image in zip(self._records, self._images, strict=True):
            digest.update(f"{record.key}\0{record.caption}\0".encode())
            digest.update(image)
        self.fingerprint = digest.hexdigest()
        self.skipped: dict[str, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def read(self, number: int) -> RawSample:
        """Read one pair; see `SampleStore.read`."""
        if not 0 <= number < len(self._records):
            raise IndexError(number)
        record = self._records[number]
        return RawSample(record.key, self._images[number], (record.caption,))


def demo_samples(part: str = "") -> DemoStore:
    """Open one part of the demo corpus as a store of pairs.

    Args:
        part: as of `demo_records`.

    Returns:
        The store.

    Raises:
        DataError: there is no such part.
    """
    return DemoStore(demo_records(part))
