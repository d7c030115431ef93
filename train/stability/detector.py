"""What a spike is, told on the device without a wait.

A window holds the losses and the logarithms of the gradient norms of the last `spike_window` steps. Step t is a spike
if either is not finite, or lies more than `spike_sigma` deviations over the window's mean, once the window is half
full. The logarithm, since gradient norms have a heavy upper tail. A value then enters the window, but no further up
than the limit it was held against (what is not finite leaves a gap): a spike hardly widens the window that must find
the next one, while a lasting new level is taken in within a few dozen steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SIGNALS = ("loss", "grad_norm")
SMALLEST_DEVIATION = 1e-3
"""A window of nearly equal values must not call rounding a spike: nats, or a thousandth of the gradient norm."""


class Detector:
    """The window of one run."""

    def __init__(self, window: int, sigma: float, device: torch.device | str = "cpu") -> None:
        self.sigma = sigma
        self.values = torch.full((len(SIGNALS), window), torch.nan, dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    def see(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Deviations over the window's mean, float64 [2]: loss, log of the gradient norm; inf for what is not finite.

        loss, grad_norm: float64 scalars on the window's device. 0 while the window is less than half full.
        """
        x = torch.stack((loss, grad_norm.clamp(min=1e-30).log()))
        known = ~self.values.isnan()
        count = known.sum(1).clamp(min=1)
        held = torch.where(known, self.values, 0.0)
        mean = held.sum(1) / count
        variance = torch.where(known, self.values - mean[:, None], 0.0).square().sum(1) / count
        deviation = variance.sqrt().clamp(min=SMALLEST_DEVIATION)
        ready = self.steps * 2 >= self.values.shape[1]
        score = torch.where(ready, (x - mean) / deviation, 0.0)
        score = torch.where(x.isfinite(), score, torch.inf)
        limit = torch.where(ready, mean + self.sigma * deviation, torch.inf)
        entering = torch.where(x.isfinite(), torch.minimum(x, limit), torch.nan)
        self.values = torch.cat((self.values[:, 1:], entering[:, None]), 1)
        self.steps += 1
        return score

    def state(self) -> list[list[float | None]]:
        """The window as JSON holds it, oldest first; waits for the device."""
        rows: list[list[float]] = self.values.tolist()
        return [[None if value != value else value for value in row] for row in rows]

    def load(self, rows: Sequence[Sequence[float | None]], steps: int) -> None:
        """Put back what `state` gave after so many steps; a window of another length keeps the newest values."""
        window = self.values.shape[1]
        for target, row in zip(self.values, rows, strict=True):
            kept = [torch.nan if value is None else value for value in row][-window:]
            target.fill_(torch.nan)
            target[window - len(kept) :] = torch.tensor(kept, dtype=torch.float64)
        self.steps.fill_(steps)
