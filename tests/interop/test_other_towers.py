"""Models of OpenCLIP whose towers are not CLIP's own are evaluated as OpenCLIP evaluates them, and only evaluated."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import declip_cli
from declip_cli.data.catalog import open_dataset
from declip_cli.data.image_views import eval_transform
from declip_cli.errors import ModelError
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.linear_probe import _encoder
from declip_cli.evaluate.texts import text_features
from declip_cli.evaluate.zeroshot import zeroshot
from declip_cli.interop.export import export
from declip_cli.interop.inspect import inspect_model
from declip_cli.interop.read import describe_model, load_model
from tests.interop import other_peers, peers

OPTIONS = FeatureOptions(use_cache=False, threads=1)
KINDS = {
    "siglip": other_peers.siglip_config,
    "eva": other_peers.eva_config,
    "clipa": other_peers.clipa_config,
    "coca": other_peers.coca_config,
}


def opened_there(folder):
    """Open a folder by OpenCLIP alone."""
    name = f"local-dir:{folder}"
    peer, _, transform = open_clip.create_model_and_transforms(name)
    return peer.eval(), transform, open_clip.get_tokenizer(name)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_folder_gives_the_features_that_open_clip_computes_from_the_same_file(tmp_path, kind):
    other_peers.write_folder(tmp_path, KINDS[kind]())
    model = load_model(tmp_path)
    peer, transform, tokenizer = opened_there(tmp_path)
    view = torch.from_numpy(eval_transform(peers.image_file(), **model.preprocessing.transform_options()))
    with torch.no_grad():
        expected_image = peer.encode_image(transform(peers.pillow(peers.image_file()))[None], normalize=True)
        expected_texts = peer.encode_text(tokenizer(peers.TEXTS), normalize=True)
        image = F.normalize(model.encoder.encode_image(view[None]), dim=-1)
    texts = text_features(model, peers.TEXTS, options=OPTIONS)
    assert float((image - expected_image).abs().max()) <= 1e-5
    assert float((texts - expected_texts).abs().max()) <= 1e-5


def image_folder(path, classes=("bus", "cat", "dog"), each=6):
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for one in range(each):
            (path / name / f"{one}.png").write_bytes(peers.image_file(100 * number + one, size=(50 + 7 * one, 44)))
    return path


def test_zero_shot_predictions_are_those_of_open_clip(tmp_path):
    other_peers.write_folder(tmp_path / "model", other_peers.siglip_config())
    folder = image_folder(tmp_path / "pictures")
    template = "a photo of the {}"
    model = load_model(tmp_path / "model")
    found = zeroshot(model, open_dataset(str(folder)), templates=[template], options=OPTIONS).predictions
    peer, transform, tokenizer = opened_there(tmp_path / "model")
    files = sorted(folder.rglob("*.png"))
    with torch.no_grad():
        texts = peer.encode_text(tokenizer([template.format(name) for name in ("bus", "cat", "dog")]), normalize=True)
        views = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        cosines = peer.encode_image(views, normalize=True) @ texts.T
    assert [str(key).rsplit("/", 2)[-2:] for key in found.keys] == [[f.parent.name, f.name] for f in files]
    assert found.ranked.tolist() == cosines.argsort(dim=1, descending=True).tolist()
    assert torch.allclose(found.scores, cosines.sort(dim=1, descending=True).values, atol=1e-5)


@pytest.mark.parametrize(("kind", "width"), [("siglip", 24), ("eva", 24), ("clipa", 48), ("coca", 24)])
def test_features_before_the_projection_give_those_after_it(tmp_path, kind, width):
    peer = other_peers.write_folder(tmp_path, KINDS[kind]())
    model = load_model(tmp_path)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        before = _encoder(model, "pre")(images)
        after = _encoder(model, "post")(images)
    assert before.shape == (2, width)
    visual = peer.visual
    project = {
        "siglip": lambda x: x,
        "eva": lambda x: visual.trunk.head(x),
        "clipa": lambda x: x @ visual.proj,
        "coca": lambda x: x @ visual.proj,
    }[kind]
    with torch.no_grad():
        expected = project(before)
    assert torch.allclose(F.normalize(after, dim=-1), F.normalize(expected, dim=-1), atol=1e-5)


def test_texts_longer_than_the_context_are_counted(tmp_path):
    other_peers.write_folder(tmp_path, other_peers.siglip_config())
    model = load_model(tmp_path)
    texts = ["a red bus", " ".join(["dog"] * 15), " ".join(["dog"] * 16)]
    assert model.tokenizer.count_truncated(texts) == 1  # with the end, 15 words fill 16 places


def test_a_notebook_uses_such_a_model_as_any_other(tmp_path):
    other_peers.write_folder(tmp_path, other_peers.siglip_config())
    model, preprocess, tokenizer = declip_cli.load(tmp_path)
    peer, transform, their_tokenizer = opened_there(tmp_path)
    opened = peers.pillow(peers.image_file())
    assert float((preprocess(opened) - transform(opened)).abs().max()) <= 1e-6
    assert torch.equal(tokenizer(peers.TEXTS), their_tokenizer(peers.TEXTS))
    assert torch.equal(tokenizer("A red bus."), their_tokenizer("A red bus."))
    assert model.logit_scale.item() == peer.logit_scale.item()
    assert model.logit_bias.item() == peer.logit_bias.item()


def test_a_checkpoint_of_the_trainer_is_built_as_the_model_that_its_run_is_named_after(tmp_path, monkeypatch):
    config = other_peers.clipa_config()
    peer = other_peers.write_folder(tmp_path / "folder", config)
    monkeypatch.setattr("declip_cli.interop.open_clip.read_installed_config", {"ViT-L-14-CLIPA": config}.__getitem__)
    state = {f"module.{name}": value for name, value in peer.state_dict().items()}
    torch.save({"name": "x-model_ViT-L-14-CLIPA-lr_0.1", "state_dict": state}, tmp_path / "epoch_1.pt")
    model = load_model(tmp_path / "epoch_1.pt")
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.encoder.encode_image(images), peer.encode_image(images))


def test_what_such_a_model_is_can_be_inspected_without_building_it(tmp_path, monkeypatch):
    peer = other_peers.write_folder(tmp_path, other_peers.siglip_config())
    monkeypatch.setattr("declip_cli.interop.other_open_clip._build", None)
    found = inspect_model(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["num_parameters"] == sum(value.numel() for value in peer.parameters())
    assert (found["vocabulary"], found["image_side_px"], found["context_length"]) == ("nobody/siglip", 32, 16)
    assert "timm" in found["only_evaluated"]


def test_no_run_starts_from_it_and_no_export_is_written(tmp_path):
    other_peers.write_folder(tmp_path / "model", other_peers.siglip_config())
    with pytest.raises(ModelError, match=r"no run can start from it.*timm"):
        describe_model(tmp_path / "model", option="--init")
    with pytest.raises(ModelError, match="neither trained nor exported"):
        export(load_model(tmp_path / "model"), "onnx", tmp_path / "out", card=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"timm_model_name": "hf-hub:nobody/model"}}, "timm has no model"),
        ({"text_cfg": {"width": 10**9}}, "no such size"),
        ({"text_cfg": {"layers": float("inf")}}, "no such size"),
        ({"text_cfg": {"layers": 3}}, "cannot be built"),
        ({"text_cfg": {"unheard_of": 1}}, "cannot be built"),
        ({"text_cfg": {"hf_model_name": "nobody/bert"}}, "the file does not say which"),
        ({"text_cfg": {"context_length": 10**9}}, "context length"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_refused(tmp_path, change, words):
    config = other_peers.siglip_config()
    other_peers.write_folder(tmp_path, config)
    config = {key: value | change.get(key, {}) if isinstance(value, dict) else value for key, value in config.items()}
    peers.write_json(tmp_path / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": other_peers.PIXELS})
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path)


def test_no_code_beside_the_tokenizer_is_run(tmp_path):
    config = other_peers.siglip_config()
    other_peers.write_folder(tmp_path, config)
    path = tmp_path / "tokenizer_config.json"
    told = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    }
    peers.write_json(path, told)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for options in ({}, {"trust_remote_code": True}):
        config["text_cfg"]["tokenizer_kwargs"] = options
        peers.write_json(tmp_path / "open_clip_config.json", {"model_cfg": config})
        with pytest.raises(ModelError, match="tokenizer"):
            load_model(tmp_path).tokenizer.encode(["a"])
    assert not (tmp_path / "ran").exists()


def test_a_model_whose_tokenizer_is_missing_still_encodes_images(tmp_path):
    other_peers.write_folder(tmp_path, other_peers.siglip_config())
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    model = load_model(tmp_path)
    assert model.encoder.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 24)
    with pytest.raises(ModelError, match="no tokenizer nobody/siglip"):
        text_features(model, ["a", "b"], options=OPTIONS)


def test_another_tokenizer_is_another_model(tmp_path):
    other_peers.write_folder(tmp_path, other_peers.siglip_config())
    first = load_model(tmp_path).fingerprint
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"bus"', '"car"'))
    assert load_model(tmp_path).fingerprint != first


def test_a_folder_of_hugging_face_s_siglip_gives_its_features(tmp_path):
    peer, processor = other_peers.write_siglip(tmp_path)
    model = load_model(tmp_path)
    opened = peers.pillow(peers.image_file())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    options = {"padding": "max_length", "max_length": 16, "truncation": True, "return_tensors": "pt"}
    with torch.no_grad():
        out = peer(
            pixel_values=processor(opened, return_tensors="pt").pixel_values,
            input_ids=tokenizer(peers.TEXTS, **options).input_ids,
        )
        view = torch.from_numpy(eval_transform(peers.image_file(), **model.preprocessing.transform_options()))
        image = F.normalize(model.encoder.encode_image(view[None]), dim=-1)
    texts = text_features(model, peers.TEXTS, options=OPTIONS)
    assert float((image - out.image_embeds).abs().max()) <= 1e-5
    assert float((texts - out.text_embeds).abs().max()) <= 1e-5
    assert inspect_model(tmp_path)["num_parameters"] == sum(value.numel() for value in peer.parameters())
    assert model.encoder.logit_bias.item() == peer.logit_bias.item()


def test_a_siglip_of_hugging_face_s_that_is_not_whole_is_refused(tmp_path):
    other_peers.write_siglip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in state.items() if "probe" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"cannot be built.*probe"):
        load_model(tmp_path)


def test_a_cached_model_is_found_by_its_name_and_its_tokenizer_beside_the_weights(tmp_path, monkeypatch):
    config = other_peers.siglip_config()
    cache = tmp_path / ".cache" / "clip"
    cache.mkdir(parents=True)
    other_peers.write_folder(cache, config)
    (cache / "open_clip_config.json").unlink()
    (cache / "open_clip_model.safetensors").rename(cache / "siglip.safetensors")
    known = {"url": "https://example.org/siglip.safetensors"} | other_peers.PIXELS
    monkeypatch.setattr("open_clip.pretrained.get_pretrained_cfg", lambda model, tag: known)
    monkeypatch.setattr("declip_cli.interop.cached.read_installed_config", lambda name: config)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = load_model("ViT-Tiny-SigLIP/webli")
    assert model.preprocessing.resize_mode == "squash"
    assert text_features(model, peers.TEXTS, options=OPTIONS).shape == (3, 24)
