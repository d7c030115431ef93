"""FP8 products: the reference against e4m3 written out and float64, and the Triton kernels (on a CPU interpreted)."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F
from kernel_formulas import error_ratio
from torch import Tensor

from kernels.fp8_product import fp8_product as reference
from kernels.fp8_product import quantise_rows as reference_rows
from kernels.linear import linear, linear_and_input

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.gpu if CUDA else pytest.mark.unit

WORST = math.sqrt(2) * 2.0**-3 / math.sqrt(12)
"""Largest RMS error ratio of a product by rounding both its operands.

e4m3 steps by 2⁻³ of a value's power of two, so an error spread evenly over a step has an RMS of 2⁻³ / √12 of a value
just over a power of two, and less of any other; the errors of two operands are independent.
"""
LEAST = WORST / 2  # of values just under a power of two
BF16 = 2.0**-8 / math.sqrt(3)  # the same of rounding to bf16, 2⁻⁷ / √12


def values(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).bfloat16()


def uneven(rows: int, columns: int, seed: int) -> Tensor:
    """Rows of sizes from 1e-12 to 1e12, a row of zeros, one with an outlier, and one near the end of bf16's range."""
    x = values(rows, columns, seed=seed) * torch.logspace(-12, 12, rows)[:, None].bfloat16()
    x[0] = 0
    x[rows // 2, 3] *= 1e4
    x[rows - 1] *= 1e25
    return x


def grid() -> list[float]:
    """Every finite e4m3 value from 0 up, by the format's definition: steps of 2⁻⁹, then eight to a power of two."""
    return [step * 2.0**-9 for step in range(8)] + [
        (1 + step / 8) * 2.0**power for power in range(-6, 9) for step in range(8) if (power, step) != (8, 7)
    ]


def test_values_are_the_nearest_of_the_format():
    x = uneven(24, 64, seed=1)
    found, scales = reference_rows(x)
    points = torch.tensor(grid(), dtype=torch.float64)
    assert points.max() == 448
    for row, scale, rounded in zip(x.double(), scales.double().tolist(), found.double(), strict=True):
        assert math.frexp(scale)[0] == 0.5  # a power of two
        assert row.abs().max() <= 448 * scale
        assert row.abs().max() > 224 * scale or not row.any()
        distances = (row.abs()[:, None] / scale - points).abs()
        assert torch.equal((row / scale - rounded).abs(), distances.min(1).values)
        assert not (row * rounded < 0).any()


def test_a_scale_of_columns_rounds_as_one_of_rows():
    """What the backward pass and tensor-parallel ranks rely on."""
    x = values(48, 64, seed=2) * torch.logspace(-2, 2, 48)[:, None].bfloat16()
    (by_row, rows), (by_column, columns) = reference_rows(x), reference_rows(x.t())
    both = by_row.float() * rows[:, None], by_column.float().t() * columns
    normal = x.abs() >= 2.0**-6 * torch.maximum(rows[:, None], columns)
    assert normal.float().mean() > 0.8
    assert torch.equal(both[0][normal], both[1][normal])
    assert not torch.equal(*both)


@pytest.mark.parametrize(("rows", "columns", "outputs"), [((7,), 64, 48), ((3, 50), 176, 96), ((), 32, 16)])
def test_the_error_is_that_of_the_rounded_operands(rows, columns, outputs):
    x, weight = values(*rows, columns, seed=3), values(outputs, columns, seed=4, scale=0.02)
    found = reference(x, weight)
    assert found.dtype == torch.bfloat16
    assert found.shape == (*rows, outputs)
    exact = x.double() @ weight.double().t()
    assert LEAST < error_ratio(found, exact) < math.hypot(WORST, BF16)


def test_each_row_keeps_its_bits_whatever_its_size():
    x, weight = values(40, 64, seed=3), values(48, 64, seed=4)
    sizes = 2.0 ** torch.arange(-60, 60, 3)[:, None]
    assert torch.equal(reference(x * sizes.bfloat16(), weight).float(), reference(x, weight).float() * sizes)


def gradients(x: Tensor, weight: Tensor, dout: Tensor, multiply) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of x and the float32 sum of the weight's gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=weight.device)
    out = linear(x, weight, multiply)
    out.backward(dout)
    assert weight.grad is None
    return out.detach(), x.grad, weight.main_grad


def test_gradients_of_inputs_are_in_fp8_and_of_weights_as_ever():
    x, weight, dout = values(2, 40, 64, seed=5), values(96, 64, seed=6), values(2, 40, 96, seed=7, scale=1e-6)
    out, dx, total = gradients(x, weight, dout, reference)
    assert torch.equal(out, reference(x, weight))
    assert LEAST < error_ratio(dx, dout.double() @ weight.double()) < math.hypot(WORST, BF16)
    assert torch.equal(total, gradients(x, weight, dout, None)[2])


def test_the_output_may_be_written_to():
    """By a sum over ranks in place, say."""
    x, weight = values(2, 40, 64, seed=5), values(96, 64, seed=6).requires_grad_()
    linear(x, weight, reference).zero_().sum().backward()
    assert not weight.grad.any()


def test_without_a_sum_the_gradient_of_the_weight_is_autograds():
    x, weight = values(40, 64, seed=5), values(96, 64, seed=6).requires_grad_()
    dout = values(40, 96, seed=7)
    linear(x, weight, reference).backward(dout)
    assert torch.equal(weight.grad, dout.t() @ x)


def test_what_reads_the_input_next_gets_both_gradients():
    x, weight = values(40, 64, seed=5).requires_grad_(), values(96, 64, seed=6).requires_grad_()
    dout, dnext = values(40, 96, seed=7), values(40, 64, seed=8)
    weight.main_grad = torch.zeros(weight.shape)
    out, passed = linear_and_input(x, weight, reference)
    torch.autograd.backward([out, passed * 3.0], [dout, dnext])
    assert torch.equal(x.grad, dnext * 3.0 + reference(dout, weight.detach().t()))
    x.grad = None
    linear_and_input(x, weight, reference)[0].backward(dout)
    assert torch.equal(x.grad, reference(dout, weight.detach().t()))


def test_what_trains_nothing_is_multiplied_in_bf16():
    x, weight = values(40, 64, seed=5), values(96, 64, seed=6).requires_grad_()
    with torch.no_grad():
        assert torch.equal(linear(x, weight, reference), F.linear(x, weight))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    x, weight = values(5, 64, seed=5), values(32, 64, seed=6)
    clean = reference(x, weight)
    x[2, 7] = bad
    found = reference(x, weight)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    weight[9, 0] = bad
    assert reference(x, weight)[:, 9].isnan().all()


def test_wrong_arguments_are_named():
    x, weight = values(5, 64, seed=5), values(32, 64, seed=6)
    with pytest.raises(ValueError, match=r"x has shape \[5, 48\] and weight \[32, 64\]"):
        reference(x[:, :48], weight)
    with pytest.raises(ValueError, match="weight has 31 outputs; FP8 products need a multiple of 16"):
        reference(x, weight[:31])
    with pytest.raises(ValueError, match="weight has 40 columns; FP8 products need a multiple of 16"):
        reference(x[:, :40], weight[:, :40])
    with pytest.raises(ValueError, match=r"weight is torch.float32; use torch.bfloat16"):
        reference(x, weight.float())
    with pytest.raises(ValueError, match=r"x is torch.int64"):
        reference(x.long(), weight)


if CUDA or INTERPRETED:  # without a GPU, test_interpreted.py runs these in a process of their own
    from kernels.fp8_product_triton import Scratch, fp8_product, quantise_rows

    DEVICE = "cuda" if CUDA else "cpu"
    LARGE = [(1000, 2048), (513, 5504), (300, 11008), (40, 32768)] if CUDA else [(33, 208)]

    def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
        for one, other in zip(found, wanted, strict=True):
            word = torch.uint8 if one.dtype == torch.float8_e4m3fn else torch.int32
            assert torch.equal(one.cpu().view(word), other.view(word))

    @pytest.mark.parametrize(("rows", "columns"), [(1, 16), (7, 48), (64, 128), *LARGE])
    def test_the_kernel_rounds_to_the_bit(rows, columns):
        x = uneven(rows, columns, seed=9)
        on_device = x.to(DEVICE)
        same(quantise_rows(on_device), reference_rows(x))
        same(quantise_rows(on_device.t()), reference_rows(x.t()))  # columns of a matrix
        same(quantise_rows(on_device[:, : columns // 2]), reference_rows(x[:, : columns // 2]))
        same(quantise_rows(on_device[:, ::2]), reference_rows(x[:, ::2]))
        x[rows // 3, 5] = math.nan
        _, scales = quantise_rows(x.to(DEVICE))
        assert scales.isnan().nonzero().flatten().tolist() == [rows // 3]
        assert quantise_rows(x.to(DEVICE).t())[1].isnan().nonzero().flatten().tolist() == [5]

    @pytest.mark.parametrize("rows", [(), (1,), (7,), (3, 50), (0,)])
    @pytest.mark.parametrize("scale", [1.0, 1e-20])
    def test_the_kernel_gives_the_references_product(rows, scale):
        x, weight = values(*rows, 208, seed=10, scale=scale), values(96, 208, seed=11)
        found = fp8_product(x.to(DEVICE), weight.to(DEVICE))
        wanted = reference(x, weight)
        assert found.dtype == torch.bfloat16
        assert found.shape == wanted.shape
        assert not found._is_view()
        if wanted.numel():
            # Hopper's units keep 14 bits of a sum of 208 terms; the rest is two roundings to bf16.
            assert error_ratio(found.cpu(), wanted) < 2 * BF16

    def test_the_kernel_gives_the_references_gradients():
        x, weight, dout = values(70, 64, seed=12), values(96, 64, seed=13), values(70, 96, seed=14)
        moved = [part.to(DEVICE) for part in (x, weight, dout)]
        for found, wanted in zip(gradients(*moved, fp8_product), gradients(x, weight, dout, reference), strict=True):
            assert error_ratio(found.cpu(), wanted) < 2 * BF16

    def test_the_kernel_keeps_what_is_not_finite():
        x, weight = values(40, 64, seed=12), values(96, 64, seed=13)
        x[3, 1], weight[5, 2] = math.inf, math.nan
        found = fp8_product(x.to(DEVICE), weight.to(DEVICE)).cpu()
        assert found.isnan().sum() == 96 + 40 - 1
        assert found[3].isnan().all()
        assert found[:, 5].isnan().all()

    def test_the_kernel_is_registered_soundly():
        inputs = values(2, 16, seed=15).to(DEVICE), values(16, 16, seed=16).to(DEVICE).t()
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.tiankong.fp8_product, inputs, test_utils=checks)

    def test_the_kernels_memory_is_used_again():
        scratch, device = Scratch(), torch.device(DEVICE)
        first = scratch.take(64, device)
        assert scratch.take(32, device).data_ptr() == first.data_ptr()
        assert scratch.take(128, device).numel() == 128
        assert scratch.take(64, device).data_ptr() == scratch.take(128, device).data_ptr()
        # Products of many sizes after one another are those of each alone.
        weight = values(96, 64, seed=17).to(DEVICE)
        cases = [(values(rows, 64, seed=rows).to(DEVICE), weight) for rows in (20, 5, 40, 7)]
        for (x, _), found in zip(cases, [fp8_product(*case) for case in cases], strict=True):
            assert error_ratio(found.cpu(), reference(x.cpu(), weight.cpu())) < 2 * BF16

    def test_the_kernel_wants_bf16():
        with pytest.raises(ValueError, match=r"x is torch.float32; use torch.bfloat16"):
            fp8_product(torch.ones(4, 16, device=DEVICE), torch.ones(16, 16, device=DEVICE))
