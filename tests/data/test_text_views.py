import random
import threading
from collections import Counter

import pytest

from declip_cli.config import AugmentConfig
from declip_cli.data import text_views
from declip_cli.data.synonyms import STOP_WORDS
from declip_cli.data.text_views import (
    NO_LABEL,
    TextViews,
    delete_words,
    drop_stop_words,
    replace_by_synonym,
    swap_words,
)
from declip_cli.data.tokenizer import END, MASK, NUM_ORDINARY, START, VOCAB_SIZE, Tokenizer

CAPTION = "two dogs run along the long beach near Porto"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(context_length=77)


@pytest.fixture(scope="module")
def views(tokenizer):
    return TextViews(AugmentConfig(), tokenizer)


def words_of(views, tokenizer, caption, seed, kind="augmented"):
    ids, _ = views.draw(kind, caption, random.Random(seed))
    return tokenizer.decode(ids).split()


def test_a_plain_view_is_the_caption(views, tokenizer):
    ids, labels = views.draw("plain", CAPTION, random.Random(0))
    assert ids == [START, *tokenizer.word_ids(CAPTION), END]
    assert labels == [NO_LABEL] * len(ids)


@pytest.mark.parametrize("kind", ["plain", "augmented", "masked"])
def test_the_same_generator_gives_the_same_view(kind, views):
    draws = [views.draw(kind, CAPTION, random.Random(5)) for _ in range(3)]
    assert draws[0] == draws[1] == draws[2]


def test_drawing_leaves_the_global_generator_alone(views):
    random.seed(1)
    before = random.getstate()
    for kind in ("plain", "augmented", "masked"):
        views.draw(kind, CAPTION, random.Random(2))
    assert random.getstate() == before


@pytest.mark.parametrize("kind", ["plain", "augmented", "masked"])
@pytest.mark.parametrize("caption", ["", " \n", "zebra", "the", "ß 😀", "," * 5])
def test_short_captions_are_no_trouble(kind, caption, views):
    for seed in range(30):
        ids, labels = views.draw(kind, caption, random.Random(seed))
        assert (ids[0], ids[-1]) == (START, END)
        assert len(labels) == len(ids)


@pytest.mark.parametrize("kind", ["plain", "augmented", "masked"])
def test_long_captions_are_cut_to_the_context(kind):
    short = TextViews(AugmentConfig(), Tokenizer(context_length=6))
    ids, labels = short.draw(kind, CAPTION, random.Random(0))
    assert len(ids) == len(labels) == 6
    assert ids[-1] == END


def test_captions_of_the_same_tokens_have_the_same_number(views):
    same = ["a dog & a cat.", "A  dog &amp; a\tCat .", "a dog & a cat."]
    others = ["a dog & a cat", "a cat & a dog.", "", "word " * 60, "word " * 60 + "end"]
    numbers = {views.identify(caption) for caption in same}
    assert len(numbers) == 1
    assert len(numbers | {views.identify(caption) for caption in others}) == 1 + len(others)
    many = [views.identify(f"dog {number}") for number in range(1000)]
    assert len(set(many)) == 1000
    assert min(many) < -(2**62)  # all 64 bits are used
    assert 2**62 < max(many) < 2**63


def test_the_operations_are_chosen_evenly(monkeypatch, tokenizer):
    counts = Counter()
    for name in ("replace_by_synonym", "swap_words"):
        monkeypatch.setattr(text_views, name, lambda text, rng, name=name: counts.update([name]) or text)
    monkeypatch.setattr(text_views, "delete_words", lambda *_, **__: counts.update(["delete_words"]) or "")
    views = TextViews(AugmentConfig(), tokenizer)
    rng = random.Random(0)
    for _ in range(3000):
        views.draw("augmented", CAPTION, rng)
    assert set(counts) == {"replace_by_synonym", "swap_words", "delete_words"}
    assert all(abs(count - 1000) < 100 for count in counts.values())  # 3.9 standard deviations


def test_no_operations_leave_the_text_alone(tokenizer):
    views = TextViews(AugmentConfig(text_operations=()), tokenizer)
    assert views.draw("augmented", CAPTION, random.Random(0))[0] == [START, *tokenizer.word_ids(CAPTION), END]


def test_keywords_lose_all_stop_words_with_a_probability_and_keep_a_text_of_nothing_else(tokenizer):
    assert drop_stop_words("The cat is on a Mat , not the bed") == "cat Mat , bed"
    assert drop_stop_words("to be or not to be") == "to be or not to be"
    views, rng = TextViews(AugmentConfig(stop_word_probability=0.3), tokenizer), random.Random(0)
    bare, whole = (tokenizer.frame(tokenizer.word_ids(text)) for text in ("dog grass", "a dog on the grass"))
    drawn = [views.draw("keywords", "a dog on the grass", rng)[0] for _ in range(2000)]
    assert drawn.count(bare) + drawn.count(whole) == 2000
    assert drawn.count(bare) == pytest.approx(600, abs=80)  # 3.9 standard deviations


def test_augmented_keywords_lose_stop_words_and_then_see_one_operation(tokenizer):
    config = AugmentConfig(stop_word_probability=1.0, text_operations=("swap",))
    ids, _ = TextViews(config, tokenizer).draw("augmented_keywords", "a dog on the grass", random.Random(0))
    assert ids == tokenizer.frame(tokenizer.word_ids("grass dog"))


