import pytest
import torch
import torch.nn.functional as F

from declip_cli.model import neighbors
from declip_cli.model.neighbors import UNKNOWN, NeighborQueue

GOOD, BROKEN = torch.tensor(True), torch.tensor(False)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(params=["exact", "screened"])
def mode(request, monkeypatch):
    """Search as in float32 runs, and as under autocast on a GPU."""
    monkeypatch.setattr(NeighborQueue, "_is_screened", lambda self, device: request.param == "screened")
    return request.param


def at_cosine(query, cosines, *, seed):
    """Make a unit vector at each given cosine to a query, in random directions around it; float64."""
    query = query.double()
    others = torch.randn(len(cosines), len(query), generator=torch.Generator().manual_seed(seed)).double()
    others = F.normalize(others - (others @ query)[:, None] * query, dim=1)
    cosines = torch.tensor(cosines, dtype=torch.float64)[:, None]
    return cosines * query + (1 - cosines**2).sqrt() * others


def push(queue, features, *, start=0):
    """Push features of the pairs `start`, `start` + 1, …"""
    queue.push(features, torch.arange(start, start + len(features)), GOOD)


def contents(queue):
    return {tuple(row) for row in queue.rows[: int(queue.num_filled)].tolist()}


def rows(features):
    return {tuple(row) for row in features.tolist()}


def test_the_queue_fills_up_in_order():
    queue, features = NeighborQueue(7, 3), unit(5, 3)
    push(queue, features[:2])
    push(queue, features[2:])
    assert int(queue.num_filled) == 5
    assert torch.equal(queue.rows[:5], features)
    assert torch.equal(queue.rows[5:], torch.zeros(2, 3))


def test_the_queue_drops_the_oldest_when_full_and_wraps_without_losing_any():
    queue, features = NeighborQueue(7, 3), unit(13, 3)
    for start in (0, 5, 10):
        push(queue, features[start : start + 5])
    assert int(queue.num_filled) == 7
    assert contents(queue) == rows(features[-7:])
    assert int(queue.next_row) == 13 % 7


def test_of_more_features_than_rows_the_last_are_kept():
    queue, features = NeighborQueue(4, 3), unit(11, 3)
    push(queue, features[:2])
    push(queue, features[2:])
    assert int(queue.num_filled) == 4
    assert contents(queue) == rows(features[-4:])
    push(queue, unit(1, 3, seed=9))
    assert contents(queue) == rows(torch.cat([features[-3:], unit(1, 3, seed=9)]))


@pytest.mark.parametrize("num_filled", [1, 16, 20])
def test_the_nearest_row_equals_brute_force(num_filled, mode, monkeypatch):
    monkeypatch.setattr(neighbors, "_BLOCK_ROWS", 16)
    queue, features, queries = NeighborQueue(20, 5), unit(num_filled, 5), unit(9, 5, seed=1)
    push(queue, features)
    found = queue.nearest(queries)
    assert found.shape == (9, 5)
    for row, query in enumerate(queries.tolist()):
        best = max(features.tolist(), key=lambda f: sum(a * b for a, b in zip(f, query, strict=True)))
        assert found[row].tolist() == best


def test_an_unfilled_row_is_never_returned(mode):
    queue, feature = NeighborQueue(8, 3), unit(1, 3)
    push(queue, feature)
    # An empty row has cosine 0 with everything and would win against a cosine of -1.
    assert torch.equal(queue.nearest(-feature), feature)


def test_an_empty_queue_has_no_nearest():
    with pytest.raises(ValueError, match="the queue is empty"):
        NeighborQueue(4, 3).nearest(unit(1, 3))


def test_neighbors_have_no_gradient():
    queue, features = NeighborQueue(4, 3), unit(2, 3).requires_grad_()
    push(queue, features)
    assert not queue.rows.requires_grad
    assert not queue.nearest(features).requires_grad


def test_the_faithful_start_is_random_directions_that_count():
    torch.manual_seed(0)
    queue = NeighborQueue(6, 3)
    queue.fill_randomly()
    assert int(queue.num_filled) == 6
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(6))
    push(queue, unit(2, 3))
    assert rows(unit(2, 3)) < contents(queue)


