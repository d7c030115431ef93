"""Norms by group, measured on the device in every logging.every_steps-th step and read with its other metrics.

    gradient    2-norm before any clip, loss scale taken out; known in every step (the guard sums it anyway)
    weight      2-norm of the fp32 weights after the update
    update      2-norm of Adam's step, lr · m̂ / (√v̂ + eps), weight decay left out
    activation  root mean square over all slots of the batch
    max_logit   largest visible scaled attention logit of a layer, where the attention kernel gives it
    fp16        shares of the fp16 gradients' elements that are not finite, or under the smallest normal number 2^-14
                (the embedding's apart: most of its rows see no token in a step)

Every full tensor counts once whatever the layout: the ranks that save a piece are the ones that add it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.fragments import Fragment
from train.host_moments import MOMENTS
from train.mesh import Mesh
from train.model.probe import Probe
from train.stability.groups import Tensors, group_of

SMALLEST_NORMAL_FP16 = 2.0**-14


@dataclass(frozen=True)
class Snapshot:
    """One measured step on this rank's device, not yet summed over the ranks.

    gradients: float64 [tensors], squares, of the whole model already. weights, updates: float64 [tensors], this rank's
    squares. activations: float64 [2, places]. max_logits: float32 [layers]. fp16: float64 [3] of not finite, under the
    smallest normal, all elements.
    """

    gradients: Tensor
    weights: Tensor
    updates: Tensor
    activations: Tensor
    max_logits: Tensor
    fp16: Tensor

    def read(self, mesh: Mesh, tensors: Tensors, probe: Probe) -> dict[str, Any]:
        """Sum over all ranks and fetch; every rank gets the same numbers, by group."""
        sums = torch.cat([self.weights, self.updates, self.activations.flatten(), self.fp16])
        logits = self.max_logits.clone()
        if mesh.world > 1:
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(logits, op=torch.distributed.ReduceOp.MAX)
        count, places = len(tensors), len(probe.places)
        weights, updates, activations, fp16 = sums.split([count, count, 2 * places, 3])
        norms = tensors.by_group(torch.stack((self.gradients, weights, updates))).sqrt().tolist()
        squares, number = activations.view(2, places)
        found: dict[str, Any] = {
            kind: dict(zip(tensors.groups, row, strict=True))
            for kind, row in zip(("gradient", "weight", "update"), norms, strict=True)
        }
        found["activation"] = dict(zip(probe.places, (squares / number).sqrt().tolist(), strict=True))
        largest = logits.tolist()
        if max(largest) > -torch.inf:
            found["max_logit"] = {f"layers.{layer}": value for layer, value in enumerate(largest)}
        overflow, underflow, elements = fp16.tolist()
        if elements:
            found["fp16"] = {"overflow": overflow / elements, "underflow": underflow / elements}
        return found


def squares(parts: Sequence[Tensor]) -> Tensor:
    """Squared 2-norm of each tensor, float64 [parts], summed in fp32 or better."""
    norms = torch._foreach_norm(list(parts), 2.0, dtype=torch.float32)
    return torch.stack(norms).double().square()


def update_squares(fragments: Sequence[Fragment], inner: torch.optim.Optimizer) -> Tensor:
    """Squared norms of Adam's last step, float64 [fragments], from its moments; one temporary a fragment."""
    group = inner.param_groups[0]
    (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
    steps = next(state["step"] for state in inner.state.values() if "step" in state).double().clamp(min=1.0)
    norms = []
    for one in fragments:
        # From the host where parallel.offload_optimizer keeps them there.
        first, second = (one.moments[key].to(one.master.device, non_blocking=True) for key in MOMENTS)
        root = (second / (1.0 - beta2**steps).to(second.device, second.dtype)).sqrt_().add_(eps)
        norms.append(torch.linalg.vector_norm(first / root))
    return torch.stack(norms).double().mul(lr / (1.0 - beta1**steps).to(norms[0].device)).square()


def fp16_shares(fragments: Sequence[Fragment], gradients: Sequence[Tensor]) -> Tensor:
    """float64 [3]: elements that are not finite, those under the smallest normal number, all of them; owned ones."""
    counts = torch.zeros(3, dtype=torch.float64, device=gradients[0].device)
    for one, gradient in zip(fragments, gradients, strict=True):
        if one.owner and gradient.dtype == torch.float16 and group_of(one.layout.name) != "embedding":
            counts[0] += (~gradient.isfinite()).sum()
            counts[1] += (gradient.abs() < SMALLEST_NORMAL_FP16).sum()
            counts[2] += gradient.numel()
    return counts
