"""P-Tuning v2 (Liu et al. 2021, arXiv 2110.07602): learnt keys and values in front of every layer's own.

    K' = [prefix_key; K],  V' = [prefix_value; V]

Every query sees the prefix beside its interval, each segment of a packed sequence its own way, so packing, blanks and
caches go on as they were. Nothing else is trained. Prefix keys are not turned by positions, and both start from
N(0, 1), as in ChatGLM-6B's P-Tuning. Under tensor parallelism a rank holds the prefix of its own key-value heads.

Unlike LoRA's additions a prefix is no part of any matrix: it cannot be merged, and a checkpoint keeps it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from train.model.parameters import Layout, make_parameter
from train.model.tensor_parallel import sum_gradients

_ENDS = (".prefix_key", ".prefix_value")


class Prefix(nn.Module):
    """One layer's prefix. parts: its keys and values, [length, kv heads, dim] each, of the heads that are held here."""

    def __init__(self, layouts: tuple[Layout, Layout], dim: int, device: torch.device, seed: int, group: Any) -> None:
        """layouts: of keys and values, full shape [length, kv heads * dim]. dim: of a head. group: the ranks that all
        hold all heads, and each have a part of the gradient; None where they divide them."""
        super().__init__()
        self._dim, self._group = dim, group
        self.key, self.value = (make_parameter(layout, device, seed=seed, std=1.0) for layout in layouts)

    @property
    def length(self) -> int:
        """Slots of the prefix."""
        return self.key.shape[0]

    def parts(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [length, kv heads, dim] each."""
        key, value = sum_gradients(self._group, self.key, self.value)
        return key.unflatten(1, (-1, self._dim)), value.unflatten(1, (-1, self._dim))


def before(parts: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B,S,kv heads,D] with a prefix's in front: [B,length + S,kv heads,D]."""
    first, second = (
        torch.cat([part.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], 1)
        for part, own in zip(parts, (key, value), strict=True)
    )
    return first, second


def layouts_of(layer: str, length: int, width: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Canonical names and full shapes of a layer's prefix. width: of all key-value heads."""
    return tuple((layer + end, (length, width)) for end in _ENDS)


def is_prefix(name: str) -> bool:
    """Whether a canonical name is a prefix's."""
    return name.endswith(_ENDS)
