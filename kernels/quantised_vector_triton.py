"""Product of a packed INT8 or INT4 weight with a few rows of x, in Triton; see `quantised_matmul_triton.py`.

With one row of x each weight is read and used once, so the aim is memory's speed, with few instructions a weight. A
warp owns some of the weight's rows and walks along them, a word of 4 bytes a lane, so that nothing is exchanged before
the last sum. A value q of b bits becomes a float32 without a conversion: its byte is shifted to the upper mantissa,
bits 15 to 22, its sign bit flipped, which makes it u = q + 2^(b−1) ≥ 0, and the exponent put in front:

    ((word shifted & mask) ^ bits of (1.0, sign bit)) = 1 + u·2^(s−23)      s: where the value's lowest bit is then

So Σ (1 + u·2^(s−23))·x − (1 + 2^(b−1+s−23))·Σ x = 2^(s−23) Σ q·x: half a shift, a logical operation and a
multiply-add a weight. s ≥ 15, so that the difference costs at most 8 of float32's 24 bits. An even column of INT4 is
the high nibble of its byte. Sums are float32, a whole row's before its scale, a group's times its scale.

Weight, scales and bias are read before the kernel waits for the one that computes x (`shared_triton.starts_early`).

With an activation a program owns rows of the weight's first half and their partners in the second, the gate's, side by
side: value and gate are there together, and only their product is written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels take no annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bias_activation import GATED, KINDS
from kernels.bias_activation_triton import activated
from kernels.shared_triton import let_next_start, starts_early, wait_for_last

ONE = 0x3F800000  # the bits of 1 in float32
UPPER, LOWER = 1 << 22, 1 << 18  # sign bits: of INT8 and of INT4's even columns, of INT4's odd columns
TILE = (8, 2, 24)  # rows of the weight a program, warps, words a lane and row that are on their way


@triton.jit
def _value(word, bits, B: tl.constexpr, MASK: tl.constexpr):
    """1 + u·2^(s−23) of the value that MASK cuts out of byte B of each word, moved to bits 15 to 22."""
    UP: tl.constexpr = 15 - 8 * B
    if UP > 0:
        moved = word << UP
    else:
        moved = word >> (-UP)
    return ((moved & MASK) ^ bits).to(tl.float32, bitcast=True)


@triton.jit
def _float_of(four, J: tl.constexpr, BF16: tl.constexpr):
    """Number J of the four 16-bit floats in an int64, as float32."""
    if BF16:  # the upper half of a float32
        two = (four >> 32 * (J // 2)).to(tl.int32)
        return (two << 16 if J % 2 == 0 else two & -65536).to(tl.float32, bitcast=True)
    return (four >> 16 * J).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _words(to_w, row_mask, lane, CHUNK: tl.constexpr, WORDS: tl.constexpr):
    """Words of one chunk, int32 [rows, 32], a lane each; to_w: the lanes' of chunk 0."""
    mask = row_mask
    if CHUNK * 32 + 32 > WORDS:
        mask = mask & (CHUNK * 32 + lane < WORDS)[None, :]
    return tl.load(to_w + CHUNK * 32, mask=mask, other=0)


@triton.jit
def _four(to_x, lane, CHUNK: tl.constexpr, WORDS: tl.constexpr):
    """Four values of x for each lane of a chunk, int64 [32]; 0 beyond the last column."""
    if CHUNK * 32 + 32 > WORDS:
        return tl.load(to_x, mask=CHUNK * 32 + lane < WORDS, other=0)
    return tl.load(to_x)


