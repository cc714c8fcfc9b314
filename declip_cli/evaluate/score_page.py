"""A page of what a classification got right and wrong: accuracy by class, confused pairs, the worst mistakes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from declip_cli.errors import DataError
from declip_cli.evaluate.report import Predictions, class_report
from declip_cli.pages.frame import REPORT_STYLE, render_page, table, thumbnail, write_page

_SIDE_PX = 200
"""Longer side of an image on the page."""
_NUM_PAIRS = 12
_IMAGES_PER_PAIR = 3
_NUM_MISTAKES = 24
_NUM_OPEN = 40
"""Classes that are seen at once; the better ones unfold."""
_MAX_CLASSES = 2000
_MAX_CHARS = 200
"""Of a name or a path."""

_STYLE = """.bars { list-style: none; margin: 0; padding: 0; columns: 22rem; column-gap: 2rem; font-size: .9rem; }
.bars li { display: grid; grid-template-columns: minmax(0, 9rem) 1fr 3.5rem 3rem; gap: .6rem; break-inside: avoid;
  align-items: center; font-variant-numeric: tabular-nums; padding: .1rem 0; }
.bars .name { overflow-wrap: anywhere; }
.bars .track { background: rgb(128 128 128 / .2); border-radius: .2rem; height: .7rem; }
.bars i { display: block; height: 100%; border-radius: .2rem; background: #0072b2; }
.bars b, .bars .pale { text-align: right; }
@media (prefers-color-scheme: dark) { .bars i { background: #5ab4f0; } }
"""


def write_score_page(path: Path, sets: Sequence[tuple[Mapping[str, Any], Predictions]]) -> None:
    """Write a page for a browser; it loads nothing and runs no script.

    Args:
        path: written whole or not at all.
        sets: of each data set its report as `to_json` gives it, and its predictions; the images shown are read again.

    Raises:
        EvaluateError: the file cannot be written.
    """
    write_page(path, render_score_page(sets), what="page", option="--html")


def render_score_page(sets: Sequence[tuple[Mapping[str, Any], Predictions]]) -> str:
    """Make the page: HTML in which every word that comes from outside is escaped."""
    title = ", ".join(str(report["dataset"]) for report, _ in sets)[:_MAX_CHARS]
    body = "\n".join(part for report, predictions in sets for part in _parts(report, predictions))
    return render_page(f"{title} – declip", body, style=REPORT_STYLE + _STYLE)


def _parts(report: Mapping[str, Any], predictions: Predictions) -> Iterator[str]:
    images = f"{len(predictions.keys):,} images of {len(predictions.class_names):,} classes"
    yield f"<h1>{escape(str(report['dataset']))}: {report['score']:.1%}</h1>"
    yield f'<p class="about">{images}, by {escape(str(report["model"]))}</p>'
    yield f"<details><summary>All scores</summary>{table(('what', 'value'), _facts(report))}</details>"
    yield f"<h2>Accuracy by class, worst first</h2>\n{_bars(class_report(predictions)['per_class'])}"
    mistakes = _mistakes(predictions)
    if not mistakes:
        yield "<p>There is no mistake.</p>"
        return
    yield f"<h2>Most confused pairs</h2>\n{_pairs(predictions, mistakes)}"
    cards = _cards(predictions, mistakes[:_NUM_MISTAKES])
    yield f"<h2>Worst mistakes, the surest first</h2>\n{cards}"


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in report.items():
        if isinstance(value, int | float | str):
            yield key, f"{value:.6g}" if isinstance(value, float) else str(value)[:_MAX_CHARS]
    for cause, found in (report.get("skipped") or {}).items():
        yield f"skipped, {cause}", f"{found['count']} (first: {found['first']})"[:_MAX_CHARS]


def _bars(classes: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f'<li><span class="name">{escape(str(one["class"])[:_MAX_CHARS])}</span>'
        f'<span class="track"><i style="width:{100 * one["accuracy"]:.1f}%"></i></span>'
        f'<b>{one["accuracy"]:.0%}</b><span class="pale" title="images">{one["num_images"]:,}</span></li>'
        for one in classes[:_MAX_CLASSES]
    ]
    bars = f'<ul class="bars">{"".join(lines[:_NUM_OPEN])}</ul>'
    if lines[_NUM_OPEN:]:
        more = "".join(lines[_NUM_OPEN:])
        bars += (
            f'<details><summary>{len(lines) - _NUM_OPEN:,} better ones</summary><ul class="bars">{more}</ul></details>'
        )
    omitted = len(classes) - len(lines)
    return bars + (f'<p class="pale">{omitted:,} more classes, the best, are omitted</p>' if omitted else "")


def _mistakes(predictions: Predictions) -> list[int]:
    """List the rows that are wrong, the surest first."""
    is_wrong = predictions.ranked[:, 0] != predictions.labels  # (N',)
    rows: list[int] = is_wrong.nonzero().flatten().tolist()
    confidence = predictions.confidence.tolist()
    return sorted(rows, key=lambda row: -confidence[row])


def _pairs(predictions: Predictions, mistakes: Iterable[int]) -> str:
    """Show the most frequent pairs of right and predicted class, each with its surest images."""
    right, predicted = predictions.labels.tolist(), predictions.ranked[:, 0].tolist()
    found: dict[tuple[int, int], list[int]] = {}
    for row in mistakes:
        found.setdefault((right[row], predicted[row]), []).append(row)
    pairs = sorted(found.items(), key=lambda item: -len(item[1]))[:_NUM_PAIRS]
    counts, names = predictions.labels.bincount(), [escape(name[:_MAX_CHARS]) for name in predictions.class_names]
    return "\n".join(
        f"<h3>{names[one]} taken for {names[other]}: {len(rows):,} of {int(counts[one]):,}</h3>"
        + _cards(predictions, rows[:_IMAGES_PER_PAIR])
        for (one, other), rows in pairs
    )


def _cards(predictions: Predictions, rows: Sequence[int]) -> str:
    return f'<ul class="images">{"".join(_card(predictions, row) for row in rows)}</ul>'


def _card(predictions: Predictions, row: int) -> str:
    names, key = predictions.class_names, escape(predictions.keys[row][-_MAX_CHARS:])
    right, predicted = names[int(predictions.labels[row])], names[int(predictions.ranked[row, 0])]
    try:
        image = f'<img alt="{key}" src="{thumbnail(predictions.read(row), _SIDE_PX)}">'
    except (DataError, OSError):
        image = "image cannot be read"
    return (
        f'<li class="card">{image}<p>{escape(right[:_MAX_CHARS])} <span class="pale">taken for</span> '
        f"{escape(predicted[:_MAX_CHARS])} <b>{float(predictions.confidence[row]):.0%}</b></p>"
        f'<p class="pale">{key}</p></li>'
    )
