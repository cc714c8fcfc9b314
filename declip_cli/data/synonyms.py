"""Synonyms of English words, from a table made from WordNet 3.0 (see NOTICE)."""

import gzip
import threading
from functools import lru_cache
from typing import TypeAlias

from declip_cli.assets import asset_path

_Endings: TypeAlias = tuple[tuple[str, str], ...]

_ENDINGS: dict[str, _Endings] = {
    "n": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "v": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}
"""Part of speech → the endings that WordNet takes off an inflected word, morphy(7)."""

_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz ")

_loading = threading.Lock()

_GRAMMAR = """
    i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
    himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
    that that'll these those am is are was were be been being have has had having do does did doing a an the and but
    if or because as until while of at by for with about against between into through during before after above below
    to from up down in out on off over under again further then once here there when where why how all any both each
    few more most other some such no nor not only own same so than too very s t can will just don don't should
    should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't
    haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't
    weren weren't won won't wouldn wouldn't
"""
STOP_WORDS = frozenset(_GRAMMAR.split())
"""Words that carry grammar rather than meaning, never replaced: the 179 of NLTK's list, as in the original."""


@lru_cache(maxsize=1)
def _load_table() -> dict[str, str]:
    """Read `lemma/part` → its synonyms and `form/PART` → the lemmas of an irregular form, joined by commas."""
    with gzip.open(asset_path("synonyms.txt.gz"), "rt", encoding="ascii") as lines:
        return dict(line.split("\t") for line in lines.read().splitlines())


@lru_cache(maxsize=100_000)
def synonyms(word: str) -> tuple[str, ...]:
    """List synonyms of a word: the lemmas of all synsets of the word, or of its base form.

    Args:
        word: one word, in upper or lower case, without punctuation around it.

    Returns:
        Lower-cased synonyms of one or more words, in alphabetical order, only a-z and spaces, without the word
        itself; empty for a word that WordNet does not know.
    """
    with _loading:  # the first caller reads the table, once
        table = _load_table()
    form = word.lower()
    found = set()
    for part, endings in _ENDINGS.items():
        for lemma in _base_forms(form, part, endings, table):
            found.update(table[f"{lemma}/{part}"].split(","))
            found.add(_letters(lemma))
    return tuple(sorted(found - {"", form, _letters(form)}))


def _base_forms(form: str, part: str, endings: _Endings, table: dict[str, str]) -> list[str]:
    """Take endings off until WordNet knows the word as this part of speech; an irregular form is looked up."""

    def known(forms: list[str]) -> list[str]:
        return [lemma for lemma in dict.fromkeys(forms) if f"{lemma}/{part}" in table]

    irregular = table.get(f"{form}/{part.upper()}")
    if irregular is not None:
        return known([form, *irregular.split(",")])
    found: list[str] = []
    forms = [form]
    while forms and not found:
        shorter = [word[: -len(end)] + base for word in forms for end, base in endings if word.endswith(end)]
        found, forms = known(forms + shorter), shorter
    return found


def _letters(lemma: str) -> str:
    return " ".join("".join(char for char in lemma.replace("-", " ") if char in _ALPHABET).split())