def test_the_queue_is_part_of_the_saved_state():
    queue = NeighborQueue(5, 3)
    push(queue, unit(7, 3))
    other = NeighborQueue(5, 3)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        push(each, unit(2, 3, seed=2))
    assert torch.equal(other.rows, queue.rows)
    assert int(other.next_row) == int(queue.next_row)


def test_the_rows_are_counted_again_after_a_state_is_loaded():
    full, empty = NeighborQueue(3, 3), NeighborQueue(3, 3).state_dict()
    push(full, unit(2, 3))
    assert full.count() == 2
    push(full, unit(2, 3))
    assert full.count() == 3
    assert full.count() == 3
    full.load_state_dict(empty)
    assert full.count() == 0


@pytest.mark.parametrize("num_before", [0, 2, 5, 9])
def test_a_broken_batch_leaves_the_queue_bit_for_bit_as_it_was(num_before):
    queue = NeighborQueue(7, 3)
    push(queue, unit(num_before, 3))
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    for features in (torch.full((4, 3), float("nan")), torch.full((8, 3), float("inf")), unit(3, 3, seed=5)):
        queue.push(features, torch.arange(len(features)), BROKEN)
    assert set(before) == {"rows", "pair_indices", "next_row", "num_filled"}
    for name, value in queue.state_dict().items():
        assert torch.equal(value, before[name]), name
    push(queue, unit(3, 3, seed=6))
    assert torch.equal(queue.rows[int(before["next_row"])], unit(3, 3, seed=6)[0])


def test_a_row_keeps_the_number_of_its_pair():
    queue = NeighborQueue(5, 3)
    assert queue.pair_indices.tolist() == [UNKNOWN] * 5
    push(queue, unit(4, 3), start=10)
    push(queue, unit(3, 3), start=20)
    assert queue.pair_indices.tolist() == [21, 22, 12, 13, 20]
    push(queue, unit(9, 3), start=30)
    assert sorted(queue.pair_indices.tolist()) == [34, 35, 36, 37, 38]


@pytest.mark.parametrize("block_rows", [16, 128])
def test_rows_of_the_own_pair_are_never_returned(block_rows, mode, monkeypatch):
    monkeypatch.setattr(neighbors, "_BLOCK_ROWS", block_rows)
    queue, features = NeighborQueue(30, 4), unit(24, 4)
    pair_indices = torch.arange(24) % 8  # three rows of each pair
    queue.push(features, pair_indices, GOOD)
    queries = features[:8]
    found = queue.nearest(queries, pair_indices[:8])
    assert found.shape == (8, 4)
    for row, query in enumerate(queries.tolist()):
        others = [f for f, number in zip(features.tolist(), pair_indices.tolist(), strict=True) if number != row]
        assert found[row].tolist() == max(others, key=lambda f: sum(a * b for a, b in zip(f, query, strict=True)))
    assert torch.equal(queue.nearest(queries), queries)


def test_rows_without_a_pair_are_returned_to_queries_without_one(mode):
    queue, features = NeighborQueue(4, 3), unit(4, 3)
    queue.push(features, torch.full((4,), UNKNOWN), GOOD)
    assert torch.equal(queue.nearest(features, torch.full((4,), UNKNOWN)), features)


@pytest.mark.parametrize("num_rows", [3, 400])
def test_where_every_row_is_the_own_pairs_the_first_is_returned(num_rows, mode):
    queue, features = NeighborQueue(500, 6), unit(num_rows, 6)
    queue.push(features, torch.full((num_rows,), 5), GOOD)
    found = queue.nearest(features[:3], torch.tensor([5, 9, 5]))
    assert torch.equal(found, features[[0, 1, 0]])


