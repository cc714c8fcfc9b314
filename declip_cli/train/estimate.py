"""How much memory a run will take on each process, before it is started."""

from contextlib import nullcontext
from dataclasses import dataclass, fields

import psutil
import torch
from torch import Tensor

from declip_cli.batch import NO_LABEL, Batch, Embeddings
from declip_cli.contrastive_losses import BLOCK_ELEMENTS as CONTRASTIVE_BLOCK
from declip_cli.contrastive_losses import WHOLE_ELEMENTS
from declip_cli.methods.base import Method
from declip_cli.methods.registry import build_method
from declip_cli.model.text_transformer import END_ID
from declip_cli.resolve import ResolvedRun
from declip_cli.token_wise_losses import BLOCK_ELEMENTS, BLOCK_ELEMENTS_ON_A_GPU

_SIMILARITIES_AT_ONCE = 3
"""Copies of a block of token similarities that are alive together."""
_LOGITS_AT_ONCE = 3
"""Copies of a block of logits that are alive together: the logits, their softmax and the gradient."""
_USABLE = 0.9
"""Share of the free memory to count on: allocators leave gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What one process will need, in bytes."""

    weights: int
    """With gradients, moments and running average."""
    logits: int
    """Of the objective, at their peak."""
    cast_weights: float
    """Weights in another number format, kept for backward."""
    per_pair: float
    """Activations kept for backward, of each pair of a forward pass."""
    embedded_per_pair: float
    """Embeddings and their gradients, of each pair of a batch in micro-batches."""
    batch_size: int
    micro_batch_size: int

    def to_mebibytes(self) -> dict[str, float]:
        """Return `weights`, `activations` of one forward pass, `logits`, cached `embeddings`, and their `total`."""
        size = self.micro_batch_size
        sizes = {
            "weights": self.weights,
            "activations": self.cast_weights + self.per_pair * size,
            "logits": self.logits,
            "embeddings": self.embedded_per_pair * self.batch_size if size < self.batch_size else 0,
        }
        mebibytes = {name: round(value / 2**20, 1) for name, value in sizes.items()}
        return mebibytes | {"total": round(sum(mebibytes.values()), 1)}

    def largest_micro_batch(self, free_bytes: float) -> int:
        """Return the most pairs of a forward pass that fit, at most the batch; 0 if not even one does."""
        left = free_bytes * _USABLE - self.weights - self.logits - self.cast_weights
        if left >= self.per_pair * self.batch_size:
            return self.batch_size
        return max(0, int((left - self.embedded_per_pair * self.batch_size) // self.per_pair))


def find_free_memory(run: ResolvedRun) -> int:
    """Return the bytes that one process of the run may take now: of its GPU, or its share of the main memory."""
    if run.machine.device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // run.machine.world_size


def estimate_memory(run: ResolvedRun) -> MemoryEstimate:
    """Estimate the memory of one process.

    What backward keeps is counted, not guessed: two and four pairs are encoded here and every tensor saved for backward
    is added up. It grows in a line with the pairs of a forward pass; weights in another number format come on top.
    """
    config = run.config
    torch.manual_seed(0)
    method = build_method(config.model, config.method).train()
    copies = 4 if config.optim.optimizer == "adamw" else 3  # weight, gradient, one or two moments
    num_bytes = sum(p.nbytes * (copies if p.requires_grad else 1) for p in method.parameters())
    num_bytes += sum(b.nbytes for b in method.buffers())
    if config.train.ema_decay:
        num_bytes += sum(p.nbytes for p in method.encoder.parameters())
    two, four = (_kept_for_backward(method, run, num_pairs) for num_pairs in (2, 4))
    per_pair, embedded = (four[0] - two[0]) / 2, (four[1] - two[1]) / 2
    batch_size = config.train.batch_size
    return MemoryEstimate(
        weights=num_bytes,
        logits=_num_logits(method, run) * 4 + (_token_wise_bytes(method, run) if method.is_active("filip") else 0),
        cast_weights=two[0] - 2 * per_pair,
        per_pair=per_pair,
        embedded_per_pair=2 * embedded,
        batch_size=batch_size,
        micro_batch_size=min(config.train.micro_batch_size or batch_size, batch_size),
    )


def _num_logits(method: Method, run: ResolvedRun) -> int:
    """Count the logits that are alive together at the peak of the objective."""
    views, batch_size = method.views, run.config.train.batch_size
    whole = batch_size * run.global_batch * len(views.images) * len(views.texts)
    limit = WHOLE_ELEMENTS if run.machine.world_size == 1 and whole <= WHOLE_ELEMENTS else CONTRASTIVE_BLOCK
    contrastive = _LOGITS_AT_ONCE * min(whole, limit)
    simclr = 2 * 4 * batch_size * run.global_batch if method.is_active("simclr") else 0  # logits and their softmax
    return contrastive + simclr


def _token_wise_bytes(method: Method, run: ResolvedRun) -> int:
    """Count the bytes that the token-wise loss takes: a block of similarities, and the index of each best match."""
    block = BLOCK_ELEMENTS.get(run.machine.device, BLOCK_ELEMENTS_ON_A_GPU)
    indices = _num_tokens(method) * run.config.train.batch_size * run.global_batch
    return _SIMILARITIES_AT_ONCE * 4 * block + indices


def _num_tokens(method: Method) -> int:
    """Count the tokens of an image and a text together."""
    architecture = method.encoder.architecture
    side_px = getattr(architecture.vision, "patch_side_px", 32)  # a ResNet's states are 32 px apart
    return (architecture.image_side_px // side_px) ** 2 + architecture.text.context_length


def make_up_batch(method: Method, *, num_pairs: int) -> Batch:
    """Make black images and texts of full length, a seventh of them masked."""
    architecture, views = method.encoder.architecture, method.views
    side, length = architecture.image_side_px, architecture.text.context_length
    labels = torch.full((num_pairs, length), NO_LABEL)
    labels[:, : max(1, length // 7)] = 1
    return Batch(
        images=torch.zeros(num_pairs, len(views.images), side, side, 3, dtype=torch.uint8),
        tokens=torch.full((num_pairs, len(views.texts), length), END_ID),
        mlm_labels=labels,
        pair_indices=torch.arange(num_pairs),
    )


def _kept_for_backward(method: Method, run: ResolvedRun, num_pairs: int) -> tuple[int, int]:
    """Count the bytes that backward keeps of some pairs, and those of their embeddings."""
    batch = make_up_batch(method, num_pairs=num_pairs)
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
