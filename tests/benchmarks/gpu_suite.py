"""Every figure of the training step that only a GPU can give, one process for each, appended to a file of JSON lines.

python tests/benchmarks/gpu_suite.py --out gpu.jsonl --budget-minutes 25: what has a line in the file already is not run
again. In order: the towers and methods at each batch size on synthetic pairs (eager, then compiled) beside OpenCLIP in
the same process, then through the loader, then each optimization left out alone.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from old_ways import OLD_WAYS

HERE = Path(__file__).parent
ARCHITECTURES, METHODS, BATCH_SIZES = ("vit-b32", "vit-b16", "rn50"), ("clip", "declip"), (256, 1024, 4096)
LARGEST_MICRO_BATCH = {"vit-b32": 1024, "vit-b16": 256, "rn50": 256}
"""Pairs of a forward pass that fit 80 GB with two views."""


def commands() -> Iterator[list[str]]:
    """List what is to be run, the most telling first."""
    for extra in ([], ["--compile"]):
        for size in (1024, 256, 4096):
            for arch in ARCHITECTURES:
                micro = LARGEST_MICRO_BATCH[arch]
                words = ["training.py", "--arch", arch, "--method", *METHODS, "--batch-size", str(size), *extra]
                yield words + (["--micro-batch-size", str(micro)] if size > micro else [])
    yield ["training.py", "--arch", "vit-b32", "--method", *METHODS, "--batch-size", "256", "--compile", "--graphs"]
    for arch in ARCHITECTURES:
        words = ["end_to_end.py", "--arch", arch, "--batch-size", "1024" if arch == "vit-b32" else "256"]
        yield [*words, "--method", *METHODS, "--pairs", "8192", "--loader", "processes"]
    for name in OLD_WAYS:
        arch = "rn50" if name == "channels-last" else "vit-b32"
        words = ["training.py", "--arch", arch, "--method", "declip", "--batch-size", "256", "--without", name]
        yield words + (["--micro-batch-size", "32"] if name == "first-pass" else [])


def main() -> None:
    """Run what is missing until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-minutes", type=float, default=25)
    parser.add_argument("--peak-tflops", default="0", help="measured bfloat16 peak of the device")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.budget_minutes
    done = set()
    if options.out.exists():
        done = {json.loads(line)["command"] for line in options.out.read_text().splitlines()}
    for words in commands():
        command = " ".join(words)
        left = ends - time.monotonic()
        if command in done:
            continue
        if left <= 0:
            sys.stderr.write(f"not run, the time is up: {command}\n")
            continue
        peak = ["--peak-tflops", options.peak_tflops] if words[0] == "training.py" else []
        try:
            result = subprocess.run(
                [sys.executable, HERE / words[0], *words[1:], *peak], capture_output=True, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"cut off, the time is up: {command}\n")
            continue
        lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        if result.returncode:
            lines.append({"error": (result.stderr.strip() or "no message").splitlines()[-1]})
        with options.out.open("a") as file:
            file.writelines(json.dumps({"command": command, **line}) + "\n" for line in lines)
        sys.stderr.write(f"{len(lines)} lines: {command}\n")


if __name__ == "__main__":
    main()
