"""The classifier reaches scikit-learn's optimum, from any start, for any penalty."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from declip_cli.errors import EvaluateError
from declip_cli.evaluate.logistic import LogisticFit, LogisticProblem


def make_samples(num: int, dim: int, num_classes: int, *, separation: float, seed: int = 0):
    """Draw features with a steep spectrum and an offset, as those of a trained tower have."""
    random = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1) ** -0.5
    labels = random.integers(0, num_classes, num)
    centers = random.standard_normal((num_classes, dim)) * spread * separation
    features = centers[labels] + random.standard_normal((num, dim)) * spread + random.standard_normal(dim)
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


def objective(features, labels, weight, bias, l2):
    """Compute mean cross-entropy + l2 / (2 N) |W|² in float64, straight from its definition."""
    logits = features.double() @ weight.double().T + bias.double()
    return float(F.cross_entropy(logits, labels) + l2 / (2 * len(labels)) * weight.double().square().sum())


@pytest.mark.parametrize("l2", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_objective_is_scikit_learns_optimum(l2, num_classes):
    features, labels = make_samples(400, 12, num_classes, separation=0.5)
    fit = LogisticProblem(features, labels, num_classes).fit(l2)
    peer = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(features.double(), labels)
    weight, bias = torch.from_numpy(peer.coef_), torch.from_numpy(peer.intercept_)
    if num_classes == 2:  # scikit-learn holds one row w for the softmax of -w/2 and w/2, penalized as |w|²
        return _compare_two_classes(features, labels, fit, weight, bias, l2)
    best = objective(features, labels, weight, bias, l2)
    assert fit.has_converged
    assert fit.objective == pytest.approx(best, rel=1e-6)
    assert objective(features, labels, fit.weight, fit.bias, l2) == pytest.approx(best, rel=1e-6)
    assert torch.allclose(fit.weight, weight, atol=1e-2 * float(weight.abs().max()))


def _compare_two_classes(features, labels, fit, weight, bias, l2):
    """Compare with the symmetric optimum of the softmax, whose penalty is half the one-row penalty."""
    peer = LogisticRegression(C=2 / l2, tol=1e-10, max_iter=10_000).fit(features.double(), labels)
    both = torch.from_numpy(np.concatenate([-peer.coef_, peer.coef_])) / 2
    biases = torch.from_numpy(np.concatenate([-peer.intercept_, peer.intercept_])) / 2
    assert fit.objective == pytest.approx(objective(features, labels, both, biases, l2), rel=1e-6)


def test_reported_objective_is_that_of_the_returned_weights_when_classes_are_separable():
    features, labels = make_samples(300, 30, 4, separation=3.0)
    fit = LogisticProblem(features, labels, 4).fit(1e-4)
    assert fit.objective == pytest.approx(objective(features, labels, fit.weight, fit.bias, 1e-4), rel=1e-4)
    peer = LogisticRegression(C=1e4, tol=1e-12, max_iter=100_000).fit(features.double(), labels)
    best = objective(features, labels, torch.from_numpy(peer.coef_), torch.from_numpy(peer.intercept_), 1e-4)
    assert fit.objective <= best * (1 + 1e-5)


def test_start_changes_the_way_not_the_end():
    features, labels = make_samples(500, 20, 3, separation=0.7)
    problem = LogisticProblem(features, labels, 3)
    cold = problem.fit(0.1)
    warm = problem.fit(0.1, start=problem.fit(1.0))
    again = problem.fit(0.1, start=cold)
    assert warm.objective == pytest.approx(cold.objective, rel=1e-6)
    assert again.num_iterations < cold.num_iterations


def test_search_precision_reaches_the_same_classifier():
    features, labels = make_samples(500, 20, 3, separation=0.7)
    problem = LogisticProblem(features, labels, 3)
    quick, final = problem.fit(1.0, is_final=False), problem.fit(1.0)
    assert quick.objective == pytest.approx(final.objective, rel=1e-5)


def test_chunks_do_not_change_the_gradient(monkeypatch):
    features, labels = make_samples(70, 6, 3, separation=0.7)
    whole = LogisticProblem(features, labels, 3).fit(1.0)
    monkeypatch.setattr("declip_cli.evaluate.logistic._CHUNK_ROWS", 16)
    assert LogisticProblem(features, labels, 3).fit(1.0).objective == pytest.approx(whole.objective, rel=1e-9)


def test_logits_are_weight_times_features_plus_bias():
    fit = LogisticFit(
        weight=torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]], dtype=torch.float64),
        bias=torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64),
        l2=1.0,
        objective=0.0,
        num_iterations=0,
        has_converged=True,
    )
    assert fit.logits(torch.tensor([[2.0, 1.0]])).tolist() == [[4.5, -1.0, 5.0]]  # (1, 2) -> (1, 3)


def test_class_without_samples_is_never_predicted():
    features, labels = make_samples(200, 8, 3, separation=1.0)
    fit = LogisticProblem(features, labels * 2, 6).fit(1.0)  # classes 0, 2, 4 of 6
    logits = fit.logits(features)
    assert logits.shape == (200, 6)
    assert set(logits.argmax(1).tolist()) <= {0, 2, 4}
    dense = LogisticProblem(features, labels, 3).fit(1.0)
    assert torch.allclose(fit.weight[::2], dense.weight)


def test_features_without_spread_in_a_direction_are_no_problem():
    features, labels = make_samples(100, 6, 3, separation=1.0)
    features = torch.cat([features, torch.full((100, 2), 7.0), features[:, :1]], 1)  # (100, 9)
    fit = LogisticProblem(features, labels, 3).fit(1e-3)
    assert fit.has_converged
    assert torch.isfinite(fit.weight).all()


def test_few_iterations_are_told():
    features, labels = make_samples(300, 30, 4, separation=0.5)
    fit = LogisticProblem(features, labels, 4).fit(1e-3, max_iterations=2)
    assert not fit.has_converged
    assert fit.num_iterations == 2


def test_one_class_is_refused():
    with pytest.raises(EvaluateError, match=r"at least two classes \(found 1\)"):
        LogisticProblem(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64), 4)


def test_broken_features_are_refused():
    features = torch.randn(4, 3)
    features[1, 2] = torch.nan
    with pytest.raises(EvaluateError, match="not finite"):
        LogisticProblem(features, torch.tensor([0, 1, 0, 1]), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_finds_the_same_optimum():
    features, labels = make_samples(2000, 40, 5, separation=0.5)
    here = LogisticProblem(features, labels, 5).fit(1.0)
    there = LogisticProblem(features.cuda(), labels.cuda(), 5).fit(1.0)
    assert there.objective == pytest.approx(here.objective, rel=1e-5)
