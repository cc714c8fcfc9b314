import pytest

from declip_cli.data.synonyms import synonyms


def test_slurs_and_obscenities_of_wordnet_stand_for_nothing():
    assert {"goof", "zany"} <= set(synonyms("goose"))
    for word in ("black", "boy", "goose", "jew", "dirt", "tool", "fairy", "redskin", "woman"):
        assert not {"nigger", "twat", "kike", "shit", "prick", "faggot", "injun"} & set(synonyms(word))


@pytest.mark.parametrize(
    ("word", "some"),
    [
        ("happy", {"felicitous", "glad", "well chosen"}),
        ("Photos", {"photo", "photograph", "exposure", "picture", "pic"}),
        ("geese", {"goose", "fathead", "goofball", "zany"}),
        ("meetings", {"meeting", "get together"}),
        ("running", {"run", "operate", "race", "running play"}),
        ("t-shirt", {"jersey", "tee shirt"}),
    ],
)
def test_synonyms_are_those_of_wordnet_over_all_senses_and_base_forms(word, some):
    assert some <= set(synonyms(word))
    assert word.lower() not in synonyms(word)
    assert list(synonyms(word)) == sorted(set(synonyms(word)))


@pytest.mark.parametrize("word", ["xyzzy", "", "😀", "dog.", "1/n", "a/b/c"])
def test_words_that_wordnet_does_not_know_have_no_synonyms(word):
    assert synonyms(word) == ()


def test_synonyms_are_letters_and_spaces():
    for word in ("run", "dog", "Washington", "1000", "o'clock", "re-enter"):
        for synonym in synonyms(word):
            assert synonym.replace(" ", "").isalpha()
            assert synonym == synonym.lower().strip()
