"""Made-up pairs for loader processes, which import no more than this module."""

import numpy as np

from declip_cli.config import AugmentConfig, Views
from declip_cli.data.dataset import BlockDataset, Example, Skips
from declip_cli.data.loader import StreamConfig, Task
from declip_cli.data.loader_processes import ProcessLoader
from declip_cli.errors import DataError

__all__ = ["CONFIG", "Noise", "ProcessLoader", "Task", "Trap"]

CONFIG = StreamConfig(
    views=Views(images=("plain", "augmented"), texts=("plain", "masked")),
    augment=AugmentConfig(),
    side_px=8,
    context_length=10,
    batch_size=40,
    seed=1,
    workers=2,
    loader="processes",
    order="blocks",
    num_streams=2,
    open_blocks=8,
    compare_captions=True,
    max_bad=0.2,
)


class Noise(BlockDataset):
    """Made-up pairs, told apart by their pixels; some are unusable, and what is asked of a few goes wrong."""

    fingerprint = "aa"
    is_remote = True
    num_blocks, block_firsts = 20, np.arange(0, 201, 10)

    def __init__(self):
        self.skipped = Skips()

    def __len__(self):
        return 200

    def key(self, number):
        return f"key{number}"

    def count(self, block):
        return 10

    def fetch(self, block):
        pass

    def release(self, block):
        pass

    def read(self, number):
        if number in (3, 77):
            raise DataError("it is damaged", remedy="make it again", cause="damaged shard")
        pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        return Example(self.key(number), pixels, ("dog " * (1 + number % 9),))


class Trap(Noise):
    """Pairs whose files cannot be opened again, or whose reading fails as only a mistake does."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __reduce__(self):
        return reopen_trap, (self.kind,)

    def read(self, number):
        return 1 // 0


def reopen_trap(kind):
    if kind == "unreadable":
        raise DataError("the shards are gone", remedy="copy them again")
    return Trap(kind)
