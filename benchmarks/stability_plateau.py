"""Why a DeepNorm model stands on the unigram plateau: one factor changed at a time, and what the positions still tell.

    python -m benchmarks.stability_plateau --output benchmarks/stability/plateau.csv
    python -m benchmarks.stability_plateau --weights --variants deepnorm beta_1 \\
           --output benchmarks/stability/plateau_weights.csv

Each variant is the real `python -m train` at 8 x 64 on a CPU core (about 75 s), 400 steps of 16 x 64 slots. Measured:

left_at     first evaluation (every 20 steps) whose held-out loss lies 0.1 under what a unigram model pays there
share       of the energy of a layer's output, what differs between the positions of a batch: 1 - |mean h|² / mean |h|².
            1: every position has its own vector; 0: all of them have the same, and the model can say nothing but how
            frequent each piece is
gradient    2-norm of the gradient of the lowest layer's FFN

The last two where they are smallest. --weights instead trains 100 steps and looks at the matrices that each branch ends
in and begins with, means over the layers: change, the norm of what training added over that of the initial values;
one_direction, the share of its energy in its largest singular value; growth, of the matrix's largest singular value.

A row of the CSV is written when its run ends; what it holds is not run again.
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
from train.model.build import named_layouts
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
WIDE = [
    *("model.num_layers=12", "model.hidden_size=128", "model.num_heads=8", "model.ffn_hidden_size=344"),
    *("optimizer.lr=3e-4", "schedule.min_lr=3e-5"),
]
"""Depth, rate and share of the warm-up nearer to experiment=stability/small_scale; about five minutes."""
VARIANTS: dict[str, list[str]] = {
    "deepnorm": [],
    "pre_norm": ["model.norm_placement=pre"],
    "post_norm": ["model.norm_placement=post"],
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
    "gelu_not_gated": ["model.activation=gelu"],
    "qk_norm": ["model.qk_norm=true"],
    "no_positions": ["model.positions=none"],
    "init_0.02": ["model.init=normal"],
    "wide": WIDE,
    "wide.beta_1": [*WIDE, "model.deepnorm_beta=1"],
}
COLUMNS = ["variant", "seed", "left_at", "final_loss", "unigram", "smallest_share", "share_step"]
COLUMNS += ["smallest_gradient", "gradient_step", "words"]
MATRICES = ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
WEIGHTS = ["variant", "seed", "step", "matrix", "change", "one_direction", "growth"]


def differing_share(hidden: Tensor) -> float:
    """Of the energy of hidden [..., H], what is not in the mean over all positions."""
    rows = hidden.detach().double().flatten(0, -2)
    return float(1.0 - rows.mean(0).square().sum() / rows.square().sum(1).mean())


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """Every matrix by its canonical name."""
    return {layout.name: value.detach() for layout, value in named_layouts(engine.model.parameters())}


def moved(first: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, list[float]]:
    """By kind of matrix: [change, one_direction, growth], means over the layers."""
    found = {}
    for kind in MATRICES:
        layers = []
        for name in (name for name in first if name.endswith(f"{kind}.weight")):
            added = now[name] - first[name]
            largest, after, before = (torch.linalg.matrix_norm(one, 2) for one in (added, now[name], first[name]))
            change, direction = added.norm() / first[name].norm(), (largest / added.norm()) ** 2
            layers.append([float(change), float(direction), float(after / before)])
        found[kind] = torch.tensor(layers).mean(0).tolist()
    return found


def watched(words: Sequence[str], target: Path) -> int:
    """Train in this process; every `EVERY` steps a line {step, share: one a layer, moved} goes to `target`."""
    plain, shares, steps = Engine.step, dict[int, float](), 0
    first: dict[str, Tensor] = {}

    def step(engine: Engine, *settings: Any) -> StepResult:
        nonlocal steps
        if not steps:
            first.update({name: value.clone() for name, value in weights_of(engine).items()})
            for index, item in enumerate(engine.model.items[1:-1]):
                item.register_forward_hook(lambda _, __, out, index=index: note(index, out[0]))
        steps += 1
        result = plain(engine, *settings)
        if steps % EVERY == 0:
            with target.open("a") as file:
                line = {"step": steps, "share": list(shares.values()), "moved": moved(first, weights_of(engine))}
                file.write(json.dumps(line) + "\n")
        return result

    def note(index: int, hidden: Tensor) -> None:
        if hidden.requires_grad and steps % EVERY == 0:
            shares[index] = differing_share(hidden)

    Engine.step = step  # type: ignore[method-assign]
    return run_train(train, list(words))


def run_of(variant: str, seed: int, folder: Path, *words: str) -> list[dict[str, Any]]:
    """One run, in a process of its own; the lines of `watched`."""
    command = [sys.executable, "-m", "benchmarks.stability_plateau", "--watch", str(folder / "watched.jsonl")]
    all_words = [*COMMON, *VARIANTS[variant], f"seed={seed}", *words, f"run_dir={folder}"]
    subprocess.run([*command, *all_words], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "watched.jsonl").read_text().splitlines()]


def weights(variant: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of --weights."""
    rows = []
    for line in run_of(variant, seed, folder, "max_steps=100", "evaluation.every_steps=0"):
        for matrix, values in line["moved"].items() if line["step"] in (40, 60, 100) else ():
            numbers = (f"{value:.2f}" for value in values)
            rows.append(dict(zip(WEIGHTS, (variant, seed, line["step"], matrix, *numbers), strict=True)))
    return rows


def plateau(variant: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The row of a whole run."""
    lines = run_of(variant, seed, folder)
    run = Run.read(folder)
    unigram = run.validation[0]["unigram_loss"]
    left = next((one["step"] for one in run.validation if one["loss"] < unigram - UNDER), None)
    share, at = min((line["share"][-1], line["step"]) for line in lines)
    measured = [record for record in run.metrics if "telemetry" in record]
    gradient, then = min((one["telemetry"]["gradient"]["layers.0.ffn"], one["step"]) for one in measured)
    row = {"variant": variant, "seed": seed, "left_at": left, "final_loss": f"{run.validation[-1]['loss']:.3f}"}
    row |= {"unigram": f"{unigram:.3f}", "smallest_share": f"{share:.1e}", "share_step": at}
    row |= {"smallest_gradient": f"{gradient:.1e}", "gradient_step": then}
    return [row | {"words": " ".join(VARIANTS[variant])}]


def main(words: Sequence[str]) -> int:
    """Run what the CSV does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--weights", action="store_true", help="how the matrices move in the first 100 steps")
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
        table = csv.DictWriter(file, WEIGHTS if options.weights else COLUMNS, lineterminator="\n")
        if new:
            table.writeheader()
        for seed in options.seeds:
            for variant in options.variants:
                if (variant, seed) in known:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    rows = (weights if options.weights else plateau)(variant, seed, Path(folder))
                table.writerows(rows)
                file.flush()
                for row in rows:
                    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
