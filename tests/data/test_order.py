import numpy as np
import pytest

from declip_cli.data.order import BlockOrder, ExactOrder, ShardOrder


def firsts_of(num_blocks, *, smallest=0, largest=9, seed=0):
    sizes = np.random.default_rng(seed).integers(smallest, largest + 1, num_blocks)
    return np.concatenate([[0], np.cumsum(sizes)])


def block_order(num_blocks=400, *, size=10, num_streams=8, open_blocks=64, seed=1):
    return BlockOrder(np.arange(num_blocks + 1) * size, seed, num_streams=num_streams, open_blocks=open_blocks)


def whole(order, num, epoch=0):
    return order.indices(epoch, np.arange(num))


@pytest.mark.parametrize("num_blocks", [1, 5, 40, 150])
@pytest.mark.parametrize("num_streams", [1, 7, 64])
@pytest.mark.parametrize("open_blocks", [4, 128])
def test_every_sample_comes_once_an_epoch(num_blocks, num_streams, open_blocks):
    firsts = firsts_of(num_blocks, smallest=int(num_blocks == 1))
    order = BlockOrder(firsts, 3, num_streams=num_streams, open_blocks=open_blocks)
    for epoch in range(2):
        assert sorted(whole(order, firsts[-1], epoch)) == list(range(firsts[-1]))
        assert order.reaches(epoch, firsts[-1])
        assert not order.reaches(epoch, firsts[-1] + 1)


def test_a_part_of_the_order_equals_that_part_of_the_whole():
    order = block_order()
    positions = np.array([3999, 0, 17, 2500])
    assert block_order().indices(2, positions).tolist() == whole(order, 4000, 2)[positions].tolist()


