"""One decoding step of attention in Triton; maths, arguments and the reference are in `decode_attention.py`.

A program reads one share of the visible slots of one row and key-value head, for all query heads of the group at once;
they stand as the rows of a product, padded to the 16 that it wants. The number of shares is fixed by the shapes and
their bounds come from the intervals on the device, so a captured graph stays right while a row grows. Shares are put
together by their maxima and sums in a second small kernel; where there is one share only, the first writes the result.

Where a key-value head has one query and there are several shares (multi-head attention, few rows), what counts is how
soon after the token's projection the result is there. A kernel of its own multiplies and adds without tensor cores and
the exchanges they ask for, and has the second-level cache fetch the first block of its share (as a rule there is no
other) while the kernel before still runs.

The token's own key and value are taken from its projection, not from the cache, so that nobody waits for their storing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_attention import check
from kernels.operation import operation
from kernels.shared_triton import let_next_start, multiprocessors, starts_early, wait_for_last

LOG2E = 1.4426950408889634
PROGRAMS = 4  # a multiprocessor: enough loads in flight
MOST_SHARES = 64
TILE, STAGES = (64, 4), 3  # slots, half as many in float32, and warps
SINGLE_TILE = (128, 8)  # of the kernel for one query a key-value head


@triton.jit
def _slots_of(share, first, last, SHARES: tl.constexpr, BN: tl.constexpr):
    """First slot of a share of [first, last), and the one behind its last; shares are whole blocks of BN slots."""
    each = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), SHARES), BN) * BN
    start = first + share * each
    return start, tl.minimum(start + each, last)


@triton.jit
def _share_kernel(
    q, key, value, keys, values, place, attend_from, attend_to, out, part, top_of, sum_of, slots, kv_heads, unit,
    q_row, q_head, key_row, key_head, value_row, value_head, cache_row, cache_slot, cache_head,
    place_row, from_row, to_row,
    GROUP: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One share of one row and head. unit: scale · log2 e.

    part [rows, kv_heads, SHARES, GROUP, D], top_of and sum_of [rows, kv_heads, SHARES, GROUP], float32, contiguous.
    """
    let_next_start(EARLY)
    wait_for_last(EARLY)
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = tl.program_id(0) % kv_heads
    share = tl.program_id(1)
    first = tl.maximum(tl.load(attend_from + row * from_row), 0)
    last = tl.minimum(tl.load(attend_to + row * to_row), slots)
    own = tl.load(place + row * place_row)
    start, stop = _slots_of(share, first, last, SHARES, BN)

    query, dim = tl.arange(0, BQ), tl.arange(0, BD)
    dim_mask = dim < D
    mask = (query < GROUP)[:, None] & dim_mask[None, :]
    spot = (head * GROUP + query)[:, None] * q_head + dim[None, :]
    query_tile = tl.load(q + row * q_row + spot, mask=mask, other=0.0)
    own_key = tl.load(key + row * key_row + head * key_head + dim, mask=dim_mask, other=0.0)
    own_value = tl.load(value + row * value_row + head * value_head + dim, mask=dim_mask, other=0.0)
    cached = row * cache_row + head * cache_head + dim
    storing = dim_mask & (share == 0)
    tl.store(keys + cached + own.to(tl.int64) * cache_slot, own_key, mask=storing)
    tl.store(values + cached + own.to(tl.int64) * cache_slot, own_value, mask=storing)

    # The first share begins with the token itself.
    mine = (share == 0) & (own >= first) & (own < last)
    score = tl.sum(query_tile.to(tl.float32) * own_key.to(tl.float32)[None, :], 1)
    top = tl.where(mine, score, float("-inf"))
    total = tl.zeros([BQ], tl.float32) + tl.where(mine, 1.0, 0.0)
    acc = tl.zeros([BQ, BD], tl.float32) + tl.where(mine, own_value.to(tl.float32), 0.0)[None, :]
    for begin in tl.range(start, stop, BN):
        slot = begin + tl.arange(0, BN)
        seen = (slot < stop) & (slot != own)
        at = slot.to(tl.int64)[:, None] * cache_slot + cached[None, :]
        k = tl.load(keys + at, mask=seen[:, None] & dim_mask[None, :], other=0.0)
        v = tl.load(values + at, mask=seen[:, None] & dim_mask[None, :], other=0.0)
        x = tl.dot(query_tile, tl.trans(k), input_precision="ieee")
        x = tl.where(seen[None, :], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2((x - base[:, None]) * unit)
        shrink = tl.math.exp2((top - base) * unit)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    if SHARES == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        at = (row * kv_heads + head) * GROUP * D + query[:, None] * D + dim[None, :]
        tl.store(out + at, acc, mask=mask)
    else:
        line = ((row * kv_heads + head) * SHARES + share) * GROUP + query
        tl.store(part + line[:, None] * D + dim[None, :], acc, mask=mask)
        tl.store(top_of + line, top * unit, mask=query < GROUP)
        tl.store(sum_of + line, total, mask=query < GROUP)


@triton.jit
def _fetch(cached, place, mask, D: tl.constexpr):
    """Have the second-level cache read rows of keys or values, int64 places [BN] of `cached`: 64 bytes a hint."""
    each: tl.constexpr = 512 // cached.dtype.element_ty.primitive_bitwidth  # values in 64 bytes
    piece = tl.arange(0, triton.next_power_of_2((D + each - 1) // each))
    at = (cached + place[:, None] + tl.minimum(piece * each, D - 1)[None, :]).to(tl.int64)
    hint: tl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
    wanted = tl.broadcast_to(mask[:, None], at.shape).to(tl.int32)
    tl.inline_asm_elementwise(hint, "=r,l,r", [at, wanted], tl.int32, is_pure=False, pack=1)


@triton.jit
def _single_kernel(
    q, key, value, keys, values, place, attend_from, attend_to, part, top_of, sum_of, slots, kv_heads, unit,
    q_row, q_head, key_row, key_head, value_row, value_head, cache_row, cache_slot, cache_head,
    place_row, from_row, to_row,
    D: tl.constexpr, SHARES: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `_share_kernel`, for one query head a key-value head and several shares."""
    let_next_start(EARLY)
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = tl.program_id(0) % kv_heads
    share = tl.program_id(1)
    base = row * cache_row + head * cache_head
    if EARLY:
        # Nobody vouches yet for what is read here: it says what to fetch, no more.
        first = tl.maximum(tl.load(attend_from + row * from_row, cache_modifier=".cg"), 0)
        last = tl.minimum(tl.load(attend_to + row * to_row, cache_modifier=".cg"), slots)
        start, _ = _slots_of(share, first, last, SHARES, BN)
        block = start + tl.arange(0, BN)
        _fetch(keys, base + block.to(tl.int64) * cache_slot, block < last, D)
        _fetch(values, base + block.to(tl.int64) * cache_slot, block < last, D)
    wait_for_last(EARLY)
    first = tl.maximum(tl.load(attend_from + row * from_row), 0)
    last = tl.minimum(tl.load(attend_to + row * to_row), slots)
    own = tl.load(place + row * place_row)
    start, stop = _slots_of(share, first, last, SHARES, BN)

    dim = tl.arange(0, BD)
    dim_mask = dim < D
    query = tl.load(q + row * q_row + head * q_head + dim, mask=dim_mask, other=0.0)
    own_key = tl.load(key + row * key_row + head * key_head + dim, mask=dim_mask, other=0.0)
    own_value = tl.load(value + row * value_row + head * value_head + dim, mask=dim_mask, other=0.0)
    storing = dim_mask & (share == 0)
    tl.store(keys + base + own.to(tl.int64) * cache_slot + dim, own_key, mask=storing)
    tl.store(values + base + own.to(tl.int64) * cache_slot + dim, own_value, mask=storing)
    query, own_key, own_value = query.to(tl.float32), own_key.to(tl.float32), own_value.to(tl.float32)

    top, total = float("-inf"), 0.0
    acc = tl.zeros([BD], tl.float32)
    for begin in tl.range(start, stop, BN, num_stages=1):
        slot = begin + tl.arange(0, BN)
        cached = base + slot.to(tl.int64)[:, None] * cache_slot + dim[None, :]
        stored = (slot < stop) & (slot != own)
        k = tl.load(keys + cached, mask=stored[:, None] & dim_mask[None, :], other=0.0).to(tl.float32)
        v = tl.load(values + cached, mask=stored[:, None] & dim_mask[None, :], other=0.0).to(tl.float32)
        mine = (slot == own)[:, None]
        x = tl.sum(tl.where(mine, own_key[None, :], k) * query[None, :], 1)
        x = tl.where(slot < stop, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        p = tl.math.exp2((x - new_top) * unit)
        shrink = tl.math.exp2((top - new_top) * unit)
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * tl.where(mine, own_value[None, :], v), 0)
        top = new_top
    line = (row * kv_heads + head) * SHARES + share
    tl.store(part + line * D + dim, acc, mask=dim_mask)
    tl.store(top_of + line, top * unit)
    tl.store(sum_of + line, total)


@triton.jit
def _join_kernel(
    part, top_of, sum_of, out,
    GROUP: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One query head of one row: out = Σ 2^(top − max) part / Σ 2^(top − max) sum over its shares."""
    let_next_start(EARLY)
    wait_for_last(EARLY)
    line = tl.program_id(0).to(tl.int64)
    share, dim = tl.arange(0, SHARES), tl.arange(0, BD)
    at = (line // GROUP * SHARES + share) * GROUP + line % GROUP
    top = tl.load(top_of + at)
    highest = tl.max(top, 0)
    factor = tl.math.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(factor * tl.load(sum_of + at), 0)
    pieces = tl.load(part + at[:, None] * D + dim[None, :], mask=(dim < D)[None, :], other=0.0)
    joined = tl.sum(factor[:, None] * pieces, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + line * D + dim, joined, mask=dim < D)


def shares_for(programs: int, slots: int, block: int, processors: int) -> int:
    """Among how many programs a row's slots are divided: a power of two that fills the device, no finer than blocks."""
    wanted = triton.cdiv(PROGRAMS * processors, max(1, programs))
    return min(MOST_SHARES, triton.next_power_of_2(wanted), triton.next_power_of_2(triton.cdiv(slots, block)))


@operation("tiankong::decode_attention", mutates=("keys", "values"))
def _decode(
    q: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, place: Tensor, attend_from: Tensor,
    attend_to: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    rows, _, heads, dim = q.shape
    slots, kv_heads = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    programs, wide = rows * kv_heads, 2 if q.dtype == torch.float32 else 1
    block, warps = SINGLE_TILE[0] // wide, SINGLE_TILE[1]
    shares = shares_for(programs, slots, block, multiprocessors(q.device))
    single = group == 1 and shares > 1
    if not single:
        block, warps = TILE[0] // wide, TILE[1]
        shares = shares_for(programs, slots, block, multiprocessors(q.device))
    kept = rows * heads * shares if shares > 1 else 0
    part = torch.empty(kept, dim, dtype=torch.float32, device=q.device)
    top_of, sum_of = (torch.empty(kept, dtype=torch.float32, device=q.device) for _ in range(2))
    padded = max(16, triton.next_power_of_2(dim))
    early = starts_early(q.device, rows)
    tensors, parts = (q, key, value, keys, values, place, attend_from, attend_to), (part, top_of, sum_of)
    strides = [one.stride(axis) for one in (q, key, value) for axis in (0, 2)] + [*keys.stride()[:3]]
    strides += [vector.stride(0) for vector in (place, attend_from, attend_to)]
    numbers = (slots, kv_heads, scale * LOG2E, *strides)
    if single:
        _single_kernel[(programs, shares)](
            *tensors, *parts, *numbers,
            D=dim, SHARES=shares, BD=padded, BN=block, EARLY=early, num_warps=warps, launch_pdl=early,
        )  # fmt: skip
    else:
        _share_kernel[(programs, shares)](
            *tensors, out, *parts, *numbers,
            GROUP=group, D=dim, SHARES=shares, BQ=max(16, triton.next_power_of_2(group)), BD=padded,
            BN=block, EARLY=early, num_warps=warps, num_stages=STAGES, launch_pdl=early,
        )  # fmt: skip
    if shares > 1:
        _join_kernel[(rows * heads,)](
            part, top_of, sum_of, out,
            GROUP=group, D=dim, SHARES=shares, BD=padded, EARLY=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return out


@_decode.fake
def _(q, key, value, keys, values, place, attend_from, attend_to, scale):
    return q.new_empty(q.shape)


def decode_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    attend_from: Tensor,
    attend_to: Tensor,
    *,
    scale: float,
) -> Tensor:
    """See the reference of the same name; keys and values must have the same strides, and dims lie side by side."""
    check(q, key, value, keys, values, place, attend_from, attend_to)
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        raise ValueError("decode_attention: keys and values are no buffers of one layout; make them by torch.empty")
    if scale <= 0.0:
        raise ValueError(f"decode_attention: scale={scale}; the Triton kernel takes a positive one")
    q, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (q, key, value))
    out: Tensor = _decode(q, key, value, keys, values, place, attend_from, attend_to, scale)
    return out
