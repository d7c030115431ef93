"""Products with packed weights: the reference, and the Triton kernel, against float64 (on a CPU in the interpreter)."""

from __future__ import annotations

import os

import kernel_formulas as formulas
import pytest
import torch

from kernels.bias_activation import GATED, KINDS
from kernels.quantised_matmul import quantised_matmul as reference
from kernels.quantised_weight import dequantise, quantise

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.gpu if CUDA else pytest.mark.unit
# few rows of 16-bit x take other kernels than more of them: the tensor cores' (INT4, columns and groups that fit) up to
# eight, the vector kernel up to four
SHAPES = [((3, 64), 40, None), ((2, 5, 96), 33, None), ((1, 160), 70, 32), ((37, 128), 64, 16), ((0, 32), 8, None)]
SHAPES += [((7, 160), 70, 32), ((2, 2600), 5, None), ((8, 1184), 19, None), ((3, 384), 33, 128)]


def case(shape, rows, bits, group, dtype):
    generator = torch.Generator().manual_seed(len(shape) + rows + bits)
    x = torch.randn(*shape, generator=generator).to(dtype)
    packed, scale = quantise(torch.randn(rows, shape[-1], generator=generator), bits, group_size=group)
    return x, packed, scale, x.double() @ dequantise(packed, scale, bits, torch.float64).T


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape, rows, group", SHAPES)
def test_the_reference_is_the_product_with_the_spread_weight(shape, rows, group, bits):
    x, packed, scale, wanted = case(shape, rows, bits, group, torch.float32)
    found = reference(x, packed, scale, bits=bits)
    assert found.dtype == x.dtype
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5 * max(1.0, shape[-1] ** 0.5))


def activated_case(shape, rows, bits, group, dtype, kind, with_bias):
    x, packed, scale, product = case(shape, rows, bits, group, dtype)
    # Near the activation's bend, where a sum of many columns would not be.
    scale, product = scale / 8, product / 8
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(rows)) if with_bias else None
    wide = None if bias is None else bias.double()
    return x, packed, scale, bias, formulas.bias_activation(product, wide, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_reference_applies_the_activation(kind, with_bias):
    x, packed, scale, bias, wanted = activated_case((2, 3, 96), 34, 4, None, torch.float32, kind, with_bias)
    found = reference(x, packed, scale, bits=4, bias=bias, activation=kind)
    assert found.shape == (2, 3, 17 if kind in GATED else 34)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named():
    x, packed, scale, _ = case((2, 64), 40, 8, None, torch.float32)
    with pytest.raises(ValueError, match="x has 64 columns, the weight 128 of 4 bits"):
        reference(x, packed, scale, bits=4)
    with pytest.raises(ValueError, match=r"scale has shape \[3\] for a weight of 40 x 64"):
        reference(x, packed, scale[:3], bits=8)
    with pytest.raises(ValueError, match=r"scale is torch.float32; use torch.float16"):
        reference(x, packed, scale.float(), bits=8)
    with pytest.raises(ValueError, match="activation='swiglu' needs an even number of rows, not 39"):
        reference(x, packed[:39], scale[:39], bits=8, activation="swiglu")
    with pytest.raises(ValueError, match="the bias belongs to the activation"):
        reference(x, packed, scale, bits=8, bias=torch.zeros(40))


if CUDA or INTERPRETED:  # without a GPU, test_interpreted.py runs these in a process of their own
    from kernels.quantised_matmul_triton import quantised_matmul

    DEVICE = "cuda" if CUDA else "cpu"
    TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3} | ({torch.bfloat16: 8e-3} if CUDA else {})

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("shape, rows, group", SHAPES)
    def test_the_kernel_is_the_product_with_the_spread_weight(shape, rows, group, bits, dtype):
        x, packed, scale, wanted = case(shape, rows, bits, group, dtype)
        found = quantised_matmul(*(part.to(DEVICE) for part in (x, packed, scale)), bits=bits)
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        error = (found.double().cpu() - wanted).square().sum().sqrt()
        assert error <= TOLERANCE[dtype] * wanted.square().sum().sqrt()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "shape, rows, bits, group, with_bias",
        [((2, 96), 34, 4, None, True), ((1, 160), 70, 8, 32, False), ((9, 64), 40, 4, None, True)],
    )
    def test_the_kernel_applies_the_activation(shape, rows, bits, group, with_bias, kind):
        """Nine rows take a kernel for it of its own."""
        x, packed, scale, bias, wanted = activated_case(shape, rows, bits, group, torch.float16, kind, with_bias)
        moved = [None if part is None else part.to(DEVICE) for part in (x, packed, scale, bias)]
        found = quantised_matmul(*moved[:3], bits=bits, bias=moved[3], activation=kind)
        assert found.dtype == torch.float16
        assert found.shape == wanted.shape
        assert (found.double().cpu() - wanted).norm() <= 1e-3 * wanted.norm()

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("columns, group", [(2080, None), (2080, 32), (4128, None)])
    def test_the_kernels_for_few_rows_take_bfloat16_bits_apart(columns, group, bits):
        """In the interpreter too, whose stores cut bfloat16 off in place of rounding it."""
        x, packed, scale, wanted = case((3, columns), 19, bits, group, torch.bfloat16)
        found = quantised_matmul(*(part.to(DEVICE) for part in (x, packed, scale)), bits=bits)
        assert (found.double().cpu() - wanted).norm() <= 2.0**-7 * wanted.norm()

    def test_the_kernel_refuses_groups_that_split_a_byte():
        packed = torch.zeros(4, 15, dtype=torch.int8, device=DEVICE)
        scale = torch.ones(4, 6, dtype=torch.float16, device=DEVICE)
        with pytest.raises(ValueError, match="split a byte"):
            quantised_matmul(torch.zeros(2, 30, device=DEVICE), packed, scale, bits=4)
