"""A model as Hugging Face's `CLIPModel`, with its processor; written without transformers, for versions 4 and 5."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from declip_cli.data.tokenizer import END, START, Tokenizer, vocabulary_files
from declip_cli.errors import ModelError
from declip_cli.files import write_json
from declip_cli.interop.sample import Embedded, Sample, views_of
from declip_cli.model.checkpoint import PretrainedModel
from declip_cli.model.clip import DualEncoder
from declip_cli.model.dims import Architecture, TextDims, VitDims
from declip_cli.model.open_clip_layout import VOCABULARY_SIZE
from declip_cli.model.preprocessing import Preprocessing

_TOWERS = {"visual.transformer.resblocks.": "vision_model", "text.transformer.resblocks.": "text_model"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_RENAMED = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so it is spelt there
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "logit_scale": "logit_scale",
}
_LEAST_SCALE = 1e-3
"""Of a layer norm's weights, the smallest against the largest, with which a bias is moved before a projection."""
_LEVEL = 1 / 255
"""Of a pixel; transformers' default processor resizes by torchvision, which rounds some pixels to the next level."""


def why_not(model: PretrainedModel) -> str:
    """Say what of a model `CLIPModel` cannot express; empty where it can express all."""
    vision = model.towers.architecture.vision
    if model.token_wise:
        return "it compares token by token, and its whole images and texts were not trained"
    if not isinstance(vision, VitDims):
        return "no class of transformers has CLIP's modified ResNet"
    if not vision.has_pre_norm:
        return "CLIPModel always has a layer norm before the first block of the image tower, this model has none"
    if folded_bias(model.towers) is None:
        return "CLIPModel's text projection has no bias, and the last layer norm has a weight of 0, so this one's stays"
    return ""


def folded_bias(encoder: DualEncoder) -> tuple[Tensor, Tensor] | None:
    """Give text projection and last layer norm other numbers, with which the same comes out without the bias.

    The layer norm z ↦ g∘z + a, E numbers whose z sum to 0, is followed by W (D, E) and the bias b (D,). With u = 1/g,
    u·(g∘z) = 0 for every z, so any c uᵀ may be added to W. It is chosen such that (W + c uᵀ)(a + d) = W a + b.

    Args:
        encoder: with W, b, g and a.

    Returns:
        W + c uᵀ (D, E) and a + d (E,), float64; None where a number of g is 0 or nearly so.
    """
    projection, norm = encoder.text.text_projection, encoder.text.ln_final
    weight, bias = projection.weight.detach().double().cpu(), projection.bias.detach().double().cpu()
    scale, start = norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()
    if not bias.any():
        return weight, start
    if scale.abs().min() < _LEAST_SCALE * scale.abs().max():
        return None
    across = 1 / scale
    wanted = len(scale) ** 0.5  # of u·(a + d); between a large c and a large d
    moved = across * (wanted - across @ start) / (across @ across)
    added = (bias - weight @ moved) / wanted
    return weight + added.outer(across), start + moved


def hugging_face_state(encoder: DualEncoder) -> dict[str, Tensor]:
    """Give parameters the names and shapes of `CLIPModel`.

    Args:
        encoder: with a vision transformer.

    Returns:
        Its weights, the text projection's bias folded, without the mask token and token-wise heads.

    Raises:
        ModelError: the bias cannot be folded.
    """
    theirs: dict[str, Tensor] = {}
    for name, value in encoder.state_dict().items():
        prefix = next((prefix for prefix in _TOWERS if name.startswith(prefix)), "")
        if prefix:
            number, _, inner = name.removeprefix(prefix).partition(".")
            theirs |= _block(f"{_TOWERS[prefix]}.encoder.layers.{number}", inner, value)
        elif name in _RENAMED:
            theirs[_RENAMED[name]] = value
    folded = folded_bias(encoder)
    if folded is None:
        raise ModelError("the bias of the text projection cannot be folded", remedy="--to onnx")
    theirs["text_projection.weight"], theirs["text_model.final_layer_norm.bias"] = folded
    rows = "text_model.embeddings.token_embedding.weight"
    theirs[rows] = theirs[rows][:VOCABULARY_SIZE]
    assert isinstance(encoder.visual.proj, Tensor)
    theirs["visual_projection.weight"] = encoder.visual.proj.detach().T
    return {name: value.detach().float().cpu().contiguous() for name, value in theirs.items()}


def _block(prefix: str, inner: str, value: Tensor) -> dict[str, Tensor]:
    module, _, kind = inner.rpartition(".")
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    return {f"{prefix}.{_IN_BLOCK[module]}.{kind}": value}


