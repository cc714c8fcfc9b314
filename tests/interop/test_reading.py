"""Checkpoints of other projects give here the features that they give there, from the same image file."""

import argparse
import json
import warnings

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torchvision import transforms

from declip_cli.config import ModelConfig
from declip_cli.errors import ModelError
from declip_cli.interop.assumptions import parse_assumptions
from declip_cli.interop.inspect import inspect_model
from declip_cli.interop.read import load_model
from declip_cli.model.checkpoint import save_model
from declip_cli.model.dims import describe_architecture
from declip_cli.model.preprocessing import IMAGE_MEAN, IMAGE_STD, OPENAI_MEAN, OPENAI_STD
from tests.interop import peers

TOLERANCE = 1e-5
"""Largest difference of a component of two unit features, in float32."""


def open_clip_features(peer, transform, length=20):
    with torch.no_grad():
        image = peer.encode_image(transform(peers.pillow(peers.image_file()))[None])
        return image, peer.encode_text(peers.ids(length))


def write_open_clip(peer, config, path, *, how, **pixels):
    """Write a model as OpenCLIP's trainer, its hub upload or its older upload does."""
    if how == "trainer":
        state = {f"module.{name}": value for name, value in peer.state_dict().items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path / "epoch_3.pt")
        return path / "epoch_3.pt"
    peers.write_json(path / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": pixels})
    if how == "bin":
        torch.save(peer.state_dict(), path / "open_clip_pytorch_model.bin")
    else:
        save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, path / "open_clip_model.safetensors")
    return path


@pytest.mark.parametrize("how", ["safetensors", "bin"])
@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_folder_of_open_clip_gives_its_features(tmp_path, kind, quick_gelu, how):
    pixels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear", "resize_mode": "shortest"}
    config = peers.open_clip_config(kind, quick_gelu=quick_gelu)
    peer, side = peers.open_clip_model(config), config["vision_cfg"]["image_size"]
    path, notes = write_open_clip(peer, config, tmp_path, how=how, **pixels), []
    model = load_model(path, log=notes.append)
    transform = peers.open_clip_pixels(config, size=side, **pixels)
    assert peers.largest_difference(model, *open_clip_features(peer, transform)) <= TOLERANCE
    assert (model.arch, model.method, notes) == ("open_clip", "clip", [])


@pytest.mark.parametrize(
    "options",
    [
        {"vision": {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}, "mlp_ratio": 2.7}},
        {"text": {"mlp_ratio": 3.0, "norm_kwargs": {"eps": 1e-3}, "proj_bias": True}},
        {"custom_text": True},
        {"init_logit_bias": -10},
    ],
    ids=["image tower", "text tower", "custom text", "sigmoid loss"],
)
def test_open_clip_towers_with_unusual_parts_give_their_features(tmp_path, options):
    config = peers.open_clip_config(**options)
    peer = peers.open_clip_model(config)
    pixels = {"mean": OPENAI_MEAN, "std": OPENAI_STD, "interpolation": "bicubic", "resize_mode": "squash"}
    model = load_model(write_open_clip(peer, config, tmp_path, how="safetensors", **pixels))
    transform = peers.open_clip_pixels(config, size=32, **pixels)
    assert peers.largest_difference(model, *open_clip_features(peer, transform)) <= TOLERANCE


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_what_a_file_of_open_clip_s_trainer_does_not_say_is_assumed_aloud_or_told_by_the_user(tmp_path, activation):
    config = peers.open_clip_config(quick_gelu=activation == "quick_gelu")
    peer, notes = peers.open_clip_model(config), []
    path = write_open_clip(peer, config, tmp_path, how="trainer")
    words = [
        f"activation={activation}",
        "heads=3",
        "text_heads=2",
        "mean=0.5",
        "std=0.25,0.5,1",
        "interpolation=bilinear",
    ]
    model = load_model(path, given=parse_assumptions(words), log=notes.append)
    assert notes == []
    pixels = {"mean": (0.5,) * 3, "std": (0.25, 0.5, 1.0), "interpolation": "bilinear", "resize_mode": "shortest"}
    transform = peers.open_clip_pixels(config, size=32, **pixels)
    assert peers.largest_difference(model, *open_clip_features(peer, transform)) <= TOLERANCE
    load_model(path, log=notes.append)
    given = [
        next(key for key in ("activation", "heads", "mean", "interpolation") if f"--assume {key}=" in n) for n in notes
    ]
    assert given == ["mean", "interpolation", "activation", "heads"]
    other = load_model(path)
    assert other.fingerprint != model.fingerprint


