"""From a source to shards: the one loop of `declip prepare`. It prints nothing and yields its progress."""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import cv2
import torch

from declip_cli.data.dataset import Skips
from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.deduplicate import Deduplicator, hash_images
from declip_cli.data.prepare.executors import run_in_threads, run_on_ray
from declip_cli.data.prepare.find_source import open_source
from declip_cli.data.prepare.hashes import hash64
from declip_cli.data.prepare.process import Pair, process_records
from declip_cli.data.prepare.shard_writer import SplitWriter
from declip_cli.data.prepare.state import OutFolder
from declip_cli.data.sources.records import Rejected, Source
from declip_cli.errors import DataError

_REPORT_EVERY_S = 0.2
_SAVE_EVERY_S = 60.0
_FEW_RECORDS = 1000
_NUM_OFFENDERS = 5
_REMEDIES = {
    "missing file": "--images FOLDER is the folder that the list's file names are relative to",
    "missing caption": "give images captions: NAME.txt beside NAME.jpg, a captions.jsonl, or a table",
}
_OTHER_REMEDY = "check the source; set --kind if it was taken for something else"


@dataclass(slots=True, kw_only=True)
class PrepareReport:
    """The progress of a run, and at its end the result."""

    out: str
    kind: str = ""
    num_read: int = 0
    num_pairs: int = 0
    num_shards: int = 0
    num_bad: int = 0
    """Records that could not be read; those that were filtered out are not among them."""
    skipped: Skips = field(default_factory=Skips)
    """Everything that was read and is in no shard."""
    splits: dict[str, int] = field(default_factory=dict)
    """Split → pairs."""
    seconds: float = 0.0
    total: int = 0
    """Records there are, 0 where unknown."""
    was_resumed: bool = False
    was_there: bool = False
    """True if an earlier run of the same command had already finished."""

    def to_json(self) -> dict[str, Any]:
        """Return the command's result: fractions in [0, 1], times in seconds."""
        return {
            "out": self.out,
            "kind": self.kind,
            "num_read": self.num_read,
            "num_pairs": self.num_pairs,
            "num_shards": self.num_shards,
            "num_skipped": self.skipped.num,
            "skipped": self.skipped.to_json(),
            "splits": self.splits,
            "parts": self.splits,  # the name in version 0.1, until the next
            "was_there": self.was_there,
            "seconds": round(self.seconds, 3),
        }


def prepare(config: PrepareConfig) -> Generator[PrepareReport, None, None]:
    """Turn a source into shards that `pretrain` and `retrieve` read.

    A run that was stopped leaves its finished shards, and the same command goes on: where it was if the
    generator was closed, where it last saved (every shard, every minute) if it was killed. The output does not
    depend on the number of workers.

    Yields:
        The same report, brought up to date a few times a second and once at the end.

    Raises:
        DataError: the source cannot be read, too much of it is bad, the output folder is taken, or the disk is
            full.
    """
    source = open_source(config)
    folder = OutFolder(config)
    report = PrepareReport(out=folder.path, kind=source.kind, total=source.total)
    if folder.manifest:
        folder.forget_progress()
        yield _from_manifest(report, folder)
        return
    with folder.locked():
        yield report
        yield from _Run(config, source, folder, report).go()


def _from_manifest(report: PrepareReport, folder: OutFolder) -> PrepareReport:
    """Report what an earlier run has done."""
    manifest = folder.manifest
    report.was_there = True
    try:
        report.num_read, report.num_shards = manifest["num_read"], manifest["num_shards"]
        report.skipped.update({cause: (found["count"], found["first"]) for cause, found in manifest["skipped"].items()})
        report.splits = {"train": manifest["num_pairs"]} | manifest["splits"]
        report.num_pairs = sum(report.splits.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the manifest of {folder.path} is damaged: {error!r}", remedy="run the same command with --force"
        ) from error
    return report


