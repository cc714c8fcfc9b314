"""The sets that retrieval is scored on: pictures, their captions, and which belongs to which."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from declip_cli.data import storage
from declip_cli.data.benchmarks.base import Picture, read_file, read_lines, resolve_data_root
from declip_cli.data.samples import SampleStore
from declip_cli.data.shards.tar_samples import clean_captions
from declip_cli.data.sources.coco import read_json
from declip_cli.data.sources.folder import CAPTIONS_FILE, find_lists, read_folder, read_lists
from declip_cli.data.sources.locate import locate_pictures
from declip_cli.data.sources.records import FileRecord, Record
from declip_cli.data.stores import open_samples
from declip_cli.errors import DataError, EvaluateError

MAX_CAPTIONS = 5
"""Captions that count per picture of the known sets; COCO has a few more for some."""
FOLD_SIZE = 1000
"""Pictures per fold of COCO's second protocol: the mean of five tests on 1,000 pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSet:
    """Pictures and captions to be found by each other."""

    name: str
    """As the user typed it."""
    pictures: Sequence[Picture]
    """N pictures, read when needed."""
    texts: Sequence[str]
    """M captions, those of a picture together."""
    owners: Sequence[int]
    """The picture of each caption, M numbers in [0, N)."""
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    """What stands in the files but is no pair: cause → (count, first)."""
    fold_size: int = 0
    """Pictures per fold, where the set is also scored in folds; else 0."""


@dataclass(frozen=True, slots=True)
class KnownRetrieval:
    """One known set: where it lies and what it is."""

    name: str
    num_pictures: int
    files: tuple[str, ...]
    """Any of these, in the data root or in a folder of the set's name."""
    source: str
    fold_size: int = 0


_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/ (caption_datasets.zip)"

KNOWN_RETRIEVAL = {
    known.name: known
    for known in (
        KnownRetrieval(
            "flickr30k", 1000, ("dataset_flickr30k.json", "flickr30k_test_karpathy.txt"), f"{_KARPATHY} and Flickr30k"
        ),
        KnownRetrieval(
            "flickr8k",
            1000,
            ("dataset_flickr8k.json", "flickr8k_test_karpathy.txt", "Flickr_8k.testImages.txt"),
            f"{_KARPATHY} and Flickr8k",
        ),
        KnownRetrieval(
            "coco", 5000, ("dataset_coco.json", "coco_test_karpathy.json"), f"{_KARPATHY} and COCO val2014", FOLD_SIZE
        ),
    )
}


def open_retrieval(name: str, *, data_root: Path | None = None) -> RetrievalSet:
    """Open a retrieval set.

    Args:
        name: a known name, `demo` (the test vendor's emoji), a folder with `captions.jsonl` or with a text file
            beside each picture, or a folder of prepared shards.
        data_root: where known sets lie; None takes `$DECLIP_DATA`, else `data/`.

    Returns:
        The set, of Karpathy's test split for the known ones; its pictures are read when needed.

    Raises:
        EvaluateError: unknown name, missing files, or no pair in them.
        DataError: shards or lists that cannot be read.
    """
    if name == "demo":
        return _from_store(name, open_samples(["demo"], part="test"))
    if name in KNOWN_RETRIEVAL:
        return _open_known(KNOWN_RETRIEVAL[name], resolve_data_root(data_root))
    if not Path(name).exists():
        raise EvaluateError(
            f"there is no data set or folder named {name!r}",
            remedy=f"choose from demo, {', '.join(KNOWN_RETRIEVAL)}, or name a folder with {CAPTIONS_FILE}",
        )
    if has_shards(name):
        return _from_store(name, open_samples([name], together=False))
    return _from_records(name, read_records(name))


def locate_known(known: KnownRetrieval, root: Path) -> Path | None:
    """Find the caption file of a known set.

    Args:
        known: the set.
        root: the data root.

    Returns:
        The path, or None if the set is not there.
    """
    places = [folder / file for file in known.files for folder in (root, root / known.name)]
    return next((place for place in places if place.is_file()), None)


def has_shards(path: str) -> bool:
    """Say whether a path is a folder of tar shards, one shard, or a pattern of several."""
    if storage.is_folder(path):
        return any(name.endswith(".tar") for name in storage.names_in(path))
    return path.endswith(".tar")


def read_records(path: str) -> Iterator[Record]:
    """Read what a folder, or a list in it, says about pictures and their captions.

    Args:
        path: a `captions.jsonl`, a folder with such files in or below it, or a folder with text files beside
            the pictures.

    Yields:
        One record per picture, and one for whatever cannot be read.
    """
    if storage.is_file(path):
        yield from read_lists([path], root=storage.parent(path))
    elif lists := find_lists(path):
        yield from read_lists(lists, root=path)
    else:
        yield from read_folder(path)


