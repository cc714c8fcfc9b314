"""One model in all formats: the same zero-shot predictions here, in OpenCLIP, in transformers and in onnxruntime."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import re

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from declip_cli.data.tokenizer import Tokenizer
from declip_cli.interop import export_onnx, export_open_clip
from declip_cli.interop.export import export
from declip_cli.interop.export_hugging_face import embed as embed_by_transformers
from declip_cli.interop.model_card import Card
from declip_cli.interop.read import load_model
from declip_cli.interop.run_facts import read_run_facts
from declip_cli.interop.sample import Sample, demo_sample, embed, views_of
from declip_cli.model.clip import normalize
from tests.interop.small_models import RESNET, TEXT, VIT, image_file, model_of
from tests.train.small_runs import run, small_config

PICTURE = image_file()
NAMES = ["red heart", "guitar", "car", "dog", "flag", "clock", "smiling face", "house"]


def random_224():
    vision = dataclasses.replace(VIT, patch_side_px=32, num_layers=1)
    text = dataclasses.replace(TEXT, context_length=77, num_layers=1)
    return model_of(vision, text, side=224, interpolation="bicubic"), None


def trained(folder):
    config = small_config(model={"embed_dim": 8}, method={"name": "declip"}, train={"steps": 4, "batch_size": 16})
    run(config, folder, evaluate=lambda model: {"demo": {"top1": 0.25, "text_to_image": {"recall_at_1": 0.5}}})
    return load_model(folder), folder


@pytest.fixture(scope="module")
def operators_are_read_once():
    """Keep what torch's exporter reads anew for every graph, seconds long: the source of its hundreds of operators."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError, AttributeError):  # torch's own affairs, which it may change
            apis = importlib.import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
            patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="module", params=["trained on the demo", "224 px"])
def everywhere(request, tmp_path_factory, operators_are_read_once):
    """A model, the folder of each of its exports, and how far each is from the model."""
    folder = tmp_path_factory.mktemp("exports")
    model, path = trained(folder / "run") if "demo" in request.param else random_224()
    facts = read_run_facts(path or folder)
    reports = {}
    for to in ("openclip", "huggingface", "onnx"):
        card = Card(name=f"small-{to}", license="mit" if path else "", facts=facts)
        reports[to] = export(model, to, folder / to, card=card)
    return model, {to: report.out for to, report in reports.items()}, reports


@pytest.fixture(scope="module")
def of_tokens(tmp_path_factory, operators_are_read_once):
    """A FILIP model on a ResNet, and its graphs."""
    text, out = dataclasses.replace(TEXT, num_layers=1), tmp_path_factory.mktemp("tokens")
    model = model_of(RESNET, text, method="filip", crop_at="floor")
    report = export(model, "onnx", out, card=Card(name="tokens"))
    return model, out, report


def test_every_export_agrees_in_float32(everywhere):
    for report in everywhere[2].values():
        assert report.differences["max_abs_difference"] <= 1e-5


def test_zero_shot_predictions_are_identical_everywhere(everywhere):
    model, folders, _ = everywhere
    sample = Sample(images=demo_sample().images, texts=[f"a drawing of a {name}" for name in NAMES])

    def predictions(found):
        scores = found.images @ found.texts.T  # (N, C)
        # Random weights give most images one class; what sets an image apart from the others differs.
        return scores.argmax(1).tolist(), (scores - scores.mean(0)).argmax(1).tolist()

    expected = predictions(embed(model, sample))
    assert len(set(expected[1])) > 3
    _, by_its_processor, _ = embed_by_transformers(folders["huggingface"], sample, model.preprocessing)
    assert predictions(by_its_processor) == expected
    assert predictions(export_open_clip.embed(folders["openclip"], sample)) == expected
    assert predictions(export_onnx.embed(folders["onnx"], sample)) == expected


