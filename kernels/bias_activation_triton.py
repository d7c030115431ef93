"""Bias + activation in Triton; maths, arguments and the reference are in `bias_activation.py`.

One pass forward and one backward. Nothing is reduced along a row, so a program owns a strip of columns and walks down a
range of rows; the bias gradient is the strip's running column sum, written once a program and added up at the end.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bias_activation import GATED, KINDS, check
from kernels.operation import operation
from kernels.shared_triton import column_sums, let_next_start, multiprocessors, starts_early, wait_for_last

GEGLU, SWIGLU, GELU, GELU_TANH = (tl.constexpr(i) for i in range(4))  # in the order of KINDS


@triton.jit
def activated(y, KIND: tl.constexpr):
    """The activation of float32 y and its slope; KIND: its number in `KINDS`."""
    if KIND == SWIGLU:
        sigmoid = 1.0 / (1.0 + tl.exp(-y))
        return y * sigmoid, sigmoid * (1.0 + y * (1.0 - sigmoid))
    if KIND == GELU_TANH:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner))
        slope = 0.5 * (1.0 + tanh)
        slope += 0.5 * y * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * y * y)
        return 0.5 * y * (1.0 + tanh), slope
    cdf = 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
    return y * cdf, cdf + y * 0.3989422804014327 * tl.exp(-0.5 * y * y)


@triton.jit
def _load(x, bias, row, column, mask, width, HAS_BIAS: tl.constexpr):
    y = tl.load(x + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _forward_kernel(
    x, bias, out, rows,
    F: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_last(EARLY)
    GATE: tl.constexpr = KIND < 2
    width = 2 * F if GATE else F
    STRIPS: tl.constexpr = (F + C - 1) // C
    column = tl.program_id(0) % STRIPS * C + tl.arange(0, C)
    row = (tl.program_id(0) // STRIPS).to(tl.int64) * R + tl.arange(0, R)
    mask = (row < rows)[:, None] & (column < F)[None, :]
    y = _load(x, bias, row, column, mask, width, HAS_BIAS)
    if GATE:
        gate, _ = activated(_load(x, bias, row, F + column, mask, width, HAS_BIAS), KIND)
        y *= gate
    else:
        y, _ = activated(y, KIND)
    tl.store(out + row[:, None] * F + column[None, :], y, mask=mask)


@triton.jit
def _backward_kernel(
    x, bias, dout, dx, part, rows, rows_each,
    F: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """part: float32 [row ranges, width], the column sums of dx over a range of rows."""
    GATE: tl.constexpr = KIND < 2
    width = 2 * F if GATE else F
    column = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.program_id(1).to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, rows)
    sum_linear = tl.zeros([R, C], tl.float32)
    sum_gate = tl.zeros([R, C], tl.float32)
    for start in tl.range(first, last, R, num_stages=STAGES):
        row = start + tl.arange(0, R)
        mask = (row < last)[:, None] & (column < F)[None, :]
        at = row[:, None] * width + column[None, :]
        grad = tl.load(dout + row[:, None] * F + column[None, :], mask=mask, other=0.0).to(tl.float32)
        y = _load(x, bias, row, column, mask, width, HAS_BIAS)
        if GATE:
            value, slope = activated(_load(x, bias, row, F + column, mask, width, HAS_BIAS), KIND)
            d_gate = grad * y * slope
            grad *= value
            tl.store(dx + at + F, d_gate, mask=mask)
            sum_gate += d_gate
        else:
            _, slope = activated(y, KIND)
            grad *= slope
        tl.store(dx + at, grad, mask=mask)
        sum_linear += grad
    if HAS_BIAS:
        to = part + tl.program_id(1).to(tl.int64) * width + column
        tl.store(to, tl.sum(sum_linear, 0), mask=column < F)
        if GATE:
            tl.store(to + F, tl.sum(sum_gate, 0), mask=column < F)


FORWARD_TILE = (4, 512, 4)  # rows, columns, warps
BACKWARD_TILE = (4, 128, 4)
BACKWARD_PROGRAMS = 16  # a multiprocessor
BACKWARD_STAGES = 1


@operation("tiankong::bias_activation")
def _forward(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    features = x.shape[-1] // (2 if KINDS[kind] in GATED else 1)
    rows = x.numel() // x.shape[-1]
    out = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    r, c, warps = FORWARD_TILE
    early = starts_early(x.device, rows)
    if rows:
        _forward_kernel[(triton.cdiv(features, c) * triton.cdiv(rows, r),)](  # a second axis ends at 65535
            x, bias, out, rows,
            F=features, KIND=kind, HAS_BIAS=bias is not None, R=r, C=c, EARLY=early, num_warps=warps, launch_pdl=early,
        )  # fmt: skip
    return out


@_forward.fake
def _(x, bias, kind):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // (2 if KINDS[kind] in GATED else 1))


@operation("tiankong::bias_activation_backward")
def _backward(dout: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """dx, and the bias gradient in float32 (empty without a bias)."""
    width = x.shape[-1]
    features, rows = dout.shape[-1], x.numel() // width
    dx = torch.empty_like(x)
    r, c, warps = BACKWARD_TILE
    strips = triton.cdiv(features, c)
    ranges = max(1, min(triton.cdiv(rows, r), BACKWARD_PROGRAMS * multiprocessors(x.device) // strips))
    rows_each = triton.cdiv(triton.cdiv(rows, ranges), r) * r
    ranges = triton.cdiv(rows, rows_each) if rows else 1
    has_bias = bias is not None
    part = torch.zeros(ranges, 1, width, dtype=torch.float32, device=x.device) if has_bias else x.new_empty(0)
    if rows:
        _backward_kernel[(strips, ranges)](
            x,
            bias,
            dout,
            dx,
            part,
            rows,
            rows_each,
            F=features,
            KIND=kind,
            HAS_BIAS=has_bias,
            R=r,
            C=c,
            STAGES=BACKWARD_STAGES,
            num_warps=warps,
        )
    return dx, column_sums(part)[0].clone() if has_bias else x.new_empty(0, dtype=torch.float32)


@_backward.fake
def _(dout, x, bias, kind):
    return torch.empty_like(x), x.new_empty(0 if bias is None else x.shape[-1], dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _derivative(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = _backward(dout.contiguous(), x, bias, ctx.kind)
    return dx, None if bias is None else dbias.to(bias.dtype), None


_forward.differentiate(_derivative, _setup)


def bias_activation(x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    """activation(x + bias) by the Triton kernels; see `kernels.bias_activation.bias_activation`."""
    check(x, bias, kind)
    return _forward(x.contiguous(), None if bias is None else bias.contiguous(), KINDS.index(kind))
