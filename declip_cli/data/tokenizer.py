"""Text to token ids and back: OpenAI's byte-pair encoding, remembering the ids of each whitespace word."""

import gzip
import html
import re
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

import ftfy
import numpy as np
import regex
from ftfy.badness import is_bad

from declip_cli.assets import asset_path
from declip_cli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

START = 49406
END = 49407
MASK = 49408
"""Appended to OpenAI's vocabulary; no text gives it, only masking does."""
PAD = 0
VOCAB_SIZE = 49409
NUM_ORDINARY = 49406
"""Ids below are pieces of words; START, END and MASK lie above."""
MAX_CACHED_WORDS = 1_000_000

_PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_CODE_PAGES = re.compile("[\x80-\u25ff\ue000-\uffff]+")
_STRAIGHT_QUOTES = str.maketrans("‘’“”", "''\"\"")
_MAYBE_ENTITY = re.compile(r"&[^ <&;]")


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    byte_ids: tuple[int, ...]
    """Id of each byte inside a word; 256 more where it ends the word."""
    merges: dict[tuple[int, int], int]
    """Two neighboring ids → the id that replaces them; the lower the new id, the earlier it is merged."""
    pieces: tuple[bytes, ...]
    """Id → its bytes, a space where it ends a word."""


@lru_cache(maxsize=1)
def _load_vocabulary() -> _Vocabulary:
    order, ids = _byte_pieces()
    pieces = [bytes([byte]) for byte in order] + [bytes([byte]) + b" " for byte in order]
    merges = {}
    with gzip.open(asset_path("vocabulary/merges.txt.gz"), "rt", encoding="utf-8") as lines:
        next(lines)  # the version
        for new, line in enumerate(lines, start=len(ids)):
            first, second = line.split()
            pair = (ids[first], ids[second])
            merges[pair] = ids[first + second] = new
            pieces.append(pieces[pair[0]] + pieces[pair[1]])
    byte_ids = [0] * 256
    for rank, byte in enumerate(order):
        byte_ids[byte] = rank
    return _Vocabulary(tuple(byte_ids), merges, tuple(pieces))


