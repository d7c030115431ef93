"""Why a DeepNorm model stands on the unigram plateau: one factor changed at a time, and what the positions still tell.

    python -m benchmarks.stability_plateau --output benchmarks/stability/plateau.csv
    python -m benchmarks.stability_plateau --variants deepnorm pre_norm --seeds 1 2 3

Each variant is the real `python -m train` at 8 x 64 on a CPU core (about 75 s), 400 steps of 16 x 64 slots. Measured:

left_at     first evaluation (every 20 steps) whose held-out loss lies 0.1 under what a unigram model pays there
share       of the energy of a layer's output, what differs between the positions of a batch: 1 - |mean h|² / mean |h|².
            1: every position has its own vector; 0: all of them have the same, and the model can say nothing but how
            frequent each piece is
gradient    2-norm of the gradient of the lowest layer's FFN

The last two where they are smallest. A row of the CSV is written when its run ends; what it holds is not run again.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.cli import run_train
from train.engine import Engine, StepResult
from train.report import Run
from train.trainer import main as train

EVERY = 10
"""Steps between two looks at the layers."""
UNDER = 0.1
"""Nats under the unigram model's loss that count as having left it."""
COMMON = [
    *("experiment=stability/base", "model.num_layers=8", "micro_batch_size=16", "global_batch_size=16"),
    *("max_steps=400", "optimizer.lr=1e-3", "schedule.min_lr=1e-4", "schedule.warmup_samples=800"),
    *("schedule.decay_samples=32000", f"logging.every_steps={EVERY}", "logging.progress=false"),
    *("evaluation.every_steps=20", "evaluation.samples=64", "evaluation.blanks=0", "data.workers=0"),
    "kernels.interval_attention=sdpa",
]
VARIANTS = {
    "deepnorm": [],
    "pre_norm": ["model.norm_placement=pre"],
    "post_norm": ["model.norm_placement=post"],
    "sandwich": ["model.norm_placement=sandwich"],
    "beta_1": ["model.deepnorm_beta=1"],
    "beta_0.5": ["model.deepnorm_beta=0.5"],
    "alpha_1": ["model.deepnorm_alpha=1"],
    "deepnet_paper": ["model.deepnorm_alpha=2", "model.deepnorm_beta=0.354"],
    "alpha_x4": ["model.deepnorm_alpha=16"],
    "untied": ["model.tied_embeddings=false"],
    "lr_3e-4": ["optimizer.lr=3e-4", "schedule.min_lr=3e-5"],
    "warm_up_x4": ["schedule.warmup_samples=3200"],
    "eps_1e-15": ["optimizer.eps=1e-15"],
    "egs_0.1": ["stability.embedding_gradient_shrink=0.1"],
    "no_weight_decay": ["optimizer.weight_decay=0"],
    "clip_0.1": ["optimizer.clip=0.1"],
    "no_biases": ["model.bias=none"],
    "rms_norm": ["model.norm=rmsnorm"],
    "gelu_not_gated": ["model.activation=gelu"],
    "qk_norm": ["model.qk_norm=true"],
    "no_positions": ["model.positions=none"],
    "init_0.02": ["model.init=normal"],
    "batch_x4": [
        *("micro_batch_size=64", "global_batch_size=64", "schedule.warmup_samples=3200"),
        "schedule.decay_samples=128000",
    ],
}
COLUMNS = ["variant", "seed", "left_at", "final_loss", "unigram", "smallest_share", "share_step"]
COLUMNS += ["smallest_gradient", "gradient_step", "words"]


def differing_share(hidden: Tensor) -> float:
    """Of the energy of hidden [..., H], what is not in the mean over all positions."""
    rows = hidden.detach().double().flatten(0, -2)
    return float(1.0 - rows.mean(0).square().sum() / rows.square().sum(1).mean())


def watched(words: Sequence[str], target: Path) -> int:
    """Train in this process; every `EVERY` steps a line {step, share: one a layer} goes to `target`."""
    plain, shares, steps = Engine.step, dict[int, float](), 0

    def step(engine: Engine, *settings: Any) -> StepResult:
        nonlocal steps
        if not steps:
            for index, item in enumerate(engine.model.items[1:-1]):
                item.register_forward_hook(lambda _, __, out, index=index: note(index, out[0]))
        steps += 1
        result = plain(engine, *settings)
        if steps % EVERY == 0:
            with target.open("a") as file:
                file.write(json.dumps({"step": steps, "share": list(shares.values())}) + "\n")
        return result

    def note(index: int, hidden: Tensor) -> None:
        if hidden.requires_grad and steps % EVERY == 0:
            shares[index] = differing_share(hidden)

    Engine.step = step  # type: ignore[method-assign]
    return run_train(train, list(words))


def measure(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run, in a process of its own; its row."""
    words = [*COMMON, *VARIANTS[variant], f"seed={seed}"]
    command = [sys.executable, "-m", "benchmarks.stability_plateau", "--watch", str(folder / "share.jsonl")]
    subprocess.run([*command, *words, f"run_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
    run = Run.read(folder)
    unigram = run.validation[0]["unigram_loss"]
    left = next((one["step"] for one in run.validation if one["loss"] < unigram - UNDER), None)
    lines = [json.loads(line) for line in (folder / "share.jsonl").read_text().splitlines()]
    share, at = min((line["share"][-1], line["step"]) for line in lines)
    measured = [record for record in run.metrics if "telemetry" in record]
    gradient, then = min((one["telemetry"]["gradient"]["layers.0.ffn"], one["step"]) for one in measured)
    row = {"variant": variant, "seed": seed, "left_at": left, "final_loss": f"{run.validation[-1]['loss']:.3f}"}
    row |= {"unigram": f"{unigram:.3f}", "smallest_share": f"{share:.1e}", "share_step": at}
    row |= {"smallest_gradient": f"{gradient:.1e}", "gradient_step": then}
    return row | {"words": " ".join(VARIANTS[variant])}


def main(words: Sequence[str]) -> int:
    """Run what the CSV does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=Path, default=Path("runs/stability_plateau.csv"))
    parser.add_argument("--watch", type=Path, help="train in this process: the words of `python -m train` follow")
    options, rest = parser.parse_known_args(words)
    if options.watch is not None:
        return watched(rest, options.watch)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    print(f"{platform.machine()} CPU, torch {torch.__version__}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    new = not options.output.exists()
    with options.output.open("a+", newline="") as file:
        file.seek(0)
        known = {(row["variant"], int(row["seed"])) for row in csv.DictReader(file)}
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            table.writeheader()
        for seed in options.seeds:
            for variant in options.variants:
                if (variant, seed) in known:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(variant, seed, Path(folder))
                table.writerow(row)
                file.flush()
                print(" ".join(f"{key}={row[key]}" for key in COLUMNS[:-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
