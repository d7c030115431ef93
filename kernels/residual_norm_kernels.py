"""The Triton kernels of residual + norm; launches and autograd are in `residual_norm_triton.py`.

One pass forward (reads x, f; writes out) and one backward (reads x, f, dout; writes dx, df). A program walks over rows;
in the backward it keeps the column sums of its rows (bias, weight, norm_bias gradients) in registers and writes them
once, and a small kernel adds the programs' parts up in a fixed order. The sum is computed again from x and f rather
than stored: the same bytes (5 + 3 against 4 + 4), and exact. A row is held as two powers of two, so that hidden 12288
is 8192 + 4096 and nothing idles; the column sums of rows too long for the registers take a second kernel that reads
x, f and dout again (8 passes instead of 5).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels take no annotations

from __future__ import annotations

import triton
import triton.language as tl

from kernels.shared_triton import keep_run, keep_tile, let_next_start, wait_for_last


@triton.jit
def _piece(
    x, f, bias, row, sample, element, key, alpha, keep_scale,
    H: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, HAS_F: tl.constexpr, HAS_BIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    """One piece of a row of α·x + drop(f + bias): (values, factor that f's gradient gets, mask)."""
    column = START + tl.arange(0, BLOCK)
    mask = column < H if START + BLOCK > H else tl.full([BLOCK], True, tl.int1)
    at = row * H + column
    total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * alpha
    factor = total * 0 + 1.0
    if HAS_F:
        branch = tl.load(f + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            branch += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            keep = keep_run(key, sample, element + START, THRESHOLD, BLOCK, H % 4 == 0)
            factor = tl.where(keep, keep_scale, 0.0)
            branch *= factor
        total += branch
    return total, factor, mask


@triton.jit
def _vectors(weight, norm_bias, START: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """One piece of the weight and, where there is one, of the norm's bias."""
    column = START + tl.arange(0, BLOCK)
    mask = column < H if START + BLOCK > H else tl.full([BLOCK], True, tl.int1)
    factor = tl.load(weight + column, mask=mask, other=0.0)
    shift = tl.load(norm_bias + column, mask=mask, other=0.0) if HAS_SHIFT else factor
    return factor, shift


@triton.jit
def _normed(total, mean, rstd, factor, shift, HAS_SHIFT: tl.constexpr):
    y = (total - mean) * rstd * factor.to(tl.float32)
    if HAS_SHIFT:
        y += shift.to(tl.float32)
    return y


@triton.jit
def forward_kernel(
    x, f, bias, weight, norm_bias, samples, out, sums, means, rstds, rows, positions, first_position, key,
    alpha, eps, keep_scale,
    H: tl.constexpr, A: tl.constexpr, B: tl.constexpr, HAS_F: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr, RMS: tl.constexpr, WANT_SUM: tl.constexpr, THRESHOLD: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    if EARLY:  # read while the last kernel ends
        factor_a, shift_a = _vectors(weight, norm_bias, 0, A, H, HAS_SHIFT)
        if B > 0:
            factor_b, shift_b = _vectors(weight, norm_bias, A, B, H, HAS_SHIFT)
    wait_for_last(EARLY)
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.full([], 0, tl.int64) + index  # int64 offsets; plain in the interpreter too
        sample, element = row * 0, row * 0
        if THRESHOLD > 0:
            sample = tl.load(samples + row // positions)
            element = (first_position + row % positions) * H
        a, _, mask_a = _piece(
            x, f, bias, row, sample, element, key, alpha, keep_scale, H, 0, A, HAS_F, HAS_BIAS, THRESHOLD
        )
        column_a = tl.arange(0, A)
        mean = 0.0
        if B > 0:
            b, _, mask_b = _piece(
                x, f, bias, row, sample, element, key, alpha, keep_scale, H, A, B, HAS_F, HAS_BIAS, THRESHOLD
            )
            column_b = A + tl.arange(0, B)
        if not RMS:
            mean = tl.sum(tl.where(mask_a, a, 0.0), 0)
            if B > 0:
                mean += tl.sum(tl.where(mask_b, b, 0.0), 0)
            mean = mean / H
        centred = tl.where(mask_a, a - mean, 0.0)
        square = tl.sum(centred * centred, 0)
        if B > 0:
            centred_b = tl.where(mask_b, b - mean, 0.0)
            square += tl.sum(centred_b * centred_b, 0)
        rstd = 1.0 / tl.sqrt(square / H + eps)
        if not RMS:
            tl.store(means + row, mean)
        tl.store(rstds + row, rstd)
        if not EARLY:
            factor_a, shift_a = _vectors(weight, norm_bias, 0, A, H, HAS_SHIFT)
        y = _normed(a, mean, rstd, factor_a, shift_a, HAS_SHIFT)
        tl.store(out + row * H + column_a, y, mask=mask_a)
        if WANT_SUM:
            tl.store(sums + row * H + column_a, a, mask=mask_a)
        if B > 0:
            if not EARLY:
                factor_b, shift_b = _vectors(weight, norm_bias, A, B, H, HAS_SHIFT)
            y = _normed(b, mean, rstd, factor_b, shift_b, HAS_SHIFT)
            tl.store(out + row * H + column_b, y, mask=mask_b)
            if WANT_SUM:
                tl.store(sums + row * H + column_b, b, mask=mask_b)


@triton.jit
def _gradient(dout, weight, row, total, mean, rstd, mask, START: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr):
    """(dout, weight · dout, normalised) of a piece, zero outside the row."""
    column = START + tl.arange(0, BLOCK)
    dy = tl.load(dout + row * H + column, mask=mask, other=0.0).to(tl.float32)
    wdy = dy * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    return dy, wdy, tl.where(mask, (total - mean) * rstd, 0.0)


@triton.jit
def _write(
    dx, df, dsums, row, wdy, hat, c1, c2, rstd, factor, alpha, mask,
    START: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, HAS_F: tl.constexpr, WANT_SUM: tl.constexpr,
):  # fmt: skip
    """Store dx and df of a piece; returns df in float32, zero outside the row."""
    column = START + tl.arange(0, BLOCK)
    ds = rstd * (wdy - c1 - hat * c2)
    if WANT_SUM:
        ds += tl.load(dsums + row * H + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + row * H + column, alpha * ds, mask=mask)
    ds = tl.where(mask, ds * factor, 0.0)
    if HAS_F:
        tl.store(df + row * H + column, ds, mask=mask)
    return ds


@triton.jit
def backward_kernel(
    x, f, bias, weight, samples, dout, dsums, dx, df, part, means, rstds, moments, rows, positions, first_position, key,
    alpha, keep_scale,
    H: tl.constexpr, A: tl.constexpr, B: tl.constexpr, HAS_F: tl.constexpr, HAS_BIAS: tl.constexpr,
    RMS: tl.constexpr, WANT_SUM: tl.constexpr, THRESHOLD: tl.constexpr, STAGES: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """part: float32 [programs, 3, H], the program's sums of dout · normalised, dout and df; moments instead without
    SUMS (see column_kernel)."""
    scale_a = tl.zeros([A], tl.float32)
    shift_a = tl.zeros([A], tl.float32)
    bias_a = tl.zeros([A], tl.float32)
    if B > 0:
        scale_b = tl.zeros([B], tl.float32)
        shift_b = tl.zeros([B], tl.float32)
        bias_b = tl.zeros([B], tl.float32)
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.full([], 0, tl.int64) + index  # int64 offsets; plain in the interpreter too
        sample, element = row * 0, row * 0
        if THRESHOLD > 0:
            sample = tl.load(samples + row // positions)
            element = (first_position + row % positions) * H
        rstd = tl.load(rstds + row)
        mean = 0.0
        if not RMS:
            mean = tl.load(means + row)
        total, factor, mask = _piece(
            x, f, bias, row, sample, element, key, alpha, keep_scale, H, 0, A, HAS_F, HAS_BIAS, THRESHOLD
        )
        dy, wdy, hat = _gradient(dout, weight, row, total, mean, rstd, mask, 0, A, H)
        c1 = tl.sum(wdy, 0)
        c2 = tl.sum(wdy * hat, 0)
        if SUMS:
            scale_a += dy * hat
            if not RMS:
                shift_a += dy
        if B > 0:
            total_b, factor_b, mask_b = _piece(
                x, f, bias, row, sample, element, key, alpha, keep_scale, H, A, B, HAS_F, HAS_BIAS, THRESHOLD
            )
            dy_b, wdy_b, hat_b = _gradient(dout, weight, row, total_b, mean, rstd, mask_b, A, B, H)
            c1 += tl.sum(wdy_b, 0)
            c2 += tl.sum(wdy_b * hat_b, 0)
            if SUMS:
                scale_b += dy_b * hat_b
                if not RMS:
                    shift_b += dy_b
        c1 = c1 / H
        if RMS:
            c1 = 0.0
        c2 = c2 / H
        if not SUMS:
            tl.store(moments + 2 * row, c1)
            tl.store(moments + 2 * row + 1, c2)
        ds = _write(dx, df, dsums, row, wdy, hat, c1, c2, rstd, factor, alpha, mask, 0, A, H, HAS_F, WANT_SUM)
        if HAS_BIAS and SUMS:
            bias_a += ds
        if B > 0:
            ds_b = _write(
                dx, df, dsums, row, wdy_b, hat_b, c1, c2, rstd, factor_b, alpha, mask_b, A, B, H, HAS_F, WANT_SUM
            )
            if HAS_BIAS and SUMS:
                bias_b += ds_b
    if SUMS:
        base = part + tl.program_id(0).to(tl.int64) * 3 * H
        column = tl.arange(0, A)
        tl.store(base + column, scale_a, mask=column < H)
        if not RMS:
            tl.store(base + H + column, shift_a, mask=column < H)
        if HAS_BIAS:
            tl.store(base + 2 * H + column, bias_a, mask=column < H)
        if B > 0:
            column_b = A + tl.arange(0, B)
            tl.store(base + column_b, scale_b, mask=column_b < H)
            if not RMS:
                tl.store(base + H + column_b, shift_b, mask=column_b < H)
            if HAS_BIAS:
                tl.store(base + 2 * H + column_b, bias_b, mask=column_b < H)


@triton.jit
def _tile(
    x, f, bias, weight, dout, row, row_mask, start, sample, element, key, alpha, keep_scale, mean, rstd,
    H: tl.constexpr, CH: tl.constexpr, HAS_F: tl.constexpr, HAS_BIAS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """(dout, weight · dout, normalised, factor of f's gradient, mask) of [rows, CH columns], zero outside."""
    column = start + tl.arange(0, CH)
    mask = row_mask[:, None] & (column < H)[None, :]
    at = row[:, None] * H + column[None, :]
    total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * alpha
    factor = total * 0 + 1.0
    if HAS_F:
        branch = tl.load(f + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            branch += tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
        if THRESHOLD > 0:
            keep = keep_tile(key, sample[:, None], (element + start)[:, None], THRESHOLD, CH, H % 4 == 0)
            factor = tl.where(keep, keep_scale, 0.0)
            branch *= factor
        total += branch
    dy = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
    wdy = dy * tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
    return dy, wdy, tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0), factor, mask, at


@triton.jit
def column_kernel(
    x, f, bias, weight, samples, dout, dsums, part, means, rstds, moments, rows, positions, first_position, key,
    alpha, keep_scale, rows_each,
    H: tl.constexpr, T: tl.constexpr, CH: tl.constexpr, HAS_F: tl.constexpr, HAS_BIAS: tl.constexpr,
    RMS: tl.constexpr, WANT_SUM: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """The column sums alone, for rows too long to keep theirs in registers: a strip of CH columns, a range of rows.

    moments: float32 [rows, 2], the row means of weight · dout and of weight · dout · normalised.
    """
    start = tl.program_id(0) * CH
    first = tl.program_id(1).to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, rows)
    scale = tl.zeros([T, CH], tl.float32)
    shift = tl.zeros([T, CH], tl.float32)
    branch = tl.zeros([T, CH], tl.float32)
    for top in range(first, last, T):
        row = tl.full([T], 0, tl.int64) + top + tl.arange(0, T)
        row_mask = row < last
        sample, element = row * 0, row * 0
        if THRESHOLD > 0:
            sample = tl.load(samples + row // positions, mask=row_mask, other=0)
            element = (first_position + row % positions) * H
        rstd = tl.load(rstds + row, mask=row_mask, other=0.0)
        mean = rstd * 0.0
        if not RMS:
            mean = tl.load(means + row, mask=row_mask, other=0.0)
        dy, wdy, hat, factor, mask, at = _tile(
            x, f, bias, weight, dout, row, row_mask, start, sample, element, key, alpha, keep_scale, mean, rstd,
            H, CH, HAS_F, HAS_BIAS, THRESHOLD,
        )  # fmt: skip
        scale += dy * hat
        if not RMS:
            shift += dy
        if HAS_BIAS:
            c1 = tl.load(moments + 2 * row, mask=row_mask, other=0.0)
            c2 = tl.load(moments + 2 * row + 1, mask=row_mask, other=0.0)
            ds = rstd[:, None] * (wdy - c1[:, None] - hat * c2[:, None])
            if WANT_SUM:
                ds += tl.load(dsums + at, mask=mask, other=0.0).to(tl.float32)
            branch += tl.where(mask, ds * factor, 0.0)
    column = start + tl.arange(0, CH)
    to = part + tl.program_id(1).to(tl.int64) * 3 * H + column
    tl.store(to, tl.sum(scale, 0), mask=column < H)
    tl.store(to + H, tl.sum(shift, 0), mask=column < H)
    tl.store(to + 2 * H, tl.sum(branch, 0), mask=column < H)
