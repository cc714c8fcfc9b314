"""`declip inspect` as a user types it."""

import argparse
import json

import torch
from typer.testing import CliRunner

from declip_cli.__main__ import app
from declip_cli.config import ModelConfig
from declip_cli.model import clip
from declip_cli.model.architectures import find_architecture
from declip_cli.model.checkpoint import save_model
from tests.interop import peers


def inspect(*words):
    return CliRunner().invoke(app, ["inspect", *(str(word) for word in words)])


def report_of(*words):
    result = inspect(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def write_run(path):
    config = ModelConfig(arch="vit-tiny32")
    save_model(clip.DualEncoder(find_architecture(config)), path / "model", config=config, method="declip")
    settings = {
        "data": {"path": ["demo"], "split": None},
        "method": {"name": "declip", "faithful": False, "weights": {"clip": 1.0}},
        "optim": {"optimizer": "adamw", "learning_rate_peak": 1e-3, "weight_decay": 0.1},
        "train": {"samples": 800, "batch_size": 8, "precision": "fp32", "init": None, "seed": 0},
    }
    run = {"num_pairs": 80, "total_steps": 100, "global_batch": 8}
    peers.write_json(path / "config.json", {"config": settings, "run": run})
    scores = {"top1": 0.5, "metric": "top1", "image_to_text": {"r": 0.1}}
    evaluations = {50: {"demo": {"top1": 0.25}}, 60: {"demo": scores}, 90: {}}
    lines = [{"step": n, "samples_seen": 8 * n, "evaluations": found} for n, found in evaluations.items()]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 91, "eval')
    return path


def test_a_run_is_described_by_its_files_alone(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run")
    monkeypatch.setattr(clip.DualEncoder, "__init__", None)  # the model is not built
    report, _ = report_of(path)
    assert (report["family"], report["arch"], report["method"]) == ("declip", "vit-tiny32", "declip")
    assert (report["image_side_px"], report["context_length"], report["embed_dim"]) == (32, 24, 128)
    assert report["preprocessing"]["interpolation"] == "bilinear"
    assert report["training"]["data.path"] == ["demo"]
    assert (report["training"]["total_steps"], report["training"]["steps"]) == (100, 90)
    assert report["scores"] == {"step": 60, "demo": {"top1": 0.5, "image_to_text": {"r": 0.1}}}


def test_the_numbers_of_a_model_are_counted(tmp_path):
    path = write_run(tmp_path / "run")
    encoder = clip.DualEncoder(find_architecture(ModelConfig(arch="vit-tiny32")))
    assert report_of(path)[0]["num_parameters"] == sum(p.numel() for p in encoder.parameters())


def test_a_foreign_checkpoint_is_described_with_what_had_to_be_assumed(tmp_path, monkeypatch):
    peer = peers.open_clip_model(peers.open_clip_config())
    args = argparse.Namespace(model="ViT", lr=0.001, data=["a", "b"], callback=None)
    torch.save({"epoch": 3, "state_dict": peer.state_dict(), "args": args, "nothing": float("nan")}, tmp_path / "x.pt")
    monkeypatch.setattr(clip.DualEncoder, "__init__", None)
    report, notes = report_of(tmp_path / "x.pt")
    assert (report["family"], report["container"], report["method"]) == ("open_clip", "zip", "clip")
    assert report["training"] == {
        "epoch": 3,
        "args": {"model": "ViT", "lr": 0.001, "data": ["a", "b"]},
        "nothing": "nan",
    }
    assert len(report["assumed"]) == 4
    assert notes.count("note:") == 4
    told, notes = report_of(tmp_path / "x.pt", "--assume", "activation=quick_gelu", "--assume", "heads=3")
    assert (told["architecture"]["vision"]["num_heads"], told["architecture"]["text"]["quick_gelu"]) == (3, True)
    assert len(told["assumed"]) == 2


def test_a_word_that_cannot_be_assumed_is_wrong_usage(tmp_path):
    for word, code in (("colour=red", 2), ("heads=none", 1), ("mean=1,2", 1)):
        result = inspect(tmp_path, "--assume", word)
        assert result.exit_code == code
        assert "--assume" in result.stderr


def test_the_plain_form_is_a_value_a_line(tmp_path):
    result = inspect(write_run(tmp_path / "run"))
    assert "family\tdeclip\n" in result.stdout
    assert "preprocessing.resize_px\t32\n" in result.stdout


def test_nothing_there_is_an_error(tmp_path):
    result = inspect(tmp_path / "nothing.pt")
    assert result.exit_code == 1
    assert "error: no model at" in result.stderr


def test_every_command_that_takes_a_model_takes_what_its_checkpoint_does_not_say(tmp_path):
    peer = peers.open_clip_model(peers.open_clip_config())
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "x.pt")
    words = ["zeroshot", "demo", "--model", str(tmp_path / "x.pt"), "--templates", "1", "--no-cache", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("note: ") >= 4
    told = ["activation=gelu", "heads=3", "mean=0.5", "std=0.5", "interpolation=bicubic"]
    result = CliRunner().invoke(app, [*words, *(word for one in told for word in ("--assume", one))])
    assert result.exit_code == 0, result.stderr
    assert "does not say" not in result.stderr
    for command in ("linear-probe", "retrieve", "pretrain", "export"):
        assert "--assume" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
