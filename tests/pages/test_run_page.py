"""The page of a run is small, needs nothing else, and shows what the folder says, however little or hostile."""

import json
import math

import pytest

from declip_cli.errors import EvaluateError
from declip_cli.pages import run_files
from declip_cli.pages.run_files import Reports, differences, read_run_files
from declip_cli.pages.run_page import render_run, write_report, write_run_page
from tests.evaluate.test_gallery import EVIL, Page, browse, browser  # noqa: F401  (a fixture)
from tests.train.small_runs import metrics, resolved, run, small_config


def report(step, **more):
    values = {
        "step": step,
        "total_steps": 100,
        "samples_seen": 8 * step,
        "seconds": 2.0 * step,
        "samples_per_second": 4.0,
        "learning_rate": 0.001,
        "logit_scale": 14.3,
        "losses": {"clip": 1 / step, "total": 1 / step},
        "spread": {"image": 0.5},
        "skipped": {"corrupt": [3, "a.jpg"]},
        "evaluations": {},
    }
    return values | more


def put_run(path, reports, *, config=None, log=""):
    path.mkdir()
    content = resolved(config).to_json() | {"versions": {"torch": "2.9"}}
    (path / "config.json").write_text(json.dumps(content))
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in reports))
    (path / "log.txt").write_text(log)
    return path


def steps(num, **train):
    return small_config(optim={"warmup_steps": 0}, train={"steps": num, **train})


def page_of(path):
    return Page(render_run(read_run_files(path)))


