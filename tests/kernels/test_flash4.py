"""FlashAttention 4 as an implementation of attention: its lists of blocks anywhere, its kernels on a Hopper GPU."""

from __future__ import annotations

import importlib.util
import os

import kernel_formulas as formulas
import pytest
import torch
from kernel_formulas import as64, error_ratio, leaf
from test_kernel_references import intervals

import kernels.interval_attention_flash4 as flash4
from kernels.interval_attention import interval_mask, unpack_heads

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HERE = CUDA and importlib.util.find_spec("flash_attn") is not None
pytestmark = pytest.mark.gpu if CUDA else pytest.mark.unit


@pytest.mark.skipif(not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="test_interpreted.py runs it")
@pytest.mark.parametrize("mask", ["causal", "full", "prefix", "one", "random"])
@pytest.mark.parametrize("queries,keys", [(50, 50), (33, 70)])
def test_the_kernels_lists_hold_each_visible_block_once(monkeypatch, mask, queries, keys):
    monkeypatch.setattr(flash4, "BLOCK", 16)
    start, stop = (vector.contiguous().to(DEVICE) for vector in intervals(mask, 2, queries, keys))
    seen = interval_mask(start, stop, keys)
    by_queries = flash4.key_lists(start, stop, keys)
    by_keys = flash4.query_lists(start, stop, keys)
    for batch in range(2):
        for i in range(-(-queries // 16)):
            for j in range(-(-keys // 16)):
                tile = seen[batch, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
                for (masked, masked_index, whole, whole_index), row, column in ((by_queries, i, j), (by_keys, j, i)):
                    under_mask = masked_index[batch, 0, row, : masked[batch, 0, row]].tolist()
                    unmasked = whole_index[batch, 0, row, : whole[batch, 0, row]].tolist()
                    assert (under_mask + unmasked).count(column) == 1 or not tile.any()
                    assert (under_mask + unmasked).count(column) <= 1
                    assert column not in unmasked or (tile.all() and tile.shape[1] == 16)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="needs flash-attn-4 and a Hopper GPU")
@pytest.mark.parametrize("mask", ["causal", "full", "prefix", "one", "random"])
def test_attention(mask):
    start, stop = (vector.to(DEVICE) for vector in intervals(mask, 2, 200, 200))
    inputs = [leaf(2, 200, 2, 128, seed=i).detach().to(DEVICE, torch.bfloat16).requires_grad_() for i in range(3)]
    wide = [as64(t) for t in inputs]
    out, lse, _ = flash4.interval_attention(*inputs, start, stop, scale=0.09)
    expected, expected_lse = formulas.interval_attention(*wide, start, stop, scale=0.09)
    torch.testing.assert_close(lse.double(), expected_lse.to(DEVICE), atol=1e-4, rtol=1e-4)
    dout = leaf(*out.shape, seed=9).detach().to(DEVICE)
    grads = torch.autograd.grad(out, inputs, dout.bfloat16())
    wanted = torch.autograd.grad(expected, wide, dout.bfloat16().double())
    for got, want in zip((out, *grads), (expected, *wanted), strict=True):
        assert error_ratio(got, want) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="needs flash-attn-4 and a Hopper GPU")
def test_gradients_of_packed_heads_lie_in_one_tensor():
    packed = leaf(2, 256, 4, 3, 128, seed=1).detach().to(DEVICE, torch.bfloat16).requires_grad_()
    start, stop = (vector.to(DEVICE) for vector in intervals("prefix", 2, 256, 256))
    heads = unpack_heads(packed)
    parts = torch.autograd.grad(flash4.interval_attention(*heads, start, stop, scale=0.09)[0].sum(), heads)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_what_it_lacks_is_refused():
    q, vectors = torch.zeros(1, 4, 2, 128, dtype=torch.bfloat16), [torch.zeros(1, 4, dtype=torch.int32)] * 2
    with pytest.raises(ValueError, match="2 heads of 64 over 2 key-value heads; flash4 takes heads of 128"):
        flash4.interval_attention(*[q[..., :64]] * 3, *vectors, scale=1.0)
    with pytest.raises(ValueError, match="2 heads of 128 over 1 key-value heads"):
        flash4.interval_attention(q, q[:, :, :1], q[:, :, :1], *vectors, scale=1.0)
    with pytest.raises(ValueError, match="flash4 has no softcap, dropout or max_logit"):
        flash4.interval_attention(q, q, q, *vectors, scale=1.0, want_max_logit=True)
    with pytest.raises(ValueError, match="float16"):
        flash4.interval_attention(q.half(), q.half(), q.half(), *vectors, scale=1.0)
