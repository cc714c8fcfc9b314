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
"""Rows, or four per feature if that is more, from which the curvature is estimated."""
_ROUND_STEPS = 40
"""After so many steps the curvature is estimated anew, where the classifier now stands."""


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
    `LogisticRegression(C=1/l2)` divided by N C; the bias is not penalised. The variables are changed to
    W = U (ev + l2/N)^(-1/2) V' on centred features, where ev and V are the eigenvalues and eigenvectors of the
    Hessian shared by all classes, so that the curvature is near 1 in every direction whatever the spectrum of
    the features; the optimum stays the same. At first the Hessian is bounded by a quarter of the covariance;
    a descent that takes long estimates it again from its own predictions. Products are taken in float32 as
    far as that carries and finished in float64 on a CPU.

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
        is_cpu = features.device.type == "cpu"
        self._phases = (torch.float32, torch.float64) if is_cpu else (torch.float32,)
        self._chunk = _CHUNK_ROWS if is_cpu else max(1, _CHUNK_SCORES_GPU // len(self._present))
        self._bound = self._curvature(None)

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
        point = self._to_point(start)  # (C', D + 1)
        penalty = l2 / len(self._rows)
        frame = _Frame(*self._bound, penalty)
        num_iterations, has_converged, loss = 0, False, 0.0
        for dtype in self._phases if is_final else self._phases[:1]:
            has_converged = False
            while not has_converged and num_iterations < max_iterations:
                budget = min(_ROUND_STEPS, max_iterations - num_iterations)
                walk = _Walk(self, penalty, frame, dtype)
                inside, loss, steps, has_converged = walk.descend(frame.enter(point), tolerance, budget)
                point = frame.leave(inside)
                num_iterations += steps
                if not has_converged:
                    frame = _Frame(*self._curvature(point), penalty)
        weight, bias = self._from_point(point)
        return LogisticFit(
            weight=weight,
            bias=bias,
            l2=l2,
            objective=loss,
            num_iterations=num_iterations,
            has_converged=has_converged,
        )

    def value_and_gradient(self, point: Tensor, penalty: float, dtype: torch.dtype) -> tuple[float, Tensor]:
        """Compute the objective and its gradient, chunk by chunk.

        Args:
            point: weights on centred features and, last, the bias, (C, D + 1).
            penalty: l2 / N.
            dtype: of the matrix products.

        Returns:
            Objective in nats; gradient, (C, D + 1).
        """
        weight, bias = point[:, :-1].to(dtype), point[:, -1:].to(dtype)  # (C, D), (C, 1)
        slope = torch.zeros_like(weight)  # (C, D)
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
        value = float(loss) / num + 0.5 * penalty * float(point[:, :-1].square().sum())
        gradient = slope.to(point.dtype) / num + penalty * point[:, :-1]  # (C, D)
        return value, torch.cat([gradient, slope_bias[:, None] / num], 1)  # (C, D + 1)

    def _curvature(self, point: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """Estimate the Hessian that all classes share: eigenvalues (D,), eigenvectors (D, D), that of the bias."""
        step = max(1, len(self._rows) // max(_CURVATURE_ROWS, 4 * self._rows.shape[1]))
        rows = self._rows[::step]  # (n, D)
        if point is None:
            weights = rows.new_full((len(rows),), 0.25)  # (n,)
        else:
            scores = torch.addmm(point[:, -1].to(rows), rows, point[:, :-1].to(rows).T)  # (n, C)
            likely = scores.softmax(1)  # (n, C)
            weights = (likely * (1 - likely)).mean(1)  # (n,)
        hessian = (rows.T @ (rows * weights[:, None])).to(self._wide) / len(rows)  # (D, D)
        values, axes = torch.linalg.eigh(hessian)
        return values.clamp(min=0), axes, float(weights.mean())

    def _to_point(self, start: LogisticFit | None) -> Tensor:
        if start is None:
            shape = (len(self._present), self._rows.shape[1] + 1)
            return torch.zeros(shape, dtype=self._wide, device=self._rows.device)
        weight = start.weight.to(self._rows.device, self._wide)[self._present]  # (C', D)
        bias = start.bias.to(weight)[self._present].nan_to_num(neginf=0.0)  # (C',)
        bias += weight @ self._mean.to(weight)
        return torch.cat([weight, bias[:, None]], 1)  # (C', D + 1)

    def _from_point(self, point: Tensor) -> tuple[Tensor, Tensor]:
        present = point[:, :-1]  # (C', D)
        weight = present.new_zeros(self.num_classes, present.shape[1])  # (C, D)
        bias = present.new_full((self.num_classes,), -torch.inf)  # (C,)
        weight[self._present] = present
        bias[self._present] = point[:, -1] - present @ self._mean.to(present)
        return weight, bias


class _Frame:
    """The change of variables in which the curvature is near 1."""

    def __init__(self, values: Tensor, axes: Tensor, bias_value: float, penalty: float) -> None:
        self._axes = axes  # (D, D)
        self._scale = torch.cat([values + penalty, values.new_full((1,), max(bias_value, penalty))]).rsqrt()  # (D + 1,)

    def enter(self, point: Tensor) -> Tensor:
        """Turn weights and bias into scaled variables, both (C, D + 1)."""
        return torch.cat([point[:, :-1] @ self._axes, point[:, -1:]], 1) / self._scale

    def leave(self, inside: Tensor) -> Tensor:
        """Turn scaled variables into weights and bias, both (C, D + 1)."""
        scaled = inside * self._scale
        return torch.cat([scaled[:, :-1] @ self._axes.T, scaled[:, -1:]], 1)

    def pull(self, gradient: Tensor) -> Tensor:
        """Turn the gradient by weights and bias into that by the scaled variables, both (C, D + 1)."""
        return torch.cat([gradient[:, :-1] @ self._axes, gradient[:, -1:]], 1) * self._scale


class _Walk:
    """One descent by L-BFGS with a backtracking line search, in one precision."""

    def __init__(self, problem: LogisticProblem, penalty: float, frame: _Frame, dtype: torch.dtype) -> None:
        self._problem, self._penalty, self._frame, self._dtype = problem, penalty, frame, dtype
        self._noise = 2 * torch.finfo(dtype).eps
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
        value, gradient = self._problem.value_and_gradient(self._frame.leave(point), self._penalty, self._dtype)
        return value, self._frame.pull(gradient)

    def _search(
        self, point: Tensor, value: float, direction: Tensor, decrease: float
    ) -> tuple[Tensor, float, Tensor] | None:
        length = 1.0
        while length * decrease > self._noise * max(value, 1.0):
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
