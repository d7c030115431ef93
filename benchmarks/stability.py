"""The stability experiments on one GPU: many small runs beside each other, each the real `python -m train`.

    python -m benchmarks.stability --data data/lab      # everything that fits 7 minutes, the wanted most first
    python -m benchmarks.stability --only softmax egs     # some groups
    python -m benchmarks.stability --toy                  # every run at a toy size on a CPU: does it run?

A small model's step is bound by launches, so a dozen runs share the GPU. First the cost of telemetry at 1.4 B
parameters (`benchmarks.telemetry`), beside which only a few warm-up steps run while its model is built; then the runs
of `stability_plan`, each a process with a core of its own. What does not fit the budget is not started, or cut off with
its metrics kept.

Writes summary.csv (a row as soon as a run ends), log.txt, telemetry.csv, curves.csv (means of ten steps) and
runs.tar.gz: config, metrics, validation and events of every run, which `python -m train.stability.report` reads.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from benchmarks.stability_plan import Run, Size, plan, steps_of
from data_prep.errors import DataError
from train.report import Run as Folder
from train.stability.figure import PANELS, curve
from train.stability.report import outcome

KEPT = ("config.yaml", "metrics.jsonl", "validation.jsonl", "events.jsonl", "environment.json")
COLUMNS = [
    *("group", "variant", "seed", "status", "steps", "final_loss", "spike_score", "diverged_at", "events"),
    *("validation", "step_seconds", "wall_seconds", "reason"),
]
TELEMETRY = [
    *("model=1b", "precision=bf16", "parallel.zero_stage=1", "micro_batch_size=4", "global_batch_size=32"),
    "seconds=35",
]
TOY = {
    "model=34m": "model=mini",
    "precision=fp16": "precision=bf16",
    "kernels.interval_attention=triton": "kernels.interval_attention=reference",
    "model.hidden_size=1024": "model.hidden_size=128",
    "model.ffn_hidden_size=2752": "model.ffn_hidden_size=352",
}


class Worker:
    """A process that has imported everything and waits for its run."""

    def __init__(self, number: int, folder: Path, cores: Sequence[int]) -> None:
        self.log = folder / f"worker_{number}.log"
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        ports = {"MASTER_PORT": str(20000 + number), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.stability_worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=os.environ | alone | ports,
            )
        os.sched_setaffinity(self.process.pid, cores)
        self.run: Run | None = None
        self.folder = folder
        self.core = 0
        self.began = 0.0

    def begin(self, run: Run, words: Sequence[str], folder: Path, core: int) -> None:
        """Train; `folder` becomes the run folder."""
        self.run, self.folder, self.core, self.began = run, folder, core, time.monotonic()
        task = {"words": [*words, f"run_dir={folder}"], "log": str(self.log), "cores": [core]}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.close()

    def stop(self) -> None:
        """End it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Bench:
    """Runs what fits the budget and writes the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output: Path = options.output
        self.scratch: Path = options.scratch
        self.start = time.monotonic()
        self.output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        self.log: IO[str] = (self.output / "log.txt").open("w")
        cores = sorted(os.sched_getaffinity(0))
        slots = min(options.slots, len(cores))
        self.free = cores[:slots]
        self.spare = cores[slots:] or cores
        """Cores for imports."""
        self.count = 0
        self.ready: list[Worker] = []
        self.busy: list[Worker] = []
        self.rows: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        """A line with the seconds since the start, on the screen and in log.txt."""
        line = f"{time.monotonic() - self.start:6.1f} s  {text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return float(self.options.budget) - (time.monotonic() - self.start)

    def prepare(self, count: int) -> None:
        """Let so many processes import."""
        while len(self.ready) < count:
            self.count += 1
            self.ready.append(Worker(self.count, self.scratch, self.spare))

    def begin(self, run: Run) -> None:
        """Give a run to the process that has waited longest."""
        self.prepare(1)
        worker = self.ready.pop(0)
        words = [f"data.path={self.options.data}", *run.words]
        if self.options.toy:
            words = [TOY.get(word, word) for word in words] + ["schedule.warmup_samples=8", "sequence_length=64"]
            words += ["evaluation.samples=8", "micro_batch_size=2", "global_batch_size=4"]
        else:
            words += ["micro_batch_size=16", "global_batch_size=16"]
        worker.begin(run, words, self.scratch / "runs" / run.name, self.free.pop(0))
        self.busy.append(worker)

    def telemetry(self) -> subprocess.Popen[str] | None:
        """The benchmark of telemetry, started."""
        if self.options.only and "telemetry" not in self.options.only:
            return None
        words = [f"data.path={self.options.data}", f"output={self.output / 'telemetry.csv'}"]
        words += ["model=mini", "seconds=5"] if self.options.toy else TELEMETRY
        command = [sys.executable, "-m", "benchmarks.telemetry", *words]
        # The runs' processes take the other cores.
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def all(self, runs: Sequence[Run]) -> None:
        """Telemetry, warm-ups beside it, then the runs."""
        telemetry = self.telemetry()
        for number, run in enumerate(islice(warm_ups(runs), len(self.free)) if telemetry else []):
            self.say(f"warm-up {run.name}")
            self.begin(Run("warm_up", str(number), 1, (*run.words, "max_steps=4")))
        self.prepare(len(self.free) + 2)
        if telemetry is not None:
            try:
                text, _ = telemetry.communicate(timeout=min(self.options.telemetry_seconds, self.left))
            except subprocess.TimeoutExpired:
                telemetry.kill()
                text, _ = telemetry.communicate()
                self.say("telemetry took too long")
            for line in text.strip().splitlines()[-16:]:
                self.say(f"telemetry: {line}")
        waiting, packed = list(runs), time.monotonic()
        while (waiting or self.busy) and self.left > 0:
            while waiting and self.free:
                self.begin(waiting.pop(0))
            self.prepare(min(len(waiting), 3 if len(self.spare) < 3 else 5))
            for worker in [one for one in self.busy if one.process.poll() is not None]:
                self.end(worker)
            if time.monotonic() - packed > 90:
                self.pack()
                packed = time.monotonic()
            time.sleep(0.1)
        self.say(f"{len(waiting)} runs not started: {' '.join(run.name for run in waiting)}")
        for worker in list(self.busy):
            self.end(worker)

    def end(self, worker: Worker) -> None:
        """Note a run that ended, or end it."""
        cut = worker.process.poll() is None
        worker.stop()
        self.busy.remove(worker)
        self.free.append(worker.core)
        run = worker.run
        assert run is not None
        shutil.rmtree(worker.folder / "checkpoints", ignore_errors=True)
        if run.group == "warm_up":
            self.say(f"warm-up {run.variant}: {'cut off' if cut else worker.process.returncode}")
            shutil.rmtree(worker.folder, ignore_errors=True)
            return
        row = {"group": run.group, "variant": run.variant, "seed": run.seed}
        row |= {"status": "cut off" if cut else worker.process.returncode}
        row |= {"wall_seconds": f"{time.monotonic() - worker.began:.1f}"}
        row |= judged(worker.folder)
        if worker.process.returncode:
            lines = worker.log.read_text(errors="replace").strip().splitlines()
            row["reason"] = (lines or ["it said nothing"])[-1][:300]
        self.rows.append(row)
        self.say(" ".join(f"{key}={row[key]}" for key in COLUMNS if row.get(key) not in (None, "")))
        with (self.output / "summary.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)

    def pack(self) -> None:
        """runs.tar.gz anew, whole or not at all."""
        part = self.scratch / "runs.tar.gz"
        with tarfile.open(part, "w:gz", compresslevel=5) as archive:
            for path in sorted((self.scratch / "runs").glob("*/*/*")):
                if path.name in KEPT:
                    archive.add(path, path.relative_to(self.scratch))
        shutil.move(part, self.output / "runs.tar.gz")

    def close(self) -> None:
        """End every process, write the archive and the curves, clean up."""
        for worker in (*self.busy, *self.ready):
            worker.stop()
        self.pack()
        write_curves(self.scratch / "runs", self.output / "curves.csv")
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.say("done")
        self.log.close()


def write_curves(runs: Path, target: Path) -> None:
    """Means of ten steps of every run under `runs`, a line each."""
    with target.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["run", "step", *PANELS])
        for folder in sorted(path.parent for path in runs.glob("*/*/metrics.jsonl")):
            run = whole(folder)
            if run is None:
                continue
            curves = [curve(run, value) for _, value in PANELS.values()]
            for step in sorted(set().union(*curves)):
                values = [f"{one[step]:.5g}" if step in one else "" for one in curves]
                table.writerow([folder.relative_to(runs), step, *values])


def warm_ups(runs: Sequence[Run]) -> Iterator[Run]:
    """A run of each kind that compiles kernels of its own."""
    seen = set()
    for run in runs:
        kind = tuple(word for word in run.words if word.startswith(("precision=", "model.qk_norm=true")))
        if kind not in seen:
            seen.add(kind)
            yield run


def whole(folder: Path) -> Folder | None:
    """A run with at least one step; None where it was cut off before."""
    try:
        found = Folder.read(folder)
    except DataError:
        return None
    return found if found.metrics else None


def judged(folder: Path) -> dict[str, Any]:
    """A run's numbers from its folder; empty where it never began."""
    found = whole(folder)
    if found is None:
        return {}
    one = outcome(found, last_steps=50)
    loss = "" if one.final_loss is None else f"{one.final_loss:.4f}"
    return {
        "steps": found.metrics[-1]["step"],
        "final_loss": loss,
        "spike_score": f"{one.spike_score:.5f}",
        "diverged_at": one.diverged_at,
        "events": " ".join(f"{event['step']}:{event['kind']}" for event in found.events),
        "validation": " ".join(f"{record['step']}:{record['loss']:.4f}" for record in found.validation),
        "step_seconds": f"{one.step_seconds:.4f}",
    }


def main(words: Sequence[str]) -> int:
    """Run the plan, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/sample", help="dataset folder")
    parser.add_argument("--only", nargs="*", default=[], help="groups of runs; telemetry is one")
    parser.add_argument("--budget", type=float, default=420, help="seconds for everything (default 420)")
    parser.add_argument("--telemetry-seconds", type=float, default=120, help="at most, of the budget (default 120)")
    parser.add_argument("--slots", type=int, default=12, help="runs at a time (default 12)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--toy", action="store_true", help="a toy size, for a machine without GPUs")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm/stability"), help="run folders while they run")
    parser.add_argument("--output", type=Path, default=Path("runs/stability_gpu"))
    options = parser.parse_args(words)
    size = Size(batch=4, unit=0.03) if options.toy else Size()
    runs = [run for run in plan(size, options.seeds) if not options.only or run.group in options.only]
    bench = Bench(options)
    bench.say(f"{len(runs)} runs, {sum(steps_of(run) for run in runs)} steps")
    try:
        bench.all(runs)
    finally:
        bench.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
