"""The sum alone of residual + norm, which generation asks for: the reference and, in the interpreter, the kernel."""

from __future__ import annotations

import os

import pytest
import torch

from kernels.residual_norm import residual_norm as reference

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.gpu if CUDA else pytest.mark.unit
SHAPES = [(1, 1, 96), (3, 5, 700), (0, 1, 32)]


def case(shape, with_bias):
    generator = torch.Generator().manual_seed(sum(shape))
    x, f = (torch.randn(*shape, generator=generator) for _ in range(2))
    bias = torch.randn(shape[-1], generator=generator) if with_bias else None
    return x, f, bias, 0.5 * x.double() + f.double() + (0.0 if bias is None else bias.double())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_sum(shape, with_bias):
    x, f, bias, wanted = case(shape, with_bias)
    assert torch.allclose(reference(x, f, bias, None, None, alpha=0.5).double(), wanted, atol=1e-6)


def test_what_only_a_norm_has_is_refused():
    x = torch.zeros(2, 8)
    for f, shift in ((None, None), (x, x[0])):
        with pytest.raises(ValueError, match="without a weight it is a sum of x and f"):
            reference(x, f, None, None, shift)


if CUDA or INTERPRETED:  # without a GPU, test_interpreted.py runs these in a process of their own
    from kernels.residual_norm_triton import residual_norm

    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_kernel_is_the_sum(shape, with_bias):
        x, f, bias, wanted = case(shape, with_bias)
        device = "cuda" if CUDA else "cpu"
        moved = [None if part is None else part.to(device) for part in (x, f, bias)]
        assert torch.allclose(residual_norm(*moved, None, None, alpha=0.5).double().cpu(), wanted, atol=1e-6)
