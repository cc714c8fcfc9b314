"""Small runs on the demo corpus, for tests of the loop."""

import json

from declip_cli.config import RunConfig
from declip_cli.config_files import build_config, merge_into
from declip_cli.train.run_dir import RunDir
from declip_cli.train.session import pretrain

SMALL = {
    "model": {"arch": "vit-tiny32", "context_length": 12},
    "data": {"path": ["demo"], "part": "fit", "workers": 0},
    "method": {"name": "clip", "queue_size": 100},
    "optim": {"warmup_steps": 2},
    "train": {"steps": 10, "batch_size": 16, "precision": "fp32", "device": "cpu", "log_every_steps": 1, "threads": 1},
}


def small_config(**sections) -> RunConfig:
    settings = {}
    merge_into(settings, SMALL)
    merge_into(settings, sections)
    return build_config(RunConfig, settings)


def run(config, path, *, is_resumed=False, evaluate=None, notes=None):
    """Train to the end in a folder and return the reports."""
    if not is_resumed:
        RunDir(path).create(config, force=False)
    say = (lambda message: None) if notes is None else notes.append
    return list(pretrain(config, path, is_resumed=is_resumed, evaluate=evaluate, say=say))


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
