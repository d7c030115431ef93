"""Silent faults: what several ranks hold alike must stay alike, bit for bit.

A processor that computes wrongly now and then, a bit that flips in memory or a collective that went astray leaves no
error behind, only ranks that no longer hold the same model. A 64-bit digest of each parameter shows it: a reading of
the weights and two small messages.
"""

from typing import Any

import torch
from torch import Tensor

from train.collective import gather
from train.engine import Engine
from train.model.build import named_layouts


def differing_replicas(engine: Engine) -> str | None:
    """Which copies of one parameter differ, as a sentence; None where all agree. All ranks call it together.

    Compared are norms, biases and what else every tensor-parallel rank holds, over the tensor-parallel ranks; below
    ZeRO-3 every parameter over the data-parallel ranks; a tied table over the first and the last stage.
    """
    mesh = engine.mesh
    if mesh.world == 1:
        return None
    found = list(named_layouts(engine.model.parameters()))
    digests = torch.stack([_digest(engine, parameter) for _, parameter in found])
    tied = engine.model.tied_weight()
    said = None
    for group, axis, counted in (
        (mesh.tensor_group, "tensor-parallel", [layout.dim is None for layout, _ in found]),
        (mesh.data_group, "data-parallel", [engine.zero_stage < 3] * len(found)),
        (mesh.embedding_group, "end", [parameter is tied for _, parameter in found]),
    ):
        wanted = torch.tensor(counted, device=digests.device)
        if group is None or not any(counted):
            continue
        chosen = digests[wanted]
        differs = _extreme(chosen, "MIN", group) != _extreme(chosen, "MAX", group)
        if said is None and bool(differs.any()):
            names = [layout.name for (layout, _), flag in zip(found, counted, strict=True) if flag]
            first = names[int(differs.nonzero()[0])]
            ranks = sorted(torch.distributed.get_process_group_ranks(group))
            said = f"{first} is not the same on the {axis} ranks {', '.join(map(str, ranks))}"
    return next((found for found in gather(mesh, said) if found is not None), None)


def _digest(engine: Engine, parameter: Any) -> Tensor:
    """int64 scalar on the device: all bits of this rank's copy."""
    if engine.zero_stage < 3:
        return torch.hash_tensor(parameter.detach()).view(torch.int64)
    # The last rank's piece ends in padding that nobody writes.
    start = engine.mesh.data_rank * parameter.ds_tensor.numel()
    held = min(parameter.ds_tensor.numel(), parameter.ds_numel - start)
    if held <= 0:
        return torch.zeros((), dtype=torch.int64, device=engine.mesh.device)
    return torch.hash_tensor(parameter.ds_tensor.detach().reshape(-1)[:held]).view(torch.int64)


def _extreme(digests: Tensor, which: str, group: Any) -> Tensor:
    result = digests.clone()
    torch.distributed.all_reduce(result, op=getattr(torch.distributed.ReduceOp, which), group=group)
    return result
