"""How much memory a run will take on each process, before it is started."""

from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import Tensor

from declip_cli.batch import Batch, Embeddings
from declip_cli.methods.base import Method
from declip_cli.methods.registry import build_method
from declip_cli.model.text_transformer import END_ID
from declip_cli.resolve import ResolvedRun
from declip_cli.token_wise_losses import BLOCK_ELEMENTS, BLOCK_ELEMENTS_ON_A_GPU

_SIMILARITIES_AT_ONCE = 3
"""Copies of a block of token similarities that are alive together."""
_LOGITS_AT_ONCE = 2
"""Copies of a matrix of logits that a cross-entropy keeps: the logits and their softmax."""


def estimate_memory(run: ResolvedRun) -> dict[str, float]:
    """Estimate the memory of one process, in MiB.

    What backward keeps is counted, not guessed: two and four pairs are encoded here and every tensor saved for backward
    is added up. It grows in a line with the pairs of a forward pass; weights in another number format come on top.

    Returns:
        `weights` (with gradients, moments and running average), `activations` of one forward pass, `logits` of the
        objective, `embeddings` cached for micro-batches, and their `total`.
    """
    config = run.config
    torch.manual_seed(0)
    method = build_method(config.model, config.method).train()
    copies = 4 if config.optim.optimizer == "adamw" else 3  # weight, gradient, one or two moments
    num_bytes = sum(p.nbytes for p in method.parameters()) * copies + sum(b.nbytes for b in method.buffers())
    if config.train.ema_decay:
        num_bytes += sum(p.nbytes for p in method.encoder.parameters())
    two, four = (_kept_for_backward(method, run, num_pairs) for num_pairs in (2, 4))
    per_pair, embedded = (four[0] - two[0]) / 2, (four[1] - two[1]) / 2
    cast_weights = two[0] - 2 * per_pair
    size = min(config.train.micro_batch_size or config.train.batch_size, config.train.batch_size)
    logits = _num_logit_matrices(method) * _LOGITS_AT_ONCE * config.train.batch_size * run.global_batch * 4
    if method.is_active("filip"):
        logits += _SIMILARITIES_AT_ONCE * 4 * BLOCK_ELEMENTS.get(run.machine.device, BLOCK_ELEMENTS_ON_A_GPU)
        logits += _num_tokens(method) * config.train.batch_size * run.global_batch  # a byte of each best match
    cached = 2 * embedded * config.train.batch_size if size < config.train.batch_size else 0
    sizes = {
        "weights": num_bytes,
        "activations": cast_weights + per_pair * size,
        "logits": logits,
        "embeddings": cached,
    }
    mebibytes = {name: round(value / 2**20, 1) for name, value in sizes.items()}
    return mebibytes | {"total": round(sum(mebibytes.values()), 1)}


def _num_logit_matrices(method: Method) -> int:
    """Count the matrices of pairs against all pairs that the objective compares."""
    views, config = method.views, method.config
    num_pairs = config.pairs if config.name in ("declip", "defilip") else 1
    neighbours = len(views.images) * len(views.texts) * (2 if config.nn_symmetric else 1)
    terms = {"clip": 2 * num_pairs, "nn": neighbours, "simclr": 4, "filip": 2}
    return sum(count for term, count in terms.items() if method.is_active(term))


def _num_tokens(method: Method) -> int:
    """Count the tokens of an image and a text together."""
    architecture = method.encoder.architecture
    side_px = getattr(architecture.vision, "patch_side_px", 32)  # a ResNet's states are 32 px apart
    return (architecture.image_side_px // side_px) ** 2 + architecture.text.context_length


def _kept_for_backward(method: Method, run: ResolvedRun, num_pairs: int) -> tuple[int, int]:
    """Count the bytes that backward keeps of some pairs, and those of their embeddings."""
    architecture, views = method.encoder.architecture, method.views
    side, length = architecture.image_side_px, architecture.text.context_length
    tokens = torch.full((num_pairs, len(views.texts), length), END_ID)
    labels = torch.full((num_pairs, length), -100)
    labels[:, : max(1, length // 7)] = 1
    batch = Batch(
        images=torch.zeros(num_pairs, len(views.images), side, side, 3, dtype=torch.uint8),
        tokens=tokens,
        mask_labels=labels,
        numbers=torch.arange(num_pairs),
    )
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    is_half = run.machine.precision != "fp32"
    context = torch.autocast("cpu", dtype=torch.bfloat16) if is_half else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        embeddings = method.embed(batch)
    embedded = sum(getattr(embeddings, field.name).nbytes for field in fields(Embeddings))
    return sum(kept.values()), embedded
