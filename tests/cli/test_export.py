"""`declip export` as a user types it, and `declip_cli.load` in a notebook."""

import json
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import declip_cli
from declip_cli.__main__ import app
from tests.interop.small_models import image_file


def export(*words: str | Path):
    return CliRunner().invoke(app, ["export", *(str(word) for word in words)])


def test_one_json_object_says_where_the_export_is_and_how_far_it_is_from_the_model(tiny_run: Path, tmp_path: Path):
    result = export(tiny_run, "--to", "openclip", "--out", tmp_path / "out", "--license", "mit", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["out"], report["to"]) == (str(tmp_path / "out"), "openclip")
    assert 0 < report["max_abs_difference"] <= 1e-5
    assert report["num_compared"] >= 48
    assert report["seconds"] > 0
    assert (tmp_path / "out" / "README.md").read_text().startswith('---\nlicense: "mit"\n')


def test_what_cannot_be_exported_is_an_error_with_a_way_out(tiny_run: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    result = export(tiny_run, "--to", "onnx", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {tmp_path / 'out'} already exists\n  fix: choose another --out\n"
    result = export(tmp_path / "nowhere", "--to", "onnx", "--out", tmp_path / "new")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "fix: MODEL takes a run folder" in result.stderr


@pytest.mark.parametrize("words", [["--to", "tensorflow", "--out", "x"], ["--to", "onnx"], ["--out", "x"]])
def test_wrong_usage_exits_with_2(tiny_run: Path, words: list[str]):
    assert export(tiny_run, *words).exit_code == 2


def test_a_notebook_gets_model_preprocessing_and_tokenizer(tiny_run: Path, tmp_path: Path):
    (tmp_path / "picture.jpg").write_bytes(image_file())
    image = Image.open(tmp_path / "picture.jpg")
    peer, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_run / 'model'}")
    texts = ["a cat", "a dog"]
    with torch.no_grad():
        expected = peer.eval().encode_image(transform(image)[None])
        expected_texts = peer.encode_text(open_clip.get_tokenizer(f"local-dir:{tiny_run / 'model'}")(texts))
        model, preprocess, tokenizer = declip_cli.load(tiny_run)
        found = model.encode_image(preprocess(image)[None])
        found_texts = model.encode_text(tokenizer(texts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found_texts, expected_texts, rtol=0, atol=1e-5)
    assert not model.training


def test_what_a_notebooks_checkpoint_does_not_say_is_a_warning_or_said(tmp_path: Path):
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 9, "width": 64, "heads": 1, "layers": 1}
    torch.save(open_clip.CLIP(embed_dim=10, vision_cfg=vision, text_cfg=text).state_dict(), tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="does not say") as caught:
        declip_cli.load(tmp_path / "x.pt")
    keys = ["activation=gelu", "mean=0.5", "std=0.5", "interpolation=bicubic", "heads=1", "text_heads=1"]
    assert {str(warning.message).rpartition("--assume ")[2].partition("=")[0] for warning in caught} <= {
        key.partition("=")[0] for key in keys
    }
    model, *_ = declip_cli.load(tmp_path / "x.pt", assume=keys)
    assert model.pixel_mean.tolist() == [0.5, 0.5, 0.5]
    assert not model.architecture.text.quick_gelu


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, declip_cli; assert declip_cli.load; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/interop.md"])
def test_the_python_of_the_documentation_runs(page: str, tiny_run: Path, tmp_path: Path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "declip_cli.load" in block]
    (tmp_path / "a.jpg").write_bytes(image_file())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "declip-vit-b32").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([")
