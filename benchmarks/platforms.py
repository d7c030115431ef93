"""The same 50 steps on a CPU and on a GPU: do the curves agree?

    python -m benchmarks.platforms run --output benchmarks/platforms/cpu.csv     # on each of the two machines
    python -m benchmarks.platforms run --output benchmarks/platforms/gpu.csv
    python -m benchmarks.platforms compare                                       # a table; docs/images/platforms.png

`run` trains the `tiny` model through the trainer's own command line, with dropout, on data/sample (made by
`python -m data_prep data=sample`): fp32 with the reference kernels, and on a GPU bf16 and fp16 with the fused ones too,
all at once, each in a process of its own. TF32 stays off, as it is in PyTorch by default.

`compare` needs matplotlib (the extra `figures`). It ends with status 1 where fp32 losses differ by more than 1e-4.
"""

import argparse
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.errors import DataError

FOLDER = Path(__file__).parent / "platforms"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "platforms.png"
SETTINGS = (
    "schedule.warmup_samples=80 model.hidden_dropout=0.1 model.attention_dropout=0.1 evaluation.every_steps=0 "
    "logging.progress=false logging.report=false saving.every_steps=0"
)
VARIANTS = {
    "fp32": "precision=fp32 kernels=reference",
    "bf16": "precision=bf16",
    "fp16": "precision=fp16",
}
VALUES = ("loss", "grad_norm")
ALLOWED = 1e-4
Table = dict[str, list[float]]
"""`fp32_loss`, `fp32_grad_norm`, … of each step; NaN where a step has none (an overflow)."""


def main() -> int:
    """Run, or compare."""
    options = parse(sys.argv[1:])
    if options.task == "compare":
        return compare(read(options.cpu), read(options.gpu), options.figure)
    return run(options)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    one = tasks.add_parser("run", help="train on the device at hand")
    one.add_argument("--data", default="data/sample")
    one.add_argument("--steps", type=int, default=50)
    one.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all on a GPU, fp32 on a CPU")
    one.add_argument("--output", type=Path, required=True)
    two = tasks.add_parser("compare", help="two tables: figures and a picture")
    two.add_argument("--cpu", type=Path, default=FOLDER / "cpu.csv")
    two.add_argument("--gpu", type=Path, default=FOLDER / "gpu.csv")
    two.add_argument("--figure", type=Path, default=FIGURE)
    return parser.parse_args(words)


# ---- run ----


def run(options: argparse.Namespace) -> int:
    """Train all variants at once and write their curves; 1 where one failed."""
    import torch

    from benchmarks.step import device, versions

    variants = options.variants or (list(VARIANTS) if torch.cuda.is_available() else ["fp32"])
    table: Table = {}
    with tempfile.TemporaryDirectory() as folder:
        processes = {name: start(name, options, Path(folder) / name) for name in variants}
        for name, process in processes.items():
            said, _ = process.communicate()
            if process.returncode:
                print(f"{name} ended with status {process.returncode}: {said[-2000:]}", flush=True)
                continue
            lines = (Path(folder) / name / "metrics.jsonl").read_text("utf-8").splitlines()
            for value in VALUES:
                found = [json.loads(line)[value] for line in lines]
                table[f"{name}_{value}"] = [math.nan if number is None else number for number in found]
            print(f"{name}: loss {table[f'{name}_loss'][0]:.6f} to {table[f'{name}_loss'][-1]:.6f}", flush=True)
    if table:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", newline="") as file:
            command = f"python -m benchmarks.platforms {shlex.join(sys.argv[1:])}"
            file.write(f"# {device()}, {versions()}; {command}\n")
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["step", *table])
            rows.writerows([step, *values] for step, values in enumerate(zip(*table.values(), strict=True), 1))
    return 0 if len(table) == len(VALUES) * len(variants) else 1


def start(name: str, options: argparse.Namespace, run_dir: Path) -> "subprocess.Popen[str]":
    """The trainer, in a process of its own."""
    words = [f"data.path={options.data}", f"run_dir={run_dir}", f"max_steps={options.steps}"]
    words += shlex.split(f"{VARIANTS[name]} {SETTINGS}")
    return subprocess.Popen(
        [sys.executable, "-m", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
    )


# ---- compare ----


def read(path: Path) -> Table:
    """A table that `run` wrote. Raises DataError naming the file."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
        rows = list(csv.DictReader(lines))
        return {name: [float(row[name]) for row in rows] for name in rows[0] if name != "step"}
    except (OSError, IndexError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a table of `benchmarks.platforms run` ({error})") from error


def compare(cpu: Table, gpu: Table, figure: Path) -> int:
    """Print the largest relative differences from the CPU's fp32, draw them; 1 where fp32 losses differ too much."""
    print("| GPU run | loss | gradient norm | loss at the last step |\n|---|---|---|---|")
    print(f"| (CPU, fp32) | | | {cpu['fp32_loss'][-1]:.6f} |")
    for name in VARIANTS:
        if f"{name}_loss" in gpu:
            far = [f"{max(finite(differences(cpu, gpu, name, value))):.1e}" for value in VALUES]
            print(f"| {name} | {far[0]} | {far[1]} | {gpu[f'{name}_loss'][-1]:.6f} |")
    draw(cpu, gpu, figure)
    worst = max(finite(differences(cpu, gpu, "fp32", "loss")))
    print(f"fp32 losses agree to {worst:.1e}; {ALLOWED:.0e} is allowed")
    return 0 if worst <= ALLOWED else 1


def differences(cpu: Table, gpu: Table, name: str, value: str) -> list[float]:
    """|GPU's - CPU's fp32| / CPU's fp32, step by step."""
    pairs = zip(cpu[f"fp32_{value}"], gpu[f"{name}_{value}"], strict=True)
    return [abs(other - base) / abs(base) for base, other in pairs]


def finite(values: Sequence[float]) -> list[float]:
    """Without the steps that have no value."""
    return [value for value in values if math.isfinite(value)]


def draw(cpu: Mapping[str, list[float]], gpu: Table, path: Path) -> None:
    """Losses on the left; on the right how far each GPU run's loss is from the CPU's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.2), dpi=90, layout="constrained")
    losses, far = figure.subplots(1, 2)
    steps = range(1, len(cpu["fp32_loss"]) + 1)
    losses.plot(steps, cpu["fp32_loss"], color="black", linewidth=3, alpha=0.35, label="CPU, fp32")
    for number, name in enumerate(name for name in VARIANTS if f"{name}_loss" in gpu):
        losses.plot(steps, gpu[f"{name}_loss"], f"C{number}", linewidth=1.2, label=f"GPU, {name}")
        # A difference of 0 cannot be drawn on a logarithmic axis.
        apart = [value if value > 0 else math.nan for value in differences(cpu, gpu, name, "loss")]
        far.plot(steps, apart, f"C{number}.-", linewidth=1, label=f"GPU, {name}")
    far.axhline(ALLOWED, color="grey", linestyle=":", label="allowed for fp32")
    losses.set(title="training loss", xlabel="step")
    far.set(title="relative difference from the CPU's fp32 loss", xlabel="step", yscale="log")
    for axes in (losses, far):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": ""})


if __name__ == "__main__":
    raise SystemExit(main())
