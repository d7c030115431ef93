"""A decoding step of attention: the reference, and the Triton kernel, against float64 (on a CPU in the interpreter)."""

from __future__ import annotations

import math
import os

import pytest
import torch

from kernels.decode_attention import decode_attention as reference

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.gpu if CUDA else pytest.mark.unit

# rows, heads, kv heads, head dim, slots: plain, grouped, one key-value head for many, odd dims, one slot
SHAPES = [(5, 4, 4, 16, 70), (2, 6, 2, 32, 133), (5, 20, 1, 24, 40), (1, 2, 2, 64, 300), (1, 2, 1, 16, 1)]


def case(shape, dtype):
    """Inputs of one step, intervals of several kinds, and the float64 result with the cache as it must be after."""
    rows, heads, kv_heads, dim, slots = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    # Keys and values are slices of one projection, as the layers hand them over.
    packed = draw(rows, 1, kv_heads, 2, dim)
    q, key, value = draw(rows, 1, heads, dim), packed[:, :, :, 0], packed[:, :, :, 1]
    keys, values = draw(rows, slots, kv_heads, dim), draw(rows, slots, kv_heads, dim)
    # Usual: a row sees all up to itself. Then: itself out of sight, a window, beyond the buffer, nothing at all.
    kinds = [(slots // 2, 0, slots // 2 + 1), (slots - 1, 0, slots // 2), (slots // 2, slots // 3, slots - 1)]
    kinds += [(0, -5, slots + 9), (slots // 2, 3, 3)]
    place, first, last = (
        torch.tensor([[kinds[row % len(kinds)][column]] for row in range(rows)], dtype=torch.int32)
        for column in range(3)
    )
    wanted_keys, wanted_values = keys.clone(), values.clone()
    out = torch.zeros(rows, 1, heads, dim, dtype=torch.float64)
    for row in range(rows):
        wanted_keys[row, place[row, 0]], wanted_values[row, place[row, 0]] = key[row, 0], value[row, 0]
        seen = slice(max(0, int(first[row, 0])), max(0, min(slots, int(last[row, 0]))))
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = wanted_keys[row, seen, group].double() @ q[row, 0, head].double() / math.sqrt(dim)
            out[row, 0, head] = torch.softmax(scores, 0) @ wanted_values[row, seen, group].double()
    inputs = (q, key, value, keys, values, place, first, last)
    return inputs, {"scale": dim**-0.5}, (out, wanted_keys, wanted_values)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_stores_the_token_and_attends(shape):
    inputs, options, (wanted, keys, values) = case(shape, torch.float32)
    found = reference(*inputs, **options)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    assert torch.equal(inputs[3], keys)
    assert torch.equal(inputs[4], values)


def test_wrong_arguments_are_named():
    inputs, options, _ = case(SHAPES[0], torch.float32)
    q, key, value, keys, values, *vectors = inputs
    with pytest.raises(ValueError, match=r"q has shape \[5, 2, 4, 16\]"):
        reference(q.expand(-1, 2, -1, -1), key, value, keys, values, *vectors, **options)
    with pytest.raises(ValueError, match=r"values has shape \[5, 69, 4, 16\]"):
        reference(q, key, value, keys, values[:, 1:], *vectors, **options)
    with pytest.raises(ValueError, match=r"place is torch\.int64"):
        reference(q, key, value, keys, values, vectors[0].long(), *vectors[1:], **options)


if CUDA or INTERPRETED:  # without a GPU, test_interpreted.py runs these in a process of their own
    import kernels.decode_attention_triton as triton_step

    DEVICE = "cuda" if CUDA else "cpu"
    # the interpreter's bfloat16 is wrong
    TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3} | ({torch.bfloat16: 8e-3} if CUDA else {})

    def agrees(shape, dtype):
        inputs, options, (wanted, keys, values) = case(shape, dtype)
        inputs = [part.to(DEVICE) for part in inputs]
        found = triton_step.decode_attention(*inputs, **options)
        assert found.dtype == dtype
        error = (found.double().cpu() - wanted).square().sum().sqrt()
        assert error <= TOLERANCE[dtype] * wanted.square().sum().sqrt()
        assert torch.equal(inputs[3].cpu(), keys)
        assert torch.equal(inputs[4].cpu(), values)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_kernel_stores_the_token_and_attends(shape, dtype):
        agrees(shape, dtype)

    @pytest.mark.parametrize("shares", [1, 2, 8])
    def test_the_kernel_may_divide_a_row_among_any_number_of_programs(shares, monkeypatch):
        monkeypatch.setattr(triton_step, "shares_for", lambda *_: shares)
        agrees(SHAPES[0], torch.float32)
        agrees(SHAPES[1], torch.float32)
        agrees(SHAPES[2], torch.float16)

    def test_the_kernels_shares_fill_the_device_but_are_no_finer_than_blocks():
        assert triton_step.shares_for(programs=16, slots=4096, block=64, processors=132) == 64
        assert triton_step.shares_for(programs=16, slots=384, block=64, processors=132) == 8
        assert triton_step.shares_for(programs=1024, slots=4096, block=64, processors=132) == 1
