"""Interval attention by the Triton kernels of `interval_attention_kernels.py`: tiles, launches, autograd.

Maths, arguments and the reference are in `interval_attention.py`. Least work, of the A visible (query, key, head)
triples: forward 4·D·A operations, backward 10·D·A.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.interval_attention import check
from kernels.interval_attention_kernels import (
    _delta_kernel,
    _dkv_kernel,
    _dq_kernel,
    _forward_kernel,
    _plan_kernel,
)
from kernels.operation import operation
from kernels.random import Dropout, active

HEAD_DIMS = (16, 32, 64, 128, 256)
MAX_SEQUENCES = 65535  # batch · heads: the second axis of a grid
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """Queries and keys a block, warps a program, stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    dkv: Tile
    dq: Tile


# found by sweeps on an H100 (docs/kernels.md): four warps a program, so that several share a multiprocessor and one's
# softmax runs beside another's products
TILES = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
}
SMALL = Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))  # float32, or other head dims


def tiles_for(head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles for a head size."""
    return SMALL if dtype == torch.float32 else TILES.get(head_dim, SMALL)


def _scalars(scale: float, softcap: float) -> tuple[float, float]:
    """(unit, inner) of the kernels: logit · log2 e = unit · x, x the product of q and k or its tanh."""
    return (softcap * LOG2E, scale / softcap) if softcap else (scale * LOG2E, 1.0)


def _random(key: int, first_head: int, probability: float) -> tuple[int, int, float]:
    return key, first_head, 1.0 / (1.0 - probability)


def _switches(q: Tensor, keys: int, tile: Tile, softcap: float, probability: float) -> dict[str, int | bool]:
    return {
        "D": q.shape[-1],
        "BM": tile.queries,
        "BN": tile.keys,
        "SOFTCAP": softcap != 0.0,
        "THRESHOLD": min(round(probability * 2**32), 2**32 - 1),
        "ALIGNED": keys % 4 == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """[batch · positions, columns] of a [batch, positions, heads, dim], for blocks [rows, dim] by the copy engine."""
    batch, positions, heads, dim = tensor.shape
    columns = (heads - 1) * tensor.stride(2) + dim
    return TensorDescriptor(tensor, [batch * positions, columns], [tensor.stride(1), 1], [rows, dim])


def _fits_descriptor(tensor: Tensor) -> bool:
    """Whether the tensor is one matrix of rows with 16-byte steps, as a slice of a packed projection is."""
    batch, positions, heads, _ = tensor.shape
    size = tensor.element_size()
    whole = batch == 1 or tensor.stride(0) == positions * tensor.stride(1)
    inside = heads == 1 or tensor.stride(1) >= heads * tensor.stride(2) or positions == 1
    steps = tensor.stride(1) * size % 16 == 0 and tensor.stride(2) * size % 16 == 0
    return tensor.stride(3) == 1 and whole and inside and steps and tensor.data_ptr() % 16 == 0


@operation("tiankong::interval_attention")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, attend_from: Tensor, attend_to: Tensor, samples: Tensor | None,
    scale: float, softcap: float, key: int, first_head: int, probability: float, want_max: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, lse, and the largest logit of each head (empty unless wanted)."""
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    tile = tiles_for(dim, q.dtype).forward
    blocks = triton.cdiv(queries, tile.queries)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    tops = torch.empty(batch, heads, blocks if want_max else 0, dtype=torch.float32, device=q.device)
    if out.numel():
        _forward_kernel[(blocks, batch * heads)](
            _descriptor(q, tile.queries), _descriptor(k, tile.keys), _descriptor(v, tile.keys),
            attend_from, attend_to, samples, out, lse, tops, heads, heads // kv_heads, queries, keys,
            q.stride(2), k.stride(2), v.stride(2), *_scalars(scale, softcap), scale,
            *_random(key, first_head, probability), WANT_MAX=want_max, **_switches(q, keys, tile, softcap, probability),
        )  # fmt: skip
    return out, lse, tops.amax(dim=(0, 2)) if want_max else tops.new_empty(0)


@_forward.fake
def _(q, k, v, attend_from, attend_to, samples, scale, softcap, key, first_head, probability, want_max):
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32),
        q.new_empty(q.shape[2] if want_max else 0, dtype=torch.float32),
    )


