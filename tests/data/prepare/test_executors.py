import sys
import time
from functools import partial

import pytest

from declip_cli.data.prepare.config import PrepareConfig
from declip_cli.data.prepare.executors import run_in_threads, run_on_ray
from declip_cli.data.prepare.pipeline import prepare
from declip_cli.errors import DataError


def double(batch, *, slow_one=-1):
    if slow_one in batch:
        time.sleep(0.05)
    return [2 * item for item in batch]


def test_results_come_in_the_order_of_the_items():
    for workers in (1, 3):
        results = run_in_threads(partial(double, slow_one=3), range(100), workers=workers)
        assert list(results) == [2 * number for number in range(100)]


def test_only_a_few_items_are_read_ahead():
    taken = []

    def items():
        for number in range(10_000):
            taken.append(number)
            yield number

    results = run_in_threads(double, items(), workers=2)
    next(results)
    results.close()
    assert len(taken) < 300


def test_a_bug_in_the_work_is_not_swallowed():
    with pytest.raises(TypeError):
        list(run_in_threads(double, [None], workers=1))


def test_without_ray_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match="needs the package ray") as caught:
        list(run_on_ray(double, [1]))
    assert caught.value.remedy == "pip install 'declip[ray]'"


def test_a_ray_cluster_of_two_workers_writes_the_same_shards(tmp_path, make_image):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    source = tmp_path / "in"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.jpg").write_bytes(make_image(number, width=90, height=70))
        (source / f"{number}.txt").write_text(f"image {number}")
    (source / "7.jpg").write_bytes(b"")
    for engine in ("threads", "ray"):
        config = PrepareConfig(
            source=str(source), out=str(tmp_path / engine), engine=engine, workers=2, image_side_px=64
        )
        *_, report = prepare(config)
        assert report.num_pairs == 39
        assert report.skipped == {"empty file": (1, "7.jpg")}
    assert (tmp_path / "ray/00000.tar").read_bytes() == (tmp_path / "threads/00000.tar").read_bytes()
    assert (tmp_path / "ray/manifest.json").read_bytes() == (tmp_path / "threads/manifest.json").read_bytes()
