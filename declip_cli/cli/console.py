"""The one place that writes to the terminal: results to stdout, words and progress to stderr."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from declip_cli.errors import DeclipError

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
