"""All views of one image-text pair, drawn by the pair's number."""

from itertools import cycle
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from declip_cli.config import Views
from declip_cli.data.dataset import UNREAD, Dataset, Pixels
from declip_cli.data.image_views import ImageViews, OpenedImage
from declip_cli.data.seeding import sample_rng
from declip_cli.data.text_views import NO_LABEL, TextViews
from declip_cli.data.tokenizer import PAD
from declip_cli.errors import DataError


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    sample_index: int
    key: str
    cause: str
    """A few words under which such samples are counted."""


class UnreadablePair(DataError):
    """A pair that cannot be used, and which one."""

    def __init__(self, sample: BadSample) -> None:
        super().__init__(
            f"sample {sample.key} cannot be used: {sample.cause}",
            remedy="repair the data set with declip prepare",
            cause=sample.cause,
        )
        self.sample = sample


class PairViews:
    """Draw the views of pairs; (seed, epoch, number) decides everything. Safe to use from several threads.

    Decoded images of small data sets are kept, so that only the first epoch decodes; what is drawn is the
    same with and without.

    Args:
        samples: the pairs.
        views: which views to draw.
        augment: how.
        image_views: cuts the images.
        text_views: changes the captions.
        num_captions: C, captions of a pair among its texts, where it has so many.
        seed: of the run.
        cache_bytes: images are kept if all of the data set, decoded, would take less than this.
    """

    def __init__(
        self,
        samples: Dataset,
        views: Views,
        *,
        image_views: ImageViews,
        text_views: TextViews,
        num_captions: int = 1,
        seed: int,
        cache_bytes: int,
    ) -> None:
        self._samples = samples
        self._views = views
        self._image_views = image_views
        self._text_views = text_views
        self._num_captions = num_captions
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._cache: dict[int, tuple[OpenedImage, tuple[str, ...]]] = {}
        self._bad: dict[int, BadSample] = {}

    def draw(
        self,
        index: int,
        epoch: int,
        images: Pixels,
        tokens: NDArray[np.int64],
        mlm_labels: NDArray[np.int64],
        caption_ids: NDArray[np.int64],
        boxes: NDArray[np.float32],
    ) -> int:
        """Draw all views of one pair into a row of a batch.

        Args:
            index: of the pair in the data set.
            epoch: from 0; also decides which of several captions the texts show, one after the other.
            images: filled with the image views, uint8, (V, S, S, 3).
            tokens: filled with token ids, `PAD` behind them, int64, (T, L).
            mlm_labels: filled with the labels of the masked view, `NO_LABEL` where nothing is to be predicted or
                there is no such view, int64, (L,).
            caption_ids: filled with a number that is the same for the same caption, int64, (C,).
            boxes: filled with where each image view lies, as `Box` has it, float32, (V, 4), or (0, 4) if nobody asks.

        Returns:
            Tokens of the longest text.

        Raises:
            UnreadablePair: the pair cannot be read or its image cannot be decoded.
        """
        opened, captions = self._open(index)
        rng = sample_rng(self._seed, epoch, index)
        try:
            found = self._image_views.draw(opened, self._views.images, rng, images)
        except DataError as error:  # the image was not decoded before its crops were known
            raise self._unreadable(index, error) from error
        if len(boxes):
            boxes[:] = found
        if len(captions) > 1:
            captions = tuple(rng.sample(captions, min(self._num_captions, len(captions))))
        for place in range(len(caption_ids)):
            caption_ids[place] = self._text_views.identify(captions[place % len(captions)])
        tokens.fill(PAD)
        mlm_labels.fill(NO_LABEL)
        longest = 0
        for kind, row, caption in zip(self._views.texts, tokens, cycle(captions), strict=False):
            ids, labels = self._text_views.draw(kind, caption, rng)
            row[: len(ids)] = ids
            longest = max(longest, len(ids))
            if kind == "masked":
                mlm_labels[: len(labels)] = labels
        return longest

    def _open(self, index: int) -> tuple[OpenedImage, tuple[str, ...]]:
        kept = self._cache.get(index)
        if kept is not None:
            return kept
        if index in self._bad:
            raise UnreadablePair(self._bad[index])
        try:
            example = self._samples.read(index)
            opened = self._image_views.open(example.image)
            if not example.captions:
                raise DataError(f"{example.key} has no caption", remedy="add one", cause="no caption")
        except DataError as error:
            raise self._unreadable(index, error) from error
        pixels = opened.content  # of a large JPEG other crops may need another size
        if not isinstance(pixels, bytes) and pixels.nbytes * len(self._samples) <= self._cache_bytes:
            self._cache[index] = opened, example.captions
        return opened, example.captions

    def _unreadable(self, index: int, error: DataError) -> UnreadablePair:
        sample = BadSample(index, self._samples.named(index), error.cause)
        if error.cause != UNREAD:
            self._bad[index] = sample
        return UnreadablePair(sample)
