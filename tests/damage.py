"""Bytes as a bad disk, a broken download or an editor leaves them."""


def damaged(data, rng):
    """Flip, cut, blank, insert, delete or replace some bytes; now and then nothing is changed by it."""
    if not data:
        return data
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 1, 8, 100)))
    how = rng.choice(("flip", "cut", "zero", "insert", "delete", "random"))
    if how == "cut":
        return data[:start]
    middle = {
        "flip": bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 : end],
        "zero": bytes(end - start),
        "insert": rng.randbytes(end - start) + data[start:end],
        "delete": b"",
        "random": rng.randbytes(end - start),
    }
    return data[:start] + middle[how] + data[end:]
