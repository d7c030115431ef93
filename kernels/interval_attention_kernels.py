"""Interval attention in Triton: flash attention (Dao 2023, arXiv 2307.08691) whose loops follow the intervals.

Of a block of queries the kernel takes the hull [min attend_from, max attend_to) and skips every block of keys outside
it; keys in [max attend_from, min attend_to) are seen by all of the block's queries and need no mask. The backward
does the same by blocks of keys, from a plan of which blocks of queries see each (`_plan_kernel`).

Softmax and accumulation are float32, so `alpha` changes nothing here. Forward: QKᵀ and PV. Backward by blocks of keys:
QKᵀ, dOVᵀ, dV, dK; dQ either in the same pass by float32 atomic additions (5 products, the order of additions varies) or
in a pass of its own (7 products, deterministic).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import triton
import triton.language as tl

from kernels.shared_triton import words_of

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
    base = (head.to(tl.int64) * queries + rows.to(tl.int64)) * keys + start  # first element of each row
    if ALIGNED:
        block = base[:, None] // 4 + tl.arange(0, BN // 4)[None, :]
        w0, w1, w2, w3 = words_of(key, sample, block)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        element = base[:, None] + tl.arange(0, BN)[None, :]
        w0, w1, w2, w3 = words_of(key, sample, element >> 2)
        place = element & 3
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    return word.to(tl.int64) >= THRESHOLD


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
def _forward_step(
    acc, total, top, raw_top, q, k_base, v_base, start, from_, to_, rows, queries, keys, stride_ks, stride_vs,
    qk_scale, softcap, key, sample, head, keep_scale,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, WANT_RAW: tl.constexpr,
    THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of keys. Logits are in units of log2 e."""
    column = start + tl.arange(0, BN)
    dims = tl.arange(0, D)
    at_k = k_base + column[:, None].to(tl.int64) * stride_ks + dims[None, :]
    at_v = v_base + column[:, None].to(tl.int64) * stride_vs + dims[None, :]
    if MASKED:
        k = tl.load(at_k, mask=(column < keys)[:, None], other=0.0)
    else:
        k = tl.load(at_k)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    if MASKED:
        visible = (column[None, :] >= from_[:, None]) & (column[None, :] < to_[:, None])
    if WANT_RAW:
        raw = logits
        if MASKED:
            raw = tl.where(visible, logits, float("-inf"))
        raw_top = tl.maximum(raw_top, tl.max(raw, 1))
    if SOFTCAP:
        logits = softcap * _tanh(logits / softcap)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
    p = tl.math.exp2(logits - base[:, None])
    shrink = tl.math.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    if THRESHOLD > 0:
        p = tl.where(_keep(key, sample, head, rows, start, queries, keys, THRESHOLD, BN, ALIGNED), p * keep_scale, 0.0)
    acc = acc * shrink[:, None]
    if MASKED:
        v = tl.load(at_v, mask=(column < keys)[:, None], other=0.0)
    else:
        v = tl.load(at_v)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_top, raw_top


