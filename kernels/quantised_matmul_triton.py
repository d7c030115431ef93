"""Product with a packed INT8 or INT4 weight in Triton; arguments and the reference are in `quantised_matmul.py`.

A program owns a block of the weight's rows and walks along its columns. The integers are exact in x's dtype, so the
products sum up in float32 before their scale: a whole row's once at the end, a group's after each of its blocks. The
two nibbles of a byte are neighbouring columns, so INT4 takes even and odd columns of x as two products.

Few rows of x (decoding a few texts) take other kernels, which do the activation too: INT4 `quantised_mma_triton.py`, up
to eight; INT8, and INT4 that does not fit there, `quantised_vector_triton.py`, up to FEW. For more rows of x the
activation is a kernel of its own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import quantised_mma_triton as mma
from kernels import quantised_vector_triton as vector
from kernels.bias_activation import GATED, KINDS
from kernels.bias_activation_triton import bias_activation
from kernels.operation import operation
from kernels.quantised_matmul import check


@triton.jit
def _nibble(byte, dtype: tl.constexpr):
    """The low four bits of int8 values as two's complement, in `dtype`.

    A 16-bit float is put together from its bits: 128 + u in bfloat16, 1024 + u in float16 with u = value + 8.
    """
    flipped = (byte.to(tl.int16) & 15) ^ 8
    if dtype == tl.bfloat16:
        return (flipped | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    if dtype == tl.float16:
        return (flipped | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return flipped.to(dtype) - 8.0


@triton.jit
def _matmul_kernel(
    x, packed, scale, out, m, n,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """K: columns. GROUP: columns a scale. BK: packed values of one block of columns, all of one group."""
    EACH: tl.constexpr = 8 // BITS  # columns a byte
    BLOCKS: tl.constexpr = (GROUP // EACH + BK - 1) // BK  # blocks a group
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = tl.arange(0, BK)
    to_x = x + row[:, None].to(tl.int64) * K
    to_w = packed + column[None, :].to(tl.int64) * (K // EACH)
    row_mask, column_mask = (row < m)[:, None], (column < n)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for group in range(K // GROUP):
        part = tl.zeros([BM, BN], tl.float32)
        for block in range(BLOCKS):
            place = block * BK + inside
            valid = place < GROUP // EACH
            byte = group * (GROUP // EACH) + place
            w = tl.load(to_w + byte[:, None], mask=valid[:, None] & column_mask, other=0)  # [BK, BN]
            if BITS == 8:
                value = tl.load(to_x + byte[None, :], mask=row_mask & valid[None, :], other=0.0)
                part = tl.dot(value, w.to(value.dtype), part, input_precision="ieee")
            else:
                first = 2 * (group * (GROUP // EACH) + block * BK)
                two = first + tl.arange(0, 2 * BK)
                mask = row_mask & (two - 2 * group * (GROUP // EACH) < GROUP)[None, :]
                both = tl.load(to_x + two[None, :], mask=mask, other=0.0)
                even, odd = tl.split(tl.reshape(both, [BM, BK, 2]))
                part = tl.dot(even, _nibble(w >> 4, even.dtype), part, input_precision="ieee")
                part = tl.dot(odd, _nibble(w, odd.dtype), part, input_precision="ieee")
        s = tl.load(scale + column.to(tl.int64) * (K // GROUP) + group, mask=column < n, other=0.0)
        total += part * s.to(tl.float32)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * n + column[None, :], total, mask=row_mask & column_mask)


FEW = 4  # rows of x that go one by one in the vector kernel
TILE = (16, 32, 128, 4)  # rows of x, rows of the weight, packed columns, warps
WIDE_TILE = (64, 32, 64, 4)  # for many rows of x


@operation("tiankong::quantised_matmul")
def _matmul(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, activation: str | None) -> Tensor:
    columns, n = x.shape[-1], packed.shape[0]
    m = x.numel() // columns
    group = columns if scale.dim() == 1 else columns // scale.shape[1]
    on_cores = mma.fits(x, packed, group, bits)
    if m and n and (on_cores or (m <= FEW and vector.fits(x, packed, group, bits))):
        kind = -1 if activation is None else KINDS.index(activation)
        out = torch.empty(*x.shape[:-1], n // 2 if activation in GATED else n, dtype=x.dtype, device=x.device)
        if on_cores:
            mma.multiply(x, packed, scale, bias, out, group, kind)
        else:
            vector.multiply(x, packed, scale, bias, out, group, bits, kind)
        return out
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if m and n:
        bm, bn, bk, warps = TILE if m <= 32 else WIDE_TILE
        bk = max(16, min(bk, triton.next_power_of_2(group * bits // 8)))
        _matmul_kernel[(triton.cdiv(n, bn), triton.cdiv(m, bm))](
            x.contiguous(), packed, scale, out, m, n,
            K=columns, GROUP=group, BITS=bits, BM=bm, BN=bn, BK=bk, num_warps=warps,
        )  # fmt: skip
    return out if activation is None else bias_activation(out, bias, kind=activation)


@_matmul.fake
def _(x, packed, scale, bias, bits, activation):
    return x.new_empty(*x.shape[:-1], packed.shape[0] // (2 if activation in GATED else 1))


def quantised_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    *,
    bits: int,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """See the reference of the same name; a group must be an even number of columns for 4 bits."""
    check(x, packed, scale, bits, bias, activation)
    if bits == 4 and scale.dim() == 2 and x.shape[-1] // scale.shape[1] % 2:
        raise ValueError("quantised_matmul: groups of an odd number of columns split a byte of INT4")
    shift = None if bias is None else bias.contiguous()
    out: Tensor = _matmul(x, packed.contiguous(), scale.contiguous(), shift, bits, activation)
    return out
