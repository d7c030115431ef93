"""The planner against this machine: memory and step time of real engines beside what was planned for them.

    python -m benchmarks.planner_check --hardware h100                 # one GPU, writes benchmarks/planner_check.csv
    python -m benchmarks.planner_check --hardware h200 --ranks 2       # cases for two GPUs too
    python -m benchmarks.planner_check --tables                        # no GPU: the steps that other tables here hold
    python -m benchmarks.planner_check --toy                           # a small model, wherever it runs: tries the path

Each case is a training config that trains for a few steps in processes of its own, on gMASK samples. A row is written
only where the loss fell. `--tables` takes this trainer's rows of benchmarks/step/ and benchmarks/parallel/ instead and
writes benchmarks/planner_tables.csv. Goals: peak memory within 8 %, step time within 10 %, none of the cases used
to fit either.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.parallel import SPEED
from benchmarks.step_measure import timed
from benchmarks.step_worker import OURS, SHAPES, Shape, batch_of
from benchmarks.step_worker import words as words_of
from data_prep import cli
from data_prep.errors import ConfigError
from launch.hardware import find
from launch.plan_config import PlanConfig
from launch.plan_cost import Shares
from launch.plan_search import Cluster, evaluate

GMASK = Shares(attended=1 - 0.6 + (1 + 0.2 + 0.04) / 6, targets=0.6)
"""What gMASK samples with lengths uniform in [0.2, 1] leave: launch/plan_data.py."""
ONE = [
    "model=1b micro_batch_size=4 global_batch_size=32",
    "model=1b micro_batch_size=8 global_batch_size=64",
    "model=1b micro_batch_size=16 global_batch_size=64 parallel.activation_checkpointing=full",
    "model=1b micro_batch_size=2 global_batch_size=16 sequence_length=8192 model.max_positions=8192",
    "model=1b model.num_layers=36 micro_batch_size=4 global_batch_size=32",
    "model=350m micro_batch_size=16 global_batch_size=128",
    "model=350m micro_batch_size=16 global_batch_size=128 model.hidden_dropout=0.1 model.attention_dropout=0.1",
]
TWO = [
    "model=1b micro_batch_size=8 global_batch_size=128",
    "model=1b micro_batch_size=8 global_batch_size=128 parallel.zero_stage=2",
    "model=1b micro_batch_size=8 global_batch_size=128 parallel.zero_stage=3",
    "model=1b micro_batch_size=8 global_batch_size=128 parallel.tensor_parallel=2",
    "model=1b micro_batch_size=8 global_batch_size=128 parallel.pipeline_parallel=2",
    "model=1b micro_batch_size=4 global_batch_size=128 parallel.pipeline_parallel=2",
]
FOLDER = Path(__file__).parent
TABLES = {
    "step/recompute.csv": "anchor",
    "step/graphs.csv": "anchor",
    "step/graphs_small.csv": "text",
    "step/fp8.csv": "anchor",
    "step/fp8_h200.csv": "anchor",
    "parallel/speed.csv": "",
    "parallel/speed_second.csv": "",
    "parallel/speed_third.csv": "",
    "parallel/speed_fourth.csv": "",
}
"""Whose rows say no shape have this one."""
PARALLEL = {row.name: row for row in SPEED["3b"] if not row.peer}
TOY = "model=tiny micro_batch_size=2 global_batch_size=8 sequence_length=64 precision=fp32"


def composed(words: str) -> PlanConfig:
    """A case's config, with what all cases share."""
    return cli.compose("plan", PlanConfig, ["precision=bf16", "optimizer.lr=1e-4", *shlex.split(words)])


