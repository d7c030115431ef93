"""Bias + rotary in Triton; maths, arguments and the reference are in `rotary.py`.

One pass forward (bias and turn) and one backward (turn back and the bias gradient's column sums). A program owns a few
heads and a range of tokens: a token's cosines and sines are computed once and serve all its heads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.operation import operation
from kernels.rotary import check, rotary_frequencies
from kernels.shared_triton import column_sums, let_next_start, multiprocessors, starts_early, wait_for_last

TILE_TOKENS = 4
TILE_COLUMNS = 1024  # heads a program · head_dim
WARPS = 8
PROGRAMS = 8  # a multiprocessor
STAGES = 1


@triton.jit
def _kernel(
    x, bias, positions, inverse, out, part, tokens, length, tokens_each, position_row, position_axis,
    HEADS: tl.constexpr, D: tl.constexpr, PERIOD: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr,
    AXIS_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, FP16: tl.constexpr, HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr, T: tl.constexpr, HB: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Tiles [T tokens, HB heads, P pairs]; part: float32 [ranges, HEADS · D], column sums of the backward."""
    let_next_start(EARLY)
    head = tl.program_id(0) * HB + tl.arange(0, HB)
    pair = tl.arange(0, P)
    axis = pair // AXIS_PAIRS
    within = pair % AXIS_PAIRS
    if INTERLEAVED:
        first_dim = axis * 2 * AXIS_PAIRS + 2 * within
        second_dim = first_dim + 1
    else:
        first_dim = axis * 2 * AXIS_PAIRS + within
        second_dim = first_dim + AXIS_PAIRS
    head_mask = head < HEADS
    pair_mask = pair < PAIRS
    place_mask = head_mask[:, None] & pair_mask[None, :]
    column_a = head[:, None] * D + first_dim[None, :]  # [HB, P]
    column_b = head[:, None] * D + second_dim[None, :]
    turned = ((head % PERIOD) < TURNED)[None, :, None]
    theta = tl.load(inverse + pair, mask=pair_mask, other=0.0)
    if HAS_BIAS and not BACKWARD:
        bias_a = tl.load(bias + column_a, mask=place_mask, other=0.0).to(tl.float32)[None, :, :]
        bias_b = tl.load(bias + column_b, mask=place_mask, other=0.0).to(tl.float32)[None, :, :]
    wait_for_last(EARLY)
    sum_a = tl.zeros([T, HB, P], tl.float32)
    sum_b = tl.zeros([T, HB, P], tl.float32)
    if REST > 0:
        rest = 2 * PAIRS + tl.arange(0, REST)
        rest_mask = head_mask[:, None] & (rest < D)[None, :]
        column_c = head[:, None] * D + rest[None, :]
        sum_c = tl.zeros([T, HB, REST], tl.float32)
    start_token = tl.program_id(1).to(tl.int64) * tokens_each
    last = tl.minimum(start_token + tokens_each, tokens)
    for start in tl.range(start_token, last, T, num_stages=STAGES):
        token = start + tl.arange(0, T)
        token_mask = token < last
        spot = (token // length) * position_row + token % length
        at_axis = (axis * position_axis)[None, :]
        position = tl.load(positions + spot[:, None] + at_axis, mask=token_mask[:, None], other=0)
        if FP16:
            angle = (position.to(tl.float16).to(tl.float32) * theta[None, :]).to(tl.float16).to(tl.float32)
            cos = tl.cos(angle).to(tl.float16).to(tl.float32)
            sin = tl.sin(angle).to(tl.float16).to(tl.float32)
        else:
            angle = position.to(tl.float32) * theta[None, :]
            cos = tl.cos(angle)
            sin = tl.sin(angle)
        if BACKWARD:
            sin = -sin
        cos = tl.where(turned, cos[:, None, :], 1.0)
        sin = tl.where(turned, sin[:, None, :], 0.0)
        mask = token_mask[:, None, None] & place_mask[None, :, :]
        base = token[:, None, None] * (HEADS * D)
        a = tl.load(x + base + column_a[None, :, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + base + column_b[None, :, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS and not BACKWARD:
            a += bias_a
            b += bias_b
        new_a = a * cos - b * sin
        new_b = b * cos + a * sin
        tl.store(out + base + column_a[None, :, :], new_a, mask=mask)
        tl.store(out + base + column_b[None, :, :], new_b, mask=mask)
        if REST > 0:
            mask = token_mask[:, None, None] & rest_mask[None, :, :]
            c = tl.load(x + base + column_c[None, :, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS and not BACKWARD:
                c += tl.load(bias + column_c, mask=rest_mask, other=0.0).to(tl.float32)[None, :, :]
            tl.store(out + base + column_c[None, :, :], c, mask=mask)
            if HAS_BIAS and BACKWARD:
                sum_c += c
        if HAS_BIAS and BACKWARD:
            sum_a += new_a
            sum_b += new_b
    if HAS_BIAS and BACKWARD:
        to = part + tl.program_id(1).to(tl.int64) * (HEADS * D)
        tl.store(to + column_a, tl.sum(sum_a, 0), mask=place_mask)
        tl.store(to + column_b, tl.sum(sum_b, 0), mask=place_mask)
        if REST > 0:
            tl.store(to + column_c, tl.sum(sum_c, 0), mask=rest_mask)


@functools.cache
def _inverse(
    rotary_dim: int, axes: int, base: float, scale: float, ramp_from: float, ramp_to: float, fp16: bool,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """θ' of every pair, float32 [rotary_dim / 2]."""
    theta = rotary_frequencies(rotary_dim // axes, base, scale, ramp_from, ramp_to, device)
    return (theta.half().float() if fp16 else theta).repeat(axes)


def _launch(
    x: Tensor, bias: Tensor | None, positions: Tensor, has_bias: bool, backward: bool, period: int, passthrough: int,
    rotary_dim: int, axes: int, interleaved: bool, base: float, scale: float, ramp_from: float, ramp_to: float,
    fp16_angles: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Turned x, and the column sums [heads · head_dim] of the result in the backward (else empty)."""
    batch, length, heads, dim = x.shape
    tokens, pairs = batch * length, rotary_dim // 2
    out = torch.empty_like(x)
    block_heads = min(triton.next_power_of_2(heads), max(1, TILE_COLUMNS // triton.next_power_of_2(dim)))
    blocks = triton.cdiv(heads, block_heads)
    ranges = max(1, min(triton.cdiv(tokens, TILE_TOKENS), PROGRAMS * multiprocessors(x.device) // blocks))
    tokens_each = triton.cdiv(triton.cdiv(tokens, ranges), TILE_TOKENS) * TILE_TOKENS
    ranges = triton.cdiv(tokens, tokens_each) if tokens else 0
    sums = has_bias and backward
    early = starts_early(x.device, tokens)
    part = torch.empty(max(1, ranges), 1, heads * dim, dtype=torch.float32, device=x.device) if sums else x.new_empty(0)
    if tokens:
        _kernel[(blocks, ranges)](
            x, bias, positions,
            _inverse(rotary_dim, axes, base, scale, ramp_from, ramp_to, fp16_angles, x.device), out, part,
            tokens, length, tokens_each, positions.stride(0), positions.stride(1),
            HEADS=heads, D=dim, PERIOD=period, TURNED=period - passthrough, PAIRS=pairs, AXIS_PAIRS=pairs // axes,
            INTERLEAVED=interleaved, FP16=fp16_angles, HAS_BIAS=has_bias, BACKWARD=backward,
            T=TILE_TOKENS, HB=block_heads, P=triton.next_power_of_2(pairs),
            REST=0 if dim == rotary_dim else triton.next_power_of_2(dim - rotary_dim),
            STAGES=STAGES, EARLY=early, num_warps=WARPS, launch_pdl=early,
        )  # fmt: skip
    elif sums:
        part.zero_()
    return out, column_sums(part)[0].clone() if sums else x.new_empty(0, dtype=torch.float32)


@operation("tiankong::rotary")
def _forward(
    x: Tensor, bias: Tensor | None, positions: Tensor, period: int, passthrough: int, rotary_dim: int, axes: int,
    interleaved: bool, base: float, scale: float, ramp_from: float, ramp_to: float, fp16_angles: bool,
) -> Tensor:  # fmt: skip
    return _launch(
        x, bias, positions, bias is not None, False, period, passthrough, rotary_dim, axes, interleaved,
        base, scale, ramp_from, ramp_to, fp16_angles,
    )[0]  # fmt: skip


@_forward.fake
def _(x, *options):
    return torch.empty_like(x)


@operation("tiankong::rotary_backward")
def _backward(
    dout: Tensor, positions: Tensor, has_bias: bool, period: int, passthrough: int, rotary_dim: int, axes: int,
    interleaved: bool, base: float, scale: float, ramp_from: float, ramp_to: float, fp16_angles: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx, and the bias gradient in float32 (empty without a bias)."""
    return _launch(
        dout, None, positions, has_bias, True, period, passthrough, rotary_dim, axes, interleaved,
        base, scale, ramp_from, ramp_to, fp16_angles,
    )  # fmt: skip


@_backward.fake
def _(dout, positions, has_bias, *options):
    width = dout.shape[2] * dout.shape[3] if has_bias else 0
    return torch.empty_like(dout), dout.new_empty(width, dtype=torch.float32)


def _setup(ctx, inputs, output):
    _, bias, positions, *ctx.options = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(positions)


def _derivative(ctx, dout):
    (positions,) = ctx.saved_tensors
    dx, dbias = _backward(dout.contiguous(), positions, ctx.bias_dtype is not None, *ctx.options)
    return dx, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), *(None,) * 11


_forward.differentiate(_derivative, _setup)


def rotary(
    x: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    period: int,
    passthrough: int,
    rotary_dim: int,
    mode: str = "1d",
    interleaved: bool = False,
    base: float = 10000.0,
    scale: float = 1.0,
    ramp_from: float = -1.0,
    ramp_to: float = 0.0,
    fp16_angles: bool = False,
) -> Tensor:
    """Bias and rotary positions by the Triton kernel; see `kernels.rotary.rotary`."""
    check(x, bias, positions, period, passthrough, rotary_dim, mode)
    if mode == "none":  # every head passes through
        passthrough, rotary_dim = period, x.shape[-1] // 2 * 2
    # Two rows of a batch's meta, read where they stand.
    positions = positions if positions.stride(2) == 1 else positions.contiguous()
    return _forward(
        x.contiguous(), None if bias is None else bias.contiguous(), positions, period, passthrough,
        rotary_dim, 2 if mode == "2d" else 1, interleaved, base, scale, ramp_from, ramp_to, fp16_angles,
    )  # fmt: skip
