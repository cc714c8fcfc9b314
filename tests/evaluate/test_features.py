"""Features of images and texts."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from declip_cli.data.image_views import eval_transform
from declip_cli.data.tokenizer import Tokenizer
from declip_cli.errors import DataError, EvaluateError
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.texts import count_truncated, length_sorted_batches, text_features
from declip_cli.model.checkpoint import PretrainedModel
from tests.data_sets import MemoryDataset

FP32 = FeatureOptions(precision="fp32", batch_size=3, threads=2)
TEXTS = ["a cat", "a very long text about nothing at all", "!", "one two three!", "a dog on a log"]


def image(seed: int, side: int = 20) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_images_are_encoded_one_by_one_as_together(tiny_model: PretrainedModel):
    contents = [image(n) for n in range(7)]
    result = image_features(tiny_model, MemoryDataset(contents), options=FP32)
    assert result.features.shape == (7, 10)
    assert result.kept == list(range(7))
    for content, row in zip(contents, result.features, strict=True):
        view = torch.from_numpy(eval_transform(content, side_px=16, resize_px=18))
        with torch.no_grad():
            expected = F.normalize(tiny_model.encoder.encode_image(view[None]), dim=-1)[0]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_features_before_the_projection_have_the_width_of_the_tower(tiny_model: PretrainedModel):
    result = image_features(tiny_model, MemoryDataset([image(0)]), projected=False, normalize=False, options=FP32)
    assert result.features.shape == (1, 24)
    assert result.features.norm() != pytest.approx(1.0, abs=1e-3)


def test_unreadable_images_are_skipped_and_counted_by_cause(tiny_model: PretrainedModel):
    def gone() -> bytes:
        raise DataError("no file", remedy="none", cause="missing file")

    inputs = MemoryDataset([image(0), gone, b"not an image", image(1), b"nor this"])
    result = image_features(tiny_model, inputs, options=FP32)
    assert result.kept == [0, 3]
    assert result.features.shape == (2, 10)
    causes = result.skipped.to_json()
    assert causes.pop("missing file") == {"count": 1, "first": "1.jpg"}
    assert [entry for entry in causes.values()] == [{"count": 2, "first": "2.jpg"}]


def test_it_is_an_error_when_no_image_can_be_read(tiny_model: PretrainedModel):
    with pytest.raises(EvaluateError, match="none of the 2 images can be read"):
        image_features(tiny_model, MemoryDataset([b"x", b"y"]), options=FP32)
    with pytest.raises(EvaluateError, match="no image"):
        image_features(tiny_model, MemoryDataset([]), options=FP32)


class CountingEncoder:
    """Counts how many images and texts really pass through the model."""

    def __init__(self, model: PretrainedModel) -> None:
        self.encoder, self.num_images, self.num_texts = model.encoder, 0, 0

    def parameters(self):
        return self.encoder.parameters()

    def encode_image(self, images, **options):
        self.num_images += len(images)
        return self.encoder.encode_image(images, **options)

    def encode_text(self, tokens):
        self.num_texts += len(tokens)
        return self.encoder.encode_text(tokens)


@pytest.fixture
def counting_model(tiny_model: PretrainedModel) -> PretrainedModel:
    return dataclasses.replace(tiny_model, encoder=CountingEncoder(tiny_model))


def test_the_store_answers_for_the_same_content_and_only_for_it(counting_model: PretrainedModel):
    inputs = MemoryDataset([image(0), b"broken", image(1)])
    first = image_features(counting_model, inputs, options=FP32)
    again = image_features(counting_model, inputs, options=FP32)
    assert counting_model.encoder.num_images == 2
    torch.testing.assert_close(first.features, again.features, rtol=0, atol=0)
    assert (first.kept, first.skipped) == (again.kept, again.skipped)

    image_features(counting_model, MemoryDataset([image(0), b"broken", image(2)]), options=FP32)
    assert counting_model.encoder.num_images == 3
    other = dataclasses.replace(counting_model, fingerprint="other weights")
    image_features(other, inputs, options=FP32)
    assert counting_model.encoder.num_images == 5
    image_features(counting_model, inputs, projected=False, options=FP32)
    assert counting_model.encoder.num_images == 7
    image_features(counting_model, inputs, options=dataclasses.replace(FP32, precision="bf16"))
    assert counting_model.encoder.num_images == 9
    image_features(counting_model, inputs, options=dataclasses.replace(FP32, use_cache=False))
    assert counting_model.encoder.num_images == 11


def test_nothing_is_kept_of_a_model_in_training(counting_model: PretrainedModel, tmp_path: Path):
    unfinished = dataclasses.replace(counting_model, fingerprint="")
    for _ in range(2):
        image_features(unfinished, MemoryDataset([image(0)]), options=FP32)
        text_features(unfinished, ["a cat"], options=FP32)
    assert (counting_model.encoder.num_images, counting_model.encoder.num_texts) == (2, 2)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_texts_keep_their_order_and_do_not_feel_their_neighbors(tiny_model: PretrainedModel):
    features = text_features(tiny_model, TEXTS, options=dataclasses.replace(FP32, batch_size=1))
    assert features.shape == (5, 10)
    tokens = Tokenizer(context_length=12).encode(TEXTS)  # padded to the context
    with torch.no_grad():
        expected = F.normalize(tiny_model.encoder.encode_text(tokens), dim=-1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_batches_are_sorted_by_length_and_cut_to_their_longest():
    batches = list(length_sorted_batches(TEXTS, 12, 2))
    assert sorted(int(n) for numbers, _ in batches for n in numbers) == [0, 1, 2, 3, 4]
    widths = [tokens.shape[1] for _, tokens in batches]
    assert widths == sorted(widths)
    for numbers, tokens in batches:
        whole = Tokenizer(context_length=12).encode([TEXTS[int(n)] for n in numbers])
        assert torch.equal(tokens, whole[:, : tokens.shape[1]])
        assert not whole[:, tokens.shape[1] :].any()


def test_cut_texts_are_counted_as_the_tokenizer_cuts_them():
    texts = ["!" * n for n in range(12)] + ["İ" * 4, "İ" * 5, "&nGt;" * 3, "a b c d e f g h i j", "a " * 10, "a" * 60]
    tokenizer = Tokenizer(context_length=12)
    tokenizer.encode(texts)
    assert count_truncated(texts, 12) == tokenizer.num_truncated > 0


def test_text_features_come_from_the_store_in_any_order(counting_model: PretrainedModel):
    first = text_features(counting_model, TEXTS, options=FP32)
    again = text_features(counting_model, TEXTS, options=FP32)
    assert counting_model.encoder.num_texts == 5
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    other = text_features(counting_model, [*TEXTS[::-1], "a new one"], options=FP32)
    assert counting_model.encoder.num_texts == 6
    torch.testing.assert_close(other[:5], first.flip(0), rtol=0, atol=0)


def test_a_single_text_leaves_nothing_on_the_disk(tiny_model: PretrainedModel, tmp_path: Path):
    text_features(tiny_model, ["a red bus"], options=FP32)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_text_is_an_error(tiny_model: PretrainedModel):
    with pytest.raises(EvaluateError, match="no text"):
        text_features(tiny_model, [], options=FP32)


def test_progress_is_told_to_the_end(tiny_model: PretrainedModel):
    told: list[tuple[int, int]] = []
    options = dataclasses.replace(FP32, progress=lambda done, total: told.append((done, total)))
    image_features(tiny_model, MemoryDataset([image(n) for n in range(4)]), options=options)
    assert told == [(3, 4), (4, 4)]


def test_bfloat16_changes_little(tiny_model: PretrainedModel):
    exact = text_features(tiny_model, TEXTS, options=FP32)
    rough = text_features(tiny_model, TEXTS, options=dataclasses.replace(FP32, precision="bf16"))
    assert rough.dtype == torch.float32
    assert (exact * rough).sum(dim=1).min() > 0.999
    assert not torch.equal(exact, rough)