def work(words: str, steps: int, target: Path) -> None:
    """One rank of a case; rank 0 writes what it measured as JSON. Memory is the fullest rank's."""
    from train import backend
    from train.engine import Engine

    config = composed(words)
    backend.start()
    mesh = backend.make_mesh(config)
    engine = Engine.start(config, mesh)
    model = config.model
    shape = Shape(
        model.num_layers, model.hidden_size, model.num_heads, model.ffn_hidden_size, model.padded_vocab_size,
        config.sequence_length,
    )  # fmt: skip
    count = config.global_batch_size // (config.micro_batch_size * mesh.data)
    seeds = range(mesh.data_rank * count, (mesh.data_rank + 1) * count)
    batches = [batch_of(shape, config.micro_batch_size, seed) if engine.needs_batches else None for seed in seeds]
    results = [engine.step(batches, config.optimizer.lr, 1.0) for _ in range(3)]
    gpu = mesh.device.type != "cpu"
    backend.memory()  # from here on the peak counts

    def step() -> torch.Tensor:
        results.append(engine.step(batches, config.optimizer.lr, 1.0))
        return results[-1].loss

    seconds = [timed(step, gpu)[0] for _ in range(steps)]
    numbers = engine.read(results)
    memory = backend.memory()
    names = ("memory_peak_bytes", "memory_reserved_bytes")
    peak = torch.tensor([memory.get(name, 0) for name in names], device=mesh.device)
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    if mesh.rank == 0:
        found = {
            "device": backend.device_name(),
            "first_loss": numbers[0].loss,
            "last_loss": numbers[-1].loss,
            "seconds": sorted(seconds)[len(seconds) // 2],
            "allocated": int(peak[0]),
            "reserved": int(peak[1]),
        }
        target.write_text(json.dumps(found), encoding="utf-8")
    backend.stop()


def measure(words: str, ranks: int, steps: int) -> dict[str, Any]:
    """A case in processes of its own. Raises RuntimeError where it fails or its loss does not fall."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "benchmarks.planner_check", "--worker", words, "--steps", str(steps), "--output", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{words}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    if not found["last_loss"] < found["first_loss"]:
        raise RuntimeError(f"{words}: the loss did not fall: {found['first_loss']} to {found['last_loss']}")
    return found


def row(words: str, ranks: int, hardware: str, found: dict[str, Any]) -> dict[str, Any]:
    """Planned beside measured, and the error of the plan in per cent."""
    planned = evaluate(composed(words), Cluster(find(hardware), 1, ranks), GMASK)
    gib = planned.memory.total / 2**30
    reserved = found["reserved"] / 2**30
    return {
        "ranks": ranks,
        "case": words,
        "planned_step_s": f"{planned.seconds:.4f}",
        "measured_step_s": f"{found['seconds']:.4f}",
        "step_error_percent": f"{100 * (planned.seconds / found['seconds'] - 1):+.1f}",
        "planned_gib": f"{gib:.2f}",
        "measured_allocated_gib": f"{found['allocated'] / 2**30:.2f}" if "allocated" in found else "",
        "measured_reserved_gib": f"{reserved:.2f}",
        "memory_error_percent": f"{100 * (gib / reserved - 1):+.1f}" if reserved else "",
    }


def tables() -> list[dict[str, Any]]:
    """Every row of `TABLES` that this trainer measured, beside its plan."""
    rows = []
    for name, usual in TABLES.items():
        heading, *lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
        hardware = next(word.lower() for word in re.findall(r"\w+", heading) if word in ("H100", "H200"))
        for line in csv.DictReader(lines):
            name = line.get("contender") or line["row"]
            if not line["tokens_per_second"] or name not in {**OURS, **PARALLEL}:
                continue
            parallel, ranks = PARALLEL.get(name), int(line.get("world") or 1)
            shape = SHAPES[line.get("shape") or usual]
            micro, count = int(line["micro_batch"]), int(line.get("accumulation") or line["micro_batches"])
            replicas = ranks // parallel.model_ranks if parallel else 1
            case = words_of(shape, micro, count * replicas, *(parallel.overrides if parallel else OURS[name]))
            found = {"seconds": float(line["step_ms"]) / 1e3, "reserved": float(line["memory_gib"]) * 2**30}
            rows.append({"device": hardware} | row(shlex.join(case), ranks, hardware, found))
    return rows


def write(target: Path, heading: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table, with what it is and the command."""
    with target.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {heading}\n# {shlex.join(['python', '-m', 'benchmarks.planner_check', *sys.argv[1:]])}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases that so many ranks can run; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="h100", help="word of launch/hardware.py for this machine")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tables", action="store_true", help="what is measured already, in place of measuring")
    parser.add_argument("--toy", action="store_true", help="one small case only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args(argv)
    if options.worker is not None:
        work(options.worker, options.steps, options.output)
        return 0
    if options.tables:
        write(FOLDER / "planner_tables.csv", "planned for the device of each row", tables())
        return 0
    cases = [(options.ranks, TOY)] if options.toy else [(1, words) for words in ONE]
    if options.ranks > 1 and not options.toy:
        cases += [(2, words) for words in TWO]
    rows, failed, device = [], 0, "unknown"
    for ranks, words in cases:
        try:
            found = measure(words, ranks, options.steps)
        except (RuntimeError, ConfigError) as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        device = found["device"]
        rows.append(row(words, ranks, options.hardware, found))
        print(rows[-1], flush=True)
    if rows:
        write(options.output, f"{device}, torch {torch.__version__}, planned as {options.hardware}", rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
