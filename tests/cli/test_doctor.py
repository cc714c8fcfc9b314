"""`declip doctor` and completion, as a user meets them."""

import json
from importlib import metadata

import torch

from declip_cli import __version__
from tests.command_line import declip


def test_doctor_names_versions_devices_and_packages():
    report = json.loads(declip("doctor", "--json").stdout)
    assert report["declip"] == __version__
    assert report["devices"][0]["device"] == "cpu"
    assert report["threads"] == torch.get_num_threads()
    assert report["packages"]["torch"] == metadata.version("torch")
    assert report["optional_packages"]["pytest"] == metadata.version("pytest")
    assert not set(report["packages"]) & set(report["optional_packages"])
    assert "demo" in report["data_sets"]


def test_doctor_says_which_packages_are_missing(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "optional_packages.scipy\tmissing\n" in declip("doctor").stdout


def test_doctor_measures_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "below").mkdir(parents=True)
    (tmp_path / "cache" / "below" / "block").write_bytes(bytes(3 * 2**20))
    report = json.loads(declip("doctor", "--json").stdout)
    assert report["cache"] == {"path": str(tmp_path / "cache"), "files": 1, "mib": 3.0}
    assert report["runs"]["files"] == 0


def test_completion_knows_the_commands_and_options(monkeypatch):
    monkeypatch.setenv("_DECLIP_COMPLETE", "complete_bash")
    for typed, wanted in (("declip zero", "zeroshot"), ("declip pretrain --micro", "--micro-batch-size")):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        assert wanted in declip().stdout.split()
