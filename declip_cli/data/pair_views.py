"""All views of one image-text pair, drawn by the pair's number."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from declip_cli.config import Views
from declip_cli.data.dataset import UNREAD, Dataset
from declip_cli.data.draws import sample_rng
from declip_cli.data.image_views import ImageViews, Picture
from declip_cli.data.text_views import TextViews
from declip_cli.errors import DataError

_IMAGE_DRAWS, _TEXT_DRAWS = 0, 1
_NOT_A_TARGET = -100


@dataclass(frozen=True, slots=True)
class PairTexts:
    """The token ids of one pair."""

    views: tuple[list[int], ...]
    """Ids of the T text views, from start to end token."""
    mask_labels: list[int]
    """Labels of the masked text view, as long as its ids; empty if there is none."""


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    number: int
    key: str
    cause: str
    """A few words under which such samples are counted."""


class UnreadablePair(DataError):
    """A pair that cannot be used, and which one."""

    def __init__(self, sample: BadSample) -> None:
        super().__init__(
            f"sample {sample.key} cannot be used: {sample.cause}",
            remedy="mend the data set with declip prepare",
            cause=sample.cause,
        )
        self.sample = sample


class PairViews:
    """Draw the views of pairs; (seed, epoch, number) decides everything. Safe to use from several threads.

    Decoded pictures of small data sets are kept, so that only the first epoch decodes; what is drawn is the
    same with and without.

    Args:
        samples: the pairs.
        views: which views to draw.
        augment: how.
        image_views: cuts the pictures.
        text_views: changes the captions.
        seed: of the run.
        cache_bytes: pictures are kept if all of the data set, decoded, would take less than this.
    """

    def __init__(
        self,
        samples: Dataset,
        views: Views,
        *,
        image_views: ImageViews,
        text_views: TextViews,
        seed: int,
        cache_bytes: int,
    ) -> None:
        self._samples = samples
        self._views = views
        self._image_views = image_views
        self._text_views = text_views
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._cache: dict[int, tuple[Picture, tuple[str, ...]]] = {}
        self._cache_lock = threading.Lock()
        self._bad: dict[int, BadSample] = {}

    def draw(self, number: int, epoch: int, images: NDArray[np.uint8]) -> PairTexts:
        """Draw all views of one pair.

        Args:
            number: of the pair in the data set.
            epoch: from 0; also decides which of several captions is used.
            images: filled with the image views, uint8, (V, S, S, 3).

        Returns:
            The texts.

        Raises:
            UnreadablePair: the pair cannot be read or its picture cannot be decoded.
        """
        picture, captions = self._open(number)
        rng = sample_rng(self._seed, epoch, number, _IMAGE_DRAWS)
        try:
            self._image_views.draw_from(picture, self._views.images, rng, images)
        except DataError as error:  # the picture was not decoded before its crops were known
            raise self._unreadable(number, error) from error
        return self._draw_texts(number, epoch, captions)

    def _draw_texts(self, number: int, epoch: int, captions: tuple[str, ...]) -> PairTexts:
        rng = sample_rng(self._seed, epoch, number, _TEXT_DRAWS)
        caption = captions[0] if len(captions) == 1 else rng.choice(captions)
        views, mask_labels = [], []
        for kind in self._views.texts:
            ids, labels = self._text_views.draw(kind, caption, rng)
            views.append(ids)
            if kind == "masked":
                mask_labels = labels
        return PairTexts(tuple(views), mask_labels)

    def _open(self, number: int) -> tuple[Picture, tuple[str, ...]]:
        kept = self._cache.get(number)
        if kept is not None:
            return kept
        if number in self._bad:
            raise UnreadablePair(self._bad[number])
        try:
            example = self._samples.read(number)
            opened = self._image_views.open(example.image), example.captions
            if not example.captions:
                raise DataError(f"{example.key} has no caption", remedy="give it one", cause="no caption")
        except DataError as error:
            raise self._unreadable(number, error) from error
        self._keep(number, *opened)
        return opened

    def _keep(self, number: int, picture: Picture, captions: tuple[str, ...]) -> None:
        size = picture.pixels.nbytes
        if picture.is_decoded and size * len(self._samples) <= self._cache_bytes:
            with self._cache_lock:
                self._cache[number] = (picture, captions)

    def _key(self, number: int) -> str:
        try:
            return self._samples.key(number)
        except DataError:
            return f"number {number}"

    def _unreadable(self, number: int, error: DataError) -> UnreadablePair:
        sample = BadSample(number, self._key(number), error.cause)
        if error.cause != UNREAD:
            self._bad[number] = sample
        return UnreadablePair(sample)


def lay_texts(texts: Sequence[PairTexts], tokens: NDArray[np.int64], mask_labels: NDArray[np.int64]) -> int:
    """Lay the texts of some rows of a batch side by side.

    Args:
        texts: of the n rows.
        tokens: filled with token ids, 0 where a text is shorter, int64, (n, T, L).
        mask_labels: filled with the labels of the masked view, -100 where nothing is to be predicted, int64, (n, L).

    Returns:
        Tokens of the longest text.
    """
    tokens.fill(0)
    mask_labels.fill(_NOT_A_TARGET)
    for i, pair in enumerate(texts):
        for j, ids in enumerate(pair.views):
            tokens[i, j, : len(ids)] = ids
        mask_labels[i, : len(pair.mask_labels)] = pair.mask_labels
    return max(len(ids) for pair in texts for ids in pair.views)
