from declip_cli.data.dataset import Skips


def test_skips_count_by_cause_and_keep_the_first_key():
    skips = Skips()
    skips.add("empty file", "a.jpg")
    skips.add("empty file", "b.jpg")
    skips.add_all({"empty file": (3, "z.jpg"), "not an image": (1, "c.txt")})
    assert skips == {"empty file": (5, "a.jpg"), "not an image": (1, "c.txt")}
    assert skips.num == 6
    assert skips.to_json()["not an image"] == {"count": 1, "first": "c.txt"}
    assert str(skips) == "empty file: 5, first a.jpg; not an image: 1, first c.txt"
