"""Which number format forward passes use: bfloat16 where the processor computes it natively."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def has_native_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices in hardware.

    Args:
        device: where the model lies.

    Returns:
        True for GPUs from Ampere on and CPUs with AVX512-BF16 or AMX (oneDNN's own test).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
    return False


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Turn `auto` into the format that will be used.

    Args:
        precision: what the user asked for.
        device: where the model lies.

    Returns:
        `bf16` or `fp32`.
    """
    if precision == "auto":
        return "bf16" if has_native_bf16(device) else "fp32"
    return precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Compute matrix products in the chosen format inside a `with` block.

    Args:
        precision: what the user asked for.
        device: where the model lies.

    Returns:
        A context; it changes nothing for fp32.
    """
    if resolve_precision(precision, device) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
