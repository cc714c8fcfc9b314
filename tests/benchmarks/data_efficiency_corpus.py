"""The pairs of `data_efficiency.py`: who drew what, in nested parts, and what each split is scored on."""

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from declip_cli.data.dataset import Classes, Dataset
from declip_cli.data.files_dataset import Subset
from declip_cli.data.prepare.images import perceptual_hash, shrink_image
from declip_cli.data.shards.store import open_shards
from declip_cli.evaluate.probe_split import ProbeSets
from declip_cli.files import write_text

FIT = ("google", "twitter", "openclipart", "art4apps")
VALIDATION = "emojione2"
"""Early stopping and tuning look at this vendor only."""
FINAL = "openmoji"
"""Scored once a cell; no choice looks at it."""
FURTHER = "further"
"""Name of images that are not in the archive, on which scores may be checked again."""
LEFT_OUT = ("emojione1",)
"""An early version of the drawings of `VALIDATION`, some of which `twitter` shares."""
SIZES = (1.0, 0.5, 0.25, 0.125)
NEAR_BITS = 4
"""Bits of 64 in which the perceptual hashes of look-alikes may differ, as in `declip prepare --duplicates near`."""
_SIDE_PX = 64
_PROBE_PARTS = ((0.0, 0.4), (0.4, 0.6), (0.6, 1.0))
"""Shares of the names of emoji in a linear probe's training, validation and test images."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One image as it goes into a shard."""

    vendor: str
    key: str
    jpeg: bytes
    looks: int
    caption: str
    category: str
    licence: str


def read_corpus(path: Path) -> Iterator[Pair]:
    """Read the archive: folders of images, each with a `captions.jsonl` of rows with `file`, `caption`, `category`.

    The vendor is the first part of `file`, or the folder's name where that is `images`.
    """
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar if member.isfile()}
        for name in sorted(one for one in members if one.endswith("/captions.jsonl")):
            folder = name.removesuffix("/captions.jsonl")
            for line in tar.extractfile(members[name]).read().decode().splitlines():
                row = json.loads(line)
                first, _, stem = row["file"].rpartition(".")[0].rpartition("/")
                vendor = folder.rpartition("/")[2] if first == "images" else first
                data = tar.extractfile(members[f"{folder}/{row['file']}"]).read()
                small = shrink_image(data, side_px=_SIDE_PX, quality=95)
                looks = perceptual_hash(small.pixels)
                yield Pair(vendor, stem.replace(".", "_"), small.jpeg, looks, *_texts(row))


def _texts(row: dict[str, str]) -> tuple[str, str, str]:
    return row["caption"], row.get("category", ""), row.get("licence", "unknown")


def near_duplicates(hashes: Sequence[int], others: Sequence[int], bits: int = NEAR_BITS) -> list[bool]:
    """Say of each hash whether one of the others differs from it in at most some bits; 0 is like none."""
    rest = np.array([other for other in set(others) if other], dtype=np.uint64)
    return [bool(one) and bool((np.bitwise_count(rest ^ np.uint64(one)) <= bits).any()) for one in hashes]


