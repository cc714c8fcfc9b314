"""Damage the files of a run at random, and see whether anybody notices."""

import shutil
from pathlib import Path

import torch

from declip_cli.errors import DeclipError
from declip_cli.interop.read import load_model
from declip_cli.train.run_dir import RunDir
from tests.faults.harness import damage


def read_everything(path: Path):
    """Read what a resumed run, and whoever uses its model, would read; return all values, or raise DeclipError."""
    run_dir = RunDir(path)
    settings, state = run_dir.read_run(), run_dir.load_state()
    run_dir.forget_metrics_after(state.step)
    model = load_model(path)
    values = {f"{group}/{name}": v for group, tensors in state.tensors.items() for name, v in tensors.items()}
    return settings.to_json(), state.step, state.values, values, dict(model.encoder.state_dict())


def _are_equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return all(_are_equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def tried(path: Path, rng, *, number: int) -> dict[str, int]:
    """Damage one file of a finished run after the other, each in a copy.

    Returns:
        How often reading ended in a traceback, gave other values than were written, or (for state and model) took a
        damaged file for a whole one.
    """
    counts = {"traceback": 0, "unnoticed": 0, "other values": 0}
    states = sorted((path / "state").iterdir())
    allowed = []
    for state in (states[-1], states[0]):  # what is read with the newest state, and with the one before
        copy = path.with_name("reference")
        shutil.copytree(path, copy)
        for other in states:
            if other.name > state.name:
                shutil.rmtree(copy / "state" / other.name)
        allowed.append(read_everything(copy))
        shutil.rmtree(copy)
    files = sorted(
        file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.name not in ("lock", "log.txt")
    )
    for _ in range(number):
        copy, name = path.with_name("damaged"), rng.choice(files)
        shutil.copytree(path, copy)
        is_changed = damage(copy / name, rng)
        try:
            found = read_everything(copy)
            if not any(_are_equal(found, values) for values in allowed):
                counts["other values"] += 1
            elif (
                is_changed
                and name.parts[0] == "state"
                and name.parts[1] == states[-1].name
                and found[1] == allowed[0][1]
            ):
                counts["unnoticed"] += name.suffix in (".safetensors", ".json")
        except DeclipError:
            pass
        except Exception:
            counts["traceback"] += 1
            raise
        finally:
            shutil.rmtree(copy)
    return counts
