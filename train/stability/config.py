"""The schema of `stability.*`: what is watched, what is done about a spike, remedies, and faults planted on purpose."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class StressConfig:
    """Ways to provoke on purpose what happens at 100 B; all off by default."""

    lr_steps: list[int] = field(default_factory=list)
    """First and last step at which the learning rate is multiplied by lr_factor; empty means none."""
    lr_factor: float = 10.0
    """That factor."""
    poison_samples: list[int] = field(default_factory=list)
    """Half-open range [first, end) of sample indices whose text is poisoned; empty means none."""
    poison: str = "garbage"
    """garbage (random pieces) or repeat (each sample's first four pieces over and over)."""
    flip_step: int | None = None
    """Step at which one bit is flipped; null means none."""
    flip: str = "weight"
    """weight (the fp32 master, before the update) or gradient."""
    flip_parameter: str = "layers.0.mlp.dense_4h_to_h.weight"
    """Canonical name of the parameter whose element is hit."""
    flip_index: int = 0
    """Element of the flattened, unsharded parameter."""
    flip_bit: int = 30
    """Bit of the fp32 number, 0 the lowest of the fraction, 23 to 30 the exponent, 31 the sign."""
    query_key_gain: float = 1.0
    """Factor on the initial deviation of query and key matrices."""


@dataclass
class StabilityConfig:
    """Telemetry, remedies against divergence, and what a run does by itself when it spikes; see docs/stability.md."""

    name: str = "default"
    """Name of the set of remedies, shown in reports."""
    telemetry: bool = True
    """Norms of gradients, weights, updates and activations by group, every logging.every_steps steps."""
    reactions: list[str] = field(default_factory=lambda: ["warn"])
    """What a spike leads to, any of warn, skip, roll_back, lower_lr, lower_shrink, reset_loss_scale, reset_optimizer;
    empty switches detection off."""
    spike_sigma: float = 6.0
    """A spike is a loss more than so many deviations over the mean of the window before it, or what lasts or is absurd:
    docs/stability.md."""
    spike_window: int = 128
    """Steps of that window; nothing is held against it before it holds half as many."""
    cooldown_steps: int = 20
    """Steps after a spike in which no other is reported or acted on."""
    max_acts: int = 10
    """Spikes that lead to an act; later ones are only reported."""
    roll_back_margin_steps: int = 5
    """roll_back: the checkpoint must be at least so many steps older than the spike, and skipping begins so many steps
    before it (or at the checkpoint)."""
    skip_ahead_samples: int = 0
    """roll_back: samples after the spike's step that are skipped too."""
    lr_factor: float = 0.5
    """lower_lr: the learning rate is multiplied by it from the next step on."""
    rewarm_samples: int = 0
    """lower_lr: samples over which the lowered rate is warmed up from 0."""
    shrink_factor: float = 0.5
    """lower_shrink: EGS alpha is multiplied by it from the next step on."""
    events: list[Any] = field(default_factory=list)
    """Acts at given steps, the logbook as config: each {step, action, …} with action lower_lr (factor, rewarm_samples),
    lower_shrink (factor), skip_samples (samples: [first, end)), reset_loss_scale or reset_optimizer; each takes effect
    before that step."""
    softmax: str = "fp32"
    """fp32; scaled (fp32 of scores divided and multiplied by max(1, layer index), GLM-130B); half (compute dtype);
    pb_relax (compute dtype, largest score subtracted before the factor pb_relax_alpha is put back, CogView)."""
    pb_relax_alpha: float = 128.0
    """Factor that pb_relax takes out of the scores and puts back."""
    embedding_gradient_shrink: float = 1.0
    """EGS alpha: the share of the embedding's gradient that is kept; 1 switches it off, GLM-130B used 0.1."""
    embedding_gradient_shrink_schedule: list[Any] = field(default_factory=list)
    """Pairs [consumed_samples, alpha]: from that sample on this alpha; before the first, the constant above."""
    shrink_head: bool = False
    """Apply EGS at the tied logits too, not only at the lookup."""
    stress: StressConfig = field(default_factory=StressConfig)
    """Faults planted on purpose."""
