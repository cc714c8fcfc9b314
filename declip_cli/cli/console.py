"""The one place that writes to the terminal: results to stdout, words and progress to stderr."""

import functools
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

from declip_cli.errors import DeclipError

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_PROGRESS_S = 10.0
_MAX_CHARS = 2000
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, colors, breaks a line or a column, or turns the order of letters around; and half pairs."""
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


@functools.cache
def terminal() -> "Console":
    """Open stderr for words and bars; its package takes a while to import, which help should not wait for."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def emit(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Write a command's result to stdout: nested dicts, lists, strings and numbers with stable snake_case keys.

    With `as_json` it is one JSON object, exact; else `key<TAB>value` lines with dotted keys, made `plain`.
    """
    if as_json:
        text = json.dumps(report, allow_nan=False, ensure_ascii=False)
        text = _HALF_PAIR.sub(_escape, text)  # a name that is not UTF-8 cannot be written in another way
    else:
        text = "\n".join(f"{plain(key)}\t{plain(value)}" for key, value in _flatten("", report))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def plain(text: str) -> str:
    r"""Make a text from anywhere, such as a caption or a path, fit for one cell of a table and for a terminal.

    It comes in one line, control characters written as in Python (`\n`, `\x1b`, `\u202e`), cut after 2,000 characters.
    """
    if len(text) > _MAX_CHARS:
        text = text[:_MAX_CHARS] + "…"
    return _UNSAFE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return _SHORT.get(found[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


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
    """Write one line of a table to stdout, its cells made `plain` and apart by tabs."""
    sys.stdout.write("\t".join(plain(str(cell)) for cell in cells) + "\n")


def note(message: str) -> None:
    """Write a note to stderr, in one line, made `plain`."""
    terminal().print(plain(message), markup=False)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors the user can fix into two lines on stderr and their exit code; Ctrl-C into 130."""
    try:
        yield
    except DeclipError as error:
        note(f"error: {error.message}")
        note(f"  fix: {error.remedy}")
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as interrupt:
        note("interrupted")
        raise typer.Exit(130) from interrupt


class Progress(Protocol):
    """Shows how far something is."""

    def __call__(self, done: int, total: int, words: str = "", /) -> None:
        """Tell how many are done, how many there are (0 where unknown), and what else is worth knowing."""


@contextmanager
def progress_of(label: str) -> Iterator[Progress]:
    """Show progress, which the function it yields is given: a bar on a terminal, else a line every 10 s."""
    if not terminal().is_terminal:
        last = time.monotonic()

        def tell(done: int, total: int, words: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PLAIN_PROGRESS_S:
                last = now
                note(f"{label}: {done}" + (f" of {total}" if total else "") + (f": {words}" if words else ""))

        yield tell
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[words]}", markup=False), console=terminal(), transient=True) as bar:
        task = bar.add_task(plain(label), total=None, words="")

        def show(done: int, total: int, words: str = "") -> None:
            bar.update(task, completed=done, total=total or None, words=words)

        yield show
