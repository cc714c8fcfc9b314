"""Prompts and classifiers."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from declip_cli.data.tokenizer import Tokenizer
from declip_cli.errors import EvaluateError
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.prompts import (
    build_classifier,
    load_templates,
    make_prompts,
)
from declip_cli.evaluate.token_wise import build_token_classifier
from declip_cli.model.checkpoint import PretrainedModel

FP32 = FeatureOptions(precision="fp32", batch_size=2, use_cache=False)
NAMES = ["cat", "very small dog", "house"]
TEMPLATES = ["a {}.", "{}", "one {} of many"]


@pytest.mark.parametrize(("choice", "count"), [("1", 1), ("6", 6), ("8", 8), ("80", 80)])
def test_ensembles_have_as_many_templates_as_their_name_says(choice: str, count: int):
    templates = load_templates(choice)
    assert len(set(templates)) == count
    assert all("{}" in template for template in templates)


def test_the_80_are_those_of_openai():
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    assert list(load_templates("80")) == [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES]


def test_templates_of_other_projects_are_understood(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_text("a {c}.\n\nthe {0}\n  my {}  \n")
    assert make_prompts(["cat"], str(path)).by_class == (("a cat.", "the cat", "my cat"),)


def test_texts_can_be_given_class_by_class(tmp_path: Path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"cat": ["it purrs", "it meows"], "dog": ["it barks"]}))
    prompts = make_prompts(["dog", "cat"], str(path))
    assert prompts.flat() == ["it barks", "it purrs", "it meows"]
    assert prompts.class_ids().tolist() == [0, 1, 1]
    assert prompts.num_templates == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a photo", "has no place for the class name"),
        ("a.txt", "\n", "holds no templates"),
        ("a.json", '{"cat": ["x"]}', "has prompts for 1 of 2 classes, none for 'dog'"),
        ("a.json", "[", "cannot read prompts"),
    ],
)
def test_unusable_prompts_are_refused(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluateError, match=message):
        make_prompts(["cat", "dog"], str(tmp_path / name))


def test_an_unknown_ensemble_names_those_there_are():
    with pytest.raises(EvaluateError, match="'7' is neither") as error:
        load_templates("7")
    assert "1, 6, 8, 80" in error.value.remedy


def test_classifier_equals_the_loop_of_the_protocol(tiny_model: PretrainedModel):
    classes = build_classifier(tiny_model, make_prompts(NAMES, TEMPLATES), options=FP32)
    assert classes.shape == (3, 10)
    tokenizer = Tokenizer(context_length=12)
    for name, row in zip(NAMES, classes, strict=True):
        total = torch.zeros(10)
        for template in TEMPLATES:
            with torch.no_grad():
                total += F.normalize(
                    tiny_model.encoder.encode_text(tokenizer.encode([template.replace("{}", name)]))[0],
                    dim=0,
                )
        mean = total / len(TEMPLATES)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-5)


def test_classifier_is_kept_for_the_same_prompts_only(tiny_model: PretrainedModel, tmp_path: Path):
    cached = FeatureOptions(precision="fp32")
    first = build_classifier(tiny_model, make_prompts(NAMES, TEMPLATES), options=cached)
    (vectors,) = tmp_path.rglob("*.f32")
    size = vectors.stat().st_size
    assert torch.equal(build_classifier(tiny_model, make_prompts(NAMES, TEMPLATES), options=cached), first)
    assert torch.equal(
        build_classifier(tiny_model, make_prompts(NAMES[::-1], TEMPLATES), options=cached), first.flip(0)
    )
    assert vectors.stat().st_size == size
    build_classifier(tiny_model, make_prompts(NAMES, TEMPLATES[:1]), options=cached)
    assert vectors.stat().st_size == 2 * size


def test_token_wise_classifier_and_score_equal_the_loop_of_the_original(tiny_token_model: PretrainedModel):
    prompts = make_prompts(NAMES, TEMPLATES)
    classes = build_token_classifier(tiny_token_model, prompts, options=FP32)
    assert classes.tokens.shape == (3, classes.is_padding.shape[1], 6)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        patches = tiny_token_model.encoder.encode_image_tokens(images)  # (4, 4, 6)
    scores = classes.score(patches, chunk_classes=2)
    assert scores.shape == (4, 3)
    tokenizer = Tokenizer(context_length=12)
    for number, texts in enumerate(prompts.by_class):
        by_position: dict[int, list[torch.Tensor]] = {}
        for text in texts:
            with torch.no_grad():
                tokens, mask = tiny_token_model.encoder.encode_text_tokens(tokenizer.encode([text]))
            for place in range(12):
                if mask[0, place]:
                    by_position.setdefault(place, []).append(F.normalize(tokens[0, place], dim=0))
        means = torch.stack([torch.stack(found).mean(dim=0) for found in by_position.values()])
        means = means / means.pow(2).sum().sqrt()
        for image in range(4):
            per_patch = [max(float(F.normalize(p, dim=0) @ m) for m in means) for p in patches[image]]
            assert float(scores[image, number]) == pytest.approx(sum(per_patch) / 4, abs=1e-5)
