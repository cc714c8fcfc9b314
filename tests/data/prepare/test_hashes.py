import hashlib
from collections import Counter

import numpy as np

from declip_cli.data.prepare.hashes import HashCounter, hash64


def test_counts_are_those_of_a_dictionary_through_several_growths():
    rng = np.random.default_rng(0)
    values = [int(value) + 1 for value in rng.integers(0, 9000, 20_000) * 8]  # collide in their low bits
    counter, plain = HashCounter(), Counter()
    for value in values:
        assert counter.count(value) == plain[value]
        counter.add(value)
        plain[value] += 1
    assert len(counter) == len(plain)
    assert all(counter.count(value) == count for value, count in plain.items())
    assert counter.count(5) == 0


def test_the_hash_is_the_published_blake2b_and_never_0():
    digest = hashlib.blake2b(b"a red bus", digest_size=8).digest()
    assert hash64(b"a red bus") == int.from_bytes(digest, "little")