def hugging_face_config(architecture: Architecture) -> dict[str, Any]:
    """Describe an architecture as transformers' `CLIPConfig`, the content of `config.json`."""
    vision, text = architecture.vision, architecture.text
    assert isinstance(vision, VitDims)
    end_ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 1}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": architecture.embed_dim,
        "logit_scale_init_value": round(math.log(1 / 0.07), 4),
        "initializer_factor": 1.0,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": VOCABULARY_SIZE,
            "max_position_embeddings": text.context_length,
            "projection_dim": architecture.embed_dim,
            **_tower_config(text),
            **end_ids,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": architecture.image_side_px,
            "patch_size": vision.patch_side_px,
            "num_channels": 3,
            "projection_dim": architecture.embed_dim,
            **_tower_config(vision),
        },
    }


def _tower_config(dims: VitDims | TextDims) -> dict[str, Any]:
    return {
        "hidden_size": dims.width,
        "intermediate_size": dims.mlp_width,
        "num_hidden_layers": dims.num_layers,
        "num_attention_heads": dims.num_heads,
        "hidden_act": "quick_gelu" if dims.quick_gelu else "gelu",
        "layer_norm_eps": dims.norm_eps,
        "attention_dropout": 0.0,
    }


def processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Describe preprocessing as transformers' `CLIPImageProcessor`, the content of `preprocessor_config.json`."""
    side, is_squashed = preprocessing.image_side_px, preprocessing.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if is_squashed else {"shortest_edge": preprocessing.resize_px},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessing.interpolation],  # Pillow's numbers
        "do_center_crop": not is_squashed,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": _LEVEL,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def is_cut_alike(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Return whether transformers cuts the same square out of an image of a width and height.

    It rounds half of an odd margin down; our own models and OpenCLIP round it to the next even number, as torchvision
    does, so that every second time its square lies one pixel further to the left, or higher.
    """
    if preprocessing.resize_mode == "squash" or preprocessing.crop_at == "floor":
        return True
    margins = [int(preprocessing.resize_px * side / min(size)) - preprocessing.image_side_px for side in size]
    return all(round(margin / 2) == margin // 2 for margin in margins)


def write_tokenizer(folder: Path, context_length: int) -> None:
    """Write OpenAI's vocabulary as transformers' `CLIPTokenizer`, which does not repair broken text as ours does."""
    ids, merges = vocabulary_files()
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / "vocab.json", ids)
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings | {"errors": "replace"} | special)
    write_json(folder / "special_tokens_map.json", special)


def write(model: PretrainedModel, folder: Path) -> None:
    """Write model, tokenizer and processor."""
    write_json(folder / "config.json", hugging_face_config(model.towers.architecture))
    write_json(folder / "preprocessor_config.json", processor_config(model.preprocessing))
    write_tokenizer(folder, model.context_length)
    save_file(hugging_face_state(model.towers), folder / "model.safetensors", metadata={"format": "pt"})


def embed(folder: Path, sample: Sample, preprocessing: Preprocessing) -> tuple[Embedded, Embedded, float]:
    """Let transformers encode a sample with what it reads from a folder.

    Args:
        folder: as `write` made it.
        sample: N images, M texts.
        preprocessing: what the processor should do with images.

    Returns:
        What it makes of the pixels that `preprocessing` gives; what it makes of the images by itself; and the largest
        difference of the two kinds of pixels, in levels of 1/255, where both cut out the same square.
    """
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    tidy = Tokenizer().tidy  # which transformers' tokenizer leaves to others
    texts = [tidy(text) for text in sample.texts]
    inputs = processor(text=texts, images=list(sample.images), return_tensors="pt", padding=True, truncation=True)
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    pixels = (views_of(sample.images, preprocessing).float() / 255 - mean) / std  # (N, S, S, 3)
    apart = (pixels.permute(0, 3, 1, 2) - inputs["pixel_values"]).abs() * std[:, None, None] / _LEVEL  # (N, 3, S, S)
    levels = apart[[is_cut_alike(image.size, preprocessing) for image in sample.images]].max()
    with torch.inference_mode():
        found = model(**inputs)
        by_itself = Embedded(images=found.image_embeds, texts=found.text_embeds)
        inputs["pixel_values"] = pixels.permute(0, 3, 1, 2)
        found = model(**inputs)
    return Embedded(images=found.image_embeds, texts=found.text_embeds), by_itself, float(levels)
