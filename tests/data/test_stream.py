import dataclasses
import io
import itertools
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from declip_cli.config import AugmentConfig, Views
from declip_cli.data.dataset import UNREAD, BlockDataset, Dataset, Example, Skips
from declip_cli.data.loader import StreamConfig
from declip_cli.data.order import BlockOrder
from declip_cli.data.stream import ReadAhead, TrainStream
from declip_cli.errors import DataError

NUM, SIZE, SIDE = 23, 4, 8
PHOTO = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)


class MemoryStore(Dataset):
    """Pairs in memory; the numbers of unreadable ones can be given, by cause."""

    fingerprint = "aa"

    def __init__(self, num=NUM, *, bad=(), undecodable=(), side=12, format="PNG", captions=1):
        self.bad, self.undecodable, self.num_reads = set(bad), set(undecodable), 0
        self.images = [self.image(number, side, format) for number in range(num)]
        self.num_captions = captions
        self.skipped = Skips()

    @staticmethod
    def image(number, side, format):
        image = Image.fromarray(PHOTO + np.uint8(number % 251)).resize((side, side + 3), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, format)
        return file.getvalue()

    def __len__(self):
        return len(self.images)

    def key(self, number):
        return f"key{number:03}"

    def read(self, number):
        self.num_reads += 1
        if number in self.bad:
            raise DataError(f"shard 0 is damaged at {number}", remedy="make it again", cause="damaged shard")
        image = self.images[number]
        if number in self.undecodable:
            image = image[: len(image) // 2]
        words = " ".join(["dog"] * (1 + number % 5))
        captions = tuple(f"{words} {i}" for i in range(self.num_captions))
        return Example(self.key(number), image, captions)


class BlockStore(MemoryStore, BlockDataset):
    """Pairs in blocks, which remembers what was fetched, read and released."""

    is_remote = True

    def __init__(self, num=NUM, *, block_size=3, **options):
        super().__init__(num, **options)
        self.block_firsts = np.append(np.arange(0, num, block_size), num)
        self.num_blocks, self.block_size, self.events = len(self.block_firsts) - 1, block_size, []

    def count(self, block):
        return self.block_firsts[block + 1] - self.block_firsts[block]

    def fetch(self, block):
        self.events.append(("fetch", block))

    def release(self, block):
        self.events.append(("release", block))

    def read(self, number):
        self.events.append(("read", number // self.block_size))
        return super().read(number)


class UncountedStore(BlockStore):
    """Pairs in shards whose sizes are found when they are read."""

    sizes = [5, 0, 7, 4, 3, 6]

    def __init__(self, **options):
        super().__init__(sum(self.sizes), **options)
        self.num_blocks, self.block_firsts = len(self.sizes), None
        self.num_counts = 0

    def count(self, shard):
        self.num_counts += 1
        return self.sizes[shard]

    def read(self, number):
        shard, row = number >> 32, number & 0xFFFFFFFF
        assert row < self.sizes[shard]
        return super().read(sum(self.sizes[:shard]) + row)


def stream(samples=None, **changes):
    config = StreamConfig(
        views=Views(images=("plain", "augmented", "augmented"), texts=("plain", "masked")),
        augment=AugmentConfig(),
        side_px=SIDE,
        context_length=16,
        batch_size=SIZE,
        seed=1,
        max_bad=0.2,
    )
    return TrainStream(samples or MemoryStore(), dataclasses.replace(config, **changes))


def take(source, num):
    return list(itertools.islice(source, num))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for field in dataclasses.fields(a):
            values = [getattr(batch, field.name) for batch in (a, b)]
            assert values == [None, None] or torch.equal(*values), field.name


def assert_joined(parts, batch):
    """The batches of all ranks are the global batch, up to padding."""
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.pair_indices for part in parts]), batch.pair_indices)
    for part, share in zip(parts, batch.split(len(parts[0])), strict=True):
        length = part.tokens.shape[2]
        assert torch.equal(part.tokens, share.tokens[..., :length])
        assert torch.equal(part.mlm_labels, share.mlm_labels[..., :length])


def indices(batches):
    return [batch.pair_indices.tolist() for batch in batches]


