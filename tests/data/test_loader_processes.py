import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from declip_cli.data import loader_processes
from declip_cli.data.stream import TrainStream
from declip_cli.errors import DataError
from tests.data.noise_pairs import CONFIG, Noise, Trap


def take(source, num):
    return list(itertools.islice(source, num))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_processes_change_nothing_and_are_told_of_when_they_die():
    with_threads = TrainStream(Noise(), dataclasses.replace(CONFIG, loader="threads"))
    source = TrainStream(Noise(), CONFIG)
    workers = source._loader._context.started
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            wait_until(lambda pid=worker.pid, number=number: ignores(pid, number))
            os.kill(worker.pid, number)
    wanted, found = take(with_threads, 7), take(source, 7)
    source.restore(source.state())
    wanted, found = wanted + take(with_threads, 2), found + take(source, 2)
    for one, other in zip(wanted, found, strict=True):
        for field in dataclasses.fields(one):
            values = [getattr(batch, field.name) for batch in (one, other)]
            assert values == [None, None] or torch.equal(*values), field.name
    assert source.skipped == with_threads.skipped == {"damaged shard": (2, source.skipped["damaged shard"][1])}
    assert source.num_truncated_captions > 0
    for batch in found:  # the captions are "dog" as often as the number's remainder and once more
        captions = (batch.pair_indices % 9)[:, None]
        assert torch.equal(batch.caption_ids == batch.caption_ids.T, captions == captions.T)
    workers[1].kill()
    with pytest.raises(DataError, match=r"loader process declip-loader-1 \(pid \d+\) has ended with exit code -9") as e:
        take(source, 10)
    assert "data.loader=threads" in e.value.remedy
    source.close()
    with_threads.close()
    assert not any(is_running(worker.pid) for worker in workers)


def ignores(pid, number):
    with open(f"/proc/{pid}/status") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("SigIgn"))
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("kind", "error", "sentence"),
    [
        ("unreadable", DataError, "the shards are gone"),
        ("broken", ZeroDivisionError, "by zero"),
    ],
)
def test_what_goes_wrong_in_a_process_is_told_here(kind, error, sentence):
    source = TrainStream(Trap(kind), dataclasses.replace(CONFIG, workers=1))
    with pytest.raises(error, match=sentence) as caught:
        next(source)
    assert "noise_pairs.py" in str(caught.value.__cause__)  # where it went wrong
    source.close()


def test_processes_end_with_the_one_that_started_them():
    code = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "if __name__ == '__main__':\n"
        "    from tests.data.noise_pairs import *\n"
        "    loader = ProcessLoader(Noise(), CONFIG, num_buffers=1)\n"
        "    loader.finish(loader.begin([Task(0, 0, [0, 1], [5, 6])]))\n"
        "    sys.stdout.write(str(loader._context.started[0].pid))\n"
        "    sys.stdout.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_until(lambda: not is_running(int(done.stdout)))


class Event:
    """A GPU's mark in its queue, here reached when it is waited for."""

    waited = []

    def record(self):
        self.number = len(Event.waited)

    def synchronize(self):
        Event.waited.append(self)


def test_page_locked_images_are_overwritten_only_when_they_are_copied(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(loader_processes, "_pin", lambda memory: None)
    with_threads = TrainStream(Noise(), dataclasses.replace(CONFIG, loader="threads"))
    source = TrainStream(Noise(), dataclasses.replace(CONFIG, workers=1, pin_memory=True, compare_captions=False))
    places = set()
    for _ in range(8):
        batch, wanted = next(source), next(with_threads)
        places.add(batch.images.data_ptr())
        time.sleep(0.02)  # time enough to overwrite it
        assert torch.equal(batch.images, wanted.images)
        assert batch.caption_ids.shape == (CONFIG.batch_size, 0)
    assert 3 <= len(places) < 8
    assert Event.waited
    source.close()
    with_threads.close()