class _Run:
    """The state of one run."""

    def __init__(self, config: PrepareConfig, source: Source, folder: OutFolder, report: PrepareReport) -> None:
        self._config, self._source, self._folder, self._report = config, source, folder, report
        self._started = time.monotonic()
        phashes, self._excluded = hash_images(config.clean.exclude, workers=config.workers)
        self._deduplicator = Deduplicator(config.clean, phashes)
        self._writers: dict[str, SplitWriter] = {}
        self._offenders: list[str] = []
        self._saved = 0.0

    def go(self) -> Iterator[PrepareReport]:
        """Do what is left to do, and yield the report now and then."""
        cv2.setNumThreads(1)  # the images are shared out among threads already
        torch.set_num_threads(1)
        report, reported = self._report, self._started
        try:
            self._take_up(self._folder.progress)
            if self._source.is_download:
                self._save()  # hours may pass before the first record
            for finished_shard in self._outcomes():
                now = time.monotonic()
                if finished_shard or now - self._saved > _SAVE_EVERY_S:
                    self._save()
                if now - reported > _REPORT_EVERY_S:
                    reported = now
                    yield self._update()
            self._stop_if_bad(least=1)
            self._finish()
        except GeneratorExit:
            self._save()
            raise
        finally:
            for writer in self._writers.values():
                writer.close()
        yield report

    def _take_up(self, progress: dict[str, Any]) -> None:
        """Go on where the progress of an interrupted run ends."""
        if progress:
            report = self._report
            report.was_resumed = True
            report.num_read, report.num_bad = progress["num_read"], progress["num_bad"]
            report.skipped.update({cause: (count, first) for cause, (count, first) in progress["skipped"].items()})
            self._deduplicator.restore(self._folder.load_memory())
        for split, state in progress.get("splits", {"": {}}).items():
            self._open_split(split, state)

    def _open_split(self, split: str, state: dict[str, Any]) -> SplitWriter:
        writer = SplitWriter(*self._folder.places(split), shard_samples=self._config.shard_samples, state=state)
        self._writers[split] = writer
        return writer

    def _outcomes(self) -> Iterator[bool]:
        """Take in record after record; yield True where that finished a shard."""
        config, report = self._config, self._report
        run = run_on_ray if config.engine == "ray" else run_in_threads
        records = islice(self._source.records, report.num_read, None)
        with closing(run(partial(process_records, config=config), records, workers=config.workers)) as outcomes:
            for outcome in outcomes:
                if not self._saved:
                    self._save()  # from here on a killed run can be taken up
                report.num_read += 1
                yield self._take(outcome)

    def _take(self, outcome: Pair | Rejected) -> bool:
        if isinstance(outcome, Pair):
            outcome = self._deduplicator.check(outcome)
        if isinstance(outcome, Pair):
            split = self._split_of(outcome)
            return (self._writers.get(split) or self._open_split(split, {})).add(outcome)
        self._report.skipped.add(outcome.cause, outcome.key)
        if outcome.is_bad and not self._source.is_download:
            self._report.num_bad += 1
            self._offenders.append(f"{outcome.key} ({outcome.cause})")
            del self._offenders[_NUM_OFFENDERS:]
            self._stop_if_bad(least=_FEW_RECORDS)
        return False

    def _split_of(self, pair: Pair) -> str:
        if pair.split:
            return pair.split
        position = hash64(pair.key.encode()) / 2**64
        for split, fraction in self._config.split.items():
            if position < fraction:
                return split
            position -= fraction
        return ""

    def _stop_if_bad(self, *, least: int) -> None:
        """Raise if nothing is usable, or too little of what was read, but of at least so many records."""
        report, is_over = self._update(), least == 1
        is_bad = report.num_bad > self._config.max_bad * max(report.num_read, least)
        if not report.num_pairs and (is_bad or is_over):
            most = max(report.skipped, key=lambda cause: report.skipped[cause][0], default="")
            self._folder.forget_progress()
            raise DataError(
                f"no image-text pair found in {self._config.source} ({str(report.skipped) or 'it is empty'}), "
                f"which was taken for: {report.kind}, after {report.num_read} records",
                remedy=_REMEDIES.get(most, _OTHER_REMEDY),
            )
        if is_bad:
            self._save()
            raise DataError(
                f"{report.num_bad} of {report.num_read} pairs cannot be read, more than --max-bad "
                f"{self._config.max_bad:g}; the first: {', '.join(self._offenders)}",
                remedy="run the same command with a larger --max-bad to continue, or repair them and add --force",
            )

    def _save(self) -> None:
        report = self._report
        facts = {
            "num_read": report.num_read,
            "num_bad": report.num_bad,
            "skipped": report.skipped,
            "splits": {split: writer.state() for split, writer in self._writers.items()},
        }
        self._folder.save_progress(facts, self._deduplicator.new_bytes())
        self._saved = time.monotonic()

    def _update(self) -> PrepareReport:
        report = self._report
        report.splits = {split or "train": writer.num_pairs for split, writer in self._writers.items()}
        report.num_pairs = sum(report.splits.values())
        report.num_shards = sum(len(writer.shards) for writer in self._writers.values())
        report.seconds = time.monotonic() - self._started
        return report

    def _finish(self) -> None:
        for writer in self._writers.values():
            writer.finish_shard()
        config, report = self._config, self._update()
        shared = {
            "source": config.source,
            "kind": report.kind,
            "image_side_px": config.image_side_px,
            "quality": config.quality,
            "clean": asdict(config.clean),
        }
        manifests: dict[str, dict[str, Any]] = {}
        for split, writer in self._writers.items():
            own = {"num_pairs": writer.num_pairs, "shards": writer.shards, "index_sha256": writer.join_indexes()}
            manifests[split] = shared | own | ({"split": split} if split else {})
        result = report.to_json()
        manifests[""] |= {name: result[name] for name in ("num_read", "num_shards", "num_skipped", "skipped")}
        manifests[""]["splits"] = {split: manifest["num_pairs"] for split, manifest in manifests.items() if split}
        if config.clean.exclude:
            manifests[""]["excluded"] = self._excluded
        self._folder.finish(manifests)
