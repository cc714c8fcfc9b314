"""Evaluations while a model is trained."""

import dataclasses
from pathlib import Path

import pytest

from declip_cli.assets import asset_path
from declip_cli.config_files import flatten
from declip_cli.data.benchmarks.known import known_sets
from declip_cli.data.catalog import open_dataset
from declip_cli.data.files_dataset import Subset
from declip_cli.data.shards.dataset import Shards
from declip_cli.errors import DataError
from declip_cli.evaluate.during_training import Evaluation, Evaluator, make_evaluator
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.retrieve import read_pairs
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


def test_a_folder_with_captions_is_scored_by_retrieval(tmp_path: Path, tiny_model: PretrainedModel):
    for name in ("a", "b"):
        set_layouts.put_image(tmp_path / f"{name}.jpg")
    set_layouts.put_lines(tmp_path / "captions.jsonl", [f'{{"file": "{n}.jpg", "caption": "an {n}"}}' for n in "ab"])
    scores = make_evaluator([str(tmp_path)])(tiny_model)[str(tmp_path)]
    assert scores["text_to_image"]["recall_at_5"] == 1
    assert "top1" not in scores


def test_shards_are_opened_without_reading_an_image(monkeypatch: pytest.MonkeyPatch):
    demo = known_sets()["demo"]
    paths = [str(asset_path(f"demo/{tar}.tar")) for tar in demo.splits["validation"]["tars"]]

    def read(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(Shards, "read", read)
    assert make_evaluator(paths).names == tuple(paths)
    pairs = read_pairs(open_dataset(paths[0]))
    assert (len(pairs.images), len(pairs.texts)) == (1217, 1217)


def test_a_wrong_name_is_told_before_training(tmp_path: Path):
    with pytest.raises(DataError, match="no data set, folder or shard named"):
        make_evaluator(["demmo"])


def test_names_and_scores_are_known_before_training(tmp_path: Path, tiny_model: PretrainedModel):
    set_layouts.put_classes(tmp_path / "photos.v1", ["cat", "dog", "bird"], 2)
    photos = str(tmp_path / "photos.v1")
    evaluate = make_evaluator(["demo", photos, "demo"])
    assert evaluate.names == ("demo", photos)
    assert f"{photos}.top1" in evaluate.score_paths
    assert f"{photos}.top5" not in evaluate.score_paths
    assert {"demo.top5", "demo.rsum", "demo.text_to_image.recall_at_10"} <= set(evaluate.score_paths)
    assert not any("rank" in path for path in evaluate.score_paths)  # less is better there
    evaluations = evaluate(dataclasses.replace(tiny_model, fingerprint=""))
    for path in evaluate.score_paths:
        assert 0 <= flatten(evaluations)[path] <= 6


def test_scores_of_folds_are_known_before_training(tiny_model: PretrainedModel):
    few = Subset(open_dataset("demo"), range(6))
    few.fold_size = 3
    evaluate = Evaluator([Evaluation("few", few, is_retrieval=True)], FeatureOptions(threads=1))
    assert "few.mean_of_2_folds.image_to_text.recall_at_1" in evaluate.score_paths
    scores = evaluate(tiny_model)
    assert all(flatten(scores)[path] >= 0 for path in evaluate.score_paths)
