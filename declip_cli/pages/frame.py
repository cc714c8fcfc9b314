"""What all pages share: one HTML file that loads nothing, runs no script and shows every word as text."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2

from declip_cli.data.dataset import Pixels
from declip_cli.data.decode import decode_image
from declip_cli.errors import EvaluateError
from declip_cli.files import write_text

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
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

REPORT_STYLE = """h2 { margin: 2rem 0 .75rem; font-size: 1.15rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 29%), 1fr)); gap: .75rem;
  margin: 0; padding: 0; list-style: none; }
.card { margin: 0; padding: .75rem; border: 1px solid rgb(128 128 128 / .35); border-radius: .5rem;
  overflow-wrap: anywhere; min-width: 0; }
.card p { margin: .4rem 0 0; font-size: .85rem; }
.card img { display: block; width: 100%; height: 8rem; object-fit: contain; background: rgb(128 128 128 / .12); }
.views { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; max-width: 26rem;
  overflow-wrap: break-word; }
th { font-weight: 600; white-space: nowrap; }
tbody tr { border-top: 1px solid rgb(128 128 128 / .25); }
.pale, summary { opacity: .75; }
summary { cursor: pointer; margin: .75rem 0; }
"""
"""Of pages with tables, cards of images and charts."""


def render_page(title: str, body: str, *, style: str = "") -> str:
    """Put a page around its parts.

    Args:
        title: plain text.
        body: HTML in which every word that comes from outside is escaped.
        style: rules beside the shared ones.
    """
    return _PAGE.format(title=escape(title), body=body, style=style)


def write_page(path: Path, page: str, *, what: str, option: str) -> None:
    """Write a page whole or not at all; what is no text, as in names of files, reads `?`.

    Raises:
        EvaluateError: the file cannot be written; the message says `what`, the remedy names the `option`.
    """
    try:
        write_text(path, page.encode("utf-8", "replace").decode())
    except OSError as error:
        raise EvaluateError(
            f"cannot write the {what} {path}: {error.strerror}",
            remedy=f"name a file in a folder that exists and can be written, with {option} FILE",
        ) from error


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Make a table of plain texts; it scrolls sideways where the screen is narrow."""
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def thumbnail(image: bytes | Pixels, side_px: int, *, quality: int = _JPEG_QUALITY) -> str:
    """Return the address of a small copy that holds the image itself; arguments and errors as in `shrink`."""
    jpeg = shrink(image, side_px, quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def shrink(data: bytes | Pixels, side_px: int, *, quality: int = _JPEG_QUALITY) -> bytes:
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
    _, jpeg = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(jpeg.tobytes())
