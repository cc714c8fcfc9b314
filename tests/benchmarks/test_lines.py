import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def lines():
    spec = importlib.util.spec_from_file_location("benchmark_lines", Path(__file__).with_name("lines.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """Time that passes only when work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        pending = list(seconds)

        def do():
            self.now += pending.pop(0) if len(pending) > 1 else pending[0]

        return do


@pytest.mark.parametrize(("unit", "ours", "peer"), [("s", 0.02, 0.5), ("ms", 20.0, 500.0), ("texts/s", 50.0, 2.0)])
def test_a_line_has_medians_for_one_piece_of_work_and_how_many_times_better_ours_is(unit, ours, peer, lines, capsys):
    clock = Clock()
    # The first run warms up; of 2, 2 and 90 seconds for 100 texts the median is 2.
    mine, theirs = clock.work(999, 2, 90, 2), clock.work(999, 50, 50, 1000)
    line = lines.compare("x", mine, theirs, peer_name="peer 1.0", unit=unit, runs=3, amount=100, clock=clock)
    assert json.loads(capsys.readouterr().out) == line
    assert line == {
        "name": "x",
        "ours": ours,
        "peer": peer,
        "ratio": 25.0,
        "peer_name": "peer 1.0",
        "unit": unit,
        "runs": 3,
    }
