"""`python -m train.evaluate checkpoint=RUN data.sources='[held_out.jsonl.gz]' output=eval.json`: loss on held-out text.

One process, one device, weights only. The text comes from a prepared folder (`data.path`, one of its held-out splits),
from files that are cleaned and tokenised here with the checkpoint's own tokenizer (`data.sources`), or, where neither
is given, from the dataset that the run was trained on.

The loss is the mean over all targets, in nats. Beside it stands what a unigram model pays for the same targets; its
counts come from the run's training data, and `unigram_source` in the output says where they were taken from instead
when that is out of reach.
"""

import gzip
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import MISSING
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep import cli
from data_prep.batch import NUM_GROUPS
from data_prep.config import DataConfig, PrepConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.files import write_json
from data_prep.manifest import FILE
from data_prep.prepare import prepare
from data_prep.samples import Sampler
from train import backend
from train.checkpoint.model import Trained, load_trained
from train.checkpoint.select import read_manifest
from train.labels import Labels, inputs
from train.scores import Baseline, summary

SPLITS = ("valid", "test")


@dataclass
class HeldOutConfig:
    """The text to evaluate on: one of the two, or none for the run's own dataset."""

    path: str | None = None
    """Dataset folder made by data_prep with the checkpoint's tokenizer."""
    sources: list[Any] = field(default_factory=list)
    """Files, globs or entries {path, name, lang, text_field, …} as data_prep takes them; all of it is evaluated."""


