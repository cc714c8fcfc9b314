"""The same quality from fewer pairs: methods × {100, 50, 25, 12.5 %} of the pairs, three seeds, best against best.

python tests/benchmarks/data_efficiency.py dev.tar --work WORK --tune clip slip declip --trials 12   (choices)
python tests/benchmarks/data_efficiency.py dev.tar --work WORK --budget-minutes 60                   (the table)
python tests/benchmarks/data_efficiency.py dev.tar --work WORK --summary                             (table, picture)

`cells.jsonl` and `trials.jsonl` in WORK grow line by line; what is there is not run again. CLIP comes first, then all
other rows at one size and seed, then the other sizes, then the other seeds. The tables are of runs with the limits that
are asked for; those with others have one of their own. What was tried besides may stand in `tried.jsonl`.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_efficiency_cell import Limits, clock, run_cell, train
from data_efficiency_corpus import SIZES, Corpus
from data_efficiency_rows import CELL, MAIN_ROWS, ROWS, best_trial, digest, draw, is_known, resolve, weights_of
from data_efficiency_summary import REFERENCE, summarize_all, write_page

from declip_cli.config import RunConfig
from declip_cli.train.run import Request, pretrain

SIZE_ORDER = (0.5, 0.125, 1.0, 0.25)
TUNING_SEED = 100
"""Draws pairs and weights of all trials; no seed of the table."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that was cut off by a kill does not count."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a JSON line, in place of one that was cut off."""
    whole = path.read_bytes().rpartition(b"\n") if path.is_file() else (b"", b"", b"")
    if whole[2]:
        path.write_bytes(whole[0] + whole[1])
    with path.open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


@dataclass(frozen=True, slots=True)
class Job:
    """One line to be: what is known of it before, and the function that finds out the rest."""

    key: dict[str, Any]
    run: Callable[[], dict[str, Any]]


def cells_of(rows: Sequence[str], sizes: Sequence[float], seeds: Sequence[int]) -> Iterator[tuple[str, float, int]]:
    """Order the cells so that the first ones say most."""
    ordered = [size for size in SIZE_ORDER if size in sizes]
    return ((row, size, seed) for seed in seeds for size in ordered for row in rows)


def asked_for(corpus: Corpus, row: str, size: float, seed: int, changes: dict[str, Any]) -> RunConfig:
    """Settle what a run of a row is asked to do."""
    data = {"data.path": corpus.fit_paths(size, seed), "data.cache_dir": str(corpus.index_dir), "train.seed": seed}
    return resolve(row, changes | data)


def tuned_settings(work: Path) -> dict[str, dict[str, Any]]:
    """Read what the search found: row → `settings`, `validation`, `num_trials`."""
    path = work / "tuned.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def run_all(pool: Executor, jobs: Iterator[Job], options: argparse.Namespace) -> Iterator[tuple[Job, Any]]:
    """Run jobs in order, some at a time; yield each with what it returned, as soon as it has.

    A job is asked for only when a process is free, so it may depend on what was yielded before.
    """
    running: dict[Future[Any], Job] = {}
    while True:
        while len(running) < options.processes and not options.is_over() and (job := next(jobs, None)):
            running[pool.submit(job.run)] = job
        if not running:
            return
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(done), done.result()


def open_pool(processes: int) -> Executor:
    """Start processes of one thread each."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def run_trial(corpus: Corpus, asked: RunConfig, limits: Limits, work: Path) -> dict[str, Any]:
    """Train with drawn settings and return how good the best model was on the validation vendor."""
    watch = train(corpus, asked, limits, work, equal_seconds=None)
    assert watch.best is not None
    found = {"validation": round(watch.best.validation, 5), "step": watch.best.step}
    return found | {"seconds": round(watch.seconds, 2)}


def trials(
    corpus: Corpus, options: argparse.Namespace, limits: Limits, lines: Sequence[dict[str, Any]]
) -> Iterator[Job]:
    """Draw the same settings for each row; trial by trial, so that all rows have had the same at any time."""
    for trial in range(options.trials):
        for row in options.tune:
            settings = draw(row, trial, weights_of(row))
            key = {"row": row, "trial": trial, "size": options.tune_size}
            key |= {"digest": digest([CELL | ROWS[row] | settings, dataclasses.asdict(limits)])}
            if any(line.items() >= key.items() for line in lines):
                continue
            asked = asked_for(corpus, row, options.tune_size, TUNING_SEED, settings)
            yield Job(key | {"settings": settings}, partial(run_trial, corpus, asked, limits, options.work))


def tune(corpus: Corpus, options: argparse.Namespace, limits: Limits) -> None:
    """Try drawn settings for each row and keep the best."""
    path = options.work / "trials.jsonl"
    with open_pool(options.processes) as pool:
        for job, found in run_all(pool, trials(corpus, options, limits, read_lines(path)), options):
            append_line(path, job.key | found)
            print(json.dumps(job.key | found), flush=True)
            of_size = [line for line in read_lines(path) if line["size"] == options.tune_size]
            write_tuned(options.work, of_size, options.tune)


def write_tuned(work: Path, lines: Sequence[dict[str, Any]], tuned: Sequence[str]) -> None:
    """Write down the best settings of the rows that were tuned together; more trials for one of them do not count.

    Other rows keep what is written down of them.
    """
    rows = {line["row"] for line in lines} & set(tuned)
    num = min(len({line["trial"] for line in lines if line["row"] == row}) for row in rows)
    found = tuned_settings(work)
    for row in sorted(rows):
        best = best_trial([line for line in lines if line["row"] == row and line["trial"] < num])
        found[row] = {"settings": best["settings"], "validation": best["validation"], "num_trials": num}
    (work / "tuned.json").write_text(json.dumps(found, indent=2) + "\n")


