"""The pieces that a prefix mask is cut into for FlashAttention 2."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention_routes import pieces

pytestmark = pytest.mark.unit


def test_pieces_hold_each_visible_pair_once():
    slots, context = 37, torch.tensor([1, 20, 36, 37], dtype=torch.int32)
    place = torch.arange(slots)
    wanted = torch.block_diag(*[place < (place + 1).clamp(min=edge)[:, None] for edge in context.tolist()])
    found = torch.zeros_like(wanted, dtype=torch.int32)
    for (queries, keys), causal in zip(pieces(context, slots), (False, True), strict=True):
        bounds = zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True)
        for first, last, low, high in bounds:
            tile = torch.ones(int(last - first), int(high - low), dtype=torch.int32)
            assert not causal or not tile.numel() or tile.shape[0] == tile.shape[1]
            found[first:last, low:high] += tile.tril() if causal else tile
    torch.testing.assert_close(found, wanted.int())
