import io

import numpy as np
import pytest
from PIL import Image

from declip_cli.data.catalog import open_dataset
from declip_cli.data.decode import decode_image
from declip_cli.data.prepare.config import CleanConfig
from declip_cli.data.prepare.deduplicate import Deduplicator
from declip_cli.data.prepare.hashes import PhashIndex
from declip_cli.data.prepare.images import perceptual_hash
from declip_cli.data.prepare.process import Pair, caption_problem, image_problem
from declip_cli.data.sources.records import Rejected
from declip_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("caption", "options", "problem"),
    [
        ("abc", {}, ""),
        ("abc", {"min_caption_chars": 4}, "caption too short"),
        ("abcd", {"min_caption_chars": 4, "max_caption_chars": 4}, ""),
        ("abcde", {"max_caption_chars": 4}, "caption too long"),
        ("a red bus", {"scripts": ("latin",)}, ""),
        ("красный автобус", {"scripts": ("latin",)}, "other script"),
        ("красный автобус", {"scripts": ("latin", "cyrillic")}, ""),
        ("赤いバス in Tokyo", {"scripts": ("latin",)}, ""),
        ("赤いバスが走る bus", {"scripts": ("latin",)}, "other script"),
        ("café Ñandú", {"scripts": ("Latin",)}, ""),
        ("2010 🚌", {"scripts": ("latin",)}, ""),
    ],
)
def test_captions_are_filtered_by_length_and_script(caption, options, problem):
    assert caption_problem(caption, CleanConfig(**options)) == problem


@pytest.mark.parametrize(
    ("size", "problem"),
    [((200, 100), ""), ((99, 300), "image too small"), ((301, 100), "aspect ratio"), ((100, 300), "")],
)
def test_images_are_filtered_by_side_and_aspect(size, problem):
    assert image_problem(*size, CleanConfig(min_side_px=100, max_aspect=3.0)) == problem


def test_impossible_filters_are_errors():
    for options in ({"max_aspect": 0.5}, {"min_caption_chars": 9, "max_caption_chars": 5}):
        with pytest.raises(ConfigError):
            CleanConfig(**options)


def encode(pixels, *, quality=90, size=None, format="JPEG"):
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.resize(size, Image.Resampling.BILINEAR) if size else image).save(file, format, quality=quality)
    return decode_image(file.getvalue())


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(3)
    few = [rng.integers(0, 256, (9, 12, 3), dtype=np.uint8) for _ in range(12)]
    return [np.asarray(Image.fromarray(p).resize((400, 300), Image.Resampling.BICUBIC)) for p in few]


def distance(a, b):
    return bin(perceptual_hash(a) ^ perceptual_hash(b)).count("1")


def test_copies_look_the_same_and_other_images_do_not(images):
    for number, pixels in enumerate(images):
        assert distance(pixels, encode(pixels, quality=40)) <= 4
        assert distance(pixels, encode(pixels, size=(200, 150))) <= 4
        assert distance(pixels, encode(pixels, format="PNG")) == 0
        assert all(distance(pixels, other) >= 10 for other in images[:number])


def test_a_image_without_structure_is_like_none():
    flat = np.full((50, 60, 3), 127, dtype=np.uint8)
    assert perceptual_hash(flat) == 0
    phashes = PhashIndex()
    phashes.add(0)
    assert len(phashes) == 0
    assert not phashes.has_near(0, 5)


def test_near_hashes_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    stored = [int(value) for value in rng.integers(1, 2**63, 300)]
    phashes = PhashIndex()
    assert not phashes.has_near(stored[0], 5)
    for value in stored:
        phashes.add(value)
    for trial in range(600):
        value = stored[trial % 300]
        for bit in rng.choice(64, trial % 9, replace=False):
            value ^= 1 << int(bit)
        for limit in (0, 2, 4, 5):
            expected = any(bin(value ^ other).count("1") <= limit for other in stored)
            assert phashes.has_near(value, limit) == expected


def pair(key, *captions, image=0, phashes=0):
    return Pair(
        key=key,
        captions=captions or (f"caption {key}",),
        jpeg=b"",
        size=(1, 1),
        original_size=(1, 1),
        image_hash=image or hash(key) % 2**63,
        phash=phashes,
    )


def causes(seen, pairs):
    outcomes = [seen.check(each) for each in pairs]
    return [outcome.cause if isinstance(outcome, Rejected) else "" for outcome in outcomes]


def test_the_same_pair_twice_is_a_duplicate_but_another_caption_is_not():
    seen = Deduplicator(CleanConfig(), PhashIndex())
    assert causes(seen, [pair("a", "x"), pair("b", "x"), pair("a", "x"), pair("a", "y")]) == [
        "",
        "",
        "duplicate key",
        "",
    ]


def test_duplicate_images_go_if_asked_for():
    pairs = [
        pair("a", image=7, phashes=0xFF00),
        pair("b", image=7, phashes=0xFF00),
        pair("c", image=8, phashes=0xFF01),
        pair("d", image=9, phashes=0xF0F0F0),
    ]
    expected = {
        "keep": ["", "", "", ""],
        "exact": ["", "duplicate image", "", ""],
        "near": ["", "duplicate image", "near-duplicate image", ""],
    }
    for duplicates, found in expected.items():
        assert causes(Deduplicator(CleanConfig(duplicates=duplicates), PhashIndex()), pairs) == found


def test_boilerplate_captions_are_kept_a_few_times_only():
    seen = Deduplicator(CleanConfig(max_caption_repeats=2), PhashIndex())
    captions = ["Click  here", "a cat", "click HERE", "click here", "a dog"]
    outcomes = causes(seen, [pair(str(n), caption) for n, caption in enumerate(captions)])
    assert outcomes == ["", "", "", "repeated caption", ""]
    assert seen.check(pair("last", "click here", "a bird")).captions == ("a bird",)


def test_images_of_an_evaluation_set_are_left_out():
    excluded = PhashIndex()
    excluded.add(0xABCDEF)
    seen = Deduplicator(CleanConfig(exclude=("test",)), excluded)
    assert causes(seen, [pair("a", phashes=0xABCDEE), pair("b", phashes=0x123456789)]) == ["excluded image", ""]


def test_what_was_seen_can_be_written_down_and_taken_up():
    config = CleanConfig(duplicates="near", max_caption_repeats=1)
    first = [pair("a", "x", image=5, phashes=0xFF), pair("b", "y", image=6, phashes=0xFF00FF00)]
    before = Deduplicator(config, PhashIndex())
    causes(before, first[:1])
    data = before.new_bytes()
    causes(before, first[1:])
    data += before.new_bytes()
    assert before.new_bytes() == b""
    after = Deduplicator(config, PhashIndex())
    after.restore(data)
    again = [
        pair("c", "X", image=1, phashes=1 << 40),
        pair("d", "z", image=6, phashes=1 << 41),
        pair("e", "w", image=2, phashes=0xFE),
        first[0],
    ]
    assert causes(after, again) == [
        "repeated caption",
        "duplicate image",
        "near-duplicate image",
        "duplicate key",
    ]


def test_symmetric_icons_look_the_same_when_encoded_again():
    within = []
    demo = open_dataset("demo", "test")
    for number in range(0, len(demo), 20):
        pixels = decode_image(demo.read(number).encoded)
        within.append(distance(pixels, encode(pixels, quality=75)) <= 4)
    assert sum(within) >= 0.95 * len(within)
