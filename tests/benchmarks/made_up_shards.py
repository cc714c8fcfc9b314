"""Shards of made-up photographs with captions as long as real ones."""

import io
import tarfile
from pathlib import Path

import cv2
import numpy as np

WORDS = "a photograph of old red bus in the rain near station street with people walking and nice trees".split()  # noqa: SIM905


def write_shards(folder: Path, num: int, *, num_shards: int = 4, width: int = 341, height: int = 256) -> list[str]:
    """Write JPEGs of quality 90, with some noise on large shapes, into tar archives as img2dataset does.

    Args:
        folder: is there.
        num: pairs in all.
        num_shards: archives.
        width: of each image, in pixels.
        height: of the image, in pixels.

    Returns:
        Paths of the archives.
    """
    rng = np.random.default_rng(0)
    paths = [folder / f"{shard:05}.tar" for shard in range(num_shards)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as archive:
            for number in range(shard, num, num_shards):
                shapes = rng.integers(0, 256, (height // 12, width // 12, 3)).astype(np.float32)
                pixels = cv2.resize(shapes, (width, height), interpolation=cv2.INTER_CUBIC)
                pixels += rng.normal(0, 6, pixels.shape)
                jpeg = cv2.imencode(".jpg", pixels.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
                # Lengths of alt texts: half of them below ten words, a tenth above thirty.
                num_words = int(np.clip(rng.lognormal(2.2, 0.9), 1, 120))
                caption = " ".join(rng.choice(WORDS, num_words))
                for name, data in ((f"{number:06}.jpg", jpeg.tobytes()), (f"{number:06}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return [str(path) for path in paths]
