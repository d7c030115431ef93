"""The text to evaluate on: a prepared folder, files that are cleaned and tokenised here, or the run's own dataset."""

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from data_prep.config import DataConfig, PrepConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.manifest import FILE
from data_prep.packing import PackPlan
from data_prep.samples import Sampler
from train.checkpoint.model import Trained
from train.one_way import OneWaySampler

SHARES = {"gmask": (1.0, 0.0), "mask": (0.0, 1.0)}
"""gmask_share and mask_share by the kind that is evaluated alone."""


@dataclass
class HeldOutConfig:
    """The text to evaluate on: one of the two, or none for the run's own dataset."""

    path: str | None = None
    """Dataset folder made by data_prep with the checkpoint's tokenizer."""
    sources: list[Any] = field(default_factory=list)
    """Files, globs or entries {path, name, lang, text_field, …} as data_prep takes them; all of it is evaluated."""


def held_out(
    trained: Trained,
    data: HeldOutConfig,
    split: str,
    stack: ExitStack,
    *,
    sequence_length: int | None = None,
    seed: int | None = None,
    kind: str | None = None,
    one_way: bool = False,
) -> tuple[Sampler, dict[str, Any]]:
    """The sampler of the text to evaluate on, and what the output says about where it and the baseline come from.

    stack: what it keeps open lives as long as the sampler is used. sequence_length, seed, kind: null means the run's.
    one_way: contexts of gMASK samples are read from the left only. Raises ConfigError, DataError.
    """
    run = trained.config
    length = sequence_length or run.sequence_length
    if length > run.model.max_positions:
        raise ConfigError(
            f"sequence_length={length} is more than the model.max_positions={run.model.max_positions} "
            f"of checkpoint={trained.folder}"
        )
    origin: dict[str, Any] = {}
    if data.sources:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiankong-evaluate-"))) / "dataset"
        dataset, split = _prepared(folder, data.sources, trained), "test"
        if run.data.sampling.pack_documents:
            PackPlan.write(dataset, length, int(run.data.sampling.starts_with_enc))
        origin |= {"data": [_told(entry) for entry in data.sources], "rejected": _rejected(dataset)}
    else:
        dataset, split = _opened(data.path, trained), split
        origin |= {"data": str(dataset.folder), "split": split}
    dataset.unigram_counts, origin["unigram_source"] = _unigram(dataset, split, trained)
    sampling = run.data.sampling
    if kind is not None:
        gmask_share, mask_share = SHARES[kind]
        sampling = replace(sampling, objective="blank_infilling", gmask_share=gmask_share, mask_share=mask_share)
    try:
        sampler = (OneWaySampler if one_way else Sampler)(
            dataset,
            sampling,
            length,
            seed=run.seed if seed is None else seed,
            weighting=run.loss.weighting,
            split=split,
        )
    except DataError as error:
        if not data.sources:
            raise
        found = dataset.manifest.counts(split).tokens
        raise DataError(
            f"data.sources: {found} tokens in all, and no source fills one row of {length - 1}; "
            "give more text or a smaller sequence_length"
        ) from error
    return sampler, origin | {"left_out": sampler.too_small}


def _prepared(folder: Path, sources: list[Any], trained: Trained) -> Dataset:
    """A temporary dataset of files, all of it in the split `test`."""
    # Here, so that a prepared folder is evaluated without datatrove and its executors.
    from data_prep.prepare import prepare

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
        # Joined where a later stage ended it, still by piece of work where the cleaning left nothing.
        reasons = _reasons(folder, "rejected/*.jsonl.gz") or _reasons(folder, ".work/clean/*/rejected.jsonl.gz")
        if "no document is left" not in str(error) or not reasons:
            raise
        # The message points into a folder that is about to go.
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise DataError(f"data.sources: no document is left after cleaning ({why})") from error
    return Dataset.open(folder)


def _opened(path: str | None, trained: Trained) -> Dataset:
    """The dataset of `data.path`, or the run's; its tokenizer must be the checkpoint's."""
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


def _reasons(folder: Path, pattern: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for path in sorted(folder.glob(pattern)):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found.update(json.loads(line)["reason"] for line in lines)
    return found


def _told(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry.get("path") or entry.get("hub"))
