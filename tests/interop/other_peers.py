"""Small models of OpenCLIP whose towers are not CLIP's own, as folders with their tokenizers."""

import open_clip
import timm
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

from tests.interop import peers

PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
WORDS = ["a", "red", "bus", "in", "the", "rain", "two", "dogs", "photo", "of", "cat", "dog", "blue", "green", "picture"]


def tiny_siglip_of_a_test(pretrained=False, **options):
    """Make timm's class of SigLIP's image towers: no class token, pooling by attention."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    head = {key: options[key] for key in ("num_classes", "global_pool")}
    return timm.models.VisionTransformer(**sizes, class_token=False, **head)


timm.models.register_model(tiny_siglip_of_a_test)


def siglip_config(**options):
    """Return a configuration as of OpenCLIP's ViT-B-16-SigLIP, but for its sizes."""
    vision = {"timm_model_name": "tiny_siglip_of_a_test", "timm_model_pretrained": False, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2, "no_causal_mask": True}
    text |= {"proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    text |= {"hf_tokenizer_name": "nobody/siglip", "tokenizer_kwargs": {"clean": "canonicalize"}}
    vision |= {"timm_pool": "map", "timm_proj": "none"}
    return {
        "embed_dim": 24,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": text,
    } | options


def eva_config():
    """Return towers of timm's and CLIP's text tower, as EVA's are; the head of timm's class projects."""
    vision = {"timm_model_name": "tiny_siglip_of_a_test", "timm_pool": "avg", "timm_proj": None, "image_size": 32}
    return peers.open_clip_config(custom_text=True) | {"vision_cfg": vision}


def clipa_config():
    """Return OpenCLIP's ViT without class token in its features and a text tower that looks both ways, as of CLIPA."""
    vision = {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}
    text = {"vocab_size": 64, "pool_type": "last", "no_causal_mask": True, "context_length": 12}
    text |= {"hf_tokenizer_name": "nobody/bert", "tokenizer_kwargs": {"strip_sep_token": True}}
    return peers.open_clip_config(vision=vision, text=text)


def coca_config():
    """Return a model with a decoder of captions."""
    vision = {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    text = {"embed_cls": True, "output_tokens": True, "context_length": 15}
    decoder = {"context_length": 15, "width": 24, "heads": 2, "layers": 1, "vocab_size": 49408}
    return peers.open_clip_config(vision=vision, text=text, custom_text=True, multimodal_cfg=decoder)


def write_tokenizer(folder):
    """Write a tokenizer of a few words, with T5's special tokens: each text ends with `</s>`, which also pads."""
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="</s>", eos_token="</s>", sep_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write_folder(folder, config, pixels=None, seed=0):
    """Write a model with random weights as OpenCLIP's folders are, and return OpenCLIP's module."""
    torch.manual_seed(seed)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    kind = kind if config.get("custom_text") else open_clip.CLIP
    peer = peers.shake(kind(**{key: value for key, value in config.items() if key != "custom_text"}), seed)
    folder.mkdir(exist_ok=True)
    peers.write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": pixels or PIXELS})
    save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, folder / "open_clip_model.safetensors")
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(folder)
    return peer


def write_siglip(folder, seed=0):
    """Write a `SiglipModel` with random weights as transformers does, and return it."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.SiglipConfig(
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        text_config=tower | {"vocab_size": 64, "max_position_embeddings": 16, "projection_size": 24},
    )
    peer = peers.shake(transformers.SiglipModel(config), seed)
    peer.save_pretrained(folder)
    processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    write_tokenizer(folder)
    return peer, processor
