"""Python that uses an exported model, for its card; tests run it."""

import textwrap
from string import Template

from declip_cli.model.checkpoint import PretrainedModel

_OPEN_CLIP = """
import open_clip
import torch
from PIL import Image

folder = "."  # where this file lies
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()

image = preprocess(Image.open("picture.jpg")).unsqueeze(0)
with torch.no_grad():
    image_features = model.encode_image(image, normalize=True)
    text_features = model.encode_text(tokenizer(["a photo of a cat", "a photo of a dog"]), normalize=True)
print((model.logit_scale.exp() * image_features @ text_features.T).softmax(-1))
"""
_HUGGING_FACE = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder = "."  # where this file lies
model = AutoModel.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)

texts = ["a photo of a cat", "a photo of a dog"]
image = Image.open("picture.jpg")
inputs = processor(text=texts, images=image, return_tensors="pt", padding=True, truncation=True)
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(-1))
"""
_ONNX = """
import numpy as np
import onnxruntime
from PIL import Image
from transformers import CLIPTokenizer

folder = "."  # where this file lies
image_encoder = onnxruntime.InferenceSession(f"{folder}/image_encoder.onnx")
text_encoder = onnxruntime.InferenceSession(f"{folder}/text_encoder.onnx")
tokenizer = CLIPTokenizer.from_pretrained(folder)


def view(path):
    image = Image.open(path).convert("RGB")
$view


pixels = np.stack([view(path) for path in ["picture.jpg"]])  # uint8, (images, $side, $side, 3)
texts = ["a photo of a cat", "a photo of a dog"]
ids = tokenizer(texts, padding=True, truncation=True, return_tensors="np").input_ids.astype(np.int64)
$scores
print(scores)  # the images of the highest scores are the hits of a search
"""
_CUT = """
width, height = (int($resize * side / min(image.size)) for side in image.size)
image = image.resize((width, height), Image.Resampling.$filter)
left, top = $start
return np.asarray(image.crop((left, top, left + $side, top + $side)))
"""
_SQUASH = """
return np.asarray(image.resize(($side, $side), Image.Resampling.$filter))
"""
_WHOLE = """
image_embeds = image_encoder.run(None, {"pixels": pixels})[0]  # unit length
text_embeds = text_encoder.run(None, {"input_ids": ids})[0]
scores = image_embeds @ text_embeds.T
"""
_TOKEN_WISE = """
patches = image_encoder.run(None, {"pixels": pixels})[0]  # (images, patches, width), unit length
tokens, mask = text_encoder.run(None, {"input_ids": ids})
similar = np.einsum("npq,mlq->nmpl", patches, tokens)
scores = np.where(mask[:, None], similar, -np.inf).max(3).mean(2)  # the best token of each patch
"""


def snippet(to: str, model: PretrainedModel) -> str:
    """Return code that scores an image against two texts.

    Args:
        to: `openclip`, `huggingface` or `onnx`.
        model: what was exported.
    """
    if to != "onnx":
        return {"openclip": _OPEN_CLIP, "huggingface": _HUGGING_FACE}[to].lstrip()
    how = model.preprocessing
    sizes = {"side": how.image_side_px, "resize": how.resize_px, "filter": how.interpolation.upper()}
    half = "(width - $side) // 2, (height - $side) // 2"
    if how.crop_at == "round":
        half = "round((width - $side) / 2), round((height - $side) / 2)"
    view = (_SQUASH if how.resize_mode == "squash" else _CUT).strip()
    scores = _TOKEN_WISE if model.token_wise else _WHOLE
    view = textwrap.indent(view.replace("$start", half), "    ")
    code = _ONNX.lstrip().replace("$view", view).replace("$scores", scores.strip())
    return Template(code).substitute(sizes)
