"""Other contrasts between whole images and texts than CLIP's: the sigmoid loss."""

import pytest
import torch

from declip_cli.errors import ConfigError
from tests.methods.reference_loops import nearest, same, unit
from tests.methods.small_methods import GOOD, build, draw, earlier_texts, only, score

SIGMOID = {"contrastive": "sigmoid"}


def siglip(images, texts, scale, bias, *, are_positives=lambda i, j: i == j):
    """SigLIP's algorithm 1 for one view of each: the mean over images of the sum over texts."""
    total = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            sign = 1 if are_positives(i, j) else -1
            total = total - torch.nn.functional.logsigmoid(sign * (scale * (unit(image) @ unit(text)) + bias))
    return total / len(images)


def of_all_pairs(images, texts, scale, bias, **options):
    pairs = [(v, t) for v in range(images.shape[1]) for t in range(texts.shape[1])]
    return sum(siglip(images[:, v], texts[:, t], scale, bias, **options) for v, t in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("clip", (1, 1)),
        ("slip", (1, 1)),
        ("filip", (1, 1)),
        ("declip", (2, 2)),
        ("defilip", (2, 2)),
        ("rocket", (1, 1)),
        ("aclip", (2, 1)),
    ],
)
def test_every_method_contrasts_by_the_sigmoid_of_siglip(name, views):
    method, fields = build(name, weights=only(name, clip=1.0), **SIGMOID), draw()
    terms, _, gradients = score(method, fields)
    scale, bias = method.encoder.logit_scale.detach().double().exp(), method.encoder.logit_bias.detach().double()
    images, texts = (fields[key].double().requires_grad_() for key in ("images", "texts"))
    scale.requires_grad_()
    bias.requires_grad_()
    expected = of_all_pairs(images[:, : views[0]], texts[:, : views[1]], scale, bias)
    expected.backward()
    assert terms["clip"].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients["images"].double(), images.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients["texts"].double(), texts.grad, rtol=1e-4, atol=1e-6)
    assert gradients["encoder.logit_bias"].item() == pytest.approx(bias.grad.item(), rel=1e-4)
    assert gradients["encoder.logit_scale"].item() == pytest.approx((scale * scale.grad).item(), rel=1e-4)


def test_strong_views_of_rocket_are_always_contrasted_by_the_softmax():
    methods = [build("rocket", weights=only("rocket", strong=1.0), **options) for options in ({}, SIGMOID)]
    methods[1].load_state_dict(methods[0].state_dict(), strict=False)  # all but the bias
    by_softmax, by_sigmoid = (score(method, draw())[0]["strong"] for method in methods)
    torch.testing.assert_close(by_sigmoid, by_softmax)


def test_neighbors_are_contrasted_by_the_sigmoid_too():
    method, fields = build("declip", weights=only("declip", nn=1.0), nn_exclude_own=False, **SIGMOID), draw()
    rows, pair_indices = earlier_texts(fields)
    method.queue.push(rows, pair_indices, GOOD)
    terms, _, _ = score(method, fields)
    images, texts = fields["images"].double(), fields["texts"].double()
    found = [[nearest(unit(text), list(rows.double())) for text in views] for views in texts]
    found = torch.stack([torch.stack(views) for views in found])
    scale, bias = method.encoder.logit_scale.detach().double().exp(), method.encoder.logit_bias.detach().double()
    assert terms["nn"].item() == pytest.approx(of_all_pairs(images, found, scale, bias).item(), rel=1e-5)


def test_the_sigmoid_says_yes_to_every_text_of_the_same_caption():
    method, fields = build("declip", weights=only("declip", clip=1.0), positives="caption", **SIGMOID), draw()
    terms, _, _ = score(method, fields)
    scale, bias = method.encoder.logit_scale.detach().double().exp(), method.encoder.logit_bias.detach().double()
    captions = fields["caption_ids"].tolist()
    assert same(captions, 0, 4) == [0, 2, 3]
    images, texts = fields["images"].double(), fields["texts"].double()
    expected = of_all_pairs(images, texts, scale, bias, are_positives=lambda i, j: j in same(captions, i, 4))
    assert terms["clip"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_sigmoid_refuses_label_smoothing():
    with pytest.raises(ConfigError, match="no label smoothing") as caught:
        build("clip", label_smoothing=0.1, **SIGMOID)
    assert "--set method.label_smoothing=0" in caught.value.remedy