@operation("tiankong::interval_attention_backward", mutates=("dq", "dk", "dv"))
def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
    attend_from: Tensor, attend_to: Tensor, samples: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, softcap: float, key: int, first_head: int, probability: float,
) -> None:  # fmt: skip
    """Writes the gradients: dk and dv with the same steps, positions of a batch in one run."""
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    tiles = tiles_for(dim, q.dtype)
    if not q.numel() or not k.numel():
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    delta = torch.empty_like(lse)
    rows = batch * queries * heads
    _delta_kernel[(triton.cdiv(rows, 32),)](out, dout, delta, rows, heads, queries, D=dim, BR=32, num_warps=4)
    strides, units = (q.stride(2), k.stride(2), v.stride(2)), _scalars(scale, softcap)
    randomness = _random(key, first_head, probability)
    tile = tiles.dkv
    blocks = triton.cdiv(keys, tile.keys)
    plan = torch.empty(batch, blocks, 4, dtype=torch.int32, device=q.device)
    query_blocks = triton.next_power_of_2(triton.cdiv(queries, tile.queries))
    _plan_kernel[(blocks, batch)](
        attend_from, attend_to, plan, queries, keys, NQ=query_blocks, BM=tile.queries, BN=tile.keys, num_warps=4
    )
    _dkv_kernel[(blocks, batch * kv_heads)](
        _descriptor(q, tile.queries), _descriptor(k, tile.keys), _descriptor(v, tile.keys),
        _descriptor(dout, tile.queries), attend_from, attend_to, samples, dk, dv,
        lse, delta, plan, heads, kv_heads, queries, keys,
        *strides, dk.stride(1), dk.stride(2), scale, *units, *randomness,
        GROUP=heads // kv_heads, **_switches(q, keys, tile, softcap, probability),
    )  # fmt: skip
    tile = tiles.dq
    _dq_kernel[(triton.cdiv(queries, tile.queries), batch * heads)](
        _descriptor(q, tile.queries), _descriptor(k, tile.keys), _descriptor(v, tile.keys),
        _descriptor(dout, tile.queries),
        attend_from, attend_to, samples, dq, lse, delta, heads, heads // kv_heads, queries, keys,
        *strides, dq.stride(1), dq.stride(2), scale, *units, *randomness,
        **_switches(q, keys, tile, softcap, probability),
    )  # fmt: skip


@_backward.fake
def _(dq, dk, dv, *others):
    return None


def gradient_room(q, k, v):
    """Where dq, dk and dv go: into one tensor where q, k and v lie together in one, for `unpack_heads`."""
    if q.shape == k.shape and all(t.stride(2) == 3 * t.shape[3] for t in (q, k, v)):
        return q.new_empty(*q.shape[:3], 3, q.shape[3]).unbind(3)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, attend_from, attend_to, samples, scale, softcap, key, first_head, probability, _ = inputs
    out, lse, tops = output
    ctx.save_for_backward(q, k, v, attend_from, attend_to, samples, out, lse)
    ctx.options = (scale, softcap, key, first_head, probability)
    ctx.mark_non_differentiable(lse, tops)


def _derivative(ctx, dout, _lse, _tops):
    saved = ctx.saved_tensors  # once: under activation checkpointing it recomputes
    dq, dk, dv = gradient_room(*saved[:3])
    _backward(dq, dk, dv, dout.contiguous(), *saved, *ctx.options)
    return dq, dk, dv, *(None,) * 9


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Interval attention by the Triton kernels; see `kernels.interval_attention.interval_attention`.

    q, k, v: slices of a packed projection are read in place, others copied first. head_dim: one of HEAD_DIMS.
    alpha changes nothing: scores are float32. Forward and backward are deterministic.
    """
    check(q, k, v, attend_from, attend_to, softcap, dropout)
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"interval_attention: head_dim={q.shape[-1]}; the Triton kernel takes {HEAD_DIMS}, "
            "for others set kernels.interval_attention to flex, sdpa or reference"
        )
    if q.shape[0] * q.shape[2] > MAX_SEQUENCES:
        raise ValueError(
            f"interval_attention: {q.shape[0]} sequences of {q.shape[2]} heads; the Triton kernel takes at most "
            f"{MAX_SEQUENCES} of both multiplied, lower micro_batch_size"
        )
    dropout = active(dropout)
    samples, key, first_head, probability = None, 0, 0, 0.0
    if dropout is not None:
        samples, key, first_head = dropout.sample_index.contiguous(), dropout.key, dropout.offset
        probability = dropout.probability
    if scale <= 0.0:
        raise ValueError(f"interval_attention: scale={scale}; the Triton kernel takes a positive one")
    q, k, v = (tensor if _fits_descriptor(tensor) else tensor.contiguous() for tensor in (q, k, v))
    out, lse, tops = _forward(
        q, k, v, attend_from.contiguous(), attend_to.contiguous(), samples,
        scale, softcap, key, first_head, probability, want_max_logit,
    )  # fmt: skip
    return out, lse, tops if want_max_logit else None
