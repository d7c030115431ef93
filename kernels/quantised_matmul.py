"""Product with an INT8 or INT4 weight: y = x · dequantise(W)ᵀ, W as `quantised_weight.quantise` packs it.

Decoding reads every weight once a token, so half or a quarter of the bytes is what this is for: the weight stays packed
in memory and is spread out on its way to the multiplier. Least bytes a product of n × k: n·k (INT8) or n·k / 2 (INT4),
and 2·n a group of scales.

This file: the reference, which spreads the whole weight first. The Triton kernel beside it never stores it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import require_device, require_dtype, require_float
from kernels.quantised_weight import dequantise


def check(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> None:
    """Raise a ValueError on a wrong shape, dtype or device; see `quantised_matmul`."""
    op = "quantised_matmul"
    require_float(op, x=x)
    require_dtype(op, "packed", packed, torch.int8)
    require_dtype(op, "scale", scale, torch.float16)
    require_device(op, x.device, packed=packed, scale=scale)
    if bits not in (8, 4):
        raise ValueError(f"{op}: bits={bits}; use 8 or 4")
    columns = packed.shape[-1] * (2 if bits == 4 else 1)
    if packed.dim() != 2 or x.shape[-1] != columns:
        raise ValueError(f"{op}: x has {x.shape[-1]} columns, the weight {columns} of {bits} bits")
    groups = 1 if scale.dim() == 1 else scale.shape[1]
    if scale.shape[0] != packed.shape[0] or columns % groups:
        raise ValueError(f"{op}: scale has shape {list(scale.shape)} for a weight of {packed.shape[0]} x {columns}")


def quantised_matmul(x: Tensor, packed: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """x [..., columns] times a packed weight of [rows, columns]: [..., rows] in x's dtype, the PyTorch reference.

    packed: int8 [rows, columns], or [rows, columns / 2] for 4 bits. scale: fp16 [rows] or [rows, groups]. No gradient
    reaches the weight. Raises ValueError on a wrong shape, dtype or device.
    """
    check(x, packed, scale, bits)
    return F.linear(x, dequantise(packed, scale, bits, x.dtype))