class _Pairs:
    """Collects pictures and captions, and counts what is neither."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pictures: list[Picture] = []
        self._texts: list[str] = []
        self._owners: list[int] = []
        self.skipped: dict[str, tuple[int, str]] = {}

    def add(self, picture: Picture, captions: Iterable[str]) -> None:
        for caption in captions:
            self._texts.append(caption)
            self._owners.append(len(self._pictures))
        self._pictures.append(picture)

    def skip(self, cause: str, key: str) -> None:
        count, first = self.skipped.get(cause, (0, key))
        self.skipped[cause] = (count + 1, first)

    def finish(self, *, fold_size: int = 0) -> RetrievalSet:
        if not self._pictures:
            causes = "; ".join(f"{cause}: {count}, first {key}" for cause, (count, key) in self.skipped.items())
            raise EvaluateError(
                f"no picture with a caption in {self._name} ({causes or 'empty'})",
                remedy=f'give it a {CAPTIONS_FILE} with lines {{"file": "a.jpg", "captions": ["…"]}}, '
                "or search it with --query TEXT",
            )
        return RetrievalSet(
            name=self._name,
            pictures=self._pictures,
            texts=self._texts,
            owners=self._owners,
            skipped=self.skipped,
            fold_size=fold_size,
        )


def _from_store(name: str, store: SampleStore) -> RetrievalSet:
    pairs = _Pairs(name)
    pairs.skipped.update(store.skipped)
    for number in range(len(store)):
        try:
            sample = store.read(number)
        except DataError as error:
            pairs.skip(error.cause, str(number))
            continue
        pairs.add((sample.key, partial(read_image, store, number)), sample.captions)
    return pairs.finish()


def read_image(store: SampleStore, number: int) -> bytes:
    """Return the encoded picture of one pair of a store."""
    return store.read(number).image


def _from_records(name: str, records: Iterable[Record]) -> RetrievalSet:
    pairs = _Pairs(name)
    for record in records:
        try:
            captions = captions_of_record(record)
        except DataError as error:
            pairs.skip(error.cause, record.key)
            continue
        pairs.add(picture_of_record(record), captions)
    return pairs.finish()


def captions_of_record(record: Record) -> tuple[str, ...]:
    """Read a record's captions, its picture only where it lies in the same place.

    Args:
        record: what a source says about a picture.

    Returns:
        At least one caption.

    Raises:
        DataError: there is none, or the record is broken; `.cause` says why.
    """
    if isinstance(record, FileRecord):
        return clean_captions(list(record.captions), record.key)
    return record.load().captions


def picture_of_record(record: Record) -> Picture:
    """Name a record's picture by its path, where it has one, and say how to read it."""
    path = getattr(record, "path", record.key)
    if isinstance(path, str) and not storage.is_remote(path) and isinstance(record, FileRecord):
        return path, partial(read_file, path)
    return path, partial(_load_image, record)


def _load_image(record: Record) -> bytes:
    return record.load().image


def _open_known(known: KnownRetrieval, root: Path) -> RetrievalSet:
    path = locate_known(known, root)
    if path is None:
        raise EvaluateError(
            f"{known.name} is not there: expected {root / known.name / known.files[0]}",
            remedy=how_to_get(known, root),
        )
    pairs = _Pairs(known.name)
    try:
        captions = _reader(path)(path)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error!r}", remedy=how_to_get(known, root)) from error
    if not captions:
        raise EvaluateError(f"{path} names no test picture", remedy=how_to_get(known, root))
    folder = locate_pictures(str(path), list(captions))
    for name, texts in captions.items():
        file = storage.join(folder, name)
        pairs.add((file, partial(read_file, file)), clean_captions(list(texts), name)[:MAX_CAPTIONS])
    return pairs.finish(fold_size=known.fold_size)


def how_to_get(known: KnownRetrieval, root: Path) -> str:
    """Say which files to put where."""
    files = " or ".join(known.files)
    return f"put {files} and the folder of pictures into {root / known.name}/; from {known.source}"


def _reader(path: Path) -> Callable[[Path], dict[str, list[str]]]:
    if path.name.startswith("dataset_"):
        return _read_karpathy
    if path.suffix == ".json":
        return _read_coco
    return _read_image_list if path.name == "Flickr_8k.testImages.txt" else _read_comma_lines


def _read_karpathy(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in read_json(str(path))["images"]:
        if row.get("split") == "test":
            name = "/".join(filter(None, (row.get("filepath", ""), row["filename"])))
            found[name] = [sentence["raw"] for sentence in row["sentences"]]
    return found


def _read_coco(path: Path) -> dict[str, list[str]]:
    content = read_json(str(path))
    names = {row["id"]: row["file_name"] for row in content["images"]}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        found[names[annotation["image_id"]]].append(annotation["caption"])
    return found


def _read_comma_lines(path: Path) -> dict[str, list[str]]:
    """Read lines `name.jpg,caption` with a heading, as the annotations of CLIP_benchmark come."""
    found: dict[str, list[str]] = {}
    for line in read_lines(path)[1:]:
        name, _, caption = line.partition(".jpg,")
        found.setdefault(f"{name}.jpg", []).append(caption)
    return found


def _read_image_list(path: Path) -> dict[str, list[str]]:
    """Read Flickr8k as its authors gave it: a list of test pictures, and captions by `name.jpg#0<TAB>caption`."""
    found: dict[str, list[str]] = {name: [] for name in read_lines(path)}
    for line in read_lines(path.with_name("Flickr8k.token.txt")):
        key, _, caption = line.partition("\t")
        name = key.partition("#")[0]
        if name in found:
            found[name].append(caption)
    return found
