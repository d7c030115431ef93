"""Gradients summed in fp32 without a half-precision copy, under DeepSpeed's bf16 optimizer.

That optimizer keeps an fp32 sum for each bf16 parameter. By itself it zeroes the bf16 gradients before each
micro-batch, lets autograd add into them, casts the result and adds that: about 26 bytes an element beyond what the
product writes. Here the products add into the sum themselves (`kernels.linear`); what autograd still makes in bf16,
biases and norms, is added as it is and let go.

At the end of a step DeepSpeed rounds the sums to bf16, sums those over the data-parallel ranks, and casts and copies
them back, all of them on every rank. A rank uses only those whose optimizer states it has. Here the sums are scattered
in fp32: the same traffic with two ranks, nothing rounded, nothing copied, and norm and clip read a rank's part alone.
"""

from typing import Any

import torch


def attach(engine: Any) -> None:
    """Give every parameter of DeepSpeed's bf16 optimizer its fp32 sum as `main_grad`; others stay as they are."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups_gradients"):
        return
    own: list[list[torch.Tensor]] = []
    for number, group in enumerate(optimizer.bf16_groups):
        part = optimizer.fp32_groups_gradient_flat_partition[number]
        first, last = part.storage_offset(), part.storage_offset() + part.numel()
        own.append([])
        for parameter, total in zip(group, optimizer.fp32_groups_gradients[number], strict=True):
            parameter.main_grad = total.view(parameter.shape)
            # What DeepSpeed's pipeline reduces for a tied weight.
            parameter._hp_grad = total
            start, end = total.storage_offset(), total.storage_offset() + total.numel()
            low, high = min(max(start, first), end), max(min(end, last), start)
            own[-1].append(total[low - start : max(low, high) - start])
    optimizer.update_hp_grads = lambda clear_lp_grads=False: _add(optimizer)
    optimizer.clear_lp_grads = lambda set_to_none=True: _let_go(optimizer)
    # Norm and clip go by this list, and sum over the model-parallel ranks of `mpu`.
    optimizer.fp32_groups_gradients = own
    optimizer.mpu = _AllRanks(optimizer.mpu)
    engine.buffered_allreduce_fallback = lambda *_, **__: _scatter(optimizer)


class _AllRanks:
    """DeepSpeed's view of the ranks, but that a norm is summed over all of them.

    So all leave a step out where a gradient is infinite on one data-parallel rank alone, by a flipped bit.
    """

    def __init__(self, mpu: Any) -> None:
        self._mpu = mpu

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mpu, name)

    def get_model_parallel_group(self) -> Any:
        return torch.distributed.group.WORLD


@torch.no_grad()
def _scatter(optimizer: Any) -> None:
    """Each rank's part of the mean over the data-parallel ranks; what it holds of the others' parts is void then."""
    for group, whole, part in zip(
        optimizer.real_dp_process_group,
        optimizer.fp32_groups_gradients_flat,
        optimizer.fp32_groups_gradient_flat_partition,
        strict=True,
    ):
        ranks = torch.distributed.get_world_size(group)
        if ranks > 1:
            torch.distributed.reduce_scatter_tensor(part, whole, group=group)
            part.mul_(1.0 / ranks)


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
