"""Methods with very small heads, random embeddings for them, and what two processes do with both."""

import os
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

from declip_cli.batch import Batch, Embeddings
from declip_cli.config import MethodConfig
from declip_cli.methods.registry import METHODS
from declip_cli.model import heads
from declip_cli.model.architectures import Architecture, TextDims, VitDims
from declip_cli.model.batch_norm import use_full_batch_norm
from declip_cli.model.clip import DualEncoder
from declip_cli.model.text_transformer import END_ID

ARCHITECTURE = Architecture(
    image_side_px=16,
    embed_dim=8,
    vision=VitDims(patch_side_px=8, width=24, num_layers=1, num_heads=3),
    text=TextDims(context_length=11, width=10, num_layers=1, num_heads=2),
)
QUEUE_SIZE = 20
GOOD = torch.tensor(True)
RANK_JOBS = [
    *((name, {"queue_start": "random"}) for name in METHODS),
    *(("declip", {"weights": {"mlm": 1.0}, "mlm_mean": mean}) for mean in ("global", "rank")),
    *(("declip", {"weights": {"simsiam": 1.0}, "batch_norm": norm}) for norm in ("global", "rank")),
    *(("declip", {"weights": {"nn": 1.0}, "queue_scope": scope}) for scope in ("global", "rank")),
    *(("slip", {"weights": {"simclr": 1.0}, "batch_norm": norm}) for norm in ("global", "rank")),
    ("declip", {"weights": {"simclr": 1.0}}),
    ("clip", {"weights": {"words": 1.0}}),
    *((name, {"positives": "caption"}) for name in ("clip", "defilip", "rocket")),
    ("clip", {"captions": 2}),
]


def only(method, **weights):
    """Switch all terms off but those given."""
    return dict.fromkeys(METHODS[method].default_weights, 0.0) | weights


@contextmanager
def narrow_heads():
    """Let methods have narrow heads: SLIP's are 4,096 wide, DeCLIP's 1,024, and their weights most of a state."""
    with mock.patch.object(heads, "SIMCLR_WIDTH", 9), mock.patch.object(heads, "SIMSIAM_WIDTH", 9):
        yield


def build(name, *, seed=0, **options):
    """Build a method whose parameters, norms and scales all have values of their own."""
    torch.manual_seed(seed)
    kind = METHODS[name]
    encoder = DualEncoder(ARCHITECTURE, token_wise_dim=6 if kind.is_token_wise else 0)
    with narrow_heads():
        method = kind(encoder, MethodConfig(name=name, queue_size=QUEUE_SIZE, **options))
    with torch.no_grad():
        for key, parameter in method.named_parameters():
            if parameter.dim() < 2 and "logit_scale" not in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
        encoder.logit_scale.fill_(2.0)
        if kind.is_token_wise:
            method.logit_scale_dense.fill_(1.7)
        if hasattr(method, "logit_scale_strong"):
            method.logit_scale_strong.fill_(1.4)
    return method


def draw(num=4, *, seed=0):
    """Draw every field of `Embeddings` at random: V = T = 2, D = 8, E = 24 or 10, P = 3, L = 7, Q = 6."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(num) % 6 + 2
    counts = torch.arange(num) * 2 % 5  # some texts have no masked token; halves of a batch have unequal many
    return {
        "images": torch.randn(num, 2, 8, generator=generator),
        "texts": torch.randn(num, 2, 8, generator=generator),
        "image_features": torch.randn(num, 3, 24, generator=generator),
        "image_tokens": torch.randn(num, 3, 6, generator=generator),
        "text_tokens": torch.randn(num, 7, 6, generator=generator),
        "text_token_mask": torch.arange(7) < lengths[:, None],
        "mlm_losses": counts * (5 + torch.rand(num, generator=generator)),
        "mlm_counts": counts.float(),
        "pair_indices": torch.arange(num) * 3 + 100,
        "text_features": torch.randn(num, 2, 10, generator=generator),
        "word_losses": 4 + torch.rand(num, generator=generator),
        "words": torch.arange(num * 7).view(num, 7) % 11,
        "caption_ids": caption_ids(num),
    }


def batch_of(method, num=5):
    """Draw pairs for a method; texts have a "!" (id 0) inside, an end, and padding behind it."""
    generator = torch.Generator().manual_seed(3)
    num_images, num_texts = len(method.views.images), len(method.views.texts)
    tokens = torch.randint(1, 49406, (num, num_texts, 9), generator=generator)
    for pair in range(num):
        tokens[pair, :, 2] = 0
        tokens[pair, :, 4 + pair % 4] = END_ID
        tokens[pair, :, 5 + pair % 4 :] = 0
    labels = torch.full((num, 9), -100)
    for pair in range(num - 1):
        labels[pair, 1 : 2 + pair % 3] = torch.arange(1 + pair % 3) + 17 * pair
    images = torch.randint(0, 256, (num, num_images, 16, 16, 3), dtype=torch.uint8, generator=generator)
    corners = torch.rand(num, num_images, 2, generator=generator) / 2
    boxes = torch.cat([corners, corners + 0.5], dim=2)
    boxes[::2] = boxes[::2][..., [2, 1, 0, 3]]  # flipped
    return Batch(
        images=images,
        tokens=tokens,
        mlm_labels=labels,
        pair_indices=torch.arange(num) * 3 + 100,
        caption_ids=caption_ids(num),
        boxes=boxes,
    )


def caption_ids(num):
    """Give each pair two captions: one that every third pair has, and one that the first shares with the third."""
    return torch.stack([torch.arange(num) % 3, torch.arange(num) + 2], dim=1) - 2**62


def earlier_texts(fields, *, seed=9):
    """Draw what the queue holds: near each pair's texts a row of its own, and as near one of another pair."""
    texts = F.normalize(fields["texts"].flatten(0, 1), dim=1)
    noise = 0.1 * torch.randn(2, *texts.shape, generator=torch.Generator().manual_seed(seed))
    rows = F.normalize(torch.cat([texts + noise[0], texts + 2 * noise[1]]), dim=1)
    own = fields["pair_indices"].repeat_interleave(2)
    return rows[:QUEUE_SIZE], torch.cat([own, own + 1])[:QUEUE_SIZE]


def leaves_of(fields):
    return {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in fields.items()}


def score(method, fields):
    """Compute the objective, → terms, total, and the gradients of fields and parameters."""
    leaves = leaves_of(fields)
    found = method.objective(Embeddings(**leaves))
    found.total.backward()
    gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    gradients |= {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    return {key: term.detach() for key, term in found.terms.items()}, found.total.detach(), gradients


def rank_job(name, options, fields):
    """Score one rank's rows with the queue left from a step before."""
    if "weights" in options:
        options = options | {"weights": only(name, **options["weights"])}
    method = build(name, **options)
    if method.config.batch_norm == "global":
        use_full_batch_norm(method, is_accelerator=False)
    terms, total, gradients = score(method, fields)
    found = {"total": total} | {f"term/{key}": value for key, value in terms.items()}
    found |= {f"gradient/{key}": gradients[key] for key in fields if key in gradients}
    if hasattr(method, "queue"):
        method.update_queue(Embeddings(**fields), GOOD)
        found |= {"rows": method.queue.rows, "pair_indices": method.queue.pair_indices}
    return found


def run_ranks(folder):
    """Do every job of `RANK_JOBS` on this rank's half of six pairs."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    fields = {key: value[3 * rank : 3 * rank + 3] for key, value in draw(6).items()}
    torch.save([rank_job(name, options, fields) for name, options in RANK_JOBS], f"{folder}/{rank}.pt")
