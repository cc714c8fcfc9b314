"""Two augmented views per pair, against OpenCLIP's one plain view and the original's two views.

python tests/benchmarks/loader.py; with --workers 0 (the default) figures count the CPU time of one process, so they
hold on a busy machine; with more workers they count the clock on the wall.
"""

import argparse
import importlib.metadata
import io
import random
import statistics
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import open_clip_train.data
import skimage.data
import torch
import torchvision.transforms as transforms
from lines import report
from open_clip_train.data import get_wds_dataset
from PIL import Image, ImageFilter

from declip_cli.config import AugmentConfig, Views
from declip_cli.data.catalog import open_dataset
from declip_cli.data.dataset import Dataset
from declip_cli.data.loader import StreamConfig
from declip_cli.data.stream import TrainStream

BATCH_SIZE, SIDE_PX = 64, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle")


def photographs() -> list[Image.Image]:
    """Load the photographs that scikit-image brings along."""
    loaded = [getattr(skimage.data, name)() for name in PHOTOGRAPHS]
    return [Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels) for pixels in loaded]


def photograph_jpegs(num: int, *, width: int = 500, height: int = 375) -> Iterator[bytes]:
    """Cut crops out of the photographs: JPEG of quality 90, sides within a tenth of those given."""
    rng, sources = random.Random(0), photographs()
    for i in range(num):
        source = sources[i % len(sources)]
        size = [round(side * rng.uniform(0.9, 1.1)) for side in (width, height)]
        scale = min(source.width / size[0], source.height / size[1]) * rng.uniform(0.8, 1.0)
        crop = [side * scale for side in size]
        left, top = rng.uniform(0, source.width - crop[0]), rng.uniform(0, source.height - crop[1])
        box = (left, top, left + crop[0], top + crop[1])
        file = io.BytesIO()
        source.resize((size[0], size[1]), Image.Resampling.BICUBIC, box=box).save(file, "JPEG", quality=90)
        yield file.getvalue()


def write_shards(folder: Path, num: int, *, num_shards: int = 4) -> list[str]:
    """Write photographs with captions into tar shards, as img2dataset does."""
    paths = [folder / f"{i:05}.tar" for i in range(num_shards)]
    jpegs = photograph_jpegs(num)
    for i, path in enumerate(paths):
        with tarfile.open(path, "w") as shard:
            for number in range(i, num, num_shards):
                caption = f"a photograph of subject {number}, taken with a small camera in the afternoon"
                for name, data in ((f"{number:06}.jpg", next(jpegs)), (f"{number:06}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    return [str(path) for path in paths]


def our_batches(samples: Dataset, workers: int) -> Iterator[object]:
    """Two views of images and of texts, augmented, masked and tokenized."""
    return TrainStream(
        samples,
        StreamConfig(
            views=Views(images=("augmented", "augmented"), texts=("plain", "masked")),
            augment=AugmentConfig(),
            side_px=SIDE_PX,
            context_length=77,
            batch_size=BATCH_SIZE,
            seed=0,
            workers=workers,
            cache_mib=0,
        ),
    )


def open_clip_batches(paths: list[str], workers: int) -> Iterator[object]:
    """One plain view and one tokenized text, as `open_clip_train` loads them."""
    settings = types.SimpleNamespace(
        train_data="::".join(paths),
        dataset_resampled=True,
        train_num_samples=10**6,
        train_data_upsampling_factors=None,
        batch_size=BATCH_SIZE,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(SIDE_PX, is_train=True, mean=MEAN, std=STD)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    yield from get_wds_dataset(settings, transform, True, tokenizer=tokenizer).dataloader


class OriginalsPairs(torch.utils.data.Dataset[tuple[torch.Tensor, str]]):
    """DeCLIP's way: Pillow and torchvision, image by image; captions stay words until the model."""

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples
        self.draw = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIDE_PX, scale=(0.2, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([soften], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        """Count as if the data set never ended."""
        return 10**6

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        """Draw two views, joined in the channels."""
        sample = self.samples.read(number % len(self.samples))
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        return torch.cat([self.draw(image), self.draw(image)]), sample.captions[0]


def soften(image: Image.Image) -> Image.Image:
    """Blur as MoCo v2 does."""
    return image.filter(ImageFilter.GaussianBlur(radius=np.random.uniform(0.1, 2.0)))


def originals_batches(samples: Dataset, workers: int) -> Iterator[object]:
    """Two views of images, texts as words."""
    pairs = OriginalsPairs(samples)
    yield from torch.utils.data.DataLoader(pairs, BATCH_SIZE, shuffle=True, num_workers=workers)


def pairs_per_second(make: Callable[[], Iterator[object]], num: int, workers: int) -> float:
    """Start a loader, let it fill its queues, time so many batches, and stop it.

    One loader runs at a time: one that waits for its turn would use it to load ahead.
    """
    clock = time.perf_counter if workers else time.process_time
    batches = make()
    for _ in range(1 + 4 * workers):
        next(batches)
    start = clock()
    for _ in range(num):
        next(batches)
    seconds = clock() - start
    batches.close()  # type: ignore[attr-defined]  # generators and streams have it
    return num * BATCH_SIZE / seconds


def main() -> None:
    """Print one line per peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=8, help="timed batches of each loader in a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    num, workers = options.batches, options.workers
    # As full at the start as later on; otherwise it would read two pairs for each that it hands out.
    open_clip_train.data._SAMPLE_SHUFFLE_SIZE = open_clip_train.data._SAMPLE_SHUFFLE_INITIAL = 500
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), options.pairs)
        samples = open_dataset(paths, "train")
        peers = {
            f"open_clip {open_clip.__version__}, one plain view": lambda: open_clip_batches(paths, workers),
            f"torchvision {importlib.metadata.version('torchvision')} and Pillow, the original's two views": (
                lambda: originals_batches(samples, workers)
            ),
        }
        ours = {"ours": partial(our_batches, samples, workers)}
        rates: dict[str, list[float]] = {}
        for _ in range(options.runs):
            for name, make in (ours | peers).items():
                rates.setdefault(name, []).append(pairs_per_second(make, num, workers))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for peer_name in peers:
        report(
            f"loader, two views, {workers} workers",
            medians["ours"],
            medians[peer_name],
            peer_name=peer_name,
            unit="pairs/s",
            runs=options.runs,
            ratio=medians["ours"] / medians[peer_name],
        )


if __name__ == "__main__":
    main()
