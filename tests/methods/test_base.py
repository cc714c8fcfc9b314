"""What all methods share: weights, logit scales, the mask of texts, the queue after good and broken batches."""

import dataclasses

import pytest
import torch

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import MethodConfig, ModelConfig
from declip_cli.errors import ConfigError
from declip_cli.methods.registry import METHODS, build_method
from declip_cli.model.clip import text_token_mask
from declip_cli.model.text_transformer import END_ID
from declip_cli.presets import PRESETS
from tests.methods.small_methods import narrow_heads

GOOD, BROKEN = torch.tensor(True), torch.tensor(False)


def build(name, **options):
    torch.manual_seed(0)
    with narrow_heads():
        return build_method(ModelConfig(arch="vit-tiny32"), MethodConfig(name=name, queue_size=16, **options))


def batch(method, *, num=5):
    """Draw pairs as the loader makes them for a method."""
    generator = torch.Generator().manual_seed(0)
    views, length = method.views, 9
    tokens = torch.randint(1, 49406, (num, len(views.texts), length), generator=generator)
    tokens[:, :, -2:] = torch.tensor([END_ID, 0])
    labels = torch.full((num, length), -100)
    labels[:, 3] = tokens[:, 0, 3]
    images = torch.randint(0, 256, (num, len(views.images), 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Batch(images=images, tokens=tokens, mlm_labels=labels, pair_indices=torch.arange(num) + 40)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_any_term_is_refused_when_it_is_built(name):
    with pytest.raises(ConfigError, match=f"all loss terms of method {name} are switched off") as caught:
        build(name, weights=dict.fromkeys(METHODS[name].default_weights, 0.0))
    assert ", ".join(METHODS[name].default_weights) in caught.value.remedy


@pytest.mark.parametrize("name", METHODS)
def test_a_term_of_another_method_is_refused(name):
    with pytest.raises(ConfigError, match=f"method {name} has no loss term triplet"):
        build(name, weights={"triplet": 1.0})


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_no_switch_is_left_open(name, faithful):
    config = build(name, faithful=faithful).config
    assert all(getattr(config, key) == pair[faithful] for key, pair in PRESETS["method"].items())


def test_every_switch_is_an_option_of_some_method():
    switches = {field.name for field in dataclasses.fields(MethodConfig)}
    assert switches == set().union(*(method.options for method in METHODS.values()))


@pytest.mark.parametrize(
    ("name", "weights", "key"),
    [
        ("clip", {}, "encoder.logit_scale"),
        ("slip", {}, "encoder.logit_scale"),
        ("filip", {}, "logit_scale_dense"),
        ("filip", {"clip": 1e-12}, "logit_scale_dense"),
        ("filip", {"filip": 0.0, "clip": 1.0}, "encoder.logit_scale"),
        ("declip", {}, "encoder.logit_scale"),
        ("defilip", {}, "encoder.logit_scale"),
        ("rocket", {}, "encoder.logit_scale"),
        ("aclip", {}, "encoder.logit_scale"),
        ("defilip", {"clip": 0.0, "nn": 0.0}, "logit_scale_dense"),
    ],
)
def test_the_logit_scale_in_use_is_one_that_is_trained(name, weights, key):
    method = build(name, weights=weights)
    scale = method.logit_scale_in_use()
    assert scale is dict(method.named_parameters())[key]
    assert scale.item() == pytest.approx(2.65926)
    method.objective(method.embed(batch(method))).total.backward()
    assert scale.grad is not None


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_patch_embedding_is_frozen_on_request(is_frozen):
    method = build("clip", freeze_patch_embed=is_frozen)
    assert method.encoder.visual.conv1.weight.requires_grad != is_frozen


@pytest.mark.parametrize("name", METHODS)
def test_shapes_of_the_embeddings(name):
    method = build(name)
    embeddings = method.embed(batch(method))
    views, texts = len(method.views.images), len(method.views.texts)
    is_declip, is_token_wise = name in ("declip", "defilip"), name in ("filip", "defilip")
    width = method.encoder.architecture.embed_dim
    has_strong_views, is_rocket = name in ("slip", "rocket"), name == "rocket"
    feature_dims = method.encoder.visual.feature_dim, method.encoder.text.feature_dim
    assert embeddings.images.shape == (5, 1 if has_strong_views else 2 if name == "aclip" else views, width)
    assert embeddings.texts.shape == (5, 1 if is_rocket else texts, width)
    num_features = {"slip": 2, "rocket": 2, "aclip": 3}.get(name)
    assert embeddings.image_features.shape == ((5, num_features, feature_dims[0]) if num_features else (5, 0))
    assert embeddings.text_features.shape == ((5, 2, feature_dims[1]) if is_rocket else (5, 0))
    assert embeddings.mlm_losses.shape == embeddings.mlm_counts.shape == ((5,) if is_declip else (5, 0))
    num_patches = (32 // method.encoder.visual.patch_side_px) ** 2
    assert embeddings.image_tokens.shape == ((5, num_patches, 256) if is_token_wise else (5, 0))
    assert embeddings.text_tokens.shape == ((5, 9, 256) if is_token_wise else (5, 0))
    assert embeddings.text_token_mask.shape == ((5, 9) if is_token_wise else (5, 0))
    assert embeddings.pair_indices.tolist() == [40, 41, 42, 43, 44]


def test_a_text_counts_up_to_its_first_end_though_0_is_also_an_exclamation_mark():
    tokens = torch.tensor([[49406, 0, 7, END_ID, 0, 0], [49406, END_ID, 5, END_ID, 0, 0], [49406, 1, 2, 3, 4, 0]])
    expected = [[True] * 4 + [False] * 2, [True] * 2 + [False] * 4, [True] * 6]
    assert text_token_mask(tokens).tolist() == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_broken_batch_changes_no_queue(name):
    method = build(name)
    embeddings = method.embed(batch(method))
    method.update_queue(embeddings, GOOD)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    fields = {field.name: getattr(embeddings, field.name).detach() for field in dataclasses.fields(Embeddings)}
    broken = Embeddings(**fields | {"texts": fields["texts"] * float("nan")})
    method.update_queue(broken, BROKEN)
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_queue_holds_augmented_texts_first_with_the_numbers_of_their_pairs():
    method = build("declip")
    embeddings = method.embed(batch(method))
    method.update_queue(embeddings, GOOD)
    texts = torch.nn.functional.normalize(embeddings.texts.detach(), dim=2)
    torch.testing.assert_close(method.queue.rows[:10], torch.cat([texts[:, 1], texts[:, 0]]))
    assert method.queue.pair_indices.tolist() == [40, 41, 42, 43, 44] * 2 + [-1] * 6
