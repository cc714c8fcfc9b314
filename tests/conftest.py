"""What tests of several rooms share."""

import functools
import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Two test processes, or two ranks of one test, with a thread each leave no core waiting; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image

from declip_cli.config import ModelConfig
from declip_cli.model.architectures import Architecture, TextDims, VitDims, find_architecture
from declip_cli.model.checkpoint import PretrainedModel, save_model
from declip_cli.model.clip import DualEncoder
from declip_cli.model.preprocessing import Preprocessing

SLOW = ("interop/", "faults/", "train/test_processes", "data/prepare/test_executors", "train/test_compile")
SLOW += ("train/test_resume", "test_docs_commands", "test_end_to_end", "methods/test_default_mode", "cli/")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a test process whole files, slow ones first, so that none is left alone with one at the end.

    The files on other projects' models are one group: their packages take many seconds to import.
    """

    def file_of(item: pytest.Item) -> str:
        return item.path.as_posix().rpartition("/tests/")[2]

    for item in items:
        file = file_of(item)
        item.add_marker(pytest.mark.xdist_group("interop" if file.startswith("interop/") else file))
    items.sort(key=lambda item: next((n for n, name in enumerate(SLOW) if file_of(item).startswith(name)), len(SLOW)))


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep caches, runs and data sets of the person who runs the tests out of them."""
    for name in ("DECLIP_CACHE", "DECLIP_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("DECLIP_DATA", raising=False)


@pytest.fixture(autouse=True)
def _interruptible() -> None:
    """Let Ctrl-C be Ctrl-C: a shell that starts the tests in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def quick_ranks() -> Iterator[None]:
    """Start ranks from a process that has imported everything; a new interpreter takes seconds to import torch.

    They keep the environment and the stdout and stderr which that process was started with.
    """
    names = ("tests.four_ranks", "tests.train.ranks", "tests.methods.small_methods", "tests.evaluate.two_ranks")
    multiprocessing.set_forkserver_preload(list(names))
    start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.multiprocessing, "start_processes", start)
        yield


def random_model(*, token_wise_dim: int = 0, seed: int = 0) -> PretrainedModel:
    """Build a very small model with random weights: images of 16 px, texts of 12 tokens, D = 10."""
    torch.manual_seed(seed)
    architecture = Architecture(
        image_side_px=16,
        embed_dim=10,
        vision=VitDims(patch_side_px=8, width=24, num_layers=2, num_heads=3),
        text=TextDims(context_length=12, width=16, num_layers=2, num_heads=2),
    )
    return PretrainedModel(
        encoder=DualEncoder(architecture, token_wise_dim=token_wise_dim).eval(),
        name=f"random-{seed}",
        method="filip" if token_wise_dim else "clip",
        arch="test",
        token_wise=bool(token_wise_dim),
        preprocessing=Preprocessing(image_side_px=16, resize_px=18),
        context_length=12,
        fingerprint=f"random weights {seed} {token_wise_dim}",
    )


@pytest.fixture(scope="session")
def tiny_model() -> PretrainedModel:
    """A very small model with random weights."""
    return random_model()


@pytest.fixture(scope="session")
def tiny_token_model() -> PretrainedModel:
    """A very small model with random weights that compares token by token, Q = 6."""
    return random_model(token_wise_dim=6)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random model for 32 px images."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    config = ModelConfig(arch="vit-tiny32")
    save_model(DualEncoder(find_architecture(config)), folder / "model", config=config, method="clip")
    return folder


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    """A function that draws a smooth random image: `make_image(seed, width=40, height=30, format="JPEG")`."""

    def make(seed: int, *, width: int = 40, height: int = 30, format: str = "JPEG") -> bytes:
        few = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC).save(file, format)
        return file.getvalue()

    return make
