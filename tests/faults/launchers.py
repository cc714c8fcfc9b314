"""How long all ranks take to end after one of them has failed: `python -m tests.faults.launchers`."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SCRIPT = str(Path(__file__).parent / "failing_rank.py")
WORDS = ["pretrain", "--data", "demo", "--steps", "100000", "--batch-size", "8", "--threads", "1"]
WORDS += ["--precision", "fp32", "--method", "clip", "--set", "train.eval=[]", "--set", "train.time_limit_s=none"]
WORDS += ["--set", "train.log_every_steps=1"]
LAUNCHERS = ("torchrun", "processes", "accelerate", "srun")
FAULTS = ("error", "bug", "killed", "folder exists", "evaluation")


def commands(launcher, words, num_ranks):
    """Return the commands that start all ranks, each with what it adds to the environment."""
    python = sys.executable
    if launcher == "torchrun":
        command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        return [([*command, SCRIPT, *words], {})]
    if launcher == "processes":
        return [([python, SCRIPT, *words, "--processes", str(num_ranks)], {})]
    if launcher == "accelerate":
        command = [python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(num_ranks)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu"]
        return [
            ([word for word in command if word not in ("--cpu",)] + [SCRIPT, *words], {"ACCELERATE_USE_CPU": "true"})
        ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As srun starts it: one torchrun on each node, here of one rank each.
    torchrun = [python, "-m", "torch.distributed.run", "--nnodes", str(num_ranks), "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7", SCRIPT, *words]
    return [(torchrun, {"SLURM_STEP_NUM_TASKS": str(num_ranks)})] * num_ranks


def time_to_end(launcher, fault, *, num_ranks=2, timeout_s=150.0):
    """Start all ranks, let one fail, and measure how long the last of them lives.

    Returns:
        Seconds from the first sign of failure, on stderr or by a process that ended, to the end of the last process;
        the exit codes; and what was printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        rank = "0" if fault == "folder exists" else "1"
        environment = os.environ | {"DECLIP_FAULT": fault, "DECLIP_FAULT_RANK": rank, "OMP_NUM_THREADS": "1"}
        words = [*WORDS, "--out", str(out)]
        if fault == "folder exists":
            out.mkdir()
            (out / "notes.txt").write_text("of somebody else")
            environment["DECLIP_FAULT"] = ""
        if fault == "evaluation":
            words += ["--set", "train.eval_every_steps=3", "--set", 'train.eval=["demo"]']
        began = time.monotonic()
        started = [
            subprocess.Popen(
                command, env=environment | more, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
            )
            for command, more in commands(launcher, words, num_ranks)
        ]
        first, lines = [], []

        def listen(process):
            for line in process.stderr:
                lines.append(line)
                if ("step 2/" if fault == "evaluation" else "step 3/") in line or "already holds files" in line:
                    first.append(time.monotonic())

        threads = [threading.Thread(target=listen, args=(process,)) for process in started]
        for thread in threads:
            thread.start()
        try:
            codes = [process.wait(max(0.1, timeout_s - (time.monotonic() - began))) for process in started]
        except subprocess.TimeoutExpired:
            for process in started:
                process.kill()
            raise
        finally:
            for thread in threads:
                thread.join()
    return time.monotonic() - (first[0] if first else began), codes, "".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launchers", nargs="*", default=LAUNCHERS)
    parser.add_argument("--faults", nargs="*", default=FAULTS)
    parser.add_argument("--show", action="store_true", help="print what the ranks print")
    options = parser.parse_args()
    for launcher in options.launchers:
        for fault in options.faults:
            seconds, codes, text = time_to_end(launcher, fault)
            told = [line.strip() for line in text.splitlines() if line.startswith(("error:", "  fix:"))]
            report = {"launcher": launcher, "fault": fault, "seconds": round(seconds, 1), "codes": codes, "told": told}
            print(json.dumps(report), flush=True)
            if options.show:
                print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