def test_a_run_of_open_clip_s_trainer_is_read_as_the_model_that_it_is_named_after(tmp_path):
    config = peers.open_clip_config()
    peer = peers.open_clip_model(config)
    name = "2026_01_02-10_20_30-model_ViT-B-32-quickgelu-lr_0.001-b_64-j_4-p_amp"
    torch.save({"name": name, "state_dict": peer.state_dict()}, tmp_path / "epoch_1.pt")
    notes = []
    model = load_model(tmp_path / "epoch_1.pt", given={"heads": 3, "text_heads": 2}, log=notes.append)
    assert model.encoder.architecture.text.quick_gelu
    assert not [note for note in notes if "activation" in note]


def test_an_archive_of_openai_gives_the_features_of_its_weights(tmp_path):
    config = peers.open_clip_config(
        quick_gelu=True, vision={"width": 64, "head_width": 64}, text={"width": 64, "heads": 1}
    )
    peer = peers.open_clip_model(config).half().float()
    batch = torch.zeros(1, 3, 32, 32), peers.ids(20)[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenAI published TorchScript, whatever PyTorch thinks of it today
        traced = torch.jit.trace(peer, batch, check_trace=False, strict=False)
        traced.half()
        traced.save(tmp_path / "ViT.pt")
    peer.float()
    notes = []
    model = load_model(tmp_path / "ViT.pt", log=notes.append)
    pixels = {"mean": OPENAI_MEAN, "std": OPENAI_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    transform = peers.open_clip_pixels(config, size=32, **pixels)
    assert peers.largest_difference(model, *open_clip_features(peer, transform)) <= TOLERANCE
    assert (model.arch, notes) == ("openai", [])


def test_a_state_dict_of_openai_has_its_activation(tmp_path):
    config = peers.open_clip_config(vision={"width": 64, "head_width": 64}, text={"width": 64, "heads": 1})
    state = peers.open_clip_model(config).state_dict()
    numbers = {"input_resolution": 32, "context_length": 20, "vocab_size": 49408}
    torch.save(state | {name: torch.tensor(value) for name, value in numbers.items()}, tmp_path / "x.pt")
    model = load_model(tmp_path / "x.pt")
    assert model.arch == "openai"
    assert model.encoder.architecture.text.quick_gelu
    assert model.encoder.architecture.vision.quick_gelu


# --- Hugging Face


def hugging_face_model(**options):
    text = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"max_position_embeddings": 20, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 32, "patch_size": 8}
    text |= options.get("text", {})
    vision |= options.get("vision", {})
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return peers.shake(transformers.CLIPModel(config))


def hugging_face_features(peer, pixel_values):
    tokens = peers.ids(20)
    with torch.no_grad():
        out = peer(pixel_values=pixel_values, input_ids=tokens)
    return out.image_embeds, out.text_embeds


def hugging_face_folder(peer, path, **options):
    """Write the model and an exact (Pillow) processor; return what the processor makes of the image."""
    processor = transformers.CLIPImageProcessorPil(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.save_pretrained(path)
    processor.save_pretrained(path)
    return processor(peers.pillow(peers.image_file()), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(
    "pixels",
    [
        {
            "size": {"shortest_edge": 36},
            "crop_size": 32,
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.2] * 3,
        },
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 3},
    ],
    ids=["resize then crop", "squash"],
)
def test_a_folder_of_hugging_face_gives_its_features(tmp_path, activation, pixels):
    peer = hugging_face_model(text={"hidden_act": activation, "layer_norm_eps": 1e-4}, vision={"hidden_act": "gelu"})
    pixel_values, notes = hugging_face_folder(peer, tmp_path, **pixels), []
    model = load_model(tmp_path, log=notes.append)
    assert peers.largest_difference(model, *hugging_face_features(peer, pixel_values)) <= TOLERANCE
    assert (model.arch, notes) == ("huggingface", [])


def test_features_are_read_off_at_the_largest_id_where_the_end_is_called_2(tmp_path):
    peer = hugging_face_model(text={"eos_token_id": 2})
    pixel_values = hugging_face_folder(peer, tmp_path, size={"shortest_edge": 32}, crop_size=32)
    model = load_model(tmp_path / "model.safetensors")  # the file means its folder
    assert peers.largest_difference(model, *hugging_face_features(peer, pixel_values)) <= TOLERANCE


def test_a_model_of_hugging_face_in_several_old_files_is_read(tmp_path):
    peer = hugging_face_model()
    pixel_values = hugging_face_folder(peer, tmp_path, size={"shortest_edge": 32}, crop_size=32)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[:20], names[20:])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: state[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    peers.write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": index})
    model = load_model(tmp_path)
    assert peers.largest_difference(model, *hugging_face_features(peer, pixel_values)) <= TOLERANCE
    for name in ("../x.bin", "/x.bin", "pytorch_model.bin.index.json"):
        peers.write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": {"a": name}})
        with pytest.raises(ModelError, match="names other files than weights in its folder"):
            load_model(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"vision": {"ls_init_value": 0.1}},
        {"text": {"scale_fc": True}},
        {"vision": {"attentional_pool": True, "attn_pooler_heads": 2}},
    ],
    ids=["layer scale", "norm in the MLP", "attention pool"],
)
def test_towers_that_are_not_clip_s_are_refused_also_without_a_configuration_and_by_inspect(tmp_path, config):
    peer = peers.open_clip_model(peers.open_clip_config(**config))
    torch.save(peer.state_dict(), tmp_path / "x.pt")
    for door in (load_model, inspect_model):
        with pytest.raises(ModelError, match="it has a part that CLIP's towers do not have: (visual|text)"):
            door(tmp_path / "x.pt")


