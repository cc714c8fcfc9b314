"""Zero-shot classification, against OpenCLIP and against plain loops."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from declip_cli.config import ModelConfig
from declip_cli.data.catalog import open_dataset
from declip_cli.data.dataset import Classes, Metric
from declip_cli.data.image_views import eval_transform
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.prompts import load_templates, make_prompts
from declip_cli.evaluate.report import class_report, write_predictions
from declip_cli.evaluate.token_wise import build_token_classifier
from declip_cli.evaluate.zeroshot import ZeroshotReport, zeroshot
from declip_cli.interop.read import load_model
from declip_cli.model.architectures import find_architecture
from declip_cli.model.checkpoint import PretrainedModel, save_model
from declip_cli.model.clip import DualEncoder
from tests.data_sets import MemoryDataset

FP32 = FeatureOptions(precision="fp32", use_cache=False)


def demo_set(num_images: int, *, num_classes: int = 40, metric: Metric = "accuracy") -> MemoryDataset:
    """Images of the demo corpus; names beyond the images' own are distractors."""
    demo = open_dataset("demo")
    return MemoryDataset(
        [demo.read(number).image for number in range(num_images)],
        labels=list(demo.labels[:num_images]),
        classes=Classes(names=demo.classes.names[:num_classes], metric=metric),
        name="some emoji",
    )


def test_predictions_equal_those_of_open_clip(tiny_run: Path):
    dataset = demo_set(24)
    templates = ("a photo of a {}.", "a drawing of the {}.", "{}")
    report = zeroshot(load_model(tiny_run), dataset, templates=templates, options=FP32)
    assert_equal_to_open_clip(report, tiny_run / "model", dataset, templates)


def test_predictions_of_a_trained_model_equal_those_of_open_clip(tmp_path: Path):
    dataset = demo_set(32)
    config = ModelConfig(arch="vit-tiny32")
    torch.manual_seed(0)
    encoder = DualEncoder(find_architecture(config))
    train_on(encoder, dataset, num_steps=20)
    save_model(encoder, tmp_path / "model", config=config, method="clip")
    report = zeroshot(load_model(tmp_path), dataset, templates=("{}",), options=FP32)
    assert report.top1 > 0.2  # chance is 1 in 40
    assert_equal_to_open_clip(report, tmp_path / "model", dataset, ("{}",))


def train_on(encoder: DualEncoder, dataset: MemoryDataset, *, num_steps: int) -> None:
    """Fit images to their names with CLIP's loss."""
    views = [eval_transform(image, side_px=32, resize_px=32) for image in dataset.images]
    images = torch.stack([torch.from_numpy(view) for view in views])
    names = [dataset.classes.names[label] for label in dataset.labels]
    tokens = Tokenizer(encoder.architecture.text.context_length).encode(names, pad_to_context=False)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    right = torch.arange(len(images))
    for _ in range(num_steps):
        rows, columns = (F.normalize(f, dim=-1) for f in (encoder.encode_image(images), encoder.encode_text(tokens)))
        logits = 20 * rows @ columns.T
        loss = F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_equal_to_open_clip(
    report: ZeroshotReport, folder: Path, dataset: MemoryDataset, templates: Sequence[str]
) -> None:
    """Let OpenCLIP read weights, images and prompts by itself and compare predictions."""
    name = f"local-dir:{folder}"
    peer, _, preprocess = open_clip.create_model_and_transforms(name)
    fills = [template.format for template in templates]
    classifier = open_clip.build_zero_shot_classifier(
        peer.eval(), open_clip.get_tokenizer(name), dataset.classes.names, fills
    )  # (D, C)
    images = torch.stack([preprocess(open_on_white(image)) for image in dataset.images])
    with torch.no_grad():
        scores, ranked = (peer.encode_image(images, normalize=True) @ classifier).topk(5)  # (N, 5)
    assert torch.equal(report.predictions.ranked, ranked)
    torch.testing.assert_close(report.predictions.scores, scores, atol=2e-6, rtol=1e-5)
    right = ranked[:, 0] == torch.tensor(dataset.labels)
    assert report.top1 == pytest.approx(float(right.float().mean()))


def test_a_model_of_open_clip_predicts_here_what_it_predicts_there(tmp_path: Path):
    config = {
        "embed_dim": 48,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    torch.manual_seed(3)
    peer = open_clip.CLIP(**config).eval()
    preprocessing = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    preprocessing |= {"interpolation": "bicubic", "resize_mode": "shortest", "size": 32}
    written = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(written))
    save_file(peer.state_dict(), tmp_path / "open_clip_model.safetensors")

    dataset = demo_set(16)
    report = zeroshot(load_model(tmp_path), dataset, templates="8", options=FP32)
    assert_equal_to_open_clip(report, tmp_path, dataset, load_templates("8"))


