"""What a checkpoint is, read off its header and its configurations; no module is built, no number of it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from declip_cli.interop.foreign import ForeignModel, changed_preprocessing
from declip_cli.interop.other_towers import OtherTowers
from declip_cli.interop.read import locate, open_foreign
from declip_cli.interop.run_facts import RunFacts, read_run_facts
from declip_cli.interop.weights import read_checkpoint
from declip_cli.model.architectures import name_of
from declip_cli.model.checkpoint import EXTRA_FILE, WEIGHTS_FILE, describe_folder
from declip_cli.model.dims import Architecture, describe_architecture
from declip_cli.model.preprocessing import Preprocessing

_TRAINED_WITH = {
    "data": ("path", "split"),
    "method": ("name", "faithful", "weights"),
    "optim": ("optimizer", "learning_rate_peak", "weight_decay"),
    "train": ("samples", "batch_size", "precision", "init", "seed"),
}
"""Settings of a run that tell what its model has learned from."""
_MAX_TEXT = 200


def inspect_model(path: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe a model of ours or of another project.

    Args:
        path: a run folder, a model folder, a checkpoint, or a name of OpenCLIP's.
        given: from `parse_assumptions`.

    Returns:
        Plain values: `family`, `arch`, `method`, sizes, `preprocessing`, `training`, `scores`, `assumed`.

    Raises:
        ModelError: it cannot be read.
    """
    location = locate(path, option="declip inspect")
    if location.folder is not None:
        return _describe_own(location.folder, given or {})
    found = open_foreign(location, given=given, option="declip inspect", shapes_only=True)
    return _describe_foreign(found)


def _describe_foreign(found: ForeignModel | OtherTowers) -> dict[str, Any]:
    if isinstance(found, OtherTowers):
        name, sizes = "", _other_sizes(found)
    else:
        name, sizes = name_of(found.architecture), _sizes(found.architecture, found.preprocessing, found.state)
    return {
        "family": found.project,
        "arch": name or "custom",
        "method": found.method,
        **sizes,
        "container": found.container,
        "files": [str(path) for path in found.paths],
        "training": {key: _short(value) for key, value in found.facts.items()},
        "scores": {},
        "assumed": list(found.assumed),
    }


def _describe_own(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    own, architecture, preprocessing = describe_folder(folder)
    state: dict[str, Tensor] = {}
    for name in (WEIGHTS_FILE, EXTRA_FILE):
        state |= read_checkpoint(folder / name, shapes_only=True).state
    facts = read_run_facts(folder)
    return {
        "family": "declip",
        "arch": str(own.get("arch")),
        "method": str(own.get("method")),
        **_sizes(architecture, changed_preprocessing(preprocessing, given), state),
        "container": "safetensors",
        "files": [str(folder / name) for name in (WEIGHTS_FILE, EXTRA_FILE)],
        "training": _training(facts),
        "scores": _scores(facts),
        "assumed": [],
    }


def _sizes(architecture: Architecture, preprocessing: Preprocessing, state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "image_side_px": architecture.image_side_px,
        "context_length": architecture.text.context_length,
        "embed_dim": architecture.embed_dim,
        "num_parameters": _num_parameters(state),
        "architecture": _plain(describe_architecture(architecture)),
        "preprocessing": preprocessing.to_json(),
        "vocabulary": "clip-bpe",
    }


def _other_sizes(found: OtherTowers) -> dict[str, Any]:
    """Describe towers that are only evaluated, and say why."""
    return {
        "image_side_px": found.preprocessing.image_side_px,
        "context_length": found.context_length,
        "embed_dim": _short(found.embed_dim),
        "num_parameters": _num_parameters(found.state),
        "architecture": _short(dict(found.config)),
        "preprocessing": found.preprocessing.to_json(),
        "vocabulary": _short(found.tokenizer_name) or "clip-bpe",
        "only_evaluated": found.reason,
    }


def _num_parameters(state: Mapping[str, Tensor]) -> int:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(value.numel() for name, value in state.items() if not name.endswith(statistics))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Put lists in place of tuples."""
    plain = {key: _plain(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _short(value: Any) -> Any:  # noqa: ANN401
    """Cut long texts; a number that JSON has not becomes text."""
    if isinstance(value, dict):
        return {str(key)[:_MAX_TEXT]: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value[:_MAX_TEXT] if isinstance(value, str) else value


def _training(facts: RunFacts) -> dict[str, Any]:
    """Take the main settings of a run; empty where the model comes without its run."""
    found = {
        f"{part}.{key}": facts.config.get(part, {}).get(key) for part, keys in _TRAINED_WITH.items() for key in keys
    }
    found |= {key: facts.run.get(key) for key in ("num_pairs", "total_steps", "global_batch")}
    found |= {"steps": facts.steps, "samples_seen": facts.samples_seen}
    return {key: _short(value) for key, value in found.items()} if facts.config else {}


def _scores(facts: RunFacts) -> dict[str, Any]:
    """Take the numbers of a run's last evaluations."""
    if not facts.evaluations:
        return {}
    reports = {name: _numbers(report) for name, report in facts.evaluations.items()}
    return {"step": facts.evaluated_at_step} | reports


def _numbers(report: Any) -> Any:  # noqa: ANN401
    """Keep the numbers of a report, however deep."""
    if isinstance(report, dict):
        kept = {str(key): _numbers(value) for key, value in report.items()}
        return {key: value for key, value in kept.items() if value not in (None, {})}
    return _short(report) if isinstance(report, int | float) and not isinstance(report, bool) else None
