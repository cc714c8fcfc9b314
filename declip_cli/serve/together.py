"""Calls that wait while others are worked on are then worked on together."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

_MAX_AT_ONCE = 64


class Together(Generic[Given, Made]):
    """A function of one item, made of one of many; each call works in its own thread or waits for another's.

    Args:
        work: from items to as many results, in their order. If it raises, each item is tried alone, so that an error
            reaches its own caller only.
        turn: held while it works; several may share one.
    """

    def __init__(self, work: Callable[[Sequence[Given]], Sequence[Made]], turn: threading.Lock) -> None:
        self._work, self._turn = work, turn
        self._waiting: deque[tuple[Given, Future[Made]]] = deque()

    def __call__(self, item: Given) -> Made:
        """Return the result of an item, or raise its error."""
        mine: Future[Made] = Future()
        self._waiting.append((item, mine))
        while not mine.done():
            with self._turn:
                if not mine.done():
                    self._finish([self._waiting.popleft() for _ in range(min(len(self._waiting), _MAX_AT_ONCE))])
        return mine.result()

    def _finish(self, taken: Sequence[tuple[Given, Future[Made]]]) -> None:
        try:
            results = self._work([item for item, _ in taken])
        except Exception as error:
            if len(taken) == 1:
                taken[0][1].set_exception(error)
                return
            for pair in taken:
                self._finish([pair])
        else:
            for (_, future), result in zip(taken, results, strict=True):
                future.set_result(result)