def open_on_white(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def test_report_has_the_fields_of_the_command(tiny_model: PretrainedModel):
    dataset = demo_set(6)
    dataset.note = "told apart"
    report = zeroshot(tiny_model, dataset, options=FP32).to_json()
    assert report["dataset"] == "some emoji"
    assert report["model"] == "random-0"
    assert (report["num_images"], report["num_classes"], report["num_templates"]) == (6, 40, 80)
    assert (report["templates"], report["precision"]) == ("80", "fp32")
    assert report["metric"] == "accuracy"
    assert report["score"] == report["top1"]
    assert 0 <= report["top1"] <= report["top5"] <= 1
    assert report["chance_top5"] == pytest.approx(5 / 40)
    assert report["note"] == "told apart"
    assert "skipped" not in report
    json.dumps(report, allow_nan=False)


def test_the_metric_of_the_set_decides_the_score(tiny_model: PretrainedModel):
    report = zeroshot(tiny_model, demo_set(6, metric="mean_per_class"), options=FP32)
    assert report.score == report.mean_per_class


def test_prompts_that_are_too_long_are_counted(tiny_model: PretrainedModel):
    templates = ("{}", "a {} and one two three four five six seven eight nine ten eleven")
    report = zeroshot(tiny_model, demo_set(4, num_classes=6), templates=templates, options=FP32)
    found = report.to_json()
    assert found["num_truncated_prompts"] == found["num_prompts_cut"] == 6  # the latter until the next version
    whole = zeroshot(tiny_model, demo_set(4, num_classes=6), templates=("{}",), options=FP32)
    assert not {"num_truncated_prompts", "num_prompts_cut"} & set(whole.to_json())


def test_top5_needs_five_classes(tiny_model: PretrainedModel):
    report = zeroshot(tiny_model, demo_set(4, num_classes=4), options=FP32)
    assert report.top5 is None
    assert "top5" not in report.to_json()
    assert "chance_top5" not in report.to_json()


def test_a_single_class_is_refused(tiny_model: PretrainedModel):
    with pytest.raises(EvaluateError, match="only the class"):
        zeroshot(tiny_model, demo_set(1, num_classes=1), options=FP32)


def test_unreadable_images_are_omitted_and_reported(tiny_model: PretrainedModel):
    dataset = demo_set(3)
    dataset.images.insert(1, b"no image")
    dataset.labels.insert(1, 3)
    dataset.keys = ["a", "broken", "b", "c"]
    report = zeroshot(tiny_model, dataset, options=FP32)
    assert report.num_images == 3
    assert report.predictions.labels.tolist() == [0, 1, 2]
    assert report.predictions.keys == ["a", "b", "c"]
    assert report.to_json()["num_skipped"] == 1
    (entry,) = report.to_json()["skipped"].values()
    assert entry == {"count": 1, "first": "broken"}


def test_token_wise_models_are_scored_token_by_token(tiny_token_model: PretrainedModel):
    dataset = demo_set(5)
    first = zeroshot(tiny_token_model, dataset, options=FP32)
    cached = FeatureOptions(precision="fp32")
    for _ in range(2):
        again = zeroshot(tiny_token_model, dataset, options=cached)
        assert torch.equal(first.predictions.ranked, again.predictions.ranked)
    classes = build_token_classifier(tiny_token_model, make_prompts(dataset.classes.names, "80"), options=FP32)
    view = torch.from_numpy(eval_transform(dataset.images[2], side_px=16, resize_px=18))
    with torch.no_grad():
        scores = classes.score(tiny_token_model.encoder.encode_image_tokens(view[None]))
    torch.testing.assert_close(first.predictions.scores[2], scores[0].topk(5).values, atol=1e-6, rtol=1e-5)


def test_predictions_are_written_line_by_line(tiny_model: PretrainedModel, tmp_path: Path):
    report = zeroshot(tiny_model, demo_set(4), options=FP32)
    path = tmp_path / "predictions.jsonl"
    assert write_predictions(path, {"some emoji": report.predictions}) == 4
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert list(lines[0]) == ["path", "label", "is_right", "top5", "scores"]
    assert sum(line["is_right"] for line in lines) == round(report.top1 * 4)
    assert all(line["scores"] == sorted(line["scores"], reverse=True) for line in lines)
    assert not list(tmp_path.glob("*.tmp"))
    write_predictions(path, {"a": report.predictions, "b": report.predictions})
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["dataset"] for line in lines] == ["a"] * 4 + ["b"] * 4


def test_predictions_cannot_go_into_a_missing_folder(tiny_model: PretrainedModel, tmp_path: Path):
    report = zeroshot(tiny_model, demo_set(4), options=FP32)
    with pytest.raises(EvaluateError, match="cannot write the predictions"):
        write_predictions(tmp_path / "no" / "file", {"x": report.predictions})


def test_class_report_counts_classes_and_confusions(tiny_model: PretrainedModel):
    dataset = demo_set(5)
    dataset.labels = [0, 0, 0, 1, 1]
    predictions = zeroshot(tiny_model, dataset, options=FP32).predictions
    ranked = torch.tensor([[0], [7], [7], [1], [1]])
    report = class_report(replace(predictions, ranked=ranked))
    names = predictions.class_names
    assert report["per_class"] == [
        {"class": names[0], "num_images": 3, "accuracy": pytest.approx(1 / 3)},
        {"class": names[1], "num_images": 2, "accuracy": 1.0},
    ]
    assert report["confused"] == [{"class": names[0], "predicted": names[7], "count": 2, "share": pytest.approx(2 / 3)}]


def test_confidence_is_the_probability_at_the_models_scale(tiny_model: PretrainedModel):
    """With three classes all cosines are among the best five, so the softmax can be written out."""
    found = zeroshot(tiny_model, demo_set(3, num_classes=3)).predictions
    scale = float(tiny_model.encoder.logit_scale.detach().exp())
    powers = np.exp(scale * found.scores.double().numpy())  # (3, 3)
    np.testing.assert_allclose(found.confidence, powers[:, 0] / powers.sum(1), rtol=1e-5)


def test_predictions_read_the_images_they_name(tiny_model: PretrainedModel):
    dataset = demo_set(6)
    found = zeroshot(tiny_model, dataset).predictions
    assert [found.read(row) for row in range(6)] == [dataset.read(number).image for number in range(6)]
