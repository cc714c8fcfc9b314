"""The name of before for `catalogue.open_dataset`."""

from collections.abc import Sequence

from declip_cli.data.catalogue import open_dataset
from declip_cli.data.dataset import Dataset
from declip_cli.data.shards.indexing import Say


def open_samples(
    paths: Sequence[str],
    *,
    part: str | None = None,
    cache_dir: str | None = None,
    say: Say | None = None,
    together: bool = True,
) -> Dataset:
    """Open what a model is trained on; see `open_dataset`."""
    return open_dataset(paths, part or "train", cache_dir=cache_dir, say=say, together=together)
