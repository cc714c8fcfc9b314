"""`declip prepare`: images with captions into shards."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from declip_cli.cli.console import emit, note, progress_of, user_errors
from declip_cli.cli.options import Force, Json
from declip_cli.config_files import build_config
from declip_cli.data.prepare.config import CleanConfig, Duplicates, Engine, PrepareConfig, SourceKind
from declip_cli.errors import ConfigError

if TYPE_CHECKING:
    from declip_cli.data.prepare.pipeline import PrepareReport

_DEFAULTS = PrepareConfig(source="", out="")
_CLEAN = _DEFAULTS.clean
_CLEANING = "Cleaning: which readable pairs to omit"


def prepare(
    source: Annotated[str, typer.Argument(help="Folder, table, tar pattern, list, or fsspec URL of one.")],
    out: Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) for the shards.")],
    kind: Annotated[SourceKind | None, typer.Option(help="Kind of SOURCE; detected by default.")] = None,
    image_column: Annotated[str, typer.Option(help="Column of a table that holds images.")] = "",
    caption_columns: Annotated[
        list[str], typer.Option("--caption-column", help="Column that holds captions; may be repeated, all are kept.")
    ] = [],  # noqa: B006  (Typer copies it)
    images: Annotated[str, typer.Option(help="Folder that the file names of a list are relative to.")] = "",
    image_side_px: Annotated[
        int, typer.Option(help="Shorter side that larger images are resized to.")
    ] = _DEFAULTS.image_side_px,
    quality: Annotated[int, typer.Option(help="JPEG quality of resized images.")] = _DEFAULTS.quality,
    shard_samples: Annotated[int, typer.Option(help="Pairs per shard.")] = _DEFAULTS.shard_samples,
    split: Annotated[
        list[str], typer.Option(help="Fraction of the pairs for another split, such as val=0.01; may be repeated.")
    ] = [],  # noqa: B006
    engine: Annotated[Engine, typer.Option(help="What processes the images.")] = _DEFAULTS.engine,
    min_caption_chars: Annotated[
        int, typer.Option(help="Omit shorter captions.", rich_help_panel=_CLEANING)
    ] = _CLEAN.min_caption_chars,
    max_caption_chars: Annotated[
        int | None,
        typer.Option(help="Omit longer captions.", rich_help_panel=_CLEANING),
    ] = _CLEAN.max_caption_chars,
    scripts: Annotated[
        list[str],
        typer.Option("--script", help="Keep only captions in this script, such as latin.", rich_help_panel=_CLEANING),
    ] = [],  # noqa: B006
    max_caption_repeats: Annotated[
        int | None,
        typer.Option(help="Pairs that may share a caption; unlimited by default.", rich_help_panel=_CLEANING),
    ] = _CLEAN.max_caption_repeats,
    min_side_px: Annotated[
        int, typer.Option(help="Omit smaller images.", rich_help_panel=_CLEANING)
    ] = _CLEAN.min_side_px,
    max_aspect: Annotated[
        float | None,
        typer.Option(help="Largest aspect ratio: longer side / shorter side.", rich_help_panel=_CLEANING),
    ] = _CLEAN.max_aspect,
    duplicates: Annotated[
        Duplicates,
        typer.Option(help="keep them, omit exact copies, or omit near copies too.", rich_help_panel=_CLEANING),
    ] = _CLEAN.duplicates,
    exclude: Annotated[
        list[str],
        typer.Option(
            help="Evaluation images whose copies are omitted: a folder, shards or a known set; may be repeated.",
            rich_help_panel=_CLEANING,
        ),
    ] = [],  # noqa: B006
    workers: Annotated[int, typer.Option(help="Threads; 0 uses all available cores.")] = _DEFAULTS.workers,
    max_bad: Annotated[
        float, typer.Option(help="Largest share of unreadable pairs before the command stops.")
    ] = _DEFAULTS.max_bad,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn images with captions into shards for training.

    SOURCE may be a folder with `captions.jsonl`, a folder of images with a `.txt` or `.json` of the same name
    beside each, a table (CSV, TSV, JSON lines, Parquet), COCO captions, Flickr30k, tar shards of img2dataset or
    WebDataset, the lists of DeCLIP and YFCC15M, or a list of URLs to download. What cannot be read is skipped
    and counted. A command that was interrupted goes on when it is run again.

    Example: `declip prepare photos/ --out shards/ --split val=0.01`
    """
    given = locals()
    del given["as_json"]
    with user_errors():
        emit(_run(_config(given)).to_json(), as_json=as_json)


def _config(given: dict[str, Any]) -> PrepareConfig:
    """Divide the options among the configurations, whose fields have the same names."""
    clean = {setting.name: given.pop(setting.name) for setting in fields(CleanConfig) if setting.name in given}
    return build_config(PrepareConfig, given | {"split": _fractions(given["split"]), "clean": clean}, where="prepare")


def _fractions(words: list[str]) -> dict[str, float]:
    splits = {}
    for word in words:
        name, _, fraction = word.partition("=")
        try:
            splits[name] = float(fraction)
        except ValueError as error:
            raise ConfigError(f"--split wants NAME=FRACTION (got {word!r})", remedy="--split val=0.01") from error
    return splits


def _run(config: PrepareConfig) -> "PrepareReport":
    from declip_cli.data.prepare.pipeline import prepare as prepare_shards

    reports = prepare_shards(config)
    with _interrupts() as is_stopped, progress_of("prepare") as show:
        for report in reports:
            if report.kind == "urls" and not report.num_read:
                note("downloading; images come a thousand at a time, the first after a minute or so")
            rate = report.num_read / report.seconds if report.seconds else 0.0
            words = f"{report.num_pairs:,} pairs, {report.skipped.num:,} skipped, {rate:,.0f}/s"
            show(report.num_read, report.total, words)
            if is_stopped():
                reports.close()
                note(f"stopped at {report.num_read:,} of the records; run the same command again to continue")
                raise KeyboardInterrupt
    if report.was_there:
        note(f"{report.out} is already finished; --force prepares it again")
    for cause, (count, first) in report.skipped.items():
        note(f"skipped {count:,}: {cause} (first: {first})")
    return report


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Let the first Ctrl-C finish the current pair; the second one stops at once."""
    stops: list[int] = []

    def stop(signum: int, frame: object) -> None:
        stops.append(signum)
        note("stopping; Ctrl-C again stops at once and loses the work since the last shard or minute")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(stops)
    finally:
        signal.signal(signal.SIGINT, before)
