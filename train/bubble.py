"""How long the stages of a pipeline wait: the bubble of a step, measured beside what 1F1B cannot avoid.

With p stages and m micro-batches, stages that take equally long wait (p-1) / (m+p-1) of the time between the first
forward and the last backward pass (GPipe, arXiv 1811.06965; 1F1B waits as long). More than that is uneven stages, sends
that nothing hides, or a host that is late. Marks lie on the device's own queue: nothing waits for them.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from train.collective import gather
from train.mesh import Mesh

PASSES = ("ForwardPass", "BackwardPass")
"""DeepSpeed's instructions that compute; the others load, send, receive, reduce and update."""


class StageClock:
    """Times the passes of one stage, step by step; the last step's are kept."""

    def __init__(self, mesh: Mesh, engine: Any) -> None:
        """engine: DeepSpeed's pipeline engine, whose instructions are watched from now on."""
        self.mesh, self._running = mesh, False
        self._micro_batches = 0
        self._start: Any = None
        self._passes: list[tuple[Any, Any]] = []
        engine._INSTRUCTION_MAP = {
            instruction: self._watched(run) if instruction.__name__ in PASSES else run
            for instruction, run in engine._INSTRUCTION_MAP.items()
        }

    @contextlib.contextmanager
    def step(self, micro_batches: int) -> Iterator[None]:
        """Inside, the passes of one step are timed."""
        self._micro_batches, self._passes, self._start = micro_batches, [], self._mark()
        self._running = True
        try:
            yield
        finally:
            self._running = False

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Inside, this stage computes."""
        if not self._running:
            yield
            return
        first = self._mark()
        yield
        self._passes.append((first, self._mark()))

    def read(self) -> dict[str, float]:
        """Metrics of the last step, for which the device has been waited; all ranks call it together."""
        busy = sum(self._seconds(first, last) for first, last in self._passes)
        stages = gather(self.mesh, (busy, self._seconds(self._start, self._passes[-1][1])))
        least = (self.mesh.pipeline - 1) / (self._micro_batches + self.mesh.pipeline - 1)
        return {"bubble": bubble(*zip(*stages, strict=True)), "bubble_least": least}

    def _watched(self, run: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: Any, **settings: Any) -> None:
            with self.busy():
                run(engine, **settings)

        return timed

    def _mark(self) -> Any:
        if self.mesh.device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self.mesh.device.type).Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, first: Any, last: Any) -> float:
        return float(last - first) if self.mesh.device.type == "cpu" else float(first.elapsed_time(last)) / 1e3


def bubble(busy: Sequence[float], spans: Sequence[float]) -> float:
    """Share of a step's passes in which the mean stage waits.

    busy: seconds that each rank computed. spans: from the step's start to each rank's last pass; the longest counts.
    """
    return 1.0 - sum(busy) / len(busy) / max(spans)