def test_epochs_and_seeds_have_different_orders():
    orders = [whole(block_order(seed=seed), 4000, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.sum(one == other) < 12  # 1 expected


def test_as_many_open_blocks_as_there_are_make_an_exact_shuffle():
    num, num_epochs = 40, 80
    order = BlockOrder(np.arange(0, num + 1, 4), 3, num_streams=4, open_blocks=10)
    counts = np.zeros((num, num))
    for epoch in range(num_epochs):
        counts[np.arange(num), whole(order, num, epoch)] += 1
    chi_square = ((counts - 2) ** 2 / 2).sum()
    assert chi_square == pytest.approx(39 * 39, abs=4 * 55)  # 39^2 degrees of freedom
    order = BlockOrder(np.arange(0, 10_001, 100), 3, num_streams=4, open_blocks=100)
    assert np.abs(np.diff(whole(order, 10_000))).mean() == pytest.approx(10_000 / 3, rel=0.03)


@pytest.mark.parametrize("num_streams", [1, 8, 64])
def test_at_least_as_many_blocks_as_asked_for_are_open_and_at_most_twice_as_many(num_streams):
    order = block_order(num_blocks=2000, size=5, num_streams=num_streams)
    blocks = whole(order, 10_000) // 5
    every = {window: set() for window in order.windows(0, np.arange(10_000))}
    for window in every:
        every[window] = order.pieces(window)
        assert 64 // num_streams <= len(every[window]) <= 128 // num_streams + 1  # a stream may begin inside a block
    for position in range(0, 10_000, 500):
        streams = np.arange(num_streams)
        near = np.minimum(position - position % num_streams + streams, 9_999)
        opened = {block for window in order.windows(0, near) for block in every[window]}
        assert set(blocks[near]) <= opened
        assert len(opened) >= 64


def test_every_block_is_read_in_one_window_but_for_those_where_streams_begin():
    order = block_order(num_blocks=2000, size=5)
    windows = order.windows(0, np.arange(10_000))
    read = [block for window in windows for block in order.pieces(window)]
    assert set(read) == set(range(2000))
    assert len(read) <= 2000 + order.num_streams


def test_windows_of_a_stream_follow_each_other_into_the_next_epoch():
    order = block_order(num_blocks=300)
    for stream in range(8):
        window = order.windows(0, np.array([stream]))[0]
        indices = []
        while window.epoch < 2:
            indices += [(window.epoch, window.number)]
            assert window < order.after(window)
            window = order.after(window)
        wanted = [w for epoch in (0, 1) for w in order.windows(epoch, np.arange(stream, 3000, 8))]
        assert indices == [(w.epoch, w.number) for w in wanted]


def test_windows_begin_at_different_times_in_different_streams_and_epochs():
    order = block_order(num_blocks=4000, num_streams=4, open_blocks=64)
    beginnings = [
        [np.flatnonzero(np.diff([w.number for p in range(s, 4000, 40) for w in order.windows(e, np.array([p]))]))[0]]
        for s, e in [(0, 0), (1, 0), (0, 1), (0, 2)]
    ]
    assert len({first for (first,) in beginnings}) >= 3


def test_the_order_in_blocks_is_pinned_so_that_old_runs_can_be_resumed():
    order = BlockOrder(np.array([0, 3, 5, 9, 10, 14]), 1, num_streams=2, open_blocks=2)
    assert whole(order, 14, 2).tolist() == [8, 1, 6, 2, 5, 11, 7, 10, 4, 13, 3, 12, 0, 9]


def test_other_blocks_streams_or_widths_are_told_apart():
    orders = [block_order(), block_order(num_streams=4), block_order(open_blocks=128), block_order(size=11)]
    identities = [order.identity for order in [*orders, ExactOrder(4000, 1)]]
    assert all(one not in identities[:i] for i, one in enumerate(identities))
    assert block_order().identity == identities[0]


def test_an_order_of_millions_of_blocks_is_had_without_a_table_of_samples():
    order = block_order(num_blocks=200_000, size=2000, num_streams=64, open_blocks=128)
    indices = order.indices(3, np.array([0, 399_999_999]))
    assert ((indices >= 0) & (indices < 400_000_000)).all()


COUNTS = [3, 0, 5, 4, 1, 7, 2, 6, 3, 3, 8, 2]


def shard_order(counted, open_shards=4):
    def count(shard):
        counted.append(shard)
        return COUNTS[shard]

    return ShardOrder(len(COUNTS), 1, open_shards=open_shards, count=count)


def test_shards_are_counted_only_when_their_turn_comes():
    counted = []
    order = shard_order(counted)
    assert order.reaches(0, 1)
    assert len(counted) <= 3  # one shard, or one more if that is empty
    assert order.reaches(0, sum(COUNTS))
    assert not order.reaches(0, sum(COUNTS) + 1)
    assert sorted(counted) == list(range(len(COUNTS)))
    assert order.reaches(1, sum(COUNTS))
    assert len(counted) == len(COUNTS)


def test_every_sample_of_uncounted_shards_comes_once_an_epoch():
    order = shard_order([])
    every = [shard << 32 | row for shard, count in enumerate(COUNTS) for row in range(count)]
    orders = [whole(order, sum(COUNTS), epoch).tolist() for epoch in range(2)]
    assert [sorted(indices) for indices in orders] == [every, every]
    assert orders[0] != orders[1]


def test_the_counts_of_a_state_need_not_be_found_again():
    counted, again = [], []
    first, second = shard_order(counted), shard_order(again)
    wanted = whole(first, 20).tolist()
    second.counts[:] = first.counts
    assert whole(second, 20).tolist() == wanted
    assert not again


@pytest.mark.parametrize("order", [ExactOrder(44, 1), block_order(11, size=4, num_streams=2), shard_order([])])
def test_stand_ins_come_from_every_place_before_any_comes_again(order):
    indices = [order.replacement(0, 30, attempt, 4) for attempt in range(1, 12)]
    assert len(set(indices)) >= 5
    assert order.replacement(0, 30, 3, 4) == indices[2]


def shares_of_one_shard(indices, shard_size, batch_size=256):
    """Count, for each batch, how many of its samples come from the shard that gives most."""
    shards = indices[: len(indices) // batch_size * batch_size].reshape(-1, batch_size) // shard_size
    return np.array([np.bincount(batch).max() for batch in shards]) / batch_size


def test_batches_from_shards_sorted_by_class_are_mixed_nearly_as_an_exact_shuffle_mixes_them():
    num, size, shard = 131_072, 64, 2048  # 64 classes, one in each shard of 32 blocks
    order = block_order(num // size, size=size, num_streams=8, open_blocks=128)
    blocks, exact = whole(order, num), whole(ExactOrder(num, 1), num)
    ours, theirs = (shares_of_one_shard(indices, shard).mean() for indices in (blocks, exact))
    drawn = np.random.default_rng(0).integers(0, num, 131_072)
    assert theirs == pytest.approx(shares_of_one_shard(drawn, shard).mean(), rel=0.03)
    assert ours < 1.6 * theirs
    place = np.empty(num, np.int64)
    place[blocks] = np.arange(num)
    apart = np.abs(np.diff(place.reshape(-1, size), axis=1))  # samples that are neighbors in a block
    assert np.median(apart) > 0.29 * 128 * size  # 1 - sqrt(1/2) of a window, for two places drawn evenly in it
