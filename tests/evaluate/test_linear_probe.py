"""The probe chooses its penalty on validation images, refits, and tests once."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from declip_cli.errors import EvaluateError
from declip_cli.evaluate import linear_probe as module
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.linear_probe import L2_GRID, Labeled, linear_probe, search_l2
from declip_cli.evaluate.logistic import LogisticProblem
from declip_cli.evaluate.probe_split import choose_shots, hold_out, open_probe_sets

COLORS = {"red": (220, 30, 30), "green": (20, 200, 40), "dark_blue": (10, 20, 120)}
FRESH = FeatureOptions(use_cache=False, threads=1)


def draw_classes(root: Path, splits: dict[str, int], *, names=tuple(COLORS)) -> Path:
    for split, count in splits.items():
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                shade = tuple(min(255, value + 3 * number) for value in COLORS[name])
                Image.new("RGB", (20, 18), shade).save(folder / f"{number}.png")
    return root


def test_colors_are_told_apart_and_the_report_says_what_was_done(tmp_path, tiny_model):
    sets = open_probe_sets(str(draw_classes(tmp_path, {"train": 6, "val": 3, "test": 4})))
    report = linear_probe(tiny_model, sets, options=FRESH).to_json()
    assert report["top1"] == report["mean_per_class"] == report["score"] == 1.0
    assert (report["num_train"], report["num_val"], report["num_test"]) == (18, 9, 12)
    assert (report["num_classes"], report["feature_dim"]) == (3, 24)
    assert report["l2"] in L2_GRID
    assert report["majority_top1"] == pytest.approx(1 / 3)
    assert {"dataset", "model", "features", "val_accuracy", "metric", "seconds"} <= report.keys()
    assert "raw_pixels" not in report


def test_projected_features_are_those_of_the_shared_space(tmp_path, tiny_model):
    sets = open_probe_sets(str(draw_classes(tmp_path, {"train": 4, "val": 2, "test": 2})))
    assert linear_probe(tiny_model, sets, features="post", options=FRESH).feature_dim == 10


def test_result_is_scikit_learns_on_train_and_validation_together(tmp_path, tiny_model):
    sets = open_probe_sets(str(draw_classes(tmp_path, {"train": 5, "val": 3, "test": 4})))
    report = linear_probe(tiny_model, sets, options=FRESH)

    def encode(part):
        return image_features(tiny_model, part, projected=False, normalize=False, options=FRESH).features

    features = torch.cat([encode(sets.train), encode(sets.val)]).double()
    labels = [*sets.train.labels, *sets.val.labels]
    peer = LogisticRegression(C=1 / report.l2, tol=1e-9, max_iter=10_000).fit(features, labels)
    assert peer.score(encode(sets.test).double(), sets.test.labels) == report.top1


def test_token_wise_models_give_the_mean_of_their_patches(tmp_path, tiny_token_model):
    sets = open_probe_sets(str(draw_classes(tmp_path, {"train": 4, "val": 2, "test": 2})))
    assert linear_probe(tiny_token_model, sets, features="pre", options=FRESH).feature_dim == 24
    assert linear_probe(tiny_token_model, sets, features="post", options=FRESH).feature_dim == 6


def test_without_validation_images_a_fifth_is_held_out_and_told(tmp_path, tiny_model):
    sets = open_probe_sets(str(draw_classes(tmp_path, {"train": 10, "test": 2})))
    report = linear_probe(tiny_model, sets, options=FRESH).to_json()
    assert (report["num_train"], report["num_val"]) == (24, 6)
    assert "held out" in report["notes"][0]


def test_shots_train_on_so_many_of_each_class_and_validate_on_the_same_images(tmp_path, tiny_model):
    sets = open_probe_sets(str(draw_classes(tmp_path, {"train": 10, "test": 2})))
    one = linear_probe(tiny_model, sets, shots=1, seed=3, options=FRESH).to_json()
    four = linear_probe(tiny_model, sets, shots=4, seed=3, options=FRESH).to_json()
    assert (one["num_train"], four["num_train"]) == (3, 12)
    assert one["num_val"] == four["num_val"] == 6
    assert (one["shots"], one["seed"]) == (1, 3)


def test_unreadable_images_are_left_out_and_counted(tmp_path, tiny_model):
    root = draw_classes(tmp_path, {"train": 4, "val": 2, "test": 3})
    (root / "train/red/1.png").write_bytes(b"not an image")
    (root / "test/green/0.png").write_bytes(b"")
    report = linear_probe(tiny_model, open_probe_sets(str(root)), options=FRESH).to_json()
    assert (report["num_train"], report["num_test"]) == (11, 8)
    assert report["num_skipped"] == 2
    assert any(entry["first"].endswith("train/red/1.png") for entry in report["skipped"].values())


def test_baseline_scores_the_pixels(tmp_path, tiny_model):
    sets = open_probe_sets(str(draw_classes(tmp_path, {"train": 4, "val": 2, "test": 2})))
    pixels = linear_probe(tiny_model, sets, with_baseline=True, options=FRESH).to_json()["raw_pixels"]
    assert pixels["side_px"] == 16
    assert pixels["top1"] == 1.0


def test_test_split_without_a_class_keeps_the_numbers_of_the_training_split(tmp_path):
    draw_classes(tmp_path, {"train": 2})
    draw_classes(tmp_path, {"test": 2}, names=("red",))
    sets = open_probe_sets(str(tmp_path))
    assert sets.class_names == ("dark blue", "green", "red")
    assert list(sets.test.labels) == [2, 2]


def test_class_without_training_images_is_refused(tmp_path):
    draw_classes(tmp_path, {"train": 2}, names=("red", "green"))
    draw_classes(tmp_path, {"test": 2})
    with pytest.raises(EvaluateError, match="'dark blue', which has no training images"):
        open_probe_sets(str(tmp_path))


def test_missing_split_is_named(tmp_path):
    draw_classes(tmp_path, {"train": 2})
    with pytest.raises(EvaluateError, match="no split 'test'") as caught:
        open_probe_sets(str(tmp_path))
    assert str(tmp_path / "test") in caught.value.remedy


def test_demo_tests_on_other_emoji_by_another_vendor():
    sets = open_probe_sets("demo")
    assert len(sets.class_names) == 9
    assert sets.raw_pixels
    shown = []
    for part, vendors in (
        (sets.train, {"google", "emojione2"}),
        (sets.val, {"google", "emojione2"}),
        (sets.test, {"twitter"}),
    ):
        keys = [Path(part.key(number)) for number in range(len(part))]
        assert {key.parent.name for key in keys} == vendors
        assert set(part.labels) == set(range(9))
        shown.append({key.stem for key in keys})
    assert not shown[0] & shown[1]
    assert not shown[0] & shown[2]
    assert not shown[1] & shown[2]
    assert len(shown[0] | shown[1] | shown[2]) == 1217


def test_grid_has_eight_values_a_decade_between_the_ends():
    assert len(L2_GRID) == 97
    assert L2_GRID[0] == pytest.approx(1e-6)
    assert L2_GRID[48] == 1.0
    assert L2_GRID[-1] == pytest.approx(1e6)
    assert L2_GRID[8] / L2_GRID[0] == pytest.approx(10)


@pytest.mark.parametrize("peak", [0, 3, 37, 50, 96])
def test_search_finds_the_peak_of_a_smooth_score_with_15_fits(monkeypatch, peak):
    tried = []

    class Problem:
        num_classes = 2

        def fit(self, l2, *, start, is_final):
            tried.append(l2)
            return l2

    monkeypatch.setattr(module, "_validate", lambda l2, *_: (-abs(L2_GRID.index(l2) - peak), 0.0))
    found, score = search_l2(Problem(), Labeled(torch.empty(0), torch.empty(0)), "accuracy")
    assert found == L2_GRID[peak]
    assert score == 0
    assert len(tried) == len(set(tried)) <= 15


def test_of_equal_accuracies_the_surer_classifier_wins():
    torch.manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 3) + 6 * labels[:, None]
    val = Labeled(features[40:], labels[40:])
    fit, score = search_l2(LogisticProblem(features[:40], labels[:40], 2), val, "accuracy")
    assert score == 1.0
    assert fit.l2 < 1


def test_hold_out_takes_a_fifth_of_each_class_by_seed():
    labels = [0] * 10 + [1] * 5 + [2]
    kept, held = hold_out(labels, seed=0)
    assert sorted(kept + held) == list(range(16))
    assert [labels[number] for number in held] == [0, 0, 1]
    assert hold_out(labels, seed=0) == (kept, held)
    assert any(hold_out(labels, seed=seed)[1] != held for seed in (1, 2, 3))


def test_nothing_to_hold_out_is_an_error():
    with pytest.raises(EvaluateError, match="no class has two training images"):
        hold_out([0, 1, 2], seed=0)


def test_more_shots_contain_the_fewer():
    labels = [0] * 9 + [1] * 9
    few = choose_shots(labels, range(18), shots=2, seed=5, names=("a", "b"))
    many = choose_shots(labels, range(18), shots=6, seed=5, names=("a", "b"))
    assert len(few) == 4
    assert set(few) < set(many)


def test_more_shots_than_images_name_the_class():
    with pytest.raises(EvaluateError, match=r"--shots 3 .* 'b' has \(2 "):
        choose_shots([0, 0, 0, 1, 1], range(5), shots=3, seed=0, names=("a", "b"))
