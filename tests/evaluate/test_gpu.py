"""The same features and scores on a GPU."""

import copy
import dataclasses

import pytest
import torch

from declip_cli.data.catalog import open_dataset
from declip_cli.data.files_dataset import Subset
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.features import image_features
from declip_cli.evaluate.texts import text_features
from declip_cli.evaluate.zeroshot import zeroshot
from declip_cli.model.checkpoint import PretrainedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
FP32 = FeatureOptions(precision="fp32", use_cache=False)


def on_gpu(model: PretrainedModel) -> PretrainedModel:
    return dataclasses.replace(model, encoder=copy.deepcopy(model.encoder).cuda())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_those_of_the_cpu(tiny_model: PretrainedModel, precision: str):
    images = Subset(open_dataset("demo"), range(300))
    options = dataclasses.replace(FP32, precision=precision)
    here, there = (image_features(m, images, options=options) for m in (tiny_model, on_gpu(tiny_model)))
    assert there.features.device.type == "cpu"
    assert (here.features * there.features).sum(dim=1).min() > 0.999
    texts = ["a cat", "a very long text about a dog"]
    rows = [text_features(m, texts, options=options) for m in (tiny_model, on_gpu(tiny_model))]
    assert (rows[0] * rows[1]).sum(dim=1).min() > 0.999


def test_token_wise_scores_are_those_of_the_cpu(tiny_token_model: PretrainedModel):
    few = Subset(open_dataset("demo"), range(20))
    here, there = (zeroshot(m, few, options=FP32).predictions for m in (tiny_token_model, on_gpu(tiny_token_model)))
    torch.testing.assert_close(here.scores, there.scores, atol=1e-3, rtol=1e-3)
