"""Small models of other projects with random weights, made by their own packages, and images for both sides."""

import io
import json

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

from declip_cli.data.image_views import eval_transform
from declip_cli.data.tokenizer import Tokenizer

TEXTS = ["a red bus in the rain", "Two dogs.", "a"]


def shake(module, seed=0):
    """Give every parameter and running statistic a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not name.endswith("attn_mask"):
                noise = torch.randn(value.shape, generator=generator)
                value.add_(0.05 * (noise.abs() if name.endswith("running_var") else noise))
    return module.eval()


def open_clip_config(kind="vit", **options):
    vision = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
    if kind == "resnet":
        vision = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 64}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision |= options.pop("vision", {})
    text |= options.pop("text", {})
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text} | options


def open_clip_model(config, seed=0):
    torch.manual_seed(seed)
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    return shake(kind(**{k: v for k, v in config.items() if k != "custom_text"}), seed)


def open_clip_pixels(config, *, size, **fields):
    """Return OpenCLIP's transform for evaluation."""
    cfg = open_clip.transform.PreprocessCfg(size=size, **fields)
    return open_clip.transform.image_transform_v2(cfg, is_train=False)


def image_file(seed=0, *, size=(57, 40)):
    """Return an image file that is not square, losslessly compressed."""
    few = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(few.numpy()).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def pillow(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def write_json(path, content):
    path.write_text(json.dumps(content))


def ids(length):
    """Return the tokens of `TEXTS`, made by OpenCLIP's tokenizer."""
    return open_clip.SimpleTokenizer(context_length=length)(TEXTS)


def ours(model):
    """Return the unit features of the image and the texts, each prepared here from the file or the words."""
    how = model.preprocessing
    view = eval_transform(
        image_file(),
        side_px=how.image_side_px,
        resize_px=how.resize_px,
        interpolation=how.interpolation,
        is_squashed=how.resize_mode == "squash",
        is_floored=how.crop_at == "floor",
    )
    tokens = Tokenizer(context_length=model.context_length).encode(TEXTS)
    with torch.no_grad():
        image = model.encoder.encode_image(torch.from_numpy(view)[None])
        return F.normalize(image, dim=-1), F.normalize(model.encoder.encode_text(tokens), dim=-1)


def largest_difference(model, image, text):
    """Compare a model read here with the peer's features."""
    found = ours(model)
    expected = (F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1))
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
