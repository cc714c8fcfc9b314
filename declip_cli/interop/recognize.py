"""Tell by its content which project a checkpoint is of, and translate it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from declip_cli.errors import ModelError
from declip_cli.files import read_json
from declip_cli.interop.assumptions import Assumptions
from declip_cli.interop.foreign import ForeignModel
from declip_cli.interop.hugging_face import read_hugging_face
from declip_cli.interop.open_clip import read_open_clip, read_openai
from declip_cli.interop.original import read_original
from declip_cli.interop.other_towers import OtherTowers
from declip_cli.interop.siglip import read_siglip
from declip_cli.interop.slip import read_slip
from declip_cli.interop.weights import Checkpoint, read_checkpoint

OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HUGGING_FACE_CONFIG = "config.json"
_HUGGING_FACE_WEIGHTS: tuple[str, ...] = ("model.safetensors", "model.safetensors.index.json")
_HUGGING_FACE_WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUGGING_FACE_PROCESSORS = {"processor": "preprocessor_config.json", "whole": "processor_config.json"}
_READ = "declip reads CLIP models of OpenAI, OpenCLIP, Hugging Face (CLIPModel), DeCLIP's original code and SLIP"


def read_foreign(
    path: Path, assumptions: Assumptions, *, config: Mapping[str, Any] | None = None, shapes_only: bool = False
) -> ForeignModel | OtherTowers:
    """Read a model of another project; nothing in it is executed.

    Args:
        path: a checkpoint file, or a folder of OpenCLIP's or Hugging Face's.
        assumptions: decide what it does not say.
        config: OpenCLIP's configuration, in place of a file beside the weights.
        shapes_only: leave the numbers out.

    Returns:
        The model, translated.

    Raises:
        ModelError: it cannot be read safely, is damaged, or is another kind of model.
    """
    if path.is_dir():
        weights, configs = _find_in_folder(path)
    else:
        weights, configs = path, _configs_beside(path) if config is None else {}
    if config is not None:
        configs = {"open_clip": config}
    checkpoint = read_checkpoint(weights, shapes_only=shapes_only)
    try:
        return _translate(checkpoint, configs, assumptions)
    except ModelError as error:
        message = error.message if str(weights) in error.message else f"{path} is not read: {error.message}"
        raise ModelError(message, remedy=error.remedy) from error


def _find_in_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    for config, names in ((OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS), (_HUGGING_FACE_CONFIG, _HUGGING_FACE_WEIGHTS)):
        if (folder / config).is_file():
            weights = next((folder / name for name in names if (folder / name).is_file()), None)
            if weights is None:
                raise ModelError(f"{folder} holds {config}, but none of {', '.join(names)}", remedy="copy it again")
            return weights, _configs_beside(weights)
    raise ModelError(
        f"{folder} holds no model: neither {OPEN_CLIP_CONFIG} nor {_HUGGING_FACE_CONFIG}",
        remedy="name a run folder, a model folder or a checkpoint file",
    )


def _configs_beside(weights: Path) -> dict[str, Any]:
    configs = {key: _read_json(path) for key, path in config_paths(weights).items()}
    whole = configs.pop("whole", {}).get("image_processor")
    if whole is not None and "processor" not in configs:
        configs["processor"] = whole
    return configs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        if path.name == OPEN_CLIP_CONFIG:
            parts = config["model_cfg"], config.get("preprocess_cfg", {})
            if not all(isinstance(part, dict) for part in parts):
                raise ValueError("model_cfg and preprocess_cfg are objects")
    except (OSError, ValueError, KeyError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ModelError(f"{path} is damaged: {what}", remedy="copy the folder again") from error
    return config


def config_paths(weights: Path) -> dict[str, Path]:
    """Name the configurations that lie beside a file of weights with the name that its project gives it."""
    names: dict[str, str] = {}
    if weights.name in _OPEN_CLIP_WEIGHTS:
        names = {"open_clip": OPEN_CLIP_CONFIG}
    elif weights.name in _HUGGING_FACE_WEIGHTS:
        names = {"config": _HUGGING_FACE_CONFIG} | _HUGGING_FACE_PROCESSORS
    paths = {key: weights.parent / name for key, name in names.items()}
    return {key: path for key, path in paths.items() if path.is_file()}


def _translate(
    checkpoint: Checkpoint, configs: Mapping[str, Any], assumptions: Assumptions
) -> ForeignModel | OtherTowers:
    state = checkpoint.state

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in state)

    is_openai = checkpoint.container == "torchscript" or "input_resolution" in state
    if "open_clip" in configs and not is_openai:  # whose towers may have any names
        return read_open_clip(checkpoint, configs["open_clip"], assumptions)
    if has("encode_text.", "text_encoder."):
        return read_original(checkpoint, assumptions)
    if has("visual.blocks.", "visual.patch_embed."):
        return read_slip(checkpoint, assumptions)
    if has("vision_model.", "text_model.") and (configs.get("config") or {}).get("model_type") == "siglip":
        return read_siglip(checkpoint, configs["config"], configs.get("processor"), assumptions)
    if has("vision_model.", "text_model."):
        return read_hugging_face(checkpoint, configs.get("config"), configs.get("processor"), assumptions)
    if has("token_embedding.weight", "text.token_embedding.weight", "text.transformer."):
        return read_openai(checkpoint, assumptions) if is_openai else read_open_clip(checkpoint, None, assumptions)
    if has("visual.", "module.visual."):
        raise ModelError("it holds an image tower without a text tower", remedy=f"{_READ}, with both towers")
    names = ", ".join(list(state)[:3])
    raise ModelError(f"it holds no CLIP text tower (parameters such as {names})", remedy=_READ)
