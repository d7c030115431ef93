"""Clipping that learns what is usual: AdaGC and ZClip. Their averages live on the device and in every checkpoint.

Both take the 2-norms of the whole tensors and give factors for them, without a wait. A step whose gradients are not
finite changes no average.

ZClip's constants and order of operations are those of its authors' code (bluorion-com/ZClip, zclip.py). AdaGC's are
those that pytorch_optimizer took from the paper (0.98, 1.05, 100 steps); its authors' patch of Megatron-LM for GPT-2
(lishuai-97/AdaGC) has 0.99, 1.04 and 100.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from train.config import OptimizerConfig


class Clipping(ABC):
    """State of one way to clip: a few float64 numbers on the device, kept as one flat tensor."""

    decay: float
    """optimizer.clip_decay where the config says none."""
    warmup_steps: int
    """optimizer.clip_warmup_steps where the config says none."""

    def __init__(self, config: OptimizerConfig, size: int, device: torch.device) -> None:
        self.config = config
        if config.clip_decay is not None:
            self.decay = config.clip_decay
        if config.clip_warmup_steps is not None:
            self.warmup_steps = config.clip_warmup_steps
        self.state = torch.zeros(size, dtype=torch.float64, device=device)

    @staticmethod
    def of(config: OptimizerConfig, tensors: int, device: torch.device) -> "Clipping | None":
        """The one that optimizer.clip_kind names; None for global, which the optimizer does itself."""
        if config.clip_kind == "adagc":
            return AdaGC(config, tensors + 1, device)
        return ZClip(config, 3, device) if config.clip_kind == "zclip" else None

    def factors(self, norms: Tensor) -> Tensor:
        """Factors [tensors] for gradients of these norms, float64 [tensors]; takes the norms into the averages."""
        factors, state = self._clip(norms)
        self.state = torch.where(norms.isfinite().all(), state, self.state)
        return factors

    @abstractmethod
    def _clip(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """(factors [tensors], new state)."""

    def _bounded(self, norm: Tensor) -> Tensor:
        """The factor that brings a norm down to optimizer.clip, 1 where that is 0."""
        limit = self.config.clip
        return torch.clamp(limit / (norm + 1e-6), max=1.0) if limit > 0 else torch.ones_like(norm)


class AdaGC(Clipping):
    """Each tensor against a running average of its own clipped norms (arXiv 2502.11034, algorithm 1).

    Warm-up: factor min(clip / global norm, 1), gamma = min(gamma, clipped norm). Then factor min(relative · gamma /
    norm, 1) and gamma = decay · gamma + (1 − decay) · clipped norm. State: [steps, gamma of each tensor].
    """

    decay, warmup_steps = 0.98, 100

    def _clip(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        steps, gamma = self.state[:1], self.state[1:]
        warm = steps >= self.warmup_steps
        first = steps == 0
        bounded = self._bounded(norms.square().sum().sqrt()).expand_as(norms)
        relative = torch.clamp(self.config.clip_relative * gamma / norms.clamp(min=1e-30), max=1.0)
        factors = torch.where(warm, relative, bounded)
        clipped = norms * factors
        lowest = torch.where(first, clipped, torch.minimum(gamma, clipped))
        gamma = torch.where(warm, self.decay * gamma + (1 - self.decay) * clipped, lowest)
        return factors, torch.cat((steps + 1, gamma))


class ZClip(Clipping):
    """The global norm against its running mean and variance (arXiv 2504.02507, section 3).

    z = (norm − mean) / deviation; above clip_z the norm becomes mean + clip_z² / z · deviation. Mean and variance then
    take in what is left of it, before optimizer.clip limits it further. Warm-up: mean and variance of the first steps.
    State: [steps, mean, variance].
    """

    decay, warmup_steps = 0.97, 25

    def _clip(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        steps, mean, variance = self.state
        clip_z = self.config.clip_z
        norm = norms.square().sum().sqrt()
        warm = steps >= self.warmup_steps
        z = (norm - mean) / (variance.sqrt() + 1e-6)
        wanted = torch.where(warm & (z > clip_z), mean + clip_z**2 / z * variance.sqrt(), norm)
        # While it warms up the plain mean and variance (Welford), later the exponential ones.
        weight = torch.where(warm, torch.full_like(norm, 1 - self.decay), 1 / (steps + 1))
        moved = mean + weight * (wanted - mean)
        plain = (1 - weight) * variance + weight * (wanted - mean) * (wanted - moved)
        exponential = (1 - weight) * variance + weight * (wanted - moved).square()
        state = torch.stack((steps + 1, moved, torch.where(warm, exponential, plain)))
        left = wanted * self._bounded(wanted)
        return (left / norm.clamp(min=1e-30)).expand_as(norms), state
