"""Product with an INT8 or INT4 weight: y = x · dequantise(W)ᵀ, W as `quantised_weight.quantise` packs it; where asked
with the bias and the activation that follow it, y = activation(x · dequantise(W)ᵀ + bias) as in `bias_activation.py`.

Decoding reads every weight once a token, so half or a quarter of the bytes is what this is for: the weight stays packed
in memory and is spread out on its way to the multiplier. Least bytes a product of n × k: n·k (INT8) or n·k / 2 (INT4),
and 2·n a group of scales. A kernel for one row of x takes hardly longer than its launch: the activation comes along.

This file: the reference, which spreads the whole weight first. The Triton kernel beside it never stores it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bias_activation import GATED, KINDS, bias_activation
from kernels.checks import require_choice, require_device, require_dtype, require_float, require_shape
from kernels.quantised_weight import dequantise


def check(x: Tensor, packed: Tensor, scale: Tensor, bits: int, bias: Tensor | None, activation: str | None) -> None:
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
    if activation is not None:
        require_choice(op, "activation", activation, KINDS)
        if activation in GATED and packed.shape[0] % 2:
            raise ValueError(f"{op}: activation={activation!r} needs an even number of rows, not {packed.shape[0]}")
    elif bias is not None:
        raise ValueError(f"{op}: the bias belongs to the activation, and activation is None")
    if bias is not None:
        require_float(op, bias=bias)
        require_shape(op, "bias", bias, (packed.shape[0],))
        require_device(op, x.device, bias=bias)


def quantised_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    *,
    bits: int,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x [..., columns] times a packed weight of [rows, columns]: [..., rows] in x's dtype, the PyTorch reference.

    packed: int8 [rows, columns], or [rows, columns / 2] for 4 bits. scale: fp16 [rows] or [rows, groups]. activation: a
    kind of `bias_activation`, applied to the product and bias [rows]; a gated one returns [..., rows / 2]. No gradient
    reaches the weight. Raises ValueError on a wrong shape, dtype or device.
    """
    check(x, packed, scale, bits, bias, activation)
    product = F.linear(x, dequantise(packed, scale, bits, x.dtype))
    return product if activation is None else bias_activation(product, bias, kind=activation)
