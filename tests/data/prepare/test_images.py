import io

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from declip_cli.data.prepare.images import decode_for_phash, shrink_image
from declip_cli.errors import DataError


@pytest.fixture(scope="module")
def photograph():
    """A temple with fine ornaments, 640 x 427 px."""
    return load_sample_image("china.jpg")


@pytest.mark.parametrize("height", [400, 256, 215, 100, 17])
def test_shrinking_gives_the_numbers_of_pillows_bicubic_filter(photograph, height):
    small = shrink_image(encode(photograph, "PNG"), side_px=height, quality=100)
    size = (round(640 * height / 427), height)
    expected = np.asarray(Image.fromarray(photograph).resize(size, Image.Resampling.BICUBIC))
    assert small.pixels.shape == expected.shape
    assert np.abs(small.pixels - expected.astype(int)).max() <= 1


def encode(pixels, format="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("side_px", [60, 106, 150, 300])
def test_large_jpegs_shrink_to_the_side_and_look_as_others_make_them(photograph, side_px):
    data = encode(photograph[:424], quality=95)
    small = shrink_image(data, side_px=side_px, quality=95)
    found = Image.open(io.BytesIO(small.jpeg))
    assert small.size == found.size == (round(side_px * 640 / 424), side_px)
    assert small.original_size == (640, 424)
    expected = np.asarray(Image.open(io.BytesIO(data)).resize(found.size, Image.Resampling.BICUBIC))
    whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    area = cv2.resize(whole, found.size, interpolation=cv2.INTER_AREA)  # as img2dataset does it
    peer = cv2.imdecode(cv2.imencode(".jpg", area, [cv2.IMWRITE_JPEG_QUALITY, 95])[1], cv2.IMREAD_COLOR_RGB)
    error, error_of_peer = (np.abs(each - expected.astype(float)).mean() for each in (np.asarray(found), peer))
    assert error <= 1.3 * error_of_peer


def test_images_are_never_enlarged(photograph):
    data = encode(photograph[:50, :70], "PNG")
    small = shrink_image(data, side_px=64, quality=90)
    assert small.size == (70, 50)
    data = encode(photograph[:50, :70])
    assert shrink_image(data, side_px=64, quality=90).jpeg == data


def test_rotated_jpegs_come_out_upright(photograph):
    exif = Image.Exif()
    exif[0x0112] = 6
    small = shrink_image(encode(photograph[:50, :70], exif=exif), side_px=256, quality=95)
    found = Image.open(io.BytesIO(small.jpeg))
    assert small.size == found.size == (50, 70)
    assert 0x0112 not in found.getexif()


def test_extreme_shapes_keep_at_least_a_pixel(photograph):
    small = shrink_image(encode(photograph[:2], "PNG"), side_px=64, quality=90)
    assert small.size == (640, 2)


def test_a_small_jpeg_that_is_cut_off_is_refused_too(photograph):
    with pytest.raises(DataError) as caught:
        shrink_image(encode(photograph[:50, :70])[:700], side_px=64, quality=90)
    assert caught.value.cause == "truncated image"


def test_looks_are_decoded_small(photograph):
    assert min(decode_for_phash(encode(photograph)).shape[:2]) < 100
    assert decode_for_phash(encode(photograph[:40, :40], "PNG")).shape == (40, 40, 3)
