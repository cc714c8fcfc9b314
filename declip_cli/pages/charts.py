"""Curves as SVG that stands in a page: a pure function of series, without a script or a library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 500
"""Of one curve; longer ones are thinned."""
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 34
"""Margins of the area in which curves are drawn."""
_FINE = 10
"""Curves are drawn in whole tenths of a pixel, which are shorter to write."""
_NUM_COLUMNS = 40
"""Places along a chart that say, below the pointer, what the values there are."""
_NUM_COLORS = 6
_LOG_RATIO = 10
"""Largest by smallest value from which a logarithmic scale shows more."""
_MAX_TICKS = 5
_DOT = 70
"""Diameter of a point alone, in the units of a path."""

CHART_STYLE = """:root { --c0: #0072b2; --c1: #d55e00; --c2: #008060; --c3: #b5558f; --c4: #8a6d00; --c5: #555; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #5ab4f0; --c1: #ff9a52; --c2: #3fd0a4; --c3: #eb9fcb; --c4: #f0cd4a; --c5: #ccc; } }
.chart svg { display: block; width: 100%; height: auto; }
.chart h3 { margin: 0 0 .3rem; }
.chart text { font: 11px system-ui, sans-serif; fill: currentColor; fill-opacity: .75; }
.chart .rule { stroke: currentColor; stroke-opacity: .18; }
.chart path { fill: none; stroke-width: 17; stroke-linejoin: round; stroke-linecap: round; }
.chart .at { fill: transparent; }
.chart .at:hover { fill: rgb(128 128 128 / .25); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: 0 0 .3rem; padding: 0; list-style: none;
  font-size: .85rem; font-variant-numeric: tabular-nums; }
.legend li { min-width: 0; overflow-wrap: anywhere; }
.legend svg { display: inline-block; width: 22px; height: 8px; }
.legend line { stroke-width: 2; }
"""
"""Colors after Okabe and Ito, distinguishable for color-blind readers; beyond six, and in print, dashes tell."""

Numbers: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve."""

    name: str
    x: Sequence[float] | Numbers
    """Ascending, N numbers."""
    y: Sequence[float] | Numbers
    """N numbers; what is not finite leaves a gap."""


def line_chart(
    title: str, series: Sequence[Series], *, x_name: str = "step", is_share: bool = False, may_log: bool = False
) -> str:
    """Draw curves over each other as one HTML figure; each word is escaped.

    Args:
        title: what is drawn, with its unit.
        series: the curves; long ones are thinned to `MAX_POINTS` with their extremes.
        x_name: what x counts.
        is_share: y is in [0, 1] and shown in percent.
        may_log: take a logarithmic scale where all values are positive and ten times apart.

    Returns:
        The figure; a sentence in place of the curves where no point has a number.
    """
    thinned = [_Curve(one.name, *thin(one.x, one.y)) for one in series]
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in thinned])
    if not len(values):
        return f'<figure class="card chart"><h3>{escape(title)}</h3><p class="pale">no values</p></figure>'
    low, high = float(values.min()), float(values.max())
    is_log = may_log and low > 0 and high >= _LOG_RATIO * low
    xs = np.concatenate([one.x for one in thinned])
    across = _Axis(float(xs.min()), float(xs.max()), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(*_with_room(low, high, is_log=is_log), _HEIGHT - _BOTTOM, _TOP, is_log=is_log)
    words = [
        f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up.at(y):.1f}" y2="{up.at(y):.1f}"/>'
        f'<text x="{_LEFT - 5}" y="{up.at(y) + 4:.1f}" text-anchor="end">{_short(y, is_share=is_share)}</text>'
        for y in up.ticks()
    ]
    words += [
        f'<text x="{across.at(x):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_short(x)}</text>'
        for x in across.ticks()
    ]
    words.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    curves = [f'<path {_look(number, one)} d="{_path(one, across, up)}"/>' for number, one in enumerate(thinned)]
    name = escape(f"{title}{', logarithmic scale' if is_log else ''}")
    return (
        f'<figure class="card chart"><h3>{name}</h3>{_legend(thinned, is_share)}'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{"".join(words)}'
        f'<g transform="scale({1 / _FINE:g})">{"".join(curves)}</g>'
        f"{_hover(thinned, across, x_name, is_share)}</svg></figure>"
    )


