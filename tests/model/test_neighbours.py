import pytest
import torch
import torch.nn.functional as F

from declip_cli.model import neighbours
from declip_cli.model.neighbours import NeighbourQueue


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(neighbours, "has_native_bf16", lambda device: False)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def contents(queue):
    return {tuple(row) for row in queue.rows[: int(queue.num_filled)].tolist()}


def rows(features):
    return {tuple(row) for row in features.tolist()}


def test_the_queue_fills_up_in_order():
    queue, features = NeighbourQueue(7, 3), unit(5, 3)
    queue.push(features[:2])
    queue.push(features[2:])
    assert int(queue.num_filled) == 5
    assert torch.equal(queue.rows[:5], features)
    assert torch.equal(queue.rows[5:], torch.zeros(2, 3))


def test_the_queue_drops_the_oldest_when_full_and_wraps_without_losing_any():
    queue, features = NeighbourQueue(7, 3), unit(13, 3)
    for start in (0, 5, 10):
        queue.push(features[start : start + 5])
    assert int(queue.num_filled) == 7
    assert contents(queue) == rows(features[-7:])
    assert int(queue.next_row) == 13 % 7


def test_of_more_features_than_rows_the_last_are_kept():
    queue, features = NeighbourQueue(4, 3), unit(11, 3)
    queue.push(features[:2])
    queue.push(features[2:])
    assert int(queue.num_filled) == 4
    assert contents(queue) == rows(features[-4:])
    queue.push(unit(1, 3, seed=9))
    assert contents(queue) == rows(torch.cat([features[-3:], unit(1, 3, seed=9)]))


@pytest.mark.parametrize("num_filled", [1, 6, 20])
def test_the_nearest_row_equals_brute_force(num_filled, monkeypatch):
    monkeypatch.setattr(neighbours, "_CHUNK_ROWS", 6)
    queue, features, queries = NeighbourQueue(20, 5), unit(num_filled, 5), unit(9, 5, seed=1)
    queue.push(features)
    found = queue.nearest(queries)
    assert found.shape == (9, 5)
    for row, query in enumerate(queries.tolist()):
        best = max(features.tolist(), key=lambda f: sum(a * b for a, b in zip(f, query, strict=True)))
        assert found[row].tolist() == best


def test_an_unfilled_row_is_never_returned():
    queue, feature = NeighbourQueue(8, 3), unit(1, 3)
    queue.push(feature)
    # An empty row has cosine 0 with everything and would win against a cosine of -1.
    assert torch.equal(queue.nearest(-feature), feature)


def test_an_empty_queue_has_no_nearest():
    with pytest.raises(ValueError, match="the queue is empty"):
        NeighbourQueue(4, 3).nearest(unit(1, 3))


def test_neighbours_have_no_gradient():
    queue, features = NeighbourQueue(4, 3), unit(2, 3).requires_grad_()
    queue.push(features)
    assert not queue.rows.requires_grad
    assert not queue.nearest(features).requires_grad


def test_the_faithful_start_is_random_directions_that_count():
    torch.manual_seed(0)
    queue = NeighbourQueue(6, 3)
    queue.fill_randomly()
    assert int(queue.num_filled) == 6
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(6))
    queue.push(unit(2, 3))
    assert rows(unit(2, 3)) < contents(queue)


def test_the_queue_is_part_of_the_saved_state():
    queue = NeighbourQueue(5, 3)
    queue.push(unit(7, 3))
    other = NeighbourQueue(5, 3)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(unit(2, 3, seed=2))
    assert torch.equal(other.rows, queue.rows)
    assert int(other.next_row) == int(queue.next_row)


def test_a_bfloat16_search_finds_what_clearly_is_nearest(monkeypatch):
    monkeypatch.setattr(neighbours, "has_native_bf16", lambda device: True)
    queue, features = NeighbourQueue(50, 64), unit(50, 64)
    queue.push(features)
    assert torch.equal(queue.nearest(features.flip(0)), features.flip(0))


def test_the_rows_are_counted_again_after_a_state_is_loaded():
    full, empty = NeighbourQueue(3, 3), NeighbourQueue(3, 3).state_dict()
    full.push(unit(2, 3))
    assert full.count() == 2
    full.push(unit(2, 3))
    assert full.count() == 3
    assert full.count() == 3
    full.load_state_dict(empty)
    assert full.count() == 0
