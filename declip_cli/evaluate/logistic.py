"""Multinomial logistic regression to its optimum: PyTorch's L-BFGS on whitened features, on any device."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from declip_cli.errors import EvaluateError

_CHUNK_ROWS = 1024
"""Rows per matrix product on a CPU: features and class scores of a chunk stay in the cache (measured)."""
_CHUNK_SCORES_GPU = 2**26
"""Class scores held at once on a GPU: 256 MiB in float32."""

_PHASES = ((torch.float32, 1e-6), (torch.float64, 1e-7))
"""Type of the products, and the fraction by which the objective must still decrease for a phase to continue."""


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
        """Score samples (N, D) → (N, C), class scores in nats."""
        weight = self.weight.to(features.device, features.dtype)
        return torch.addmm(self.bias.to(weight), features, weight.T)  # (N, C)


class LogisticProblem:
    """Training samples for which classifiers of several penalties are wanted.

    Minimizes (1/N) sum CE(W x + b, y) + l2 / (2 N) |W|², the objective of scikit-learn's
    `LogisticRegression(C=1/l2)` divided by N C; the bias is not penalized. L-BFGS works on U of
    W = U (ev + l2/N)^(-1/2) V', where ev and V are the eigenvalues and eigenvectors of a quarter of the covariance,
    which bounds the Hessian shared by all classes: the optimum is the same, and is reached in a few steps.

    Args:
        features: (N, D); not normalized.
        labels: class numbers, int64, (N,).
        num_classes: C.

    Raises:
        EvaluateError: fewer than two classes have samples, or a feature is not finite.

    Source: CLIP, arXiv 2103.00020, appendix A.3 (protocol).
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        self._present, self._labels = labels.to(features.device).unique(return_inverse=True)  # (C',), (N,)
        if len(self._present) < 2:
            raise EvaluateError(
                f"a classifier needs samples of at least two classes (found {len(self._present)})",
                remedy="give the training split one subfolder of images per class",
            )
        if not bool(torch.isfinite(features).all()):
            raise EvaluateError(
                "the features hold values that are not finite",
                remedy="check the model: its weights or its input images are broken",
            )
        self.num_classes = num_classes
        wide = torch.float32 if features.device.type == "mps" else torch.float64
        self._mean = features.to(wide).mean(0)  # (D,)
        self._rows = features - self._mean.to(features.dtype)  # (N, D)
        values, self._axes = torch.linalg.eigh((self._rows.T @ self._rows).to(wide) / (4 * len(features)))
        self._values = values.clamp(min=0)  # (D,)
        is_cpu = features.device.type == "cpu"
        self._chunk = _CHUNK_ROWS if is_cpu else max(1, _CHUNK_SCORES_GPU // len(self._present))

    def fit(
        self, l2: float, *, start: LogisticFit | None = None, max_iterations: int = 1000, is_final: bool = True
    ) -> LogisticFit:
        """Find the optimum for one penalty, in the coordinates of the features as given.

        Args:
            l2: strength of the penalty, above 0; scikit-learn's 1 / C.
            start: a fit of the same classes to start from; zeros otherwise.
            max_iterations: bound on the steps.
            is_final: finish with products in float64 where the device is a CPU; else stay in float32 (for a search).
        """
        penalty = l2 / len(self._rows)
        scale = torch.cat([self._values + penalty, self._values.new_full((1,), 0.25)]).rsqrt()  # (D + 1,)
        point = torch.zeros(len(self._present), len(scale), dtype=scale.dtype, device=scale.device)  # (C', D + 1)
        if start is not None:
            weight = start.weight.to(point)[self._present]  # (C', D)
            bias = start.bias.to(point)[self._present].nan_to_num(neginf=0.0) + weight @ self._mean  # (C',)
            point = torch.cat([weight @ self._axes, bias[:, None]], 1) / scale
        values, num_iterations = [math.log(len(point))], 0
        for dtype, tolerance in _PHASES[: 2 if is_final and self._rows.device.type == "cpu" else 1]:

            def closure(dtype: torch.dtype = dtype) -> float:
                value, slope, slope_bias = self._evaluate(*self._unpack(point * scale), penalty, dtype)
                point.grad = torch.cat([slope @ self._axes, slope_bias[:, None]], 1) * scale  # (C', D + 1)
                values.append(value)
                return value

            num_left, change = max_iterations - num_iterations, tolerance * values[-1]
            num_iterations += _descend(point, closure, max_iterations=num_left, tolerance_change=change)
        present, bias = self._unpack(point * scale)  # (C', D), (C',)
        weight = present.new_zeros(self.num_classes, present.shape[1])  # (C, D)
        weight[self._present] = present
        biases = bias.new_full((self.num_classes,), -torch.inf)  # (C,)
        biases[self._present] = bias - present @ self._mean
        return LogisticFit(
            weight=weight,
            bias=biases,
            l2=l2,
            objective=self._evaluate(present, bias, penalty, dtype)[0],
            num_iterations=num_iterations,
            has_converged=num_iterations < max_iterations,
        )

    def _unpack(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        return scaled[:, :-1] @ self._axes.T, scaled[:, -1]  # (C', D), (C',)

    def _evaluate(
        self, weight: Tensor, bias: Tensor, penalty: float, dtype: torch.dtype
    ) -> tuple[float, Tensor, Tensor]:
        """Return the objective and its gradient by weight (C', D) and bias (C',); `dtype` is that of the products."""
        num, narrow = len(self._rows), weight.to(dtype)
        slope, slope_bias, loss = torch.zeros_like(narrow), torch.zeros_like(bias), bias.new_zeros(())
        for rows, labels in zip(self._rows.split(self._chunk), self._labels.split(self._chunk), strict=True):
            rows = rows.to(dtype)  # (n, D)
            scores = torch.addmm(bias.to(narrow)[:, None], narrow, rows.T)  # (C', n)
            log_sums = scores.logsumexp(0)  # (n,)
            loss += (log_sums - scores.gather(0, labels[None])[0]).sum(dtype=loss.dtype)
            residuals = scores.sub_(log_sums).exp_()  # (C', n)
            residuals[labels, torch.arange(len(labels), device=labels.device)] -= 1
            slope.addmm_(residuals, rows)
            slope_bias += residuals.sum(1, dtype=loss.dtype)
        value = float(loss) / num + 0.5 * penalty * float(weight.square().sum())
        return value, slope.to(weight) / num + penalty * weight, slope_bias / num


def _descend(point: Tensor, closure: Callable[[], float], *, max_iterations: int, tolerance_change: float) -> int:
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=max_iterations,
        max_eval=2 * max_iterations + 1,
        history_size=10,  # one of 100 costs more than it saves, most of all on few samples
        tolerance_grad=0.0,
        tolerance_change=tolerance_change,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    return int(optimizer.state[point]["n_iter"])
