"""Four processes: their averages are those of plain sums, and the messages go out while backward still runs."""

from contextlib import nullcontext

import pytest
import torch

from declip_cli.gradient_average import GradientAverage
from declip_cli.methods.registry import METHODS
from declip_cli.train.grad_cache import forward_backward
from declip_cli.train.launch import start_processes
from tests.benchmarks.traffic import step_traffic
from tests.four_ranks import NUM_RANKS, NUM_STEPS, NUMBERS, Uneven, run
from tests.methods.small_methods import batch_of, build

pytestmark = pytest.mark.usefixtures("quick_ranks")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, quick_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(run, (str(folder),), num_processes=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]


def plain_average(step):
    """Add up every rank's gradients one after the other, → means, None where no rank has one."""
    sums = {}
    for rank in range(NUM_RANKS):
        model = Uneven()
        for loss in model.losses(step, rank):
            loss.backward()
        for name, gradient in model.gradients().items():
            if gradient is not None:
                sums[name] = sums.get(name, 0) + gradient
    return {name: sums[name] / NUM_RANKS if name in sums else None for name, _ in Uneven().named_parameters()}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_gradients_are_the_means_over_the_ranks(ranks, size, step):
    expected = plain_average(step)
    if step < 4:  # of `late`: the others hear of it a step later, and agree anew in the next
        expected["late"] = None
    for rank in range(NUM_RANKS):
        found, _, _, are_laid_out = ranks[rank][size][step]
        assert {name for name, g in found.items() if g is None} == {n for n, g in expected.items() if g is None}
        for name, gradient in found.items():
            if gradient is not None:
                torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
                assert torch.equal(gradient, ranks[0][size][step][0][name])
        assert are_laid_out


def test_gradients_in_the_order_they_come_are_sent_while_backward_runs(ranks):
    # Linear weight and bias, convolution's weight and bias, `other_format`, `sometimes`: all but the head.
    assert all(len(found["small"][3][1]) == 6 for found in ranks)
    assert [len(found["small"][0][1]) for found in ranks] == [0] * NUM_RANKS  # not agreed on yet
    # What comes after the gradient that rank 1 lacks has to wait for it there, and there only.
    num_during = [len(found["small"][1][1]) for found in ranks]
    assert num_during[1] < 6
    assert num_during[0] == num_during[2] == num_during[3] == 6


def test_ranks_wait_for_an_agreement_in_the_first_step_only_and_when_a_parameter_joins(ranks):
    for found in ranks:
        waiting = [
            [name for name, _, is_async in [*during, *after] if not is_async] for _, during, after, _ in found["large"]
        ]
        agreed = ["all_reduce", "broadcast"]
        assert waiting == [agreed, [], [], [], agreed, []]


def test_one_process_keeps_its_gradients_to_the_bit():
    model, other = Uneven(), Uneven()
    for loss in other.losses(0, 0):
        loss.backward()
    first, second = model.losses(0, 0)
    first.backward()
    with GradientAverage(model.parameters()).last_backward():
        second.backward()
    for name, gradient in other.gradients().items():
        found = model.gradients()[name]
        assert found is gradient is None or torch.equal(found, gradient)


def test_a_gathered_tensor_has_all_ranks_rows_and_gives_each_rank_the_sum_of_its_gradients(ranks):
    rows = [torch.arange(6.0).view(3, 2).T + 10 * rank for rank in range(NUM_RANKS)]
    for rank in range(NUM_RANKS):
        everything, gradient, numbers = ranks[rank]["gathered"]
        assert torch.equal(everything, torch.cat(rows))
        assert torch.equal(gradient, 2 * rows[rank] * (1 + 2 + 3 + 4))
        assert numbers.tolist() == [0, 1, 2, 3]


def test_the_maximum_over_ranks_comes_a_call_late_and_at_once_after_a_restart(ranks):
    largest = [max(numbers) for numbers in zip(*NUMBERS, strict=True)]
    expected = [[number + 10 * call for number in largest] for call in (0, 0, 1, 3)]
    assert [found["lagged"] for found in ranks] == [expected] * NUM_RANKS


def test_ranks_decide_alike_a_step_after_one_of_them_asked(ranks):
    assert [found["decisions"] for found in ranks] == [ranks[0]["decisions"]] * NUM_RANKS
    stops, saves, shares = zip(*ranks[0]["decisions"], strict=True)
    assert stops == (False, False, False, False, False, True, True)
    assert saves == (False, False, True, False, False, False, True)  # asked for after step 2; every 7 steps
    assert shares == pytest.approx((0.1, 0.1, 0.2, 0.4, 0.4, 0.5, 0.6))  # after a saving, of the same step


@pytest.mark.parametrize("kind", ["traffic", "traffic of micro-batches"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_exchanges_what_the_formula_says(ranks, name, kind):
    method = build(name, queue_start="random")
    forward_backward(method, batch_of(method, 4), micro_batch_size=0, autocast=nullcontext)
    norms = tuple(module for module in method.modules() if isinstance(module, torch.nn.BatchNorm1d))
    expected = step_traffic(method, 2, NUM_RANKS, norms, token_dim=6)
    assert [found[kind][name] for found in ranks] == [expected] * NUM_RANKS
