"""How far a step moves the weights, in every step, told by its cheapest share: all norms and biases.

Their change is measured on the fp32 weights themselves, before against after, so whatever made a step too long is
seen: a wrong rate, lost moments, a fault in the optimizer. Neither the loss nor the gradient norm need show that:
Adam's step does not scale with the gradient, and a small model takes ten times the rate for a while without much harm.

A step is a spike if it moves them more than `TIMES` as far as the median of the last `WINDOW` steps. Adam's step is the
rate times a ratio of moments that changes little within a few steps. A warm-up from 0 makes it at most twice its median
over any window, batches that ask for the same direction a few times more; both are slow to a window as short as
this one. A step that was left out, by a loss scale or by a reaction, moves nothing and leaves a gap. What is changed on
purpose (`forget`) begins a new window.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.fragments import Fragment
from train.mesh import Mesh

WINDOW = 16
"""Steps that a step is compared with; it must hold half as many."""
TIMES = 4.0
"""Their median times this is a spike: twice for a warm-up, and twice again for all else that is healthy."""


class UpdateSize:
    """The window of one run."""

    def __init__(self, mesh: Mesh, *, tuned: bool) -> None:
        """tuned: whether only what was added to a model is trained (LoRA, P-Tuning): it is little, so all counts."""
        self.mesh, self.tuned = mesh, tuned
        self.window = torch.full((WINDOW,), torch.nan, dtype=torch.float64, device=mesh.device)
        self._watched: list[Tensor] = []
        self._before = torch.zeros(0)

    def watch(self, fragments: Sequence[Fragment]) -> None:
        """Which weights count, of those that this rank is the one to save."""
        self._watched = [
            one.master for one in fragments if one.owner and (self.tuned or len(one.layout.full_shape) == 1)
        ]

    def begin(self) -> None:
        """Just before the update."""
        self._before = self._flat()

    def end(self) -> Tensor:
        """Just after it: float64 [2], the 2-norm of the change over all ranks, and how many times the window's median
        that is; the latter 0 where nothing moved or too few steps are known."""
        moved = torch.linalg.vector_norm(self._flat().sub_(self._before), dtype=torch.float64).square()
        if self.mesh.world > 1:
            torch.distributed.all_reduce(moved)
        size = moved.sqrt()
        count = (~self.window.isnan()).sum()
        # NaN stands last; of an even number the lower middle one.
        median = self.window.sort().values.index_select(0, ((count - 1).clamp(min=0) // 2).view(1))[0]
        told = (count * 2 >= WINDOW) & (size > 0) & size.isfinite()
        self.window = torch.cat((self.window[1:], torch.where((size > 0) & size.isfinite(), size, torch.nan)[None]))
        return torch.stack((size, torch.where(told, size / median, 0.0)))

    def forget(self) -> None:
        """Begin a new window: what comes is as large as someone wants it."""
        self.window.fill_(torch.nan)

    def state(self) -> list[float | None]:
        """What a checkpoint keeps, oldest first; waits for the device."""
        return [None if value != value else value for value in self.window.tolist()]

    def load(self, state: Sequence[float | None]) -> None:
        """Put back what `state` gave."""
        values = [torch.nan if value is None else value for value in state][-WINDOW:]
        self.forget()
        self.window[WINDOW - len(values) :] = torch.tensor(values, dtype=torch.float64)

    def _flat(self) -> Tensor:
        empty = torch.zeros(0, device=self.mesh.device)
        return torch.cat([empty, *self._watched])
