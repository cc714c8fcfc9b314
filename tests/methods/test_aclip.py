"""A-CLIP's choice of patches and its teacher against plain loops, and against attention as PyTorch computes it."""

import math

import pytest
import torch
import torch.nn.functional as F

from declip_cli.config import MethodConfig, ModelConfig
from declip_cli.errors import ConfigError
from declip_cli.methods.aclip import choose_patches, scores_in_views
from declip_cli.methods.registry import build_method
from declip_cli.model.dims import VitDims
from declip_cli.model.vision_transformer import VisionTransformer
from tests.methods.small_methods import batch_of, build

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.2, 0.25])


def small_tower():
    torch.manual_seed(0)
    dims = VitDims(patch_side_px=8, width=24, num_layers=2, num_heads=3)
    return VisionTransformer(dims, image_side_px=32, embed_dim=12)


def bytes_of(num, side=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, side, side, 3), dtype=torch.uint8, generator=generator)


def layer_by_layer(tower, images, kept=None):
    """Features and the attention of the class token to each patch, with PyTorch's own convolution and attention."""
    pixels = (images.permute(0, 3, 1, 2) / 255 - MEAN[:, None, None]) / STD[:, None, None]
    patches = tower.conv1(pixels).flatten(2).transpose(1, 2) + tower.positional_embedding[1:]
    if kept is not None:
        patches = torch.stack([image[places] for image, places in zip(patches, kept, strict=True)])
    first = (tower.class_embedding + tower.positional_embedding[0]).expand(len(images), 1, -1)
    states, weights = tower.ln_pre(torch.cat([first, patches], dim=1)), []
    for block in tower.transformer.resblocks:
        attention = torch.nn.MultiheadAttention(24, 3, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        normed = block.ln_1(states)
        mixed, found = attention(normed, normed, normed, average_attn_weights=False)  # (B, H, L, L)
        weights.append(found[:, :, 0, 1:])
        states = states + mixed
        states = states + block.mlp(block.ln_2(states, block.mlp.scale)) / block.mlp.scale
    return tower.ln_post(states[:, 0]), torch.stack(weights).mean((0, 2))


def test_scores_are_the_class_tokens_attention_the_mean_over_heads_and_layers():
    tower, images = small_tower(), bytes_of(3)
    states, scores = tower.attend(images, MEAN, STD)
    features, expected = layer_by_layer(tower, images)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(states.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.patches, tower(images, MEAN, STD).patches)


def test_a_tower_sees_the_kept_patches_at_their_own_places_and_no_others():
    tower, images = small_tower(), bytes_of(2)
    kept = torch.tensor([[0, 3, 5, 9], [15, 2, 7, 8]])
    states = tower(images, MEAN, STD, kept)
    features, _ = layer_by_layer(tower, images, kept)
    torch.testing.assert_close(states.features, features, rtol=1e-4, atol=1e-5)
    assert states.patches.shape == (2, 4, 24)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(tower(images, MEAN, STD, everything).features, tower(images, MEAN, STD).features)


def read_at(grid, x, y):
    """Bilinear between the middles of cells; what lies beyond the outermost is as they are."""
    side = len(grid)
    column, row = (min(max(share * side - 0.5, 0), side - 1) for share in (x, y))
    left, top = int(column), int(row)
    right, bottom = min(left + 1, side - 1), min(top + 1, side - 1)
    a, b = column - left, row - top
    upper = (1 - a) * grid[top][left] + a * grid[top][right]
    return (1 - b) * upper + b * ((1 - a) * grid[bottom][left] + a * grid[bottom][right])


BOXES = [[0.1, 0.2, 0.9, 0.7], [0.8, 0.0, 0.3, 0.5], [0.0, 0.0, 1.0, 1.0], [1.0, 0.4, 0.0, 1.0]]
"""Left, top, right, bottom; the second and the last are flipped."""


@pytest.mark.parametrize("side", [4, 7])
def test_scores_are_read_in_the_middle_of_each_patch_of_a_view(side):
    scores = torch.rand(2, side**2, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(BOXES).view(2, 2, 4)
    found = scores_in_views(scores, boxes, num_views=2)
    for image in range(2):
        grid = scores[image].view(side, side).tolist()
        for view in range(2):
            left, top, right, bottom = boxes[image, view].tolist()
            expected = [
                read_at(grid, left + (right - left) * (j + 0.5) / side, top + (bottom - top) * (i + 0.5) / side)
                for i in range(side)
                for j in range(side)
            ]
            torch.testing.assert_close(found[image, view], torch.tensor(expected))
    for view in scores_in_views(scores, None, num_views=2).unbind(1):
        torch.testing.assert_close(view, scores)


@pytest.mark.parametrize(
    ("side", "block", "share", "num_blocks"),
    [(14, 2, 0.5, 25), (7, 1, 0.5, 25), (4, 1, 0.5, 8), (8, 2, 0.5, 8), (8, 2, 0.3, 5), (6, 1, 1.0, 36)],
)
def test_the_blocks_with_the_highest_scores_are_kept(side, block, share, num_blocks):
    scores = torch.rand(3, 2, side**2, generator=torch.Generator().manual_seed(0))
    found = choose_patches(scores, share=share)
    for grid, places in zip(scores.view(6, side, side), found.flatten(0, 1).tolist(), strict=True):
        total = {
            (i, j): sum(float(grid[i * block + y, j * block + x]) for y in range(block) for x in range(block))
            for i in range(side // block)
            for j in range(side // block)
        }
        best = sorted(total, key=total.get, reverse=True)[:num_blocks]
        expected = {(i * block + y) * side + j * block + x for i, j in best for y in range(block) for x in range(block)}
        assert set(places) == expected
        assert len(places) == len(expected)


def test_views_are_encoded_from_the_patches_that_the_teacher_attends_to_in_the_whole_image():
    method = build("aclip", kept_patches=0.75)  # 3 of 4 patches of 8 px
    batch = batch_of(method)
    prepared = method.prepare(batch, size=2)
    tower, pixels = method.teacher.tower, (method.encoder.pixel_mean, method.encoder.pixel_std)
    states, scores = tower.attend(batch.images[:, 2], *pixels)
    torch.testing.assert_close(prepared.whole_features, states.features)
    embeddings = method.embed(batch)
    for pair, grid in enumerate(scores.view(-1, 2, 2).tolist()):
        for view in (0, 1):
            left, top, right, bottom = batch.boxes[pair, view].tolist()
            read = [
                read_at(grid, left + (right - left) * x, top + (bottom - top) * y)
                for y in (0.25, 0.75)
                for x in (0.25, 0.75)
            ]
            lowest = min(range(4), key=read.__getitem__)
            kept = [place for place in range(4) if place != lowest]
            assert prepared.kept_patches[pair, view].tolist() == kept
            seen = method.encoder.image_states(batch.images[pair, view][None], torch.tensor([kept]))
            torch.testing.assert_close(embeddings.image_features[pair, view], seen.features[0])
    assert not prepared.whole_features.requires_grad


def test_the_teacher_starts_as_the_tower_and_follows_it_ever_more_slowly():
    method = build("aclip", teacher_momentum=0.9)
    own, followed = method.teacher.tower.proj, method.encoder.visual.proj
    assert not torch.equal(method.teacher.head.linear1.bias, method.projector.linear1.bias)
    method.before_step(0.3)
    assert torch.equal(own, followed)
    assert torch.equal(method.teacher.head.linear1.bias, method.projector.linear1.bias)
    expected = own.clone()
    for share in (0.0, 0.25, 0.5, 1.0):
        with torch.no_grad():
            followed.add_(torch.randn_like(followed))
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * share)) / 2
        expected = momentum * expected + (1 - momentum) * followed
        method.before_step(share)
        torch.testing.assert_close(own, expected)
    assert momentum == 1.0


def test_the_teacher_is_never_trained_and_belongs_to_the_state_but_not_to_the_model():
    method = build("aclip")
    method.objective(method.embed(batch_of(method))).total.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
    assert {"teacher.tower.proj", "teacher.head.linear2.weight", "teacher.num_updates"} <= set(method.state_dict())
    assert not any("teacher" in name for name in method.encoder.state_dict())


def test_a_resnet_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="a ResNet has no class token") as caught:
        build_method(ModelConfig(arch="rn50"), MethodConfig(name="aclip"))
    assert "--arch vit-b16" in caught.value.remedy


def test_without_self_supervision_only_the_teacher_is_there_beside_the_encoder():
    method = build("aclip", weights={"simclr": 0.0, "byol": 0.0})
    parts = {name.split(".")[0] for name, _ in method.named_parameters()}
    assert parts == {"encoder", "teacher"}
    terms = method.objective(method.embed(batch_of(method))).terms
    images = F.normalize(method.embed(batch_of(method)).images, dim=2)
    assert set(terms) == {"clip"}
    assert images.shape[1] == 2
