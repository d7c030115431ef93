"""AdamW: which parameters decay, and the variant that clips by itself where DeepSpeed does not."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import ConfigError
from train.config import OptimizerConfig
from train.host_moments import HostMomentsAdamW
from train.mesh import Mesh
from train.model.build import named_layouts
from train.model.parameters import layout_of


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, mesh: Mesh, *, clips: bool, skips: bool = False, offloads: bool = False
) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices decay; biases, norms and (by option) embeddings do not.

    clips: whether the optimizer measures and clips the gradient norm itself (ZeRO 0). skips: whether an update may be
    left out on the device, which only the fused AdamW can. offloads: keep the moments on the host (ZeRO 1 to 3).
    Raises ConfigError where the back end has no fused AdamW.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for layout, parameter in named_layouts(model.parameters()):
        if not parameter.requires_grad:
            continue
        table = "embeddings" in layout.name
        decays = len(layout.full_shape) > 1 and (config.decay_embeddings or not table)
        (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    adamw = HostMomentsAdamW if offloads else torch.optim.AdamW
    if skips:
        settings["fused"] = True
    try:
        if clips:
            clip = config.clip if config.clip_kind == "global" else 0.0
            return ClippingAdamW(groups, clip=clip, mesh=mesh, **settings)
        if skips:
            return adamw(groups, **settings)
    except RuntimeError as error:
        raise ConfigError(
            f"stability.reactions=[skip] needs torch's fused AdamW, which this device lacks ({error}); leave skip out"
        ) from error
    if mesh.device.type != "cpu":
        # One kernel over all parameters where the back end has it.
        with contextlib.suppress(RuntimeError):
            return adamw(groups, fused=True, **settings)
    return adamw(groups, **settings)


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that first measures the global gradient norm over the mesh and clips to it.

    `_global_grad_norm` holds the norm before the clip, under the name that DeepSpeed's engine reads.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip: float, mesh: Mesh, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.clip, self.mesh = clip, mesh
        self._global_grad_norm: Tensor | float = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Clip, then one AdamW step."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = norm = global_norm(parameters, self.mesh)
        if self.clip > 0:
            factor = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([p.grad for p in parameters], factor)
        return super().step(closure)


def global_norm(parameters: list[nn.Parameter], mesh: Mesh) -> Tensor:
    """2-norm of all gradients of the whole model, each parameter counted once; fp32 scalar on the device.

    Parameters that every tensor-parallel rank holds count on the first of them, the tied table on the first stage.
    """
    counted = [
        p.grad
        for p in parameters
        if p.grad is not None
        and not getattr(p, "ds_pipe_replicated", False)
        and (layout_of(p).dim is not None or mesh.tensor_rank == 0)
    ]
    norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=mesh.device)]
    total = torch.stack([norm.float() for norm in norms]).square().sum()
    if mesh.tensor * mesh.pipeline > 1:
        torch.distributed.all_reduce(total, group=mesh.grid.get_model_parallel_group())
    return total.sqrt()
