"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank · B A, where only A and B are trained.

A [rank, in] starts from normal values, B [out, rank] from zero, so that training starts from the model as it was. Under
tensor parallelism B is cut as W's rows are, or A as its columns; the other is held by every rank, and its gradient,
of which each rank has a part, is summed.

peft wraps torch's Linear layers; the layers here hold plain matrices that tensor parallelism cuts, so it does not fit.
"""

from pathlib import Path

from torch import Tensor, nn

from train.checkpoint.pieces import PieceReader
from train.config import LoraConfig
from train.model.context import Context
from train.model.layers import Attention, FeedForward
from train.model.parameters import Layout, layout_of, make_parameter
from train.model.tensor_parallel import LowRank

TARGETS = {
    "qkv": (Attention, ("qkv_weight", "query_weight", "kv_weight")),
    "dense": (Attention, ("dense_weight",)),
    "ffn": (FeedForward, ("first_weight", "second_weight")),
}
"""The words of `lora.targets`: the module, and the attributes that hold its matrices."""


def add_lora(model: nn.Module, context: Context, config: LoraConfig) -> None:
    """Freeze a model and give the matrices of `config.targets` their A and B, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for kind, names in (TARGETS[word] for word in config.targets):
        for part in [module for module in model.modules() if isinstance(module, kind)]:
            for name in names:
                weight = part._parameters.get(name)
                if weight is not None:
                    del part._parameters[name]
                    setattr(part, name, _adapted(context, weight, config))


def _adapted(context: Context, weight: nn.Parameter, config: LoraConfig) -> LowRank:
    place = layout_of(weight)
    down, up = _layouts(place, config.rank)
    return LowRank(
        weight,
        make_parameter(down, weight.device, seed=context.seed, std=place.full_shape[1] ** -0.5),
        make_parameter(up, weight.device),
        config.alpha / config.rank,
        context.mesh.tensor_group,
    )


def is_lora(name: str) -> bool:
    """Whether a canonical name is an A's or a B's."""
    return name.endswith((".lora_down", ".lora_up"))


class MergedReader(PieceReader):
    """Reads a checkpoint as if there were no LoRA: weights come with their B A added. Without LoRA, a plain reader."""

    def __init__(self, folder: Path, config: LoraConfig, parts: tuple[str, ...] = ("model",)) -> None:
        super().__init__(folder, parts)
        self._config = config

    def names(self, kind: str) -> list[str]:
        """Canonical names of the parameters of the model itself."""
        return [name for name in super().names(kind) if not is_lora(name)]

    def local(self, kind: str, layout: Layout) -> Tensor:
        """As `PieceReader.local`; the sum is made in fp32 and rounded to the stored dtype."""
        weight = super().local(kind, layout)
        if kind != "weight" or not self.has(kind, layout.name.removesuffix(".weight") + ".lora_down"):
            return weight
        down, up = _layouts(Layout(layout.name, layout.full_shape), self._config.rank)
        product = super().local(kind, up).float() @ super().local(kind, down).float()
        delta = layout.cut(product * (self._config.alpha / self._config.rank))
        return (weight.float() + delta).to(weight.dtype)


def _layouts(weight: Layout, rank: int) -> tuple[Layout, Layout]:
    """Where A and B lie, beside a weight of this layout."""
    name, (rows, columns) = weight.name.removesuffix(".weight"), weight.full_shape
    down, up = Layout(f"{name}.lora_down", (rank, columns)), Layout(f"{name}.lora_up", (rows, rank))
    if weight.dim == 1:
        down = Layout(down.name, down.full_shape, 1, weight.blocks)
    if weight.dim == 0:
        up = Layout(up.name, up.full_shape, 0, weight.blocks)
    return down, up
