import io
import math
import random

import numpy as np
import pytest
import torch
import torchvision.transforms as peer
from PIL import Image, ImageFilter

from declip_cli.config import AugmentConfig
from declip_cli.data.image_views import ImageViews, draw_crop, eval_transform
from declip_cli.errors import ConfigError, DataError

STILL = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0, flip_probability=0.0)

STILL_FIELDS = {name: getattr(STILL, name) for name in STILL.__dataclass_fields__}
NUM_VIEWS = 600


def photograph(height=60, width=80, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def drawn(config, data, kinds=("augmented",), side_px=32, seed=0):
    out = np.zeros((len(kinds), side_px, side_px, 3), dtype=np.uint8)
    views = ImageViews(config, side_px)
    views.draw(views.open(data), kinds, random.Random(seed), out)
    return out


def kolmogorov_distance(one, other):
    """Largest difference of the two empirical distribution functions."""
    values = np.sort(np.concatenate([one, other]))
    ranks = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (one, other)]
    return np.abs(ranks[0] - ranks[1]).max()


def assert_same_distribution(one, other):
    """Kolmogorov and Smirnov's test on two samples of equal size, at the level 0.0005."""
    assert kolmogorov_distance(np.array(one), np.array(other)) < 2.0 * math.sqrt(2 / len(one))


def test_views_fill_the_output_they_are_given():
    views = drawn(AugmentConfig(), encode(photograph()), ("plain", "augmented", "augmented"), side_px=24)
    assert views.shape == (3, 24, 24, 3)
    assert all(view.std() > 5 for view in views)
    assert not np.array_equal(views[1], views[2])


def test_the_same_random_state_gives_the_same_pixels():
    config, data = AugmentConfig(), encode(photograph())
    assert np.array_equal(drawn(config, data), drawn(config, data))
    assert not np.array_equal(drawn(config, data), drawn(config, data, seed=1))


@pytest.mark.parametrize("seed", range(5))
def test_without_operations_a_view_is_a_resized_crop(seed):
    image = photograph(37, 53)
    crop = draw_crop(53, 37, 0.2, random.Random(seed))
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    wanted = np.asarray(image.crop(box).resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
    view = drawn(STILL, encode(image), side_px=48, seed=seed)[0]
    assert np.abs(view - wanted).max() <= 1


def test_far_smaller_views_use_every_pixel():
    checks = Image.fromarray(np.indices((320, 320)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    config = AugmentConfig(**{**STILL_FIELDS, "crop_area_min": 1.0})
    view = drawn(config, encode(checks), side_px=32)
    assert view.mean() == pytest.approx(127.5, abs=2)
    assert view.std() < 20


def test_flips_mirror_the_view():
    data = encode(photograph())
    always, never = ({**STILL_FIELDS, "flip_probability": p, "crop_area_min": 1.0} for p in (1.0, 0.0))
    flipped, plain = drawn(AugmentConfig(**always), data), drawn(AugmentConfig(**never), data)
    assert np.array_equal(flipped[:, :, ::-1], plain)


def test_plain_views_are_crops_only():
    config = AugmentConfig(plain_crop_area_min=1.0, jitter_probability=1.0, grayscale_probability=1.0)
    square = photograph(32, 32)
    assert np.array_equal(drawn(config, encode(square), ("plain",))[0], np.asarray(square))


def test_gray_views_are_gray():
    view = drawn(AugmentConfig(grayscale_probability=1.0), encode(photograph()))
    assert np.array_equal(view[..., 0], view[..., 1])


@pytest.mark.parametrize(("area_min", "reduction"), [(0.9, 8), (0.05, 4), (0.0, 2)])
def test_a_large_jpeg_is_decoded_smaller_without_a_visible_difference(area_min, reduction):
    image, seed = photograph(600, 800), 3
    config = AugmentConfig(**{**STILL_FIELDS, "crop_area_min": area_min})
    crop = draw_crop(800, 600, area_min, random.Random(seed))
    side_px = min(crop.width, crop.height) // reduction - 3
    left, top, width, height = (round(length / reduction) * reduction for length in crop)
    wanted = image.resize((side_px, side_px), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    view = drawn(config, encode(image, "JPEG", quality=95), side_px=side_px, seed=seed)[0]
    assert np.abs(view.astype(int) - wanted).mean() < 1.5


def test_a_large_jpeg_waits_for_its_crops_with_the_sides_it_shows():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photograph(64, 80), "JPEG", exif=exif.tobytes())
    waiting, decoded = ImageViews(STILL, 32).open(data), ImageViews(STILL, 33).open(data)
    assert waiting.content == data
    assert decoded.content.shape == (80, 64, 3)
    assert waiting.header[:2] == decoded.header[:2] == (64, 80)


@pytest.mark.parametrize(("height", "width"), [(60, 80), (7, 300), (300, 7), (1, 1), (3, 2)])
def test_crops_lie_inside_the_image(height, width):
    rng = random.Random(0)
    for _ in range(200):
        crop = draw_crop(width, height, 0.2, rng)
        assert 0 <= crop.left <= crop.left + crop.width <= width
        assert 0 <= crop.top <= crop.top + crop.height <= height
        assert crop.width >= 1
        assert crop.height >= 1


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10)])
def test_very_long_images_are_cropped_as_torchvision_does(height, width):
    image = torch.empty(3, height, width)
    top, left, crop_height, crop_width = peer.RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3])
    assert draw_crop(width, height, 0.9, random.Random(0)) == (left, top, crop_width, crop_height)


