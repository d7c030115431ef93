"""Benchmark of the whole training step on one GPU: this project beside its peers, in one run.

    python -m benchmarks.step                               # all contenders; writes benchmarks/step/step.csv
    python -m benchmarks.step tiankong litgpt --micro-batch 8
    python -m benchmarks.step tiankong --profile            # and benchmarks/step/profile.csv: where a step's time goes
    python -m benchmarks.step tiankong --shape toy          # a few seconds on a CPU: does it run?

The shape is 24 layers of 2048, heads of 128, gated FFN 5504, vocabulary 50304, 2048 slots, the head untied: 1.42 B
parameters. First the fused kernels are held to the references on a short model; a failed check ends with status 1 and
times nothing. Then each contender runs in a process of its own, one after the other: the matmul and copy ceilings,
`--warmup` steps that are not counted, `--steps` steps between device events. All train on the same few batches over and
over, so the loss must fall; the table shows it. A contender that does not fit takes a smaller micro-batch; one whose
package is missing is listed with that reason.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_worker
from benchmarks.step_worker import SHAPES
from data_prep.versions import installed

FOLDER = Path(__file__).parent / "step"


def main() -> int:
    """Check, run all contenders, write the tables; 1 where the check or every contender failed."""
    options = parse(sys.argv[1:])
    if options.worker:
        print(json.dumps(step_worker.work(options)))
        return 0
    if options.check:
        shape = SHAPES["toy" if options.shape == "toy" else "short"]
        differs = step_worker.check(any("fp8" in name for name in options.contenders), shape)
        print(differs or "the fused kernels agree with the references")
        return 1 if differs else 0
    # Like the contenders in a process of its own: what it leaves on the device and its port would be in their way.
    check = [sys.executable, "-m", "benchmarks.step", "--check", *options.contenders]
    if torch.cuda.is_available() and subprocess.run(check).returncode:
        return 1
    rows: list[dict[str, Any]] = []
    for name in options.contenders:
        rows.append(run(name, options))
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "profile"}), flush=True)
        write(options, rows)  # now: a later one may be cut off
    return 0 if any(row.get("tokens_per_second") for row in rows) else 1


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(step_worker.CONTENDERS)
    parser.add_argument("contenders", nargs="*", default=names, help=f"which of {', '.join(names)} (default: all)")
    parser.add_argument("--shape", choices=list(SHAPES), default="anchor")
    parser.add_argument("--micro-batch", type=int, default=16, help="largest to try, in sequences (default 16)")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches a step (default 8)")
    parser.add_argument("--steps", type=int, default=3, help="steps that count (default 3)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, compilation among them (default 2)")
    parser.add_argument("--profile", action="store_true", help="add a profiled step of this project's contenders")
    parser.add_argument("--timeout", type=int, default=400, help="seconds a contender may take (default 400)")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true", help="only hold the fused kernels to the references")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    unknown = sorted(set(options.contenders) - set(names))
    if unknown:
        parser.error(f"no contender is called {unknown[0]}; use {', '.join(names)}")
    return options


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One contender in a process of its own, with smaller micro-batches until it fits."""
    about = {"contender": name, "peer": step_worker.CONTENDERS[name].peer, "shape": options.shape}
    size, reason = options.micro_batch, ""
    while size:
        words = ["--worker", name, "--shape", options.shape, "--micro-batch", str(size)]
        words += ["--accumulation", str(options.accumulation * options.micro_batch // size)]
        words += ["--steps", str(options.steps), "--warmup", str(options.warmup)]
        words += ["--profile"] if options.profile and not about["peer"] else []
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.step", *words],
                capture_output=True,
                text=True,
                timeout=options.timeout,
            )
        except subprocess.TimeoutExpired:
            return about | {"reason": f"took longer than {options.timeout} s"}
        if done.returncode == 0:
            return about | json.loads(done.stdout.splitlines()[-1])
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        reason = errors[-1] if errors else f"status {done.returncode}"
        if "out of memory" not in done.stderr.lower():
            break
        size //= 2
    return about | {"micro_batch": size, "reason": reason}


def write(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """step.csv, with each rate as a multiple of the best peer's, and profile.csv where steps were profiled."""
    best = max((row["tokens_per_second"] for row in rows if row["peer"] and row.get("tokens_per_second")), default=None)
    for row in rows:
        rate = row.get("tokens_per_second")
        row["x_best_peer"] = round(rate / best, 3) if rate and best else None
    options.output.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.step", *sys.argv[1:]])
    heading = f"# {device()}, {versions()}; {command}; {asdict(SHAPES[options.shape])}"
    fields = [
        *("contender", "micro_batch", "accumulation", "tokens_per_second", "x_best_peer", "model_tflops", "step_ms"),
        *("spread", "memory_gib", "first_loss", "last_loss", "matmul_tflops", "copy_gb_per_s", "reason"),
    ]
    with (options.output / "step.csv").open("w", newline="") as file:
        file.write(heading + "\n")
        table = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    profiles = [(row["contender"], entry) for row in rows for entry in row.get("profile", [])]
    if profiles:
        with (options.output / "profile.csv").open("w", newline="") as file:
            file.write(heading + "\n")
            table = csv.DictWriter(file, ["contender", "part", "calls", "ms", "share"], lineterminator="\n")
            table.writeheader()
            table.writerows({"contender": name, **entry} for name, entry in profiles)


def device() -> str:
    """The GPU, or the processor's architecture."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"


def versions() -> str:
    """What the figures depend on."""
    packages = ("torch", "triton", "deepspeed", "litgpt", "transformers", "liger_kernel")
    return ", ".join(f"{name} {version}" for name, version in installed(packages).items())


if __name__ == "__main__":
    raise SystemExit(main())
