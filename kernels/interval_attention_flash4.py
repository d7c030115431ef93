"""Interval attention by FlashAttention 4's kernels for Hopper (the package flash-attn-4).

Those take a mask as a function of query and key, and lists of the blocks of keys that a block of queries has to visit:
some under the mask, some whole. Of an interval both are runs of blocks, so one small kernel makes the lists from the
two vectors, on the device and anew in each call. dQ is summed by atomic additions, in another order each time: this
backward is not deterministic, and `auto` does not take it (`kernels.resolve`).

Maths, arguments and the reference are in `interval_attention.py`. The package compiles its kernels when they are first
called, some ten seconds.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require_dtype
from kernels.interval_attention import check
from kernels.interval_attention_kernels import _plan_kernel, _ranges
from kernels.interval_attention_triton import gradient_room
from kernels.operation import operation
from kernels.random import Dropout, active

BLOCK = 128
"""Queries and keys of a block in the lists."""
HEAD_DIM = 128
"""The size that it has been checked and timed at; at 64 the kernel of ours is faster forward, as fast backward."""
Lists = tuple[Tensor, Tensor, Tensor, Tensor]
"""Masked blocks and their indices, whole blocks and theirs: int32 [B, 1, rows], [B, 1, rows, columns], twice."""


@triton.jit
def _write(count, index, first, second, third, fourth, row, columns, NC: tl.constexpr):
    """A row's blocks [first, second) and then [third, fourth): how many, and which."""
    place = tl.arange(0, NC)
    left = second - first
    total = left + fourth - third
    tl.store(count + row, total)
    block = tl.where(place < left, first + place, third + place - left)
    tl.store(index + row * columns + place, block, mask=place < total)


@triton.jit
def _key_lists_kernel(
    attend_from, attend_to, masked, masked_index, whole, whole_index, queries, keys, columns,
    BLOCK: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    """The blocks of keys that a block of queries visits."""
    block = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    _, _, low, inside_low, inside_high, high = _ranges(attend_from, attend_to, batch, rows, queries, keys, BLOCK)
    row = batch * tl.num_programs(0) + block
    low, inside_low, inside_high = low // BLOCK, inside_low // BLOCK, inside_high // BLOCK
    high = (high + BLOCK - 1) // BLOCK
    _write(masked, masked_index, low, inside_low, inside_high, high, row, columns, NC)
    _write(whole, whole_index, inside_low, inside_high, 0, 0, row, columns, NC)


@triton.jit
def _query_lists_kernel(plan, masked, masked_index, whole, whole_index, columns, NC: tl.constexpr):
    """The blocks of queries that a block of keys visits, from `_plan_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(plan + 4 * row)
    inside_low = tl.load(plan + 4 * row + 1)
    inside_high = tl.load(plan + 4 * row + 2)
    high = tl.load(plan + 4 * row + 3)
    _write(masked, masked_index, low, inside_low, inside_high, high, row, columns, NC)
    _write(whole, whole_index, inside_low, inside_high, 0, 0, row, columns, NC)


def _lists(batch: int, rows: int, columns: int, device: torch.device) -> Lists:
    counts = torch.empty(2, batch, 1, rows, dtype=torch.int32, device=device)
    indices = torch.empty(2, batch, 1, rows, columns, dtype=torch.int32, device=device)
    return counts[0], indices[0], counts[1], indices[1]


def key_lists(attend_from: Tensor, attend_to: Tensor, keys: int) -> Lists:
    """For each block of queries, the blocks of keys that it visits; a hidden one may be among the masked (forward)."""
    batch, queries = attend_from.shape
    rows, columns = triton.cdiv(queries, BLOCK), triton.cdiv(keys, BLOCK)
    lists = _lists(batch, rows, columns, attend_from.device)
    _key_lists_kernel[(rows, batch)](
        attend_from, attend_to, *lists, queries, keys, columns, BLOCK=BLOCK, NC=triton.next_power_of_2(columns)
    )
    return lists


def query_lists(attend_from: Tensor, attend_to: Tensor, keys: int) -> Lists:
    """For each block of keys, the blocks of queries that see it (backward)."""
    batch, queries = attend_from.shape
    rows, columns = triton.cdiv(keys, BLOCK), triton.cdiv(queries, BLOCK)
    lists = _lists(batch, rows, columns, attend_from.device)
    plan = torch.empty(batch, rows, 4, dtype=torch.int32, device=attend_from.device)
    width = triton.next_power_of_2(columns)
    _plan_kernel[(rows, batch)](attend_from, attend_to, plan, queries, keys, NQ=width, BM=BLOCK, BN=BLOCK)
    _query_lists_kernel[(batch * rows,)](plan, *lists, columns, NC=width)
    return lists


@functools.cache
def _package() -> tuple[Any, Any, Any]:
    """The package's forward and backward function and its type of lists (torch's own `_fa4.py` calls the same two)."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd, BlockSparseTensorsTorch


