"""Whether a tensor of weights has grown at once, in every step: a bit flipped in memory or on the way to it.

One weight of 1e37 need not show in loss or gradient norm for many steps: the norm behind it makes its row ordinary
again, and the row of a rare word is hardly ever looked up. It shows at once in the 2-norm of its tensor. Each tensor is
compared with itself after the step before: an update changes it by little, even a bias that begins at 0 (twice or three
times its norm in the first steps of a warm-up, less in each step after). So a tensor that has grown more than `TIMES`
is a spike, and more than from `SMALLEST`: where gradients were too small for Adam's ε, a bias may begin to move late. A
bit that makes no such difference changes one weight by less than the weights of its tensor together.

It reads the fp32 weights that this rank keeps, once a step: 5.7 GB for 1.4 billion, 2 ms at the rate of an H100.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.fragments import Fragment
from train.mesh import Mesh
from train.stability.groups import Tensors
from train.stability.telemetry import squares

TIMES = 4.0
"""A tensor's norm after the step before, times this, is a spike."""
SMALLEST = 1e-3
"""Root mean square that a tensor's weights count as having at least."""


class WeightSize:
    """The norms of one run's weights after its last step."""

    def __init__(self, mesh: Mesh, tensors: Tensors) -> None:
        self.mesh, self.tensors = mesh, tensors
        self._masters: list[Tensor] = []
        self._numbers = torch.zeros(0, dtype=torch.int64)
        self._smallest = torch.zeros(0)
        self._before: Tensor | None = None

    def watch(self, fragments: Sequence[Fragment]) -> None:
        """The weights, of which those count that this rank is the one to save. All ranks call it together."""
        owned = [one for one in fragments if one.owner]
        self._masters = [one.master for one in owned]
        self._numbers = self.tensors.numbers([one.layout.name for one in owned], self.mesh.device)
        sizes = torch.tensor([float(one.master.numel()) for one in owned], device=self.mesh.device)
        self._smallest = SMALLEST * self._whole(sizes).sqrt()

    def begin(self) -> None:
        """At the beginning of an update, before anything can have happened to the weights that were loaded."""
        if self._before is None:
            self._before = self._norms()

    def end(self) -> Tensor:
        """After it: float64 [2], how many times its norm after the step before the tensor has that grew most, and its
        number in `Tensors.names`. Infinite for one that is not finite and was."""
        assert self._before is not None
        before, after = self._before, self._norms()
        self._before = after
        grown = torch.where(after.isfinite(), after / before.maximum(self._smallest), torch.inf)
        # Zeros may become anything, and what was lost before has been told.
        times, number = torch.where((before > 0) & before.isfinite(), grown, 0.0).max(0)
        return torch.stack((times, number.double()))

    def forget(self) -> None:
        """The weights are others now."""
        self._before = None

    def _norms(self) -> Tensor:
        """2-norm of each of the model's tensors, float64 [tensors], the same on all ranks."""
        none = torch.zeros(0, device=self.mesh.device)
        return self._whole(squares(self._masters) if self._masters else none).sqrt()

    def _whole(self, mine: Tensor) -> Tensor:
        """Sums by tensor over this rank's parts, float64 [tensors], over all ranks."""
        whole = self.tensors.scatter(self._numbers, mine)
        if self.mesh.world > 1:
            torch.distributed.all_reduce(whole)
        return whole
