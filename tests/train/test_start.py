"""A run that starts from another model takes over all that makes it, or says what contradicts it."""

import argparse

import open_clip
import pytest
import timm
import torch

from declip_cli.config import ModelConfig
from declip_cli.errors import ConfigError, TrainError
from declip_cli.interop.read import load_model
from declip_cli.model.architectures import find_architecture
from declip_cli.train.start import resize_positions, take_over
from tests.interop import peers
from tests.train.small_runs import run, small_config

ONE_STEP = {"steps": 1}


def write_slip(path):
    """Write a checkpoint of SLIP's: no norm before the blocks, GELU beside QuickGELU, 12 heads of 32."""
    torch.manual_seed(0)
    visual = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=384, depth=1, num_heads=12, num_classes=0
    )
    peer = peers.open_clip_model(peers.open_clip_config(quick_gelu=True, text={"width": 64, "heads": 8}))
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    state |= {n: v for n, v in peer.state_dict().items() if not n.startswith("visual.") and "mask" not in n}
    state["image_projection"] = 0.1 * torch.randn(384, 24)
    torch.save({"state_dict": state, "args": argparse.Namespace(model="CLIP_VITS16")}, path)


def started(path, out, **model):
    config = small_config(
        model={"arch": "init"} | model,
        train={"init": str(path), "logit_scale_init": 2.0} | ONE_STEP,
        optim={"warmup_steps": 0, "learning_rate_peak": 1e-12, "learning_rate_start": 0.0},
    )
    run(config, out)
    return load_model(out)


def test_towers_preprocessing_and_weights_are_taken_over_and_kept_when_the_run_goes_on(tmp_path):
    write_slip(tmp_path / "slip.pt")
    start = load_model(tmp_path / "slip.pt")
    found = started(tmp_path / "slip.pt", tmp_path / "run")
    assert found.encoder.architecture == start.encoder.architecture
    assert found.preprocessing.interpolation == start.preprocessing.interpolation
    for one, other in zip(peers.ours(found), peers.ours(start), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    longer = small_config(model={"arch": "init"}, train={"init": str(tmp_path / "slip.pt"), "steps": 2})
    with pytest.raises(ConfigError, match="--arch init is the architecture of --init, which is missing"):
        find_architecture(longer.model)
    assert take_over(take_over(longer)) == take_over(longer)


@pytest.mark.parametrize(("settings", "expected"), [({}, 40), ({"image_side_px": 64}, 80), ({"resize_px": 32}, 32)])
def test_the_size_to_which_images_are_resized_is_taken_over_and_follows_the_side(tmp_path, settings, expected):
    write_slip(tmp_path / "slip.pt")
    train = {"init": str(tmp_path / "slip.pt"), "assume": ["resize=40"]} | ONE_STEP
    given = []
    config = take_over(small_config(model={"arch": "init"} | settings, train=train), given.append)
    assert config.model.resize_px == expected
    assert any("OpenCLIP cannot say that" in line for line in given) == ("resize_px" not in settings)


def test_a_folder_of_open_clip_is_a_start_with_its_filter_and_its_mean(tmp_path):
    config = peers.open_clip_config()
    peer = peers.open_clip_model(config)
    pixels = {"mean": [0.5, 0.25, 0.125], "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    peers.write_json(tmp_path / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": pixels})
    torch.save(peer.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    found = started(tmp_path, tmp_path / "run")
    assert (found.preprocessing.interpolation, found.preprocessing.resize_mode) == ("bicubic", "squash")
    assert (found.preprocessing.mean, found.context_length) == ((0.5, 0.25, 0.125), 20)
    assert not found.encoder.architecture.text.quick_gelu
    theirs, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run' / 'model'}")
    transform = peers.open_clip_pixels(config, size=32, **pixels)
    with torch.no_grad():
        image = theirs.eval().encode_image(transform(peers.pillow(peers.image_file()))[None])
        assert peers.largest_difference(found, image, theirs.encode_text(peers.ids(20))) <= 1e-5


@pytest.mark.parametrize(
    ("model", "message", "remedy"),
    [
        (
            {"quick_gelu": True},
            "the activation (model.quick_gelu) differs (QuickGELU asked for, GELU and QuickGELU",
            "=none, which copies it",
        ),
        (
            {"context_length": 12},
            "the context length (model.context_length) differs (12 asked for, 20 there)",
            "=none, which copies it",
        ),
        (
            {"embed_dim": 8},
            "the shared embedding (model.embed_dim) differs (8 asked for, 24 there)",
            "=none, which copies it",
        ),
        ({"arch": "test"}, "width of the image tower differs (24 asked for, 384 there)", "--arch init"),
        ({"arch": "rn-tiny64"}, "the kind of the image tower differs (a ResNet asked for, a ViT there)", "--arch init"),
    ],
)
def test_a_setting_that_contradicts_the_start_is_named(tmp_path, model, message, remedy):
    write_slip(tmp_path / "slip.pt")
    config = small_config(model={"arch": "init"} | model, train={"init": str(tmp_path / "slip.pt")})
    with pytest.raises(TrainError) as caught:
        take_over(config)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_positions_are_interpolated_as_open_clip_does_it_where_the_image_has_another_side(tmp_path):
    config = peers.open_clip_config()
    peer = peers.open_clip_model(config)
    larger = peers.open_clip_model(peers.open_clip_config(vision={"image_size": 56}), seed=1)
    state = dict(peer.state_dict())
    open_clip.model.resize_pos_embed(state, larger)
    expected = state["visual.positional_embedding"]
    found = resize_positions(peer.state_dict()["visual.positional_embedding"], 49)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.save(peer.state_dict(), tmp_path / "x.pt")
    told = small_config(
        model={"arch": "init", "image_side_px": 56},
        train={"init": str(tmp_path / "x.pt"), "assume": ["activation=gelu", "heads=3", "text_heads=2"]} | ONE_STEP,
        optim={"warmup_steps": 0, "learning_rate_peak": 1e-12, "learning_rate_start": 0.0},
    )
    run(told, tmp_path / "run")
    read = load_model(tmp_path / "run")
    torch.testing.assert_close(read.encoder.visual.positional_embedding.detach(), expected, rtol=0, atol=1e-6)
    assert (read.image_side_px, read.encoder.architecture.vision.num_heads) == (56, 3)


def test_what_a_checkpoint_does_not_say_can_be_told_to_a_run(tmp_path):
    torch.save(peers.open_clip_model(peers.open_clip_config()).state_dict(), tmp_path / "x.pt")
    notes = []
    take_over(small_config(model={"arch": "init"}, train={"init": str(tmp_path / "x.pt")}), notes.append)
    assert [note.rpartition("--assume ")[2].partition("=")[0] for note in notes][2:] == ["activation", "heads"]
    words = ["activation=quick_gelu", "heads=3", "interpolation=bilinear"]
    model = take_over(
        small_config(model={"arch": "init"}, train={"init": str(tmp_path / "x.pt"), "assume": words})
    ).model
    vision = find_architecture(model).vision
    assert (vision.quick_gelu, vision.num_heads, model.interpolation) == (True, 3, "bilinear")
    assert ModelConfig().interpolation is None
