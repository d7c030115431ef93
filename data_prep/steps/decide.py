"""Stage decide: of each group of equal or like documents the first stays; sources end at their caps."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.steps.clean import Step
from data_prep.steps.match import ranks_of
from data_prep.steps.work import DROP, DROP_REASONS


class Decide(Step):
    """Writes the `DROP` records of each piece of work. Memory: about 50 bytes a pair."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Ends the pipeline: yields nothing."""
        work = self.work
        ranks = ranks_of(work)
        found = [np.load(work.path("match", number) / "pairs.npy") for number in range(ranks)]
        exact = found[0] if work.config.data.deduplicate else np.zeros((0, 2), np.uint64)
        pairs = np.concatenate([np.zeros((0, 2), np.uint64), *found])
        documents, first = groups(pairs)
        later = documents != first
        documents, first = documents[later], first[later]
        reasons = np.where(np.isin(documents, exact[:, 1]), 0, 1)
        taken: Counter[str] = Counter()
        with work.output("decide", 0) as folder:
            for task, source in enumerate(work.tasks):
                begin, end = np.searchsorted(documents, [np.uint64(task << 32), np.uint64(task + 1 << 32)])
                drops = np.zeros(end - begin, dtype=DROP)
                drops["number"] = documents[begin:end] & np.uint64(0xFFFFFFFF)
                drops["reason"] = reasons[begin:end]
                drops["task"] = first[begin:end] >> np.uint64(32)
                drops["first"] = first[begin:end] & np.uint64(0xFFFFFFFF)
                left = np.setdiff1d(np.arange(len(work.documents(task))), drops["number"])
                if source.cap is not None:
                    over = left[max(0, source.cap - taken[source.name]) :]
                    capped = np.zeros(len(over), dtype=DROP)
                    capped["number"], capped["reason"] = over, DROP_REASONS.index("over_cap")
                    drops = np.sort(np.concatenate([drops, capped]), order="number")
                    left = left[: len(left) - len(over)]
                taken[source.name] += len(left)
                np.save(folder / f"{task:05d}.npy", drops)
        yield from ()


def groups(pairs: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Documents that stand in a pair, sorted, and the first document of the group of each; uint64 [N] both.

    Each document takes the smallest label among its neighbours' until none changes, with every label's own label taken
    in between (pointer jumping), so that long chains need few rounds.
    """
    documents, index = np.unique(pairs, return_inverse=True)
    left, right = index.reshape(-1, 2).T
    label = np.arange(len(documents))
    while True:
        before = label.copy()
        np.minimum.at(label, right, label[left])
        np.minimum.at(label, left, label[right])
        label = label[label]
        if (label == before).all():
            return documents, documents[label]
