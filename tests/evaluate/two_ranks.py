"""What one process does alone in test_encoding.py, and each of two ranks."""

import dataclasses
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from declip_cli.data.catalog import open_dataset
from declip_cli.data.dataset import Classes, Dataset
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.during_training import make_evaluator
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.retrieve import retrieve
from declip_cli.evaluate.texts import text_features
from declip_cli.evaluate.zeroshot import zeroshot
from declip_cli.model.checkpoint import PretrainedModel
from tests.conftest import random_model
from tests.data_sets import MemoryDataset

OPTIONS = FeatureOptions(precision="fp32", batch_size=2, threads=1, split_over_ranks=True)
WORDS = ["red", "green", "blue", "cat", "dog", "tree", "house", "car"]


def not_there() -> bytes:
    raise DataError("no image", remedy="none", cause="missing file")


def some_images(num: int, *, junk: tuple[int, ...] = (), missing: tuple[int, ...] = ()) -> list[Any]:
    """Images of the demo corpus, some of which cannot be read, for two causes."""
    others = {number: b"junk" for number in junk} | {number: not_there for number in missing}
    demo = open_dataset("demo")
    return [others.get(number) or demo.read(number).image for number in range(num)]


def images(num: int, **causes: tuple[int, ...]) -> Dataset:
    return MemoryDataset(some_images(num, **causes))


def classes(num: int, *, num_classes: int = 7, **causes: tuple[int, ...]) -> Dataset:
    return MemoryDataset(
        some_images(num, **causes),
        labels=[number % num_classes for number in range(num)],
        classes=Classes(
            names=tuple(f"{word} {word[0] * 9} {number}" for number, word in enumerate(WORDS[:num_classes])),
            templates=("{}", "a photo of a {}.", "one two three four five six seven {}"),
        ),
    )


def pairs(num: int, **causes: tuple[int, ...]) -> Dataset:
    texts = [tuple(f"a {WORDS[number % 8]}{' and' * many} {number}" for many in (1, 2)) for number in range(num)]
    return MemoryDataset(some_images(num, **causes), captions=texts, fold_size=4)


def classified(model: PretrainedModel, dataset: Dataset) -> dict[str, Any]:
    report = zeroshot(model, dataset, options=OPTIONS)
    found = report.predictions
    return {
        "report": {key: value for key, value in report.to_json().items() if key != "seconds"},
        "keys": found.keys,
        "labels": found.labels,
        "ranked": found.ranked,
        "scores": found.scores,
    }


def retrieved(model: PretrainedModel, dataset: Dataset) -> dict[str, Any]:
    report = retrieve(model, dataset, options=OPTIONS).to_json()
    return {key: value for key, value in report.items() if key != "seconds"}


def message_of(work: Callable[[], object]) -> str:
    try:
        work()
    except EvaluateError as error:
        return error.message
    return ""


def told(work: Callable[[FeatureOptions], object]) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    work(dataclasses.replace(OPTIONS, progress=lambda done, of: calls.append((done, of))))
    return calls


def num_encoded(num_images: int, num_texts: int) -> tuple[int, int]:
    """Count what passes through the encoder of this process."""
    model = random_model()
    counts = {"encode_image": 0, "encode_text": 0}
    for name in counts:
        whole = getattr(model.encoder, name)

        def counting(inputs, *, name=name, whole=whole, **options):
            counts[name] += len(inputs)
            return whole(inputs, **options)

        setattr(model.encoder, name, counting)
    image_features(model, images(num_images), options=OPTIONS)
    text_features(model, WORDS[:num_texts], options=OPTIONS)
    return counts["encode_image"], counts["encode_text"]


def evaluated(names: list[str]) -> dict[str, Any]:
    return make_evaluator(names, threads=1)(random_model())


PLAIN, TOKEN_WISE = random_model, lambda: random_model(token_wise_dim=6)
CASES: dict[str, Callable[[], Any]] = {
    "classes": lambda: classified(PLAIN(), classes(9, junk=(1, 4, 5), missing=(3, 2))),
    "classes, even": lambda: classified(PLAIN(), classes(6)),
    "classes, one image": lambda: classified(PLAIN(), classes(1)),
    "classes, all of a rank unreadable": lambda: classified(PLAIN(), classes(3, junk=(0, 2))),
    "classes, token-wise": lambda: classified(TOKEN_WISE(), classes(5, junk=(2,))),
    "classes, token-wise, one image": lambda: classified(TOKEN_WISE(), classes(1, num_classes=2)),
    "pairs": lambda: retrieved(PLAIN(), pairs(9, junk=(0, 3), missing=(6,))),
    "pairs, one image": lambda: retrieved(PLAIN(), pairs(1)),
    "pairs, token-wise": lambda: retrieved(TOKEN_WISE(), pairs(9, junk=(2,))),
    "pairs, token-wise, one readable": lambda: retrieved(TOKEN_WISE(), pairs(3, junk=(0, 2))),
    "images": lambda: image_features(PLAIN(), images(7, junk=(6,)), normalize=False, options=OPTIONS).features,
    "one text": lambda: text_features(PLAIN(), ["a cat"], options=OPTIONS),
    "none readable": lambda: message_of(
        lambda: image_features(PLAIN(), images(5, junk=(1, 3, 4), missing=(0, 2)), options=OPTIONS)
    ),
}
"""What must come out alike on one process and on each of two ranks."""
CASES_BY_RANK: dict[str, Callable[[], Any]] = {
    "encoded": lambda: num_encoded(5, 3),
    "told of images": lambda: told(lambda options: image_features(PLAIN(), images(7), options=options)),
    "told of texts": lambda: told(lambda options: text_features(PLAIN(), WORDS[:5], options=options)),
}
"""What differs between ranks."""


def run(rank: int, folder: str, names: list[str]) -> None:
    """Work through all cases as one of two ranks, and evaluate sets by their names."""
    torch.set_num_threads(1)
    os.environ["DECLIP_CACHE"] = f"{folder}/cache"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = {name: case() for name, case in (CASES | CASES_BY_RANK).items()}
    found["evaluated"] = evaluated(names)
    found["cache"] = [str(path) for path in Path(folder).glob("cache/**/*")]
    if rank == 1:  # rank 0 takes no part, as where only it writes a report: nothing may wait for it
        alone = dataclasses.replace(OPTIONS, split_over_ranks=False)
        found["alone"] = image_features(PLAIN(), images(3), options=alone).features
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