@pytest.mark.parametrize("gap", [1e-5, 3e-5, 1e-4, 3e-4])
def test_the_nearest_is_found_among_near_ties(gap, mode, monkeypatch):
    monkeypatch.setattr(neighbors, "_BLOCK_ROWS", 256)
    queries, parts = unit(16, 96), [unit(500, 96, seed=1).double()]
    for number, query in enumerate(queries):
        # One row at cosine 0.9, forty just below it.
        parts.append(at_cosine(query, [0.9, *(0.9 - gap * k for k in range(1, 41))], seed=number))
    rows = torch.cat(parts)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))]
    best = (queries.double() @ rows.T).argmax(1)
    queue = NeighborQueue(2000, 96)
    push(queue, rows.float())
    assert torch.equal(queue.nearest(queries), rows.float()[best])
    if gap < 1e-4:  # what a search in bfloat16 alone would have confused
        assert not torch.equal((queries.bfloat16() @ rows.bfloat16().T).argmax(1), best)


def test_the_nearest_is_found_when_all_rows_are_nearly_alike(mode):
    rows = at_cosine(unit(1, 48)[0], [1 - 1e-3 * (k / 999) for k in range(1000)], seed=3)
    rows = rows[torch.randperm(1000, generator=torch.Generator().manual_seed(4))].float()
    queue, queries = NeighborQueue(1000, 48), rows[:40]
    queue.push(rows, torch.arange(1000), GOOD)
    found = queue.nearest(queries, torch.arange(40))
    cosines = (queries.double() @ rows.double().T).fill_diagonal_(-1)
    # Float32 has no finer step near 1 than 6e-8.
    torch.testing.assert_close((queries.double() * found.double()).sum(1), cosines.amax(1), rtol=0, atol=3e-7)


def test_of_equal_rows_the_first_counts(mode, monkeypatch):
    monkeypatch.setattr(neighbors, "_BLOCK_ROWS", 32)
    rows, owners = unit(3, 5).repeat(70, 1), torch.arange(210)
    found = neighbors._find_exactly(unit(3, 5), rows, None, owners)
    screened = neighbors._find_screened(unit(3, 5), rows, rows.half(), None, owners)
    assert found.tolist() == screened.tolist() == [0, 1, 2]


def test_a_search_finds_what_was_pushed_loaded_or_drawn_after_the_one_before(mode):
    queue, features = NeighborQueue(600, 32), unit(900, 32)

    def check(rows):
        assert torch.equal(queue.nearest(rows), rows)

    push(queue, features[:500])
    check(features[:500])
    push(queue, features[500:800])  # wraps
    check(features[200:800])
    queue.push(torch.full((50, 32), float("nan")), torch.arange(50), BROKEN)
    check(features[200:800])
    other = NeighborQueue(600, 32)
    push(other, features[300:900])
    queue.load_state_dict(other.state_dict())
    check(features[300:900])
    queue.fill_randomly()
    check(queue.rows.clone())
    assert set(queue.state_dict()) == {"rows", "pair_indices", "next_row", "num_filled"}


def test_a_gpu_compares_all_rows_at_once_where_its_memory_allows():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert neighbors._block_rows(512, gpu) >= 65536
    assert neighbors._block_rows(8192, gpu) * 8192 <= 2**27
    assert neighbors._block_rows(512, cpu) == 8192
    assert {neighbors._block_rows(num, gpu) % 16 for num in range(1, 3000, 7)} == {0}


def test_screening_is_for_autocast_on_a_gpu_unless_exactness_is_asked_for(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert not NeighborQueue(4, 3)._is_screened(gpu)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: True)
    assert NeighborQueue(4, 3)._is_screened(gpu)
    assert not NeighborQueue(4, 3, exact=True)._is_screened(gpu)
    assert not NeighborQueue(4, 3)._is_screened(cpu)


def test_factors_are_not_rounded_to_tf32_while_searching(monkeypatch):
    seen = []
    search = neighbors._find_exactly
    monkeypatch.setattr(
        neighbors,
        "_find_exactly",
        lambda *arguments: seen.append(torch.get_float32_matmul_precision()) or search(*arguments),
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        queue = NeighborQueue(4, 3)
        push(queue, unit(4, 3))
        queue.nearest(unit(2, 3))
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_search_under_autocast_is_not_rounded():
    queue, queries = NeighborQueue(60, 8), unit(9, 8, seed=1)
    push(queue, unit(60, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(queue.nearest(queries), queue.rows[(queries.double() @ queue.rows.double().T).argmax(1)])
