"""Interval attention in Triton: flash attention (Dao 2023, arXiv 2307.08691) whose loops follow the intervals.

Of a block of queries the kernel takes the hull [min attend_from, max attend_to) and skips every block of keys outside
it; keys in [max attend_from, min attend_to) are seen by all of the block's queries and need no mask. The backward
does the same by blocks of keys, from a plan of which blocks of queries see each (`_plan_kernel`).

Softmax and accumulation are float32, so `alpha` changes nothing here. Forward: QKᵀ and PV. Backward in two passes, by
blocks of keys (QKᵀ, dOVᵀ, dV, dK) and by blocks of queries (QKᵀ, dOVᵀ, dQ): seven products where one pass with atomic
additions into dQ has five, but always in the same order, and faster with most tiles tried (docs/kernels.md).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import triton
import triton.language as tl

from kernels.shared_triton import keep_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 30)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _keep(
    key, sample, head, rows, start, queries, keys, THRESHOLD: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr
):
    """Keep bits of a tile: rows [BM] are queries, keys from start on. bool [BM, BN]"""
    first = (head.to(tl.int64) * queries + rows.to(tl.int64)) * keys + start
    return keep_tile(key, sample, first[:, None], THRESHOLD, BN, ALIGNED)


@triton.jit
def _ranges(attend_from, attend_to, batch, rows, queries, keys, BN: tl.constexpr):
    """Intervals of a block of queries, and its loop bounds: (from, to, low, inside_low, inside_high, high).

    Keys [inside_low, inside_high) need no mask, [low, inside_low) and [inside_high, high) do; low, inside_low and
    inside_high are multiples of BN.
    """
    valid = rows < queries
    start = tl.maximum(tl.load(attend_from + batch * queries + rows, mask=valid, other=0), 0)
    stop = tl.minimum(tl.load(attend_to + batch * queries + rows, mask=valid, other=0), keys)
    seen = valid & (start < stop)
    low = tl.min(tl.where(seen, start, FAR), 0)
    high = tl.max(tl.where(seen, stop, 0), 0)
    all_from = tl.max(tl.where(valid, start, 0), 0)
    all_to = tl.min(tl.where(valid, tl.where(seen, stop, 0), FAR), 0)
    low = tl.minimum(low, high) // BN * BN
    inside_low = (all_from + BN - 1) // BN * BN
    inside_high = all_to // BN * BN
    nothing = inside_high <= inside_low  # then all of it is masked, right of low
    inside_low = tl.where(nothing, low, inside_low)
    inside_high = tl.where(nothing, low, inside_high)
    return start, stop, low, inside_low, inside_high, high


@triton.jit
def _unit(logits, inner, SOFTCAP: tl.constexpr):
    """Products of q and k as `x` with logit · log2 e = x · unit, unit > 0: themselves, or their tanh."""
    if SOFTCAP:
        return _tanh(logits * inner)
    return logits


@triton.jit
def _forward_step(
    acc, total, top, raw_top, q, k_desc, v_desc, start, row, k_column, v_column, from_, to_, rows, queries, keys,
    unit, inner, key, sample, head, keep_scale,
    BN: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, WANT_RAW: tl.constexpr,
    THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of keys, from `start` on; row: the first key's row in the descriptors. top is in units of x."""
    k = k_desc.load([row + start, k_column])
    x = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        column = start + tl.arange(0, BN)
        visible = (column[None, :] >= from_[:, None]) & (column[None, :] < to_[:, None])
    if WANT_RAW:
        raw = x
        if MASKED:
            raw = tl.where(visible, x, float("-inf"))
        raw_top = tl.maximum(raw_top, tl.max(raw, 1))
    x = _unit(x, inner, SOFTCAP)
    if MASKED:
        x = tl.where(visible, x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, 1))
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
    base = base * unit
    p = tl.math.exp2(x * unit - base[:, None])
    shrink = tl.math.exp2(top * unit - base)
    total = total * shrink + tl.sum(p, 1)
    if THRESHOLD > 0:
        p = tl.where(_keep(key, sample, head, rows, start, queries, keys, THRESHOLD, BN, ALIGNED), p * keep_scale, 0.0)
    acc = acc * shrink[:, None]
    v = v_desc.load([row + start, v_column])
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_top, raw_top


