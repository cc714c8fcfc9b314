"""Multinomial logistic regression to its optimum: full-batch L-BFGS, preconditioned, on any device."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from declip_cli.errors import EvaluateError

_CHUNK_ROWS = 1024
"""Rows per matrix product on a CPU: features and class scores of a chunk stay in the cache (measured)."""
_CHUNK_SCORES_GPU = 2**26
"""Class scores held at once on a GPU: 256 MiB in float32."""
_CURVATURE_ROWS = 16384
"""Rows, or four per feature if that is more, from which the preconditioner is estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogisticFit:
    """A fitted classifier and how it was found."""

    weight: Tensor
    """Per class, float64, (C, D); zero for classes without a training sample."""
    bias: Tensor
    """Per class, float64, (C,); minus infinity for classes without a training sample."""
    l2: float
    """Strength of the penalty; scikit-learn's 1 / C."""
    objective: float
    """Mean cross-entropy in nats plus l2 / (2 N) times the squared norm of the weights."""
    num_iterations: int
    has_converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Score samples.

        Args:
            features: (N, D).

        Returns:
            Class scores in nats, float32 or the features' wider type, (N, C).
        """
        weight = self.weight.to(features.device, features.dtype)
        return torch.addmm(self.bias.to(weight), features, weight.T)  # (N, C)


class LogisticProblem:
    """Training samples for which classifiers of several penalties are wanted.

    Minimises (1/N) sum CE(W x + b, y) + l2 / (2 N) |W|², the objective of scikit-learn's
    `LogisticRegression(C=1/l2)` divided by N C; the bias is not penalised. The variables
    are changed to W = U (ev/4 + l2/N)^(-1/2) V' on centred features, where ev and V are the eigenvalues and
    eigenvectors of their covariance, so that the curvature is near 1 in every direction whatever the
    spectrum of the features; the optimum stays the same. Products are taken in float32 as far as they carry
    and finished in float64 on a CPU.

    Args:
        features: (N, D); not normalised.
        labels: class numbers, int64, (N,).
        num_classes: C.

    Raises:
        EvaluateError: fewer than two classes have samples, or a feature is not finite.

    Source: CLIP, arXiv 2103.00020, appendix A.3 (protocol); Nocedal & Wright, Numerical Optimization, alg. 7.4.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        self._present, self._labels = labels.to(features.device).unique(return_inverse=True)  # (C',), (N,)
        if len(self._present) < 2:
            raise EvaluateError(
                f"a classifier needs samples of at least two classes (found {len(self._present)})",
                remedy="give the training split one subfolder of pictures per class",
            )
        if not bool(torch.isfinite(features).all()):
            raise EvaluateError(
                "the features hold values that are not finite",
                remedy="check the model: its weights or its input pictures are broken",
            )
        self.num_classes = num_classes
        self._wide = torch.float32 if features.device.type == "mps" else torch.float64
        self._mean = features.to(self._wide).mean(0).to(features.dtype)  # (D,)
        self._rows = features - self._mean  # (N, D)
        self._spread, self._axes = self._curvature()  # (D,), (D, D)
        is_cpu = features.device.type == "cpu"
        self._phases = (torch.float32, torch.float64) if is_cpu else (torch.float32,)
        self._chunk = _CHUNK_ROWS if is_cpu else max(1, _CHUNK_SCORES_GPU // len(self._present))

    def fit(
        self,
        l2: float,
        *,
        start: LogisticFit | None = None,
        tolerance: float = 1e-7,
        max_iterations: int = 1000,
        is_final: bool = True,
    ) -> LogisticFit:
        """Find the optimum for one penalty.

        Args:
            l2: strength of the penalty, above 0; scikit-learn's 1 / C.
            start: a fit of the same classes to start from; zeros otherwise.
            tolerance: stop when the expected further decrease is below this fraction of the objective.
            max_iterations: bound on the steps.
            is_final: finish in float64 where the device is a CPU; else stay in float32 (for a search).

        Returns:
            The classifier, in the coordinates of the features as given.
        """
        scale = (self._spread / 4 + l2 / len(self._rows)).rsqrt()  # (D,)
        point = self._to_point(start, scale) if start else scale.new_zeros(len(self._present), len(scale) + 1)
        phases = self._phases if is_final else self._phases[:1]
        num_iterations, has_converged, loss = 0, False, 0.0
        for dtype in phases:
            budget = max_iterations - num_iterations
            walk = _Walk(self, l2 / len(self._rows), scale, dtype)
            point, loss, steps, has_converged = walk.descend(point, tolerance, budget)
            num_iterations += steps
        weight, bias = self._from_point(point, scale)
        return LogisticFit(
            weight=weight,
            bias=bias,
            l2=l2,
            objective=loss,
            num_iterations=num_iterations,
            has_converged=has_converged,
        )

    def value_and_gradient(self, point: Tensor, l2: float, scale: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
        """Compute the objective and its gradient in the preconditioned variables, chunk by chunk.

        Args:
            point: scaled weights in the eigenbasis and, last, the bias, (C, D + 1).
            l2: penalty per sample.
            scale: the change of variables per direction, (D,).
            dtype: of the matrix products.

        Returns:
            Objective in nats; gradient, (C, D + 1).
        """
        scaled = point[:, :-1] * scale  # (C, D)
        weight, bias = (scaled @ self._axes.T).to(dtype), point[:, -1:].to(dtype)  # (C, D), (C, 1)
        slope = weight.new_zeros(weight.shape)  # (C, D)
        slope_bias = point.new_zeros(len(point))  # (C,)
        loss = point.new_zeros(())
        one = weight.new_ones(1, 1)
        num = len(self._rows)
        for first in range(0, num, self._chunk):
            rows = self._rows[first : first + self._chunk].to(dtype)  # (n, D)
            labels = self._labels[None, first : first + self._chunk]  # (1, n)
            scores = torch.addmm(bias, weight, rows.T)  # (C, n)
            log_sums = scores.logsumexp(0, keepdim=True)  # (1, n)
            loss += (log_sums - scores.gather(0, labels)).sum(dtype=point.dtype)
            residuals = scores.sub_(log_sums).exp_()  # (C, n)
            residuals.scatter_add_(0, labels, -one.expand_as(labels))
            slope.addmm_(residuals, rows)
            slope_bias += residuals.sum(1, dtype=point.dtype)
        value = float(loss) / num + 0.5 * l2 * float(scaled.square().sum())
        gradient = (slope.to(point.dtype) @ self._axes / num + l2 * scaled) * scale  # (C, D)
        return value, torch.cat([gradient, slope_bias[:, None] / num], 1)  # (C, D + 1)

    def _curvature(self) -> tuple[Tensor, Tensor]:
        num = max(_CURVATURE_ROWS, 4 * self._rows.shape[1])
        step = max(1, len(self._rows) // num)
        rows = self._rows[::step]  # (n, D)
        covariance = (rows.T @ rows).to(self._wide) / len(rows)  # (D, D)
        values, axes = torch.linalg.eigh(covariance)
        return values.clamp(min=0), axes

    def _to_point(self, start: LogisticFit, scale: Tensor) -> Tensor:
        weight = start.weight.to(scale)[self._present]  # (C', D)
        bias = start.bias.to(scale)[self._present]  # (C',)
        bias = bias.nan_to_num(neginf=0.0) + weight @ self._mean.to(scale)
        return torch.cat([weight @ self._axes / scale, bias[:, None]], 1)  # (C', D + 1)

    def _from_point(self, point: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        present = (point[:, :-1] * scale) @ self._axes.T  # (C', D)
        weight = present.new_zeros(self.num_classes, present.shape[1])  # (C, D)
        bias = present.new_full((self.num_classes,), -torch.inf)  # (C,)
        weight[self._present] = present
        bias[self._present] = point[:, -1] - present @ self._mean.to(present)
        return weight, bias


class _Walk:
    """One descent by L-BFGS with a backtracking line search, in one precision."""

    def __init__(self, problem: LogisticProblem, l2: float, scale: Tensor, dtype: torch.dtype) -> None:
        self._problem, self._l2, self._scale, self._dtype = problem, l2, scale, dtype
        self._noise = 4 * torch.finfo(dtype).eps
        self._memory: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=10)

    def descend(self, point: Tensor, tolerance: float, budget: int) -> tuple[Tensor, float, int, bool]:
        """Walk downhill until the expected decrease is small twice in a row; also count the steps."""
        value, gradient = self._evaluate(point)
        num_small = 0
        for step in range(budget):
            direction = self._direction(gradient)  # (C, D + 1)
            decrease = float((gradient * direction).sum())
            num_small = num_small + 1 if decrease <= 2 * tolerance * value else 0
            if decrease <= 0 or num_small == 2:
                return point, value, step, True
            moved = self._search(point, value, direction, decrease)
            if moved is None:  # the precision of the sums is exhausted
                return point, value, step, True
            new_point, new_value, new_gradient = moved
            self._remember(new_point - point, new_gradient - gradient)
            point, value, gradient = new_point, new_value, new_gradient
        return point, value, budget, False

    def _evaluate(self, point: Tensor) -> tuple[float, Tensor]:
        return self._problem.value_and_gradient(point, self._l2, self._scale, self._dtype)

    def _search(
        self, point: Tensor, value: float, direction: Tensor, decrease: float
    ) -> tuple[Tensor, float, Tensor] | None:
        length = 1.0
        while length * decrease > self._noise * value:
            new_point = point - length * direction
            new_value, new_gradient = self._evaluate(new_point)
            if new_value <= value - 1e-4 * length * decrease:
                return new_point, new_value, new_gradient
            length /= 2
        return None

    def _direction(self, gradient: Tensor) -> Tensor:
        direction = gradient.clone()
        weights = []
        for step, change, inverse in reversed(self._memory):
            weights.append(inverse * float((step * direction).sum()))
            direction -= weights[-1] * change
        if self._memory:
            _, change, inverse = self._memory[-1]
            direction /= inverse * float(change.square().sum())
        for (step, change, inverse), weight in zip(self._memory, reversed(weights), strict=True):
            direction += step * (weight - inverse * float((change * direction).sum()))
        return direction

    def _remember(self, step: Tensor, change: Tensor) -> None:
        product = float((step * change).sum())
        if product > 1e-12 * float(change.square().sum()):
            self._memory.append((step, change, 1 / product))
