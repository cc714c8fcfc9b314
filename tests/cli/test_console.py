"""What is written stays in its cell and its line, whatever stands in captions, paths and messages."""

import io
import json

import pytest
import typer
from rich.console import Console

from declip_cli.cli import console
from declip_cli.errors import ChoiceError, DataError, ModelError

UNSAFE = [
    "\t",
    "\n",
    "\r",
    "\x1b",
    "\x00",
    "\x07",
    "\x7f",
    "\x85",
    "\x9b",
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2066",
    "\udce9",
]
ESCAPED = [r"\t", r"\n", r"\r", r"\x1b", r"\x00", r"\x07", r"\x7f", r"\x85", r"\x9b", r"\u2028", r"\u2029", r"\u202e"]
ESCAPED += [r"\u2066", r"\udce9"]


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch):
    written = io.StringIO()
    options = {"soft_wrap": True, "highlight": False, "emoji": False}
    made = Console(file=written, **options)
    monkeypatch.setattr(console, "terminal", lambda: made)
    return written


@pytest.mark.parametrize(("sign", "escaped"), list(zip(UNSAFE, ESCAPED, strict=True)))
def test_control_characters_are_escaped_everywhere_but_in_json(capsys, errors, sign: str, escaped: str):
    text = f"a{sign}b"
    console.emit_row((text, 0.5, text))
    console.emit({"caption": text, "skipped": {text: 1}}, as_json=False)
    assert capsys.readouterr().out == (f"a{escaped}b\t0.5\ta{escaped}b\ncaption\ta{escaped}b\nskipped.a{escaped}b\t1\n")
    console.note(text)
    assert errors.getvalue() == f"a{escaped}b\n"
    console.emit({"caption": text}, as_json=True)
    out = capsys.readouterr().out
    assert json.loads(out) == {"caption": text}
    assert out.count("\n") == 1


def test_letters_of_all_scripts_and_emoji_stay_as_they_are(capsys, errors):
    text = "Grüße, привет, 你好, שלום, मस्ते, 👩‍🚀, a\u00a0b, :dog: [red]x[/red] \\n"
    console.emit_row((text,))
    console.note(text)
    assert capsys.readouterr().out == errors.getvalue() == text + "\n"


def test_long_texts_are_cut_in_the_plain_form_only(capsys):
    text = "x" * 1_000_000
    console.emit_row((text, "end"))
    console.emit({"caption": text}, as_json=False)
    cut = "x" * 2000 + "…"
    assert capsys.readouterr().out == f"{cut}\tend\ncaption\t{cut}\n"
    console.emit({"caption": text}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"caption": text}


@pytest.mark.parametrize(("error", "code"), [(DataError, 1), (ModelError, 1), (ChoiceError, 2)])
def test_an_error_is_two_lines_and_its_exit_code(capsys, errors, error: type[DataError], code: int):
    with pytest.raises(typer.Exit) as caught, console.user_errors():
        raise error("a\nfix: run this\x1b[2J", remedy="do that")
    assert caught.value.exit_code == code
    assert errors.getvalue() == "error: a\\nfix: run this\\x1b[2J\n  fix: do that\n"
    assert capsys.readouterr().out == ""