def cells(corpus: Corpus, rows: Sequence[str], options: argparse.Namespace, limits: Limits) -> Iterator[Job]:
    """List the cells of some rows that are not there yet."""
    path, tuned = options.work / "cells.jsonl", tuned_settings(options.work)
    for row, size, seed in cells_of(rows, options.sizes, options.seeds):
        found = tuned.get(row, {"settings": {}, "num_trials": 0})
        key = {"row": row, "size": size, "seed": seed}
        key |= {"digest": digest([CELL | ROWS[row] | found["settings"], dataclasses.asdict(limits)])}
        lines = read_lines(path)
        if any(line.items() >= key.items() for line in lines):
            continue
        reference = {"row": REFERENCE, "size": size, "seed": seed, "limits": dataclasses.asdict(limits)}
        of_reference = [one for one in lines if one.items() >= reference.items()]
        facts = {"pairs": round(size * corpus.facts["fit_pairs"]), "num_trials": found["num_trials"]}
        facts |= {"settings": found["settings"], "limits": dataclasses.asdict(limits)}
        facts |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU thread"}
        asked = asked_for(corpus, row, size, seed, found["settings"])
        seconds = of_reference[-1]["seconds"] if of_reference else None
        run = partial(
            run_cell, corpus, asked, limits, options.work, equal_seconds=seconds, is_reference=row == REFERENCE
        )
        yield Job(key | facts, run)


def run_table(corpus: Corpus, options: argparse.Namespace, limits: Limits) -> None:
    """Run the cells that are not there yet."""
    others = [row for row in options.rows if row != REFERENCE]
    with open_pool(options.processes) as pool:
        for rows in ([REFERENCE] if REFERENCE in options.rows else [], others):  # the others get the time of the first
            for job, result in run_all(pool, cells(corpus, rows, options, limits), options):
                append_line(options.work / "cells.jsonl", job.key | result)
                print(json.dumps(job.key | {"seconds": result["seconds"], "best": result["best"]}), flush=True)


def estimate(corpus: Corpus, options: argparse.Namespace, limits: Limits) -> None:
    """Time a few steps of each row and print what the table takes at most, in core-hours."""
    whole = 0.0
    for row in options.rows:
        asked = asked_for(corpus, row, max(options.sizes), 0, {})
        asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, steps=8, log_every_steps=2))
        asked = dataclasses.replace(asked, optim=dataclasses.replace(asked.optim, warmup_steps=0))
        request = Request(asked=asked, path=options.work / "run", force=True)
        times = [(report.step, clock()) for report in pretrain(request, evaluate=None, log=lambda line: None)]
        times = [time for time in times if time[0] <= 6]  # saving follows the last step
        per_step = (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])
        num = len(options.sizes) * len(options.seeds)
        hours = num * limits.max_steps * per_step / 3600
        whole += hours
        print(json.dumps({"row": row, "seconds_per_step": round(per_step, 3), "cells": num, "hours": round(hours, 2)}))
    print(json.dumps({"row": "all", "at_most_hours": round(whole, 2), "limits": dataclasses.asdict(limits)}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="tar of folders with captions.jsonl")
    parser.add_argument("--further", type=Path, help="another such tar: images on which scores are checked again")
    parser.add_argument("--work", type=Path, required=True, help="folder of shards, lines, table and picture")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help=f"default: {' '.join(MAIN_ROWS)}, if they are there")
    parser.add_argument("--sizes", nargs="+", type=float, choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tune", nargs="+", choices=ROWS, default=[], help="search settings for these rows instead")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--tune-size", type=float, choices=SIZES, default=0.5)
    parser.add_argument("--max-steps", type=int, default=800)
    parser.add_argument("--eval-every", type=int, default=40)
    parser.add_argument("--patience", type=int, default=4, help="looks without a better score before a run stops")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="start nothing after this time")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--dry-run", action="store_true", help="only estimate how long the table takes")
    parser.add_argument("--summary", action="store_true", help="only write table.md, summary.json and picture.svg")
    parser.add_argument("--page", type=Path, help="with --summary: also write docs/what-it-saves.md")
    options = parser.parse_args()
    options.rows = options.rows or [row for row in MAIN_ROWS if is_known(row)]
    unknown = [row for row in options.rows + options.tune if not is_known(row)]
    if unknown:
        parser.error(f"this version of declip has no {', '.join(unknown)}: leave it out")
    started = time.monotonic()
    options.is_over = lambda: time.monotonic() - started > 60 * options.budget_minutes
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    corpus = Corpus(options.data, options.work, options.further)
    limits = Limits(max_steps=options.max_steps, eval_every=options.eval_every, patience=options.patience)
    if options.dry_run:
        estimate(corpus, options, limits)
    elif options.tune:
        tune(corpus, options, limits)
    elif not options.summary:
        run_table(corpus, options, limits)
    lines = read_lines(options.work / "cells.jsonl")
    if options.summary or (lines and not options.dry_run and not options.tune):
        summary = summarize_all(lines, dataclasses.asdict(limits))
        (options.work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        tries = (read_lines(options.work / f"{name}.jsonl") for name in ("trials", "tried"))
        write_page(summary, corpus.facts, *tries, options.work, options.page)
        sys.stdout.write((options.work / "table.md").read_text())


if __name__ == "__main__":
    main()
