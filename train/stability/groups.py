"""The model's tensors in one order on every rank, and the groups whose norms are shown."""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from train.collective import gather
from train.mesh import Mesh


def group_of(name: str) -> str:
    """`embedding`, `layers.N.attention`, `layers.N.ffn`, `layers.N.norms` or `head` of a canonical parameter name."""
    layer = re.match(r"layers\.(\d+)\.(?:(attention|mlp)\.)?", name)
    if layer is not None:
        return f"layers.{layer[1]}.{ {'attention': 'attention', 'mlp': 'ffn', None: 'norms'}[layer[2]] }"
    return "embedding" if "embedding" in name else "head"


class Tensors:
    """Every parameter of the whole model under a number that all ranks agree on."""

    def __init__(self, mesh: Mesh, mine: Iterable[str]) -> None:
        """mine: canonical names of this rank's parameters. All ranks call it together."""
        names = {name for part in gather(mesh, sorted(mine)) for name in part}
        self.names = sorted(names, key=_order)
        self.number = {name: number for number, name in enumerate(self.names)}
        self.groups = list(dict.fromkeys(group_of(name) for name in self.names))
        places = {group: place for place, group in enumerate(self.groups)}
        self._group_of = torch.tensor([places[group_of(name)] for name in self.names], device=mesh.device)

    def __len__(self) -> int:
        return len(self.names)

    def scatter(self, numbers: Tensor, values: Tensor) -> Tensor:
        """float64 [tensors] with each value added at its tensor's number. numbers: int64 of the same length."""
        return torch.zeros(len(self), dtype=torch.float64, device=values.device).index_add_(0, numbers, values.double())

    def by_group(self, squares: Tensor) -> Tensor:
        """Sums over the tensors of each group: [..., tensors] to [..., groups]."""
        total = torch.zeros(*squares.shape[:-1], len(self.groups), dtype=squares.dtype, device=squares.device)
        return total.index_add_(-1, self._group_of, squares)

    def numbers(self, names: Sequence[str], device: torch.device) -> Tensor:
        """int64 numbers of these names."""
        return torch.tensor([self.number[name] for name in names], dtype=torch.int64, device=device)


def _order(name: str) -> tuple[int, int, str]:
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer is not None:
        return 1, int(layer[1]), name
    return (0 if "embedding" in name else 2), 0, name
