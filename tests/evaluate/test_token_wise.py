"""Token-wise ranks equal plain loops over patches and tokens."""

import pytest
import torch
from torch.nn import functional as F

from declip_cli.data.tokenizer import Tokenizer
from declip_cli.evaluate import token_wise
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.metrics import ranks_in_rows
from declip_cli.evaluate.token_wise import TokenTexts, encode_image_tokens, encode_text_tokens, token_wise_ranks
from tests.data_sets import MemoryDataset

FRESH = FeatureOptions(use_cache=False, threads=1, precision="fp32")


def make_tokens(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 1, 4, 2, 5, 2, 3]
    images = F.normalize(torch.randn(4, 6, 5, generator=generator), dim=-1)  # (N, P, Q)
    tokens = F.normalize(torch.randn(sum(lengths), 5, generator=generator), dim=-1)  # (T, Q)
    return images, TokenTexts(tokens, torch.tensor(lengths)), torch.tensor([0, 0, 1, 1, 2, 3, 3])


def plain_scores(images, texts):
    """Return how images score texts, and how texts score images, both (N, M)."""
    rows = texts.tokens.split(texts.lengths.tolist())
    by_image = [[sum(max(float(p @ t) for t in row) for p in image) / len(image) for row in rows] for image in images]
    by_text = [[sum(max(float(p @ t) for p in image) for t in row) / len(row) for row in rows] for image in images]
    return torch.tensor(by_image), torch.tensor(by_text)


@pytest.mark.parametrize("chunk", [2**24, 60])
def test_ranks_are_those_of_plain_loops(monkeypatch, chunk):
    monkeypatch.setattr(token_wise, "_CHUNK_SIMILARITIES", chunk)
    images, texts, image_ids = make_tokens()
    by_image, by_text = plain_scores(images, texts)
    ranks = token_wise_ranks(images, texts, image_ids)
    assert torch.equal(ranks.image_to_text, ranks_in_rows(by_image, torch.arange(4), image_ids))
    assert torch.equal(ranks.text_to_image, ranks_in_rows(by_text.T, image_ids, torch.arange(4)))


def test_selected_texts_keep_their_tokens():
    _, texts, _ = make_tokens()
    few = texts.select(torch.tensor([4, 1]))
    assert few.lengths.tolist() == [5, 1]
    assert torch.equal(few.tokens, torch.cat([texts.tokens[10:15], texts.tokens[3:4]]))


def test_padding_is_marked():
    _, texts, _ = make_tokens()
    tokens, is_padding = texts.padded(1, 4)
    assert tokens.shape == (3, 4, 5)
    assert is_padding.sum(1).tolist() == [3, 0, 2]


def test_features_are_unit_length_per_patch_and_token(tiny_token_model, make_image):
    images = MemoryDataset([make_image(seed) for seed in range(3)])
    found = encode_image_tokens(tiny_token_model, images, options=FRESH)
    assert found.features.shape == (3, 4, 6)  # (N, P, Q)
    assert torch.allclose(found.features.norm(dim=-1), torch.ones(3, 4), atol=1e-5)
    captions = ["a cat", "three dogs in a row", "x"]
    texts = encode_text_tokens(tiny_token_model, captions, options=FRESH)
    assert texts.lengths.tolist() == [len(Tokenizer().word_ids(caption)) + 2 for caption in captions]
    assert torch.allclose(texts.tokens.norm(dim=-1), torch.ones(len(texts.tokens)), atol=1e-5)


def test_cached_patches_are_the_same(tiny_token_model, make_image):
    images = MemoryDataset([make_image(seed) for seed in range(3)])
    cached = FeatureOptions(threads=1, precision="fp32")
    first = encode_image_tokens(tiny_token_model, images, options=cached)
    again = encode_image_tokens(tiny_token_model, images, options=cached)
    assert torch.equal(first.features, again.features)
    assert first.features.shape == again.features.shape
