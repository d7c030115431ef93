"""`python -m train` with one rank's host, then another's GPU made slow: what `benchmarks.stragglers` starts.

On two ranks, in this order: what timing kernels costs, in blocks of steps (before the package is loaded, then loaded
and idle in turns with loaded and used); rank 0's loader is slow (Python that computes, then sleeps); a kernel that
holds two thirds of rank 1's GPU; another process's matrix products on rank 1's GPU; the end by SIGTERM. Each rank
writes what it sees to RUN/straggler_rank_N.jsonl.

    python -m benchmarks.straggler_worker graphs FILE

writes which kernels of CUDA graphs the package sees, in a process of its own.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep.batch import Batch
from train import trainer
from train.cli import run_train
from train.config import Config
from train.kernel_times import KernelTimes
from train.loading import open_loader

WARM_UP, BLOCK = 10, 20
"""Steps."""
KINDS = ("off", "off") + ("idle", "on") * 2
"""What each block of steps measures."""
STAGES = {"host": 25.0, "gpu": 17.0, "process": 8.0}
"""Seconds of each fault, after those blocks."""
SLOW_HOST = 0.2
"""Seconds a step that the loader computes, and as many that it sleeps."""
BUSY = """
import os, sys, time, torch
x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.1)
while os.getppid() > 1:
    for _ in range(20):
        y = x @ x
    torch.cuda.synchronize()
"""


class Script(KernelTimes):
    """Which stage it is, and what was seen in it."""

    now = "cost"

    def __init__(self, config: Config, device: torch.device, heart: Any) -> None:
        self._arguments = (config, device, heart)
        self._rank = int(os.environ["RANK"])
        self._run_dir = Path(config.run_dir)
        self._loaded = False
        self._ends: list[tuple[str, float]] = []
        self._last_step = 0.0
        self._file: Any = None

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """As the trainer calls it; the faults of this rank come and go here."""
        if self._file is None:
            self._file = open(self._run_dir / f"straggler_rank_{self._rank}.jsonl", "w")  # noqa: SIM115
        block = (step - 1 - WARM_UP) // BLOCK
        kind = KINDS[block] if 0 <= block < len(KINDS) else "on"
        if step > WARM_UP and (step - 1 - WARM_UP) % BLOCK == 0 and block <= len(KINDS):
            self._boundary(block, kind)
        if block >= len(KINDS):
            self._stage()
        began = time.perf_counter()
        if kind == "on" and self._loaded:
            with super().of(step):
                yield
        else:
            yield
        self._say(step=step, stage=Script.now, kind=kind, engine=time.perf_counter() - began, at=time.monotonic())

    def _boundary(self, block: int, kind: str) -> None:
        synchronize()
        moment = time.perf_counter()
        if block:
            self._say(block=KINDS[block - 1], seconds=(moment - self._ends[-1][1]) / BLOCK)
        if kind != "off" and not self._loaded:
            super().__init__(*self._arguments)
            detector = self._detector
            assert detector is not None
            self._say(loading=time.perf_counter() - moment)
            self._detector, self._loaded = _Recorded(detector, self._say), True
        self._ends.append((kind, time.perf_counter()))

    def _stage(self) -> None:
        past = time.perf_counter() - self._ends[-1][1]
        ends = itertools.accumulate(STAGES.values())
        name = next((name for name, end in zip(STAGES, ends, strict=True) if past < end), "end")
        if name == Script.now:
            return
        Script.now = name
        go = self._run_dir / "go"
        if self._rank == 1 and name == "gpu":
            self._hold = HeldGpu()
            self._other = subprocess.Popen([sys.executable, "-c", BUSY, str(go)], env=_same_gpu())
        elif self._rank == 1 and name == "process":
            self._hold.let_go()
            go.touch()
        elif self._rank == 1 and name == "end":
            self._other.kill()
        elif self._rank == 0 and name == "end":
            os.kill(os.getpid(), signal.SIGTERM)

    def _say(self, **what: Any) -> None:
        self._file.write(json.dumps(what) + "\n")
        self._file.flush()


class _Recorded:
    """The package's detector, its reports written down."""

    def __init__(self, detector: Any, say: Any) -> None:
        self._detector, self._say = detector, say
        self.detection_section = detector.detection_section

    def generate_report(self) -> Any:
        began = time.perf_counter()
        synchronize()
        waited = time.perf_counter()
        seen = self._detector.cupti_manager.get_results()
        kernels = {name: [one.median, one.avg, one.num_calls] for name, one in seen.items()}
        report = self._detector.generate_report()
        self._say(
            stage=Script.now,
            score=report.gpu_relative_perf_scores[report.rank],
            waited=waited - began,
            report=time.perf_counter() - waited,
            kernels=kernels,
        )
        return report


class HeldGpu:
    """A kernel that never ends holds two thirds of this GPU's multiprocessors, until `let_go`."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def let_go(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        from benchmarks.straggler_kernel import hold

        device = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(device)
        share = torch.cuda.get_device_properties(device).multi_processor_count * 2 // 3
        with torch.cuda.stream(torch.cuda.Stream()):
            out = torch.zeros(share, device="cuda")
            hold(out, 1000)
            torch.cuda.current_stream().synchronize()
            began = time.perf_counter()
            hold(out, 100_000)
            torch.cuda.current_stream().synchronize()
            rounds = int(100_000 * 0.1 / (time.perf_counter() - began))
            before: list[torch.cuda.Event] = []
            while not self._stop.is_set():
                hold(out, rounds)  # 0.1 s
                before.append(torch.cuda.Event(blocking=True))
                before[-1].record()
                if len(before) > 2:
                    before.pop(0).synchronize()
            torch.cuda.current_stream().synchronize()


def _same_gpu() -> dict[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = int(os.environ["LOCAL_RANK"])
    return os.environ | {"CUDA_VISIBLE_DEVICES": visible[number] if visible != [""] else str(number)}


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def slow_loader(config: Config, *rest: Any) -> Iterator[Batch]:
    """The trainer's own loader, slow on rank 0 for a while."""
    for batch in open_loader(config, *rest):
        if os.environ["RANK"] == "0" and Script.now == "host":
            until = time.perf_counter() + SLOW_HOST
            while time.perf_counter() < until:
                pass
            time.sleep(SLOW_HOST)
        yield batch


def graphs(file: Path) -> None:
    """Kernels that the package counts in ten replays of graphs of eight, captured before and after it was loaded."""
    detector = __import__("nvidia_resiliency_ext.attribution.straggler", fromlist=["Detector"]).Detector
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        y = x
        for _ in range(8):
            y = torch.tanh(y)

    def captured() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph

    work()
    runs: dict[str, Any] = {"eager": work, "captured before": captured().replay}
    detector.initialize(scores_to_compute=["relative_perf_scores"], gather_on_rank0=False)
    runs["captured after"] = captured().replay
    found = {}
    for name, call in runs.items():
        with detector.detection_section("step"):
            for _ in range(10):
                call()
        told = detector.generate_report().local_kernel_summaries.values()
        by_word = [{key.name: float(value) for key, value in one.items()} for one in told]
        found[name] = [{word: round(one[word], 2) for word in ("MED", "AVG", "NUM")} for one in by_word]
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["graphs"]:
        graphs(Path(sys.argv[2]))
    else:
        trainer.KernelTimes = Script  # type: ignore[misc]
        trainer.open_loader = slow_loader
        sys.exit(run_train(trainer.main))
