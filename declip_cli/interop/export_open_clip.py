"""A model as OpenCLIP's folder: two files, opened there as `local-dir:` or from the Hub."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from declip_cli.files import write_json
from declip_cli.interop.sample import Embedded, Sample
from declip_cli.model.checkpoint import OPEN_CLIP_CONFIG_FILE, WEIGHTS_FILE, PretrainedModel
from declip_cli.model.clip import normalize
from declip_cli.model.open_clip_layout import open_clip_config, open_clip_state, why_not_open_clip


def why_not(model: PretrainedModel) -> str:
    """Say what of a model OpenCLIP cannot express; empty where it can express all."""
    if model.token_wise:
        return "it compares token by token, and its whole images and texts were not trained"
    return why_not_open_clip(model.towers.architecture, model.preprocessing)


def write(model: PretrainedModel, folder: Path) -> None:
    """Write the configuration and the weights; those that only training uses are omitted."""
    state = {name: value.contiguous() for name, value in model.towers.state_dict().items()}
    weights, _ = open_clip_state(state)
    has_bias = model.towers.logit_bias is not None
    config = open_clip_config(model.towers.architecture, model.preprocessing, has_logit_bias=has_bias)
    write_json(folder / OPEN_CLIP_CONFIG_FILE, config)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def embed(folder: Path, sample: Sample) -> Embedded:
    """Let OpenCLIP encode a sample with what it reads from a folder: model, transform and tokenizer."""
    import open_clip

    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    with torch.inference_mode():
        images = model.encode_image(torch.stack([transform(image) for image in sample.images]))
        return Embedded(images=normalize(images), texts=normalize(model.encode_text(tokenizer(list(sample.texts)))))