@triton.jit
def _touched(row_of_x, lane, K: tl.constexpr):
    """One value of each 32 bytes of a row of x, all at once: what is read of it later lies in the nearest cache."""
    touched = tl.zeros([32], tl.int64)
    for piece in tl.static_range((K + 511) // 512):
        sector = piece * 32 + lane
        touched |= tl.load(row_of_x + sector * 4, mask=sector < K // 16, other=0)
    return touched.to(tl.int32)


@triton.jit
def _activated(result, KIND: tl.constexpr, GATE: tl.constexpr, BN: tl.constexpr):
    """float32 [BN], or [BN / 2] of pairs of a value and its gate."""
    if GATE:
        value, gate = tl.split(tl.reshape(result, [BN // 2, 2]))
        gate, _ = activated(gate, KIND)
        result = value * gate
    elif KIND >= 0:
        result, _ = activated(result, KIND)
    return result


@triton.jit(do_not_specialize=["zero"])
def _vector_kernel(
    x, packed, scale, bias, out, n, upper, lower, zero,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, EARLY: tl.constexpr,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BN rows of the weight times one row of x. x: int64, four values each. packed: int32. KIND −1: no activation.

    n: rows of the weight, or of each half of a gated one, of which BN / 2 are taken here.

    upper, lower: the bits of 1 with the sign bit; arguments because an instruction has room for one constant, and the
    mask is that. zero hides from the compiler how the words are aligned: it would give a lane four words of a row and a
    fourth of the rows, and x would be taken apart four times as often; and that x is read twice.
    """
    EACH: tl.constexpr = 32 // BITS  # columns a word
    WORDS: tl.constexpr = K // EACH
    CHUNKS: tl.constexpr = (WORDS + 31) // 32
    let_next_start(EARLY)
    if GATE:  # a row and its partner
        place = tl.program_id(0) * (BN // 2) + tl.arange(0, BN) // 2
        row = place + tl.arange(0, BN) % 2 * n
    else:
        place = tl.program_id(0) * BN + tl.arange(0, BN)
        row = place
    row_mask = (place < n)[:, None]
    lane = tl.arange(0, 32)
    to_w = packed + zero + row[:, None].to(tl.int64) * WORDS + lane[None, :]
    row_of_x = x + tl.program_id(1).to(tl.int64) * (K // 4)
    to_x = row_of_x + lane * (EACH // 4)
    ahead = (_words(to_w, row_mask, lane, 0, WORDS),)
    for chunk in tl.static_range(1, AHEAD):
        ahead += (_words(to_w, row_mask, lane, chunk, WORDS),)  # type: ignore[assignment]
    if GROUP == K:
        whole_scale = tl.load(scale + row, mask=place < n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + row, mask=place < n, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    to_x += _touched(row_of_x, lane, K) & zero
    high = tl.zeros([BN, 32], tl.float32)
    low = tl.zeros([BN, 32], tl.float32)
    high_x = tl.zeros([32], tl.float32)
    low_x = tl.zeros([32], tl.float32)
    total = tl.zeros([BN, 32], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        word = ahead[0]
        ahead = ahead[1:]  # type: ignore[assignment]
        if chunk + AHEAD < CHUNKS:
            ahead += (_words(to_w, row_mask, lane, chunk + AHEAD, WORDS),)  # type: ignore[assignment]
        four = _four(to_x + chunk * (8 * EACH), lane, chunk, WORDS)
        if BITS == 4:
            other = _four(to_x + chunk * (8 * EACH) + 1, lane, chunk, WORDS)
            for b in tl.static_range(4):
                even = _float_of(four if b < 2 else other, 2 * b % 4, BF16)
                odd = _float_of(four if b < 2 else other, 2 * b % 4 + 1, BF16)
                high += _value(word, upper, b, 0x780000) * even[None, :]
                low += _value(word, lower, b, 0x078000) * odd[None, :]
                high_x += even
                low_x += odd
        else:
            for b in tl.static_range(4):
                value = _float_of(four, b, BF16)
                high += _value(word, upper, b, 0x7F8000) * value[None, :]
                high_x += value
        if GROUP < K or chunk == CHUNKS - 1:
            if BITS == 4:
                part = 16.0 * (high - 1.5 * high_x[None, :]) + 256.0 * (low - 1.03125 * low_x[None, :])
            else:
                part = 256.0 * (high - 1.5 * high_x[None, :])
            if GROUP < K:
                number = chunk * 32 + lane
                to_scale = scale + row[:, None].to(tl.int64) * (K // GROUP) + (number * EACH // GROUP)[None, :]
                step = tl.load(to_scale, mask=row_mask & (number < WORDS)[None, :], other=0.0)
                part *= step.to(tl.float32)
                high, low = tl.zeros([BN, 32], tl.float32), tl.zeros([BN, 32], tl.float32)
                high_x, low_x = tl.zeros([32], tl.float32), tl.zeros([32], tl.float32)
            total += part
    result = tl.sum(total, 1)
    if GROUP == K:
        result *= whole_scale
    if HAS_BIAS:
        result += shift
    result = _activated(result, KIND, GATE, BN)
    slot = place
    if GATE:
        slot = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    tl.store(out + tl.program_id(1).to(tl.int64) * n + slot, result, mask=slot < n)


def fits(x: Tensor, packed: Tensor, group: int, bits: int) -> bool:
    """Whether the kernel takes them: 16-bit x, whole words and groups of words, all aligned to 16 bytes."""
    each = 32 // bits
    aligned = all(part.storage_offset() * part.element_size() % 16 == 0 for part in (x, packed))
    return x.element_size() == 2 and x.shape[-1] % 8 == 0 and group % each == 0 and aligned


def multiply(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, group: int, bits: int, kind: int
) -> None:
    """out = activation(x · dequantise(packed)ᵀ + bias) for arguments that `fits`; see `quantised_matmul`.

    group: columns a scale. kind: the activation's number in `KINDS`, −1 for none.
    """
    columns, n = x.shape[-1], out.shape[-1]
    m = x.numel() // columns
    gate = kind >= 0 and KINDS[kind] in GATED
    rows, warps, ahead = TILE
    early = starts_early(x.device, m)
    _vector_kernel[(triton.cdiv(n, rows // 2 if gate else rows), m)](
        x.contiguous().view(torch.int64), packed.view(torch.int32), scale, bias, out, n,
        ONE ^ UPPER, ONE ^ LOWER, 0,
        K=columns, GROUP=group, BITS=bits, BF16=x.dtype == torch.bfloat16, EARLY=early,
        HAS_BIAS=bias is not None, KIND=kind, GATE=gate, BN=rows,
        AHEAD=min(ahead, triton.cdiv(columns * bits // 32, 32)), num_warps=warps, launch_pdl=early,
    )  # fmt: skip
