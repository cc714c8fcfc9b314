"""From a source to shards: the one loop of `declip prepare`. It prints nothing and yields where it stands."""

import os
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import cv2

from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.engines import run_in_threads, run_on_ray
from declip_cli.data.prepare.exclude import look_at
from declip_cli.data.prepare.hashes import hash64
from declip_cli.data.prepare.seen import Seen
from declip_cli.data.prepare.shard_writer import PartWriter
from declip_cli.data.prepare.stages import LeftOut, Pair, finish_records
from declip_cli.data.prepare.state import OutFolder
from declip_cli.data.shards import storage
from declip_cli.data.shards.store import merge_skipped
from declip_cli.data.sources.find import open_source
from declip_cli.data.sources.records import Source
from declip_cli.errors import DataError

_REPORT_EVERY_S = 0.2
_SAVE_EVERY_S = 60.0
_FEW_RECORDS = 1000
_NUM_OFFENDERS = 5
_REMEDIES = {
    "missing file": "--images FOLDER says where the file names of the list start from",
    "missing caption": "give pictures captions: NAME.txt beside NAME.jpg, a captions.jsonl, or a table",
}
_TOO_MANY_BAD = "too many bad pairs"


@dataclass(slots=True, kw_only=True)
class PrepareReport:
    """Where a run stands, and at its end what came of it."""

    out: str
    kind: str = ""
    num_read: int = 0
    num_pairs: int = 0
    num_shards: int = 0
    num_bad: int = 0
    """Records that could not be read; those that were filtered out are not among them."""
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Cause → (count, first key), of everything that was read and is in no shard."""
    parts: dict[str, int] = field(default_factory=dict)
    """Part → pairs; `train` is the training part."""
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
            "num_skipped": sum(count for count, _ in self.skipped.values()),
            "skipped": _skipped_to_json(self.skipped),
            "parts": self.parts,
            "was_there": self.was_there,
            "seconds": round(self.seconds, 3),
        }


def prepare(config: PrepareConfig) -> Generator[PrepareReport, None, None]:
    """Turn a source into shards that `pretrain` and `retrieve` read.

    A run that was stopped leaves its finished shards, and the same command goes on: where it was if the
    generator was closed, where it last saved (every shard, every minute) if it was killed. The output does not
    depend on the number of workers.

    Args:
        config: what to do.

    Yields:
        The same report, brought up to date a few times a second and once at the end.

    Raises:
        DataError: the source cannot be read, too much of it is bad, the output folder is taken, or the disk is
            full.
    """
    started = time.monotonic()
    source = open_source(config)
    folder = OutFolder(config)
    report = PrepareReport(out=folder.path, kind=source.kind, total=source.total)
    if folder.manifest:
        folder.forget_progress()
        _report_from_manifest(report, folder)
        report.seconds = time.monotonic() - started
        yield report
        return
    try:
        folder.lock()
        try:
            yield report
            yield from _Run(config, source, folder, report).go()
        finally:
            folder.unlock()
    except DataError as error:
        if error.cause != storage.DISK_FULL:
            raise
        raise _with_leftovers(error, folder) from error


def _with_leftovers(error: DataError, folder: OutFolder) -> DataError:
    """Name what a full disk has left behind, and how to go on or to have the space back."""
    files = folder.unfinished_files()
    if not files:
        return error
    size_mb = sum(map(os.path.getsize, files)) / 1e6
    return DataError(
        f"{error.message}; the pairs since the last whole shard, {size_mb:,.1f} MB, are in {', '.join(files)}",
        remedy="free some space and run the same command again to go on; to give up, delete that file",
        cause=error.cause,
    )


class _Run:
    """The state of one run."""

    def __init__(self, config: PrepareConfig, source: Source, folder: OutFolder, report: PrepareReport) -> None:
        self._config, self._source, self._folder, self._report = config, source, folder, report
        self._started = time.monotonic()
        self._excluded = look_at(config.clean.exclude, workers=config.workers)
        self._seen = Seen(config.clean, self._excluded.looks)
        self._writers: dict[str, PartWriter] = {}
        self._offenders: list[str] = []
        self._saved = 0.0
        progress = folder.progress
        if progress:
            report.was_resumed = True
            report.num_read, report.num_bad = progress["num_read"], progress["num_bad"]
            report.skipped = {cause: (count, first) for cause, (count, first) in progress["skipped"].items()}
            self._seen.restore(folder.load_memory())
        try:
            for part, state in progress.get("parts", {"": {}}).items():
                self._open_part(part, state)
        except DataError:
            self._close()
            raise

    def _open_part(self, part: str, state: dict[str, Any]) -> PartWriter:
        writer = PartWriter(
            self._folder.part_path(part),
            self._folder.part_spool(part),
            shard_samples=self._config.shard_samples,
            state=state,
        )
        self._writers[part] = writer
        return writer

    def go(self) -> Iterator[PrepareReport]:
        cv2.setNumThreads(1)  # the pictures are shared out among threads already
        report, reported = self._report, self._started
        records = self._source.records_from(report.num_read)
        work = partial(finish_records, config=self._config)
        run = run_on_ray if self._config.engine == "ray" else run_in_threads
        outcomes = run(work, records, workers=self._config.workers)
        try:
            for outcome in outcomes:
                if not self._saved:
                    self._save()  # from here on a killed run can be taken up
                report.num_read += 1
                finished_shard = self._take(outcome)
                now = time.monotonic()
                if finished_shard or now - self._saved > _SAVE_EVERY_S:
                    self._save()
                if now - reported > _REPORT_EVERY_S:
                    reported = now
                    yield self._update()
            self._check_any()
            self._check_bad(least=1)
            self._finish()
        except (GeneratorExit, DataError) as error:
            if not isinstance(error, DataError) or error.cause == _TOO_MANY_BAD:
                self._save()
            raise
        finally:
            outcomes.close()
            self._close()
        yield report

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _take(self, outcome: Pair | LeftOut) -> bool:
        """Write one outcome or count why not; return True if that finished a shard."""
        if isinstance(outcome, Pair):
            outcome = self._seen.check(outcome)
        if isinstance(outcome, LeftOut):
            self._leave_out(outcome)
            return False
        part = self._part_of(outcome)
        writer = self._writers.get(part) or self._open_part(part, {})
        return writer.add(outcome)

    def _leave_out(self, outcome: LeftOut) -> None:
        merge_skipped(self._report.skipped, {outcome.cause: (1, outcome.key)})
        if outcome.is_bad and not self._source.is_download:
            self._report.num_bad += 1
            if len(self._offenders) < _NUM_OFFENDERS:
                self._offenders.append(f"{outcome.key} ({outcome.cause})")
            self._check_bad(least=_FEW_RECORDS)

    def _check_bad(self, *, least: int) -> None:
        report = self._report
        if report.num_bad > self._config.max_bad * max(report.num_read, least):
            self._check_any()
            raise DataError(
                f"{report.num_bad} of {report.num_read} pairs cannot be read, more than --max-bad "
                f"{self._config.max_bad:g}; the first: {', '.join(self._offenders)}",
                remedy="run the same command with a larger --max-bad to go on, or mend them and add --force",
                cause=_TOO_MANY_BAD,
            )

    def _check_any(self) -> None:
        report = self._update()
        if not report.num_pairs:
            causes = "; ".join(f"{cause}: {n}, first {key}" for cause, (n, key) in report.skipped.items())
            self._folder.forget_progress()
            raise DataError(
                f"no image-text pair found in {self._config.source} ({causes or 'it is empty'}), "
                f"which was taken for: {report.kind}, after {report.num_read} records",
                remedy=_remedy(report.skipped),
            )

    def _part_of(self, pair: Pair) -> str:
        if pair.part:
            return pair.part
        position = hash64(pair.key.encode()) / 2**64
        for part, fraction in self._config.split.items():
            if position < fraction:
                return part
            position -= fraction
        return ""

    def _save(self) -> None:
        report = self._report
        facts = {
            "num_read": report.num_read,
            "num_bad": report.num_bad,
            "skipped": report.skipped,
            "parts": {part: writer.state() for part, writer in self._writers.items()},
        }
        self._folder.save_progress(facts, self._seen.new_bytes())
        self._saved = time.monotonic()

    def _update(self) -> PrepareReport:
        report = self._report
        report.parts = {part or "train": writer.num_pairs for part, writer in self._writers.items()}
        report.num_pairs = sum(report.parts.values())
        report.num_shards = sum(writer.num_shards for writer in self._writers.values())
        report.seconds = time.monotonic() - self._started
        return report

    def _finish(self) -> None:
        for writer in self._writers.values():
            writer.finish_shard()
        self._update()
        self._folder.finish({part: self._manifest(part) for part in self._writers})

    def _manifest(self, part: str) -> dict[str, Any]:
        report, writer = self._report, self._writers[part]
        facts: dict[str, Any] = {
            "source": self._config.source,
            "kind": report.kind,
            "image_side_px": self._config.image_side_px,
            "quality": self._config.quality,
            "clean": asdict(self._config.clean),
            "num_pairs": writer.num_pairs,
            "shards": writer.shards,
        }
        if part:
            return facts | {"part": part}
        totals: dict[str, Any] = {
            "num_read": report.num_read,
            "num_shards": report.num_shards,
            "num_skipped": sum(count for count, _ in report.skipped.values()),
            "skipped": _skipped_to_json(report.skipped),
            "parts": {name: other.num_pairs for name, other in self._writers.items() if name},
        }
        if self._config.clean.exclude:
            totals["excluded"] = {
                "num_pictures": self._excluded.num_pictures,
                "num_unreadable": self._excluded.num_unreadable,
            }
        return facts | totals


def _remedy(skipped: dict[str, tuple[int, str]]) -> str:
    most = max(skipped, key=lambda cause: skipped[cause][0], default="")
    return _REMEDIES.get(most, "check the source; --kind says what it is if it was taken for something else")


def _skipped_to_json(skipped: dict[str, tuple[int, str]]) -> dict[str, dict[str, Any]]:
    return {cause: {"count": count, "first": first} for cause, (count, first) in skipped.items()}


def _report_from_manifest(report: PrepareReport, folder: OutFolder) -> None:
    manifest = folder.manifest
    report.was_there = True
    try:
        report.num_read = manifest["num_read"]
        report.skipped = {cause: (entry["count"], entry["first"]) for cause, entry in manifest["skipped"].items()}
        report.parts = {"train": manifest["num_pairs"]} | manifest["parts"]
        report.num_pairs = sum(report.parts.values())
        report.num_shards = manifest["num_shards"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the manifest of {folder.path} is damaged: {error!r}", remedy="run the same command with --force"
        ) from error
