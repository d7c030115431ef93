"""Product of a packed INT4 weight with up to eight rows of x on tensor cores; see `quantised_matmul_triton.py`.

Decoding's products are small: the weights a lane needs fit its registers and are read while the kernel before still
runs (`shared_triton.starts_early`), so their time is that of the instructions between x and the result. One
`mma.m16n8k16` multiplies 16 rows of the weight with 8 rows of x over 16 columns; around it a pair of weights takes a
shift, a logical operation and an addition: 1.9 instructions a weight with the loads and x's share, half of what a
multiply-add a weight takes (`quantised_vector_triton.py`).

Who holds what. In the instruction lane 4g + t has rows g and g + 8 of the weight and row g of x, four columns of each,
and receives rows g and g + 8 of the result for rows 2t and 2t + 1 of x. Which columns those are is free as long as both
sides agree, so a lane takes what lies together in memory: 32 columns, 16 bytes, of its two rows. A step of a warp is
128 columns of 16 rows; the warps of a program take steps by turns and add up at the end. With fewer than eight rows of
x the last stands for those that are missing, and what comes of it is not stored. With a gated activation rows g + 8 are
the gate's: the two meet in one lane, and only their product is written.

Nibbles to floats. `word >> 4i & 0x000F000F` leaves nibbles i and i + 4 of a word in its halves, u = q + 8 once the sign
bit is flipped; with the exponent of 128 (bf16) or 1024 (fp16) in front that is 128 + u, a float, from which 136 is
subtracted: q itself. So products are exact and nothing but their float32 sums is rounded. A byte's high nibble is the
even column: the nibbles' columns are 1 0 3 2 5 4 7 6, so x is paired as (1, 5), (0, 4), (3, 7), (2, 6).

Triton has no name for the instruction; it is inline assembly over tensors of as many elements as threads, of which each
thread then holds one. The interpreter sums the same lanes' values in `_multiplied`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels take no annotations

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bias_activation import GATED, KINDS
from kernels.bias_activation_triton import activated
from kernels.shared_triton import let_next_start, starts_early, wait_for_last

MOST = 8  # rows of x
STEP = 128  # columns of a warp's step
LONG = 4096  # columns from which eight warps share a row, four before
AHEAD = 6  # steps whose weights are on their way
BITS = {  # two each: 128 or 1024 with the nibble's sign bit, 1, and −136 or −1032
    torch.bfloat16: (0x43084308, 0x3F803F80, -0x3CF73CF8),
    torch.float16: (0x64086408, 0x3C003C00, -0x1BF71BF8),
}

BF16_MMA = tl.constexpr("""{
    .reg .b32 a0, a1, a2, a3;
    fma.rn.bf16x2 a0, $4, $14, $15;
    fma.rn.bf16x2 a1, $5, $14, $15;
    fma.rn.bf16x2 a2, $6, $14, $15;
    fma.rn.bf16x2 a3, $7, $14, $15;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {a0, a1, a2, a3}, {$8, $9}, {$10, $11, $12, $13};
}""")
FP16_MMA = tl.constexpr(BF16_MMA.value.replace("bf16", "f16"))


@triton.jit
def _floats(word, BF16: tl.constexpr):
    """The two 16-bit floats of each word, the lower half's first, in float32."""
    if BF16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
    return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _added(one, other):
    return one[0] + other[0], one[1] + other[1], one[2] + other[2], one[3] + other[3]


@triton.jit
def _multiplied(a, b, c, one, less, W: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """c + (a − 136)·b, or − 1024 − 8 for fp16: four columns a lane of the weight a and of x, b.

    a: words of rows g, g + 8, g, g + 8; b: of the same columns, two for each. c: float32 of rows g, g of the weight and
    2t, 2t + 1 of x; then of rows g + 8. All [32 · W], an element a thread.
    """
    if ASM:
        c = tl.inline_asm_elementwise(
            BF16_MMA if BF16 else FP16_MMA,
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f,r,r",
            [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3], one, less],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        offset: tl.constexpr = 136.0 if BF16 else 1032.0
        for half in tl.static_range(2):
            x = tl.reshape(tl.join(*_floats(b[half], BF16)), [W, 1, 8, 8])
            upper = tl.reshape(tl.join(*_floats(a[2 * half], BF16)), [W, 8, 1, 8]) - offset
            lower = tl.reshape(tl.join(*_floats(a[2 * half + 1], BF16)), [W, 8, 1, 8]) - offset
            more = tl.split(tl.reshape(tl.sum(upper * x, 3), [32 * W, 2]))
            more += tl.split(tl.reshape(tl.sum(lower * x, 3), [32 * W, 2]))
            c = _added(c, more)
    return c


@triton.jit
def _nibbles(word, magic, NUMBER: tl.constexpr):
    """Nibbles NUMBER and NUMBER + 4 of each word as two 16-bit floats, 136 (1032) too large."""
    moved = word
    if NUMBER > 0:
        moved = word >> (4 * NUMBER)
    return (moved & 0x000F000F) ^ magic


@triton.jit
def _halves(one, other, ASM: tl.constexpr):
    """The lower halves of two words as one word, and the upper ones."""
    if ASM:
        low = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [one, other], tl.int32, True, 1)
        high = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [one, other], tl.int32, True, 1)
        return low, high
    return (one & 0xFFFF) | (other << 16), ((one >> 16) & 0xFFFF) | (other & -65536)


