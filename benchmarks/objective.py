"""The first GLM paper's table at small scale: what is trained, where it stands, and in which direction context is read.

    python -m benchmarks.objective --data data/small --output runs/objective     # on one GPU, all runs side by side
    python -m benchmarks.objective --toy --slots 128 --at-a-time 2    # on a CPU: 0.7 M, the embedded corpus

Trains the variants of `experiment=stability/objective` with several seeds, each in a process of its own, then evaluates
every run's last checkpoint on the same held-out rows: short spans behind [MASK]; a row's tail behind [gMASK] with its
context read both ways; the same tail read left to right (`python -m train.evaluate kind=… context=…`).

The layer is pre-norm (as the paper's): DeepNorm stands on the unigram plateau for most of so short a run. Writes
objective.csv (a row a run, as soon as it ends) and log.txt.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep import cli
from train import evaluate
from train.cli import run_train
from train.evaluate import EvaluateConfig
from train.report import Run
from train.trainer import main as train

VARIANTS = {
    "both": {"gmask_share": "0.7", "mask_share": "0.3", "positions": "1d"},
    "tails": {"gmask_share": "1.0", "mask_share": "0.0", "positions": "1d"},
    "spans": {"gmask_share": "0.0", "mask_share": "1.0", "positions": "1d"},
    "both_2d": {"gmask_share": "0.7", "mask_share": "0.3", "positions": "2d"},
}
"""What the runs differ in."""
MEASURES = {
    "spans": ["kind=mask"],
    "tail_both_ways": ["kind=gmask"],
    "tail_one_way": ["kind=gmask", "context=one_way"],
}
"""What each is evaluated by."""
COLUMNS = ["variant", "seed", "status", "steps", "train_loss", *MEASURES, *(f"{name}_unigram" for name in MEASURES)]
COLUMNS += ["rows", "wall_seconds"]


def words(options: argparse.Namespace, variant: str, seed: int, folder: Path) -> list[str]:
    """The command line of a run."""
    kinds = VARIANTS[variant]
    samples = options.steps * options.batch
    if options.toy:
        size = ["model=mini", "precision=fp32", "optimizer.lr=3e-3", "schedule.min_lr=3e-4"]
    else:
        size = ["model=34m", "precision=bf16", "optimizer.lr=1e-3", "schedule.min_lr=1e-4"]
        size += ["kernels.interval_attention=triton", "parallel.cuda_graphs=true"]
    return [
        *("experiment=stability/objective", *size, "model.norm_placement=pre", f"micro_batch_size={options.batch}"),
        *("parallel.zero_stage=1", "stability=default", f"seed={seed}", f"data.path={options.data}"),
        *(f"run_dir={folder}", f"model.positions=rotary_{kinds['positions']}"),
        *(f"data.sampling.{key}={value}" for key, value in kinds.items()),
        *("data.sampling.mask_segments=1", f"model.padded_vocab_size={options.vocabulary}"),
        *(f"sequence_length={options.slots}", f"model.max_positions={options.slots}"),
        *(f"global_batch_size={options.batch}", f"max_steps={options.steps}", f"schedule.decay_samples={samples}"),
        *(f"schedule.warmup_samples={samples // 20}", "evaluation.every_steps=0", "saving.every_steps=0"),
        *("data.workers=1", "logging.every_steps=10", "logging.progress=false", "logging.report=false"),
    ]


def work(options: argparse.Namespace) -> int:
    """One run in this process: train, evaluate three times, print one JSON line."""
    variant, seed = options.worker[0], int(options.worker[1])
    folder = options.scratch / f"{variant}.seed_{seed}"
    status = run_train(train, words(options, variant, seed, folder))
    row: dict[str, Any] = {"variant": variant, "seed": seed, "status": status}
    if status == 0:
        losses = [record["loss"] for record in Run.read(folder).metrics]
        row |= {"steps": len(losses), "train_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4)}
        for name, asked in MEASURES.items():
            output = folder / f"{name}.json"
            told = [f"checkpoint={folder}", f"output={output}", "micro_batch_size=32", *asked]
            told += [f"samples={options.rows}"] if options.rows else []
            if cli.run("evaluate", EvaluateConfig, evaluate.main, program="train.evaluate", argv=told):
                row["status"] = f"evaluation by {name} failed"
                break
            found = json.loads(output.read_text())
            row |= {name: round(found["loss"], 4), f"{name}_unigram": round(found["unigram_loss"], 4)}
            row["rows"] = found["samples"]
    print("ROW " + json.dumps(row), flush=True)
    return 0


def main(argv: Sequence[str]) -> int:
    """Start every run, wait, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/sample", help="dataset folder")
    parser.add_argument("--vocabulary", type=int, default=8064, help="padded rows of the embedding (default 8064)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step (default 16)")
    parser.add_argument("--slots", type=int, default=512, help="slots of a sequence (default 512)")
    parser.add_argument("--rows", type=int, default=None, help="held-out rows to evaluate on (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--at-a-time", type=int, default=8, help="runs side by side (default 8)")
    parser.add_argument("--seconds", type=float, default=600, help="runs that take longer are cut off (default 600)")
    parser.add_argument("--toy", action="store_true", help="0.7 M parameters, for a machine without GPUs")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm/objective"), help="run folders")
    parser.add_argument("--output", type=Path, default=Path("runs/objective"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return work(options)
    options.output.mkdir(parents=True, exist_ok=True)
    options.scratch.mkdir(parents=True, exist_ok=True)
    return collect(options, list(argv))


def collect(options: argparse.Namespace, argv: list[str]) -> int:
    """Seeds in turn, so that what is cut off is the last seed of every variant."""
    start = time.monotonic()
    waiting = [(variant, seed) for seed in options.seeds for variant in VARIANTS]
    cores = sorted(os.sched_getaffinity(0))
    busy: dict[tuple[str, int], tuple[subprocess.Popen[bytes], float]] = {}
    rows: list[dict[str, Any]] = []
    while (waiting or busy) and time.monotonic() - start < options.seconds:
        while waiting and len(busy) < options.at_a_time:
            name = waiting.pop(0)
            number = len(rows) + len(busy)
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            alone |= {"MASTER_PORT": str(21000 + number), "OMP_NUM_THREADS": "1"}
            log = (options.scratch / f"{name[0]}.{name[1]}.log").open("w")
            command = [sys.executable, "-m", "benchmarks.objective", *argv, "--worker", name[0], str(name[1])]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | alone)
            if len(cores) > 2 * options.at_a_time:
                os.sched_setaffinity(process.pid, cores[2 * number % len(cores) :][:2])
            busy[name] = process, time.monotonic()
        for name in [one for one, (process, _) in busy.items() if process.poll() is not None]:
            process, began = busy.pop(name)
            rows.append(ended(options, name) | {"wall_seconds": f"{time.monotonic() - began:.1f}"})
            write(options, rows, argv)
        time.sleep(0.2)
    for name, (process, began) in busy.items():
        process.kill()
        process.wait()
        rows.append({"variant": name[0], "seed": name[1], "status": "cut off"})
        rows[-1]["wall_seconds"] = f"{time.monotonic() - began:.1f}"
    write(options, rows, argv)
    return 0 if rows and all(row["status"] == 0 for row in rows) else 1


def ended(options: argparse.Namespace, name: tuple[str, int]) -> dict[str, Any]:
    """The row that a run printed, or why there is none."""
    lines = (options.scratch / f"{name[0]}.{name[1]}.log").read_text(errors="replace").strip().splitlines()
    found = [line for line in lines if line.startswith("ROW ")]
    if found:
        row: dict[str, Any] = json.loads(found[-1][4:])
    else:
        row = {"variant": name[0], "seed": name[1], "status": "failed"}
    with (options.output / "log.txt").open("a") as log:
        told = [] if row["status"] == 0 else lines[-15:]
        log.write("\n".join([json.dumps(row), *told]) + "\n")
    print(json.dumps(row), flush=True)
    return row


def write(options: argparse.Namespace, rows: list[dict[str, Any]], argv: list[str]) -> None:
    """objective.csv anew, with device, versions and command at its head."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with (options.output / "objective.csv").open("w", newline="") as file:
        file.write(f"# {device}, torch {torch.__version__}; python -m benchmarks.objective {' '.join(argv)}\n")
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
