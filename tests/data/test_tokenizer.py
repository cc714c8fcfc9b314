import random
import string
import threading

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from declip_cli.data.tokenizer import END, MASK, NUM_ORDINARY, PAD, START, VOCAB_SIZE, Tokenizer, pad
from declip_cli.errors import ConfigError
from tests.data_sets import demo_metadata

AWKWARD = [
    "",
    " \t\n ",
    "A photo of a DOG, isn't it? We'LL see: he's 42 & I'd've 3½ cm²",
    "black & white, R&B, AT&T; &amp; &lt;b&gt; &quot;x&quot; &amp;amp;eacute; &EACUTE; &#39; &#x1F600; <br>&copy;",
    "“curly” ‘quotes’ it’s the dogs’ – dash — …",
    "😀 👨‍👩‍👧 🏳️‍🌈 👍🏽 ❤️ 日本の桜 Ωμέγα ΑΣ ΟΔΟΣ Привет",
    "cafÃ© â€œmojibakeâ€\x9d sÃ³ voilÃ le travail dâ€™or",
    "café cafe\u0301 ﬁne ﬂuﬀ Ĳssel ǅ ß ſ 'ſ İstanbul ＬＯＵＤ　ＮＯＩＳＥ Ｕﾀｰﾝ",
    "tab\tnew\nline\r\nvertical\x0btab form\x0cfeed bell\x07 file\x1csep esc\x1b[31mred\x1b[0m del\x7f nel\x85.",
    "nbsp\xa0soft\xadhyphen zero\u200bwidth bom\ufeff obj\ufffc line\u2028para\u2029 mongol\u180evowel",
    "lone \ud83d surrogate, pair \ud83d\ude00",
    "Œ œuvre Ø Ø Ã\xa0 Â © ÂŽ À° 20°C à² √± ВЂ",
    "x" * 500,
    "word " * 200,
    "1234567890 IMG_2041.JPG http://a.b/c?d=e&f=g #tag @me C++ (c) 50% $5 <3 ^_^ ¯\\_(ツ)_/¯",
]


@pytest.fixture(scope="module")
def ours():
    return Tokenizer()


@pytest.fixture(scope="module")
def theirs():
    return SimpleTokenizer()


def demo_captions():
    for record in demo_metadata():
        yield record["caption"]
        yield ", ".join(record["keywords"])


def made_up_texts(num, seed):
    rng = random.Random(seed)
    everything = [chr(code) for code in range(0x20000)]
    latin = [chr(code) for code in range(0x20, 0x300)]
    entities = ["&amp;", "&nbsp;", "&#8217;", "&hellip;", "&", "&x", "&lt"]
    for _ in range(num):
        pools = [everything, latin, string.ascii_letters + "  ", string.printable, entities, "’“”‘–é😀ÃâÂ€™"]
        yield "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 25)))


def differing(texts, ours, theirs):
    return [text for text in texts if ours.word_ids(text) != theirs.encode(text)]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_have_the_ids_of_open_clip(text, ours, theirs):
    assert ours.word_ids(text) == theirs.encode(text)


def test_the_captions_of_the_demo_have_the_ids_of_open_clip(ours, theirs):
    captions = list(dict.fromkeys(demo_captions()))
    assert len(captions) > 2000
    assert differing(captions, ours, theirs) == []


def test_made_up_texts_have_the_ids_of_open_clip(ours, theirs):
    assert differing(made_up_texts(2000, seed=3), ours, theirs) == []


def test_a_batch_has_the_rows_of_open_clip(ours, theirs):
    assert torch.equal(ours.encode(AWKWARD), theirs(AWKWARD))


def test_a_known_sentence_has_known_ids(ours):
    # The ids of OpenAI's own example.
    assert ours.encode("a diagram")[0, :5].tolist() == [START, 320, 22697, END, PAD]
    assert (START, END, MASK, VOCAB_SIZE) == (49406, 49407, 49408, 49409)


@pytest.mark.parametrize("name", ["<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<END_OF_TEXT>", "<|mask|>"])
def test_special_tokens_cannot_be_written_in_a_text(name, ours):
    ids = ours.word_ids(f"a {name} b")
    assert max(ids) < NUM_ORDINARY
    assert ours.encode(f"a {name} b")[0].tolist().count(END) == 1


def test_long_texts_are_cut_counted_and_end_in_end():
    tokenizer = Tokenizer(context_length=5)
    rows = tokenizer.encode(["a b c", "a b c d", "a"])  # (3, 5)
    assert rows.shape == (3, 5)
    assert rows[:, -1].tolist() == [END, END, PAD]
    assert tokenizer.num_truncated == 1
    assert rows.dtype == torch.int64


def test_padding_to_the_longest_text_keeps_the_ids():
    tokenizer = Tokenizer(context_length=9)
    texts = ["a red bus", "rain"]
    short = tokenizer.encode(texts, pad_to_context=False)  # (2, 5)
    assert short.shape == (2, 5)
    assert torch.equal(short, tokenizer.encode(texts)[:, :5])


def test_no_texts_give_no_rows():
    assert Tokenizer(context_length=9).encode([]).shape == (0, 9)
    assert pad([]).shape == (0, 0)


def test_a_context_without_room_is_refused():
    with pytest.raises(ConfigError, match="context_length must be at least 3"):
        Tokenizer(context_length=2)


def test_decoding_gives_the_text_back(ours, theirs):
    text = "a photo of the small dog , 4 years !"
    assert ours.decode(ours.encode(text)[0].tolist()) == text
    assert ours.decode(ours.word_ids("Crème brûlée, 😀!!")) == "crème brûlée , 😀!!"
    ids = ours.word_ids(text)
    assert ours.decode(ids) == theirs.decode(ids).strip()


def test_decoding_shows_masks_and_stops_at_the_end(ours):
    dog, cat = ours.word_ids("dog cat")
    assert ours.decode([START, dog, MASK, END, cat, PAD]) == "dog <mask>"
    assert ours.decode(ours.word_ids("é")[:1] + [END]) != ""


def test_a_full_cache_starts_over_and_stays_right():
    small, big = Tokenizer(max_cached_words=3), Tokenizer()
    for text in ["a b c d e f", "f e d", "a b g", "dog dog cat"]:
        assert small.word_ids(text) == big.word_ids(text)
        assert len(small._words) <= 3


def test_threads_get_the_same_ids_and_count_every_cut_text():
    tokenizer = Tokenizer(context_length=4, max_cached_words=50)
    texts = [" ".join(random.Random(number).choices(string.ascii_lowercase, k=3)) for number in range(300)]
    expected = Tokenizer(context_length=4).encode(texts)
    results = {}

    def work(number):
        results[number] = tokenizer.encode(texts)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results.values())
    assert len(results) == 4
    assert tokenizer.num_truncated == 4 * 300
