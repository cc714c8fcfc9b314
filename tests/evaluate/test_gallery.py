"""The gallery is one page that needs nothing else, and nothing in it can become markup."""

import base64
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from declip_cli.errors import EvaluateError
from declip_cli.evaluate.gallery import THUMBNAIL_SIDE_PX, render_gallery, write_gallery
from declip_cli.evaluate.search import Hit, SearchReport

EVIL = """<script>document.title="owned"</script><img src=x onerror="document.title='owned'">"&'</li>"""
COLORS = ((220, 20, 20), (20, 160, 20), (20, 20, 220))
"""RGB."""


def one_color(color, *, width: int = 60, height: int = 40) -> bytes:
    image = np.full((height, width, 3), color[::-1], dtype=np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


def make_report(*, words: str = "plain") -> SearchReport:
    hits = [
        Hit(rank=rank, score=0.5 / rank, path=f"{words}/{rank}.png", caption=words, read=lambda c=c: one_color(c))
        for rank, c in enumerate(COLORS, 1)
    ]
    return SearchReport(
        query=words,
        collection=words,
        model=words,
        index="Flat",
        hits=hits,
        num_indexed=9,
        changes={},
        skipped={},
        seconds=0.0,
    )


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.sources = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.words += data


def test_page_shows_rank_score_path_and_caption_in_order():
    page = Page(render_gallery(make_report(words="a bus")))
    assert page.tags.count("li") == page.tags.count("img") == 3
    places = [page.words.index(word) for word in ("0.5000", "a bus/1.png", "0.2500", "a bus/2.png", "0.1667")]
    assert places == sorted(places)
    assert "3 of 9 images" in page.words


def test_page_loads_nothing_from_anywhere():
    text = render_gallery(make_report())
    page = Page(text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "default-src 'none'" in text
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_every_word_is_escaped():
    page = Page(render_gallery(make_report(words=EVIL)))
    assert "script" not in page.tags
    assert page.tags.count("img") == 3
    assert page.words.count(EVIL) >= 8  # the query, collection and model, and path and caption of each hit


def test_thumbnails_are_small_images():
    report = make_report()
    large = Hit(rank=1, score=1.0, path="x", caption="", read=lambda: one_color(COLORS[0], width=1000, height=500))
    (source,) = Page(render_gallery(SearchReport(**{**fields(report), "hits": [large]}))).sources
    data = np.frombuffer(base64.b64decode(source.partition(",")[2]), dtype=np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert image.shape == (THUMBNAIL_SIDE_PX // 2, THUMBNAIL_SIDE_PX, 3)
    assert np.abs(image[80, 160, ::-1].astype(int) - COLORS[0]).max() < 8


def fields(report):
    return {name: getattr(report, name) for name in report.__slots__}


def test_query_image_is_shown():
    page = Page(render_gallery(make_report(words="dir/like.png"), query_image=one_color(COLORS[1])))
    assert page.tags.count("img") == 4
    assert "Images like like.png" in page.words


def test_image_that_is_gone_does_not_break_the_page():
    def gone():
        raise FileNotFoundError("x")

    report = make_report()
    hits = [Hit(rank=1, score=0.1, path="gone.png", caption="", read=gone)]
    assert "image cannot be read" in render_gallery(SearchReport(**{**fields(report), "hits": hits}))


def test_name_that_is_not_text_does_not_break_the_page(tmp_path):
    write_gallery(tmp_path / "page.html", make_report(words="a\udcff"))
    assert "a?/1.png" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(EvaluateError, match="cannot write the gallery") as caught:
        write_gallery(tmp_path / "no" / "hits.html", make_report())
    assert "--html" in caught.value.remedy


@pytest.fixture(scope="module")
def browser() -> str:
    """Chromium, Chrome or what DECLIP_BROWSER names; without one the tests are skipped, or fail where CI is set."""
    names = (os.environ.get("DECLIP_BROWSER", ""), "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, filter(None, names))), "")
    if not found:
        told = "needs a browser: apt-get install chromium, or DECLIP_BROWSER=path"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    return found


def browse(browser: str, page: Path, *options: str) -> str:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,600"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run([*command, profile, *options, page.as_uri()], capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def test_browser_shows_the_images_in_order(tmp_path, browser):
    write_gallery(tmp_path / "hits.html", make_report(words="three colors"))
    browse(browser, tmp_path / "hits.html", f"--screenshot={tmp_path / 'shot.png'}")
    shot = cv2.imread(str(tmp_path / "shot.png"))[..., ::-1].astype(int)  # (H, W, 3)
    assert shot.shape == (600, 900, 3)
    centers = []
    for color in COLORS:
        rows, columns = np.nonzero(np.abs(shot - color).max(axis=2) < 12)
        assert len(rows) > 5000, "the thumbnail is not on the page"
        centers.append((float(rows.mean()), float(columns.mean())))
    assert max(row for row, _ in centers) - min(row for row, _ in centers) < 3  # side by side
    assert centers[0][1] < centers[1][1] < centers[2][1]


def test_browser_runs_nothing_from_a_caption(tmp_path, browser):
    write_gallery(tmp_path / "hits.html", make_report(words=EVIL))
    page = browse(browser, tmp_path / "hits.html", "--dump-dom")
    title = page.partition("<title>")[2].partition("</title>")[0]
    assert title.startswith("&lt;script&gt;")  # a caption that had run would have set it to "owned"
    assert "<script" not in page
