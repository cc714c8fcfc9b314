"""The full-batch objective from small forward passes, with its exact gradient."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from declip_cli.batch import Batch, Embeddings, LossTerms
from declip_cli.methods.base import Method

Autocast = Callable[[], AbstractContextManager[None]]

_FIRST_PASS_PARTS = 4
"""Micro-batches that are embedded together without graph: one layer's activations of four take less memory than all
layers' of one, and larger products are faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one forward and backward pass leaves beside the gradients."""

    terms: LossTerms
    """Without graph."""
    embeddings: Embeddings
    """Of this rank's whole batch, without graph."""


def forward_backward(
    method: Method,
    batch: Batch,
    *,
    micro_batch_size: int,
    autocast: Autocast,
    scale_loss: Callable[[Tensor], Tensor] = lambda loss: loss,
    last_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepResult:
    """Add the gradient of the objective over the whole batch to the parameters.

    With micro-batches: embed all without graph; take the objective and its gradient with respect to the embeddings;
    embed each micro-batch again and pass its share of that gradient on. The result is the undivided batch's for
    every method, except that BatchNorm inside a ResNet sees one micro-batch at a time.

    Args:
        method: gradients are added to its parameters.
        batch: this rank's pairs.
        micro_batch_size: pairs per forward pass; 0 or at least the batch embeds once.
        autocast: context in which forward passes run.
        scale_loss: for float16, the gradient scaler's.
        last_backward: context of the backward pass after which the gradients are complete, and of that one only.

    Returns:
        Loss terms and embeddings.

    Source: GradCache, arXiv 2101.06983.
    """
    with autocast():
        batch = method.prepare(batch, size=micro_batch_size or len(batch))
    if micro_batch_size == 0 or micro_batch_size >= len(batch):
        with autocast():
            embeddings = method.embed(batch)
            terms = method.objective(embeddings)
        with last_backward():
            scale_loss(terms.total).backward()
        return StepResult(terms=_detach_terms(terms), embeddings=embeddings.detached())
    parts = batch.split(micro_batch_size)
    # Both passes have to show the same batches to BatchNorm.
    num_parts = 1 if method.encoder.visual.is_batch_dependent else _FIRST_PASS_PARTS
    with torch.no_grad(), running_statistics_kept(method), autocast():
        cached = Embeddings.join([method.embed(piece) for piece in batch.split(num_parts * micro_batch_size)])
    joined = Embeddings(**{f.name: leaf(getattr(cached, f.name)) for f in fields(Embeddings)})
    with autocast():
        terms = method.objective(joined)
    scale_loss(terms.total).backward()
    leaves = {f.name: getattr(joined, f.name) for f in fields(Embeddings)}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    _pass_on(method, parts, gradients, autocast=autocast, last_backward=last_backward)
    return StepResult(terms=_detach_terms(terms), embeddings=joined.detached())


def _pass_on(
    method: Method,
    parts: list[Batch],
    gradients: dict[str, Tensor],
    *,
    autocast: Autocast,
    last_backward: Callable[[], AbstractContextManager[None]],
) -> None:
    """Embed each micro-batch again and send its rows of the embeddings' gradients back through the towers."""
    start = 0
    for number, part in enumerate(parts, start=1):
        with autocast():
            embeddings = method.embed(part)
        trained = [name for name in gradients if getattr(embeddings, name).requires_grad]  # not a frozen tower's
        outputs = [getattr(embeddings, name) for name in trained]
        rows = [gradients[name][start : start + len(part)] for name in trained]
        with last_backward() if number == len(parts) else nullcontext():
            torch.autograd.backward(outputs, rows)
        start += len(part)


def leaf(value: Tensor) -> Tensor:
    """Have a gradient taken by a tensor, in place, where it can have one."""
    return value.requires_grad_() if value.is_floating_point() and value.numel() else value


def _detach_terms(terms: LossTerms) -> LossTerms:
    return LossTerms(total=terms.total.detach(), terms={name: term.detach() for name, term in terms.terms.items()})


@contextmanager
def running_statistics_kept(method: nn.Module) -> Iterator[None]:
    """Let the first of two passes leave BatchNorm's running statistics alone, so that each batch counts once."""
    norms = [module for module in method.modules() if hasattr(module, "running_mean")]
    kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]  # type: ignore[operator,union-attr]
    counts = [norm.num_batches_tracked.clone() for norm in norms]  # type: ignore[operator,union-attr]
    try:
        yield
    finally:
        for norm, (mean, variance), count in zip(norms, kept, counts, strict=True):
            norm.running_mean.copy_(mean)  # type: ignore[operator,union-attr]
            norm.running_var.copy_(variance)  # type: ignore[operator,union-attr]
            norm.num_batches_tracked.copy_(count)  # type: ignore[operator,union-attr]
