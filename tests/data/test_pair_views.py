import io
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from declip_cli.config import AugmentConfig, Views
from declip_cli.data.dataset import Dataset, Example, Skips
from declip_cli.data.image_views import ImageViews
from declip_cli.data.pair_views import PairViews, UnreadablePair
from declip_cli.data.text_views import TextViews
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.errors import DataError

SIDE = 8


def jpeg(side):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


class OneSample(Dataset):
    """The same pair under every number."""

    fingerprint = ""
    skipped = Skips()

    def __init__(self, image, captions=("a dog",), error=None):
        self.sample, self.error, self.num_reads = Example("first", image, captions), error, 0

    def __len__(self):
        return 10

    def key(self, index):
        if self.error:
            raise self.error
        return self.sample.key

    def read(self, index):
        self.num_reads += 1
        if self.error:
            raise self.error
        return self.sample


def pair_views(samples, texts=("plain",), cache_bytes=0, num_captions=1):
    augment = AugmentConfig()
    return PairViews(
        samples,
        Views(images=("plain", "augmented"), texts=texts),
        image_views=ImageViews(augment, SIDE),
        text_views=TextViews(augment, Tokenizer(16)),
        num_captions=num_captions,
        seed=0,
        cache_bytes=cache_bytes,
    )


def draw(pairs, index=0, epoch=0, num_texts=1, caption_ids=(), boxes=()):
    images = np.zeros((2, SIDE, SIDE, 3), dtype=np.uint8)
    tokens, mlm_labels = np.full((num_texts, 16), 7), np.full(16, 7)
    return images, tokens, mlm_labels, pairs.draw(index, epoch, images, tokens, mlm_labels, caption_ids, boxes)


def test_a_pair_comes_with_all_its_views():
    pairs = pair_views(OneSample(jpeg(20)), texts=("plain", "masked"))
    for index in range(20):
        images, tokens, mlm_labels, longest = draw(pairs, index, num_texts=2)
        assert all(view.std() > 0 for view in images)
        assert longest == 4
        assert tokens[0].tolist() == [49406, 320, 1929, 49407] + 12 * [0]
        assert tokens[1, [0, 3]].tolist() == [49406, 49407]
        assert not tokens[1, 4:].any()
        hidden = np.flatnonzero(mlm_labels != -100)
        assert set(hidden) <= {1, 2}
        assert mlm_labels[hidden].tolist() == tokens[0, hidden].tolist()


def test_the_number_of_a_caption_is_that_of_the_caption_itself_whatever_view_shows_it():
    found = []
    for kind, caption in (("masked", "A dog"), ("augmented", "a dog"), ("plain", "a cat")):
        caption_ids = np.zeros(1, dtype=np.int64)
        draw(pair_views(OneSample(jpeg(20), (caption,)), (kind,)), caption_ids=caption_ids)
        found.append(int(caption_ids[0]))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("num_captions", "num_shown"), [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_the_texts_of_a_pair_show_different_captions_in_turn_as_far_as_there_are(num_captions, num_shown):
    captions = ("a dog", "a cat", "a cow")
    pairs = pair_views(OneSample(jpeg(20), captions), ("plain",) * 5, num_captions=num_captions)
    orders = set()
    for index in range(60):
        caption_ids = np.zeros(num_captions, dtype=np.int64)
        _, tokens, _, _ = draw(pairs, index, num_texts=5, caption_ids=caption_ids)
        words = [Tokenizer().decode(row) for row in tokens]
        assert len(set(words)) == num_shown
        assert words == [words[place % num_shown] for place in range(5)]
        of_ids = [caption_ids[place % num_captions] for place in range(5)]
        for one, other in itertools.combinations(range(min(5, num_captions)), 2):
            assert (of_ids[one] == of_ids[other]) == (words[one] == words[other])
        orders.add(tuple(words[:num_shown]))
    assert orders == set(itertools.permutations(captions, num_shown))


def test_without_a_masked_view_nothing_is_to_be_predicted():
    _, _, mlm_labels, _ = draw(pair_views(OneSample(jpeg(20))))
    assert set(mlm_labels.tolist()) == {-100}


def test_numbers_and_epochs_are_drawn_differently():
    pairs = pair_views(OneSample(jpeg(40)))
    one, again, other, later = (draw(pairs, *where)[0] for where in [(0, 0), (0, 0), (1, 0), (0, 1)])
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, later)


def test_text_settings_do_not_change_the_images():
    plain = draw(pair_views(OneSample(jpeg(40))))[0]
    pairs = pair_views(OneSample(jpeg(40), captions=("one", "two")), texts=("masked", "augmented"))
    masked = draw(pairs, num_texts=2)[0]
    assert np.array_equal(plain, masked)


@pytest.mark.parametrize("side", [SIDE, 5 * SIDE])
def test_an_unreadable_image_is_named_by_its_key(side):
    pairs = pair_views(OneSample(jpeg(side)[:-150]))
    for _ in range(2):
        with pytest.raises(UnreadablePair, match="sample first cannot be used: truncated image") as caught:
            draw(pairs, 7)
        assert caught.value.sample == (7, "first", "truncated image")


def test_a_sample_that_cannot_be_read_is_named_by_its_number_and_not_tried_again():
    samples = OneSample(b"", error=DataError("no such tar", remedy="look for it", cause="missing shard"))
    pairs = pair_views(samples)
    for _ in range(3):
        with pytest.raises(UnreadablePair) as caught:
            draw(pairs, 7)
        assert caught.value.sample == (7, "number 7", "missing shard")
    assert samples.num_reads == 1


@pytest.mark.parametrize(("cache_bytes", "num_reads"), [(10 * 12 * 12 * 3, 1), (10 * 12 * 12 * 3 - 1, 3)])
def test_images_are_kept_only_if_all_of_the_data_set_would_fit(cache_bytes, num_reads):
    samples = OneSample(jpeg(12))
    pairs = pair_views(samples, cache_bytes=cache_bytes)
    for epoch in range(3):
        draw(pairs, epoch=epoch)
    assert samples.num_reads == num_reads


def test_a_pair_without_a_caption_is_told():
    with pytest.raises(UnreadablePair, match="sample first cannot be used: no caption"):
        draw(pair_views(OneSample(jpeg(40), captions=())))


def test_pixels_in_memory_are_used_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    views = [draw(pair_views(OneSample(image)))[0] for image in (pixels, file.getvalue())]
    assert np.array_equal(*views)


def test_views_are_the_same_from_many_threads():
    pairs = pair_views(OneSample(jpeg(40)))
    indices = list(range(10)) * 20
    random.Random(0).shuffle(indices)
    alone = {index: draw(pairs, index)[0] for index in range(10)}
    with ThreadPoolExecutor(4) as pool:
        for index, (images, *_) in zip(indices, pool.map(lambda n: draw(pairs, n), indices), strict=True):
            assert np.array_equal(images, alone[index])
