"""Long form of the fault tests, by hand: `python -m tests.faults.long --kills 200 --damages 2000`, in JSON lines."""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch

from tests.faults.corruption import tried
from tests.faults.harness import METHODS, WAYS, Case, final_state, killed_until_done, undisturbed
from tests.train.small_runs import run, small_config


def kills(folder, rng, number):
    cases = [Case(method, way) for method in METHODS for way in WAYS]
    each = -(-number // len(cases))
    total = {"kills": 0, "runs": 0, "equal": 0, "slowest_end_s": 0.0}
    for case in cases:
        seconds = undisturbed(case, folder / "whole")
        done, equal, runs, slowest = 0, 0, 0, 0.0
        while done < each:
            survived, waited = killed_until_done(case, folder / "killed", rng, seconds=seconds, max_kills=each - done)
            (step, found), (expected_step, expected) = final_state(folder / "killed"), final_state(folder / "whole")
            is_equal = step == expected_step and found.keys() == expected.keys()
            is_equal = is_equal and all(torch.equal(found[name], value) for name, value in expected.items())
            done, runs, equal, slowest = done + survived, runs + 1, equal + is_equal, max(slowest, waited)
            shutil.rmtree(folder / "killed")
        shutil.rmtree(folder / "whole")
        report = {"method": case.method, "way": case.way, "kills": done, "runs": runs, "equal": equal}
        print(json.dumps(report | {"slowest_end_s": round(slowest, 1)}), flush=True)
        for key, value in (("kills", done), ("runs", runs), ("equal", equal)):
            total[key] += value
        total["slowest_end_s"] = max(total["slowest_end_s"], round(slowest, 1))
    print(json.dumps({"name": "kills"} | total), flush=True)


def damages(folder, rng, number):
    path = folder / "run"
    run(
        small_config(method={"name": "declip", "queue_size": 40}, train={"steps": 4, "checkpoint_every_steps": 2}), path
    )
    print(json.dumps({"name": "damages", "tried": number} | tried(path, rng, number=number)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, began = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if options.kills:
            kills(Path(folder), rng, options.kills)
        if options.damages:
            damages(Path(folder), rng, options.damages)
    print(json.dumps({"name": "time", "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
