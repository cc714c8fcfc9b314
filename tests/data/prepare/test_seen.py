import io

import numpy as np
import pytest
from PIL import Image

from declip_cli.data.catalogue import open_dataset
from declip_cli.data.decode import decode_image
from declip_cli.data.prepare.config import CleanConfig
from declip_cli.data.prepare.hashes import Looks
from declip_cli.data.prepare.pictures import perceptual_hash
from declip_cli.data.prepare.seen import Seen
from declip_cli.data.prepare.stages import Pair, caption_problem, picture_problem
from declip_cli.data.sources.records import LeftOut
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
    [((200, 100), ""), ((99, 300), "picture too small"), ((301, 100), "aspect ratio"), ((100, 300), "")],
)
def test_pictures_are_filtered_by_side_and_aspect(size, problem):
    assert picture_problem(*size, CleanConfig(min_side_px=100, max_aspect=3.0)) == problem


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
def pictures():
    rng = np.random.default_rng(3)
    few = [rng.integers(0, 256, (9, 12, 3), dtype=np.uint8) for _ in range(12)]
    return [np.asarray(Image.fromarray(p).resize((400, 300), Image.Resampling.BICUBIC)) for p in few]


def distance(a, b):
    return bin(perceptual_hash(a) ^ perceptual_hash(b)).count("1")


def test_copies_look_the_same_and_other_pictures_do_not(pictures):
    for number, pixels in enumerate(pictures):
        assert distance(pixels, encode(pixels, quality=40)) <= 4
        assert distance(pixels, encode(pixels, size=(200, 150))) <= 4
        assert distance(pixels, encode(pixels, format="PNG")) == 0
        assert all(distance(pixels, other) >= 10 for other in pictures[:number])


def test_a_picture_without_structure_is_like_none():
    flat = np.full((50, 60, 3), 127, dtype=np.uint8)
    assert perceptual_hash(flat) == 0
    looks = Looks()
    looks.add(0)
    assert len(looks) == 0
    assert not looks.has_near(0, 5)


def test_near_hashes_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    stored = [int(value) for value in rng.integers(1, 2**63, 300)]
    looks = Looks()
    assert not looks.has_near(stored[0], 5)
    for value in stored:
        looks.add(value)
    for trial in range(600):
        value = stored[trial % 300]
        for bit in rng.choice(64, trial % 9, replace=False):
            value ^= 1 << int(bit)
        for limit in (0, 2, 4, 5):
            expected = any(bin(value ^ other).count("1") <= limit for other in stored)
            assert looks.has_near(value, limit) == expected


def pair(key, *captions, picture=0, looks=0):
    return Pair(
        key=key,
        captions=captions or (f"caption {key}",),
        jpeg=b"",
        size=(1, 1),
        original_size=(1, 1),
        picture_hash=picture or hash(key) % 2**63,
        looks_hash=looks,
    )


def causes(seen, pairs):
    outcomes = [seen.check(each) for each in pairs]
    return [outcome.cause if isinstance(outcome, LeftOut) else "" for outcome in outcomes]


def test_the_same_pair_twice_is_a_duplicate_but_another_caption_is_not():
    seen = Seen(CleanConfig(), Looks())
    assert causes(seen, [pair("a", "x"), pair("b", "x"), pair("a", "x"), pair("a", "y")]) == [
        "",
        "",
        "duplicate key",
        "",
    ]


def test_duplicate_pictures_go_if_asked_for():
    pairs = [
        pair("a", picture=7, looks=0xFF00),
        pair("b", picture=7, looks=0xFF00),
        pair("c", picture=8, looks=0xFF01),
        pair("d", picture=9, looks=0xF0F0F0),
    ]
    expected = {
        "keep": ["", "", "", ""],
        "exact": ["", "duplicate picture", "", ""],
        "near": ["", "duplicate picture", "near-duplicate picture", ""],
    }
    for duplicates, found in expected.items():
        assert causes(Seen(CleanConfig(duplicates=duplicates), Looks()), pairs) == found


def test_boilerplate_captions_are_kept_a_few_times_only():
    seen = Seen(CleanConfig(max_caption_repeats=2), Looks())
    captions = ["Click  here", "a cat", "click HERE", "click here", "a dog"]
    outcomes = causes(seen, [pair(str(n), caption) for n, caption in enumerate(captions)])
    assert outcomes == ["", "", "", "repeated caption", ""]
    assert seen.check(pair("last", "click here", "a bird")).captions == ("a bird",)


def test_pictures_of_an_evaluation_set_are_left_out():
    excluded = Looks()
    excluded.add(0xABCDEF)
    seen = Seen(CleanConfig(exclude=("test",)), excluded)
    assert causes(seen, [pair("a", looks=0xABCDEE), pair("b", looks=0x123456789)]) == ["excluded picture", ""]


def test_what_was_seen_can_be_written_down_and_taken_up():
    config = CleanConfig(duplicates="near", max_caption_repeats=1)
    first = [pair("a", "x", picture=5, looks=0xFF), pair("b", "y", picture=6, looks=0xFF00FF00)]
    before = Seen(config, Looks())
    causes(before, first[:1])
    data = before.new_bytes()
    causes(before, first[1:])
    data += before.new_bytes()
    assert before.new_bytes() == b""
    after = Seen(config, Looks())
    after.restore(data)
    again = [
        pair("c", "X", picture=1, looks=1 << 40),
        pair("d", "z", picture=6, looks=1 << 41),
        pair("e", "w", picture=2, looks=0xFE),
        first[0],
    ]
    assert causes(after, again) == [
        "repeated caption",
        "duplicate picture",
        "near-duplicate picture",
        "duplicate key",
    ]


def test_symmetric_icons_look_the_same_when_encoded_again():
    within = []
    demo = open_dataset("demo", "test")
    for number in range(0, len(demo), 20):
        pixels = decode_image(demo.read(number).encoded)
        within.append(distance(pixels, encode(pixels, quality=75)) <= 4)
    assert sum(within) >= 0.95 * len(within)
