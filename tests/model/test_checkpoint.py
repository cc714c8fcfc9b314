import contextlib
import dataclasses
import json
import os
import pickle
import random
import re

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from declip_cli.config import ModelConfig
from declip_cli.errors import ModelError
from declip_cli.files import digest_of
from declip_cli.interop.read import load_model
from declip_cli.model.architectures import find_architecture
from declip_cli.model.checkpoint import find_newest_run, save_model
from declip_cli.model.clip import IMAGE_MEAN, DualEncoder, normalize
from tests.damage import damaged
from tests.golden_files import golden_batch, golden_cases, golden_state, load_golden

VIT = ModelConfig(arch="vit-tiny32", embed_dim=10, context_length=9)
RESNET = ModelConfig(arch="rn-tiny64", embed_dim=10, context_length=9)


def new_encoder(config, *, token_wise_dim=0, seed=0):
    torch.manual_seed(seed)
    encoder = DualEncoder(find_architecture(config), token_wise_dim=token_wise_dim).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def random_images(side):
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


TOKENS = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407, 0, 0], [49406, 2, 49407, 0, 0, 0, 0, 0, 0]])


FILES = ["open_clip_model.safetensors", "declip_extra.safetensors", "declip.json", "open_clip_config.json"]


def seal(folder):
    """Write the digests of a folder's files anew, so that a change reaches the parsers."""
    (folder / "SHA256SUMS").write_text(
        "".join(f"{digest_of(folder / name)}  {name}\n" for name in FILES if (folder / name).exists())
    )


def edit(path, field, value):
    """Set one field of a JSON file, named with dots; no value deletes it."""
    content = json.loads(path.read_text())
    *above, last = field.split(".")
    inner = content
    for name in above:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(content))


def assert_same_weights(encoder, other):
    state, others = encoder.state_dict(), other.state_dict()
    assert list(state) == list(others)
    for name, value in state.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_saved_model_is_read_back_bit_by_bit(tmp_path, config):
    encoder = new_encoder(config)
    save_model(encoder, tmp_path / "model", config=config, method="declip")
    model = load_model(tmp_path)  # the run folder; the model folder itself works too
    assert_same_weights(encoder, model.encoder)
    assert_same_weights(encoder, load_model(tmp_path / "model").encoder)
    assert not model.encoder.training
    assert (model.method, model.arch, model.token_wise) == ("declip", config.arch, False)
    side = encoder.architecture.image_side_px
    assert (model.image_side_px, model.preprocessing.resize_px, model.context_length) == (side, side, 9)
    assert not list(tmp_path.rglob("*.tmp"))


def test_token_wise_heads_are_saved_and_a_filip_model_is_compared_token_by_token(tmp_path):
    encoder = new_encoder(VIT, token_wise_dim=256)
    for method in ("filip", "defilip"):
        save_model(encoder, tmp_path / method, config=VIT, method=method)
        model = load_model(tmp_path / method)
        assert_same_weights(encoder, model.encoder)
        assert model.token_wise == (method == "filip")


def test_images_are_resized_to_the_side_of_the_image_unless_the_configuration_says_otherwise(tmp_path):
    for resize_px, expected in ((None, 224), (256, 256)):
        config = ModelConfig(arch="vit-tiny32", image_side_px=224, resize_px=resize_px)
        save_model(new_encoder(config), tmp_path, config=config, method="clip")
        found = load_model(tmp_path).preprocessing
        assert (found.image_side_px, found.resize_px) == (224, expected)
        # OpenCLIP's configuration cannot express a crop after the resize, so it says nothing rather than that.
        assert (tmp_path / "open_clip_config.json").exists() == (resize_px is None)


