"""Which pieces of the master weights and Adam moments a rank owns, whatever ZeRO stage divides them.

ZeRO lays the parameters of a group end to end and cuts that line over the data-parallel ranks (stages 1 and 2), or cuts
each parameter (stage 3). Either way what a rank owns of one parameter is one contiguous range of its flattened,
tensor-parallel-local values. A `Fragment` names that range, so that checkpoints need not know the stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.host_moments import MOMENTS, HostMomentsAdamW
from train.mesh import Mesh
from train.model.build import named_layouts
from train.model.parameters import Layout


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one parameter: views into the optimizer's own memory, so that writing loads.

    start: first element in the flattened tensor-parallel-local parameter. master: fp32 [n]. moments: Adam's, fp32 [n].
    parameter: the compute-dtype parameter. owner: whether this rank is the one that saves it (replicas are not).
    """

    layout: Layout
    start: int
    master: Tensor
    moments: dict[str, Tensor]
    parameter: nn.Parameter
    owner: bool


def local_fragments(optimizer: Any, model: nn.Module, mesh: Mesh, zero_stage: int) -> Iterator[Fragment]:
    """Every fragment on this rank. optimizer: the torch optimizer (ZeRO 0) or DeepSpeed's wrapper around it."""
    for layout, parameter in named_layouts(model.parameters()):
        if not parameter.requires_grad:
            # Frozen: the optimizer knows nothing of it.
            continue
        owner = not getattr(parameter, "ds_pipe_replicated", False) and (
            layout.dim is not None or mesh.tensor_rank == 0
        )
        place = _place(optimizer, parameter, mesh, zero_stage)
        if place is None:
            continue
        flat, offset, length, start = place
        state = _adam_state(inner_optimizer(optimizer), flat)
        yield Fragment(
            layout,
            start,
            flat.detach().view(-1).narrow(0, offset, length),
            {key: state[key].view(-1).narrow(0, offset, length) for key in MOMENTS},
            parameter,
            owner and (zero_stage > 0 or mesh.data_rank == 0),
        )


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer, inside of DeepSpeed's wrapper where there is one."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def adam_steps(optimizer: Any) -> int:
    """Updates that the optimizer has made; the same for every parameter."""
    inner = inner_optimizer(optimizer)
    return max((int(state["step"]) for state in inner.state.values() if "step" in state), default=0)


def set_adam_steps(optimizer: Any, steps: int) -> None:
    """Tell the optimizer how many updates it has made, for Adam's bias correction."""
    for state in inner_optimizer(optimizer).state.values():
        if "step" in state:
            state["step"].fill_(float(steps))


def release_gathered(optimizer: Any) -> None:
    """Let ZeRO-3 gather small parameters anew: it keeps them whole from one step to the next."""
    held = getattr(optimizer, "persistent_parameters", [])
    if held:
        held[0].partition(held)


def _place(optimizer: Any, parameter: nn.Parameter, mesh: Mesh, stage: int) -> tuple[Tensor, int, int, int] | None:
    """(flat fp32 tensor, offset in it, length, start in the local parameter), or None where this rank owns nothing."""
    if stage == 0:
        return parameter, 0, parameter.numel(), 0
    if stage < 3:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        # The fragment is a view of the flat partition; find it by its group, the optimizer keys states by it.
        flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
        address, local = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, address.start, address.numel, local.start
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = mesh.data_rank * length
    length = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]
    return None if length <= 0 else (optimizer.fp32_partitioned_groups_flat[group], offset, length, start)


def _adam_state(inner: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Adam's state of one flat tensor, made as torch would at the first step where there is none yet."""
    state: dict[str, Tensor] = inner.state[flat]
    if "exp_avg" not in state:
        fused = bool(inner.defaults.get("fused"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        make = inner.new_moment if isinstance(inner, HostMomentsAdamW) else torch.zeros_like
        for key in MOMENTS:
            state[key] = make(flat)
    return state
