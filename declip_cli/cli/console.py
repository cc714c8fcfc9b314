"""The one place that writes to the terminal: results to stdout, words and progress to stderr."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from declip_cli.errors import DeclipError

_PLAIN_PROGRESS_S = 10.0

stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def emit(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Write a command's result to stdout.

    Args:
        report: nested dicts, lists, strings and numbers with stable snake_case keys.
        as_json: one JSON object; else `key<TAB>value` lines with dotted keys.
    """
    if as_json:
        text = json.dumps(report, allow_nan=False, ensure_ascii=False)
    else:
        text = "\n".join(f"{key}\t{value}" for key, value in _flatten("", report))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _flatten(f"{prefix}.{number}", item)
    else:
        yield prefix, f"{value:.6g}" if isinstance(value, float) else str(value)


def emit_row(cells: Iterable[object]) -> None:
    """Write one line of a table to stdout, its cells apart by tabs."""
    sys.stdout.write("\t".join(map(str, cells)) + "\n")


def note(message: str) -> None:
    """Tell people something on stderr, in one line."""
    stderr.print(message, markup=False)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors the user can mend into two lines on stderr and exit code 1; Ctrl-C into 130."""
    try:
        yield
    except DeclipError as error:
        note(f"error: {error.message}\n  fix: {error.remedy}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        note("interrupted")
        raise typer.Exit(130) from interrupt


@contextmanager
def progress_of(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is: a bar on a terminal, a line every 10 seconds otherwise.

    Args:
        label: what is being done.

    Yields:
        A function to be told how many are done and how many there are.
    """
    if not stderr.is_terminal:
        yield _plain_progress(label)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress(label: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PLAIN_PROGRESS_S:
            last = now
            note(f"{label}: {done} of {total}")

    return tell
