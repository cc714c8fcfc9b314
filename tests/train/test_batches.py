"""Batches on their way to the device, on a made-up GPU that notes in which order it is told what."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from declip_cli.train.batches import DeviceBatches


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class FakeBatch:
    def __init__(self, number, log):
        self.number, self.log = number, log

    def to(self, device):
        self.log.append(f"copy {self.number} on {self.log.current.name}")
        return self

    def on_device(self):
        def note(stream):
            self.log.append(f"{stream.name} reads {self.number}")

        return [SimpleNamespace(record_stream=note)]


class Log(list):
    current = None


@pytest.fixture
def log(monkeypatch):
    log = Log()
    log.current = Stream("steps", log)

    @contextmanager
    def use(stream):
        before, log.current = log.current, stream
        yield
        log.current = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: log.current)
    monkeypatch.setattr(torch.cuda, "stream", use)
    return log


def source(log):
    for number in range(9):
        log.append(f"load {number} on {log.current.name}")
        yield FakeBatch(number, log)


def test_the_next_batch_is_copied_beside_the_step_and_the_step_waits_for_its_copy(log):
    batches = DeviceBatches(source(log), SimpleNamespace(type="cuda"))
    assert next(batches).number == 0
    batches.copy_ahead()
    batches.copy_ahead()
    log.append("step on 0")
    assert next(batches).number == 1
    assert log == [
        *("load 0 on copies", "copy 0 on copies", "steps waits for copies", "steps reads 0"),
        *("load 1 on copies", "copy 1 on copies", "step on 0", "steps waits for copies", "steps reads 1"),
    ]


def test_a_cpu_takes_batches_as_they_come():
    taken = []
    batches = DeviceBatches((taken.append(number) or torch.tensor(number) for number in range(3)), torch.device("cpu"))
    batches.copy_ahead()
    assert taken == []
    assert [int(batch) for batch in batches] == [0, 1, 2]
