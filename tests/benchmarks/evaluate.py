"""Evaluation against its peers: python tests/benchmarks/evaluate.py [zeroshot retrieval search probe]."""

import argparse
import importlib.metadata
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import open_clip
import torch
from evaluate_probe import probe
from evaluate_retrieval import retrieval, search
from lines import compare, report

from declip_cli.config import ModelConfig
from declip_cli.data.benchmarks.known import asset_lists
from declip_cli.evaluate.encoding import FeatureOptions
from declip_cli.evaluate.prompts import build_classifier, load_templates, make_prompts
from declip_cli.interop.read import load_model
from declip_cli.model.architectures import find_architecture
from declip_cli.model.checkpoint import save_model
from declip_cli.model.clip import DualEncoder
from declip_cli.model.precision import autocast

PARTS = ("zeroshot", "retrieval", "search", "probe")


def zeroshot(*, num_classes: int, runs: int, arch: str) -> None:
    """Time building the classifier of ImageNet's classes × 80 prompts, and compare its vectors with the peer's."""
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig(arch=arch)
        torch.manual_seed(0)
        save_model(DualEncoder(find_architecture(config)), Path(folder) / "model", config=config, method="clip")
        model = load_model(Path(folder))
        name = f"local-dir:{folder}/model"
        peer = open_clip.create_model(name).eval()
        tokenizer = open_clip.get_tokenizer(name)
    every = asset_lists("class_names.json")["imagenet"]
    names = every[:: len(every) // num_classes][:num_classes]
    templates = load_templates("80")
    fills = [template.format for template in templates]
    prompts = make_prompts(names, templates)
    peer_name = f"open_clip {importlib.metadata.version('open_clip_torch')} build_zero_shot_classifier"

    def ours(precision: str) -> torch.Tensor:
        return build_classifier(model, prompts, options=FeatureOptions(precision=precision, use_cache=False))

    def theirs(precision: str) -> torch.Tensor:
        with torch.no_grad(), autocast(precision, torch.device("cpu")):
            return open_clip.build_zero_shot_classifier(peer, tokenizer, names, fills).T.float()

    for our_precision, peer_precision in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")):
        compare(
            f"zero-shot classifier {arch} {num_classes}x80, a prompt, {our_precision} against {peer_precision}",
            partial(ours, our_precision),
            partial(theirs, peer_precision),
            peer_name=peer_name,
            unit="ms",
            runs=runs,
            amount=num_classes * 80,
            clock=time.process_time,
        )
    exact = theirs("fp32")
    for precision in ("fp32", "bf16"):
        cosine = float((ours(precision) * exact).sum(dim=1).min())
        report(
            f"zero-shot classifier {arch} {precision}, smallest cosine to the peer's",
            cosine,
            1.0,
            peer_name=peer_name,
            unit="cosine",
            runs=1,
            ratio=cosine,
        )


def main() -> None:
    """Run the parts that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="of " + ", ".join(PARTS))
    parser.add_argument("--classes", type=int, default=4, help="ImageNet classes in the classifier")
    parser.add_argument("--arch", default="vit-b32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-coco", action="store_true", help="leave out the peer's minute at the size of COCO")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="vectors that are searched, 2 KiB each")
    parser.add_argument("--index", default="", help="also search through this index of faiss")
    parser.add_argument("--samples", type=int, default=50_000, help="training samples of the probe")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--probe-classes", type=int, default=10)
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("DECLIP_CACHE", tempfile.gettempdir())
    if "zeroshot" in parts:
        zeroshot(num_classes=arguments.classes, runs=arguments.runs, arch=arguments.arch)
    if "retrieval" in parts:
        retrieval(runs=arguments.runs, with_coco=not arguments.no_coco)
    if "search" in parts:
        search(runs=arguments.runs, num_vectors=arguments.vectors, spec=arguments.index)
    if "probe" in parts:
        probe(runs=arguments.runs, num=arguments.samples, dim=arguments.dim, num_classes=arguments.probe_classes)


if __name__ == "__main__":
    main()
