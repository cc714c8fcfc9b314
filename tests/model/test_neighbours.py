import pytest
import torch
import torch.nn.functional as F

from declip_cli.model import neighbours
from declip_cli.model.neighbours import UNKNOWN, NeighbourQueue

GOOD, BROKEN = torch.tensor(True), torch.tensor(False)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def push(queue, features, *, start=0):
    """Push features of the pairs `start`, `start` + 1, …"""
    queue.push(features, torch.arange(start, start + len(features)), GOOD)


def contents(queue):
    return {tuple(row) for row in queue.rows[: int(queue.num_filled)].tolist()}


def rows(features):
    return {tuple(row) for row in features.tolist()}


def test_the_queue_fills_up_in_order():
    queue, features = NeighbourQueue(7, 3), unit(5, 3)
    push(queue, features[:2])
    push(queue, features[2:])
    assert int(queue.num_filled) == 5
    assert torch.equal(queue.rows[:5], features)
    assert torch.equal(queue.rows[5:], torch.zeros(2, 3))


def test_the_queue_drops_the_oldest_when_full_and_wraps_without_losing_any():
    queue, features = NeighbourQueue(7, 3), unit(13, 3)
    for start in (0, 5, 10):
        push(queue, features[start : start + 5])
    assert int(queue.num_filled) == 7
    assert contents(queue) == rows(features[-7:])
    assert int(queue.next_row) == 13 % 7


def test_of_more_features_than_rows_the_last_are_kept():
    queue, features = NeighbourQueue(4, 3), unit(11, 3)
    push(queue, features[:2])
    push(queue, features[2:])
    assert int(queue.num_filled) == 4
    assert contents(queue) == rows(features[-4:])
    push(queue, unit(1, 3, seed=9))
    assert contents(queue) == rows(torch.cat([features[-3:], unit(1, 3, seed=9)]))


@pytest.mark.parametrize("num_filled", [1, 6, 20])
def test_the_nearest_row_equals_brute_force(num_filled, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_ROWS", 6)
    queue, features, queries = NeighbourQueue(20, 5), unit(num_filled, 5), unit(9, 5, seed=1)
    push(queue, features)
    found = queue.nearest(queries)
    assert found.shape == (9, 5)
    for row, query in enumerate(queries.tolist()):
        best = max(features.tolist(), key=lambda f: sum(a * b for a, b in zip(f, query, strict=True)))
        assert found[row].tolist() == best


def test_an_unfilled_row_is_never_returned():
    queue, feature = NeighbourQueue(8, 3), unit(1, 3)
    push(queue, feature)
    # An empty row has cosine 0 with everything and would win against a cosine of -1.
    assert torch.equal(queue.nearest(-feature), feature)


def test_an_empty_queue_has_no_nearest():
    with pytest.raises(ValueError, match="the queue is empty"):
        NeighbourQueue(4, 3).nearest(unit(1, 3))


def test_neighbours_have_no_gradient():
    queue, features = NeighbourQueue(4, 3), unit(2, 3).requires_grad_()
    push(queue, features)
    assert not queue.rows.requires_grad
    assert not queue.nearest(features).requires_grad


def test_the_faithful_start_is_random_directions_that_count():
    torch.manual_seed(0)
    queue = NeighbourQueue(6, 3)
    queue.fill_randomly()
    assert int(queue.num_filled) == 6
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(6))
    push(queue, unit(2, 3))
    assert rows(unit(2, 3)) < contents(queue)


def test_the_queue_is_part_of_the_saved_state():
    queue = NeighbourQueue(5, 3)
    push(queue, unit(7, 3))
    other = NeighbourQueue(5, 3)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        push(each, unit(2, 3, seed=2))
    assert torch.equal(other.rows, queue.rows)
    assert int(other.next_row) == int(queue.next_row)


def test_the_rows_are_counted_again_after_a_state_is_loaded():
    full, empty = NeighbourQueue(3, 3), NeighbourQueue(3, 3).state_dict()
    push(full, unit(2, 3))
    assert full.count() == 2
    push(full, unit(2, 3))
    assert full.count() == 3
    assert full.count() == 3
    full.load_state_dict(empty)
    assert full.count() == 0


@pytest.mark.parametrize("num_before", [0, 2, 5, 9])
def test_a_broken_batch_leaves_the_queue_bit_for_bit_as_it_was(num_before):
    queue = NeighbourQueue(7, 3)
    push(queue, unit(num_before, 3))
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    for features in (torch.full((4, 3), float("nan")), torch.full((8, 3), float("inf")), unit(3, 3, seed=5)):
        queue.push(features, torch.arange(len(features)), BROKEN)
    assert set(before) == {"rows", "numbers", "next_row", "num_filled"}
    for name, value in queue.state_dict().items():
        assert torch.equal(value, before[name]), name
    push(queue, unit(3, 3, seed=6))
    assert torch.equal(queue.rows[int(before["next_row"])], unit(3, 3, seed=6)[0])


def test_a_row_keeps_the_number_of_its_pair():
    queue = NeighbourQueue(5, 3)
    assert queue.numbers.tolist() == [UNKNOWN] * 5
    push(queue, unit(4, 3), start=10)
    push(queue, unit(3, 3), start=20)
    assert queue.numbers.tolist() == [21, 22, 12, 13, 20]
    push(queue, unit(9, 3), start=30)
    assert sorted(queue.numbers.tolist()) == [34, 35, 36, 37, 38]


@pytest.mark.parametrize("block_rows", [4, 100])
def test_rows_of_the_own_pair_are_never_returned(block_rows, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_ROWS", block_rows)
    queue, features = NeighbourQueue(30, 4), unit(24, 4)
    numbers = torch.arange(24) % 8  # three rows of each pair
    queue.push(features, numbers, GOOD)
    queries = features[:8]
    found = queue.nearest(queries, numbers[:8])
    assert found.shape == (8, 4)
    for row, query in enumerate(queries.tolist()):
        others = [f for f, number in zip(features.tolist(), numbers.tolist(), strict=True) if number != row]
        assert found[row].tolist() == max(others, key=lambda f: sum(a * b for a, b in zip(f, query, strict=True)))
    assert torch.equal(queue.nearest(queries), queries)


def test_rows_without_a_pair_are_returned_to_queries_without_one():
    queue, features = NeighbourQueue(4, 3), unit(4, 3)
    queue.push(features, torch.full((4,), UNKNOWN), GOOD)
    assert torch.equal(queue.nearest(features, torch.full((4,), UNKNOWN)), features)


def test_where_every_row_is_the_own_pairs_the_first_is_returned():
    queue, features = NeighbourQueue(6, 3), unit(3, 3)
    queue.push(features, torch.tensor([5, 5, 5]), GOOD)
    found = queue.nearest(features, torch.tensor([5, 9, 5]))
    assert torch.equal(found, features[[0, 1, 0]])