def nested_parts(keys: Sequence[str], seed: int, sizes: Sequence[float] = SIZES) -> list[list[int]]:
    """Divide pairs into parts, the first n of which make the n-th smallest size: small sizes lie in the large ones.

    Args:
        keys: of all pairs, N.
        seed: draws the order.
        sizes: shares of N, each in (0, 1].

    Returns:
        One list of numbers for each size, smallest first.
    """
    order = sorted(range(len(keys)), key=lambda n: hashlib.sha256(f"{seed} {keys[n]}".encode()).digest())
    bounds = [0, *(round(size * len(keys)) for size in sorted(sizes))]
    return [order[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]


class Corpus:
    """The prepared splits in a work folder; prepared at the first use.

    Args:
        source: the archive, as of `read_corpus`.
        further: another, on which all models are scored again, or None.
        work: where shards, indexes and `corpus.json` (what there is, and what was left out) are written.
    """

    def __init__(self, source: Path, work: Path, further: Path | None = None) -> None:
        self._work, self.index_dir = work, work / "index"
        self.has_further = further is not None
        if not (work / "corpus.json").is_file():
            self._prepare(list(read_corpus(source)))
        self.facts = json.loads((work / "corpus.json").read_text())
        if further is not None and not (work / f"{FURTHER}.tar").is_file():
            pairs = list(read_corpus(further))
            write_text(work / f"{FURTHER}.json", json.dumps(_rows(pairs)))
            write_shard(work / f"{FURTHER}.tar", pairs)

    def _prepare(self, pairs: list[Pair]) -> None:
        by_vendor = {vendor: [one for one in pairs if one.vendor == vendor] for vendor in {one.vendor for one in pairs}}
        hashes = {vendor: [one.looks for one in some] for vendor, some in by_vendor.items()}
        near = {
            f"{one} ~ {other}": sum(near_duplicates(hashes[one], hashes[other]))
            for one in sorted(hashes)
            for other in sorted(hashes)
            if one != other
        }
        fit = [one for vendor in FIT for one in by_vendor[vendor]]
        scored = hashes[VALIDATION] + hashes[FINAL]
        is_near = near_duplicates([one.looks for one in fit], scored)
        kept = [one for one, looks_alike in zip(fit, is_near, strict=True) if not looks_alike]
        self._work.mkdir(parents=True, exist_ok=True)
        for name, some in (("fit", kept), (VALIDATION, by_vendor[VALIDATION]), (FINAL, by_vendor[FINAL])):
            write_shard(self._work / f"{name}.tar", some)
        facts = {
            "pairs": {vendor: len(some) for vendor, some in sorted(by_vendor.items())},
            "licences": {vendor: sorted({one.licence for one in some}) for vendor, some in sorted(by_vendor.items())},
            "fit": [*FIT],
            "validation": VALIDATION,
            "final": FINAL,
            "left_out": [*LEFT_OUT],
            "near_duplicates": near,
            "fit_pairs_like_scored_ones": sum(is_near),
            "fit_pairs": len(kept),
        }
        rows = {name: _rows(some) for name, some in (("fit", kept), (VALIDATION, by_vendor[VALIDATION]))}
        write_text(self._work / "rows.json", json.dumps(rows | {FINAL: _rows(by_vendor[FINAL])}))
        write_text(self._work / "corpus.json", json.dumps(facts, indent=2) + "\n")

    @functools.cached_property
    def _table(self) -> dict[str, list[dict[str, str]]]:
        return json.loads((self._work / "rows.json").read_text())

    def fit_paths(self, size: float, seed: int) -> list[str]:
        """Return the shards of a share of the fit pairs; those of a smaller share are among them."""
        folder = self._work / f"seed-{seed}"
        paths = [folder / f"part-{number}.tar" for number in range(len(SIZES))]
        if not all(path.is_file() for path in paths):
            with tarfile.open(self._work / "fit.tar") as tar:
                data = {member.name: tar.extractfile(member).read() for member in tar}
            keys = [row["key"] for row in self._table["fit"]]
            folder.mkdir(exist_ok=True)
            for path, numbers in zip(paths, nested_parts(keys, seed), strict=True):
                files = [(name, data[name]) for n in numbers for name in (f"{keys[n]}.jpg", f"{keys[n]}.txt")]
                write_tar(path, files)
        return [str(path) for path in paths[: sorted(SIZES).index(size) + 1]]

    def scored(self, vendor: str) -> Dataset:
        """Open a vendor's emoji: each name is a class and a caption."""
        found, rows = self._open(vendor)
        names = tuple(dict.fromkeys(row["caption"] for row in rows))
        return _labelled(found, [names.index(row["caption"]) for row in rows], names)

    def probe_sets(self) -> ProbeSets:
        """Divide by name: the probe learns categories from fit emoji and is tested on other names, drawn by `FINAL`."""
        parts = []
        categories: tuple[str, ...] = ()
        for name, bounds in zip(("fit", "fit", FINAL), _PROBE_PARTS, strict=True):
            found, rows = self._open(name)
            emoji = [n for n, row in enumerate(rows) if row["vendor"] in ("google", "twitter", FINAL)]
            chosen = [n for n in emoji if bounds[0] <= _place(rows[n]["caption"]) < bounds[1]]
            categories = categories or tuple(sorted({rows[n]["category"] for n in emoji}))
            labels = [categories.index(rows[n]["category"]) for n in chosen]
            parts.append(Subset(found, chosen, labels=labels, classes=Classes(names=categories)))
        train, val, test = parts
        return ProbeSets(name="categories", train=train, val=val, test=test)

    def _open(self, name: str) -> tuple[Dataset, list[dict[str, str]]]:
        found = open_shards([str(self._work / f"{name}.tar")], cache_dir=str(self.index_dir))
        found.name = name
        rows = json.loads((self._work / f"{FURTHER}.json").read_text()) if name == FURTHER else self._table[name]
        by_key = {row["key"]: row for row in rows}
        return found, [by_key[found.key(number).rpartition("/")[2]] for number in range(len(found))]


def _labelled(found: Dataset, labels: list[int], names: tuple[str, ...]) -> Dataset:
    found.labels, found.classes = labels, Classes(names=names, templates=("{}",))
    return found


def _place(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32


def _rows(pairs: Iterable[Pair]) -> list[dict[str, str]]:
    return [
        {"key": f"{one.vendor}-{one.key}", "vendor": one.vendor, "caption": one.caption, "category": one.category}
        for one in pairs
    ]


def write_shard(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs into one archive."""
    files = []
    for one in pairs:
        name = f"{one.vendor}-{one.key}"
        files += [(f"{name}.jpg", one.jpeg), (f"{name}.txt", one.caption.encode())]
    write_tar(path, files)


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write an archive that appears whole."""
    new = path.with_suffix(".new")
    with tarfile.open(new, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    new.rename(path)
