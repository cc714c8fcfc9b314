import gzip
import json
import tomllib

import pytest
from open_clip.zero_shot_metadata import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
)

from declip_cli import assets
from declip_cli.assets import asset_path
from declip_cli.errors import DeclipError

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "eurosat": 10, "mnist": 10, "sst2": 2, "pcam": 2}
NUM_CLASSES |= {"pets": 37, "flowers102": 102, "food101": 101, "dtd": 47, "resisc45": 45, "gtsrb": 43}
NUM_CLASSES |= {"country211": 211, "aircraft": 100, "caltech101": 102, "imagenet": 1000}
# The sets whose class names are read from the data set itself or follow from ImageNet's.
WITHOUT_NAMES = {"sun397", "cars", "imagenetv2", "imagenet-a", "imagenet-r", "imagenet-sketch", "objectnet"}


def read_json(name):
    return json.loads(asset_path(name).read_text("utf-8"))


def prompts(number):
    return asset_path(f"prompts/{number}.txt").read_text("utf-8").splitlines()


@pytest.mark.parametrize("number", [1, 6, 8, 80])
def test_prompt_files_have_as_many_prompts_as_their_names_say(number):
    assert len(prompts(number)) == len(set(prompts(number))) == number
    assert all(prompt.count("{}") == 1 for prompt in prompts(number))


def test_the_80_prompts_are_openais():
    assert prompts(80) == [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    assert prompts(8)[1:] == [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]
    assert prompts(1) == ["a photo of a {}."]


def test_every_evaluation_set_has_classes_and_templates():
    names, templates = read_json("class_names.json"), read_json("templates.json")
    assert {key: len(value) for key, value in names.items()} == NUM_CLASSES
    assert set(templates) == set(NUM_CLASSES) | WITHOUT_NAMES
    for key, value in templates.items():
        assert value, key
        assert all(template.count("{}") == 1 for template in value)
    for key, value in names.items():
        assert all(name == name.strip() and name for name in value), key


def test_the_imagenet_classes_are_openais_and_the_subsets_lie_in_them():
    assert tuple(read_json("class_names.json")["imagenet"]) == tuple(IMAGENET_CLASSNAMES)
    identifiers = asset_path("imagenet_wordnet_ids.txt").read_text("utf-8").split()
    assert identifiers == sorted(set(identifiers))
    assert len(identifiers) == 1000
    for subset in read_json("class_subsets.json").values():
        assert subset == sorted(set(subset))
        assert len(subset) == 200
        assert max(subset) < 1000


def test_known_classes_stand_at_their_labels():
    names, identifiers = read_json("class_names.json"), asset_path("imagenet_wordnet_ids.txt").read_text().split()
    assert (names["imagenet"][1], identifiers[1]) == ("goldfish", "n01443537")
    assert 1 in read_json("class_subsets.json")["imagenet-r"]
    assert (names["caltech101"][0], names["caltech101"][5]) == ("background", "accordion")
    assert (names["cifar100"][0], names["cifar100"][99]) == ("apple", "worm")
    assert (names["pets"][0], names["pets"][36]) == ("Abyssinian", "Yorkshire Terrier")


def test_the_vocabulary_has_the_merges_that_clip_uses():
    lines = gzip.decompress(asset_path("vocabulary/merges.txt.gz").read_bytes()).decode("utf-8").splitlines()
    assert len(lines) == 1 + 49152 - 256 - 2  # as in OpenAI's own slice of its file
    assert lines[1] == "i n"


def test_the_notice_names_every_asset_of_others_and_its_license():
    root = asset_path("prompts").parent
    notice = (root.parent / "NOTICE").read_text("utf-8")
    named = {"recipes", "catalog.toml", "serve"}  # ours
    for path in root.iterdir():
        assert f"assets/{path.name}" in notice or path.name in named
    for license in (root / "licenses").iterdir():
        assert license.name in notice
        assert "opyright" in license.read_text("utf-8")
    for license in ("openai-clip-MIT.txt", "open_clip-MIT.txt", "clip_benchmark-MIT.txt", "WordNet-3.0.txt"):
        assert (root / "licenses" / license).is_file()


def test_assets_other_than_the_demo_stay_small():
    root = asset_path("prompts").parent
    files = [path for path in root.rglob("*") if path.is_file() and root / "demo" not in path.parents]
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_the_wheel_carries_all_assets():
    project = tomllib.loads((asset_path("prompts").parents[1] / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"assets": "declip_cli/_assets"}


def test_a_missing_asset_is_a_broken_installation(monkeypatch, tmp_path):
    with pytest.raises(DeclipError, match="'no/such.txt' is missing") as caught:
        asset_path("no/such.txt")
    assert "install declip again" in caught.value.remedy
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "declip_cli")
    (tmp_path / "declip_cli" / "_assets").mkdir(parents=True)
    (tmp_path / "declip_cli" / "_assets" / "a.txt").write_text("from the wheel")
    assert asset_path("a.txt").read_text() == "from the wheel"