def test_swapping_exchanges_two_different_words():
    words = CAPTION.split()
    pairs = Counter()
    for seed in range(2000):
        swapped = swap_words(CAPTION, random.Random(seed)).split()
        moved = tuple(place for place, word in enumerate(swapped) if word != words[place])
        assert len(moved) == 2
        assert swapped[moved[0]] == words[moved[1]]
        pairs[moved] += 1
    assert len(pairs) == 9 * 8 // 2


def test_deleting_drops_a_tenth_of_the_words_and_never_all():
    rng = random.Random(0)
    kept = sum(len(delete_words(CAPTION, rng, probability=0.1).split()) for _ in range(4000))
    assert kept / (4000 * 9) == pytest.approx(0.9, abs=0.008)  # 5 standard deviations
    survivors = Counter(delete_words("red green blue", rng, probability=1.0) for _ in range(900))
    assert set(survivors) == {"red", "green", "blue"}
    assert min(survivors.values()) > 240


def test_deleting_and_swapping_keep_a_single_word():
    assert delete_words("zebra", random.Random(0), probability=1.0) == "zebra"
    assert swap_words("zebra", random.Random(0)) == "zebra"


def test_one_word_is_replaced_wherever_it_stands():
    seen = set()
    for seed in range(200):
        changed = replace_by_synonym("the car and the car", random.Random(seed))
        first, second = changed.removeprefix("the ").split(" and the ")
        assert first == second
        seen.add(first)
    # All synonyms of `car` in WordNet 3.0, over its five synsets.
    assert seen == {"auto", "automobile", "machine", "motorcar", "railcar", "railway car", "railroad car"} | {
        "gondola",
        "cable car",
        "elevator car",
    }


def test_each_word_with_synonyms_is_replaced_equally_often():
    changed = Counter()
    for seed in range(1200):
        words = replace_by_synonym("the car xyzzy zebra Geese", random.Random(seed)).split(" xyzzy ")
        assert (words[0] != "the car") + (words[1] != "zebra Geese") == 1
        changed["car" if words[0] != "the car" else "Geese"] += 1
    assert changed["car"] == pytest.approx(600, abs=90)  # 5 standard deviations; nothing stands for `zebra`


def test_stop_words_and_unknown_words_stay():
    text = "The of xyzzy And qwrtz"
    assert replace_by_synonym(text, random.Random(0)) == text
    assert {"the", "a", "and", "is"} <= STOP_WORDS


def test_masking_has_the_shares_of_the_paper(tokenizer):
    views = TextViews(AugmentConfig(), tokenizer)
    original = views.draw("plain", CAPTION, random.Random(0))[0]
    counts, rng = Counter(), random.Random(7)
    for _ in range(6000):
        ids, labels = views.draw("masked", CAPTION, rng)
        assert (ids[0], ids[-1], labels[0], labels[-1]) == (START, END, NO_LABEL, NO_LABEL)
        for token, label, before in zip(ids, labels, original, strict=True):
            counts["tokens"] += before not in (START, END)
            if label == NO_LABEL:
                assert token == before
                continue
            assert label == before
            counts["chosen"] += 1
            counts["masked" if token == MASK else "kept" if token == before else "random"] += 1
            assert token == MASK or token < NUM_ORDINARY
    assert counts["tokens"] == 6000 * 9
    assert counts["chosen"] / counts["tokens"] == pytest.approx(0.15, abs=0.008)  # 5 standard deviations
    for name, share in {"masked": 0.8, "random": 0.1, "kept": 0.1}.items():
        assert counts[name] / counts["chosen"] == pytest.approx(share, abs=0.022)


def test_a_masked_text_can_be_without_masks(tokenizer):
    never = TextViews(AugmentConfig(mask_probability=0.0), tokenizer)
    assert set(never.draw("masked", CAPTION, random.Random(0))[1]) == {NO_LABEL}
    always = TextViews(AugmentConfig(mask_probability=1.0), tokenizer)
    ids, labels = always.draw("masked", CAPTION, random.Random(0))
    assert labels[1:-1] == tokenizer.word_ids(CAPTION)
    assert MASK in ids


@pytest.mark.parametrize(("faithful", "limit"), [(False, NUM_ORDINARY), (True, VOCAB_SIZE)])
def test_only_the_faithful_mode_draws_special_ids(faithful, limit, tokenizer, monkeypatch):
    limits = set()

    class Recorder(random.Random):
        def randrange(self, stop):
            limits.add(stop)
            return stop - 1

    views = TextViews(AugmentConfig(mask_probability=1.0), tokenizer, mask_special_ids=faithful)
    ids, _ = views.draw("masked", "word " * 60, Recorder(0))
    assert limits == {limit}
    assert limit - 1 in ids


def test_threads_draw_what_one_thread_draws(tokenizer):
    def draw_all(views):
        return [views.draw("augmented", f"{CAPTION} {number}", random.Random(number)) for number in range(50)]

    expected = draw_all(TextViews(AugmentConfig(), tokenizer))
    shared, results = TextViews(AugmentConfig(), Tokenizer()), []
    threads = [threading.Thread(target=lambda: results.append(draw_all(shared))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
