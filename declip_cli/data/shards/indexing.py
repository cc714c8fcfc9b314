"""The indexes of many shards: each is made once, by one of the processes that train together."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeAlias, TypeVar

from declip_cli.data.shards.index import ShardIndex, find_index, make_index
from declip_cli.errors import DataError

T = TypeVar("T")
Say: TypeAlias = Callable[[str], None]

_THREADS = 8
_MEET_EVERY_S = 1.0
_SILENT_S = 3.0
_SAY_EVERY_S = 10.0


def load_indexes(shards: Sequence[str], *, cache_dir: str, say: Say | None, together: bool) -> list[ShardIndex]:
    """Read the indexes of shards; those that are missing, damaged or out of date are made first.

    Where several processes train together they share the work. They meet once a second meanwhile, so that no
    collective runs into its time limit, and an error of one is raised by all.

    Args:
        shards: local paths or URLs of tar archives.
        cache_dir: where an index goes that cannot stand beside its shard; need not be shared by the machines.
        say: told, on rank 0, of damaged indexes, and of how far it is if that takes more than a few seconds.
        together: every rank of the process group calls this at the same time, with the same shards.

    Returns:
        One index per shard, in their order.

    Raises:
        DataError: a shard cannot be read, or an index can be written nowhere.
    """
    with ThreadPoolExecutor(_THREADS, "declip-index") as pool:
        crew = _Crew(pool, say, together)
        found: list[ShardIndex | None] = [None] * len(shards)
        damages: list[str] = []
        while True:
            missing = [number for number, index in enumerate(found) if index is None]
            looked_up = crew.run(lambda n: find_index(shards[n], cache_dir=cache_dir), missing, "indexes read")
            for number, (index, damage) in zip(missing, looked_up, strict=True):
                found[number] = index
                damages += [damage] if damage else []
            missing_of_rank = crew.gather([number for number, index in enumerate(found) if index is None])
            if not any(missing_of_rank):
                return [index for index in found if index is not None]
            if damages:
                crew.say(f"the index of {len(damages)} shards is made again ({damages[0]})")
                damages = []
            mine = _share(missing_of_rank)[crew.rank]
            made = crew.run(lambda n: make_index(shards[n], cache_dir=cache_dir), mine, "shards indexed, once for all")
            for number, new in zip(mine, made, strict=True):
                found[number] = new


def _share(missing_of_rank: Sequence[Sequence[int]]) -> list[list[int]]:
    """Give each shard that any rank misses to one of the ranks that miss it.

    Ranks that find what another has made need no more; those on a machine with a cache of its own share again.
    """
    misses: dict[int, list[int]] = {}
    for rank, missing in enumerate(missing_of_rank):
        for number in missing:
            misses.setdefault(number, []).append(rank)
    shares: list[list[int]] = [[] for _ in missing_of_rank]
    for turn, (number, ranks) in enumerate(sorted(misses.items())):
        shares[ranks[turn % len(ranks)]].append(number)
    return shares


class _Crew:
    """This process's threads, and the other ranks if they work along."""

    def __init__(self, pool: ThreadPoolExecutor, say: Say | None, together: bool) -> None:
        self._pool, self._say = pool, say
        self.rank = self._num_ranks = 0
        if together:
            from declip_cli.distributed import rank, world_size  # brings torch, which `prepare` does without

            self.rank, self._num_ranks = rank(), world_size()
        self._began = self._said = time.monotonic()

    def gather(self, value: T) -> list[T]:
        """Collect a value of every rank, in the order of the ranks."""
        if self._num_ranks < 2:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(values, value)
        return values

    def say(self, message: str) -> None:
        """Tell the user something, once for all ranks."""
        if self._say is not None and self.rank == 0:
            self._say(message)

    def run(self, work: Callable[[int], T], numbers: Sequence[int], what: str) -> list[T]:
        """Apply a function to numbers in threads, until all ranks are through with theirs.

        Raises:
            DataError: the first that was raised on any rank, on all of them.
        """
        futures = [self._pool.submit(work, number) for number in numbers]
        try:
            while True:
                wait(futures, timeout=_MEET_EVERY_S, return_when=FIRST_EXCEPTION)
                reports = self.gather((sum(f.done() for f in futures), len(futures), _error_of(futures)))
                for _, _, error in reports:
                    if error is not None:
                        message, remedy, cause = error
                        raise DataError(message, remedy=remedy, cause=cause)
                num_done, num_all = sum(done for done, _, _ in reports), sum(given for _, given, _ in reports)
                if num_done == num_all:
                    return [future.result() for future in futures]
                self._tell_progress(f"{num_done:,} of {num_all:,} {what}")
        finally:
            for future in futures:
                future.cancel()

    def _tell_progress(self, message: str) -> None:
        now = time.monotonic()
        if now - self._began > _SILENT_S and now - self._said > (_SAY_EVERY_S if self._said > self._began else 0):
            self._said = now
            self.say(message)


def _error_of(futures: Sequence["Future[Any]"]) -> tuple[str, str, str] | None:
    """Take apart the first DataError there is, to be sent to other ranks; other errors are raised here."""
    for future in futures:
        error = future.exception() if future.done() else None
        if isinstance(error, DataError):
            return error.message, error.remedy, error.cause
        if error is not None:
            raise error
    return None