@triton.jit
def _forward_kernel(
    q_desc, k_desc, v_desc, attend_from, attend_to, samples, out, lse, tops, heads, group, queries, keys,
    q_head, k_head, v_head, unit, inner, raw_unit, key, first_head, keep_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, WANT_MAX: tl.constexpr,
    THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. out [batch, queries, heads, D] and lse [batch, heads, queries] contiguous.

    The descriptors see [batch · positions, columns]; q_head, k_head, v_head: columns from one head to the next.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # under causal masks the last blocks are the longest
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    rows = block * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    valid = rows < queries
    batch64 = batch.to(tl.int64)
    from_, to_, low, inside_low, inside_high, high = _ranges(attend_from, attend_to, batch64, rows, queries, keys, BN)
    q = q_desc.load([batch * queries + block * BM, head * q_head])
    k_column = (head // group) * k_head
    v_column = (head // group) * v_head
    row = batch * keys
    sample = batch64 * 0
    if THRESHOLD > 0:
        sample = tl.load(samples + batch)
    acc = tl.zeros([BM, D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    raw_top = tl.full([BM], float("-inf"), tl.float32)
    WANT_RAW: tl.constexpr = WANT_MAX and SOFTCAP
    for start in tl.range(inside_low, inside_high, BN):
        acc, total, top, raw_top = _forward_step(
            acc, total, top, raw_top, q, k_desc, v_desc, start, row, k_column, v_column, from_, to_, rows,
            queries, keys, unit, inner, key, sample, first_head + head, keep_scale,
            BN, False, SOFTCAP, WANT_RAW, THRESHOLD, ALIGNED,
        )  # fmt: skip
    left = (inside_low - low) // BN
    right = (high - inside_high + BN - 1) // BN
    for i in tl.range(0, left + right):
        start = tl.where(i < left, low + i * BN, inside_high + (i - left) * BN)
        acc, total, top, raw_top = _forward_step(
            acc, total, top, raw_top, q, k_desc, v_desc, start, row, k_column, v_column, from_, to_, rows,
            queries, keys, unit, inner, key, sample, first_head + head, keep_scale,
            BN, True, SOFTCAP, WANT_RAW, THRESHOLD, ALIGNED,
        )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    acc = acc / safe[:, None]
    at = ((batch64 * queries + rows[:, None]) * heads + head) * D + dims[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid[:, None])
    sums = tl.where(total == 0.0, float("-inf"), top * (unit * LN2) + tl.log(safe))
    tl.store(lse + (batch64 * heads + head) * queries + rows, sums, mask=valid)
    if WANT_MAX:
        largest = raw_top if WANT_RAW else top
        largest = tl.max(tl.where(valid, largest, float("-inf")), 0)
        tl.store(tops + (batch64 * heads + head) * tl.num_programs(0) + block, largest * raw_unit)


@triton.jit
def _delta_kernel(out, dout, delta, rows_total, heads, queries, D: tl.constexpr, BR: tl.constexpr):
    """delta[batch, head, query] = Σ_d out · dout, from contiguous [batch, queries, heads, D]."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    valid = row < rows_total
    o = tl.load(out + at, mask=valid[:, None], other=0.0).to(tl.float32)
    do = tl.load(dout + at, mask=valid[:, None], other=0.0).to(tl.float32)
    head = row % heads
    query = (row // heads) % queries
    batch = row // (heads * queries)
    tl.store(delta + (batch * heads + head) * queries + query, tl.sum(o * do, 1), mask=valid)


@triton.jit
def _plan_kernel(attend_from, attend_to, plan, queries, keys, NQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """For a block of keys: blocks of queries [p0, p3) may see it, [p1, p2) see all. plan: int32 [B, blocks, 4]."""
    block = tl.program_id(0)
    batch = tl.program_id(1)
    first = block * BN
    row = tl.arange(0, NQ)[:, None] * BM + tl.arange(0, BM)[None, :]
    valid = row < queries
    start = tl.maximum(tl.load(attend_from + batch.to(tl.int64) * queries + row, mask=valid, other=0), 0)
    stop = tl.minimum(tl.load(attend_to + batch.to(tl.int64) * queries + row, mask=valid, other=0), keys)
    some = tl.max((valid & (start < stop) & (start < first + BN) & (stop > first)).to(tl.int32), 1)  # [NQ]
    every = tl.min(((~valid) | ((start <= first) & (stop >= first + BN))).to(tl.int32), 1) * some
    index = tl.arange(0, NQ)
    low = tl.min(tl.where(some > 0, index, NQ), 0)
    high = tl.max(tl.where(some > 0, index + 1, 0), 0)
    inside_low = tl.min(tl.where(every > 0, index, NQ), 0)
    inside_high = tl.max(tl.where(every > 0, index + 1, 0), 0)
    gaps = (inside_high - inside_low) != tl.sum(every, 0)  # not one run: mask all of it
    low = tl.minimum(low, high)
    inside_low = tl.where(gaps, low, inside_low)
    inside_high = tl.where(gaps, low, inside_high)
    base = plan + (batch * tl.num_programs(0) + block) * 4
    tl.store(base, low)
    tl.store(base + 1, inside_low)
    tl.store(base + 2, inside_high)
    tl.store(base + 3, high)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_desc, do_desc, lse_base, delta_base, from_base, to_base, block, start, row, q_column,
    column, queries, keys, unit, inner, key, sample, head, keep_scale,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
    THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of queries against the program's block of keys; the tile is held transposed, [BN, BM]."""
    rows = block * BM + tl.arange(0, BM)
    valid = rows < queries
    q = q_desc.load([row + block * BM, q_column])
    # beyond the last query the descriptors read the next sample's rows: an infinite lse makes their probabilities 0
    lse = tl.load(lse_base + rows, mask=valid, other=float("inf")) * LOG2E
    x = _unit(tl.dot(k, tl.trans(q), input_precision="ieee"), inner, SOFTCAP)
    p = tl.math.exp2(x * unit - lse[None, :])
    if MASKED:
        from_ = tl.load(from_base + rows, mask=valid, other=0)
        to_ = tl.minimum(tl.load(to_base + rows, mask=valid, other=0), keys)
        place = start + tl.arange(0, BN)
        p = tl.where((place[:, None] >= from_[None, :]) & (place[:, None] < to_[None, :]), p, 0.0)
    do = do_desc.load([row + block * BM, column])
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    dropped = p
    if THRESHOLD > 0:
        keep = tl.trans(_keep(key, sample, head, rows, start, queries, keys, THRESHOLD, BN, ALIGNED).to(tl.int8)) != 0
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
    delta = tl.load(delta_base + rows, mask=valid, other=0.0)
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds *= 1.0 - x * x
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkv_kernel(
    q_desc, k_desc, v_desc, do_desc, attend_from, attend_to, samples, dk, dv, lse, delta, plan,
    heads, kv_heads, queries, keys, q_head, k_head, v_head, d_row, d_head, scale, unit, inner, key, first_head,
    keep_scale, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
    THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key-value head, all its query heads. dout contiguous.

    d_row, d_head: elements from one position of dk to the next, and from one head; dv alike.
    """
    block = tl.program_id(0)
    batch = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    batch64 = batch.to(tl.int64)
    start = block * BN
    k = k_desc.load([batch * keys + start, kv_head * k_head])
    v = v_desc.load([batch * keys + start, kv_head * v_head])
    base = plan + (batch64 * tl.num_programs(0) + block) * 4
    low = tl.load(base)
    inside_low = tl.load(base + 1)
    inside_high = tl.load(base + 2)
    high = tl.load(base + 3)
    sample = batch64 * 0
    if THRESHOLD > 0:
        sample = tl.load(samples + batch)
    row = batch * queries
    from_base = attend_from + batch64 * queries
    to_base = attend_to + batch64 * queries
    acc_k = tl.zeros([BN, D], tl.float32)
    acc_v = tl.zeros([BN, D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        lse_base = lse + (batch64 * heads + head) * queries
        delta_base = delta + (batch64 * heads + head) * queries
        for i in tl.range(inside_low, inside_high):
            acc_k, acc_v = _dkv_step(
                acc_k, acc_v, k, v, q_desc, do_desc, lse_base, delta_base, from_base, to_base, i, start,
                row, head * q_head, head * D, queries, keys, unit, inner, key, sample, first_head + head,
                keep_scale,
                BM, BN, False, SOFTCAP, THRESHOLD, ALIGNED,
            )  # fmt: skip
        left = inside_low - low
        for i in tl.range(0, left + high - inside_high):
            index = tl.where(i < left, low + i, inside_high + i - left)
            acc_k, acc_v = _dkv_step(
                acc_k, acc_v, k, v, q_desc, do_desc, lse_base, delta_base, from_base, to_base, index,
                start, row, head * q_head, head * D, queries, keys, unit, inner, key, sample,
                first_head + head, keep_scale,
                BM, BN, True, SOFTCAP, THRESHOLD, ALIGNED,
            )  # fmt: skip
    column = start + tl.arange(0, BN)
    dims = tl.arange(0, D)
    valid = (column < keys)[:, None]
    at = (batch64 * keys + column[:, None]) * d_row + kv_head * d_head + dims[None, :]
    tl.store(dk + at, (acc_k * scale).to(dk.dtype.element_ty), mask=valid)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=valid)


@triton.jit
def _dq_step(
    dq, q, do, lse, delta, k_desc, v_desc, start, row, k_column, v_column, from_, to_, rows, queries, keys,
    unit, inner, key, sample, head, keep_scale,
    BN: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    k = k_desc.load([row + start, k_column])
    x = _unit(tl.dot(q, tl.trans(k), input_precision="ieee"), inner, SOFTCAP)
    p = tl.math.exp2(x * unit - lse[:, None])
    if MASKED:
        place = start + tl.arange(0, BN)
        p = tl.where((place[None, :] >= from_[:, None]) & (place[None, :] < to_[:, None]), p, 0.0)
    v = v_desc.load([row + start, v_column])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    if THRESHOLD > 0:
        keep = _keep(key, sample, head, rows, start, queries, keys, THRESHOLD, BN, ALIGNED)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds *= 1.0 - x * x
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _dq_kernel(
    q_desc, k_desc, v_desc, do_desc, attend_from, attend_to, samples, dq, lse, delta, heads, group, queries, keys,
    q_head, k_head, v_head, d_row, d_head, scale, unit, inner, key, first_head, keep_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head, the loops of the forward. dout contiguous; d_row, d_head: steps of dq."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    batch64 = batch.to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    valid = rows < queries
    from_, to_, low, inside_low, inside_high, high = _ranges(attend_from, attend_to, batch64, rows, queries, keys, BN)
    q = q_desc.load([batch * queries + block * BM, head * q_head])
    do = do_desc.load([batch * queries + block * BM, head * D])
    lse_row = tl.load(lse + (batch64 * heads + head) * queries + rows, mask=valid, other=float("inf")) * LOG2E
    delta_row = tl.load(delta + (batch64 * heads + head) * queries + rows, mask=valid, other=0.0)
    k_column = (head // group) * k_head
    v_column = (head // group) * v_head
    row = batch * keys
    sample = batch64 * 0
    if THRESHOLD > 0:
        sample = tl.load(samples + batch)
    acc = tl.zeros([BM, D], tl.float32)
    for start in tl.range(inside_low, inside_high, BN):
        acc = _dq_step(
            acc, q, do, lse_row, delta_row, k_desc, v_desc, start, row, k_column, v_column, from_, to_, rows,
            queries, keys, unit, inner, key, sample, first_head + head, keep_scale,
            BN, False, SOFTCAP, THRESHOLD, ALIGNED,
        )  # fmt: skip
    left = (inside_low - low) // BN
    right = (high - inside_high + BN - 1) // BN
    for i in tl.range(0, left + right):
        start = tl.where(i < left, low + i * BN, inside_high + (i - left) * BN)
        acc = _dq_step(
            acc, q, do, lse_row, delta_row, k_desc, v_desc, start, row, k_column, v_column, from_, to_, rows,
            queries, keys, unit, inner, key, sample, first_head + head, keep_scale,
            BN, True, SOFTCAP, THRESHOLD, ALIGNED,
        )  # fmt: skip
    at = (batch64 * queries + rows[:, None]) * d_row + head * d_head + tl.arange(0, D)[None, :]
    tl.store(dq + at, (acc * scale).to(dq.dtype.element_ty), mask=valid[:, None])