def test_the_fingerprint_follows_the_weights_and_nothing_else(tmp_path):
    encoder = new_encoder(VIT)
    for name in ("a", "b"):
        save_model(encoder, tmp_path / name, config=VIT, method="clip")
    with torch.no_grad():
        encoder.visual.proj[0, 0] += 1e-3
    save_model(encoder, tmp_path / "c", config=VIT, method="clip")
    a, b, c = (load_model(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c
    assert len(a) == 64


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("base", [VIT, RESNET], ids=["vit", "resnet"])
def test_open_clip_reads_the_folder_and_computes_the_same(tmp_path, base, quick_gelu):
    config = dataclasses.replace(base, quick_gelu=quick_gelu)
    encoder = new_encoder(config, token_wise_dim=256)
    save_model(encoder, tmp_path / "model", config=config, method="defilip")
    peer, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    peer.eval()
    images = random_images(encoder.architecture.image_side_px)
    with torch.no_grad():
        expected = peer.encode_image(encoder.normalize_images(images))
        torch.testing.assert_close(encoder.encode_image(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder.encode_text(TOKENS), peer.encode_text(TOKENS), rtol=1e-4, atol=1e-4)
    assert peer.logit_scale.item() == encoder.logit_scale.item()
    assert preprocess.transforms[-1].mean == pytest.approx(IMAGE_MEAN)


def test_open_clip_reads_the_bias_of_the_sigmoid_loss(tmp_path):
    encoder = new_encoder(VIT)
    encoder.add_logit_bias()
    with torch.no_grad():
        encoder.logit_bias.fill_(-7.25)
    save_model(encoder, tmp_path / "model", config=VIT, method="clip")
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'model'}")
    assert peer.logit_bias.item() == -7.25
    (tmp_path / "model" / "declip.json").unlink()  # now it is OpenCLIP's
    (tmp_path / "model" / "SHA256SUMS").unlink()
    assert load_model(tmp_path / "model", option="--model").encoder.logit_bias.item() == -7.25


@pytest.mark.parametrize("base", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_folder_of_open_clip_is_read_with_its_heads_activation_and_preprocessing(tmp_path, base):
    config = dataclasses.replace(base, quick_gelu=False)
    encoder = new_encoder(config)
    folder = tmp_path / "model"
    save_model(encoder, folder, config=config, method="clip")
    for name in ("declip.json", "declip_extra.safetensors", "SHA256SUMS"):  # as OpenCLIP would have written it
        (folder / name).unlink()
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["preprocess_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    model = load_model(folder)
    assert model.encoder.pixel_mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.encoder.pixel_std.tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert (model.preprocessing.interpolation, model.arch, model.method) == ("bicubic", "open_clip", "clip")
    images = encoder.normalize_images(random_images(encoder.architecture.image_side_px))
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.encode_image(images), encoder.encode_image(images))
        torch.testing.assert_close(model.encoder.encode_text(TOKENS), encoder.encode_text(TOKENS))


def test_a_checkpoint_file_of_open_clip_is_read_by_its_shapes(tmp_path):
    torch.manual_seed(0)
    text = {"context_length": 9, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16, "head_width": 64}
    peer = open_clip.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=text).eval()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in peer.state_dict().items()}}, tmp_path / "x.pt")
    model = load_model(tmp_path / "x.pt")
    images = model.encoder.normalize_images(random_images(32))
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.encode_image(images), peer.encode_image(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.encoder.encode_text(TOKENS), peer.encode_text(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", golden_cases(world=1, methods=("clip", "slip", "filip", "declip", "defilip")), ids=lambda name: name
)
def test_a_checkpoint_of_the_original_gives_the_recorded_features(tmp_path, name):
    golden, (method, arch, *_) = load_golden(name), name.split("_")
    # Published models have heads 64 wide, the recordings narrower ones.
    given = {"heads": 2 if arch == "vit" else 4, "text_heads": 4}
    state = {f"module.{name}": value for name, value in golden_state(golden).items()}
    torch.save({"model": state, "last_iter": 7}, tmp_path / "ckpt.pth.tar")
    model = load_model(tmp_path / "ckpt.pth.tar", given=given)
    assert (model.token_wise, model.arch, model.method) == (method == "filip", "original", method)
    assert model.preprocessing.resize_px == (256 if arch == "rn" else 32)
    batch = golden_batch(golden)
    captions = torch.where(batch.mlm_labels == -100, batch.tokens[:, 0], batch.mlm_labels)  # (B, L), unmasked
    with torch.no_grad():
        found = model.encoder.encode_image(batch.images[:4, 0]), model.encoder.encode_text(captions[:4])
    for features, kind in zip(found, ("image", "text"), strict=True):
        expected = torch.from_numpy(golden.arrays[f"eval_{kind}_features"])
        torch.testing.assert_close(normalize(features), normalize(expected), rtol=0, atol=1e-5)


def test_the_newest_run_is_the_one_whose_model_was_written_last(tmp_path, monkeypatch):
    for number, name in enumerate(("b", "a", "c")):
        save_model(new_encoder(VIT), tmp_path / name / "model", config=VIT, method="clip")
        os.utime(tmp_path / name / "model" / "open_clip_model.safetensors", (number, number))
    (tmp_path / "unfinished").mkdir()
    assert find_newest_run(tmp_path) == tmp_path / "c"
    monkeypatch.setenv("DECLIP_RUNS", str(tmp_path))
    assert load_model(None).name == str(tmp_path / "c")


def test_without_any_run_the_error_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_RUNS", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="no model found: no run with a finished model under .*none/") as caught:
        load_model(None)
    assert "declip pretrain --data demo" in caught.value.remedy


def test_a_path_that_is_missing_is_an_error_that_names_the_option_it_came_with(tmp_path):
    for name in ("nowhere", "x" * 5000):
        with pytest.raises(ModelError, match=rf"no model at .*{name}") as caught:
            load_model(tmp_path / name, option="--init")
        assert caught.value.remedy.startswith("--init takes a run folder")


def test_an_empty_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)) as caught:
        load_model(tmp_path)
    assert caught.value.remedy


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_an_error_that_names_the_folder(tmp_path, name):
    save_model(new_encoder(VIT), tmp_path, config=VIT, method="clip")
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=f"{tmp_path} is damaged: {name} is not what was written") as caught:
        load_model(tmp_path)
    assert caught.value.remedy == "copy the folder again"
    seal(tmp_path)
    with pytest.raises(ModelError, match=f"cannot read .*{tmp_path}"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error(tmp_path, name):
    save_model(new_encoder(VIT), tmp_path, config=VIT, method="clip")
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_model(tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "no mask"])
def test_weights_that_do_not_fit_are_an_error_that_names_one(tmp_path, change):
    save_model(new_encoder(VIT), tmp_path, config=VIT, method="clip")
    path = tmp_path / ("declip_extra.safetensors" if change == "no mask" else "open_clip_model.safetensors")
    weights = load_file(path)
    if change == "missing":
        del weights["visual.proj"]
    elif change == "extra":
        weights["visual.second_proj"] = torch.zeros(3)
    elif change == "shape":
        weights["visual.proj"] = torch.zeros(3, 3)
    else:
        weights = {"unknown": torch.zeros(1)}
    save_file(weights, path)
    seal(tmp_path)
    wanted = {"extra": "second_proj", "no mask": "mask_embedding"}.get(change, r"visual\.proj")
    with pytest.raises(ModelError, match=wanted) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_a_model_of_a_later_format_is_an_error(tmp_path):
    save_model(new_encoder(VIT), tmp_path, config=VIT, method="clip")
    own = json.loads((tmp_path / "declip.json").read_text())
    (tmp_path / "declip.json").write_text(json.dumps(own | {"format": 99}))
    seal(tmp_path)
    with pytest.raises(ModelError, match="has model format 99, this declip reads 1") as caught:
        load_model(tmp_path)
    assert "upgrade" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04", b"\x80"])
