"""Kernel times by NVIDIA's resiliency package: which steps are timed, what goes into the beat, what is refused.

The detector here has the interface of nvidia-resiliency-ext 0.7.0's `attribution.straggler.Detector`, and its score of
one kernel that another rank runs in 10 microseconds; the kernel's times are the test's.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.errors import ConfigError
from train.cli import compose_train
from train.heartbeat import Heartbeat, read_beat
from train.kernel_times import KernelTimes

pytestmark = pytest.mark.unit
PACKAGE = "nvidia_resiliency_ext.attribution.straggler"
GPU = torch.device("cuda", 0)


Statistic = Enum("Statistic", "MIN MAX MED AVG STD NUM")


class Detector:
    """One rank's detector: class methods and state of the class, as the package has it."""

    initialized = False
    refuses: Exception | None = None
    times: list[tuple[float, float]]
    """Median and mean of each report to come."""
    rank = 1

    @classmethod
    def initialize(
        cls,
        scores_to_compute: Any = "all",
        gather_on_rank0: bool = True,
        profiling_interval: int = 1,
        report_time_interval: float = 60,
        node_name: str | None = None,
    ) -> None:
        assert not cls.initialized
        if cls.refuses is not None:
            raise cls.refuses
        assert scores_to_compute == ["relative_perf_scores"]
        assert not gather_on_rank0, "else all but rank 0 get None for a report"
        cls.initialized = True

    @classmethod
    @contextmanager
    def detection_section(cls, name: str | None = None, profile_cuda: bool = True) -> Iterator[None]:
        assert cls.initialized
        yield

    @classmethod
    def _get_kernel_summaries(cls) -> dict[str, dict[Statistic, float]]:
        median, mean = cls.times.pop(0)
        return {"gemm_blk_128_1_1_grid_132_1_1": {Statistic.MED: median, Statistic.AVG: mean, Statistic.NUM: 12}}

    @classmethod
    def generate_report(cls) -> SimpleNamespace:
        (kernel,) = cls._get_kernel_summaries().values()
        return SimpleNamespace(gpu_relative_perf_scores={cls.rank: 10.0 / kernel[Statistic.MED]}, rank=cls.rank)


@pytest.fixture
def detector(monkeypatch) -> type[Detector]:
    """The package with a fresh detector, beside a torch for CUDA 13."""
    fresh = type("Detector", (Detector,), {"times": []})
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.attribution"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType(PACKAGE)
    module.Detector, module.Statistic = fresh, Statistic  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PACKAGE, module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return fresh


def kernel_times(heart: Heartbeat, every: int, device: torch.device = GPU) -> KernelTimes:
    return KernelTimes(compose_train(["experiment=demo", f"cluster.kernel_times_every_steps={every}"]), device, heart)


def test_one_step_in_so_many_is_timed_and_its_score_beats(tmp_path, detector):
    heart = Heartbeat(tmp_path, 1)
    times = kernel_times(heart, 3)
    detector.times += [(10, 20), (10, 16), (10, 25), (math.nan, math.nan), (10, 12.5), (15, 15)]
    told = []
    for step in range(1, 19):
        with times.of(step):
            pass
        told.append(heart.gpu_speed)
    assert not detector.times, "one report each third step"
    # By the mean, and the better of two, once there are two.
    assert told[2::3] == [None, 0.625, 0.625, None, None, 0.8]
    assert told[3::3] == told[2:-1:3], "between two reports it stays"
    heart.start()
    heart.close()
    beat = read_beat(tmp_path, 1)
    assert beat is not None
    assert beat.gpu_speed == 0.8


def test_a_step_that_fails_is_not_reported(tmp_path, detector):
    times = kernel_times(Heartbeat(tmp_path, 1), 1)
    with pytest.raises(KeyError), times.of(1):
        raise KeyError


def test_off_it_asks_for_nothing(tmp_path):
    with kernel_times(Heartbeat(tmp_path, 0), 0, torch.device("cpu")).of(1):
        pass


def test_what_cannot_work_is_said_before_the_run_begins(tmp_path, detector, monkeypatch):
    heart = Heartbeat(tmp_path, 0)
    with pytest.raises(
        ConfigError, match=r"kernel_times_every_steps=50 times kernels of NVIDIA GPUs, .* runs on cpu; "
    ):
        kernel_times(heart, 50, torch.device("cpu"))
    detector.refuses = ImportError("libcupti.so.13: cannot open shared object file")
    with pytest.raises(ConfigError, match=r"50: .* \(libcupti.so.13: .*\)\. It must be built for torch's CUDA, 13\.0"):
        kernel_times(heart, 50)
    detector.refuses = RuntimeError("CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED")
    with pytest.raises(ConfigError, match="no profiler may run beside it"):
        kernel_times(heart, 50)
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(ConfigError, match=r"50 needs NVIDIA's .* Run pip install --no-deps nvidia-resiliency-ext==0.7"):
        kernel_times(heart, 50)
