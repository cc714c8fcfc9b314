"""torch.compile on both towers: traced as for any backend, run by the plainest one."""

import pytest
import torch

from declip_cli.methods import length_groups
from tests.train.small_runs import run, small_config


@pytest.fixture(autouse=True)
def _plain_backend(monkeypatch):
    monkeypatch.setattr(length_groups, "_CALL_TOKENS", {"cpu": 0})  # the text tower sees groups of several lengths
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_in_place(self, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Between them these read everything a tower gives: features, patches, token states, one view and several.
@pytest.mark.parametrize("method", ["clip", "slip", "defilip"])
def test_compiled_towers_give_the_same_losses(method, tmp_path):
    losses = []
    for is_compiled in (False, True):
        train = {"steps": 2, "batch_size": 8, "compile": is_compiled, "ema_decay": 0.5 * (method == "clip")}
        config = small_config(method={"name": method}, train=train, optim={"warmup_steps": 0})
        reports = run(config, tmp_path / f"{is_compiled}")
        losses += [[report.losses["total"] for report in reports if report.losses]]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
