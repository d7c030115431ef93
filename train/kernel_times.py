"""How fast this rank's GPU is beside the others', by the times of its kernels: NVIDIA's resiliency package, by option.

Ranks wait for each other on the device, so a slow GPU makes every host wait alike and step times blame nobody; the time
a host needs of its own names slow hosts only. What tells them apart is how long the same kernel takes on each GPU. The
package (nvidia-resiliency-ext, `attribution.straggler`; its sources of 0.5.0 to 0.7.0 are equal) has CUPTI time the
kernels of a section of code and gives each rank a score: the smallest time of any rank over its own, for each kernel
that all ranks ran, weighted by the time spent in it. NCCL's kernels, which wait for other ranks, are left out.

A kernel's time is its mean here, where the package takes the median: a GPU that another process takes in turns holds
few kernels up, each for long. Such a one scored 0.50 by the mean and 0.83 by the median, healthy ones 0.98 and more by
both (benchmarks/stragglers.md).

One step in `cluster.kernel_times_every_steps` is a section, with a report at its end: one wait for the device and three
small collectives. The score goes into the beat; who is to blame is `launch.verdict`'s to say.
"""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from data_prep.errors import ConfigError
from train.config import Config
from train.heartbeat import Heartbeat

KEY = "cluster.kernel_times_every_steps"
INSTALL = "Run pip install --no-deps nvidia-resiliency-ext==0.7.0 (on Python 3.11 ==0.6.0)"
"""Without its dependencies, a web server and gRPC among them: this part of it imports nothing but torch."""
_STRAGGLER = "nvidia_resiliency_ext.attribution.straggler"


class KernelTimes:
    """Times the kernels of some steps; without `cluster.kernel_times_every_steps` it does nothing."""

    def __init__(self, config: Config, device: torch.device, heart: Heartbeat) -> None:
        """Raises ConfigError where the package is missing or cannot time kernels here."""
        self._every, self._heart = config.cluster.kernel_times_every_steps, heart
        self._detector = _detector(device, self._every) if self._every else None
        self._last = math.nan

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Around a training step. All ranks call it with the same number: of one that is timed they compare times."""
        if self._detector is None or step % self._every:
            yield
            return
        with self._detector.detection_section("step"):
            yield
        report = self._detector.generate_report()
        speed = report.gpu_relative_perf_scores[report.rank]
        # The better of two: what one hiccup slowed down is no slow GPU. Without a kernel in common the score is NaN.
        better = max(speed, self._last)
        self._heart.gpu_speed = None if math.isnan(speed) or math.isnan(self._last) else round(better, 3)
        self._last = speed


def _detector(device: torch.device, every: int) -> Any:
    """The package's detector, ready."""
    setting = f"{KEY}={every}"
    if device.type == "cpu" or torch.version.cuda is None:
        raise ConfigError(f"{setting} times kernels of NVIDIA GPUs, and this rank runs on {device.type}; set it to 0")
    try:
        straggler = importlib.import_module(_STRAGGLER)
    except ImportError as error:
        raise ConfigError(f"{setting} needs NVIDIA's resiliency package: {error}. {INSTALL}, or set it to 0") from error
    try:
        detector = _by_mean(straggler)
        detector.initialize(scores_to_compute=["relative_perf_scores"], gather_on_rank0=False)
        with detector.detection_section("step"):  # CUPTI may refuse, as where a profiler has taken it
            pass
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{setting}: NVIDIA's resiliency package cannot time kernels here ({error}). It must be built for torch's "
            f"CUDA, {torch.version.cuda}, and no profiler may run beside it. {INSTALL} for CUDA 13, or set it to 0"
        ) from error
    return detector


def _by_mean(straggler: Any) -> Any:
    """The package's detector, which compares medians, with the mean of each kernel's times in their place."""
    statistic = straggler.Statistic

    class ByMean(straggler.Detector):
        @classmethod
        def _get_kernel_summaries(cls) -> Any:
            kernels = super()._get_kernel_summaries()
            return {name: {**told, statistic.MED: told[statistic.AVG]} for name, told in kernels.items()}

    return ByMean
