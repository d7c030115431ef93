"""Gradients summed in fp32 without a half-precision copy, under DeepSpeed's bf16 optimizer.

That optimizer keeps an fp32 sum for each bf16 parameter. By itself it zeroes the bf16 gradients before each
micro-batch, lets autograd add into them, casts the result and adds that: about 26 bytes an element beyond what the
product writes. Here the products add into the sum themselves (`kernels.linear`); what autograd still makes in bf16,
biases and norms, is added as it is and let go.
"""

from typing import Any

import torch


def attach(optimizer: Any) -> None:
    """Give every parameter of DeepSpeed's bf16 optimizer its fp32 sum as `main_grad`; others stay as they are."""
    if not hasattr(optimizer, "fp32_groups_gradients"):
        return
    for group, totals in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for parameter, total in zip(group, totals, strict=True):
            parameter.main_grad = total.view(parameter.shape)
            # What DeepSpeed's pipeline reduces for a tied weight.
            parameter._hp_grad = total
    optimizer.update_hp_grads = lambda clear_lp_grads=False: _add(optimizer)
    optimizer.clear_lp_grads = lambda set_to_none=True: _let_go(optimizer)


@torch.no_grad()
def _add(optimizer: Any) -> None:
    """After a micro-batch's backward pass."""
    for number, group in enumerate(optimizer.bf16_groups):
        for parameter in group:
            if parameter.grad is not None:
                parameter.main_grad.add_(parameter.grad)
        optimizer.fp32_groups_has_gradients[number] = [True] * len(group)
    _let_go(optimizer)


def _let_go(optimizer: Any) -> None:
    for group in optimizer.bf16_groups:
        for parameter in group:
            parameter.grad = None
