"""Weight-only quantisation: exact packing, the error a scale allows, groups, and what is refused."""

import pytest
import torch

from kernels.quantised_weight import dequantise, pack_int4, quantise, unpack_int4

pytestmark = pytest.mark.unit


def test_every_pair_of_nibbles_survives_packing() -> None:
    values = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (256, 1)
    assert torch.equal(unpack_int4(packed), values)
    # The published layout: even column in the high nibble.
    assert pack_int4(torch.tensor([[1, -2]], dtype=torch.int8)).item() == 0x1E


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_is_at_most_half_a_step(bits: int, group_size: int | None, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(bits)).to(dtype)
    packed, scale = quantise(weight, bits, group_size=group_size)
    assert packed.shape == (24, 64 if bits == 8 else 32)
    assert scale.shape == ((24,) if group_size is None else (24, 4))
    step = scale.float().view(24, -1, 1).expand(-1, -1, group_size or 64).reshape(24, 64)
    restored = dequantise(packed, scale, bits)
    # Half a step, and what rounding the scale to fp16 takes off the largest value.
    assert ((restored - weight.float()).abs() <= step * (0.5 + 2 ** (bits - 1) * 2**-11)).all()
    # What was quantised once stays as it is.
    again = quantise(restored, bits, group_size=group_size)
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], scale)


def test_rows_of_zeros_and_of_tiny_values() -> None:
    weight = torch.zeros(2, 8)
    weight[1] = 1e-12
    packed, scale = quantise(weight, 4)
    assert not packed.any()
    assert not scale.any()
    assert not dequantise(packed, scale, 4).any()


@pytest.mark.parametrize(
    ("weight", "bits", "group_size", "words"),
    [
        (torch.full((2, 4), torch.nan), 8, None, "non-finite"),
        (torch.full((2, 4), 1e9), 4, None, "too large"),
        (torch.ones(2, 5), 4, None, "5 columns"),
        (torch.ones(2, 6), 8, 4, "group_size=4"),
        (torch.ones(2, 6), 3, None, "bits=3"),
        (torch.ones(6), 8, None, "rows, columns"),
    ],
)
def test_what_cannot_be_quantised(weight: torch.Tensor, bits: int, group_size: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantise(weight, bits, group_size=group_size)


def test_scales_of_another_weight() -> None:
    packed, scale = quantise(torch.ones(4, 8), 8)
    with pytest.raises(ValueError, match="scale has shape"):
        dequantise(packed, scale[:3], 8)
