import tracemalloc

from declip_cli.data.prepare.config import CleanConfig, PrepareConfig
from declip_cli.data.prepare.deduplicate import Deduplicator
from declip_cli.data.prepare.find_source import open_source
from declip_cli.data.prepare.hashes import HashCounter, PhashIndex, hash64
from declip_cli.data.prepare.process import Pair

MIB = 1 << 20


def test_a_table_is_read_in_constant_memory(tmp_path):
    table = tmp_path / "t.csv"
    with table.open("w") as file:
        file.write("image,caption\n")
        file.writelines(f"{n:09d}.jpg,a caption of some length about image number {n}\n" for n in range(6_000))
    tracemalloc.start()
    source = open_source(PrepareConfig(source=str(table), out=str(tmp_path / "out")))
    num = sum(1 for _ in source.records)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num == 6_000
    assert peak < 1 * MIB


def test_a_pair_that_was_seen_takes_a_few_bytes(tmp_path):
    seen = Deduplicator(CleanConfig(duplicates="exact", max_caption_repeats=5), PhashIndex())
    tracemalloc.start()
    for number in range(3_000):
        key = f"a/rather/long/key/of/picture/{number}.jpg"
        seen.check(Pair(key, (f"caption {number}",), b"", (1, 1), (1, 1), image_hash=hash64(key.encode())))
        if number % 1000 == 0:
            seen.new_bytes()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 3_000 * 3 * 36 + 0.2 * MIB


def test_the_hash_table_keeps_its_promise_on_memory():
    tracemalloc.start()
    counter = HashCounter()
    for number in range(1, 8_000):
        counter.add(number * 0x9E3779B97F4A7C15 % 2**64)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 8_000 * 36
