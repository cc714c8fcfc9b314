"""What memory a run is said to take, and how large its micro-batches may be."""

import pytest

from declip_cli.train.estimate import MemoryEstimate

MIB = 2**20


def an_estimate(**changes):
    sizes = {"weights": 100 * MIB, "logits": 50 * MIB, "cast_weights": 10 * MIB, "per_pair": 2 * MIB}
    sizes |= {"embedded_per_pair": MIB, "batch_size": 64, "micro_batch_size": 16}
    return MemoryEstimate(**sizes | changes)


def test_a_run_in_micro_batches_keeps_one_of_them_and_the_embeddings_of_all():
    expected = {"weights": 100.0, "activations": 10.0 + 2 * 16, "logits": 50.0, "embeddings": 64.0, "total": 256.0}
    assert an_estimate().to_mebibytes() == expected


def test_a_whole_batch_caches_no_embeddings():
    assert an_estimate(micro_batch_size=64).to_mebibytes()["embeddings"] == 0


@pytest.mark.parametrize(
    ("free_mib", "size"),
    [
        (320, 64),  # 160 and all 64 pairs at 2 each are 288, nine tenths of it
        (319, 31),  # without room for all, 64 are cached, and (287.1 - 160 - 64) / 2 are left
        (260, 5),
        (100, 0),
    ],
)
def test_the_largest_micro_batch_fills_nine_tenths_of_what_is_free(free_mib, size):
    assert an_estimate().largest_micro_batch(free_mib * MIB) == size
