"""Perplexity and bytes of one model in fp32, INT8 and INT4.

    python -m benchmarks.quantisation checkpoint=runs/demo [data=data/sample] [samples=200]

The same held-out samples each time, through the PyTorch reference. Writes benchmarks/quantisation.md. Speed is measured
on a GPU by benchmarks/decode.py.
"""

import sys
from pathlib import Path

import torch

from data_prep.dataset import Dataset
from data_prep.samples import Sampler
from train.checkpoint.model import load_trained
from train.evaluate import evaluate
from train.model.quantised import weight_bytes

TARGET = Path(__file__).with_suffix(".md")
FORMS: tuple[tuple[str, str | None, int | None], ...] = (
    ("fp32", None, None),
    ("INT8, a scale a row", "int8", None),
    ("INT4, a scale a row", "int4", None),
    ("INT4, a scale every 16 columns", "int4", 16),
)


def main(words: list[str]) -> int:
    """Measure and write the table."""
    settings = {"checkpoint": "runs/demo", "data": "data/sample", "samples": "200"}
    settings |= dict(word.split("=", 1) for word in words)
    rows, base = [], 0.0
    for name, quantise, group in FORMS:
        trained = load_trained(settings["checkpoint"], torch.device("cpu"), quantise=quantise, quantise_group=group)
        run = trained.config
        sampler = Sampler(
            Dataset.open(settings["data"]), run.data.sampling, run.sequence_length, seed=run.seed, split="valid"
        )
        samples = min(int(settings["samples"]), sampler.rows)
        found = evaluate(trained, sampler, samples, 8)
        base = base or found["perplexity"]
        layers = weight_bytes(trained.model.items[1:-1])
        rows.append(
            f"| {name} | {found['perplexity']:.3f} | {100 * (found['perplexity'] / base - 1):+.3f} % | "
            f"{found['bits_per_byte']:.4f} | {layers / 2**20:.2f} |"
        )
        print(rows[-1], flush=True)
    text = f"""# Weight-only quantisation: perplexity

Written by `python -m benchmarks.quantisation`, on a CPU with torch {torch.__version__}: `{run.model.name}` at
{run.model.num_layers} layers × {run.model.hidden_size}, trained by `make demo`, {samples}
held-out samples ({found["targets"]:,} targets), the same each time. Embedding and head stay as they are.

| weights of the layers | perplexity | against fp32 | bits a byte | MiB in the layers |
|---|---|---|---|---|
{chr(10).join(rows)}
"""
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