def test_batches_have_the_shapes_they_promise():
    batch = next(stream())
    length = batch.tokens.shape[2]
    assert batch.images.shape == (SIZE, 3, SIDE, SIDE, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.tokens.shape == (SIZE, 2, length)
    assert batch.tokens.dtype == torch.int64
    assert batch.mlm_labels.shape == (SIZE, length)
    assert batch.pair_indices.shape == (SIZE,)


def test_texts_are_cut_to_the_longest_of_the_batch():
    for batch in take(stream(), 5):
        lengths = (batch.tokens != 0).sum(2)
        assert lengths.max() == batch.tokens.shape[2]
        assert lengths[:, 0].tolist() == [3 + 1 + number % 5 for number in batch.pair_indices.tolist()]


def test_texts_are_padded_to_the_context_where_the_method_asks():
    views = Views(images=("plain",), texts=("plain",), pad_to_context=True)
    batch = next(stream(views=views))
    assert batch.tokens.shape == (SIZE, 1, 16)
    assert (batch.mlm_labels == -100).all()


def test_mask_labels_name_what_was_hidden_in_the_masked_view():
    plain, masked, labels = [], [], []
    for batch in take(stream(MemoryStore(100)), 25):
        where = batch.mlm_labels != -100
        plain += batch.tokens[:, 0][where].tolist()
        masked += batch.tokens[:, 1][where].tolist()
        labels += batch.mlm_labels[where].tolist()
    assert labels == plain
    assert len(labels) > 20
    assert np.mean([token == 49408 for token in masked]) == pytest.approx(0.8, abs=0.2)


def test_an_epoch_holds_every_pair_once_up_to_the_last_incomplete_batch():
    source = stream()
    assert source.num_samples == NUM
    assert source.steps_per_epoch == NUM // SIZE == 5
    for _ in range(3):
        seen = sum(indices(take(source, 5)), [])
        assert len(set(seen)) == 20


def test_epochs_differ_in_order_and_augmentation():
    source = stream(MemoryStore(8), batch_size=8)
    first, second = take(source, 2)
    assert first.pair_indices.tolist() != second.pair_indices.tolist()
    order = second.pair_indices.argsort()[first.pair_indices.argsort().argsort()]
    assert torch.equal(first.pair_indices, second.pair_indices[order])
    assert not torch.equal(first.images, second.images[order])


@pytest.mark.parametrize("workers", [0, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_and_workers_change_nothing(world_size, workers):
    wanted = take(stream(batch_size=4), 12)
    ranks = [
        stream(batch_size=4 // world_size, rank=rank, world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]
    for batch in wanted:
        assert_joined([next(source) for source in ranks], batch)
    for source in ranks:
        source.close()


@pytest.mark.parametrize("order", ["exact", "blocks"])
@pytest.mark.parametrize("num_before", [0, 1, 5, 7])
def test_a_stream_goes_on_bit_for_bit_on_any_number_of_ranks_and_workers(order, num_before):
    def start(**changes):
        return stream(BlockStore(undecodable={3, 14}), order=order, num_streams=2, open_blocks=4, **changes)

    wanted = take(start(batch_size=4), num_before + 6)[num_before:]
    for world_size, workers in ((1, 2), (2, 0), (4, 3)):
        before = start(batch_size=4 // world_size, world_size=world_size, workers=3 - workers)
        take(before, num_before)
        state = json.loads(json.dumps(before.state()))
        ranks = [
            start(batch_size=4 // world_size, world_size=world_size, workers=workers, rank=rank)
            for rank in range(world_size)
        ]
        for source in ranks:
            source.restore(state)
        for batch in wanted:
            assert_joined([next(source) for source in ranks], batch)
        for source in (before, *ranks):
            source.close()


def test_a_restored_stream_remembers_what_was_skipped():
    undecodable = {3, 14}
    source = stream(MemoryStore(undecodable=undecodable))
    take(source, 7)
    after = stream(MemoryStore(undecodable=undecodable))
    after.restore(json.loads(json.dumps(source.state())))
    assert after.skipped == source.skipped == {"truncated image": (2, source.skipped["truncated image"][1])}


def test_a_stream_can_go_back():
    source = stream(workers=2)
    state = source.state()
    first = take(source, 3)
    source.restore(state)
    assert_same(take(source, 3), first)
    source.close()


def test_the_rest_of_an_epoch_comes_whole_after_a_change_of_batch_size():
    before = stream(batch_size=4)
    seen = sum(indices(take(before, 2)), [])
    after = stream(batch_size=3, world_size=1)
    after.restore(before.state())
    seen += sum(indices(take(after, 5)), [])
    assert len(set(seen)) == 8 + 15


def test_an_epoch_in_blocks_holds_every_pair_once():
    source = stream(BlockStore(24), order="blocks", num_streams=2, open_blocks=4)
    for _ in range(3):
        assert sorted(sum(indices(take(source, 6)), [])) == list(range(24))


def test_ranks_read_different_blocks():
    read = []
    for rank in range(2):
        store = BlockStore(240, block_size=10)
        source = stream(
            store, order="blocks", num_streams=4, open_blocks=8, world_size=2, rank=rank, cache_mib=0, batch_size=4
        )
        take(source, 30)
        read.append({block for kind, block in store.events if kind == "read"})
    assert len(read[0] & read[1]) <= 2  # those that streams share where one begins
    assert len(read[0] | read[1]) == 24


def test_blocks_are_fetched_once_before_they_are_read_and_released_after():
    order = BlockOrder(np.arange(0, 601, 10), 1, num_streams=2, open_blocks=8)
    fetched, released = [], []
    ahead = ReadAhead(order, SimpleNamespace(fetch=fetched.extend))
    for batch in range(300):
        epoch, positions = batch // 150, np.arange(batch % 150 * 4, batch % 150 * 4 + 4)
        used_up = ahead.move_to(epoch, positions)
        read = set((order.indices(epoch, positions) // 10).tolist())
        assert all(fetched.count(block) > released.count(block) for block in read)
        released += used_up
        assert 8 <= len(fetched) - len(released) <= 2 * (2 * 8 + 2)  # two windows of up to twice as many as asked for
    assert len(fetched) <= 2 * (60 + 2) + 2 * 8  # streams share a block where one begins; the third epoch is ahead


def test_a_stream_fetches_and_releases_blocks_of_its_data_set():
    store = BlockStore(60, block_size=3)
    source = stream(store, order="blocks", num_streams=2, open_blocks=8, workers=2)
    take(source, 15)
    deadline = time.monotonic() + 10
    while len({e for e in store.events if e[0] == "fetch"}) < 20 and time.monotonic() < deadline:
        time.sleep(0.001)
    source.close()
    assert {block for kind, block in store.events if kind == "fetch"} == set(range(20))
    assert {kind for kind, _ in store.events} == {"fetch", "read", "release"}


def test_shards_that_are_not_counted_yet_are_streamed_and_resumed():
    source = stream(UncountedStore(), order="blocks", open_blocks=32)
    wanted = take(source, 18)
    assert source.steps_per_epoch == 25 // 4 == 6
    for first in (0, 6, 12):
        assert len(set(sum(indices(wanted[first : first + 6]), []))) == 24
    source = stream(UncountedStore(), order="blocks", open_blocks=32)
    take(source, 8)
    state = json.loads(json.dumps(source.state()))
    ranks = [
        stream(UncountedStore(), order="blocks", open_blocks=32, batch_size=2, world_size=2, rank=r) for r in range(2)
    ]
    for each in ranks:
        each.restore(state)
        assert each._order.counts.tolist() == UncountedStore.sizes
    for batch in wanted[8:]:
        assert_joined([next(each) for each in ranks], batch)


def test_shards_with_fewer_pairs_than_estimated_do_not_search_for_a_batch_for_ever():
    class Overestimated(UncountedStore):
        def __len__(self):
            return 100

    source = stream(Overestimated(), order="blocks", batch_size=26)
    with pytest.raises(DataError, match="fewer than one batch of 26"):
        next(source)


def test_a_state_of_another_order_is_refused():
    state = stream(BlockStore(), order="blocks").state()
    with pytest.raises(DataError, match="another data order") as caught:
        stream(BlockStore()).restore(state)
    assert "data.order" in caught.value.remedy


def test_a_state_from_before_there_were_orders_is_exact():
    state = stream().state()
    del state["order"]
    stream().restore(state)
    with pytest.raises(DataError, match="another data order"):
        stream(BlockStore(), order="blocks").restore(state)


def test_a_state_of_an_older_version_is_not_said_to_be_of_other_data():
    state = stream().state() | {"fingerprint": "bb"}
    del state["order"]
    with pytest.raises(DataError, match="or by a version") as caught:
        stream().restore(state)
    assert "--init" in caught.value.remedy


@pytest.mark.parametrize(("key", "value"), [("seed", 2), ("fingerprint", "bb")])
def test_a_state_of_another_run_is_refused(key, value):
    source = stream()
    with pytest.raises(DataError, match=f"another data {key}"):
        source.restore({**source.state(), key: value})


def test_one_of_several_captions_is_drawn_per_epoch():
    views = Views(images=("plain",), texts=("plain", "plain"))
    source = stream(MemoryStore(8, captions=3), views=views, batch_size=8)
    seen = {}
    for batch in take(source, 20):
        assert torch.equal(batch.tokens[:, 0], batch.tokens[:, 1])
        for number, tokens in zip(batch.pair_indices.tolist(), batch.tokens[:, 0].tolist(), strict=True):
            seen.setdefault(number, set()).add(tuple(token for token in tokens if token))
    assert all(len(texts) == 3 for texts in seen.values())


def test_too_few_pairs_for_one_batch_is_an_error():
    with pytest.raises(DataError, match="has 23 pairs, fewer than one batch of 24 .12 on each of 2") as caught:
        stream(batch_size=12, world_size=2)
    assert caught.value.remedy == "--batch-size 11"
    with pytest.raises(DataError) as caught:
        stream(MemoryStore(3), world_size=2)
    assert caught.value.remedy == "prepare more pairs"
    assert stream(batch_size=23).steps_per_epoch == 1


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pairs_are_counted_and_shift_no_other(world_size, workers):
    wanted = take(stream(batch_size=4), 10)
    store = {"bad": {5}, "undecodable": {11, 17}}
    ranks = [
        stream(MemoryStore(**store), rank=rank, world_size=world_size, batch_size=4 // world_size, workers=workers)
        for rank in range(world_size)
    ]
    for batch in wanted:
        parts = [next(source) for source in ranks]
        images = torch.cat([part.images for part in parts])
        used = torch.cat([part.pair_indices for part in parts])
        for row, number in enumerate(batch.pair_indices.tolist()):
            if number in {5, 11, 17}:
                assert used[row] not in {5, 11, 17}
                assert used[row] not in batch.pair_indices
            else:
                assert used[row] == number
                assert torch.equal(images[row], batch.images[row])
    counts = {}
    for source in ranks:
        for cause, (count, first_key) in source.skipped.items():
            assert first_key in {"key005", "key011", "key017"}
            counts[cause] = counts.get(cause, 0) + count
        source.close()
    assert counts["damaged shard"] >= 1
    if world_size == 1:
        assert counts == {"damaged shard": 1, "truncated image": 2}


def test_the_pair_in_an_unreadable_ones_row_is_the_same_on_any_number_of_ranks():
    bad = {2, 5, 11}
    whole = take(stream(MemoryStore(bad=bad), batch_size=4), 10)
    halves = [stream(MemoryStore(bad=bad), batch_size=2, world_size=2, rank=rank) for rank in range(2)]
    for batch in whole:
        assert batch.pair_indices.tolist() == sum([next(half).pair_indices.tolist() for half in halves], [])


@pytest.mark.parametrize("num", [4, 8])
def test_a_stand_in_is_found_in_a_data_set_of_one_or_two_batches(num):
    source = stream(MemoryStore(num, bad=set(range(num - 1))), max_bad=1.0)
    assert next(source).pair_indices.tolist() == [num - 1] * SIZE


def test_too_many_unreadable_pairs_stop_the_stream():
    source = stream(MemoryStore(undecodable=range(0, 23, 4)), max_bad=0.1)
    with pytest.raises(DataError, match=r"more than data.max_bad = 0.1 .*truncated image: 4, first key008") as caught:
        take(source, 20)
    assert "--set data.max_bad" in caught.value.remedy


def test_not_one_unreadable_pair_is_allowed_with_max_bad_zero():
    with pytest.raises(DataError, match="damaged shard: 1, first key007"):
        take(stream(MemoryStore(bad={7}), max_bad=0.0), 6)


def test_a_wholly_unreadable_data_set_is_an_error_even_if_all_may_be_bad():
    with pytest.raises(DataError, match="64 samples in a row"):
        next(stream(MemoryStore(200, bad=range(200)), max_bad=1.0, workers=1))


class ForgetfulStore(MemoryStore):
    """A disk or network that fails for some pairs, the first time they are asked for."""

    def __init__(self, failing, **options):
        super().__init__(**options)
        self.failing = set(failing)

    def read(self, number):
        if number in self.failing:
            self.failing.remove(number)
            raise DataError("cannot read the shard", remedy="check the network", cause=UNREAD)
        return super().read(number)


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_that_the_disk_did_not_give_are_counted_but_asked_for_again(workers):
    source = stream(ForgetfulStore({5, 11}), workers=workers)
    first, second = (sum(indices(take(source, 5)), []) for _ in range(2))
    assert source.skipped["unreadable"][0] == 2
    assert not {5, 11} & set(first)
    wanted = sum(indices(take(stream(), 10)[5:]), [])
    assert second == wanted
    assert source.state()["bad"] == []
    source.close()


def test_a_state_that_remembers_unread_pairs_as_bad_lets_them_be_tried_again():
    source = stream()
    source.restore({**source.state(), "bad": [[5, "key005", UNREAD], [7, "key007", "truncated image"]]})
    assert source.skipped == {"truncated image": (1, "key007")}


def test_a_network_that_is_gone_ends_the_stream_with_another_advice():
    source = stream(ForgetfulStore(range(200), num=200), max_bad=1.0)
    with pytest.raises(DataError, match="64 samples in a row .*unreadable: 64") as caught:
        next(source)
    assert "check the disk or the network" in caught.value.remedy


def test_captions_cut_to_the_context_length_are_counted():
    assert stream(context_length=16).num_truncated_captions == 0
    source = stream(context_length=5)  # texts have 1 to 5 words and a digit, and two views
    take(source, 5)
    longer = [number for number in sum(indices(take(stream(), 5)), []) if 1 + number % 5 + 1 > 3]
    assert source.num_truncated_captions == 2 * len(longer) > 0


def test_decoded_images_are_kept_where_all_fit_and_change_nothing():
    with_cache, without_cache = MemoryStore(), MemoryStore()
    kept = take(stream(with_cache), 15)
    assert_same(kept, take(stream(without_cache, cache_mib=0), 15))
    assert with_cache.num_reads == NUM
    assert without_cache.num_reads == 60


def test_large_jpegs_are_not_kept():
    store = MemoryStore(side=40, format="JPEG")
    take(stream(store), 15)
    assert store.num_reads == 60


def test_time_spent_waiting_is_counted():
    class SlowStore(MemoryStore):
        def read(self, number):
            time.sleep(0.002)
            return super().read(number)

    source = stream(SlowStore())
    assert source.wait_seconds == 0
    next(source)
    assert source.wait_seconds >= 4 * 0.002


def test_batches_are_made_while_the_consumer_works():
    store = MemoryStore()
    source = stream(store, workers=1, cache_mib=0)
    next(source)
    deadline = time.monotonic() + 10
    while store.num_reads < 3 * SIZE and time.monotonic() < deadline:
        time.sleep(0.001)
    assert store.num_reads == 3 * SIZE  # two batches ahead, and no more
    source.close()


def test_a_failure_of_the_program_itself_is_not_swallowed():
    class BrokenStore(MemoryStore):
        def read(self, number):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(stream(BrokenStore(), workers=2))