@dataclass
class EvaluateConfig:
    """One evaluation."""

    checkpoint: str = MISSING
    """Run folder (its newest whole checkpoint) or one step's folder."""
    data: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What to evaluate on."""
    split: str = "valid"
    """valid or test; data.sources are all one split."""
    samples: int | None = None
    """Samples to evaluate; null means every row once."""
    micro_batch_size: int = 8
    """Sequences in one forward pass."""
    sequence_length: int | None = None
    """Slots of a sample; null means the run's."""
    seed: int | None = None
    """Seed of the order and the masks; null means the run's, with which the same samples are seen as while training."""
    output: str | None = None
    """JSON file for the result; null prints it only."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"split={self.split} must be one of {', '.join(SPLITS)}")
        if self.data.path is not None and self.data.sources:
            raise ConfigError(f"data.path={self.data.path} and data.sources are both given; give one of them")
        for name in ("samples", "micro_batch_size", "sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


def main(config: EvaluateConfig) -> int:
    """Evaluate, print the table, write `output`. Raises ConfigError, DataError."""
    trained = load_trained(config.checkpoint, backend.device())
    with ExitStack() as stack:
        sampler, origin = _held_out(config, trained, stack)
        record = evaluate(trained, sampler, config.samples or sampler.rows, config.micro_batch_size)
    record |= {
        "checkpoint": str(trained.folder),
        "step": read_manifest(trained.folder)["step"],
        "seed": sampler.seed,
        "samples": config.samples or sampler.rows,
        "sequence_length": sampler.sequence_length,
        **origin,
    }
    if config.output is not None:
        write_json(config.output, record)
    console = Console()
    console.print(_table(record))
    console.print(_notes(record, config.output), soft_wrap=True, markup=False, highlight=False)
    return 0


def evaluate(trained: Trained, sampler: Sampler, samples: int, micro_batch_size: int) -> dict[str, Any]:
    """Scores of the first `samples` samples: what `train.scores.summary` returns."""
    device = trained.model.context.mesh.device
    head = trained.model.head
    assert head is not None
    sums = torch.zeros(NUM_GROUPS, 2, dtype=torch.float64, device=device)
    baseline = Baseline(sampler)
    for first in track(_starts(samples, micro_batch_size), description="evaluate", transient=True, disable=_piped()):
        batch = sampler.batch(range(first, min(samples, first + micro_batch_size)))
        baseline.add(batch)
        with torch.no_grad():
            hidden = trained.model(tuple(tensor.to(device) for tensor in inputs(batch)))
            sums += head.loss(hidden, Labels.of(batch).to(device))[2]
    return summary(sums.tolist(), baseline)


def _starts(samples: int, size: int) -> list[int]:
    return list(range(0, samples, size))


def _piped() -> bool:
    return not sys.stdout.isatty()


def _held_out(config: EvaluateConfig, trained: Trained, stack: ExitStack) -> tuple[Sampler, dict[str, Any]]:
    """The sampler of the text to evaluate on, and what the output says about where it and the baseline come from."""
    run = trained.config
    length = config.sequence_length or run.sequence_length
    if length > run.model.max_positions:
        raise ConfigError(
            f"sequence_length={length} is more than the model.max_positions={run.model.max_positions} "
            f"of checkpoint={config.checkpoint}"
        )
    origin: dict[str, Any] = {}
    if config.data.sources:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiankong-evaluate-"))) / "dataset"
        dataset, split = _prepared(folder, config.data.sources, trained), "test"
        origin |= {"data": [_told(entry) for entry in config.data.sources], "rejected": _rejected(dataset)}
    else:
        dataset, split = _opened(config, trained), config.split
        origin |= {"data": str(dataset.folder), "split": split}
    dataset.unigram_counts, origin["unigram_source"] = _unigram(dataset, split, trained)
    try:
        sampler = Sampler(
            dataset,
            run.data.sampling,
            length,
            seed=run.seed if config.seed is None else config.seed,
            weighting=run.loss.weighting,
            split=split,
        )
    except DataError as error:
        if not config.data.sources:
            raise
        found = dataset.manifest.counts(split).tokens
        raise DataError(
            f"data.sources: {found} tokens in all, and no source fills one row of {length - 1}; "
            "give more text or a smaller sequence_length"
        ) from error
    return sampler, origin | {"left_out": sampler.too_small}


def _prepared(folder: Path, sources: list[Any], trained: Trained) -> Dataset:
    """A temporary dataset of files, all of it in the split `test`."""
    data = trained.config.data
    settings = DataConfig(
        path=str(folder),
        sources=sources,
        text_field=data.text_field,
        lang_field=data.lang_field,
        id_field=data.id_field,
        text_documents=data.text_documents,
        min_characters=data.min_characters,
        max_characters=data.max_characters,
        split_shares=[0.0, 0.0, 1.0],
    )
    settled = PrepConfig(data=settings, tokenizer=TokenizerConfig(path=str(trained.folder / "tokenizer")))
    try:
        # The spinner shows on a terminal only.
        with Console().status("clean and tokenise"):
            prepare(settled)
    except DataError as error:
        reasons = _reasons(folder / "rejected")
        if "no document is left" not in str(error) or not reasons:
            raise
        # The message points into a folder that is about to go.
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise DataError(f"data.sources: no document is left after cleaning ({why})") from error
    return Dataset.open(folder)


def _opened(config: EvaluateConfig, trained: Trained) -> Dataset:
    """The dataset of `data.path`, or the run's; its tokenizer must be the checkpoint's."""
    path = config.data.path
    if path is None:
        path = trained.config.data.path
        if not (Path(path) / FILE).is_file():
            raise ConfigError(
                f"the run's dataset {path} is not there; give data.path=DIR or data.sources='[held_out.jsonl.gz]'"
            )
    dataset = Dataset.open(path)
    if dataset.tokenizer.sha256 != trained.tokenizer.sha256:
        raise DataError(
            f"{dataset.folder / 'tokenizer'} is not the tokenizer of {trained.folder}; prepare the data with "
            f"tokenizer.path={trained.folder / 'tokenizer'}, or give the text itself as data.sources"
        )
    return dataset


def _unigram(dataset: Dataset, split: str, trained: Trained) -> tuple[NDArray[np.int64], str]:
    """Token counts of the unigram baseline, int64 [vocab], and where they come from."""
    training = Path(trained.config.data.path)
    try:
        known = Dataset.open(training)
        if known.tokenizer.sha256 == trained.tokenizer.sha256 and known.unigram_counts.any():
            return known.unigram_counts, f"training data of the run ({training})"
    except DataError:
        pass
    if dataset.unigram_counts.any():
        return dataset.unigram_counts, f"train split of {dataset.folder}: the run's own {training} is not there"
    counts = np.zeros(dataset.tokenizer.vocab_size, dtype=np.int64)
    for tokens in _documents(dataset, split):
        counts += np.bincount(tokens, minlength=len(counts))
    return counts, f"the evaluated text itself (the best any unigram model could do): {training} is not there"


def _documents(dataset: Dataset, split: str) -> Iterator[NDArray[np.int64]]:
    """All tokens of a split, a few at a time."""
    for stream in dataset.streams(split, 2):
        for shard in stream.shards:
            for start in range(0, shard.tokens, 1 << 20):
                yield shard.read(start, min(1 << 20, shard.tokens - start))


def _rejected(dataset: Dataset) -> dict[str, int]:
    total: Counter[str] = Counter()
    for reasons in dataset.manifest.rejected.values():
        total.update(reasons)
    return dict(sorted(total.items()))


def _reasons(folder: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found.update(json.loads(line)["reason"] for line in lines)
    return found


def _told(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry.get("path") or entry.get("hub"))


def _table(record: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for name in ("loss", "unigram", "perplexity", "bits/byte", "targets"):
        table.add_column(name, justify="right")
    rows = {"all": record, **record["by_language"], **record["by_kind"]}
    for name, row in rows.items():
        bits = row["bits_per_byte"]
        table.add_row(
            name,
            f"{row['loss']:.4f}",
            f"{row['unigram_loss']:.4f}",
            f"{row['perplexity']:,.2f}",
            "–" if bits is None else f"{bits:.4f}",
            f"{row['targets']:,}",
        )
    return table


def _notes(record: dict[str, Any], output: str | None) -> str:
    notes = [f"step {record['step']}, {record['samples']:,} samples of {record['sequence_length']} slots"]
    notes.append(f"unigram counts: {record['unigram_source']}")
    if record.get("rejected"):
        notes.append("kept out: " + ", ".join(f"{count} {reason}" for reason, count in record["rejected"].items()))
    if record["left_out"]:
        notes.append(f"less than one row, left out: {', '.join(record['left_out'])}")
    if output is not None:
        notes.append(f"written to {output}")
    return "\n".join(notes)


if __name__ == "__main__":
    sys.exit(cli.run("evaluate", EvaluateConfig, main, program="train.evaluate"))
