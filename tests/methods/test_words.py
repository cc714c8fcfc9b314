"""The words of a caption, predicted from its image: SuperCLIP's term against its paper, and what is counted."""

import math

import pytest
import torch

from declip_cli.batch import Batch
from declip_cli.losses import word_cross_entropy
from declip_cli.methods.registry import METHODS
from declip_cli.model import heads
from declip_cli.model.heads import WordHead, distinct_ids
from declip_cli.model.text_transformer import END_ID, VOCABULARY_SIZE
from tests.methods import reference_loops as loops
from tests.methods.small_methods import GOOD, batch_of, build

START_ID, BROKEN = 49406, torch.tensor(False)
DEVICES = pytest.mark.parametrize("counted_at_once", [(), ("cpu",)], ids=["all-words", "seen-words"])


def text(*ids, length=8):
    return torch.tensor([START_ID, *ids, END_ID] + [0] * (length - len(ids) - 2))


def captions_of(batch):
    """Ids of the first captions as sets, hidden ones put back; what follows the first end is padding."""
    found = []
    for ids, labels in zip(batch.tokens[:, 0].tolist(), batch.mlm_labels.tolist(), strict=True):
        whole = [word if label == -100 else label for word, label in zip(ids, labels, strict=True)]
        found.append(set(whole[: whole.index(END_ID) + 1]))
    return found


def earlier_batches(method):
    """Two batches of before, of which the second shares words with the batch at hand."""
    shared = batch_of(method)
    moved = shared.tokens.clone()
    moved[:, :, 1] = torch.arange(900, 905)[:, None]
    others = Batch(images=shared.images, tokens=moved, mlm_labels=shared.mlm_labels, pair_indices=shared.pair_indices)
    rare = moved.clone()
    rare[:, :, 2:4] = torch.tensor([5, 7])
    return [
        others,
        Batch(images=shared.images, tokens=rare, mlm_labels=shared.mlm_labels, pair_indices=shared.pair_indices),
    ]


@DEVICES
@pytest.mark.parametrize("name", METHODS)
def test_words_and_their_gradients_equal_the_loop_of_the_paper(name, counted_at_once, monkeypatch):
    monkeypatch.setattr(heads, "_COUNTED_AT_ONCE", counted_at_once)
    method = build(name, weights={"words": 1.0})
    batch, earlier = batch_of(method), earlier_batches(method)
    for each in earlier:
        with torch.no_grad():
            method.update_queue(method.embed(each), GOOD)
    found = method.embed(batch).word_losses
    found.sum().backward()
    gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    kept = method.prepare(batch, size=len(batch)).kept_patches
    states = method.encoder.image_states(batch.images[:, 0], None if kept is None else kept[:, 0])
    features = [loops.mean(list(patches)).double() for patches in states.patches]
    head = {key: p.double() for key, p in method.word_head.named_parameters()}
    expected = loops.words(features, captions_of(batch), [captions_of(each) for each in earlier], head)
    assert found.tolist() == pytest.approx([loss.item() for loss in expected], rel=1e-5)
    sum(expected).backward()
    wanted = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    assert {key for key in gradients if gradients[key].any()} == {key for key in wanted if wanted[key].any()}
    for key, gradient in wanted.items():
        assert (gradients[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key


@DEVICES
def test_before_any_caption_nothing_is_predicted(counted_at_once, monkeypatch):
    monkeypatch.setattr(heads, "_COUNTED_AT_ONCE", counted_at_once)
    method = build("clip", weights={"clip": 0.0, "words": 1.0})
    terms = method.objective(method.embed(batch_of(method)))
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert all(not p.grad.any() for p in method.parameters() if p.grad is not None)


def test_equal_scores_cost_the_logarithm_of_the_number_of_words():
    losses = word_cross_entropy(torch.zeros(2, 5), torch.tensor([[3, 1, -1], [-1, -1, -1]]), torch.arange(5.0))
    assert losses.tolist() == pytest.approx([math.log(5), 0.0])


def test_a_word_weighs_as_much_as_it_is_rare():
    head = WordHead(4, VOCABULARY_SIZE)
    head.count(distinct_ids(*masked(text(7, 9), text(7, 8), text(7, 8))), GOOD)
    rarity = head(torch.zeros(1, 4), torch.tensor([[7, 8, 9, 10]]))[2]
    # Of four ids seen, in the order of their numbers: 7, 8, 9, and start and end, which each caption has.
    assert rarity.tolist() == pytest.approx([0.0, math.log(4 / 3), math.log(4 / 2), 0.0, 0.0])


def masked(*texts):
    tokens = torch.stack(texts)
    ends = (tokens == END_ID).int().argmax(1)
    return tokens, torch.arange(tokens.shape[1]) <= ends[:, None]


def test_an_id_counts_once_a_caption_and_padding_never_though_0_is_an_exclamation_mark():
    words = distinct_ids(*masked(text(7, 9, 7), text(0, 7, 0)))
    assert words.tolist() == [[START_ID, 7, 9, -1, END_ID, -1, -1, -1], [START_ID, 0, 7, -1, END_ID, -1, -1, -1]]
    head = WordHead(4, VOCABULARY_SIZE)
    head.count(words, GOOD)
    assert head.num_captions == 2
    assert {int(id_): int(head.num_with[id_]) for id_ in head.num_with.nonzero()} == {
        0: 1,
        7: 2,
        9: 1,
        START_ID: 2,
        END_ID: 2,
    }


def test_a_broken_batch_counts_no_words():
    method = build("clip", weights={"words": 1.0})
    method.update_queue(method.embed(batch_of(method)), BROKEN)
    assert method.word_head.num_captions == 0
    assert not method.word_head.num_with.any()
