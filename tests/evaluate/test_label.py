"""Labels of images without any, against OpenCLIP's own softmax."""

import io

import open_clip
import pytest
import torch
from PIL import Image

from declip_cli.data.catalog import open_dataset
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.label import label_images, read_labels
from declip_cli.interop.read import load_model
from tests.data_sets import MemoryDataset

FP32 = FeatureOptions(precision="fp32", use_cache=False)
LABELS = ["cat", "dog", "red bus"]


def demo_images(num_images):
    demo = open_dataset("demo")
    return MemoryDataset([demo.read(number).image for number in range(num_images)], name="some emoji")


def test_labels_and_probabilities_are_those_of_open_clip(tiny_run, tmp_path):
    dataset = demo_images(8)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a drawing of a {}")
    found = label_images(load_model(tiny_run), dataset, LABELS, templates=str(prompts), options=FP32)
    name = f"local-dir:{tiny_run / 'model'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    images = torch.stack([transform(Image.open(io.BytesIO(dataset.read(n).image)).convert("RGB")) for n in range(8)])
    with torch.inference_mode():
        texts = open_clip.get_tokenizer(name)([f"a drawing of a {label}" for label in LABELS])
        logits, _ = model.eval().get_logits(images, texts)  # (8, 3)
    expected = logits.softmax(dim=1)
    assert [one.label for one in found.predictions] == [LABELS[n] for n in expected.argmax(dim=1).tolist()]
    assert [one.probability for one in found.predictions] == pytest.approx(expected.amax(dim=1).tolist(), abs=2e-3)


def test_a_token_wise_model_labels_too(tiny_token_model):
    found = label_images(tiny_token_model, demo_images(3), LABELS, options=FP32)
    assert all(1 / 3 <= one.probability <= 1 for one in found.predictions)


def test_images_that_cannot_be_read_are_counted(tiny_model):
    images = MemoryDataset([open_dataset("demo").read(0).image, b"junk"], name="two")
    found = label_images(tiny_model, images, LABELS, templates="1", options=FP32)
    assert (found.num_images, found.skipped.num, len(found.predictions)) == (1, 1, 1)


@pytest.mark.parametrize("labels", [[], ["cat"], ["cat", "cat"]])
def test_labels_that_tell_nothing_apart_are_refused(tiny_model, labels):
    with pytest.raises(EvaluateError, match="two labels or more, each once"):
        label_images(tiny_model, demo_images(1), labels, options=FP32)


def test_labels_are_words_or_lines_of_a_file(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n\nred bus, empty\n")
    assert read_labels(str(tmp_path / "labels.txt")) == ["cat", "red bus, empty"]
    assert read_labels(" cat, red bus,") == ["cat", "red bus"]
    assert read_labels("x" * 5000) == ["x" * 5000]