@triton.jit
def _words(
    to_first, to_second, first_mask, second_mask, column, S: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr
):
    """The lanes' 32 columns of step S, two int64 of either row; what is given is the lanes' of step 0."""
    if (S + 1) * STRIDE > K:
        inside = S * STRIDE + column < K
        first_mask = first_mask & inside
        second_mask = second_mask & inside
    at = (S * (STRIDE // 16) + tl.arange(0, 2))[None, :]
    first = tl.load(to_first[:, None] + at, mask=first_mask[:, None], other=0)
    second = tl.load(to_second[:, None] + at, mask=second_mask[:, None], other=0)
    return tl.split(first) + tl.split(second)


@triton.jit
def _eight(to_x, column, NUMBER: tl.constexpr, J: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr):
    """Columns 8·J to 8·J + 7 of the lanes' 32 of a row of x: four words of two."""
    at = to_x[:, None] + (NUMBER * (STRIDE // 4) + 2 * J + tl.arange(0, 2))[None, :]
    if (NUMBER + 1) * STRIDE > K:
        both = tl.load(at, mask=(NUMBER * STRIDE + column < K)[:, None], other=0)
    else:
        both = tl.load(at)
    one, other = tl.split(both)
    return one.to(tl.int32), (one >> 32).to(tl.int32), other.to(tl.int32), (other >> 32).to(tl.int32)


@triton.jit
def _touched(x, warp, lane, M: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr):
    """A value of each 32 bytes of x that the warp will use, all at once: later they lie in the nearest cache."""
    touched = tl.zeros_like(lane).to(tl.int64)
    for piece in tl.static_range((M * ((K + STRIDE - 1) // STRIDE) + 3) // 4):
        number = piece * 4 + lane // 8  # of a row and step, whose 256 bytes eight lanes touch
        place = (number // M * STRIDE + warp * 128) // 4 + lane % 8 * 4
        touched |= tl.load(x + number % M * (K // 4) + place, mask=place < K // 4, other=0)
    return touched


@triton.jit
def _store(out, upper, lower, place, row, n, M: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr):
    """Results of one row of x a lane, at place and place + 8, or the gated one; float32 [32] each."""
    to = out + row * n + place
    if GATE:
        gate, _ = activated(lower, KIND)
        tl.store(to, upper * gate, mask=(row < M) & (place < n))
    else:
        if KIND >= 0:
            upper, _ = activated(upper, KIND)
            lower, _ = activated(lower, KIND)
        tl.store(to, upper, mask=(row < M) & (place < n))
        tl.store(to + 8, lower, mask=(row < M) & (place + 8 < n))


@triton.jit(do_not_specialize=["zero"])
def _kernel(
    x, packed, scale, bias, out, n, magic, one, less, zero,
    M: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BF16: tl.constexpr, EARLY: tl.constexpr,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, W: tl.constexpr, AHEAD: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """16 rows of the weight times M rows of x. x: int64, four values each. packed: int64, sixteen. KIND −1: no
    activation. n: rows of the weight, or of each half of a gated one, of which 8 are taken here.

    magic, one, less: see `BITS`. They are arguments because an instruction has room for one constant, and since ptxas
    12.8 turns an addition of a constant to two bfloat16 into one of another. zero hides that x is read twice.
    """
    STRIDE: tl.constexpr = W * 128  # columns that the warps take side by side
    STEPS: tl.constexpr = (K + STRIDE - 1) // STRIDE
    ROWS: tl.constexpr = 8 if GATE else 16
    let_next_start(EARLY)
    thread = tl.arange(0, 32 * W)
    warp, lane = thread // 32, thread % 32
    g = lane // 4
    first = tl.program_id(0) * ROWS + g
    second = first + (n if GATE else 8)
    first_mask = first < n
    second_mask = first_mask if GATE else second < n
    column = warp * 128 + lane % 4 * 32
    to_first = packed + first.to(tl.int64) * (K // 16) + column // 16
    to_second = packed + second.to(tl.int64) * (K // 16) + column // 16
    ahead = (_words(to_first, to_second, first_mask, second_mask, column, 0, STRIDE, K),)
    for s in tl.static_range(1, AHEAD):
        more = _words(to_first, to_second, first_mask, second_mask, column, s, STRIDE, K)
        ahead += (more,)  # type: ignore[assignment]
    if GROUP == K:
        first_scale = tl.load(scale + first, mask=first_mask, other=0.0).to(tl.float32)
        second_scale = tl.load(scale + second, mask=second_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        mine = warp == 0
        first_shift = tl.load(bias + first, mask=first_mask & mine, other=0.0).to(tl.float32)
        second_shift = tl.load(bias + second, mask=second_mask & mine, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    to_x = x + (_touched(x, warp, lane, M, K, STRIDE) & zero) * 2 + tl.minimum(g, M - 1) * (K // 4) + column // 4
    none = tl.zeros([32 * W], tl.float32)
    nothing = (none, none, none, none)
    total = nothing
    # four sums side by side: an addition waits for the one before it
    sums = (nothing, nothing, nothing, nothing)
    for s in tl.static_range(STEPS):
        words = ahead[0]
        ahead = ahead[1:]  # type: ignore[assignment]
        if s + AHEAD < STEPS:
            more = _words(to_first, to_second, first_mask, second_mask, column, s + AHEAD, STRIDE, K)
            ahead += (more,)  # type: ignore[assignment]
        for j in tl.static_range(4):
            x01, x23, x45, x67 = _eight(to_x, column, s, j, STRIDE, K)
            u = (words[j // 2] >> (32 * (j % 2))).to(tl.int32)
            v = (words[2 + j // 2] >> (32 * (j % 2))).to(tl.int32)
            a = (_nibbles(u, magic, 1), _nibbles(v, magic, 1), _nibbles(u, magic, 0), _nibbles(v, magic, 0))
            part = _multiplied(a, _halves(x01, x45, ASM), sums[0], one, less, W, BF16, ASM)
            a = (_nibbles(u, magic, 3), _nibbles(v, magic, 3), _nibbles(u, magic, 2), _nibbles(v, magic, 2))
            part = _multiplied(a, _halves(x23, x67, ASM), part, one, less, W, BF16, ASM)
            sums = (sums[1], sums[2], sums[3], part)
        if GROUP < K or s == STEPS - 1:
            part = _added(_added(sums[0], sums[1]), _added(sums[2], sums[3]))
            if GROUP < K:
                group = (s * STRIDE + warp * 128) // GROUP
                inside = s * STRIDE + column < K
                at = first.to(tl.int64) * (K // GROUP) + group
                first_scale = tl.load(scale + at, mask=first_mask & inside, other=0.0).to(tl.float32)
                at = second.to(tl.int64) * (K // GROUP) + group
                second_scale = tl.load(scale + at, mask=second_mask & inside, other=0.0).to(tl.float32)
                sums = (nothing, nothing, nothing, nothing)
            part = (part[0] * first_scale, part[1] * first_scale, part[2] * second_scale, part[3] * second_scale)
            total = _added(total, part)
    if HAS_BIAS:
        total = _added(total, (first_shift, first_shift, second_shift, second_shift))
    lane = tl.arange(0, 32)
    place = tl.program_id(0) * ROWS + lane // 4
    for odd in tl.static_range(2 if M > 1 else 1):
        both = tl.reshape(tl.join(total[odd], total[2 + odd]), [W, 32, 2])
        upper, lower = tl.split(tl.sum(both, 0))
        _store(out, upper, lower, place, lane % 4 * 2 + odd, n, M, KIND, GATE)


@functools.cache
def _has_instruction(device: torch.device) -> bool:
    if device.type != "cuda":
        return True  # the interpreter
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def fits(x: Tensor, packed: Tensor, group: int, bits: int) -> bool:
    """Whether the kernel takes them: few rows of 16-bit x, INT4, lanes and groups whole, all aligned to 16 bytes."""
    columns = x.shape[-1]
    aligned = all(part.storage_offset() * part.element_size() % 16 == 0 for part in (x, packed))
    whole = columns % 32 == 0 and (group == columns or group % STEP == 0)
    few = bits == 4 and x.element_size() == 2 and x.numel() <= MOST * columns
    return few and whole and aligned and _has_instruction(x.device)


def multiply(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, group: int, kind: int) -> None:
    """out = activation(x · dequantise(packed)ᵀ + bias) for arguments that `fits`; see `quantised_matmul`.

    group: columns a scale. kind: the activation's number in `KINDS`, −1 for none.
    """
    columns, n = x.shape[-1], out.shape[-1]
    m = x.numel() // columns
    gate = kind >= 0 and KINDS[kind] in GATED
    warps = 8 if columns > LONG else 4
    early = starts_early(x.device, m)
    _kernel[(triton.cdiv(n, 8 if gate else 16),)](
        x.contiguous().view(torch.int64), packed.view(torch.int64), scale, bias, out, n, *BITS[x.dtype], 0,
        M=m, K=columns, GROUP=group, BF16=x.dtype == torch.bfloat16, EARLY=early,
        HAS_BIAS=bias is not None, KIND=kind, GATE=gate, W=warps,
        AHEAD=min(AHEAD, triton.cdiv(columns, warps * STEP)), ASM=x.device.type == "cuda",
        num_warps=warps, launch_pdl=early,
    )  # fmt: skip
