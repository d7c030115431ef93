"""Losses by group, kind and language, from sums that the device kept; beside them the unigram baseline's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data_prep.batch import NUM_GROUPS, Batch, all_groups, group_kind, group_language, group_name
from data_prep.samples import Sampler

Sums = Sequence[Sequence[float]]
"""[NUM_GROUPS][2]: summed cross entropy in nats, and targets."""


def loss_by_group(sums: Sums) -> dict[str, float]:
    """Mean nats a target of each group that has any, such as `gmask/zh`."""
    return {group_name(g): sums[g][0] / sums[g][1] for g in all_groups() if sums[g][1]}


def targets_by_group(sums: Sums) -> dict[str, int]:
    """Targets of each group that has any: the weights that a mean over groups needs."""
    return {group_name(g): round(sums[g][1]) for g in all_groups() if sums[g][1]}


def targets(sums: Sums) -> int:
    """All targets."""
    return round(sum(row[1] for row in sums))


class Baseline:
    """What a unigram model pays on a fixed set of batches, and how many bytes of text their targets stand for."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._bytes = torch.from_numpy(sampler.dataset.tokenizer.token_bytes).double()
        self.nats = [0.0] * NUM_GROUPS
        self.bytes = [0.0] * NUM_GROUPS

    def add(self, batch: Batch) -> None:
        """Count a batch's targets."""
        counted = (batch.loss_weight > 0).double()
        nats = (self._sampler.unigram_loss(batch).double() * counted).sum(1).tolist()
        amount = (self._bytes[batch.targets] * counted).sum(1).tolist()
        for group, nat, size in zip(batch.group.tolist(), nats, amount, strict=True):
            self.nats[group] += nat
            self.bytes[group] += size

    def merge(self, other: "Baseline") -> None:
        """Add another's counts."""
        self.nats = [mine + theirs for mine, theirs in zip(self.nats, other.nats, strict=True)]
        self.bytes = [mine + theirs for mine, theirs in zip(self.bytes, other.bytes, strict=True)]


def total(sums: Sums, baseline: Baseline) -> dict[str, Any]:
    """loss, perplexity, bits_per_byte, targets and unigram_loss over all groups."""
    return _part(sums, baseline, lambda _: True)


def summary(sums: Sums, baseline: Baseline) -> dict[str, Any]:
    """`total`, and by_language, by_kind and by_group, of one evaluation."""
    record = total(sums, baseline)
    groups = [g for g in all_groups() if sums[g][1]]
    names: dict[str, Callable[[int], str]] = {"language": group_language, "kind": group_kind, "group": group_name}
    for label, name in names.items():
        keys = sorted({name(g) for g in groups})
        record[f"by_{label}"] = {
            key: _part(sums, baseline, lambda g, key=key, name=name: name(g) == key)  # type: ignore[misc]
            for key in keys
        }
    return record


def _part(sums: Sums, baseline: Baseline, wanted: Callable[[int], bool]) -> dict[str, Any]:
    groups = [g for g in all_groups() if wanted(g)]
    count = sum(sums[g][1] for g in groups)
    if not count:
        return {"loss": None, "perplexity": None, "bits_per_byte": None, "targets": 0, "unigram_loss": None}
    nats = sum(sums[g][0] for g in groups)
    size = sum(baseline.bytes[g] for g in groups)
    loss = nats / count
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2.0) / size if size else None,
        "targets": round(count),
        "unigram_loss": sum(baseline.nats[g] for g in groups) / count,
    }