def _byte_pieces() -> tuple[list[int], dict[str, int]]:
    """Return the bytes in the order of their ids; and the ids of single bytes as the merges' file writes them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = printable + sorted(set(range(256)) - set(printable))
    letters = {}  # the file writes unprintable bytes as the letters from U+0100 on
    for rank, byte in enumerate(order):
        letters[chr(byte) if rank < len(printable) else chr(256 + rank - len(printable))] = rank
    return order, letters | {letter + "</w>": rank + 256 for letter, rank in letters.items()}


def vocabulary_files() -> tuple[dict[str, int], str]:
    """Return the vocabulary as other projects keep it.

    Returns:
        Piece → id, the 49,408 of OpenAI without our mask token; and the text of `merges.txt`.
    """
    with gzip.open(asset_path("vocabulary/merges.txt.gz"), "rt", encoding="utf-8") as file:
        next(file)  # the version
        merges = file.read()
    _, ids = _byte_pieces()
    for line in merges.splitlines():
        ids["".join(line.split())] = len(ids)
    return ids | {"<|startoftext|>": START, "<|endoftext|>": END}, f"#version: 0.2\n{merges}"


class _WordIds(dict[str, tuple[int, ...]]):
    """Lower-cased whitespace word → its ids, computed when first asked for; looking up needs no Python."""

    def __init__(self, vocabulary: _Vocabulary, max_words: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._max_words = max_words

    def __missing__(self, word: str) -> tuple[int, ...]:
        found = tuple(chain.from_iterable(map(self._merge, _PIECES.findall(word))))
        if len(self) >= self._max_words:
            self.clear()
        self[word] = found
        return found

    def _merge(self, piece: str) -> list[int]:
        """Replace neighbors by their merged id, the earliest merge of the vocabulary first."""
        byte_ids, merges = self._vocabulary.byte_ids, self._vocabulary.merges
        ids = [byte_ids[byte] for byte in piece.encode("utf-8")]
        ids[-1] += 256
        while len(ids) > 1:
            candidates = [merges.get(pair, VOCAB_SIZE) for pair in zip(ids, ids[1:], strict=False)]
            new = min(candidates)
            if new == VOCAB_SIZE:
                break
            merged, at = [], 0
            while at < len(ids):
                is_pair = at < len(candidates) and candidates[at] == new
                merged.append(new if is_pair else ids[at])
                at += 2 if is_pair else 1
            ids = merged
        return ids


class Tokenizer:
    """Turn texts into CLIP's token ids, identically to OpenAI's tokenizer but for two things.

    Ids are remembered per whitespace word, which is exact because no piece of a word spans a space, and the
    repair of broken unicode and HTML is skipped where it changes nothing. The two differences: names of
    special tokens in a text (`<|endoftext|>`, `<start_of_text>`) are ordinary punctuation and letters, so that
    no caption can put special ids into a batch; and a text that is too long is cut and counted.

    One instance can serve many threads.

    Args:
        context_length: longest text in tokens, start and end included.
        max_cached_words: how many words are remembered before starting over, about 200 bytes each.

    Raises:
        ConfigError: the context length has no room for a token.

    Source: CLIP, arXiv 2103.00020, section 2.4; ids as in OpenAI's release.
    """

    def __init__(self, context_length: int = 77, *, max_cached_words: int = MAX_CACHED_WORDS) -> None:
        if context_length < 3:
            raise ConfigError(
                f"model.context_length must be at least 3: start, one token, end (got {context_length})",
                remedy="--set model.context_length=77",
            )
        self.context_length = context_length
        self.num_truncated = 0
        """Texts cut to the context length so far."""
        self._words = _WordIds(_load_vocabulary(), max_cached_words)
        self._inert: set[str] = set()
        self._lock = threading.Lock()

    def word_ids(self, text: str) -> list[int]:
        """Encode one text, however long, as ordinary ids (below `NUM_ORDINARY`) without start and end."""
        return list(chain.from_iterable(map(self._words.__getitem__, self.tidy(text).lower().split())))

    def frame(self, ids: Sequence[int]) -> list[int]:
        """Put START and END around ordinary ids; what does not fit into the context length is cut and counted."""
        max_ids = self.context_length - 2
        if len(ids) > max_ids:
            with self._lock:
                self.num_truncated += 1
            ids = ids[:max_ids]
        return [START, *ids, END]

    def encode(self, texts: str | Sequence[str], *, pad_to_context: bool = True) -> "Tensor":
        """Encode texts as rows of one tensor.

        Args:
            texts: N texts; a single one counts as N = 1.
            pad_to_context: false pads to the longest of these texts instead.

        Returns:
            START, ids, END and then PAD, int64, (N, L).
        """
        if isinstance(texts, str):
            texts = [texts]
        return pad([self.frame(self.word_ids(text)) for text in texts], self.context_length * pad_to_context)

    def decode(self, ids: Iterable[int]) -> str:
        """Read ids back: lower-cased text with one space after each word or mark of punctuation.

        Args:
            ids: one row of `encode`, or ids without start and end.

        Returns:
            The text up to END; a masked token reads `<mask>`, an incomplete character U+FFFD.
        """
        row = [int(token) for token in ids]
        if END in row:
            row = row[: row.index(END)]
        while row and row[-1] == PAD:  # a word never ends in the id of padding
            row.pop()
        special = {START: b"", MASK: b"<mask> "}
        pieces = _load_vocabulary().pieces
        text = b"".join(special[token] if token in special else pieces[token] for token in row)
        return text.decode("utf-8", errors="replace").strip()

    def tidy(self, text: str) -> str:
        """Repair broken unicode, curly quotes and HTML entities, as OpenAI's tokenizer does before all else.

        `ftfy.fix_text` takes ten times as long as all the rest, so it only sees texts that it might change: with
        control characters, something like an entity, characters that are not inert, or wrongly decoded.
        """
        if "&" not in text or not _MAYBE_ENTITY.search(text):
            if text.isascii() and text.isprintable():
                return text
            straight = text.translate(_STRAIGHT_QUOTES)
            if self._is_inert(straight) and not (_is_bad(text) or _is_bad(straight)):
                return straight
        return html.unescape(html.unescape(ftfy.fix_text(text)))

    def _is_inert(self, text: str) -> bool:
        """Return whether ftfy, which otherwise works on single characters and composes accents, leaves a text alone."""
        for char in set(text).difference(self._inert):
            if char in "\r\n" or ftfy.fix_text(char) != char:
                return False
            self._inert.add(char)
        return unicodedata.is_normalized("NFC", text)


def _is_bad(text: str) -> bool:
    """Return whether a text looks wrongly decoded: ask ftfy about the surroundings of single-byte code pages only.

    Its patterns reach at most three characters beyond them; a piece cut out can only look worse than the text.
    """
    return any(is_bad(text[max(0, at.start() - 4) : at.end() + 4]) for at in _CODE_PAGES.finditer(text))


def pad(rows: Sequence[Sequence[int]], length: int = 0) -> "Tensor":
    """Stack N rows of ids, PAD behind them, in `length` columns, or in those of the longest row: int64, (N, L)."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))  # (N,)
    columns = length or int(lengths.max(initial=0))
    padded = np.full((len(rows), columns), PAD, dtype=np.int64)  # (N, L)
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    padded[np.arange(columns) < lengths[:, None]] = flat
    import torch  # loader processes start three times as fast without

    return torch.from_numpy(padded)
