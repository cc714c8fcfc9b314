"""Which number format is used where."""

import pytest
import torch

from declip_cli.model import precision
from declip_cli.model.precision import autocast, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("is_native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bfloat16_only_where_it_is_native(is_native: bool, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "has_native_bf16", lambda _: is_native)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_products_are_computed_in_the_chosen_format():
    with autocast("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_other_devices_stay_in_fp32():
    assert resolve_precision("auto", torch.device("mps")) == "fp32"
