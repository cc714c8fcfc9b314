"""Open models: a run folder, a model folder of ours, or a checkpoint of another project."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from declip_cli.errors import ConfigError, DeclipError, ModelError
from declip_cli.interop.assumptions import PREPROCESSING_KEYS, Assumptions
from declip_cli.interop.cached import find_cached
from declip_cli.interop.foreign import ForeignModel, changed_preprocessing
from declip_cli.interop.other_towers import OtherTowers
from declip_cli.interop.recognize import config_paths, read_foreign
from declip_cli.model.checkpoint import (
    PretrainedModel,
    describe_folder,
    find_folder,
    find_newest_run,
    fingerprint_of,
    read_model,
    runs_root,
)
from declip_cli.model.dims import Architecture
from declip_cli.model.preprocessing import Preprocessing

TAKEN = (
    "a run folder, a model folder, a checkpoint of OpenAI, OpenCLIP, Hugging Face, SLIP or the original DeCLIP, "
    "or a name of OpenCLIP's such as ViT-B-32/laion2b_s34b_b79k"
)
_OWN = "takes models whose towers are CLIP's own, such as ViT-B-32/laion2b_s34b_b79k"


def load_model(
    path: Path | None,
    *,
    device: str | torch.device = "cpu",
    option: str = "--model",
    given: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> PretrainedModel:
    """Open a run folder, a model folder or a checkpoint of another project.

    Args:
        path: where the model lies, or its name at OpenCLIP; None takes the newest run.
        device: where to put it.
        option: of the command line, with which the user named it; for messages.
        given: from `parse_assumptions`: what the user says of a checkpoint that does not say it.
        log: receives notes on what had to be assumed.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: nothing there, or it is incomplete, damaged, contradicts itself or does not fit.
    """
    path = find_newest_run(runs_root()) if path is None else path
    location = locate(path, option=option)
    if location.folder is not None:
        model = read_model(location.folder, name=str(path))
        model = _with_given(model, given or {}, option)
    else:
        foreign = open_foreign(location, given=given, option=option)
        _log_assumed(foreign, path, log)
        model = _finished(foreign, name=str(path))
    model.encoder.to(device)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a model lies."""

    path: Path
    """What the user named."""
    folder: Path | None = None
    """A model folder of ours; None for a model of another project."""
    weights: Path | None = None
    """Of another project: the file or folder to read."""
    config: Mapping[str, Any] | None = None
    """OpenCLIP's configuration of a cached model, which lies in its package."""


def locate(path: Path, *, option: str) -> Location:
    """Find out what the user named.

    Args:
        path: a path, or a name of OpenCLIP's.
        option: with which the user named it; for messages.

    Returns:
        Where it is.

    Raises:
        ModelError: there is nothing.
    """
    if os.path.exists(path):
        folder = find_folder(path)
        return Location(path=path, folder=folder, weights=path if folder is None else None)
    cached = find_cached(str(path))
    if cached is None:
        raise ModelError(f"no model at {path}", remedy=f"{option} takes {TAKEN}")
    weights, config = cached
    return Location(path=path, weights=weights, config=config)


def open_foreign(
    location: Location, *, given: Mapping[str, Any] | None, option: str, shapes_only: bool = False
) -> ForeignModel | OtherTowers:
    """Read a model of another project, whatever happens in doing so.

    Raises:
        ModelError: it cannot be read.
    """
    assert location.weights is not None
    try:
        assumptions = Assumptions(given=given or {})
        return read_foreign(location.weights, assumptions, config=location.config, shapes_only=shapes_only)
    except DeclipError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ModelError(
            f"{location.path} is not a model that declip can read: {' '.join(str(error).split()):.300}",
            remedy=f"{option} takes {TAKEN}",
        ) from error


def _log_assumed(foreign: ForeignModel | OtherTowers, path: Path, log: Callable[[str], None]) -> None:
    for line in foreign.assumed:
        log(f"note: {path}: {line}")


def _finished(foreign: ForeignModel | OtherTowers, *, name: str) -> PretrainedModel:
    encoder = foreign.build()
    weights = foreign.paths[0]
    files = fingerprint_of(*foreign.paths, *config_paths(weights).values())
    facts = [files, foreign.describe(), asdict(foreign.preprocessing)]
    return PretrainedModel(
        encoder=encoder,
        name=name,
        method=foreign.method,
        arch=foreign.project,
        token_wise=foreign.is_token_wise,
        preprocessing=foreign.preprocessing,
        context_length=foreign.context_length,
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        tokenizer=foreign.tokenizer(),
    )


def _with_given(model: PretrainedModel, given: Mapping[str, Any], option: str) -> PretrainedModel:
    """Prepare images for a model of ours in another way; its towers are known."""
    towers = [key for key in given if key not in PREPROCESSING_KEYS]
    if towers:
        raise ConfigError(
            f"--assume {towers[0]} says what {model.name} knows by itself", remedy=f"leave out --assume {towers[0]}"
        )
    if not given:
        return model
    preprocessing = changed_preprocessing(model.preprocessing, given)
    model.encoder.set_pixels(preprocessing.mean, preprocessing.std)
    facts = [model.fingerprint, asdict(preprocessing)]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return replace(model, preprocessing=preprocessing, fingerprint=fingerprint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a model is, without its numbers."""

    architecture: Architecture
    preprocessing: Preprocessing


def describe_model(
    path: Path, *, option: str, given: Mapping[str, Any] | None = None, log: Callable[[str], None] = lambda line: None
) -> Description:
    """Read what a model is off its configuration and the shapes of its parameters.

    Args:
        path: as in `load_model`.
        option: with which the user named it; for messages.
        given: as in `load_model`.
        log: receives notes on what had to be assumed.

    Returns:
        Its architecture and preprocessing.

    Raises:
        ModelError: there is none, it cannot be read, or its towers are not CLIP's own.
    """
    location = locate(path, option=option)
    if location.folder is None:
        foreign = open_foreign(location, given=given, option=option, shapes_only=True)
        _log_assumed(foreign, path, log)
        if isinstance(foreign, OtherTowers):
            raise ModelError(
                f"{path} can be evaluated, but no run can start from it: {foreign.reason}", remedy=f"{option} {_OWN}"
            )
        return Description(architecture=foreign.architecture, preprocessing=foreign.preprocessing)
    _, architecture, preprocessing = describe_folder(location.folder)
    return Description(architecture=architecture, preprocessing=changed_preprocessing(preprocessing, given or {}))
