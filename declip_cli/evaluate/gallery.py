"""A page of search hits that needs nothing but itself: thumbnails, captions and scores in one HTML file."""

import base64
from html import escape
from pathlib import Path
from typing import Any

import cv2

from declip_cli.data.dataset import Pixels
from declip_cli.data.decode import decode_image
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.search import Hit, SearchReport
from declip_cli.files import write_text

THUMBNAIL_SIDE_PX = 320
"""Longer side of a thumbnail: sharp at the 200 px it is shown with."""
_JPEG_QUALITY = 85

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ margin: 0 0 .25rem; font-size: 1.5rem; overflow-wrap: anywhere; }}
.about {{ margin: 0 0 1.5rem; opacity: .7; overflow-wrap: anywhere; }}
ol {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; margin: 0; padding: 0;
  list-style: none; }}
li {{ display: flex; flex-direction: column; overflow: hidden; border: 1px solid rgb(128 128 128 / .35);
  border-radius: .5rem; }}
.picture {{ display: flex; align-items: center; justify-content: center; height: 13rem; background: #fff;
  color: #555; }}
.picture img {{ max-width: 100%; max-height: 100%; min-height: 8rem; object-fit: contain; }}
.words {{ padding: .6rem .75rem; overflow-wrap: anywhere; }}
.words p {{ margin: 0 0 .3rem; }}
.place {{ display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }}
.path {{ font-size: .8rem; opacity: .7; }}
.query {{ max-width: 13rem; max-height: 13rem; margin: 0 0 1rem; border-radius: .5rem; }}
</style>
</head>
<body>
<h1>{heading}</h1>
<p class="about">{about}</p>
{query_picture}<ol>
{hits}
</ol>
</body>
</html>
"""


def write_gallery(path: Path, report: SearchReport, *, query_image: bytes = b"") -> None:
    """Write search hits as a page for a browser; it loads nothing from anywhere and runs no script.

    Args:
        path: written whole or not at all.
        report: the hits; their images are read again.
        query_image: the encoded picture that was looked for, shown above the hits.

    Raises:
        EvaluateError: the file cannot be written.
    """
    try:
        page = render_gallery(report, query_image=query_image)
        write_text(path, page.encode("utf-8", "replace").decode())  # file names may hold what is no text
    except OSError as error:
        raise EvaluateError(
            f"cannot write the gallery {path}: {error.strerror}",
            remedy="name a file in a folder that exists and can be written, with --html FILE",
        ) from error


def render_gallery(report: SearchReport, *, query_image: bytes = b"") -> str:
    """Make the page: HTML in which every word that comes from outside is escaped; arguments as of `write_gallery`."""
    is_text = not query_image
    heading = f"“{report.query}”" if is_text else f"Images like {Path(report.query).name}"
    about = f"{len(report.hits)} of {report.num_indexed} images in {report.collection}, by {report.model}"
    query_picture = "" if is_text else f'<img class="query" alt="the query" src="{_thumbnail(query_image)}">\n'
    return _PAGE.format(
        title=escape(f"{report.query} – declip"),
        heading=escape(heading),
        about=escape(about),
        query_picture=query_picture,
        hits="\n".join(map(_render_hit, report.hits)),
    )


def _render_hit(hit: Hit) -> str:
    words = hit.caption or Path(hit.path).name
    try:
        picture = f'<img alt="{escape(words)}" src="{_thumbnail(hit.read())}">'
    except (DataError, OSError):
        picture = "picture cannot be read"
    caption = f"<p>{escape(hit.caption)}</p>" if hit.caption else ""
    return (
        f'<li><div class="picture">{picture}</div><div class="words">'
        f'<p class="place"><b>{hit.rank}</b><span>{hit.score:.4f}</span></p>{caption}'
        f'<p class="path">{escape(hit.path)}</p></div></li>'
    )


def _thumbnail(data: bytes | Pixels) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(shrink(data, THUMBNAIL_SIDE_PX)).decode("ascii")


def shrink(data: bytes | Pixels, side_px: int) -> bytes:
    """Return an image as a JPEG whose longer side is at most so many pixels.

    Raises:
        DataError: it cannot be decoded.
    """
    image = decode_image(data) if isinstance(data, bytes) else data  # (H, W, 3)
    scale = side_px / max(image.shape[:2])
    small: Any = image
    if scale < 1:
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return bytes(jpeg.tobytes())
