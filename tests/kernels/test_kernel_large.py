"""Offsets beyond 2³¹ elements: the last sequences of a tensor larger than that equal the same sequences on their own.

Every operation here treats a sequence by itself and always in the same order, so the two are equal bit for bit; that
the values are right is shown at small sizes by test_kernel_triton.py. The largest case takes some 40 GiB of GPU memory:
`python -m pytest -m slow tests/kernels/test_kernel_large.py`.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 70 * 2**30,
        reason="needs a GPU of 80 GB",
    ),
]
BATCH, LENGTH, WIDTH = 257, 2048, 4096  # 2³¹ elements and one sequence of 2²³
LAST = 2


def draw(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def last_equals_alone(function, inputs, vectors):
    """function(*inputs, *vectors) → out, run on the whole batch and on its LAST sequences: out and gradients equal."""
    torch.manual_seed(0)
    whole = [tensor.requires_grad_() for tensor in inputs]
    out = function(*whole, *vectors)
    assert whole[0].numel() > 2**31
    dout = draw(*out.shape)
    grads = torch.autograd.grad(out, whole, dout)
    got = [out.detach()[-LAST:].clone(), *(grad[-LAST:].clone() for grad in grads)]
    part = [tensor.detach()[-LAST:].clone().requires_grad_() for tensor in whole]
    dout = dout[-LAST:].clone()
    del out, grads, whole, inputs
    alone = function(*part, *(vector[-LAST:].contiguous() for vector in vectors))
    wanted = [alone.detach(), *torch.autograd.grad(alone, part, dout)]
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert b.float().square().mean() > 1e-4
        assert torch.equal(a, b), f"tensor {index}"
    torch.cuda.empty_cache()


@pytest.mark.parametrize("width", [WIDTH, 3 * WIDTH])
def test_residual_norm(width):
    from kernels.random import Dropout, dropout_key
    from kernels.residual_norm_triton import residual_norm

    bias, weight, shift = (draw(width) for _ in range(3))
    key = dropout_key(1, 2, "ffn")

    def call(x, f, samples):
        return residual_norm(x, f, bias, weight, shift, alpha=3.0, dropout=Dropout(0.1, key, samples))

    batch = BATCH * WIDTH // width + 1
    samples = torch.arange(batch, device="cuda")
    last_equals_alone(call, [draw(batch, LENGTH, width) for _ in range(2)], [samples])


def test_bias_activation():
    from kernels.bias_activation_triton import bias_activation

    bias = draw(2 * WIDTH)
    last_equals_alone(lambda x: bias_activation(x, bias, kind="geglu"), [draw(BATCH, LENGTH, 2 * WIDTH)], [])


def test_rotary():
    from kernels.rotary_triton import rotary

    heads, bias = WIDTH // 128, draw(WIDTH)
    positions = torch.randint(0, LENGTH, (BATCH, 2, LENGTH), dtype=torch.int32, device="cuda")

    def call(x, positions):
        return rotary(x, bias, positions, period=4, passthrough=1, rotary_dim=128, mode="2d")

    last_equals_alone(call, [draw(BATCH, LENGTH, heads, 128)], [positions])


def test_attention():
    from kernels.interval_attention_triton import interval_attention

    start = torch.randint(0, LENGTH // 2, (BATCH, LENGTH), dtype=torch.int32, device="cuda")
    stop = start + torch.randint(0, LENGTH // 2, (BATCH, LENGTH), dtype=torch.int32, device="cuda")

    def call(q, k, v, start, stop):
        return interval_attention(q, k, v, start, stop, scale=0.1)[0]

    last_equals_alone(call, [draw(BATCH, LENGTH, WIDTH // 128, 128) for _ in range(3)], [start, stop])
