"""Retrieval reports: fields, several captions, unreadable images, folds, token-wise models."""

import torch

from declip_cli.data.catalog import open_dataset
from declip_cli.data.files_dataset import Subset
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.metrics import paired_ranks
from declip_cli.evaluate.retrieve import read_pairs, retrieve
from declip_cli.evaluate.texts import text_features
from tests.data_sets import MemoryDataset

FRESH = FeatureOptions(use_cache=False, threads=1, precision="fp32")
WORDS = ["red", "green", "blue", "cat", "dog", "tree", "house", "car"]


def make_set(make_image, num: int, *, fold_size: int = 0, broken: tuple[int, ...] = ()) -> MemoryDataset:
    return MemoryDataset(
        [b"junk" if number in broken else make_image(number) for number in range(num)],
        captions=[tuple(f"a {WORDS[number % 8]} and {WORDS[c]} {number}" for c in (1, 2)) for number in range(num)],
        fold_size=fold_size,
    )


def test_report_has_the_promised_fields(tiny_model, make_image):
    report = retrieve(tiny_model, make_set(make_image, 12), options=FRESH).to_json()
    assert {"dataset", "model", "num_images", "num_texts", "rsum", "seconds"} <= report.keys()
    assert (report["num_images"], report["num_texts"]) == (12, 24)
    for direction in ("image_to_text", "text_to_image"):
        assert {"recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank"} == report[direction].keys()
        recalls = [report[direction][f"recall_at_{k}"] for k in (1, 5, 10)]
        assert recalls == sorted(recalls)
    six = [report[d][f"recall_at_{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert report["rsum"] == sum(six)


def test_scores_are_those_of_the_features(tiny_model, make_image):
    made = make_set(make_image, 15)
    report = retrieve(tiny_model, made, options=FRESH)
    images = image_features(tiny_model, made, options=FRESH).features
    texts = text_features(tiny_model, [text for captions in made.texts for text in captions], options=FRESH)
    ranks = paired_ranks(images, texts, torch.arange(30) // 2)
    assert report.scores["text_to_image"]["mean_rank"] == float(ranks.text_to_image.double().mean())
    assert report.scores["image_to_text"]["recall_at_5"] == float((ranks.image_to_text <= 5).double().mean())


def test_captions_of_unreadable_images_are_left_out(tiny_model, make_image):
    report = retrieve(tiny_model, make_set(make_image, 12, broken=(3, 7)), options=FRESH).to_json()
    assert (report["num_images"], report["num_texts"]) == (10, 20)
    assert report["num_skipped"] == 2
    assert next(iter(report["skipped"].values()))["first"] == "3.jpg"


def test_folds_are_scored_among_themselves_and_averaged(tiny_model, make_image):
    whole = retrieve(tiny_model, make_set(make_image, 12, fold_size=4), options=FRESH).to_json()
    folds = whole["mean_of_3_folds"]
    assert folds["num_images"] == 4
    made = make_set(make_image, 12)
    ranks = []
    for fold in range(3):
        part = Subset(made, range(4 * fold, 4 * fold + 4))
        ranks.append(retrieve(tiny_model, part, options=FRESH).scores["text_to_image"]["mean_rank"])
    assert abs(folds["text_to_image"]["mean_rank"] - sum(ranks) / 3) < 1e-9


def test_token_wise_models_are_scored_token_by_token(tiny_token_model, make_image):
    report = retrieve(tiny_token_model, make_set(make_image, 9, broken=(2,)), options=FRESH).to_json()
    assert (report["num_images"], report["num_texts"]) == (8, 16)
    assert 1 <= report["text_to_image"]["mean_rank"] <= 8


def test_demo_is_the_vendor_never_trained_on():
    demo = read_pairs(open_dataset("demo"))
    assert len(demo.images) == len(demo.texts) == 1217
    assert demo.images.key(0).startswith("twitter/")
