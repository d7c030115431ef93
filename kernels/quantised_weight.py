"""Weight-only INT8 and INT4: symmetric integers with one fp16 scale a row, or a group of a row (GLM-130B's layout).

    scale = fp16(absmax / (2^(bits−1) − 1)),  q = round(w / scale),  w ≈ q · scale       (arXiv 2210.02414, section 3.4)

INT4 keeps two values a byte along the input dimension: the even column in the high nibble, the odd one in the low, both
in two's complement. The stored pair is `weight` int8 [rows, columns] ([rows, columns / 2] for INT4) and `weight_scale`
fp16 [rows], or [rows, groups] with groups of equal, consecutive columns.

These functions are the reference of every dequantise-matmul, and what the converter writes and reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import require_dtype, require_float

BITS = (8, 4)
SCALE_SUFFIX = "_scale"
"""A scale is stored under the weight's key and this."""


def quantise(weight: Tensor, bits: int, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Packed integers and scales of a weight [rows, columns] of any float dtype.

    group_size: columns that share a scale; None means the whole row. Returns (int8 [rows, columns] or, for 4 bits,
    [rows, columns / 2]; fp16 [rows] or [rows, columns / group_size]). A row of zeros gets scale 0. Raises ValueError on
    non-finite values, on scales beyond fp16, and on columns that do not divide.
    """
    _check_bits(bits)
    require_float("quantise", weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"quantise: weight has shape {list(weight.shape)}; expected [rows, columns]")
    rows, columns = weight.shape
    if columns % (group_size or 1) or (bits == 4 and columns % 2):
        raise ValueError(f"quantise: {columns} columns do not divide by group_size={group_size}, or by 2 for 4 bits")
    largest = 2 ** (bits - 1) - 1
    grouped = weight.float().view(rows, -1, group_size or columns)
    scale = (grouped.abs().amax(-1) / largest).half()
    if not scale.isfinite().all():
        raise ValueError("quantise: the weight holds non-finite values, or values too large for a scale in fp16")
    # A scale that underflows to 0 stands for a row of zeros.
    divisor = torch.where(scale == 0, torch.inf, scale.float())
    values = (grouped / divisor[..., None]).round_().clamp_(-largest, largest).to(torch.int8).view(rows, columns)
    return (pack_int4(values) if bits == 4 else values), (scale if group_size else scale[:, 0])


def dequantise(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [rows, columns] that `quantise`'s pair stands for: q · scale in fp32 (exact), then cast to `dtype`.

    Raises ValueError on wrong dtypes, or where the scales do not fit the rows.
    """
    _check_bits(bits)
    require_dtype("dequantise", "packed", packed, torch.int8)
    require_dtype("dequantise", "scale", scale, torch.float16)
    values = unpack_int4(packed) if bits == 4 else packed
    rows, columns = values.shape
    groups = scale.numel() // max(1, rows)
    if scale.shape[0] != rows or groups == 0 or columns % groups:
        raise ValueError(f"dequantise: scale has shape {list(scale.shape)} for a weight of {rows} x {columns}")
    spread = scale.float().view(rows, groups, 1)
    return (values.float().view(rows, groups, -1) * spread).view(rows, columns).to(dtype)


def pack_int4(values: Tensor) -> Tensor:
    """int8 values in [−8, 7], [..., n], two a byte: int8 [..., n / 2], even ones in the high nibble."""
    even, odd = values[..., 0::2], values[..., 1::2]
    return (even << 4) | (odd & 0x0F)


def unpack_int4(packed: Tensor) -> Tensor:
    """The int8 values [..., n] that `pack_int4` put into [..., n / 2]."""
    # Shifts of int8 keep the sign: up and down again spreads the low nibble's.
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"quantise: bits={bits}; use 8 or 4")
