import math
import random

import numpy as np
import pytest
import torchvision.transforms.functional as peer
from PIL import Image, ImageFilter

from declip_cli.data import colour
from declip_cli.data.colour import ColourStep, Scratch, colour_matrix


def on_a_copy(operation):
    """Keep the picture that is given, as Pillow does."""

    def changed(pixels, *arguments, **options):
        pixels = pixels.copy()
        operation(pixels, *arguments, Scratch(len(pixels)), **options)
        return pixels

    return changed


adjust_brightness = on_a_copy(colour.adjust_brightness)
adjust_contrast = on_a_copy(colour.adjust_contrast)
adjust_saturation = on_a_copy(colour.adjust_saturation)
rotate_hue = on_a_copy(colour.rotate_hue)
grayscale = on_a_copy(colour.make_gray)
blur = on_a_copy(colour.blur)
apply_steps = on_a_copy(colour.apply_steps)
apply_fused = on_a_copy(colour.apply_fused)


def picture(height=48, width=48, seed=0):
    """Smooth colours of full range with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def difference(ours, theirs):
    return np.abs(ours.astype(int) - np.asarray(theirs).astype(int))


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.73, 1.0, 1.13, 1.4])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adjust_brightness, peer.adjust_brightness),
        (adjust_contrast, peer.adjust_contrast),
        (adjust_saturation, peer.adjust_saturation),
    ],
)
def test_blends_equal_torchvision_on_pillow_pictures(ours, theirs, factor):
    pixels = picture()
    wrong = difference(ours(pixels, factor), theirs(Image.fromarray(pixels), factor))
    assert wrong.max() <= 1
    assert (wrong > 0).mean() < 0.02  # luma differs by one where OpenCV and Pillow round it differently


@pytest.mark.parametrize("factor", [0.6, 0.73, 1.13, 1.4])
def test_brightness_equals_pillow_on_every_value(factor):
    values = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    assert np.array_equal(adjust_brightness(values, factor), peer.adjust_brightness(Image.fromarray(values), factor))


def test_contrast_clips_dark_values_at_black():
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[0] = 200
    assert adjust_contrast(pixels, 1.4)[1].max() == 0


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.5])
def test_hue_turns_as_in_torchvision(turns):
    pixels = picture()
    wrong = difference(rotate_hue(pixels, turns), peer.adjust_hue(Image.fromarray(pixels), turns))
    assert wrong.mean() < 2.0  # both keep hue in 8 bits, Pillow in 255 steps, OpenCV in 256


def test_hue_of_a_grey_picture_changes_nothing():
    pixels = grayscale(picture())
    assert np.array_equal(rotate_hue(pixels, 0.1), pixels)


def test_grey_equals_torchvision_up_to_rounding():
    pixels = picture()
    assert difference(grayscale(pixels), peer.rgb_to_grayscale(Image.fromarray(pixels), 3)).max() <= 1


@pytest.mark.parametrize("sigma_px", [0.1, 0.4, 1.0, 1.6, 2.0])
def test_blur_is_near_pillows(sigma_px):
    pixels = picture()
    theirs = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma_px))
    assert difference(blur(pixels, sigma_px), theirs).mean() < 1.0


@pytest.mark.parametrize("sigma_px", [0.28, 0.7, 2.0])
def test_blur_spreads_a_point_as_a_gaussian(sigma_px):
    pixels = np.zeros((31, 31, 3), dtype=np.uint8)
    pixels[15, 15] = 255
    reach = math.ceil(3 * sigma_px)
    weights = [math.exp(-0.5 * (i / sigma_px) ** 2) for i in range(-reach, reach + 1)]
    line = np.zeros(31)
    line[15 - reach : 16 + reach] = np.array(weights) / sum(weights)
    assert difference(blur(pixels, sigma_px)[..., 1], 255 * np.outer(line, line)).max() <= 1


def test_tiny_blur_leaves_the_picture_alone():
    pixels = picture()
    assert np.array_equal(blur(pixels, 0.2), pixels)


def random_steps(seed):
    rng = random.Random(seed)
    factors = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    steps = [ColourStep(name, rng.uniform(1 - half, 1 + half)) for name, half in factors.items()]
    steps.append(ColourStep("hue", rng.uniform(-0.1, 0.1)))
    rng.shuffle(steps)
    return steps


@pytest.mark.parametrize("seed", range(4))
def test_steps_are_applied_in_their_order_as_torchvision_does(seed):
    steps = random_steps(seed)
    pixels = picture()
    theirs = Image.fromarray(pixels)
    for name, amount in steps:
        theirs = getattr(peer, f"adjust_{name}")(theirs, amount)
    assert difference(apply_steps(pixels, steps, is_gray=False), theirs).mean() < 3.0


def test_nothing_to_do_changes_nothing():
    pixels = picture()
    assert np.array_equal(apply_steps(pixels, [], is_gray=False), pixels)
    assert np.array_equal(apply_fused(pixels, [], is_gray=False), pixels)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("amount", [0.6, 0.8])
def test_one_fused_operation_equals_the_exact_one_where_nothing_is_clipped(name, amount):
    pixels = picture()
    steps = [ColourStep(name, amount)]
    wrong = difference(apply_fused(pixels, steps, is_gray=False), apply_steps(pixels, steps, is_gray=False))
    assert wrong.max() <= 2


def test_fused_grey_is_grey():
    pixels = picture()
    assert difference(apply_fused(pixels, [], is_gray=True), grayscale(pixels)).max() <= 1


def test_fused_operations_follow_their_order():
    steps = random_steps(1)
    pixels = picture().astype(float) / 255
    mean = pixels.reshape(-1, 3).mean(0)
    matrix = np.eye(3, 4)
    for step in steps:
        one = colour_matrix([step], matrix[:, :3] @ mean + matrix[:, 3], is_gray=False)
        matrix = one[:, :3] @ matrix + np.pad(one[:, 3:], ((0, 0), (3, 0)))
    assert colour_matrix(steps, mean, is_gray=False) == pytest.approx(matrix, abs=1e-12)


def test_fused_hue_keeps_luma_and_turns_the_way_the_exact_one_does():
    matrix = colour_matrix([ColourStep("hue", 1 / 12)], np.zeros(3), is_gray=False)
    assert np.array([0.299, 0.587, 0.114]) @ matrix[:, :3] == pytest.approx([0.299, 0.587, 0.114], abs=1e-6)
    red = matrix[:, :3] @ [1.0, 0.0, 0.0]
    exact = rotate_hue(np.full((1, 1, 3), (255, 0, 0), dtype=np.uint8), 1 / 12)[0, 0]
    assert exact[1] > exact[2]
    assert red[1] > red[2]


def test_fused_stays_near_the_exact_operations():
    wrong = [
        difference(apply_fused(picture(seed=s), random_steps(s), is_gray=False), exact).mean()
        for s in range(12)
        for exact in [apply_steps(picture(seed=s), random_steps(s), is_gray=False)]
    ]
    assert np.median(wrong) < 12
