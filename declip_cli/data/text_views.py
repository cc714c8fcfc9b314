"""A caption as a method wants to see it: plain, augmented (EDA), masked or without stop words, always as token ids."""

import random
from array import array
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

from declip_cli.config import AugmentConfig, TextView
from declip_cli.data.synonyms import STOP_WORDS, synonyms
from declip_cli.data.tokenizer import MASK, NUM_ORDINARY, VOCAB_SIZE, Tokenizer

NO_LABEL = -100
"""Label of a token that is not to be predicted; what `torch.nn.functional.cross_entropy` leaves out."""
MASK_SHARE = 0.8
"""Share of the tokens to predict that are hidden behind MASK."""
RANDOM_SHARE = 0.1
"""Share of the tokens to predict that are replaced by a random id; the rest stays as it is."""


class TextViews:
    """Draw views of captions; every draw follows from the generator that is passed in.

    Threads may share one instance.

    Args:
        config: operations and probabilities.
        tokenizer: makes ids of words and cuts them to the context length.
        mask_special_ids: let the random ids of masking be special ones too, as the original does; START or END in the
            middle of a text moves the place from which the text tower reads its feature.
    """

    def __init__(self, config: AugmentConfig, tokenizer: Tokenizer, *, mask_special_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._mask_probability = config.mask_probability
        self._stop_word_probability = config.stop_word_probability
        self._num_random_ids = VOCAB_SIZE if mask_special_ids else NUM_ORDINARY
        operations: dict[str, Callable[[str, random.Random], str]] = {
            "synonym": replace_by_synonym,
            "swap": swap_words,
            "delete": partial(delete_words, probability=config.deletion_probability),
        }
        self._operations = [operations[name] for name in config.text_operations]

    def draw(self, kind: TextView, caption: str, rng: random.Random) -> tuple[list[int], list[int]]:
        """Draw one view of one caption.

        Args:
            kind: `plain`; `augmented`: one operation, chosen evenly; `masked`: some tokens hidden; `keywords`: with
                some probability without stop words; `augmented_keywords`: these, then one operation.
            caption: any text, empty too.
            rng: decides everything that is random here.

        Returns:
            Token ids with START and END, cut to the context length; and as many labels: the id that was there
            where a token is to be predicted, `NO_LABEL` elsewhere. A masked text may have no such token.

        Source: operations: EDA, arXiv 1901.11196, and Sense-GVT/DeCLIP, prototype/model/declip.py:203-212; masking:
            BERT, arXiv 1810.04805, section 3.1, and prototype/model/utils/text_utils/mask_tokens.py there; keywords:
            CLIP:rocket, arXiv 2305.08675.
        """
        if kind.endswith("keywords") and rng.random() < self._stop_word_probability:
            caption = drop_stop_words(caption)
        if kind.startswith("augmented") and self._operations:
            caption = rng.choice(self._operations)(caption, rng)
        ids = self._tokenizer.frame(self._tokenizer.word_ids(caption))
        labels = [NO_LABEL] * len(ids)
        if kind == "masked":
            self._mask(ids, labels, rng)
        return ids, labels

    def identify(self, caption: str) -> int:
        """Give captions of the same tokens, before any is cut, the same number in the range of int64."""
        ids = array("H", self._tokenizer.word_ids(caption))
        return int.from_bytes(blake2b(ids, digest_size=8).digest(), "little", signed=True)

    def _mask(self, ids: list[int], labels: list[int], rng: random.Random) -> None:
        for position in range(1, len(ids) - 1):  # START and END are never hidden
            if rng.random() >= self._mask_probability:
                continue
            labels[position] = ids[position]
            choice = rng.random()
            if choice < MASK_SHARE:
                ids[position] = MASK
            elif choice < MASK_SHARE + RANDOM_SHARE:
                ids[position] = rng.randrange(self._num_random_ids)


def drop_stop_words(text: str) -> str:
    """Leave out words that carry grammar; no change where there are no others."""
    return " ".join(word for word in text.split() if word.lower() not in STOP_WORDS) or text


def replace_by_synonym(text: str, rng: random.Random) -> str:
    """Replace one word, wherever it stands, by a synonym; no change where no word but stop words has one."""
    words = text.split()
    candidates = [word for word in dict.fromkeys(words) if word.lower() not in STOP_WORDS]
    for word in rng.sample(candidates, len(candidates)):
        choices = synonyms(word)
        if choices:
            synonym = rng.choice(choices)
            return " ".join(synonym if each == word else each for each in words)
    return text


def swap_words(text: str, rng: random.Random) -> str:
    """Exchange the words at two places; no change where there are fewer than two words."""
    words = text.split()
    if len(words) < 2:
        return text
    first, second = rng.sample(range(len(words)), 2)
    words[first], words[second] = words[second], words[first]
    return " ".join(words)


def delete_words(text: str, rng: random.Random, *, probability: float) -> str:
    """Leave out each word with some probability, but never all; no change where there are fewer than two words."""
    words = text.split()
    if len(words) < 2:
        return text
    kept = [word for word in words if rng.random() >= probability]
    return " ".join(kept or [rng.choice(words)])
