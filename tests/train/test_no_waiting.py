"""What would make the host wait for a GPU: a value or a shape that only the device knows."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from declip_cli.methods.registry import METHODS
from declip_cli.train.batches import DeviceBatches
from declip_cli.train.loop import take_step
from declip_cli.train.meter import Meter
from declip_cli.train.optim import build_optimizers
from tests.methods.small_methods import batch_of, build
from tests.train.small_runs import resolved, small_config

WAITS = {"nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Note every operation after which the host would have to wait, in forward, backward and update."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in WAITS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def training_of(name, *, micro_batch_size, counted=True):
    config = small_config(method={"name": name, "queue_size": 20}, train={"micro_batch_size": micro_batch_size})
    run = resolved(config)
    method = build(name, queue_start="random")
    batch = batch_of(method)
    batches = [batch.counted() if counted else batch] * 2
    return SimpleNamespace(
        run=run,
        config=run.config,
        method=method,
        accelerator=SimpleNamespace(device=torch.device("cpu"), scaler=None, autocast=nullcontext),
        batches=DeviceBatches(iter(batches), torch.device("cpu")),
        stream=SimpleNamespace(wait_seconds=0.0),
        optimizers=build_optimizers(method, run.config),
        gradient_average=SimpleNamespace(last_backward=nullcontext),
        clip_norm=1.0,
        logit_scale_bounds=(0.0, 4.6),
        average=None,
        step=0,
        samples_seen=0,
        seconds=0.0,
        startup_seconds=0.0,
        bad_steps=torch.zeros(2, dtype=torch.int64),
    )


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_asks_the_device_for_nothing(name, micro_batch_size):
    training = training_of(name, micro_batch_size=micro_batch_size)
    meter = Meter(training)
    meter.add(take_step(training, 1e-3))  # the first may: it fills states and counts the queue
    with Waits() as waits:
        meter.add(take_step(training, 1e-3))
    assert waits.found == []


def test_labels_that_nobody_has_counted_are_asked_for():
    training = training_of("declip", micro_batch_size=None, counted=False)
    take_step(training, 1e-3)
    with Waits() as waits:
        take_step(training, 1e-3)
    assert waits.found == ["nonzero"]
