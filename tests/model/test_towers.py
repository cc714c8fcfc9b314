"""The towers equal those of PyTorch and OpenCLIP on the same weights."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock as PeerBlock
from torch import nn

from declip_cli.config import ModelConfig
from declip_cli.errors import ConfigError
from declip_cli.model import transformer
from declip_cli.model.architectures import ARCHITECTURES, Architecture, ResNetDims, TextDims, VitDims, find_architecture
from declip_cli.model.clip import DualEncoder
from declip_cli.model.open_clip_layout import open_clip_config, open_clip_state
from declip_cli.model.preprocessing import Preprocessing
from declip_cli.model.text_transformer import END_ID
from declip_cli.model.transformer import Attention, LayerNorm, ResidualAttentionBlock, Transformer

TEXT = TextDims(context_length=11, width=24, num_layers=2, num_heads=3)
VIT = Architecture(
    image_side_px=24, embed_dim=10, vision=VitDims(patch_side_px=8, width=48, num_layers=2, num_heads=4), text=TEXT
)
RESNET = Architecture(
    image_side_px=64, embed_dim=10, vision=ResNetDims(num_blocks=(1, 2, 1, 1), width=8, num_heads=4), text=TEXT
)


def shaken(module, seed=0):
    """Give every parameter and running statistic a value of its own, so that none hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.add_(0.1 * (noise.abs() if name.endswith("running_var") else noise))
    return module


