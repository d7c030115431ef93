"""What a spike is, told on the device without a wait.

A window holds the losses and the logarithms of the gradient norms of the last `spike_window` steps. Step t is a spike
if either is not finite, or its loss lies more than `spike_sigma` deviations over the window's mean, once the window is
half full. So is the third step in a row that lies more than `spike_sigma` / √3 (3.5) over it in either, for noise does
not last; of the gradient norm only steps whose loss lies over its mean count, for a model that has just found something
to learn has large gradients for many steps, while its loss falls. A gradient norm alone in one step is a spike only at
a thousand times its mean: healthy runs have norms of ten and a hundred times it now and then, which the clip takes care
of, and a flipped bit makes far more.

Text that says one thing over and over hardly moves a young model's loss, and its gradient norm by a few deviations, so
the text itself is watched too: a step whose sequences hold fewer than half as many different pieces as the window's,
and `spike_sigma` deviations fewer, is a spike (`Batch.repetition`; a logarithm, so half is log 2). A lasting change of
it is none: a mixture may change.

A value then enters the window, but no further up than the limit it was held against (what is not finite leaves a gap):
a spike hardly widens the window that must find the next one, while a lasting new level is taken in within a few dozen
steps.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SIGNALS = ("loss", "grad_norm", "repetition")
SMALLEST_DEVIATION = 1e-3
"""A window of nearly equal values must not call rounding a spike: nats, or a thousandth of the gradient norm."""
FEWER = math.log(2)
"""What repetition must exceed its mean by: half as many different pieces."""
ALONE = math.log(1000)
"""What the logarithm of a gradient norm must exceed its mean by where it is high in one step only."""
LASTING = 3
"""Steps in a row that are a spike together."""


class Detector:
    """The window of one run."""

    def __init__(self, window: int, sigma: float, device: torch.device | str = "cpu") -> None:
        self.sigma = sigma
        self.values = torch.full((len(SIGNALS), window), torch.nan, dtype=torch.float64, device=device)
        self.recent = torch.zeros((len(SIGNALS), LASTING - 1), dtype=torch.float64, device=device)
        """Deviations of the last steps, none above sigma; 0 for what was not finite."""
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        floors = [SMALLEST_DEVIATION, ALONE / sigma, FEWER / sigma]
        self._floors = torch.tensor(floors, dtype=torch.float64, device=device)
        """Deviations that count at least, for one step."""
        self._may_last = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, device=device)

    def see(self, loss: Tensor, grad_norm: Tensor, repetition: Tensor) -> Tensor:
        """Deviations over the window's mean, float64 [2, 3]: of this step, with a deviation that is at least a sixth
        (1 / sigma) of `ALONE` or `FEWER`, and √3 times the smallest of the last three; each of loss, log of the
        gradient norm, and repetition. inf for what is not finite.

        loss, grad_norm, repetition: float64 scalars on the window's device. 0 while the window is less than half full.
        """
        x = torch.stack((loss, grad_norm.clamp(min=1e-30).log(), repetition))
        known = ~self.values.isnan()
        count = known.sum(1).clamp(min=1)
        held = torch.where(known, self.values, 0.0)
        mean = held.sum(1) / count
        variance = torch.where(known, self.values - mean[:, None], 0.0).square().sum(1) / count
        deviation = variance.sqrt().clamp(min=SMALLEST_DEVIATION)
        ready = self.steps * 2 >= self.values.shape[1]
        over = torch.where(ready, x - mean, 0.0)
        score = torch.where(x.isfinite(), over / torch.maximum(deviation, self._floors), torch.inf)
        limit = torch.where(ready, mean + self.sigma * deviation, torch.inf)
        entering = torch.where(x.isfinite(), torch.minimum(x, limit), torch.nan)
        self.values = torch.cat((self.values[:, 1:], entering[:, None]), 1)
        self.steps += 1
        counted = torch.where(x.isfinite(), (over / deviation).clamp(max=self.sigma), 0.0)
        counted[1] = torch.where(over[0] > 0, counted[1], 0.0)
        lasting = torch.minimum(self.recent.amin(1), counted) * math.sqrt(LASTING) * self._may_last
        self.recent = torch.cat((self.recent[:, 1:], counted[:, None]), 1)
        return torch.stack((score, lasting))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON holds it, oldest first; waits for the device."""
        rows: list[list[float]] = self.values.tolist()
        window = [[None if value != value else value for value in row] for row in rows]
        return {"window": window, "window_steps": int(self.steps), "recent": self.recent.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; a window of another length keeps the newest values."""
        rows: Sequence[Sequence[float | None]] = state["window"]
        window = self.values.shape[1]
        for target, row in zip(self.values, rows, strict=False):  # a signal that was not kept starts anew
            kept = [torch.nan if value is None else value for value in row][-window:]
            target.fill_(torch.nan)
            target[window - len(kept) :] = torch.tensor(kept, dtype=torch.float64)
        self.steps.fill_(state["window_steps"])
        for target, recent in zip(self.recent, state.get("recent", ()), strict=False):
            target.copy_(torch.tensor(recent, dtype=torch.float64))
