"""Sets with several captions an image, in the files in which their test splits are distributed."""

from collections.abc import Iterator
from pathlib import Path

from declip_cli.data.benchmarks.known import Known, read_lines
from declip_cli.data.dataset import Classes, Skips
from declip_cli.data.files_dataset import FilesDataset
from declip_cli.data.shards.tar_samples import clean_captions
from declip_cli.data.sources.annotations import read_annotations
from declip_cli.data.sources.records import Found, LeftOut, Record, file_record, locate_pictures
from declip_cli.errors import DataError

MAX_CAPTIONS = 5
"""Captions that count per image; COCO has a few more for some."""


def read_captions(known: Known, root: Path, split: str, classes: Classes) -> FilesDataset:
    """Read Karpathy's test split of a set.

    Args:
        known: its markers are the files that name the images and their captions.
        root: the folder that one of them lies in.
        split: `test`.
        classes: none.

    Returns:
        The images with the captions that count.

    Raises:
        DataError: the file is damaged, names no test image, or the images are not there.
    """
    path = next(root / marker for marker in known.markers if (root / marker).is_file())
    try:
        records = list(_records(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error!r}", remedy=known.how_to_get(root)) from error
    files, skipped = [record for record in records if isinstance(record, Record)], Skips()
    for record in records:
        if isinstance(record, LeftOut):
            skipped.add(record.cause, record.key)
    if not files:
        raise DataError(f"{path} names no test image", remedy=known.how_to_get(root))

    def captions_of(number: int) -> tuple[str, ...]:
        record = files[number]
        return clean_captions(list(record.captions), record.key)[:MAX_CAPTIONS]

    return FilesDataset([str(record.image) for record in files], captions=captions_of, skipped=skipped)


def _records(path: Path) -> Iterator[Found]:
    if path.suffix == ".json":
        return read_annotations(str(path), split="test" if path.name.startswith("dataset_") else None)
    if path.name == "Flickr_8k.testImages.txt":
        wanted = set(read_lines(path))
        records = read_annotations(str(path.with_name("Flickr8k.token.txt")))
        return (record for record in records if record.key in wanted)
    return _comma_lines(path)


def _comma_lines(path: Path) -> Iterator[Found]:
    """Read lines `name.jpg,caption` with a heading, as the annotations of CLIP_benchmark come."""
    captions: dict[str, list[object]] = {}
    for line in read_lines(path)[1:]:
        name, _, caption = line.partition(".jpg,")
        captions.setdefault(f"{name}.jpg", []).append(caption)
    folder = locate_pictures(str(path), list(captions))
    return (file_record(folder, name, texts) for name, texts in captions.items())
