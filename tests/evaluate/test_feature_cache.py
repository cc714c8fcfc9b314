"""What is kept on disk and how it is found again."""

from pathlib import Path

import pytest
import torch

from declip_cli.evaluate.feature_cache import (
    cache_folder,
    cached_tensor,
    content_key,
    load_features,
    store_features,
    to_bytes,
)


def test_keys_feel_order_and_borders():
    keys = [content_key(parts) for parts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""])]
    assert len(set(keys)) == 4
    assert content_key(["ab", b"c"]) == keys[0]


def test_tensors_and_notes_come_back():
    features = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    store_features("ab12", {"features": features}, {"causes": "{}"})
    found = load_features("ab12")
    assert found is not None
    assert torch.equal(found[0]["features"], features)
    assert found[1] == {"causes": "{}"}
    assert load_features("ab13") is None
    assert cached_tensor("ab13") is None


def test_a_disk_that_cannot_be_written_only_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "file"))
    store_features("ab12", {"features": torch.ones(2)}, {})
    assert load_features("ab12") is None


def test_the_cache_lies_where_the_variable_says_else_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "features"
    monkeypatch.delenv("DECLIP_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "declip" / "features"


def test_bytes_are_those_of_the_values():
    assert to_bytes(torch.tensor([1.0, 2.0], dtype=torch.float64)) == to_bytes(torch.tensor([1.0, 2.0]))
    assert to_bytes(torch.tensor([1.0])) != to_bytes(torch.tensor([2.0]))
