import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as peer
from PIL import Image, ImageFilter

from declip_cli.data.color import Colors, blur, color_matrix, jitter

LUMA = np.array([0.299, 0.587, 0.114])


def image(low=0, high=256, size=48, seed=0):
    """Smooth colors with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(low, high, (6, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(low, high - 1).astype(np.uint8)


def difference(ours, theirs):
    return np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_an_operation_equals_torchvision_on_numbers_where_nothing_is_clipped(name, factor):
    pixels = image(90, 160)
    pixels[:] = pixels[:1]  # rows alike, so that a part of them has the mean of all
    numbers = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    theirs = getattr(peer, f"adjust_{name}")(numbers, factor).permute(1, 2, 0).numpy() * 255
    assert difference(jitter(pixels, Colors(**{name: factor})), theirs).max() < 0.75  # rounding, and luma's digits


@pytest.mark.parametrize("order", list(itertools.permutations(("brightness", "contrast", "saturation", "hue_turns"))))
def test_operations_may_follow_each_other_in_any_order(order):
    amounts = {"brightness": 0.9, "contrast": 0.8, "saturation": 1.2, "hue_turns": 0.07}
    pixels = image(80, 170)
    numbers, some = pixels.astype(float), pixels[::8].reshape(-1, 3).astype(float)
    for name in order:
        amount = amounts[name]
        if name == "hue_turns":  # turned in the plane of equal luma, with luma kept
            before, matrix = some, hue_matrix(amount)
            numbers, some = numbers @ matrix.T, some @ matrix.T
            assert some @ LUMA == pytest.approx(before @ LUMA)
            continue
        if name == "saturation":
            parts = [(values @ LUMA)[..., None] for values in (numbers, some)]
        else:
            parts = [(some @ LUMA).mean() if name == "contrast" else 0.0] * 2
        numbers, some = (amount * v + (1 - amount) * part for v, part in zip((numbers, some), parts, strict=True))
    assert numbers.min() > 0
    assert numbers.max() < 255
    # Half a level of rounding, and three factors of ten bits times 170.
    assert difference(jitter(pixels, Colors(**amounts)), numbers).max() < 0.75


def hue_matrix(turns):
    return color_matrix(Colors(hue_turns=turns), 0.0)[:, :3]


def test_half_a_turn_of_hue_gives_the_opposite_color_of_equal_luma():
    assert hue_matrix(0.5) == pytest.approx(2 * np.tile(LUMA, (3, 1)) - np.eye(3), abs=1e-5)


def test_turns_of_hue_add_up_and_go_from_red_over_green_to_blue():
    assert hue_matrix(0.1) @ hue_matrix(0.1) @ hue_matrix(0.1) == pytest.approx(hue_matrix(0.3), abs=1e-9)
    red, third = np.array([1.0, 0, 0]), hue_matrix(1 / 3)
    assert [(third @ red).argmax(), (third @ third @ red).argmax()] == [1, 2]


def test_hue_of_a_gray_image_changes_nothing():
    pixels = np.repeat(image()[..., :1], 3, axis=2)
    assert difference(jitter(pixels, Colors(hue_turns=0.1)), pixels).max() <= 1


def test_what_leaves_eight_bits_is_clipped():
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 200
    found = jitter(pixels, Colors(contrast=1.4, brightness=1.3))
    assert found[:4].min() == 255
    assert found[4:].max() == 0


def test_no_saturation_equals_torchvisions_gray_up_to_rounding():
    pixels = image()
    assert (
        difference(jitter(pixels, Colors(saturation=0.0)), peer.rgb_to_grayscale(Image.fromarray(pixels), 3)).max() <= 1
    )


def test_nothing_to_do_changes_nothing():
    pixels = image()
    assert np.array_equal(jitter(pixels, Colors()), pixels)


@pytest.mark.parametrize("sigma_px", [0.8, 1.3, 2.0])
def test_blur_is_nearer_to_pillows_than_the_sharp_image_is(sigma_px):
    pixels = image()
    theirs = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma_px))
    assert difference(blur(pixels, sigma_px), theirs).mean() < 0.2 * difference(pixels, theirs).mean()


@pytest.mark.parametrize("sigma_px", [0.28, 0.7, 2.0])
def test_blur_spreads_a_point_as_a_gaussian(sigma_px):
    pixels = np.zeros((31, 31, 3), dtype=np.uint8)
    pixels[15, 15] = 255
    reach = math.ceil(3 * sigma_px)
    weights = [math.exp(-0.5 * (i / sigma_px) ** 2) for i in range(-reach, reach + 1)]
    line = np.zeros(31)
    line[15 - reach : 16 + reach] = np.array(weights) / sum(weights)
    assert difference(blur(pixels, sigma_px)[..., 1], 255 * np.outer(line, line)).max() <= 1