def test_graphs_take_any_number_of_images_and_any_length_of_texts(everywhere):
    model, folders, _ = everywhere
    session = onnxruntime.InferenceSession(folders["onnx"] / "image_encoder.onnx")
    (pixels,), (embeds,) = session.get_inputs(), session.get_outputs()
    side = model.image_side_px
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["batch", side, side, 3])
    assert (embeds.name, embeds.shape) == ("image_embeds", ["batch", model.encoder.architecture.embed_dim])
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["preprocessing"]) == model.preprocessing.to_json()
    assert float(told["logit_scale"]) == pytest.approx(model.encoder.logit_scale.exp().item())
    session = onnxruntime.InferenceSession(folders["onnx"] / "text_encoder.onnx")
    (ids,), (embeds,) = session.get_inputs(), session.get_outputs()
    assert (ids.name, ids.type, ids.shape) == ("input_ids", "tensor(int64)", ["batch", "length"])
    tokenizer = Tokenizer(model.context_length)
    for texts, is_padded in ((["a"], False), (["a dog", "a very small house", "x"], True), ([""], False)):
        tokens = tokenizer.encode(texts, pad_to_context=is_padded)
        with torch.no_grad():
            expected = normalize(model.encoder.encode_text(tokens))
        (found,) = session.run(["text_embeds"], {"input_ids": tokens.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-6)


def run_snippet(folder, monkeypatch, capsys, image=PICTURE):
    """Run the code of a card as a reader would, beside an image; return the numbers that it prints."""
    (folder / "picture.jpg").write_bytes(image)
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", printed)]


def test_the_code_of_each_card_runs_and_gives_what_the_model_gives_here(everywhere, monkeypatch, capsys):
    model, folders, _ = everywhere
    sample = Sample(images=[Image.open(io.BytesIO(image_file()))], texts=["a photo of a cat", "a photo of a dog"])
    found = embed(model, sample)
    cosines = found.images @ found.texts.T
    probabilities = (model.encoder.logit_scale.exp() * cosines).softmax(-1)
    for to, folder in folders.items():
        expected = (cosines if to == "onnx" else probabilities)[0].tolist()
        assert run_snippet(folder, monkeypatch, capsys) == pytest.approx(expected, abs=2e-3), to


def test_cards_hold_what_the_hub_and_a_reader_want_to_know(everywhere):
    model, folders, _ = everywhere
    libraries = {"openclip": "open_clip", "huggingface": "transformers", "onnx": "onnx"}
    for to, folder in folders.items():
        card = (folder / "README.md").read_text()
        _, front, body = card.split("---\n", 2)
        front = yaml.safe_load(front)
        assert front["library_name"] == libraries[to]
        assert front["pipeline_tag"] == "zero-shot-image-classification"
        assert front["tags"] == list(dict.fromkeys(["clip", "declip", model.method]))
        assert f"# small-{to}\n" in body
        if model.method == "declip":
            assert front["license"] == "mit"
            for line in (
                "| data | demo |",
                "| samples seen | 64 |",
                "| train.batch_size | 16 |",
                "| demo | top1 | 0.25 |",
                "| demo | text_to_image.recall_at_1 | 0.5 |",
                "After step 4.",
                "The shorter side is resized to 32 px, the 32 × 32 px in the middle",
            ):
                assert line in body
        else:
            assert "license" not in front
            assert "Not stated." in body
            assert "## Training" not in body
            assert "(bicubic, antialiased)" in body


def test_a_model_that_compares_token_by_token_is_two_graphs_of_tokens(of_tokens, monkeypatch, capsys):
    model, out, report = of_tokens
    assert report.differences["max_abs_difference"] <= 1e-5
    text = onnxruntime.InferenceSession(out / "text_encoder.onnx")
    assert [output.name for output in text.get_outputs()] == ["text_token_embeds", "text_token_mask"]
    image = image_file(width=285)  # 35 px, of which 3 are cut off
    views = views_of([Image.open(io.BytesIO(image))], model.preprocessing)
    tokens = Tokenizer(model.context_length).encode(["a photo of a cat", "a photo of a dog"])
    with torch.no_grad():
        patches = normalize(model.encoder.encode_image_tokens(views))[0]
        words, mask = model.encoder.encode_text_tokens(tokens)
    expected = [
        float((patches @ normalize(one)[is_word].T).amax(1).mean()) for one, is_word in zip(words, mask, strict=True)
    ]
    assert run_snippet(out, monkeypatch, capsys, image) == pytest.approx(expected, abs=1e-5)
