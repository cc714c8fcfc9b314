"""`declip report` as a user types it."""

import json
from functools import partial

from tests.command_line import declip
from tests.pages.test_run_page import put_run, report

run = partial(declip, "report")


def test_the_page_lies_in_the_run_folder(tmp_path):
    path = put_run(tmp_path / "run", [report(1)])
    result = run(path, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"out": str(path / "report.html")}
    assert (path / "report.html").is_file()


def test_several_runs_make_one_page(tmp_path):
    paths = [put_run(tmp_path / name, [report(1)]) for name in ("a", "b")]
    result = run(*paths, "--out", tmp_path / "both.html")
    assert result.stdout == f"out\t{tmp_path / 'both.html'}\n"
    assert "2 runs" in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_what_is_no_run_is_an_error_with_a_fix(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "fix: name run folders" in result.stderr


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    path = put_run(tmp_path / "run", [report(1)])
    result = run(path, "--out", tmp_path / "no" / "page.html")
    assert result.exit_code == 1
    assert "--out FILE" in result.stderr