def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path, content):
    path = tmp_path / "notes.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"notes\.pt is not a model that declip can read"):
        load_model(path)


def test_a_checkpoint_of_something_else_names_what_it_holds(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"holds no CLIP text tower \(parameters such as fc.weight, fc.bias\)"):
        load_model(tmp_path / "other.pt")


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "module"])
def test_a_checkpoint_with_python_objects_is_refused_in_our_words_and_runs_nothing(tmp_path, how):
    path, content = tmp_path / "model.pt", {"state_dict": {"a": torch.zeros(2)}, "args": Hostile(tmp_path / "ran")}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif how == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ModelError, match="holds Python objects besides tensors; it is not opened") as caught:
        load_model(path)
    assert "safetensors" in caught.value.remedy
    for words in (caught.value.message, caught.value.remedy):
        assert not re.search("weights_only|issue|github|PyTorch 2", words)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], 3, {"state_dict": [1]}])
def test_a_checkpoint_without_parameters_by_name_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ModelError, match="not parameters by name"):
        load_model(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("open_clip_config.json", "model_cfg.quick_gelu", False, "model_cfg.quick_gelu is False .* True"),
        ("open_clip_config.json", "model_cfg.embed_dim", 11, "model_cfg.embed_dim is 11 .* 10"),
        ("open_clip_config.json", "model_cfg.vision_cfg.image_size", 64, "vision_cfg.image_size is 64 .* 32"),
        ("open_clip_config.json", "model_cfg.text_cfg.context_length", 77, "text_cfg.context_length is 77 .* 9"),
        ("open_clip_config.json", "preprocess_cfg.mean", [0.5, 0.5, 0.5], r"preprocess_cfg.mean is \[0.5.* \[0.485"),
        ("open_clip_config.json", "preprocess_cfg.std", ..., r"preprocess_cfg.std is None .* \[0.229"),
        ("open_clip_config.json", "model_cfg", [1], "model_cfg is .1. in open_clip_config.json"),
        ("declip.json", "preprocessing.mean", [0.5, 0.5, 0.5], r"preprocess_cfg.mean is \[0.485.* \[0.5"),
        ("declip.json", "preprocessing.image_side_px", 64, "preprocessing.resize_px is 32; expected in .64, 512."),
        (
            "declip.json",
            "preprocessing.resize_px",
            10**12,
            "preprocessing.resize_px is 1000000000000; expected in .32, 256.",
        ),
        (
            "declip.json",
            "preprocessing.interpolation",
            "nearest",
            "interpolation is 'nearest'; expected bilinear or bicubic",
        ),
        ("declip.json", "preprocessing.std", ..., "no 'std'"),
        ("declip.json", "architecture.text.quick_gelu", False, "open_clip_config.json is there, but cannot express"),
        ("declip.json", "architecture.vision.quick_gelu", "yes", "quick_gelu is true or false .got 'yes'"),
        ("declip.json", "architecture.vision.norm_eps", 3, "3 is not a valid epsilon"),
        ("declip.json", "architecture.vision.mlp_ratio", 3.0, "vision.mlp_ratio is 3.0 .* 4.0"),
        ("declip.json", "architecture.vision.has_pre_norm", False, "vision.has_pre_norm is False .* True"),
        ("declip.json", "architecture.embed_dim", 10**12, "architecture.embed_dim is 1000000000000 .* weights 10"),
        ("declip.json", "architecture.vision.num_layers", 10**12, "vision.num_layers is 1000000000000 .* weights 4"),
        ("declip.json", "architecture.vision.width", -1, "vision.width is -1 .* 96"),
        ("declip.json", "architecture.vision.kind", "resnet", "vision.kind is 'resnet' .* 'vit'"),
        ("declip.json", "architecture.vision.num_heads", 10**12, "cannot be divided among 1000000000000 heads"),
        ("declip.json", "architecture.vision.num_heads", 1, "vision_cfg.head_width is 32 .* 96"),
        ("declip.json", "architecture.text.num_heads", 0, "cannot be divided among 0 heads"),
        ("declip.json", "architecture.text", [1], "damaged"),
        ("declip.json", "architecture", ..., "no 'architecture'"),
        ("declip.json", "token_wise", True, "token_wise is True"),
        ("declip.json", "has_token_wise_heads", True, "has_token_wise_heads is True .* False"),
        ("declip.json", "method", 3, "method is 3"),
        ("declip.json", "method", "glip", "method is 'glip'"),
        ("declip.json", "tokenizer.context_length", 77, "tokenizer.context_length is 77 .* 9"),
    ],
)
def test_configurations_that_contradict_each_other_or_the_weights_are_an_error_that_names_the_field(
    tmp_path, file, field, value, message
):
    save_model(new_encoder(VIT), tmp_path, config=VIT, method="clip")
    edit(tmp_path / file, field, value)
    seal(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.remedy == "copy the folder again"


def test_pixels_are_normalized_as_the_saved_model_did(tmp_path):
    encoder = new_encoder(VIT)
    encoder.pixel_mean.copy_(torch.tensor([0.1, 0.2, 1 / 3]))
    encoder.pixel_std.copy_(torch.tensor([0.3, 0.4, 2 / 3]))
    save_model(encoder, tmp_path, config=VIT, method="clip")
    found = load_model(tmp_path).encoder
    assert torch.equal(found.pixel_mean, encoder.pixel_mean)
    assert torch.equal(found.pixel_std, encoder.pixel_std)


def facts_of(model):
    encoder = model.encoder
    state = {**encoder.state_dict(), "mean": encoder.pixel_mean, "std": encoder.pixel_std}
    rest = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name != "encoder"}
    return {name: value.numpy().tobytes() for name, value in state.items()}, encoder.architecture, rest


@pytest.mark.parametrize("is_sealed", [False, True], ids=["found out by the digest", "found out by the parsers"])
def test_a_damaged_folder_is_an_error_and_never_anything_else(tmp_path, is_sealed):
    save_model(new_encoder(VIT), tmp_path, config=VIT, method="clip")
    rng, names = random.Random(1), ["declip.json", "open_clip_config.json", "SHA256SUMS", "declip_extra.safetensors"]
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    expected = facts_of(load_model(tmp_path))
    for _ in range(8):
        name = rng.choice(names)
        (tmp_path / name).write_bytes(damaged(whole[name], rng))
        if is_sealed:
            seal(tmp_path)
        with contextlib.suppress(ModelError):
            found = facts_of(load_model(tmp_path))
            assert is_sealed or found == expected
        for file, data in whole.items():
            (tmp_path / file).write_bytes(data)
