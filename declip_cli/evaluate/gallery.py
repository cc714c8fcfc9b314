"""A page of search hits that needs nothing but itself: thumbnails, captions and scores in one HTML file."""

from html import escape
from pathlib import Path

from declip_cli.errors import DataError
from declip_cli.evaluate.search import Hit, SearchReport
from declip_cli.pages.frame import render_page, thumbnail, write_page

THUMBNAIL_SIDE_PX = 320
"""Longer side of a thumbnail: sharp at the 200 px it is shown with."""
_STYLE = """ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; margin: 0;
  padding: 0; list-style: none; }
li { display: flex; flex-direction: column; overflow: hidden; border: 1px solid rgb(128 128 128 / .35);
  border-radius: .5rem; }
.picture { display: flex; align-items: center; justify-content: center; height: 13rem; background: #fff;
  color: #555; }
.picture img { max-width: 100%; max-height: 100%; min-height: 8rem; object-fit: contain; }
.words { padding: .6rem .75rem; overflow-wrap: anywhere; }
.words p { margin: 0 0 .3rem; }
.place { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
.path { font-size: .8rem; opacity: .7; }
.query { max-width: 13rem; max-height: 13rem; margin: 0 0 1rem; border-radius: .5rem; }
"""


def write_gallery(path: Path, report: SearchReport, *, query_image: bytes = b"") -> None:
    """Write search hits as a page for a browser; it loads nothing from anywhere and runs no script.

    Args:
        path: written whole or not at all.
        report: the hits; their images are read again.
        query_image: the encoded image that was looked for, shown above the hits.

    Raises:
        EvaluateError: the file cannot be written.
    """
    write_page(path, render_gallery(report, query_image=query_image), what="gallery", option="--html")


def render_gallery(report: SearchReport, *, query_image: bytes = b"") -> str:
    """Make the page: HTML in which every word that comes from outside is escaped; arguments as in `write_gallery`."""
    is_text = not query_image
    heading = f"“{report.query}”" if is_text else f"Images like {Path(report.query).name}"
    about = f"{len(report.hits)} of {report.num_indexed} images in {report.collection}, by {report.model}"
    source = "" if is_text else thumbnail(query_image, THUMBNAIL_SIDE_PX)
    shown_query = "" if is_text else f'<img class="query" alt="the query" src="{source}">\n'
    hits = "\n".join(map(_render_hit, report.hits))
    body = f'<h1>{escape(heading)}</h1>\n<p class="about">{escape(about)}</p>\n{shown_query}<ol>\n{hits}\n</ol>'
    return render_page(f"{report.query} – declip", body, style=_STYLE)


def _render_hit(hit: Hit) -> str:
    words = hit.caption or Path(hit.path).name
    try:
        image = f'<img alt="{escape(words)}" src="{thumbnail(hit.read(), THUMBNAIL_SIDE_PX)}">'
    except (DataError, OSError):
        image = "image cannot be read"
    caption = f"<p>{escape(hit.caption)}</p>" if hit.caption else ""
    return (
        f'<li><div class="picture">{image}</div><div class="words">'
        f'<p class="place"><b>{hit.rank}</b><span>{hit.score:.4f}</span></p>{caption}'
        f'<p class="path">{escape(hit.path)}</p></div></li>'
    )
