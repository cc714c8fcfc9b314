"""Images a second of one core, against img2dataset's resizer: python tests/benchmarks/prepare.py.

Both make the shorter side 256 px and write JPEG of quality 95. `picture` is the resizer alone; `whole` is all of
`declip prepare` (reading files, decoding, resizing, encoding, hashing, writing shards) against that resizer; `shards`
is the same against what img2dataset does once it has the bytes: its resizer, a SHA-256 of each image, its writer. The
last line is the peak memory of a million records in the table reader and the cleaning.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lines import compare, report

from declip_cli.data.prepare.config import CleanConfig, PrepareConfig
from declip_cli.data.prepare.deduplicate import Deduplicator
from declip_cli.data.prepare.find_source import open_source
from declip_cli.data.prepare.hashes import PhashIndex
from declip_cli.data.prepare.images import shrink_image
from declip_cli.data.prepare.pipeline import prepare
from declip_cli.data.prepare.process import Pair, caption_problem

if TYPE_CHECKING:
    from img2dataset.resizer import Resizer

SIDE_PX, QUALITY = 256, 95
SIZES = ((500, 375), (1024, 768), (1600, 1200))


def write_folder(folder: Path, images: list[bytes]) -> None:
    """Write images with a captions.jsonl."""
    lines = []
    for number, image in enumerate(images):
        (folder / f"{number}.jpg").write_bytes(image)
        lines.append(json.dumps({"file": f"{number}.jpg", "caption": f"photograph {number}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


def prepare_folder(source: Path) -> None:
    """Run all of `declip prepare` in one worker thread."""
    with tempfile.TemporaryDirectory() as out:
        for _ in prepare(PrepareConfig(source=str(source), out=f"{out}/shards", workers=1)):
            pass


def write_shard(resizer: "Resizer", source: Path) -> None:
    """Read, resize, hash and write images as img2dataset's downloader does with its defaults, EXIF left out."""
    import pyarrow
    from img2dataset.writer import WebDatasetSampleWriter

    text, number = pyarrow.string(), pyarrow.int32()
    names = ("width", "height", "original_width", "original_height")
    fields = [("key", text), ("caption", text), *((name, number) for name in names), ("sha256", text)]
    with tempfile.TemporaryDirectory() as out:
        writer = WebDatasetSampleWriter(0, out, True, 5, pyarrow.schema(fields), "jpg")
        for place, line in enumerate((source / "captions.jsonl").read_text().splitlines()):
            row, key = json.loads(line), f"{place:09d}"
            data = (source / row["file"]).read_bytes()
            image, *sizes, error = resizer(io.BytesIO(data))
            assert error is None
            meta = {"key": key, "caption": row["caption"], "sha256": hashlib.sha256(data).hexdigest()}
            writer.write(image, key, row["caption"], meta | dict(zip(names, sizes, strict=True)))
        writer.close()


def measure_speed(num: int, runs: int) -> None:
    """Compare with img2dataset's resizer at three sizes."""
    from img2dataset.resizer import Resizer
    from loader import photograph_jpegs

    resizer = Resizer(SIDE_PX, "keep_ratio", True, encode_quality=QUALITY)
    clock = {"runs": runs, "clock": time.process_time, "unit": "images/s"}
    clock["peer_name"] = f"img2dataset {importlib.metadata.version('img2dataset')} resizer"
    for width, height in SIZES:
        images = list(photograph_jpegs(num, width=width, height=height))

        def ours(images: list[bytes] = images) -> None:
            for image in images:
                shrink_image(image, side_px=SIDE_PX, quality=QUALITY)

        def peer(images: list[bytes] = images) -> None:
            for image in images:
                assert resizer(io.BytesIO(image))[5] is None

        name = f"{width}x{height}"
        compare(f"prepare_image_{name}", ours, peer, amount=num, **clock)
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), images)
            whole = partial(prepare_folder, Path(folder))
            compare(f"prepare_whole_{name}", whole, peer, amount=num, **clock)
            clock_of_shards = clock | {"peer_name": clock["peer_name"].replace("resizer", "resizer and writer")}
            theirs = partial(write_shard, resizer, Path(folder))
            compare(f"prepare_shards_{name}", whole, theirs, amount=num, **clock_of_shards)


def clean_records(num: int) -> None:
    """Send records of a table through the reader and every filter; print the peak memory in MiB."""
    clean = CleanConfig(min_caption_chars=5, scripts=("latin",), max_caption_repeats=3, duplicates="near")
    seen, rng, num_left = Deduplicator(clean, PhashIndex()), random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        with table.open("w") as file:
            file.write("image,caption\n")
            file.writelines(f"{n:09d}.jpg,photograph {n // 2} of something that people like\n" for n in range(num))
        source = open_source(PrepareConfig(source=str(table), out=f"{folder}/out"))
        for number, record in enumerate(source.records):
            captions = tuple(text for text in record.captions if not caption_problem(text, clean))
            hashes = {"image_hash": rng.getrandbits(63) + 1, "phash": rng.getrandbits(64) | 1}
            pair = Pair(record.key, captions, b"", (256, 256), (256, 256), **hashes)
            num_left += isinstance(seen.check(pair), Pair)
            if number % 10_000 == 0:
                seen.new_bytes()
    assert num_left > 0.99 * num
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}\n")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="images of each size")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--records", type=int, default=1_000_000, help="for the memory; 0 leaves it out")
    parser.add_argument("--only-clean", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_clean:
        clean_records(arguments.records)
        return
    measure_speed(arguments.images, arguments.runs)
    if arguments.records:
        command = [sys.executable, __file__, "--only-clean", "--records", str(arguments.records)]
        peak_mib = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        report(
            f"prepare_memory_{arguments.records}_records",
            peak_mib,
            1024.0,
            peer_name="the goal",
            unit="MiB",
            runs=1,
            ratio=1024.0 / peak_mib,
        )


if __name__ == "__main__":
    main()
