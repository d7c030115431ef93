"""Residual + norm by the Triton kernels of `residual_norm_kernels.py`: launch shapes, registration, autograd.

Maths, arguments and the reference are in `residual_norm.py`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# what torch.library calls back takes no annotations

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.operation import operation
from kernels.random import Dropout, active
from kernels.residual_norm import check
from kernels.residual_norm_kernels import backward_kernel, column_kernel, forward_kernel
from kernels.shared_triton import column_sums, multiprocessors, pieces, starts_early

WIDE = 8192  # rows longer than this take their column sums from column_kernel
WIDE_ROWS = (16, 8)  # warps a program, programs a multiprocessor of the row kernel there
WIDE_TILE = (4, 256, 4, 12)  # rows, columns, warps, programs a multiprocessor of column_kernel


def launch_shape(hidden: int, backward: bool) -> tuple[int, int, int]:
    """(warps a program, programs a multiprocessor, stages of the row pipeline) by row length."""
    if backward:
        if hidden <= 1024:
            return 4, 8, 1
        if hidden <= 4096:
            return 8, 1, 5
        return 8, 1, 1
    if hidden <= 1024:
        return 2, 16, 1
    if hidden <= 4096:
        return 8, 16, 1
    return 16, 16, 1


def _options(
    hidden: int, f: Tensor | None, bias: Tensor | None, rms: bool, want_sum: bool, probability: float
) -> dict[str, int | bool]:
    a, b = pieces(hidden)
    return {
        "H": hidden,
        "A": a,
        "B": b,
        "HAS_F": f is not None,
        "HAS_BIAS": bias is not None,
        "RMS": rms,
        "WANT_SUM": want_sum,
        "THRESHOLD": min(round(probability * 2**32), 2**32 - 1),
    }


@operation("tiankong::residual_norm")
def _forward(
    x: Tensor, f: Tensor | None, bias: Tensor | None, weight: Tensor, norm_bias: Tensor | None,
    samples: Tensor | None, key: int, first_position: int, probability: float, alpha: float, eps: float,
    rms: bool, want_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, sum (empty unless wanted), mean (empty for RMS) and 1/√(var + ε) of every row."""
    hidden, rows = x.shape[-1], x.numel() // x.shape[-1]
    out = torch.empty_like(x)
    sums = torch.empty_like(x) if want_sum else x.new_empty(0)
    mean = torch.empty(0 if rms else rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    warps, each, stages = launch_shape(hidden, backward=False)
    positions = x.shape[-2] if x.dim() > 1 else 1
    early = starts_early(x.device, rows)
    if rows:
        forward_kernel[(min(rows, each * multiprocessors(x.device)),)](
            x, f, bias, weight, norm_bias, samples, out, sums, mean, rstd, rows, positions, first_position, key,
            alpha, eps, 1.0 / (1.0 - probability),
            HAS_SHIFT=norm_bias is not None, **_options(hidden, f, bias, rms, want_sum, probability),
            STAGES=stages, EARLY=early, num_warps=warps, launch_pdl=early,
        )  # fmt: skip
    return out, sums, mean, rstd


@_forward.fake
def _(x, f, bias, weight, norm_bias, samples, key, first_position, probability, alpha, eps, rms, want_sum):
    rows = x.numel() // x.shape[-1]
    stats = x.new_empty(rows, dtype=torch.float32)
    return (
        torch.empty_like(x),
        torch.empty_like(x) if want_sum else x.new_empty(0),
        x.new_empty(0, dtype=torch.float32) if rms else stats,
        torch.empty_like(stats),
    )


@operation("tiankong::residual_norm_backward")
def _backward(
    dout: Tensor, dsums: Tensor | None, x: Tensor, f: Tensor | None, bias: Tensor | None, weight: Tensor,
    samples: Tensor | None, mean: Tensor, rstd: Tensor, key: int, first_position: int, probability: float,
    alpha: float, rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, df (empty without f) and float32 [3, hidden]: the gradients of weight, norm_bias and bias."""
    hidden, rows = x.shape[-1], x.numel() // x.shape[-1]
    dx = torch.empty_like(x)
    df = torch.empty_like(x) if f is not None else x.new_empty(0)
    wide = hidden > WIDE
    warps, each, stages = (*WIDE_ROWS, 1) if wide else launch_shape(hidden, backward=True)
    programs = min(rows, each * multiprocessors(x.device))
    positions = x.shape[-2] if x.dim() > 1 else 1
    if not rows:
        return dx, df, torch.zeros(3, hidden, dtype=torch.float32, device=x.device)
    options = _options(hidden, f, bias, rms, dsums is not None, probability)
    scalars = (rows, positions, first_position, key, alpha, 1.0 / (1.0 - probability))
    part = torch.empty(1 if wide else programs, 3, hidden, dtype=torch.float32, device=x.device)
    moments = torch.empty(rows if wide else 1, 2, dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        x, f, bias, weight, samples, dout, dsums, dx, df, part, mean, rstd, moments, *scalars,
        **options, STAGES=stages, SUMS=not wide, num_warps=warps,
    )  # fmt: skip
    if wide:
        tile, columns, warps, each = WIDE_TILE
        strips = triton.cdiv(hidden, columns)
        rows_each = triton.cdiv(rows, max(1, each * multiprocessors(x.device) // strips))
        part = torch.empty(triton.cdiv(rows, rows_each), 3, hidden, dtype=torch.float32, device=x.device)
        del options["A"], options["B"]
        column_kernel[(strips, part.shape[0])](
            x, f, bias, weight, samples, dout, dsums, part, mean, rstd, moments, *scalars, rows_each,
            T=tile, CH=columns, **options, num_warps=warps,
        )  # fmt: skip
    return dx, df, column_sums(part)


@_backward.fake
def _(dout, dsums, x, f, bias, weight, samples, mean, rstd, key, first_position, probability, alpha, rms):
    return (
        torch.empty_like(x),
        torch.empty_like(x) if f is not None else x.new_empty(0),
        x.new_empty(3, x.shape[-1], dtype=torch.float32),
    )


def _setup(ctx, inputs, output):
    x, f, bias, weight, norm_bias, samples, key, first_position, probability, alpha, _, rms, want_sum = inputs
    _, _, mean, rstd = output
    ctx.save_for_backward(x, f, bias, weight, samples, mean, rstd)
    ctx.options = (key, first_position, probability, alpha, rms)
    ctx.want_sum, ctx.shift_dtype = want_sum, None if norm_bias is None else norm_bias.dtype
    ctx.set_materialize_grads(False)


def _derivative(ctx, dout, dsums, _mean, _rstd):
    x, f, bias, weight, samples, mean, rstd = ctx.saved_tensors
    dout = torch.zeros_like(x) if dout is None else dout.contiguous()
    dsums = dsums.contiguous() if ctx.want_sum and dsums is not None else None
    dx, df, columns = _backward(dout, dsums, x, f, bias, weight, samples, mean, rstd, *ctx.options)
    return (
        dx,
        None if f is None else df,
        None if bias is None else columns[2].to(bias.dtype),
        columns[0].to(weight.dtype),
        None if ctx.shift_dtype is None else columns[1].to(ctx.shift_dtype),
        *(None,) * 8,
    )


_forward.differentiate(_derivative, _setup)


def residual_norm(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    kind: str = "layernorm",
    dropout: Dropout | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(α·x + drop(f + bias)) by the Triton kernels; see `kernels.residual_norm.residual_norm`."""
    check(x, f, bias, weight, norm_bias, kind, dropout)
    dropout = active(dropout)
    samples, key, first, probability = None, 0, 0, 0.0
    if dropout is not None:
        samples, key, first = dropout.sample_index.contiguous(), dropout.key, dropout.offset
        probability = dropout.probability
    vectors = (None if bias is None else bias.contiguous(), weight.contiguous())
    shift = None if norm_bias is None else norm_bias.contiguous()
    out, sums, _, _ = _forward(
        x.contiguous(), None if f is None else f.contiguous(), *vectors, shift, samples, key, first, probability,
        alpha, eps, kind == "rmsnorm", return_sum,
    )  # fmt: skip
    return (out, sums) if return_sum else out
