"""Benchmark of the sampler: tokens a second on one core, and the stated laws on 100,000 samples of each kind.

    python -m benchmarks.sampler data.path=data/sample    # writes benchmarks/sampler.md

Nothing is written unless every check holds: no speed is quoted for wrong samples.
"""

import argparse
import math
import os
import platform
import time
from pathlib import Path

# One core is what is measured; set before numpy loads its libraries.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from data_prep.batch import CAUSAL, GMASK, KINDS, MASK, SMASK, Batch
from data_prep.config import SamplingConfig
from data_prep.dataset import Dataset
from data_prep.samples import Sampler

LENGTHS = (256, 512, 2048)
_BATCH = 8


def main() -> None:
    """Check, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="dataset folder (also as data.path=DIR)")
    parser.add_argument("--samples", type=int, default=100_000, help="samples of each kind to check (default 100000)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = Dataset.open(arguments.path.removeprefix("data.path="))
    # Once without measuring: caches and frequency settle.
    speed(dataset, LENGTHS[0], None)
    laws = [check(dataset, kind, arguments.samples) for kind in (GMASK, MASK, SMASK)]
    speeds = [speed(dataset, slots, kind) for slots in LENGTHS for kind in (GMASK, MASK, SMASK, CAUSAL, None)]
    loaders = [through_batches(dataset, slots) for slots in LENGTHS]
    text = report(arguments.samples, laws, speeds, loaders)
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


def only(kind: int | None) -> SamplingConfig:
    """Config that draws one kind, or the default mixture."""
    if kind is None:
        return SamplingConfig()
    if kind == CAUSAL:
        return SamplingConfig(objective="causal")
    return SamplingConfig(
        gmask_share=float(kind == GMASK), mask_share=float(kind != GMASK), sentence_share=float(kind == SMASK)
    )


def check(dataset: Dataset, kind: int, samples: int, slots: int = 256) -> tuple[str, ...]:
    """Draw samples of one kind, check each, and compare their targets with the expectation."""
    sampler = Sampler(dataset, only(kind), slots, seed=11)
    tokenizer = dataset.tokenizer
    counts = np.empty(samples)
    hidden = text = 0
    for index in range(samples):
        sample = sampler.sample(index)
        address = sampler.address(index)
        row = address.stream.read_row(address.row)
        target = sample.loss_weight > 0
        counts[index] = target.sum()
        ends = (sample.targets == tokenizer.eop) & target
        starts = (sample.tokens == tokenizer.sop) & target
        context = sample.tokens[~target]
        marks = np.isin(context, (tokenizer.mask, tokenizer.smask, tokenizer.gmask))
        # What is in context and targets together is the row's beginning, token for token.
        found = np.sort(np.concatenate([context[~marks], sample.targets[target & ~ends]]))
        assert np.array_equal(found, np.sort(row[: len(found)])), f"sample {index} lost or invented a token"
        assert len(found) + marks.sum() + starts.sum() == slots + (kind == GMASK) * 1, f"sample {index} is not full"
        assert starts.sum() == marks.sum(), f"sample {index} has a blank that is not filled"
        assert kind == GMASK or ends.sum() == starts.sum(), f"sample {index} has a span cut short"
        hidden += int((target & ~ends).sum())
        text += len(found)
    expected = sampler.expected_targets_by_kind[KINDS[kind]]
    error = counts.mean() / expected - 1
    sigma = counts.std() / math.sqrt(samples) / expected
    if kind != SMASK:
        assert abs(error) < max(0.01, 4 * sigma), f"{KINDS[kind]}: {counts.mean()} targets, expected {expected}"
    return (
        KINDS[kind],
        f"{counts.mean():.3f}",
        f"{expected:.3f}" if kind != SMASK else "depends on the text",
        f"{error:+.3%} ± {sigma:.3%}" if kind != SMASK else "–",
        f"{hidden / text:.4f}",
    )


def speed(dataset: Dataset, slots: int, kind: int | None, seconds: float = 2.0) -> tuple[str, ...]:
    """Tokens a second of `sample(i)`; the median of five stretches."""
    sampler = Sampler(dataset, only(kind), slots, seed=1)
    rates = []
    index = 0
    for _ in range(5):
        begun, first = time.process_time(), index
        while time.process_time() - begun < seconds / 5:
            sampler.sample(index)
            index += 1
        rates.append((index - first) * slots / (time.process_time() - begun))
    return str(slots), "default mixture" if kind is None else KINDS[kind], f"{np.median(rates) / 1e6:.2f}"


def through_batches(dataset: Dataset, slots: int, seconds: float = 2.0) -> tuple[str, ...]:
    """Tokens a second of whole micro-batches as the trainer gets them (default mixture, batches of 8)."""
    sampler = Sampler(dataset, SamplingConfig(), slots, seed=1)
    rates = []
    index = 0
    for _ in range(5):
        begun, first = time.process_time(), index
        while time.process_time() - begun < seconds / 5:
            batch: Batch = sampler.batch(range(index, index + _BATCH))
            index += batch.size
        rates.append((index - first) * slots / (time.process_time() - begun))
    return str(slots), f"default mixture, micro-batches of {_BATCH}", f"{np.median(rates) / 1e6:.2f}"


def report(
    samples: int, laws: list[tuple[str, ...]], speeds: list[tuple[str, ...]], loaders: list[tuple[str, ...]]
) -> str:
    """The committed page."""
    rows = sorted([*speeds, *loaders], key=lambda row: int(row[0]))
    return f"""# The sampler, measured

`python -m benchmarks.sampler data.path=data/sample` on {processor()} (one core of {os.cpu_count()}),
Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}.

## The laws, on {samples:,} samples of each kind (256 slots)

Each sample was checked: context and targets together are its row's tokens, every blank is filled once, every slot
is used.

| kind | targets a sample | exact expectation | error ± standard error | part of the text hidden |
|---|---|---|---|---|
{table(laws)}

The expectation is enumerated in `data_prep/spans.py` and, independently, in `tests/data_prep/test_data_samples.py`.

## Million tokens a second, one core

Median of five stretches, by processor time (the machine is shared).

| slots | kind | M tokens/s |
|---|---|---|
{table(rows)}
"""


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown rows."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
