"""Gradients summed in fp32 without a half-precision copy, under DeepSpeed's bf16 optimizer.

That optimizer keeps an fp32 sum for each bf16 parameter. By itself it zeroes the bf16 gradients before each
micro-batch, lets autograd add into them, casts the result and adds that: about 26 bytes an element beyond what the
product writes. Here the products add into the sum themselves (`kernels.linear`); what autograd still makes in bf16,
biases and norms, is added as it is and let go.

At the end of a step DeepSpeed rounds the sums to bf16, sums those over the data-parallel ranks, and casts and copies
them back, all of them on every rank. A rank uses only those whose optimizer states it has. Here the sums are scattered
in fp32 (`train.scatter`): the same traffic with two ranks, nothing rounded, nothing copied, and norm and clip read a
rank's part alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.scatter import Scatter, add_gradients


def attach(engine: Any, items: Sequence[nn.Module] = (), tied: Tensor | None = None) -> Scatter | None:
    """Give every parameter of DeepSpeed's bf16 optimizer its fp32 sum as `main_grad`; others stay as they are.

    Returns what takes the sums to their owners, None under another optimizer. items, tied: see there.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups_gradients"):
        return None
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
    scatter = Scatter(optimizer, items, tied)
    optimizer.update_hp_grads = lambda clear_lp_grads=False: _add(optimizer, scatter)
    optimizer.clear_lp_grads = lambda set_to_none=True: _let_go(optimizer)
    optimizer.update_lp_params = lambda: _update(optimizer)
    empty = optimizer.clear_hp_grads
    # In a step `_update` has done it already. Sums that `update_hp_grads` was never told of are not emptied by it.
    optimizer.clear_hp_grads = lambda: empty() if any(map(any, optimizer.fp32_groups_has_gradients)) else None
    # Norm and clip go by this list, and sum over the model-parallel ranks of `mpu`.
    optimizer.fp32_groups_gradients = own
    optimizer.mpu = _AllRanks(optimizer.mpu)
    engine.buffered_allreduce_fallback = lambda *_, **__: scatter.end()
    return scatter


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
def _add(optimizer: Any, scatter: Scatter) -> None:
    """After a micro-batch's backward pass."""
    for number, group in enumerate(optimizer.bf16_groups):
        add_gradients(group)
        optimizer.fp32_groups_has_gradients[number] = [True] * len(group)
    scatter.summed()


@torch.no_grad()
def _update(optimizer: Any) -> None:
    """The new weights to all ranks, while the spent sums are emptied."""
    works = []
    for group, weights, parts, master in zip(
        optimizer.real_dp_process_group,
        optimizer.bf16_groups_flat,
        optimizer.bf16_partitioned_groups,
        optimizer.fp32_groups_flat_partition,
        strict=True,
    ):
        own = parts[torch.distributed.get_rank(group)]
        own.copy_(master)
        if len(parts) > 1:
            works.append(torch.distributed.all_gather_into_tensor(weights, own, group=group, async_op=True))
    optimizer.clear_hp_grads()
    for work in works:
        work.wait()


def _let_go(optimizer: Any) -> None:
    for group in optimizer.bf16_groups:
        for parameter in group:
            parameter.grad = None
