"""What is exported computes the same in the other project, from the same files; what cannot is refused."""

import dataclasses
import io

import open_clip
import pytest
import torch
from PIL import Image

from declip_cli.data.tokenizer import Tokenizer
from declip_cli.errors import ModelError
from declip_cli.interop import export as export_module
from declip_cli.interop import export_hugging_face, export_open_clip
from declip_cli.interop.export import export
from declip_cli.interop.export_hugging_face import is_cut_alike
from declip_cli.interop.model_card import Card
from declip_cli.interop.read import load_model
from declip_cli.interop.sample import demo_sample, embed, view_of
from declip_cli.model.clip import normalize
from tests.interop.small_models import RESNET, SHAPES, TEXT, VIT, image_file, model_of

CARD = Card(name="test")
FILES = [image_file(number, width=width, height=height) for number, (width, height) in enumerate(SHAPES)]
CAPTIONS = ["a red bus", "two dogs — on a beach", "naïve café", "word " * 40]


def features_of(model, texts):
    """Compute our unit features of the files, and of texts."""
    views = torch.stack([torch.from_numpy(view_of(file, model.preprocessing)) for file in FILES])
    tokens = Tokenizer(model.context_length).encode(texts)
    with torch.no_grad():
        return normalize(model.encoder.encode_image(views)), normalize(model.encoder.encode_text(tokens))


def largest(one, another):
    return max(float((a - b).abs().max()) for a, b in zip(one, another, strict=True))


def opened():
    return [Image.open(io.BytesIO(file)) for file in FILES]


PREPARED = [
    {"interpolation": "bilinear"},
    {"interpolation": "bicubic", "std": (0.2, 0.3, 0.4)},
    {"interpolation": "bicubic", "resize_mode": "squash"},
]


@pytest.mark.parametrize("preprocessing", PREPARED, ids=["bilinear", "bicubic", "squash"])
@pytest.mark.parametrize("side", [32, 224])
def test_openclips_own_transform_gives_the_pixels_that_ours_gives(tmp_path, side, preprocessing):
    model = model_of(dataclasses.replace(VIT, patch_side_px=side // 4), side=side, **preprocessing)
    export_open_clip.write(model, tmp_path)
    peer, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    for file, image in zip(FILES, opened(), strict=True):
        ours = model.encoder.normalize_images(torch.from_numpy(view_of(file, model.preprocessing))[None])[0]
        torch.testing.assert_close(transform(image), ours, rtol=0, atol=1e-6)
    with torch.no_grad():
        theirs = peer.eval().encode_image(torch.stack([transform(image) for image in opened()]), normalize=True)
        texts = peer.encode_text(tokenizer(CAPTIONS), normalize=True)
    assert largest(features_of(model, CAPTIONS), (theirs, texts)) <= 1e-5


TOWERS = {
    "QuickGELU": (VIT, TEXT),
    "GELU": (dataclasses.replace(VIT, quick_gelu=False), dataclasses.replace(TEXT, quick_gelu=False)),
    "GELU and QuickGELU": (dataclasses.replace(VIT, quick_gelu=False, norm_eps=1e-6), TEXT),
    "wider MLPs": (dataclasses.replace(VIT, mlp_ratio=3.0), dataclasses.replace(TEXT, mlp_ratio=2.0)),
}


@pytest.mark.parametrize("towers", TOWERS)
def test_transformers_computes_the_same_from_the_same_files(tmp_path, towers):
    from transformers import AutoModel, AutoProcessor, CLIPImageProcessorPil

    vision, text = TOWERS[towers]
    embed_dim = 20 if towers == "GELU" else 12  # more than the 16 of the text tower, or fewer
    model = model_of(vision, text, side=64, embed_dim=embed_dim, interpolation="bicubic", resize_px=73)
    assert model.encoder.text.text_projection.bias.abs().min() > 0  # CLIPModel has none: it is folded
    export_hugging_face.write(model, tmp_path)
    peer, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=CAPTIONS, images=opened(), return_tensors="pt", padding=True, truncation=True)
    by_pillow = CLIPImageProcessorPil.from_pretrained(tmp_path)(opened(), return_tensors="pt").pixel_values
    with torch.no_grad():
        default = peer(**inputs)
        exact = peer(**{**inputs, "pixel_values": by_pillow})
    images, texts = features_of(model, CAPTIONS)
    assert largest([texts], [exact.text_embeds]) <= 1e-5
    alike = [is_cut_alike(image.size, model.preprocessing) for image in opened()]
    assert sorted(alike) == [False, False, True, True, True]
    assert largest([images[alike]], [exact.image_embeds[alike]]) <= 1e-5
    for image, file, pixels, is_alike in zip(opened(), FILES, by_pillow, alike, strict=True):
        if not is_alike:  # transformers has cut one pixel further to the left, or higher
            view = torch.from_numpy(view_of(file, model.preprocessing))[None]
            axis = 2 if image.width > image.height else 1
            ours = model.encoder.normalize_images(view)[0].narrow(axis, 0, 63)
            torch.testing.assert_close(pixels.narrow(axis, 1, 63), ours, rtol=0, atol=1e-6)
    # The default processor resizes by torchvision, whose rounding differs: at most one level of 255.
    levels = (inputs.pixel_values - by_pillow).abs() * torch.tensor(model.preprocessing.std)[:, None, None] * 255
    assert levels.max() <= 1.01
    assert largest([images[alike]], [default.image_embeds[alike]]) <= 1e-3
    assert peer.logit_scale.item() == model.encoder.logit_scale.item()


def with_a_zero_in_the_last_norm():
    model = model_of()
    with torch.no_grad():
        model.encoder.text.ln_final.weight[3] = 0
    return model


@pytest.mark.parametrize("embed_dim", [12, 20])  # of 16
def test_a_bias_is_folded_exactly_into_projection_and_layer_norm(embed_dim):
    encoder = model_of(embed_dim=embed_dim).encoder.double()
    states = torch.randn(100, 16, dtype=torch.float64)
    norm, projection = encoder.text.ln_final, encoder.text.text_projection
    expected = projection(norm(states))
    weight, start = export_hugging_face.folded_bias(encoder)
    found = torch.nn.functional.layer_norm(states, (16,), norm.weight, start) @ weight.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    torch.nn.init.zeros_(projection.bias)
    assert torch.equal(export_hugging_face.folded_bias(encoder)[0], projection.weight)


REFUSED = [
    (model_of(RESNET), "huggingface", "no class of transformers has CLIP's modified ResNet", "openclip onnx"),
    (model_of(method="filip"), "huggingface", "it compares token by token", "onnx"),
    (model_of(method="filip"), "openclip", "it compares token by token", "onnx"),
    (
        model_of(dataclasses.replace(VIT, has_pre_norm=False)),
        "huggingface",
        "always has a layer norm before the first block",
        "openclip onnx",
    ),
    (with_a_zero_in_the_last_norm(), "huggingface", "text projection has no bias", "openclip onnx"),
    (
        model_of(dataclasses.replace(VIT, quick_gelu=False)),
        "openclip",
        "its towers have different activations",
        "huggingface onnx",
    ),
    (model_of(resize_px=37), "openclip", "resized to 37 px before the 32 px", "huggingface onnx"),
]


@pytest.mark.parametrize(("model", "to", "reason", "able"), REFUSED, ids=[f"{r[1]}: {r[2]}" for r in REFUSED])
def test_what_a_format_cannot_express_is_refused_with_those_that_can(tmp_path, model, to, reason, able):
    with pytest.raises(ModelError, match=f"{to} cannot express this model: .*{reason}") as caught:
        export(model, to, tmp_path / "out", card=CARD)
    assert caught.value.remedy.startswith(" or ".join(f"--to {name}" for name in able.split()))
    assert ("--assume resize=32" in caught.value.remedy) == (model.preprocessing.resize_px == 37)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["openclip", "huggingface"])