def test_a_run_writes_its_page_and_its_first_pairs(tmp_path):
    config = steps(3, checkpoint_every_steps=2)
    run(config, tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 200_000
    assert "step 3 of 3" in page.words
    assert page.tags.count("img") == 8
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    for words in ("Loss", "Learning rate", "Logit scale", "Gradient norm", "Speed", "Waiting", "memory", "torch"):
        assert words in page.words


def test_a_page_comes_with_each_state(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("declip_cli.train.run.write_run_page", lambda path, _: shown.append(metrics(path)[-1]["step"]))
    run(steps(5, checkpoint_every_steps=2), tmp_path / "run")
    assert shown == [2, 4, 5]


def test_a_page_that_fails_is_told_and_ends_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a fault")

    notes = []
    monkeypatch.setattr("declip_cli.train.run.write_run_page", fail)
    assert run(steps(2), tmp_path / "run", notes=notes)[-1].is_last
    assert any("a fault" in note for note in notes)


def test_a_resumed_run_keeps_its_first_pairs_and_goes_on_in_its_curves(tmp_path):
    run(steps(2), tmp_path / "run")
    pairs = (tmp_path / "run" / "samples.json").read_text()
    run(steps(4), tmp_path / "run", is_resumed=True)
    assert (tmp_path / "run" / "samples.json").read_text() == pairs
    files = read_run_files(tmp_path / "run")
    assert files.reports.curve(("losses", "total"), "").x.tolist() == [1, 2, 3, 4]


def test_texts_read_as_their_tokens(tmp_path):
    run(steps(1), tmp_path / "run")
    pairs = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert [text["kind"] for text in pairs[0]["texts"]] == ["plain"]
    assert pairs[0]["texts"][0]["text"].islower()


def test_a_run_without_reports_has_a_page(tmp_path):
    page = page_of(put_run(tmp_path / "run", []))
    assert "no report yet" in page.words
    assert "svg" not in page.tags


def test_values_that_are_no_numbers_leave_gaps(tmp_path):
    broken = report(2, learning_rate=None, losses={"clip": None, "total": math.nan}, spread={})
    text = render_run(read_run_files(put_run(tmp_path / "run", [report(1), broken, report(3)])))
    assert "NaN" not in text.replace("their gradient was NaN or infinite", "")
    assert "step 3 of 100" in text


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(EvaluateError, match="cannot read config.json") as caught:
        write_report([tmp_path])
    assert "declip pretrain" in caught.value.remedy


def test_lines_that_cannot_be_read_are_counted_on_the_page(tmp_path):
    path = put_run(tmp_path / "run", [report(1)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('broken\n[1]\n{"step": 2}\n{"step": 9, "samples_se')  # the last is still being written
    files = read_run_files(path)
    assert files.reports.num_damaged == 3
    assert "cannot be read" in page_of(path).words


def test_reports_are_read_once_and_anew_after_a_way_back(tmp_path, monkeypatch):
    path, reports, parsed = put_run(tmp_path / "run", [report(1), report(2)]), Reports(), []
    parse = run_files.parse_json
    monkeypatch.setattr(run_files, "parse_json", lambda line: parsed.append(line) or parse(line))
    write_run_page(path, reports)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(report(3)) + "\n")
    write_run_page(path, reports)
    assert len(parsed) == 3
    new = path / "new"  # as RunDir.forget_metrics_after writes it
    new.write_text("".join(json.dumps(report(step)) + "\n" for step in (1, 7, 8, 9, 10)))
    new.replace(path / "metrics.jsonl")
    write_run_page(path, reports)
    assert reports.curve(("logit_scale",), "").x.tolist() == [1, 7, 8, 9, 10]


def test_data_advice_and_settings_are_shown(tmp_path):
    log = "2026-01-31 12:00:00 step 1/9 {'clip': 1}\n2026-01-31 12:00:01 waiting for data 30% of the time\n"
    page = page_of(put_run(tmp_path / "run", [report(1)], log=log))
    assert "waiting for data 30%" in page.words
    assert "{'clip': 1}" not in page.words
    assert "skipped, corrupt" in page.words
    assert "3 (first: a.jpg)" in page.words


def test_a_recipe_with_a_change_is_told_by_that_change():
    asked = dict(run_files._bases()["declip-demo"]) | {"train.seed": 77}
    assert differences(asked) == ("declip-demo", [("train.seed", 0, 77)])
    assert differences(run_files._bases()[""]) == ("", [])


def test_words_from_outside_are_text(tmp_path):
    scores = {EVIL: {"top1": 0.5, EVIL: 0.1}}
    path = put_run(
        tmp_path / "run",
        [report(1, losses={EVIL: 1.0}, evaluations=scores, skipped={EVIL: [1, EVIL]})],
        log=f"2026-01-31 12:00:01 {EVIL}\n",
    )
    sample = {"views": [{"kind": EVIL, "image": "http://x/"}], "texts": [{"kind": EVIL, "text": EVIL}]}
    (path / "samples.json").write_text(json.dumps([sample]))
    page = page_of(path)
    assert not {"script", "img"} & set(page.tags)
    assert page.words.count(EVIL) >= 7


def test_ten_thousand_reports_make_a_page_below_200_kb(tmp_path):
    one = report(1, evaluations={"imagenet": {"top1": 0.5, "top5": 0.7}})
    names = ("clip", "nn", "simsiam", "mlm", "total")
    lines = [one | {"step": n, "losses": {name: math.sin(n * k) for k, name in enumerate(names)}} for n in range(2000)]
    assert len(render_run(read_run_files(put_run(tmp_path / "run", lines)))) < 150_000


def test_several_runs_are_laid_over_each_other_by_pairs_seen(tmp_path):
    other = small_config(optim={"beta2": 0.9})
    one = put_run(tmp_path / "one", [report(n, evaluations={"demo": {"top1": 0.25}}) for n in (1, 2)])
    two = put_run(tmp_path / "two", [report(n) for n in (1, 2)], config=other)
    out = write_report([one, two], tmp_path / "both.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert page.words.count("Loss: clip") == 1
    assert "pairs seen 16" in page.words
    assert "optim.beta2" in page.words
    assert "optim.beta1" not in page.words
    assert "25.00% at step 2" in page.words


def test_a_browser_shows_the_curves_in_both_schemes_and_runs_nothing(tmp_path, browser):  # noqa: F811
    path = put_run(tmp_path / "run", [report(n, losses={EVIL: 1 / n}) for n in (1, 2, 3)])
    write_report([path])
    dom = browse(browser, path / "report.html", "--dump-dom")
    assert "<title>run – declip</title>" in dom
    assert "<script" not in dom
