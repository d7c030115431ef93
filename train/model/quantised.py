"""Weight-only quantisation of a trained model: the layers' matrices as INT8 or INT4, all else as it was.

Embedding, head, norms and biases keep their dtype (GLM-130B, arXiv 2210.02414, section 3.4). Each tensor-parallel rank
rounds its own piece, as GLM-130B's released files do: matrices cut along their inputs then have scales of their own on
each rank.
"""

from typing import Any

from torch import Tensor, nn

from data_prep.errors import ConfigError
from kernels.quantised_weight import quantise
from kernels.resolve import resolve
from train.model.build import Model
from train.model.layers import Attention, FeedForward

BITS = {"int8": 8, "int4": 4}
"""The words of `quantise=`."""
MATRICES = ("qkv_weight", "query_weight", "kv_weight", "dense_weight", "first_weight", "second_weight")
"""Attributes of attention and feed-forward that hold a matrix."""


def check_quantise(word: str | None, group_size: int | None) -> None:
    """Raise ConfigError for settings `quantise` and `quantise_group` that make no sense."""
    if word is not None and word not in BITS:
        raise ConfigError(f"quantise={word} is not known; use int8, int4 or null")
    if group_size is not None and (word is None or group_size < 2 or group_size % 2):
        raise ConfigError(
            f"quantise_group={group_size} needs quantise=int8 or int4 and an even number of columns, such as 128"
        )


class QuantisedWeight(nn.Module):
    """Stands in for a weight [rows, columns]: called with x [..., columns] it gives [..., rows].

    With an activation, of the product and the bias: see `kernels.quantised_matmul`.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        group_size: int | None,
        multiply: Any,
        bias: nn.Parameter | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        packed, scale = quantise(weight, bits, group_size=group_size)
        self.bits, self._multiply, self._activation = bits, multiply, activation
        self.bias = bias
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self._multiply(
            x, self.packed, self.scale, bits=self.bits, bias=self.bias, activation=self._activation
        )
        return product


def quantise_model(model: Model, word: str, group_size: int | None, kernel: str) -> None:
    """Replace the layers' matrices, in place. kernel: `kernels.quantised_matmul`.

    Raises ConfigError where the columns of a matrix do not divide into groups.
    """
    parts = [module for module in model.modules() if isinstance(module, Attention | FeedForward)]
    for part in parts:
        for name in MATRICES:
            weight = part._parameters.get(name)
            if weight is None:
                continue
            if group_size is not None and weight.shape[1] % group_size:
                raise ConfigError(
                    f"quantise_group={group_size} does not divide the {weight.shape[1]} columns of {name}"
                )
            multiply = resolve("quantised_matmul", kernel, weight.device, weight.dtype)
            follows: tuple[Any, ...] = ()
            if isinstance(part, FeedForward) and name == "first_weight":
                follows = (part.first_bias, part.context.model.activation)
                part.first_activates = True
            del part._parameters[name]
            setattr(part, name, QuantisedWeight(weight.detach(), BITS[word], group_size, multiply, *follows))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, packed ones with their scales."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
