import numpy as np
import pytest

from declip_cli.data.seeding import sample_rng, shuffled


def test_the_same_sample_draws_the_same_again():
    assert sample_rng(3, 1, 7).random() == sample_rng(3, 1, 7).random()


def test_seed_epoch_and_number_each_change_the_draws():
    keys = [(3, 1, 7), (4, 1, 7), (3, 2, 7), (3, 1, 8), (1, 3, 7), (3, 1, 7 + (1 << 40))]
    assert len({sample_rng(*key).random() for key in keys}) == len(keys)


def test_draws_of_neighboring_samples_are_uniform_and_independent():
    draws = np.array([sample_rng(0, 0, number).random() for number in range(4000)])
    assert np.histogram(draws, 10, (0, 1))[0] == pytest.approx(np.full(10, 400), abs=90)  # 4.7 sigma
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.07


@pytest.mark.parametrize("num", [1, 2, 5, 255, 256, 257, 4251])
def test_an_epoch_holds_every_sample_once(num):
    assert sorted(shuffled(num, 0, 0)) == list(range(num))


def test_a_part_of_the_order_equals_that_part_of_the_whole():
    whole = shuffled(1000, 5, 2)
    positions = np.array([999, 0, 17, 500])
    assert shuffled(1000, 5, 2, positions=positions).tolist() == whole[positions].tolist()


def test_positions_given_stay_as_they_are():
    positions = np.arange(10)
    shuffled(100, 0, 0, positions=positions)
    assert positions.tolist() == list(range(10))


def test_epochs_and_seeds_have_different_orders():
    orders = [shuffled(100, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.sum(one == other) < 12  # 1 expected


def test_every_sample_is_equally_likely_at_every_position():
    num, num_epochs = 40, 200
    counts = np.zeros((num, num))
    for epoch in range(num_epochs):
        counts[np.arange(num), shuffled(num, 3, epoch)] += 1
    chi_square = ((counts - 5) ** 2 / 5).sum()
    assert chi_square == pytest.approx(39 * 39, abs=4 * 55)  # 39^2 degrees of freedom


def test_neighbors_in_the_data_set_are_scattered():
    order = shuffled(10_000, 1, 0)
    steps = np.abs(np.diff(order))
    assert steps.mean() == pytest.approx(10_000 / 3, rel=0.03)


def test_the_order_of_a_large_data_set_is_computed_where_it_is_asked_for():
    numbers = shuffled(400_000_000, 0, 3, positions=np.array([0, 399_999_999]))
    assert ((numbers >= 0) & (numbers < 400_000_000)).all()
    assert shuffled(400_000_000, 0, 3, positions=np.array([399_999_999]))[0] == numbers[1]


def test_the_order_is_pinned_so_that_old_runs_can_be_resumed():
    assert shuffled(10, 1, 2).tolist() == [5, 2, 3, 0, 6, 8, 1, 4, 7, 9]