def texts(*, num=5, length=9, seed=0):
    """Draw texts of unequal lengths, start and end included, padded with 0."""
    tokens = torch.randint(1, 49406, (num, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 49406
    for row in range(num):
        end = max(2, length - 1 - row)
        tokens[row, end] = END_ID
        tokens[row, end + 1 :] = 0
    return tokens


def random_images(side, *, num=3, seed=0):
    return torch.randint(0, 256, (num, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def peer_of(encoder):
    """Build OpenCLIP's model with the encoder's weights."""
    side = encoder.architecture.image_side_px
    config = open_clip_config(encoder.architecture, Preprocessing(image_side_px=side, resize_px=side))["model_cfg"]
    peer = open_clip.CLIP(**config)
    weights, _ = open_clip_state(encoder.state_dict())
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"attn_mask"}
    return peer.eval()


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_equals_that_of_pytorch(is_causal):
    ours = shaken(Attention(12, 3))
    nn.init.normal_(ours.in_proj_weight, std=0.3)
    peer = nn.MultiheadAttention(12, 3, batch_first=True)
    peer.load_state_dict(ours.state_dict())
    states = torch.randn(2, 7, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if is_causal else None
    expected, _ = peer(states, states, states, attn_mask=mask, need_weights=False)
    found = ours(states, is_causal)
    assert found.shape == (2, 7, 12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_block_equals_that_of_open_clip(quick_gelu):
    ours = shaken(Transformer(12, 1, num_heads=3, is_causal=False, quick_gelu=quick_gelu).resblocks[0])
    assert isinstance(ours, ResidualAttentionBlock)
    peer = PeerBlock(12, 3, act_layer=open_clip.transformer.QuickGELU if quick_gelu else nn.GELU)
    peer.load_state_dict({name.replace("mlp.c", "mlp.c"): value for name, value in ours.state_dict().items()})
    states = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(states, False), peer(states), rtol=1e-5, atol=1e-5)


def test_a_causal_transformer_does_not_look_ahead():
    stack = shaken(Transformer(12, 2, num_heads=3, is_causal=True, quick_gelu=True))
    states = torch.randn(1, 6, 12)
    other = states.clone()
    other[:, 4:] = torch.randn(1, 2, 12)
    torch.testing.assert_close(stack(states)[:, :4], stack(other)[:, :4])
    assert not torch.allclose(stack(states)[:, 4:], stack(other)[:, 4:])


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("base", [VIT, RESNET], ids=["vit", "resnet"])
def test_both_towers_equal_those_of_open_clip(base, quick_gelu):
    encoder = shaken(DualEncoder(base.with_activation(quick_gelu))).eval()
    peer = peer_of(encoder)
    images, tokens = random_images(base.image_side_px), texts(length=11)
    with torch.no_grad():
        found = encoder.encode_image(images)
        assert found.shape == (3, 10)
        torch.testing.assert_close(found, peer.encode_image(encoder.normalize_images(images)), rtol=1e-4, atol=1e-4)
        found = encoder.encode_text(tokens)
        assert found.shape == (5, 10)
        torch.testing.assert_close(found, peer.encode_text(tokens), rtol=1e-4, atol=1e-4)


def test_pixels_are_normalized_with_the_statistics_of_imagenet():
    encoder = DualEncoder(VIT)
    images = random_images(24)
    found = encoder.normalize_images(images)
    assert found.shape == (3, 3, 24, 24)
    expected = (images[1, 5, 7].double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(found[1, :, 5, 7].double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert encoder.normalize_images(found) is found


def normalized(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def test_patches_of_bytes_are_embedded_as_a_convolution_embeds_normalized_pixels():
    encoder, images = shaken(DualEncoder(VIT)), random_images(24)
    tower = encoder.visual
    weight = tower.conv1.weight.detach().double().requires_grad_()
    expected = F.conv2d(normalized(images), weight, stride=8).flatten(2).transpose(1, 2)  # (B, P, E)
    found = tower._embed_patches(images, encoder.pixel_mean, encoder.pixel_std)
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * towards).sum().backward()
    (expected * towards).sum().backward()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.conv1.weight.grad, weight.grad.float(), rtol=1e-5, atol=1e-4)
    pixels = tower._embed_patches(normalized(images).float(), encoder.pixel_mean, encoder.pixel_std)
    torch.testing.assert_close(pixels, found, rtol=1e-5, atol=1e-5)


def test_patches_of_bytes_lose_no_more_in_bfloat16_than_the_weights_do():
    encoder, images = DualEncoder(VIT), random_images(24)
    tower = encoder.visual
    weight = tower.conv1.weight.detach()
    exact = F.conv2d(normalized(images), weight.double(), stride=8).flatten(2).transpose(1, 2)
    rounded = F.conv2d(normalized(images), weight.bfloat16().double(), stride=8).flatten(2).transpose(1, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = tower._embed_patches(images, encoder.pixel_mean, encoder.pixel_std)
    assert found.dtype == torch.bfloat16
    # The result is rounded, too.
    assert (found.double() - exact).norm() < 1.2 * ((rounded - exact).norm() + (exact.bfloat16() - exact).norm())


def test_convolutions_see_channels_last():
    encoder, seen = DualEncoder(RESNET), []
    convolutions = [module for module in encoder.visual.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder.encode_image(random_images(64))
    assert len(seen) == len(convolutions)
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)


@pytest.mark.parametrize("coarse", [("cpu",), ()], ids=["cpu", "gpu"])
def test_a_layer_norm_under_autocast_rounds_its_weights_and_its_result_only(coarse, monkeypatch):
    monkeypatch.setattr(transformer, "_COARSE_SUMS", coarse)
    norm, peer = shaken(LayerNorm(512)), nn.LayerNorm(512, dtype=torch.float64)
    peer.load_state_dict(norm.state_dict())
    # Statistics in bfloat16 would be off by 2^-8 of the mean, which is 8 deviations.
    states = (8 + torch.randn(40, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    calls, layer_norm = [], F.layer_norm
    monkeypatch.setattr(
        F, "layer_norm", lambda *a, **k: calls.append(torch.is_autocast_enabled("cpu")) or layer_norm(*a, **k)
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(states)
    expected = peer(states.double()).detach()
    assert found.dtype == torch.bfloat16
    assert calls[:1] == [False]  # a GPU's autocast would cast to float32 and back
    # Weight, bias and result are each rounded to 8 bits; without the built-in weights what they scale is, too.
    scaled = (expected - peer.bias).abs()
    bound = 2.0**-8 * (scaled * (1 + len(coarse)) + peer.bias.abs() + expected.abs())
    assert bool(((found.double() - expected).abs() <= 1.01 * bound).all())


def test_gradients_of_a_layer_norm_in_bfloat16_are_summed_in_float32():
    norm, peer = shaken(LayerNorm(8)), nn.LayerNorm(8, dtype=torch.float64)
    peer.load_state_dict(norm.state_dict())
    states = torch.randn(8000, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    wide = states.detach().double().requires_grad_()
    towards = (0.2 + 0.2 * states.detach() + torch.randn(8000, 8)).bfloat16()  # alike in all tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(states).backward(towards)
    peer(wide).backward(towards.double())
    for ours, theirs in (
        (states.grad, wide.grad),
        (norm.weight.grad, peer.weight.grad),
        (norm.bias.grad, peer.bias.grad),
    ):
        assert (ours.double() - theirs).norm() < 2.0**-8 * theirs.norm()
    assert norm.weight.grad.dtype == torch.float32


def test_texts_cut_to_the_longest_have_the_features_of_padded_ones():
    encoder = shaken(DualEncoder(VIT)).eval()
    tokens = texts(length=8)
    padded = torch.nn.functional.pad(tokens, (0, 3))
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_text(tokens), encoder.encode_text(padded))


def test_a_text_is_read_off_at_its_first_end():
    encoder = shaken(DualEncoder(VIT)).eval()
    tokens = texts(length=9)
    after = tokens.clone()
    after[1:][tokens[1:] == 0] = END_ID
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_text(after), encoder.encode_text(tokens))


@pytest.mark.parametrize(("base", "width", "patches"), [(VIT, 48, 9), (RESNET, 256, 4)], ids=["vit", "resnet"])
def test_shapes_before_the_projection_and_token_by_token(base, width, patches):
    encoder = DualEncoder(base, token_wise_dim=6).eval()
    images, tokens = random_images(base.image_side_px), texts(length=9)
    with torch.no_grad():
        assert encoder.encode_image(images, projected=False).shape == (3, width)
        assert encoder.image_states(images).patches.shape == (3, patches, width)
        assert encoder.encode_image_tokens(images).shape == (3, patches, 6)
        features, mask = encoder.encode_text_tokens(tokens)
    assert features.shape == (5, 9, 6)
    assert torch.equal(mask, tokens != 0)


def test_a_model_without_token_wise_heads_says_so():
    with pytest.raises(ValueError, match="compares whole images and texts"):
        DualEncoder(VIT).encode_image_tokens(random_images(24))


@pytest.mark.parametrize("base", [VIT, RESNET], ids=["vit", "resnet"])
def test_gradient_checkpointing_gives_the_same_gradients(base, monkeypatch):
    calls = []
    original = transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    gradients, buffers = [], []
    for is_on in (False, True):
        torch.manual_seed(0)
        encoder = shaken(DualEncoder(base)).train()
        encoder.set_gradient_checkpointing(is_on)
        product = encoder.encode_image(random_images(base.image_side_px)) @ encoder.encode_text(texts()).T
        product.pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
        buffers.append(dict(encoder.named_buffers()))
        assert bool(calls) == is_on
    torch.testing.assert_close(buffers[0], buffers[1])  # a batch counts once in the running statistics
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_a_model_computes_in_bfloat16_under_autocast():
    for base in (VIT, RESNET):
        encoder = DualEncoder(base, token_wise_dim=6).eval()
        images, tokens = random_images(base.image_side_px), texts()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found, text = encoder.encode_image(images), encoder.encode_text(tokens)
        with torch.no_grad():
            expected = encoder.encode_image(images)
        assert found.dtype == text.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.05 * expected.norm()


# --- architectures


def num_parameters(name, **options):
    with torch.device("meta"):
        encoder = DualEncoder(find_architecture(ModelConfig(arch=name, **options)))
    return sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "peer"), [("vit-b32", "ViT-B-32"), ("vit-b16", "ViT-B-16"), ("rn50", "RN50"), ("rn101", "RN101")]
)
def test_sizes_equal_those_of_open_clip_but_for_mask_token_and_bias(name, peer):
    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config(peer))
    architecture = ARCHITECTURES[name]
    extra = architecture.text.width + architecture.embed_dim  # the mask token's embedding; the projection's bias
    assert num_parameters(name) == sum(p.numel() for p in theirs.parameters()) + extra


def test_sizes_equal_those_of_the_original():
    # Recorded from the original: clip-vit 151.28 M; clip-r50 104.1 M, which allocates an unused layer
    # from 2,048 to 1,024 (`visual.fc`).
    assert num_parameters("vit-b32") / 1e6 == pytest.approx(151.28, abs=0.005)
    assert (num_parameters("rn50") + 2048 * 1024 + 1024) / 1e6 == pytest.approx(104.1, abs=0.05)


def test_every_architecture_can_be_built():
    for name in ARCHITECTURES:
        assert num_parameters(name) > 1e5


def test_overrides_change_sides_lengths_and_widths():
    found = find_architecture(ModelConfig(arch="vit-b16", image_side_px=192, context_length=40, embed_dim=96))
    assert (found.image_side_px, found.text.context_length, found.embed_dim) == (192, 40, 96)
    assert found.vision == ARCHITECTURES["vit-b16"].vision


def test_an_unknown_architecture_names_the_closest_and_all():
    with pytest.raises(ConfigError, match="unknown architecture 'vit-b-32'") as caught:
        find_architecture(ModelConfig(arch="vit-b-32"))
    assert caught.value.remedy.startswith("did you mean vit-b32? --arch takes vit-b32, vit-b16, ")


@pytest.mark.parametrize(("arch", "side", "multiple", "offered"), [("vit-b32", 200, 32, 192), ("rn50", 230, 32, 224)])
def test_a_side_that_does_not_fit_offers_one_that_does(arch, side, multiple, offered):
    with pytest.raises(ConfigError) as caught:
        find_architecture(ModelConfig(arch=arch, image_side_px=side))
    assert caught.value.message == f"model.image_side_px must be a multiple of {multiple} for {arch} (got {side})"
    assert caught.value.remedy == f"--set model.image_side_px={offered}"


@pytest.mark.parametrize("options", [{"context_length": 2}, {"context_length": -1}, {"embed_dim": -4}])
def test_impossible_dimensions_are_errors(options):
    (key,) = options
    with pytest.raises(ConfigError, match=rf"model\.{key} "):
        find_architecture(ModelConfig(arch="vit-tiny32", **options))
