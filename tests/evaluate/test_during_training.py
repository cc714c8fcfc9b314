"""Evaluations while a model is trained."""

import dataclasses
from pathlib import Path

import pytest

from declip_cli.errors import EvaluateError
from declip_cli.evaluate.during_training import make_evaluator
from declip_cli.model.checkpoint import PretrainedModel
from tests import set_layouts


def test_every_name_gets_its_scores(tmp_path: Path, tiny_model: PretrainedModel):
    set_layouts.put_classes(tmp_path / "photos", ["cat", "dog", "bird"], 2)
    set_layouts.mnist(tmp_path)
    evaluate = make_evaluator([str(tmp_path / "photos"), "mnist"], data_root=tmp_path)
    scores = evaluate(dataclasses.replace(tiny_model, fingerprint=""))
    assert list(scores) == [str(tmp_path / "photos"), "mnist"]
    assert scores["mnist"]["num_images"] == 3
    assert 0 <= scores["mnist"]["top1"] <= scores["mnist"]["top5"] <= 1
    assert scores[str(tmp_path / "photos")]["chance_top1"] == pytest.approx(1 / 3)
    assert all(isinstance(value, int | float) for entry in scores.values() for value in entry.values())


def test_the_demo_is_scored_both_ways(tiny_model: PretrainedModel):
    scores = make_evaluator(["demo"])(dataclasses.replace(tiny_model, fingerprint=""))["demo"]
    assert scores["num_classes"] == 1217
    assert 0 <= scores["top1"] <= scores["top5"] <= 1
    assert set(scores["text_to_image"]) == set(scores["image_to_text"])
    assert 0 <= scores["text_to_image"]["recall_at_10"] <= 1


def test_a_folder_with_captions_is_scored_by_retrieval(tmp_path: Path, tiny_model: PretrainedModel):
    for name in ("a", "b"):
        set_layouts.put_picture(tmp_path / f"{name}.jpg")
    set_layouts.put_lines(tmp_path / "captions.jsonl", [f'{{"file": "{n}.jpg", "caption": "an {n}"}}' for n in "ab"])
    scores = make_evaluator([str(tmp_path)])(tiny_model)[str(tmp_path)]
    assert scores["text_to_image"]["recall_at_5"] == 1
    assert "top1" not in scores


def test_a_wrong_name_is_told_before_training(tmp_path: Path):
    with pytest.raises(EvaluateError, match="no data set or folder named"):
        make_evaluator(["demmo"])
