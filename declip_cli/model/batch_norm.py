"""BatchNorm over the full batch of all ranks, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip_cli.distributed import sum_over_ranks


class FullBatchNorm(nn.Module):
    """BatchNorm whose mean and variance are those of all ranks' samples, with gradient.

    `nn.SyncBatchNorm` does this on accelerators only; this one also runs on CPUs. It takes over the parameters and
    the running statistics of the BatchNorm it replaces, under the same names.

    Args:
        norm: the BatchNorm to replace, affine, with running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.eps = norm.eps
        self.momentum = 0.1 if norm.momentum is None else norm.momentum

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize each channel, (B, C, …) → (B, C, …)."""
        if not self.training:
            return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        dims = [dim for dim in range(inputs.dim()) if dim != 1]
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        values = inputs.float()
        count = torch.full_like(values[0, :1].flatten()[:1], values.numel() / values.shape[1])
        sums = sum_over_ranks(torch.cat([values.sum(dims), count]))
        mean = sums[:-1] / sums[-1]
        centered = values - mean.view(shape)
        variance = sum_over_ranks(centered.square().sum(dims)) / sums[-1]
        self._track(mean.detach(), variance.detach() * sums[-1].detach() / (sums[-1].detach() - 1).clamp_min(1))
        normed = centered * (variance + self.eps).rsqrt().view(shape)
        return (normed * self.weight.view(shape) + self.bias.view(shape)).to(inputs.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)


def use_full_batch_norm(module: nn.Module, *, is_accelerator: bool) -> None:
    """Replace every BatchNorm below a module by one over all ranks.

    Args:
        module: changed in place.
        is_accelerator: whether it runs where `nn.SyncBatchNorm` does.
    """
    if is_accelerator:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, FullBatchNorm(child))
        else:
            use_full_batch_norm(child, is_accelerator=is_accelerator)