@pytest.mark.parametrize(("height", "width", "area_min"), [(375, 500, 0.2), (64, 64, 0.8)])
def test_crops_are_distributed_as_torchvisions(height, width, area_min):
    torch.manual_seed(0)
    rng = random.Random(0)
    image = torch.empty(3, height, width)
    num = 1500
    theirs = [peer.RandomResizedCrop.get_params(image, [area_min, 1.0], [3 / 4, 4 / 3]) for _ in range(num)]
    ours = [draw_crop(width, height, area_min, rng) for _ in range(num)]
    assert_same_distribution([c.width * c.height for c in ours], [h * w for _, _, h, w in theirs])
    assert_same_distribution([c.width / c.height for c in ours], [w / h for _, _, h, w in theirs])
    assert_same_distribution([c.left for c in ours], [left for _, left, _, _ in theirs])
    assert_same_distribution([c.top for c in ours], [top for top, _, _, _ in theirs])


def statistics(view):
    """Brightness, contrast, saturation, the mean hue as a direction, blur energy and asymmetry."""
    rgb = np.asarray(view).astype(float)
    hsv = np.asarray(Image.fromarray(view).convert("HSV")).astype(float)
    angle = hsv[..., 0] / 255 * 2 * math.pi
    luma = rgb @ [0.299, 0.587, 0.114]
    laplacian = 4 * luma[1:-1, 1:-1] - luma[2:, 1:-1] - luma[:-2, 1:-1] - luma[1:-1, 2:] - luma[1:-1, :-2]
    middle = luma.shape[1] // 2
    return (
        luma.mean(),
        luma.std(),
        hsv[..., 1].mean(),
        math.atan2((np.sin(angle) * hsv[..., 1]).mean(), (np.cos(angle) * hsv[..., 1]).mean()),
        math.log(laplacian.std() + 0.1),
        luma[:, :middle].mean() - luma[:, middle:].mean(),
    )


def our_statistics(config, num=NUM_VIEWS):
    data = encode(photograph(32, 34))
    return np.array([statistics(drawn(config, data, seed=seed)[0]) for seed in range(num)])


