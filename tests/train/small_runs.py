"""Small runs on the demo corpus, for tests of the loop."""

import json

from declip_cli.config import RunConfig
from declip_cli.config_files import build_config, merge_into
from declip_cli.model.architectures import ARCHITECTURES, Architecture, TextDims, VitDims
from declip_cli.process_group import joined
from declip_cli.resolve import DataFacts, Machine, resolve
from declip_cli.train.run import Request, pretrain
from tests.methods.small_methods import narrow_heads

ARCHITECTURES["test"] = Architecture(
    image_side_px=32,
    embed_dim=12,
    vision=VitDims(patch_side_px=8, width=24, num_layers=2, num_heads=2),
    text=TextDims(context_length=12, width=8, num_layers=1, num_heads=2),
)
"""Small enough that ten steps and two states take a second: most of a model's weights are its words'."""
SMALL = {
    "model": {"arch": "test"},
    "data": {"path": ["demo"], "split": "fit", "workers": 0},
    "method": {"name": "clip", "queue_size": 100},
    "optim": {"warmup_steps": 2},
    "train": {"steps": 10, "batch_size": 8, "precision": "fp32", "device": "cpu", "log_every_steps": 1, "threads": 1},
}


def small_config(**sections) -> RunConfig:
    settings = {}
    merge_into(settings, SMALL)
    merge_into(settings, sections)
    return build_config(RunConfig, settings)


def resolved(config=None, *, num_pairs=100_000, world_size=1):
    """Resolve a configuration without data or hardware."""
    machine = Machine(world_size=world_size, device="cpu", precision="fp32", cores=1, threads=1, workers=0)
    data = DataFacts(num_pairs=num_pairs, fingerprint="made up")
    return resolve(config or small_config(), data=data, machine=machine)


def run(config, path, *, is_resumed=False, evaluate=None, notes=None):
    """Train to the end in a folder and return the reports."""
    log = (lambda message: None) if notes is None else notes.append
    request = Request(asked=config, path=path, is_resumed=is_resumed)
    with narrow_heads(), joined(has_gpu=False, log=log):
        return list(pretrain(request, evaluate=evaluate, log=log))


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
