"""How far something is, on stderr."""

import io

import pytest
from rich.console import Console

from declip_cli.cli import console


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    clock = iter([0.0, 3.0, 11.0, 12.0, 25.0])
    written = io.StringIO()
    made = Console(file=written, soft_wrap=True, highlight=False)
    monkeypatch.setattr(console, "terminal", lambda: made)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress_of("cifar10") as tell:
        for done in (128, 256, 384):
            tell(done, 10000)
        tell(512, 0, "2 skipped")
    assert written.getvalue() == "cifar10: 256 of 10000\ncifar10: 512: 2 skipped\n"
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch):
    written = io.StringIO()
    made = Console(file=written, force_terminal=True, width=80)
    monkeypatch.setattr(console, "terminal", lambda: made)
    with console.progress_of("cifar10") as tell:
        tell(5, 10)
    assert "cifar10" in written.getvalue()
    assert written.getvalue().endswith("\x1b[2K")


def test_rows_are_apart_by_tabs(capsys: pytest.CaptureFixture):
    console.emit_row(("demo", 3, "x y"))
    assert capsys.readouterr().out == "demo\t3\tx y\n"
