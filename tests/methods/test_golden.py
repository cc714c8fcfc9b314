"""Every method equals the original code, to the recorded digits: components 1e-4, gradient norms 1e-3."""

import numpy as np
import pytest
import torch

from declip_cli.interop.original import rename_original
from tests.golden_files import golden_batch, golden_cases, golden_method, load_golden

METHODS = ("clip", "slip", "filip", "declip", "defilip")
CASES = golden_cases(world=1, methods=METHODS)
ZERO_GRADIENT = 1e-6
"""Biases before a BatchNorm and of attention keys have zero gradient; what was recorded there is rounding noise."""


@pytest.mark.parametrize("name", CASES)
def test_components_and_total_equal_the_recording(name):
    golden = load_golden(name)
    # FILIP's loss on whole images is recorded but has weight 0 in the total: a tiny weight has it computed.
    weights = {"clip": 1e-12} if golden.meta["method"] == "filip" else {}
    method = golden_method(golden, faithful=True, weights=weights)
    terms = method.objective(method.embed(golden_batch(golden)))
    recorded = {k: v for k, v in golden.meta["components"].items() if k != "clip_pairs"}
    assert {k: v.item() for k, v in terms.terms.items()} == pytest.approx(recorded, rel=1e-4)
    assert terms.total.item() == pytest.approx(golden.meta["total"], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_recording(name):
    golden = load_golden(name)
    method = golden_method(golden, faithful=True)
    method.objective(method.embed(golden_batch(golden))).total.backward()
    ours = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
    norms = {rename_original(k): v for k, v in golden.meta["grad_norms"].items()}
    assert set(norms) == {k for k, g in ours.items() if k in norms or g.norm() > ZERO_GRADIENT}
    for key, norm in norms.items():
        assert ours[key].norm().item() == pytest.approx(norm, rel=1e-3, abs=ZERO_GRADIENT), key
    for key, recorded in golden.arrays.items():
        if key.startswith("grad/"):
            gradient = ours[rename_original(key.removeprefix("grad/"))].reshape(recorded.shape)
            allowed = float(2e-3 * np.abs(recorded).max() + ZERO_GRADIENT)
            torch.testing.assert_close(gradient, torch.from_numpy(recorded), rtol=0, atol=allowed)


@pytest.mark.parametrize("name", golden_cases(world=1, methods=("declip", "defilip")))
def test_the_queue_after_the_step_equals_the_recording(name):
    golden = load_golden(name)
    method = golden_method(golden, faithful=True)
    with torch.no_grad():
        method.update_queue(method.embed(golden_batch(golden)), torch.tensor(True))
    recorded = torch.from_numpy(golden.arrays["bank_after"]).T
    torch.testing.assert_close(method.queue.rows, recorded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", golden_cases(world=1, methods=("declip",)))
def test_each_of_the_four_pairs_equals_the_recording(name):
    from declip_cli.distributed import Gathered
    from declip_cli.methods.terms import Contrast, contrastive_loss, own_ids
    from declip_cli.model.clip import normalize

    golden = load_golden(name)
    method = golden_method(golden, faithful=True)
    embeddings = method.embed(golden_batch(golden))
    images, texts = normalize(embeddings.images), normalize(embeddings.texts)
    contrast = Contrast(ids=own_ids(len(images), images.device), scale=method.exp_logit_scale())
    losses = [
        contrastive_loss(Gathered(images[:, [view]]), Gathered(texts[:, [text]]), contrast).item()
        for view, text in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    assert losses == pytest.approx(golden.meta["components"]["clip_pairs"], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_features_equal_the_recording(name):
    golden = load_golden(name)
    method = golden_method(golden, faithful=True).eval()
    batch = golden_batch(golden)
    features = torch.from_numpy(golden.arrays["eval_image_features"])
    with torch.no_grad():
        ours = method.encoder.encode_image(batch.images[:4, 0])
    torch.testing.assert_close(ours, features, rtol=1e-4, atol=1e-4)
