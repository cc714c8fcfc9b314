"""Calls that wait are worked on together, and each gets its own result or error."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from declip_cli.serve.together import Together


def call_all(work, items):
    """Call a function with all items while another call holds the turn."""
    turn = threading.Lock()
    together = Together(work, turn)
    with ThreadPoolExecutor(len(items)) as pool, turn:
        futures = [pool.submit(together, item) for item in items]
        while len(together._waiting) < len(items):
            time.sleep(0.001)
    return futures


def test_each_call_gets_the_result_of_its_own_item_and_waiting_ones_are_one_piece_of_work():
    pieces = []

    def work(items):
        pieces.append(list(items))
        return [item * item for item in items]

    assert [future.result() for future in call_all(work, range(50))] == [item * item for item in range(50)]
    assert [sorted(piece) for piece in pieces] == [list(range(50))]


def test_a_piece_of_work_stays_small():
    sizes = []
    futures = call_all(lambda items: sizes.append(len(items)) or list(items), range(100))
    assert [future.result() for future in futures] == list(range(100))
    assert sizes == [64, 36]


def test_an_error_reaches_its_own_caller_only():
    futures = call_all(lambda items: [1 / item for item in items], [1, 0, 2, 4])
    assert [futures[number].result() for number in (0, 2, 3)] == [1, 0.5, 0.25]
    with pytest.raises(ZeroDivisionError):
        futures[1].result()


def test_a_call_that_finds_nobody_works_at_once():
    assert Together(lambda items: [-item for item in items], threading.Lock())(3) == -3