@triton.jit
def _forward_kernel(
    q, k, v, attend_from, attend_to, samples, out, lse, tops, heads, group, queries, keys,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    scale, softcap, key, first_head, keep_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, WANT_MAX: tl.constexpr,
    THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. out [batch, queries, heads, D] and lse [batch, heads, queries] contiguous."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # under causal masks the last blocks are the longest
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    valid = rows < queries
    from_, to_, low, inside_low, inside_high, high = _ranges(attend_from, attend_to, batch, rows, queries, keys, BN)
    tile = tl.load(
        q + batch * stride_qb + head * stride_qh + rows[:, None].to(tl.int64) * stride_qs + dims[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    k_base = k + batch * stride_kb + (head // group) * stride_kh
    v_base = v + batch * stride_vb + (head // group) * stride_vh
    sample = batch * 0
    if THRESHOLD > 0:
        sample = tl.load(samples + batch)
    acc = tl.zeros([BM, D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    raw_top = tl.full([BM], float("-inf"), tl.float32)
    WANT_RAW: tl.constexpr = WANT_MAX and SOFTCAP
    qk_scale = scale * LOG2E
    cap = softcap * LOG2E
    for start in tl.range(inside_low, inside_high, BN):
        acc, total, top, raw_top = _forward_step(
            acc, total, top, raw_top, tile, k_base, v_base, start, from_, to_, rows, queries, keys,
            stride_ks, stride_vs, qk_scale, cap, key, sample, first_head + head, keep_scale,
            D, BN, False, SOFTCAP, WANT_RAW, THRESHOLD, ALIGNED,
        )  # fmt: skip
    left = (inside_low - low) // BN
    right = (high - inside_high + BN - 1) // BN
    for i in tl.range(0, left + right):
        start = tl.where(i < left, low + i * BN, inside_high + (i - left) * BN)
        acc, total, top, raw_top = _forward_step(
            acc, total, top, raw_top, tile, k_base, v_base, start, from_, to_, rows, queries, keys,
            stride_ks, stride_vs, qk_scale, cap, key, sample, first_head + head, keep_scale,
            D, BN, True, SOFTCAP, WANT_RAW, THRESHOLD, ALIGNED,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = ((batch * queries + rows[:, None]) * heads + head) * D + dims[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid[:, None])
    sums = tl.where(total == 0.0, float("-inf"), top * LN2 + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse + (batch * heads + head) * queries + rows, sums, mask=valid)
    if WANT_MAX:
        largest = raw_top if WANT_RAW else top
        largest = tl.max(tl.where(valid, largest, float("-inf")), 0)
        tl.store(tops + (batch * heads + head) * tl.num_programs(0) + block, largest * LN2)


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
def _tile_gradients(
    q, k, v, do, lse, delta, from_, to_, rows, start, queries, keys, qk_scale, softcap, key, sample, head, keep_scale,
    BN: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Of a [BM queries, BN keys] tile, transposed: dropped probabilities and d logits (before · scale), [BN, BM]."""
    logits = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
    if SOFTCAP:
        tanh = _tanh(logits / softcap)
        logits = softcap * tanh
    p = tl.math.exp2(logits - (lse * LOG2E)[None, :])
    if MASKED:
        column = start + tl.arange(0, BN)
        visible = (column[:, None] >= from_[None, :]) & (column[:, None] < to_[None, :])
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    dropped = p
    if THRESHOLD > 0:
        keep = tl.trans(_keep(key, sample, head, rows, start, queries, keys, THRESHOLD, BN, ALIGNED).to(tl.int8)) != 0
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds *= 1.0 - tanh * tanh
    return dropped, ds


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_base, do_base, dq_base, lse_base, delta_base, from_base, to_base, block, start, queries, keys,
    stride_qs, stride_os, qk_scale, softcap, key, sample, head, keep_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
    THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr, FUSE_DQ: tl.constexpr,
):  # fmt: skip
    rows = block * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    valid = rows < queries
    q = tl.load(q_base + rows[:, None].to(tl.int64) * stride_qs + dims[None, :], mask=valid[:, None], other=0.0)
    do = tl.load(do_base + rows[:, None].to(tl.int64) * stride_os + dims[None, :], mask=valid[:, None], other=0.0)
    lse = tl.load(lse_base + rows, mask=valid, other=0.0)
    delta = tl.load(delta_base + rows, mask=valid, other=0.0)
    from_, to_ = rows, rows
    if MASKED:
        from_ = tl.load(from_base + rows, mask=valid, other=0)
        to_ = tl.minimum(tl.load(to_base + rows, mask=valid, other=0), keys)
    p, ds = _tile_gradients(
        q, k, v, do, lse, delta, from_, to_, rows, start, queries, keys, qk_scale, softcap,
        key, sample, head, keep_scale, BN, MASKED, SOFTCAP, THRESHOLD, ALIGNED,
    )  # fmt: skip
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    if FUSE_DQ:
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        at = dq_base + rows[:, None].to(tl.int64) * stride_os + dims[None, :]
        tl.atomic_add(at, dq, mask=valid[:, None], sem="relaxed")
    return dk, dv


@triton.jit
def _dkv_kernel(
    q, k, v, attend_from, attend_to, samples, dout, dq, dk, dv, lse, delta, plan, heads, kv_heads, queries, keys,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    scale, softcap, key, first_head, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr,
    THRESHOLD: tl.constexpr, ALIGNED: tl.constexpr, FUSE_DQ: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key-value head, all its query heads. dout, dq, dk, dv contiguous; dq float32."""
    block = tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    start = block * BN
    column = start + tl.arange(0, BN)
    dims = tl.arange(0, D)
    valid = (column < keys)[:, None]
    at_k = batch * stride_kb + kv_head * stride_kh + column[:, None].to(tl.int64) * stride_ks + dims[None, :]
    at_v = batch * stride_vb + kv_head * stride_vh + column[:, None].to(tl.int64) * stride_vs + dims[None, :]
    k_tile = tl.load(k + at_k, mask=valid, other=0.0)
    v_tile = tl.load(v + at_v, mask=valid, other=0.0)
    base = plan + (batch * tl.num_programs(0) + block) * 4
    low = tl.load(base)
    inside_low = tl.load(base + 1)
    inside_high = tl.load(base + 2)
    high = tl.load(base + 3)
    sample = batch * 0
    if THRESHOLD > 0:
        sample = tl.load(samples + batch)
    qk_scale = scale * LOG2E
    cap = softcap * LOG2E
    acc_k = tl.zeros([BN, D], tl.float32)
    acc_v = tl.zeros([BN, D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = q + batch * stride_qb + head * stride_qh
        do_base = dout + (batch * queries * heads + head) * D
        dq_base = dq + (batch * queries * heads + head) * D
        lse_base = lse + (batch * heads + head) * queries
        delta_base = delta + (batch * heads + head) * queries
        for i in tl.range(inside_low, inside_high):
            acc_k, acc_v = _dkv_step(
                acc_k, acc_v, k_tile, v_tile, q_base, do_base, dq_base, lse_base, delta_base,
                attend_from + batch * queries, attend_to + batch * queries, i, start, queries, keys,
                stride_qs, heads * D, qk_scale, cap, key, sample, first_head + head, keep_scale,
                D, BM, BN, False, SOFTCAP, THRESHOLD, ALIGNED, FUSE_DQ,
            )  # fmt: skip
        left = inside_low - low
        for i in tl.range(0, left + high - inside_high):
            index = tl.where(i < left, low + i, inside_high + i - left)
            acc_k, acc_v = _dkv_step(
                acc_k, acc_v, k_tile, v_tile, q_base, do_base, dq_base, lse_base, delta_base,
                attend_from + batch * queries, attend_to + batch * queries, index, start, queries, keys,
                stride_qs, heads * D, qk_scale, cap, key, sample, first_head + head, keep_scale,
                D, BM, BN, True, SOFTCAP, THRESHOLD, ALIGNED, FUSE_DQ,
            )  # fmt: skip
    at = ((batch * keys + column[:, None]) * kv_heads + kv_head) * D + dims[None, :]
    tl.store(dk + at, (acc_k * scale).to(dk.dtype.element_ty), mask=valid)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=valid)


@triton.jit
def _dq_step(
    dq, q, do, lse, delta, k_base, v_base, start, from_, to_, rows, queries, keys, stride_ks, stride_vs,
    qk_scale, softcap, key, sample, head, keep_scale,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, BN)
    dims = tl.arange(0, D)
    at_k = k_base + column[:, None].to(tl.int64) * stride_ks + dims[None, :]
    at_v = v_base + column[:, None].to(tl.int64) * stride_vs + dims[None, :]
    if MASKED:
        k = tl.load(at_k, mask=(column < keys)[:, None], other=0.0)
        v = tl.load(at_v, mask=(column < keys)[:, None], other=0.0)
    else:
        k = tl.load(at_k)
        v = tl.load(at_v)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    if SOFTCAP:
        tanh = _tanh(logits / softcap)
        logits = softcap * tanh
    p = tl.math.exp2(logits - lse[:, None])
    if MASKED:
        p = tl.where((column[None, :] >= from_[:, None]) & (column[None, :] < to_[:, None]), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    if THRESHOLD > 0:
        keep = _keep(key, sample, head, rows, start, queries, keys, THRESHOLD, BN, ALIGNED)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds *= 1.0 - tanh * tanh
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _dq_kernel(
    q, k, v, attend_from, attend_to, samples, dout, dq, lse, delta, heads, group, queries, keys,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    scale, softcap, key, first_head, keep_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head, the loops of the forward. dout and dq contiguous."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    valid = rows < queries
    from_, to_, low, inside_low, inside_high, high = _ranges(attend_from, attend_to, batch, rows, queries, keys, BN)
    at_q = batch * stride_qb + head * stride_qh + rows[:, None].to(tl.int64) * stride_qs + dims[None, :]
    at_o = ((batch * queries + rows[:, None]) * heads + head) * D + dims[None, :]
    q_tile = tl.load(q + at_q, mask=valid[:, None], other=0.0)
    do = tl.load(dout + at_o, mask=valid[:, None], other=0.0)
    lse_row = tl.load(lse + (batch * heads + head) * queries + rows, mask=valid, other=0.0) * LOG2E
    delta_row = tl.load(delta + (batch * heads + head) * queries + rows, mask=valid, other=0.0)
    k_base = k + batch * stride_kb + (head // group) * stride_kh
    v_base = v + batch * stride_vb + (head // group) * stride_vh
    sample = batch * 0
    if THRESHOLD > 0:
        sample = tl.load(samples + batch)
    acc = tl.zeros([BM, D], tl.float32)
    qk_scale = scale * LOG2E
    cap = softcap * LOG2E
    for start in tl.range(inside_low, inside_high, BN):
        acc = _dq_step(
            acc, q_tile, do, lse_row, delta_row, k_base, v_base, start, from_, to_, rows, queries, keys,
            stride_ks, stride_vs, qk_scale, cap, key, sample, first_head + head, keep_scale,
            D, BN, False, SOFTCAP, THRESHOLD, ALIGNED,
        )  # fmt: skip
    left = (inside_low - low) // BN
    right = (high - inside_high + BN - 1) // BN
    for i in tl.range(0, left + right):
        start = tl.where(i < left, low + i * BN, inside_high + (i - left) * BN)
        acc = _dq_step(
            acc, q_tile, do, lse_row, delta_row, k_base, v_base, start, from_, to_, rows, queries, keys,
            stride_ks, stride_vs, qk_scale, cap, key, sample, first_head + head, keep_scale,
            D, BN, True, SOFTCAP, THRESHOLD, ALIGNED,
        )  # fmt: skip
    tl.store(dq + at_o, (acc * scale).to(dq.dtype.element_ty), mask=valid[:, None])
