"""The gradient of each fragment, between the backward pass and the optimizer's step.

DeepSpeed keeps the reduced gradients in another place in each of its optimizers. What it hands to the update later is
what is found here: averaged over the data-parallel ranks, times the loss scale in fp16.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.fragments import Fragment


def fragment_gradients(optimizer: Any, fragments: Sequence[Fragment], zero_stage: int) -> list[Tensor]:
    """One flat tensor a fragment, a view that the optimizer will read: changing it changes the update."""
    if zero_stage == 0:
        return [_own(fragment) for fragment in fragments]
    if hasattr(optimizer, "fp32_groups_gradient_dict"):  # bf16 with fp32 accumulation keeps whole gradients
        return [_accumulated(optimizer, fragment) for fragment in fragments]
    found = dict(_averaged(optimizer, optimizer.params_in_partition if zero_stage < 3 else optimizer.fp16_groups))
    # ZeRO-3 pads the last rank's part.
    return [found[id(one.parameter)].view(-1).narrow(0, 0, one.master.numel()) for one in fragments]


def _own(fragment: Fragment) -> Tensor:
    parameter = fragment.parameter
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.view(-1)


def _accumulated(optimizer: Any, fragment: Fragment) -> Tensor:
    parameter: Any = fragment.parameter
    group = parameter._hp_mapping.param_group_index
    whole: Tensor = optimizer.fp32_groups_gradient_dict[group][parameter._index_in_param_group]
    return whole.view(-1).narrow(0, fragment.start, fragment.master.numel())


def _averaged(optimizer: Any, groups: Sequence[Sequence[nn.Parameter]]) -> Iterator[tuple[int, Tensor]]:
    for number, parameters in enumerate(groups):
        gradients = [g for g in optimizer.averaged_gradients[number] if not getattr(g, "_zero_padding", False)]
        for parameter, gradient in zip(parameters, gradients, strict=False):
            yield id(parameter), gradient
