"""Curves keep their extremes when they are thinned, show gaps, and have readable axes."""

import math
import re

import numpy as np

from declip_cli.pages.charts import MAX_POINTS, Series, line_chart, thin


def path_of(chart):
    return re.search(r'<path [^>]* d="([^"]*)"', chart)[1]


def test_a_long_curve_keeps_its_ends_and_extremes():
    y = [math.sin(n / 500) for n in range(10_000)]
    y[4321], y[8765] = 50.0, -50.0
    x, thinned = thin(range(10_000), y)
    assert MAX_POINTS / 2 < len(x) <= MAX_POINTS
    assert (x[0], x[-1]) == (0, 9999)
    assert (thinned.max(), thinned.min()) == (50, -50)
    assert thinned.tolist() == [y[int(n)] for n in x]  # no point is made up
    assert (np.diff(x) > 0).all()


def test_a_short_curve_stays_as_it_is():
    x, y = thin([1, 2, 3], [4.0, math.inf, 6.0])
    assert x.tolist() == [1, 2, 3]
    np.testing.assert_equal(y, [4.0, math.nan, 6.0])


def test_a_long_gap_stays_a_gap():
    y = np.arange(10_000.0)
    y[3000:5000] = np.nan
    x, thinned = thin(np.arange(10_000), y)
    assert np.isnan(thinned[(x > 3100) & (x < 4900)]).all()
    assert path_of(line_chart("t", [Series("a", x, thinned)])).count("M") == 2


def test_values_that_are_no_numbers_break_the_line():
    chart = line_chart("t", [Series("a", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, 4.0, math.inf])])
    assert path_of(chart).count("M") == 2
    assert "nan" not in chart.lower()
    assert "inf" not in chart.lower()


def test_a_single_score_is_a_dot_that_can_be_seen():
    assert "stroke-width:70" in line_chart("t", [Series("a", [346], [0.28]), Series("b", [1, 346], [0.2, 0.3])])
    assert "stroke-width:70" not in line_chart("t", [Series("b", [1, 346], [0.2, 0.3])])


def test_points_lie_where_axes_say():
    """From 0 to 1 across and from 0 to 100, with a twentieth of room above, up: corners in closed form, in tenths."""
    assert path_of(line_chart("t", [Series("a", [0, 1], [0.0, 100.0])])) == "M460 1960h0l3640 -1790"


def test_a_share_is_shown_in_percent():
    chart = line_chart("t", [Series("a", [0, 1], [0.0, 0.25])], is_share=True)
    assert ">20%</text>" in chart
    assert "25.0 %" in chart


def test_a_logarithmic_scale_is_taken_where_it_helps_only():
    wide, narrow, negative = ([0.1, 1000.0], [1.0, 2.0], [-1.0, 1000.0])
    is_log = [
        "logarithmic" in line_chart("t", [Series("a", [0, 1], y)], may_log=True) for y in (wide, narrow, negative)
    ]
    assert is_log == [True, False, False]
    assert ">100</text>" in line_chart("t", [Series("a", [0, 1], wide)], may_log=True)


def test_one_point_and_a_flat_curve_are_drawn():
    for x, y in (([5], [3.0]), ([1, 2], [7.0, 7.0]), ([1, 2], [0.0, 0.0])):
        assert path_of(line_chart("t", [Series("a", x, y)])).startswith("M")


def test_a_chart_without_values_says_so():
    assert "no values" in line_chart("t", [Series("a", [1, 2], [math.nan, math.nan])])


def test_names_are_escaped_everywhere():
    evil = "<script>\"&'"
    chart = line_chart(evil, [Series(evil, [1, 2], [1.0, 2.0])], x_name=evil)
    assert "<script" not in chart
    assert chart.count("&lt;script&gt;") >= 4


def test_the_pointer_is_told_the_values_of_all_curves():
    chart = line_chart("t", [Series("a", [10, 20], [1.0, 2.5]), Series("b", [10, 20], [3.0, 4.0])])
    assert "<title>step 20\na 2.5\nb 4</title>" in chart


def test_the_seventh_curve_has_the_first_color_and_dashes():
    chart = line_chart("t", [Series(str(n), [0, 1], [0.0, n]) for n in range(7)])
    looks = re.findall(r'<path style="([^"]*)"', chart)
    assert looks[6].startswith(looks[0])
    assert "dasharray" in looks[6]
