"""What a run folder says of the model in it: data, settings, scores; read leniently, for cards and reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from declip_cli.files import parse_json, read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Empty where the model comes without its run."""

    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section → key → value, as `declip pretrain --config` takes it."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """What data and machine added, such as `num_pairs`."""
    steps: int = 0
    samples_seen: int = 0
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The last ones: name of the data set → scores."""
    evaluated_at_step: int = 0


def read_run_facts(path: Path) -> RunFacts:
    """Read what is known of the training of a model.

    Args:
        path: a run folder, or the model folder in it; anything else gives no facts.

    Returns:
        The facts; what is damaged or of another kind is left out.
    """
    for folder in (path, path.parent):
        try:
            content = read_json(folder / "config.json")
            config, run = content["config"], content["run"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(config, dict) and isinstance(run, dict) and all(isinstance(v, dict) for v in config.values()):
            return RunFacts(config=config, run=run, **_read_metrics(folder / "metrics.jsonl"))
    return RunFacts()


def _read_metrics(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            record = parse_json(line)
            found |= {"steps": int(record["step"]), "samples_seen": int(record["samples_seen"])}
            scores = record["evaluations"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(scores, dict) and scores and all(isinstance(value, dict) for value in scores.values()):
            found |= {"evaluations": scores, "evaluated_at_step": found["steps"]}
    return found
