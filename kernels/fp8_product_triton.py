"""Products in FP8: rounding in Triton, products by the vendor; maths, arguments and reference are in `fp8_product.py`.

Rounding is one pass over rows that lie in one piece. Columns of a matrix (a weight in the backward pass) take a pass
for their maxima and one that rounds and transposes.

Maxima are found on the bits of |x| as integers, of which infinities and NaN are the largest. Rounding is done in
float32, to nearest and ties to even, so that the conversion has nothing left to round: in Triton's interpreter it
does not round as the device does.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require_dtype
from kernels.fp8_product import check, reshaped
from kernels.operation import operation

FAST_SUMS = True
"""Sum up in the matrix units alone, not in float32 after every 128 terms. On an H100 that is off by 0.8e-3 (2048 terms)
to 2.4e-3 (11008) where rounding the operands is off by 3.8e-2, and takes 9 to 18 % less time."""


@triton.jit
def _scales(largest):
    """Scale, and its inverse, of values whose largest magnitude has the float32 bits `largest`."""
    field = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    scale = (field << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - field) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < 0x7F800000, scale, float("nan")), inverse


@triton.jit
def _rounded(word, inverse):
    """e4m3 of the bfloat16 values with the bits `word` (int32), times `inverse`."""
    value = (word << 16).to(tl.float32, bitcast=True) * inverse
    bits = value.to(tl.int32, bitcast=True)
    # 1.5 · 2²⁰ times the value's power of two, 2⁻⁶ at least: a float32 there ends where an e4m3 of the value does.
    ruler = (tl.maximum(bits & 0x7F800000, 0x3C800000) + 0x0A400000).to(tl.float32, bitcast=True)
    nearest = ((value + ruler) - ruler).to(tl.int32, bitcast=True)
    signed = nearest | (bits & -0x80000000)  # of a zero too
    return signed.to(tl.float32, bitcast=True).to(tl.float8e4nv)


@triton.jit
def _rows_kernel(x, values, scales, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program. x: the bits, int16."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < K
    word = tl.load(x + row * stride + column, mask=mask, other=0).to(tl.int32)
    scale, inverse = _scales(tl.max(word & 0x7FFF, 0) << 16)
    tl.store(values + row * K + column, _rounded(word, inverse), mask=mask)
    tl.store(scales + row, scale)


@triton.jit
def _column_maxima_kernel(x, largest, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """largest[c] = the float32 bits of max_r |x[r, c]|, which began at 0."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    word = tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0).to(tl.int32)
    tl.atomic_max(largest + column, tl.max(word & 0x7FFF, 0) << 16, mask=column < columns)


@triton.jit
def _columns_kernel(x, largest, values, scales, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """values [columns, rows] of x [rows, columns], a scale a column of x."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    word = tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0).to(tl.int32)
    scale, inverse = _scales(tl.load(largest + column, mask=column < columns, other=0))
    at = column[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(values + at, tl.trans(_rounded(word, inverse[None, :])), mask=tl.trans(mask))
    if tl.program_id(0) == 0:
        tl.store(scales + column, scale, mask=column < columns)


def quantise_rows(x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See the reference of the same name. values: where they go, float8_e4m3fn [rows, columns]."""
    rows, columns = x.shape
    if values is None:
        values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.stride(0) == 1 and x.stride(1) == rows:
        words, tile = x.t().view(torch.int16), (128, 64)
        largest = torch.zeros(rows, dtype=torch.int32, device=x.device)
        grid = triton.cdiv(columns, tile[0]), triton.cdiv(rows, tile[1])
        _column_maxima_kernel[grid](words, largest, columns, rows, *tile, num_warps=4)
        _columns_kernel[grid](words, largest, values, scales, columns, rows, *tile, num_warps=4)
        return values, scales
    words = (x if x.stride(1) == 1 else x.contiguous()).view(torch.int16)
    block = triton.next_power_of_2(columns)
    warps = 4 if block <= 4096 else 8 if block <= 16384 else 16
    _rows_kernel[(rows,)](words, values, scales, words.stride(0), K=columns, BLOCK=block, num_warps=warps)
    return values, scales


class Scratch:
    """Memory that products round into one after the other, a block for each stream: as large as was ever needed.

    Blocks of their own would be split for what a layer keeps, once free, and the next layer's product find none as
    large: of 180 MB (32768 slots of 5504) the next norm takes 134, and 46 are left over, layer by layer.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, size: int, device: torch.device) -> Tensor:
        """So many bytes, until the next call on this stream; host threads that share one must not multiply at once."""
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():  # a graph's memory is its own, and laid out once
                return torch.empty(size, dtype=torch.uint8, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
        if (device, stream) not in self._blocks or self._blocks[device, stream].numel() < size:
            self._blocks.pop((device, stream), None)
            self._blocks[device, stream] = torch.empty(size, dtype=torch.uint8, device=device)
        return self._blocks[device, stream][:size]


_scratch = Scratch()


@operation("tiankong::fp8_product")
def _product(x: Tensor, weight: Tensor) -> Tensor:
    (rows, columns), outputs = x.shape, weight.shape[0]
    if not rows or not outputs:
        return x.new_zeros(rows, outputs)
    bytes_of = rows * columns, outputs * columns
    places = _scratch.take(sum(bytes_of), x.device).view(torch.float8_e4m3fn).split(bytes_of)
    values, scales = quantise_rows(x, places[0].view(rows, columns))
    weights, weight_scales = quantise_rows(weight, places[1].view(outputs, columns))
    return torch._scaled_mm(
        values, weights.t(), scales[:, None], weight_scales[None, :], out_dtype=x.dtype, use_fast_accum=FAST_SUMS
    )


@_product.fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


def fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    """See the reference of the same name; x and weight are bfloat16."""
    check(x, weight)
    require_dtype("fp8_product", "x", x, torch.bfloat16)
    return reshaped(_product(x.reshape(-1, x.shape[-1]), weight), x)
