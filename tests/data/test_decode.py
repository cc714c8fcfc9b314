import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from declip_cli.data.decode import decode_image, decode_jpeg, decode_smaller, largest_reduction, read_header
from declip_cli.errors import DataError


def photograph(height=37, width=53, seed=0):
    """Smooth colors, so that JPEG keeps them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width, height, *, body=b"", bits=8, color=0):
    """A PNG file by hand, to lie in its header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def cause_of(data, **options):
    with pytest.raises(DataError) as caught:
        decode_image(data, **options)
    assert caught.value.cause in caught.value.message
    return caught.value.cause


def mean_difference(one, other):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).mean()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_jpeg_is_decoded_as_pillow_decodes_it(options):
    data = encode(photograph(), quality=90, **options)
    pixels = decode_image(data)
    assert pixels.shape == (37, 53, 3)
    assert pixels.dtype == np.uint8
    assert mean_difference(pixels, Image.open(io.BytesIO(data))) < 0.1


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_as_they_were(format):
    image = photograph()
    assert np.array_equal(decode_image(encode(image, format)), np.asarray(image))


def test_webp_is_decoded():
    data = encode(photograph(), "WEBP", quality=90)
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_as_their_exif_data_say(orientation, format):
    exif = Image.Exif()
    exif[0x010F] = "a maker, so that the orientation is not the first entry"
    exif[0x0112] = orientation
    data = encode(photograph(), format, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    pixels = decode_image(data)
    assert pixels.shape[:2] == ((37, 53) if orientation <= 4 else (53, 37))
    assert mean_difference(pixels, upright) < 0.1


def test_exif_data_in_big_endian_order_are_understood():
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    assert decode_image(encode(photograph(), exif=exif)).shape == (53, 37, 3)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\0" * 30]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, and it is
def test_nonsense_in_the_exif_data_does_no_harm(exif):
    data = encode(photograph())
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert decode_image(data).shape == (37, 53, 3)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_can_be_decoded_smaller(reduction, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(304, 208), quality=95, exif=exif.tobytes())
    header = read_header(data)
    assert header == ((208, 304) if orientation <= 4 else (304, 208)) + (True, orientation == 1)
    pixels = decode_jpeg(data, header, reduction=reduction)
    assert pixels.shape == (header.height // reduction, header.width // reduction, 3)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert mean_difference(pixels, upright.resize(pixels.shape[1::-1], Image.Resampling.BOX)) < 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"\xff\xc0" * 9}, {"exif": b"Exif\0\0"}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_the_header_of_a_jpeg_tells_its_size_and_kind(mode, options):
    assert read_header(encode(photograph().convert(mode), **options)) == (53, 37, mode != "CMYK", True)


def test_sides_of_a_smaller_jpeg_are_rounded_up():
    data = encode(photograph(37, 53))
    assert decode_jpeg(data, read_header(data), reduction=4).shape == (10, 14, 3)


def test_jpegs_are_decoded_just_large_enough():
    sides = (10, 39, 40, 79, 80, 159, 160, 999)
    assert [largest_reduction(side_px, 20) for side_px in sides] == [
        1,
        1,
        2,
        2,
        4,
        4,
        8,
        8,
    ]
    for image_format, shape in (("JPEG", (50, 75, 3)), ("PNG", (200, 300, 3))):
        data = encode(photograph(200, 300), image_format)
        assert decode_smaller(data, read_header(data), 50).shape == shape


def test_an_orientation_that_only_xmp_tells_turns_no_jpeg():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>'
    data = encode(photograph())
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    assert read_header(data)[:2] == (53, 37)
    assert decode_jpeg(data, read_header(data)).shape == (37, 53, 3)


def test_gray_jpeg_has_three_equal_channels():
    pixels = decode_image(encode(photograph().convert("L")))
    assert pixels.shape == (37, 53, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_cmyk_jpeg_shows_its_colors():
    data = encode(Image.new("RGB", (16, 16), (250, 40, 10)).convert("CMYK"), quality=95)
    assert decode_image(data).reshape(-1, 3).mean(0) == pytest.approx([250, 40, 10], abs=3)


def test_sixteen_bits_are_cut_to_eight():
    gray = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
    pixels = decode_image(encode(Image.fromarray(gray), "PNG"))
    assert pixels[..., 0].tolist() == (gray >> 8).tolist()


def test_sixteen_bit_colors_are_cut_to_eight():
    body = b"\0" + struct.pack(">6H", 0xFF00, 0x8000, 0x0100, 0, 0xFFFF, 0x4321)
    pixels = decode_image(png(2, 1, body=body, bits=16, color=2))
    assert pixels.tolist() == [[[255, 128, 1], [0, 255, 67]]]


def test_palette_is_turned_into_colors():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert decode_image(encode(image, "PNG")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert decode_image(encode(image, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize(("mode", "color"), [("LA", (0, 51)), ("RGBA", (0, 0, 0, 51))])
def test_transparency_is_laid_over_white(mode, color):
    assert decode_image(encode(Image.new(mode, (1, 1), color), "PNG")).tolist() == [[[204, 204, 204]]]


def test_black_and_white_becomes_rgb():
    assert decode_image(encode(Image.new("1", (1, 1), 1), "PNG")).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_frame(format):
    first, second = Image.new("RGB", (8, 6), (255, 0, 0)), Image.new("RGB", (8, 6), (0, 0, 255))
    data = encode(first, format, save_all=True, append_images=[second], lossless=True)
    pixels = decode_image(data)
    assert pixels.shape == (6, 8, 3)
    assert (pixels == [255, 0, 0]).all()


def test_an_empty_file_is_refused():
    assert cause_of(b"") == "empty file"


@pytest.mark.parametrize("data", [b"\0", b"not an image at all", b"<html>404</html>", b"\xff\xd8", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_refused(data):
    assert cause_of(data) in ("not an image", "truncated image", "damaged image")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_refused(format, share):
    data = encode(photograph(200, 300), format)
    assert cause_of(data[: int(len(data) * share)]) in ("truncated image", "damaged image")


def test_a_truncated_jpeg_with_a_whole_thumbnail_is_called_truncated():
    thumbnail = encode(photograph(8, 8))
    data = encode(photograph(200, 300))
    data = data[:2] + b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
    assert cause_of(data[:-200]) == "truncated image"


def test_a_damaged_png_is_refused():
    data = bytearray(encode(photograph(), "PNG"))
    at = data.index(b"IDAT") + 20
    data[at : at + 200] = bytes(200)
    assert cause_of(bytes(data)) == "damaged image"


def test_floating_point_pixels_are_refused():
    assert cause_of(encode(Image.new("F", (2, 2), 0.5), "TIFF")) == "unsupported pixels"


def test_program_code_is_not_run():
    assert cause_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n") == "not an image"


def jpeg_bomb():
    data = encode(photograph())
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", 50_000, 50_000) + data[at + 9 :]


@pytest.mark.parametrize(
    "data",
    [
        png(50_000, 50_000, body=bytes(100)),
        jpeg_bomb(),
        encode(photograph(), "GIF").replace(struct.pack("<HH", 53, 37), struct.pack("<HH", 50_000, 50_000)),
    ],
    ids=["png", "jpeg", "gif"],
)
def test_a_decompression_bomb_is_refused_without_taking_its_memory(data):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cause_of(data) == "too many pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; 50,000^2 are 7 GB


def test_the_pixel_limit_can_be_lower():
    image = photograph()
    assert decode_image(encode(image, "PNG"), max_pixels=37 * 53).shape == (37, 53, 3)
    assert cause_of(encode(image, "PNG"), max_pixels=37 * 53 - 1) == "too many pixels"
    assert cause_of(encode(image), max_pixels=37 * 53 - 1) == "too many pixels"
