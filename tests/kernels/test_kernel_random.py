"""Addressed randomness: the words, the keep bits' addresses and shares, and the normal deviates of any slice."""

from __future__ import annotations

import pytest
import torch
from kernel_formulas import keep_scalar, philox_scalar

from kernels.random import (
    Dropout,
    addressed_normal,
    drop_hidden,
    dropout_key,
    keep_attention,
    keep_hidden,
    mix_key,
    normal_slice,
    philox,
)

pytestmark = pytest.mark.unit
# known answers of Random123's philox4x32-10: (counter, key, words)
KNOWN = [
    ((0, 0, 0, 0), 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
]


@pytest.mark.parametrize("counter,key,words", KNOWN)
def test_philox_known_answers(counter, key, words):
    assert philox_scalar(key, counter) == words
    assert [int(w) for w in philox(key, *(torch.tensor([c]) for c in counter))] == words


def test_philox_matches_integers():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (4, 50), generator=generator)
    for key in (1, dropout_key(3, 4, "ffn"), 2**63 + 12345):
        words = torch.stack(philox(key, *counters))
        for i in range(50):
            assert words[:, i].tolist() == philox_scalar(key, tuple(counters[:, i].tolist()))


def test_keep_bits_are_where_they_should_be():
    key, samples = dropout_key(1, 2, "attention"), torch.tensor([7, 2**33 + 5])
    hidden = keep_hidden(Dropout(0.4, key, samples, offset=3), 2, 5)
    attention = keep_attention(Dropout(0.4, key, samples, offset=2), 2, 3, 3)
    for b, sample in enumerate(samples.tolist()):
        for p in range(2):
            for c in range(5):
                assert hidden[b, p, c].item() == keep_scalar(key, 0.4, sample, (3 + p) * 5 + c)
        for h in range(2):
            for q in range(3):
                for k in range(3):
                    assert attention[b, h, q, k].item() == keep_scalar(key, 0.4, sample, ((2 + h) * 3 + q) * 3 + k)


def test_shares_and_scaling():
    x = torch.ones(3, 64, 512)
    out = drop_hidden(x, Dropout(0.1, dropout_key(0, 0, "ffn"), torch.arange(3)))
    assert abs((out == 0).double().mean().item() - 0.1) < 3 * (0.09 / x.numel()) ** 0.5
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    assert drop_hidden(x, Dropout(0.0, 1, torch.arange(3))) is x


def test_keys_differ():
    keys = {dropout_key(s, layer, site) for s in range(4) for layer in range(12) for site in ("ffn", "attention")}
    keys |= {mix_key(1, "weight", f"layers.{i}") for i in range(20)} | {mix_key(1, 2, "3"), mix_key(1, "2", 3)}
    assert len(keys) == 4 * 12 * 2 + 22
    assert all(2**62 <= key < 2**63 for key in keys)


def test_normals_of_any_slice_equal_the_whole():
    key = mix_key(5, "weight", "layers.0.ffn")
    whole = addressed_normal(key, torch.arange(40 * 24)).view(40, 24)
    for rows, columns in [((0, 40), (0, 24)), ((10, 20), (0, 24)), ((0, 40), (8, 16)), ((3, 8), (5, 12))]:
        part = normal_slice(key, rows, columns, 24)
        assert torch.equal(part, whole[rows[0] : rows[1], columns[0] : columns[1]])


def test_normals_are_normal():
    z = normal_slice(mix_key(0, "weight", "x"), (0, 1000), (0, 1000), 1000, dtype=torch.float64)
    assert abs(z.mean()) < 4e-3
    assert abs(z.var() - 1) < 6e-3
    assert abs(z.pow(4).mean() - 3) < 0.05
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4e-3
    assert 4.5 < z.abs().max() < 6.8
    with pytest.raises(ValueError, match="do not lie"):
        normal_slice(1, (0, 2), (0, 9), 8)
