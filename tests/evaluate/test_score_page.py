"""The page of scores shows classes, confused pairs and the worst mistakes in their order; nothing becomes markup."""

import pytest
import torch

from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.report import Predictions
from declip_cli.evaluate.score_page import render_score_page, write_score_page
from tests.evaluate.test_gallery import COLORS, EVIL, Page, browse, browser, one_color  # noqa: F401  (a fixture)

NAMES = ("cat", "dog", "fox")


def make_predictions(labels, predicted, confidence, *, names=NAMES, read=None):
    return Predictions(
        keys=[f"{names[label]}/{row}.png" for row, label in enumerate(labels)],
        labels=torch.tensor(labels),
        ranked=torch.tensor(predicted)[:, None],
        scores=torch.tensor(confidence)[:, None],
        confidence=torch.tensor(confidence),
        class_names=names,
        read=read or (lambda row: one_color(COLORS[row % 3])),
    )


def render(predictions, *, name="photos"):
    report = {
        "dataset": name,
        "model": name,
        "score": 0.5,
        "note": name,
        "skipped": {name: {"count": 2, "first": name}},
    }
    return render_score_page([(report, predictions)])


def places(text, *words):
    found = [text.index(word) for word in words]
    return found == sorted(found)


def test_classes_stand_worst_first():
    words = Page(render(make_predictions([0, 1, 1, 2, 2], [0, 0, 0, 2, 0], [0.5] * 5))).words
    assert places(words, "worst first", "dog0%2", "fox50%2", "cat100%1", "Most confused")


def test_pairs_stand_by_frequency_and_mistakes_by_confidence():
    page = Page(render(make_predictions([1, 1, 2, 0], [0, 0, 0, 0], [0.6, 0.7, 0.9, 0.99])))
    assert places(page.words, "dog taken for cat: 2 of 2", "fox taken for cat: 1 of 1")
    worst = page.words.partition("Worst mistakes")[2]
    assert places(worst, "90%", "fox/2.png", "70%", "dog/1.png", "60%", "dog/0.png")
    assert "99%" not in worst  # that one is right
    assert page.tags.count("img") == 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)


def test_all_right_has_no_mistakes():
    words = Page(render(make_predictions([0, 1], [0, 1], [0.9, 0.9]))).words
    assert "There is no mistake." in words


def test_an_image_that_is_gone_does_not_break_the_page():
    def gone(row):
        raise DataError("gone", remedy="none")

    assert "image cannot be read" in render(make_predictions([0], [1], [0.9], read=gone))


def test_every_word_is_escaped():
    page = Page(render(make_predictions([0, 1], [1, 0], [0.9, 0.8], names=(EVIL, EVIL + "2")), name=EVIL))
    assert "script" not in page.tags
    assert page.tags.count("img") == 4
    assert page.words.count(EVIL) > 12


def test_only_the_images_that_are_shown_are_read():
    """As of ImageNet: a thousand classes, ten thousand mistakes."""
    num, rows = 10_000, []
    labels = [row % 1000 for row in range(num)]
    names = tuple(f"class {number}" for number in range(1000))
    predicted = [(label + 1) % 1000 for label in labels]
    text = render(
        make_predictions(labels, predicted, [0.5] * num, names=names, read=lambda row: rows.append(row) or b"")
    )
    assert len(rows) <= 12 * 3 + 24
    assert text.count('class="track"') == 1000
    assert len(text) < 400_000


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(EvaluateError, match="cannot write the page") as caught:
        write_score_page(tmp_path / "no" / "page.html", [])
    assert "--html" in caught.value.remedy


def test_a_browser_runs_nothing_from_a_name(tmp_path, browser):  # noqa: F811
    (tmp_path / "page.html").write_text(render(make_predictions([0], [1], [0.9], names=(EVIL, "b")), name=EVIL))
    dom = browse(browser, tmp_path / "page.html", "--dump-dom")
    assert dom.partition("<title>")[2].startswith("&lt;script&gt;")
    assert "<script" not in dom