def thin(
    x: Sequence[float] | Numbers, y: Sequence[float] | Numbers, limit: int = MAX_POINTS
) -> tuple[Numbers, Numbers]:
    """Keep at most `limit` points: of each stretch of a long curve its lowest and its highest, and both ends.

    Takes and returns x and y, (N,) → (N',). A stretch without a finite number keeps a point, so that its gap stays.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    ys = np.where(np.isfinite(ys), ys, np.nan)
    if len(xs) <= limit:
        return xs, ys
    width = -(-len(ys) // ((limit - 2) // 2))
    padded = np.pad(ys, (0, -len(ys) % width), constant_values=np.nan).reshape(-1, width)  # (stretches, width)
    starts = np.arange(len(padded)) * width
    ends = [np.where(np.isnan(padded), sign * np.inf, padded) for sign in (1, -1)]
    kept = [[0, len(xs) - 1], starts + ends[0].argmin(axis=1), starts + ends[1].argmax(axis=1)]
    index = np.unique(np.concatenate(kept))
    return xs[index], ys[index]


@dataclass(frozen=True, slots=True)
class _Curve:
    """A curve as it is drawn."""

    name: str
    x: Numbers
    y: Numbers
    """NaN where there is no number."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values from `low` to `high` laid out from one place to another, in pixels."""

    low: float
    high: float
    first: float
    last: float
    is_log: bool = False

    def at(self, value: Any) -> Any:  # noqa: ANN401  (a number or many)
        low, high, value = (np.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else value * 0 + 0.5
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Choose round values within."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                ticks = [step * 10.0**power for power in powers for step in steps]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= _MAX_TICKS + 1:
                    break
            return ticks[:: 1 + len(ticks) // (_MAX_TICKS + 2)]
        if self.high <= self.low:
            return [self.low]
        rough = (self.high - self.low) / _MAX_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _with_room(low: float, high: float, *, is_log: bool) -> tuple[float, float]:
    """Pad the range of the values; a flat curve is in the middle, and one near zero shows it."""
    if is_log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - room if low < 0 or low > room else 0.0, high + room


def _look(number: int, curve: _Curve | None = None) -> str:
    """Color and, beyond the colors, dashes of a curve; one of a single point is a dot that can be seen."""
    if curve is not None and np.isfinite(curve.y).sum() == 1:
        return f'style="stroke:var(--c{number % _NUM_COLORS});stroke-width:{_DOT}"'
    dashes = number // _NUM_COLORS
    dashed = f";stroke-dasharray:{60 // dashes} 50" if dashes else ""
    return f'style="stroke:var(--c{number % _NUM_COLORS}){dashed}"'


def _path(curve: _Curve, across: _Axis, up: _Axis) -> str:
    """Write a curve in whole steps from point to point; a point alone between gaps becomes a dot."""
    is_there = ~np.isnan(curve.y)
    x = np.rint(across.at(curve.x) * _FINE).astype(int).tolist()
    y = np.rint(up.at(np.where(is_there, curve.y, up.low)) * _FINE).astype(int).tolist()
    parts: list[str] = []
    before: tuple[int, int] | None = None
    for right, down, is_number in zip(x, y, is_there.tolist(), strict=True):
        if not is_number:
            before = None
            continue
        parts.append(f"M{right} {down}h0" if before is None else f"l{right - before[0]} {down - before[1]}")
        before = right, down
    return "".join(parts)


def _legend(series: Sequence[_Curve], is_share: bool) -> str:
    """Name the curves, each with its last value."""
    lines = []
    for number, one in enumerate(series):
        numbers = one.y[~np.isnan(one.y)]
        value = _exact(float(numbers[-1]), is_share=is_share) if len(numbers) else "no values"
        look = _look(number).replace("60 50", "6 5").replace("30 50", "3 5")
        swatch = f'<svg viewBox="0 0 22 8" aria-hidden="true"><line x1="0" x2="22" y1="4" y2="4" {look}/></svg>'
        name = f"{escape(one.name)} " if one.name else ""
        lines.append(f"<li>{swatch} {name}<b>{value}</b></li>")
    return f'<ul class="legend">{"".join(lines)}</ul>'


def _hover(series: Sequence[_Curve], across: _Axis, x_name: str, is_share: bool) -> str:
    """Cover the chart with columns that say which values the curves have there; the last point of each counts."""
    width = (_WIDTH - _RIGHT - _LEFT) / _NUM_COLUMNS
    found: dict[int, dict[int, tuple[float, float]]] = {}
    for number, one in enumerate(series):
        is_there = ~np.isnan(one.y)
        x, y = one.x[is_there], one.y[is_there]
        places = np.minimum((across.at(x) - _LEFT) / width, _NUM_COLUMNS - 1).astype(int)  # (N',), ascending
        last = np.flatnonzero(np.diff(places, append=_NUM_COLUMNS))
        for column, at, value in zip(places[last].tolist(), x[last].tolist(), y[last].tolist(), strict=True):
            found.setdefault(column, {})[number] = (at, value)
    columns = []
    for column, values in sorted(found.items()):
        lines = [f"{x_name} {_exact(max(x for x, _ in values.values()))}"]
        lines += [f"{series[number].name} {_exact(y, is_share=is_share)}".strip() for number, (_, y) in values.items()]
        left = _LEFT + column * width
        columns.append(
            f'<rect class="at" x="{left:.1f}" y="{_TOP}" width="{width:.1f}" height="{_HEIGHT - _BOTTOM - _TOP}">'
            f"<title>{escape(chr(10).join(lines))}</title></rect>"
        )
    return "".join(columns)


def _exact(value: float, *, is_share: bool = False) -> str:
    if is_share:
        return f"{value * 100:.1f} %"
    is_whole = 1e4 <= abs(value) < 1e15 or value == round(value)
    return f"{value:,.0f}" if is_whole else f"{value:,.4g}"


def _short(value: float, *, is_share: bool = False) -> str:
    """Write a tick in few characters: 20k, 1.5M, 0.001."""
    if is_share:
        return f"{value * 100:.3g}%"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