def test_a_part_that_hugging_face_s_model_has_not_is_refused(tmp_path):
    peer = hugging_face_model()
    hugging_face_folder(peer, tmp_path, size={"shortest_edge": 32}, crop_size=32)
    state = load_file(tmp_path / "model.safetensors")
    ids = {"text_model.embeddings.position_ids": torch.arange(20)[None]}  # versions before 4.31 wrote it
    save_file(state | ids, tmp_path / "model.safetensors")
    load_model(tmp_path)
    save_file(state | {"vision_model.head.probe": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="a part that CLIP's towers do not have: vision_model.head.probe"):
        load_model(tmp_path)


def test_configurations_under_their_early_names_are_followed(tmp_path):
    peer = hugging_face_model(text={"hidden_act": "gelu"}, vision={"hidden_act": "gelu"})
    pixel_values = hugging_face_folder(peer, tmp_path, size={"shortest_edge": 32}, crop_size=32)
    config = json.loads((tmp_path / "config.json").read_text())
    early = {f"{name}_dict": config.pop(name) for name in ("text_config", "vision_config")}
    peers.write_json(tmp_path / "config.json", config | early)
    again = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert peers.largest_difference(load_model(tmp_path), *hugging_face_features(again, pixel_values)) <= TOLERANCE


def test_another_kind_of_model_is_refused_with_the_reason(tmp_path):
    peers.write_json(tmp_path / "config.json", {"model_type": "siglip2"})
    save_file({"vision_model.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="of the type 'siglip2'; of Hugging Face's, declip reads the types clip"):
        load_model(tmp_path)


# --- SLIP


def slip_checkpoint(path, *, width, heads, method="SLIP", has_text=True):
    """Write a checkpoint in SLIP's layout: an image tower of timm's, the text tower of OpenAI's CLIP.

    Returns the functions that its model is: images (B, 3, S, S) and tokens (B, L) → features.
    """
    torch.manual_seed(0)
    visual = peers.shake(
        timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=width, depth=2, num_heads=heads, num_classes=0
        )
    )
    text = {"width": 64, "heads": 8}
    peer = peers.open_clip_model(peers.open_clip_config(quick_gelu=True, text=text))
    state = {f"module.visual.{name}": value for name, value in visual.state_dict().items()}
    projection = 0.1 * torch.randn(width, 24)
    if has_text:
        state |= {
            f"module.{n}": v for n, v in peer.state_dict().items() if not n.startswith("visual.") and "mask" not in n
        }
        state["module.image_projection"] = projection
    if method == "SLIP":
        state["module.image_mlp.layer1.weight"] = torch.zeros(2, 2)
    args = argparse.Namespace(model=f"{method}_VITB16", dataset="yfcc15m", epochs=25, lr=3e-3)
    torch.save({"epoch": 25, "state_dict": state, "optimizer": {}, "scaler": {}, "best_acc1": 42.8, "args": args}, path)
    return lambda pixels: visual(pixels) @ projection, peer.encode_text


@pytest.mark.parametrize(("width", "heads", "given"), [(384, 12, {}), (48, 3, {"heads": 3})])
@pytest.mark.parametrize("method", ["SLIP", "CLIP"])
def test_a_checkpoint_of_slip_gives_its_features(tmp_path, width, heads, given, method):
    encode_image, encode_text = slip_checkpoint(tmp_path / "slip.pt", width=width, heads=heads, method=method)
    model = load_model(tmp_path / "slip.pt", given=given)
    steps = [transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(IMAGE_MEAN, IMAGE_STD)])
    with torch.no_grad():
        features = encode_image(transform(peers.pillow(peers.image_file()))[None]), encode_text(peers.ids(20))
    assert peers.largest_difference(model, *features) <= TOLERANCE
    assert (model.arch, model.method) == ("slip", method.lower())


def test_a_simclr_checkpoint_of_slip_is_refused(tmp_path):
    slip_checkpoint(tmp_path / "simclr.pt", width=48, heads=3, has_text=False)
    with pytest.raises(ModelError, match="SimCLR model of the SLIP code, an image tower without a text tower"):
        load_model(tmp_path / "simclr.pt")


def test_an_image_tower_alone_is_refused(tmp_path):
    config = peers.open_clip_config()
    state = peers.open_clip_model(config).state_dict()
    torch.save({"model": {f"module.{n}": v for n, v in state.items() if n.startswith("visual.")}}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match="holds an image tower without a text tower"):
        load_model(tmp_path / "x.pt")


# --- names, and folders of ours


def test_a_cached_model_of_open_clip_is_found_by_its_name(tmp_path, monkeypatch):
    config = peers.open_clip_config()
    peer = peers.open_clip_model(config)
    torch.save(peer.state_dict(), tmp_path / "vit.pt")
    known = {"url": "https://example.org/vit.pt", "mean": (0.4,) * 3, "std": (0.3,) * 3}
    known |= {"interpolation": "bilinear", "resize_mode": "squash", "quick_gelu": False}
    monkeypatch.setattr("open_clip.pretrained.get_pretrained_cfg", lambda model, tag: known if tag == "small" else {})
    monkeypatch.setattr("declip_cli.interop.cached.read_installed_config", lambda name: config)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelError, match="OpenCLIP knows ViT-Tiny/small, but its weights are not on this machine"):
        load_model("ViT-Tiny/small")
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / "vit.pt").rename(tmp_path / ".cache" / "clip" / "vit.pt")
    model = load_model("ViT-Tiny/small")
    pixels = {"mean": (0.4,) * 3, "std": (0.3,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    transform = peers.open_clip_pixels(config, size=32, **pixels)
    assert peers.largest_difference(model, *open_clip_features(peer, transform)) <= TOLERANCE
    with pytest.raises(ModelError, match="no model at ViT-Tiny/large"):
        load_model("ViT-Tiny/large")


def write_hugging_face(path):
    hugging_face_folder(hugging_face_model(), path, size={"shortest_edge": 37}, crop_size=32)


def write_squashed(path):
    config = peers.open_clip_config(vision={"no_ln_pre": True, "mlp_ratio": 2.7}, text={"proj_bias": True})
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [1 / 3] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    write_open_clip(peers.open_clip_model(config), config, path, how="bin", **pixels)


def write_slip(path):
    slip_checkpoint(path / "slip.pt", width=384, heads=12)
    return path / "slip.pt"


@pytest.mark.parametrize(
    ("write", "is_open_clip"), [(write_hugging_face, False), (write_squashed, True), (write_slip, False)]
)
def test_what_is_read_can_be_kept_in_a_folder_of_ours_and_is_the_same_there(tmp_path, write, is_open_clip):
    path = write(tmp_path) or tmp_path
    first = load_model(path, given={"interpolation": "bicubic"})
    config = ModelConfig(arch="kept")
    ours = tmp_path / "ours"
    save_model(first.encoder, ours, config=config, method=first.method, preprocessing=first.preprocessing)
    second = load_model(ours)
    assert describe_architecture(second.encoder.architecture) == describe_architecture(first.encoder.architecture)
    assert second.preprocessing == first.preprocessing
    # OpenCLIP's towers share their activation, and its crop starts elsewhere than Hugging Face's.
    assert (ours / "open_clip_config.json").exists() == is_open_clip
    for one, other in zip(peers.ours(first), peers.ours(second), strict=True):
        assert torch.equal(one, other)
    if is_open_clip:
        for name in ("declip.json", "declip_extra.safetensors", "SHA256SUMS"):  # as if OpenCLIP had written it
            (ours / name).unlink()
        third = load_model(ours)
        for one, other in zip(peers.ours(first), peers.ours(third), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_models_name_beside_its_parameters_is_no_harm(tmp_path):
    peer = peers.open_clip_model(peers.open_clip_config())
    torch.save({"model": "ViT-S", "state_dict": peer.state_dict()}, tmp_path / "named.pt")
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "plain.pt")
    named, plain = (load_model(tmp_path / f"{name}.pt").encoder.state_dict() for name in ("named", "plain"))
    assert all(torch.equal(named[name], value) for name, value in plain.items())
