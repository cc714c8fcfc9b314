"""Tar archives in the layout of WebDataset and img2dataset as a source."""

import gzip
import os
from collections.abc import Iterator
from typing import BinaryIO, cast

from declip_cli.data import storage
from declip_cli.data.shards.tar_samples import read_groups
from declip_cli.data.sources.records import BadRecord, GroupRecord, Record

TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz")


def read_tars(shards: list[str]) -> Iterator[Record]:
    """Read pairs from archives, one after the other, without unpacking them.

    Args:
        shards: local paths or URLs of `.tar` or `.tar.gz` files.

    Yields:
        One record per sample; a bad one for what is none and for an archive that ends too early.
    """
    for shard in shards:
        name = os.path.basename(shard)
        with storage.open_binary(shard) as raw:
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if shard.endswith("gz") else raw
            try:
                for group in read_groups(file, name, with_images=True):
                    key = f"{name}/{group.key}" if group.key != name else name
                    yield BadRecord(key, group.problem) if group.problem else GroupRecord(key, group)
            except (EOFError, gzip.BadGzipFile):
                yield BadRecord(name, "truncated tar")
