"""Products in FP8: y = x Wᵀ of values rounded to e4m3, with a scale for each row of x and of W.

    s(v) = the least power of two with max |v| / s ≤ 448        q(v) = e4m3(v / s(v))
    y[i, j] = s(x_i) · s(w_j) · Σ_k q(x_i)[k] · q(w_j)[k]        summed in float32, rounded once

e4m3 (arXiv 2209.05433) keeps four significant bits, so rounding is off by a value's 2⁻⁴ at most. That holds down to
1/14336 of the row's largest value; below, it is off by 1/229376 of that at most. Hence a scale a row: a slot whose
gradient is a thousand times smaller than its neighbour's keeps its bits.

Scales are powers of two: dividing by one is exact, and above those 1/14336 a value is rounded alike under any of them.
So the backward pass, which scales W by columns (dx = dy W is this product of dy and Wᵀ), sees the weight that the
forward pass saw, and so do tensor-parallel ranks, which scale pieces of rows.

Infinite and NaN values make their row's scale NaN, and with it all that the row gives.

Least possible traffic of rounding n values: 3 n bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import require_device, require_dtype, require_float

UNIT = 16
"""Columns and outputs of a product come in multiples of this, as the device's FP8 products want them."""


def runs_on(device: torch.device) -> bool:
    """Whether the device multiplies so: NVIDIA's from Hopper on do, and a CPU by the reference."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type == "cpu"
    return torch.cuda.get_device_capability(device) >= (9, 0)


def check(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError where `fp8_product` cannot take these."""
    op = "fp8_product"
    require_float(op, x=x)
    require_dtype(op, "weight", weight, x.dtype)
    require_device(op, x.device, weight=weight)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)} and weight {list(weight.shape)}; expected [..., columns] and "
            "[outputs, columns]"
        )
    for name, size in (("outputs", weight.shape[0]), ("columns", weight.shape[1])):
        if size % UNIT:
            raise ValueError(f"{op}: weight has {size} {name}; FP8 products need a multiple of {UNIT}")


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [rows, columns] of x [rows, columns], and float32 scales [rows]: x ≈ values · scale.

    A row of zeros has the scale 2⁻¹²⁶.
    """
    bits = x.abs().amax(1).float().view(torch.int32)
    # 448 = 1.75 · 2⁸: the exponent of the maximum less 8, and one more where its significand is over 1.75.
    field = (((bits + 0x1FFFFF) >> 23) - 8).clamp(min=1)
    scale, inverse = (field << 23).view(torch.float32), ((254 - field) << 23).view(torch.float32)
    values = (x.float() * inverse[:, None]).to(torch.float8_e4m3fn)
    return values, torch.where(bits < 0x7F800000, scale, torch.nan)


def fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., columns] times weight [outputs, columns], both rounded by rows: [..., outputs], the PyTorch reference.

    No gradient: `kernels.linear` has it. Raises ValueError on a wrong shape, dtype or device, or on sizes of the weight
    that are no multiple of UNIT.
    """
    check(x, weight)
    (values, scales), (weights, weight_scales) = quantise_rows(x.reshape(-1, x.shape[-1])), quantise_rows(weight)
    sums = (values.float() * scales[:, None]) @ (weights.float() * weight_scales[:, None]).t()
    return reshaped(sums.to(x.dtype), x)


def reshaped(rows: Tensor, x: Tensor) -> Tensor:
    """rows [product of ..., outputs], nobody else's, as [..., outputs] for x [..., columns].

    Not a view, as the results of PyTorch's products are none: who gets one from an autograd function may write to it.
    """
    result: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
    return result
