"""What of a step is compiled, and whether a run is long enough for that to pay.

`embed` takes nearly all of a step and is compiled as a whole. `objective` is not: it asks how full the queue is, its
large products compute their gradients themselves already, and the rest are a few small operations.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch

from declip_cli.batch import EMBEDDING_FIELDS, Batch, Embeddings
from declip_cli.distributed import world_size
from declip_cli.errors import TrainError
from declip_cli.methods.base import Method
from declip_cli.methods.steady_shapes import SteadyShapes
from declip_cli.process_group import from_first
from declip_cli.resolve import ResolvedRun, settled
from declip_cli.train.estimate import make_up_batch
from declip_cli.train.grad_cache import leaf, running_statistics_kept
from declip_cli.train.health import StepReport

WORTH_SECONDS = 3600
"""A run that takes longer is compiled by `train.compile = auto`."""
_MEASURED_STEPS = 10
"""Least number of steps that say how long the others will take."""
_MAX_SHAPES = 64
"""Shapes of a batch that are compiled for; beyond that, PyTorch would continue as if nothing were compiled."""


def compile_method(method: Method, *, with_graphs: bool = False) -> None:
    """Have `method.embed` compiled when it is called, once for each shape of a batch, of which there are few.

    On several ranks only the towers are, each by itself: what is compiled as one hands over its gradients all at once,
    and they could not be averaged while backward still computes others.

    Args:
        method: changed in place; batches must be counted from now on.
        with_graphs: replay each call as one CUDA graph. What `embed` returns is then overwritten by its next call.
    """
    torch._dynamo.config.recompile_limit = _MAX_SHAPES  # type: ignore[attr-defined]
    embed: Callable[[Batch], Embeddings] = method.embed
    context_length = method.encoder.architecture.text.context_length
    shapes = SteadyShapes(context_length=context_length, is_grouped=not method.views.pad_to_context)
    if world_size() > 1:
        method.encoder.visual.compile(dynamic=False)
        method.encoder.text.transformer.compile(dynamic=False)
    else:
        mode = "reduce-overhead" if with_graphs else None
        embed = torch.compile(_without_unused(embed, _find_used(method)), dynamic=False, mode=mode)

    def steady_embed(batch: Batch) -> Embeddings:
        if with_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return embed(shapes.fit(batch))

    method.embed = steady_embed  # type: ignore[method-assign]


def _without_unused(embed: Callable[[Batch], Embeddings], used: frozenset[str]) -> Callable[[Batch], Embeddings]:
    """Cut fields that no loss reads off the graph.

    Compiled code would give their weights a gradient of zero, and the optimizer let them decay.
    """

    def embed_used(batch: Batch) -> Embeddings:
        embeddings = embed(batch)
        values = {name: getattr(embeddings, name) for name in EMBEDDING_FIELDS}
        return Embeddings(**{name: value if name in used else value.detach() for name, value in values.items()})

    return embed_used


def _find_used(method: Method) -> frozenset[str]:
    """Name the fields of embeddings whose gradient the objective takes."""
    with running_statistics_kept(method):
        with torch.no_grad():
            embeddings = method.embed(make_up_batch(method, num_pairs=2).to(method.encoder.logit_scale.device))
        leaves = {name: leaf(getattr(embeddings, name).clone()) for name in EMBEDDING_FIELDS}
        total = method.objective(Embeddings(**leaves)).total
        names = [name for name, value in leaves.items() if value.requires_grad]
        gradients = torch.autograd.grad(total, [leaves[name] for name in names], allow_unused=True)
    return frozenset(name for name, gradient in zip(names, gradients, strict=True) if gradient is not None)


def has_steady_memory(run: ResolvedRun) -> bool:
    """Return whether a step can be replayed as CUDA graphs: one GPU, and `embed` is called once a step."""
    train = run.config.train
    is_whole = (train.micro_batch_size or train.batch_size) >= train.batch_size
    return run.machine.device == "cuda" and run.machine.world_size == 1 and is_whole


def is_compiled(run: ResolvedRun) -> tuple[bool | None, str]:
    """Return whether a run is compiled from its first step on, and why; None: that is decided when it is under way."""
    train = run.config.train
    if train.compile != "auto":
        verb = "compiled" if train.compile else "not compiled"
        return train.compile, f"{verb}, as asked (train.compile = {str(train.compile).lower()})"
    if run.machine.device != "cuda":
        return False, f"not compiled: train.compile = auto does that on GPUs only (this is {run.machine.device})"
    if importlib.util.find_spec("triton") is None:
        return False, "not compiled: Triton is not installed"
    if train.time_limit_s is not None and train.time_limit_s <= WORTH_SECONDS:
        return False, "not compiled: the time limit is not over an hour"
    return None, "compiled after a few steps, if the rest is found to take over an hour (train.compile = auto)"


@contextmanager
def compiling_explained() -> Iterator[None]:
    """Turn a failure to compile into an error with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = next(iter(str(error).splitlines()), "")
        raise TrainError(f"PyTorch cannot compile a step: {cause}", remedy="--set train.compile=false") from error


class Compilation:
    """Compiles a run: before its first step, or where that is left open, once its speed is known.

    A run whose user did not ask is not replayed as CUDA graphs.

    Args:
        method: what is compiled.
        run: how long it is, and what was asked.
    """

    def __init__(self, method: Method, run: ResolvedRun) -> None:
        self._method, self._run = method, run
        verdict, self.reason = is_compiled(run)
        self._is_open = verdict is None
        self._first: StepReport | None = None
        self._is_compiled = bool(verdict)
        if verdict:
            compile_method(method, with_graphs=has_steady_memory(run))

    def decide(self, report: StepReport) -> StepReport:
        """Compile the rest of the run if it is long, and say so once in a report's advice; the same on all ranks."""
        self._first = self._first or report  # steps before it started slowly
        if not self._is_open or report.step - self._first.step < _MEASURED_STEPS:
            return report
        self._is_open = False
        seconds = from_first(partial(self._seconds_left, self._first, report))
        self._is_compiled = seconds > WORTH_SECONDS
        if self._is_compiled:
            compile_method(self._method)
        verb = "compiled from here on" if self._is_compiled else "not compiled"
        sentence = f"{verb}: the rest of the run takes {seconds / 60:.0f} minutes as it is (train.compile = auto)"
        return replace(report, advice=(*report.advice, sentence))

    def left_out(self) -> AbstractContextManager[object]:
        """Compute without compiled code what comes in other shapes, such as an evaluation."""
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()

    def _seconds_left(self, first: StepReport, last: StepReport) -> float:
        train = self._run.config.train
        pace = (last.step_seconds - first.step_seconds) / (last.samples_seen - first.samples_seen)
        seconds = pace * (settled(train.samples) - last.samples_seen)
        return min(seconds, train.time_limit_s - last.seconds) if train.time_limit_s else seconds
