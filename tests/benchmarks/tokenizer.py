"""Texts a second of one thread's CPU time, against OpenCLIP: python tests/benchmarks/tokenizer.py."""

import argparse
import importlib.metadata
import itertools
import json
import random
import string
import time

import torch
from lines import compare
from open_clip.tokenizer import SimpleTokenizer

from declip_cli.assets import asset_path
from declip_cli.data.catalog import open_dataset
from declip_cli.data.tokenizer import Tokenizer

SCENES = (
    "on a wooden table",
    "in the early morning light",
    "near the old harbour",
    "at the edge of the forest",
)
SCENES += (
    "with a family of four in the background",
    "while it was raining",
    "(2009)",
    "during our trip to {}",
)
SCENES += (
    "IMG_2041",
    "taken with my new camera",
    "and friends",
    "in black & white",
    "at 7:45 pm",
    "#sunset @ {}",
)
RARE_SCENES = (
    "— it’s 20°C in {}!",
    "😀 👍🏽",
    "&quot;{}&quot;",
    "au café à {}",
    "“in bloom”, 日本の桜",
    "part ½ of {}…",
)


def read_captions() -> list[str]:
    """Read the captions of the demo corpus, each once."""
    demo = [open_dataset("demo", split) for split in ("train", "test")]
    return list(dict.fromkeys(text for part in demo for n in range(len(part)) for text in part.captions(n)))


def mix_captions(num: int, seed: int = 0) -> list[str]:
    """Mix prompts, captions and pairs of captions in scenes; about a tenth has accents, emoji or entities."""
    rng = random.Random(seed)
    captions, names = read_captions(), json.loads(asset_path("class_names.json").read_text("utf-8"))
    prompts = asset_path("prompts/80.txt").read_text("utf-8").splitlines()

    def scene() -> str:
        pattern = rng.choice(RARE_SCENES if rng.random() < 0.05 else SCENES)
        return f"{rng.choice(captions)} {pattern.format(rng.choice(names['country211']))}"

    makers = (
        lambda: rng.choice(prompts).format(rng.choice(names["imagenet"])),
        lambda: rng.choice(captions),
        lambda: f"{scene()}, {scene()}",
    )
    return [makers[number % 3]() for number in range(num)]


def with_new_words(captions: list[str], share: float, seed: int = 0) -> list[str]:
    """Replace a share of the words by ones that no cache has seen."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 9)))

    return [" ".join(word() if rng.random() < share else known for known in text.split()) for text in captions]


def main() -> None:
    """Check that the ids are equal, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peer_name = f"open_clip_torch {importlib.metadata.version('open_clip_torch')} SimpleTokenizer"
    captions = mix_captions(arguments.captions)
    prompts = asset_path("prompts/80.txt").read_text("utf-8").splitlines()
    names = json.loads(asset_path("class_names.json").read_text("utf-8"))["imagenet"]
    filled = [prompt.format(name) for name, prompt in itertools.product(names, prompts)]
    sets = {
        "tokenize mixed captions": captions,
        "tokenize ImageNet prompts": random.Random(0).sample(filled, len(captions)),
        "tokenize 15 % new words": with_new_words(captions, 0.15),
    }
    ours, peer = Tokenizer(), SimpleTokenizer()
    options = {"peer_name": peer_name, "unit": "texts/s", "runs": arguments.runs}
    options["clock"] = time.process_time
    for name, texts in sets.items():
        if not torch.equal(ours.encode(texts), peer(texts)):
            raise SystemExit(f"{name}: the ids differ")
        compare(name, lambda t=texts: ours.encode(t), lambda t=texts: peer(t), amount=len(texts), **options)
    few = captions[:4000]
    compare(
        "tokenize one by one",
        lambda: [ours.encode(text) for text in few],
        lambda: [peer(text) for text in few],
        amount=len(few),
        **options,
    )
    compare(
        "tokenize mixed captions, nothing cached",
        lambda: Tokenizer().encode(captions),
        lambda: SimpleTokenizer()(captions),
        amount=len(captions),
        **options,
    )


if __name__ == "__main__":
    main()