def statistics_of_the_original(jitter_probability, grayscale_probability, num=NUM_VIEWS):
    """Views drawn by torchvision as the original wrote them."""

    def soften(image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    torch.manual_seed(1)
    random.seed(1)
    draw = peer.Compose(
        [
            peer.RandomResizedCrop(32, scale=(0.8, 1.0)),
            peer.RandomApply([peer.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=jitter_probability),
            peer.RandomGrayscale(grayscale_probability),
            peer.RandomApply([soften], p=0.5),
            peer.RandomHorizontalFlip(),
        ]
    )
    image = photograph(32, 34)
    return np.array([statistics(np.asarray(draw(image))) for _ in range(num)])


@pytest.fixture(scope="module")
def originals_views():
    return statistics_of_the_original(0.8, 0.2)


def test_augmented_views_are_distributed_as_the_originals(originals_views):
    ours = our_statistics(AugmentConfig(crop_area_min=0.8))
    columns = (0, 1, 2, 3, 5)  # but for the fine grain that the original's rounding between the operations leaves
    for column in columns:
        assert_same_distribution(ours[:, column], originals_views[:, column])
    ours, originals_views = ours[:, columns], originals_views[:, columns]
    assert np.all(np.abs(ours.mean(0) - originals_views.mean(0)) < 0.2 * originals_views.std(0))
    assert ours.var(0) == pytest.approx(originals_views.var(0), rel=0.25)


def test_views_are_blurred_as_the_originals():
    theirs = statistics_of_the_original(0.0, 0.0, num=200)[:, 4]
    still = {"crop_area_min": 0.8, "jitter_probability": 0.0, "grayscale_probability": 0.0}
    assert_same_distribution(our_statistics(AugmentConfig(**still), num=200)[:, 4], theirs)
    with pytest.raises(AssertionError):
        assert_same_distribution(our_statistics(AugmentConfig(**still, blur_sigma_max_px=1.0), num=200)[:, 4], theirs)


def test_the_comparison_would_notice_weaker_jitter(originals_views):
    weak = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.15, "hue": 0.04}
    ours = our_statistics(AugmentConfig(crop_area_min=0.8, **weak))
    for column in range(4):
        with pytest.raises(AssertionError):
            assert_same_distribution(ours[:, column], originals_views[:, column])


def test_evaluation_view_equals_torchvision_to_the_pixel():
    for seed, (height, width) in enumerate([(37, 53), (64, 64), (300, 201), (40, 333), (512, 384)]):
        image = photograph(height, width, seed=seed)
        for side_px, resize_px in [(32, 36), (224, 256), (24, 24)]:
            wanted = peer.Compose([peer.Resize(resize_px), peer.CenterCrop(side_px)])(image)
            view = eval_transform(encode(image), side_px=side_px, resize_px=resize_px)
            assert np.array_equal(view, np.asarray(wanted))


def test_pixels_in_memory_are_viewed_as_their_file_would_be():
    image = photograph(90, 70)
    options = {"side_px": 32, "resize_px": 36, "interpolation": "bicubic"}
    assert np.array_equal(eval_transform(np.asarray(image), **options), eval_transform(encode(image), **options))
    assert np.array_equal(drawn(AugmentConfig(), np.asarray(image)), drawn(AugmentConfig(), encode(image)))


def test_evaluation_view_needs_a_image_as_large_as_the_view():
    with pytest.raises(ConfigError, match="resized to 30 px are too small for a view of 32 px"):
        eval_transform(encode(photograph()), side_px=32, resize_px=30)


def test_an_unreadable_image_says_why():
    with pytest.raises(DataError, match="an image cannot be read: empty file"):
        drawn(AugmentConfig(), b"")


def test_as_many_views_are_drawn_as_there_is_room_for():
    views = ImageViews(STILL, 32)
    with pytest.raises(ValueError, match="longer"):
        views.draw(views.open(encode(photograph())), ("plain",), random.Random(0), np.zeros((2, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_view_comes_with_its_place_in_the_whole_image(flip):
    height, width = 300, 200
    red, green = (np.linspace(0, 255, size).astype(np.uint8) for size in (width, height))
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = red[None, :], green[:, None]
    quiet = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0}
    views = ImageViews(AugmentConfig(flip_probability=flip, **quiet), 32)
    out = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    for seed in range(5):
        boxes = views.draw(views.open(pixels), ("augmented", "plain", "whole"), random.Random(seed), out)
        for view, box in zip(out, boxes, strict=True):
            step_x, step_y = (box.right - box.left) / 32, (box.bottom - box.top) / 32
            middle_x = box.left + step_x * (np.arange(32) + 0.5)
            middle_y = box.top + step_y * (np.arange(32) + 0.5)
            assert np.abs(view[..., 0] - 255 * middle_x).max() < 5
            assert np.abs(view[..., 1] - 255 * middle_y[:, None]).max() < 5
        assert (boxes[0].left > boxes[0].right) == (flip == 1.0)
        assert boxes[1].left < boxes[1].right
        assert boxes[2] == (0.0, 0.0, 1.0, 1.0)