def test_an_export_is_compared_before_it_is_reported(tmp_path, to):
    model = model_of(method="defilip")  # its token-wise heads are for training only
    report = export(model, to, tmp_path / "out", card=CARD)
    assert 0 < report.differences["max_abs_difference"] <= 1e-5
    assert report.num_compared == len(demo_sample()) >= 48
    assert set(report.to_json()) >= {"out", "to", "max_abs_difference", "num_compared", "seconds"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to", ["openclip", "huggingface"])
def test_an_export_that_differs_is_an_error_and_leaves_nothing(tmp_path, to, monkeypatch):
    def embed_another(model, sample):
        return embed(model_of(seed=1), sample)

    monkeypatch.setattr(export_module, "embed", embed_another)
    with pytest.raises(ModelError, match="the exported model differs by up to .*, more than 1e-05; nothing was"):
        export(model_of(), to, tmp_path / "out", card=CARD)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ModelError, match="read back with open_clip, which is not installed") as caught:
        export(model_of(), "openclip", tmp_path / "out", card=CARD)
    assert caught.value.remedy == "pip install 'declip[openclip]'"


def test_only_an_earlier_export_is_replaced_and_only_when_asked(tmp_path):
    out = tmp_path / "out"
    export(model_of(), "openclip", out, card=CARD)
    before = (out / "open_clip_model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="already exists") as caught:
        export(model_of(seed=1), "openclip", out, card=CARD)
    assert "--force" in caught.value.remedy
    export(model_of(seed=1), "openclip", out, card=CARD, force=True)
    assert (out / "open_clip_model.safetensors").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ModelError, match="already exists") as caught:
        export(model_of(), "openclip", tmp_path / "mine", card=CARD, force=True)
    assert "--force" not in caught.value.remedy


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_what_openclip_was_given_is_read_here_again_bit_by_bit(tmp_path, vision):
    model = model_of(vision)
    export(model, "openclip", tmp_path / "out", card=CARD)
    again = load_model(tmp_path / "out")
    assert again.preprocessing == model.preprocessing
    assert again.encoder.architecture == model.encoder.architecture
    ours, theirs = model.encoder.state_dict(), again.encoder.state_dict()
    for name, value in ours.items():
        same = value[:-1] if name == "text.token_embedding.weight" else value  # the mask token stays behind
        assert torch.equal(theirs[name][: len(same)] if same.ndim else theirs[name], same), name