@functools.cache
def _visible() -> Any:
    """The mask as the package wants it: a function that is compiled into the kernels."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    @cute.jit
    def visible(batch, head, query, key, lengths, vectors):
        # The package calls this for every element of a masked block: one load, not two.
        both = cutlass.Int64(vectors[0][batch[0], query[0]])
        start = utils.scalar_to_ssa(cutlass.Int32(both), cutlass.Int32)
        stop = utils.scalar_to_ssa(cutlass.Int32(both >> 32), cutlass.Int32)
        return (key >= start) & (key < stop)

    return visible


def _pairs(attend_from: Tensor, attend_to: Tensor) -> Tensor:
    """Both vectors in one: int64 [B, queries], attend_from in the lower half."""
    return torch.stack([attend_from, attend_to], -1).view(torch.int64).squeeze(-1)


@operation("tiankong::flash4_attention")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, attend_from: Tensor, attend_to: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out, lse."""
    run, _, lists = _package()
    out, lse, *_ = run(
        q, k, v, softmax_scale=scale, return_lse=True,
        mask_mod=_visible(), aux_tensors=[_pairs(attend_from, attend_to)],
        block_sparse_tensors=lists(*key_lists(attend_from, attend_to, k.shape[1]), block_size=(BLOCK, BLOCK)),
    )  # fmt: skip
    return out, lse


@_forward.fake
def _(q, k, v, attend_from, attend_to, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@operation("tiankong::flash4_attention_backward", mutates=("dq", "dk", "dv"))
def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
    attend_from: Tensor, attend_to: Tensor, out: Tensor, lse: Tensor, scale: float,
) -> None:  # fmt: skip
    """Writes the gradients."""
    _, run, lists = _package()
    run(
        q, k, v, out, dout, lse, softmax_scale=scale, dq=dq, dk=dk, dv=dv,
        mask_mod=_visible(), aux_tensors=[_pairs(attend_from, attend_to)],
        block_sparse_tensors=lists(*query_lists(attend_from, attend_to, k.shape[1]), block_size=(BLOCK, BLOCK)),
    )  # fmt: skip


@_backward.fake
def _(dq, dk, dv, *others):
    return None


def _setup(ctx, inputs, output):
    q, k, v, attend_from, attend_to, scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, attend_from, attend_to, out, lse)
    ctx.scale = scale
    ctx.mark_non_differentiable(lse)


def _derivative(ctx, dout, _lse):
    saved = ctx.saved_tensors  # once: under activation checkpointing it recomputes
    dq, dk, dv = gradient_room(*saved[:3])
    _backward(dq, dk, dv, dout.contiguous(), *saved, ctx.scale)
    return dq, dk, dv, None, None, None


_forward.differentiate(_derivative, _setup)


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend_from: Tensor,
    attend_to: Tensor,
    *,
    scale: float,
    alpha: float = 1.0,
    softcap: float = 0.0,
    dropout: Dropout | None = None,
    want_max_logit: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """Interval attention by FlashAttention 4; see `kernels.interval_attention.interval_attention`.

    bf16, head_dim HEAD_DIM, as many key-value heads as query heads; no softcap, dropout or max_logit: else a
    ValueError. alpha changes nothing: scores are float32. The forward pass is deterministic, dq is not.
    """
    check(q, k, v, attend_from, attend_to, softcap, dropout)
    if softcap or active(dropout) is not None or want_max_logit:
        raise ValueError(
            "interval_attention: flash4 has no softcap, dropout or max_logit; set kernels.interval_attention"
        )
    if q.shape[-1] != HEAD_DIM or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"interval_attention: {q.shape[2]} heads of {q.shape[-1]} over {k.shape[2]} key-value heads; flash4 takes "
            f"heads of {HEAD_DIM}, as many of both: set kernels.interval_attention to triton, flex, sdpa or reference"
        )
    require_dtype("interval_attention (flash4)", "q", q, torch.bfloat16)
    return *_forward(q, k, v, attend_from.contiguous(), attend_to.contiguous(), scale), None
