"""Stage match: pairs of documents that are equal, or much alike; one rank a band of the signatures, one for equality.

A rank merges the sorted hashes of all pieces of work, a range of hashes at a time, so that its memory stays the same
whatever the size. Candidates for likeness are checked by their whole signatures.
"""

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import write_error
from data_prep.signatures import similarity
from data_prep.steps.clean import Step
from data_prep.steps.work import Work, load

DOCUMENTS_AT_ONCE = 8_000_000
"""Documents whose hashes are compared at a time: about 400 MB."""
_PAIRS_AT_ONCE = 200_000
PAIRS = "pairs"
"""Name of a rank's file."""


def ranks_of(work: Work) -> int:
    """One rank for equal documents, one for each band."""
    data = work.config.data
    return int(data.deduplicate) + (data.cleaning.bands if data.cleaning.near_duplicates else 0)


def read_pairs(work: Work, at_once: int, exact: bool = False) -> Iterator[NDArray[np.uint64]]:
    """The pairs of every rank, or of equal documents alone, uint64 [N, 2] of at most `at_once`."""
    ranks = int(work.config.data.deduplicate) if exact else ranks_of(work)
    for rank in range(ranks):
        with open(work.path("match", rank) / PAIRS, "rb") as file:
            while len(numbers := np.fromfile(file, np.uint64, 2 * at_once)):
                yield numbers.reshape(-1, 2)


class Match(Step):
    """Writes `pairs`, uint64 [pairs, 2] without a head: documents as task · 2³² + number, the earlier one first."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Ends the pipeline: yields nothing."""
        exact = rank == 0 and self.work.config.data.deduplicate
        name = "exact" if exact else f"band-{rank - int(self.work.config.data.deduplicate):03d}"
        try:
            with self.work.output("match", rank) as folder, open(folder / PAIRS, "wb") as file:
                for candidates in self._ranges(name):
                    pairs = self._pairs(candidates, exact)
                    file.write(pairs.tobytes())
                    self.stat_update("pairs", value=len(pairs), unit="pair")
        except OSError as error:
            raise write_error(error.filename or self.work.folder, error) from error
        yield from ()

    def _ranges(self, name: str) -> Iterator[NDArray[np.uint64]]:
        """Candidates of each range of hashes: neighbours in a bucket, and each with the bucket's first."""
        paths = [self.work.path("clean", task) / f"{name}.npy" for task in range(len(self.work.tasks))]
        files = [(task, load(path)) for task, path in enumerate(paths) if path.exists()]
        total = sum(len(content) for _, content in files)
        ranges = -(-total // DOCUMENTS_AT_ONCE)
        edges = [number * 2**64 // max(1, ranges) for number in range(ranges)]
        for number, first in enumerate(edges):
            hashes, documents = [], []
            for task, content in files:
                # Not np.searchsorted, which would first copy the whole column.
                begin = bisect_left(content["hash"], np.uint64(first))
                end = len(content)
                if number + 1 < ranges:
                    end = bisect_left(content["hash"], np.uint64(edges[number + 1]))
                hashes.append(content["hash"][begin:end])
                documents.append(content["number"][begin:end].astype(np.uint64) + np.uint64(task << 32))
            yield _candidates(np.concatenate(hashes), np.concatenate(documents))

    def _pairs(self, candidates: NDArray[np.uint64], exact: bool) -> NDArray[np.uint64]:
        """The candidates that are what they look like."""
        kept = []
        for start in range(0, len(candidates), _PAIRS_AT_ONCE):
            pairs = candidates[start : start + _PAIRS_AT_ONCE]
            first, second = (self._gather(pairs[:, side], exact) for side in (0, 1))
            if exact:
                kept.append(pairs[(first == second)])
            else:
                kept.append(pairs[similarity(first, second) >= self.work.config.data.cleaning.similarity])
        return np.concatenate([np.zeros((0, 2), np.uint64), *kept])

    def _gather(self, documents: NDArray[np.uint64], exact: bool) -> Any:
        """Low halves of the keys, or signatures, of documents anywhere."""
        tasks, numbers = documents >> np.uint64(32), (documents & np.uint64(0xFFFFFFFF)).astype(np.int64)
        cleaning = self.work.config.data.cleaning
        shape: Any = len(documents) if exact else (len(documents), cleaning.bands * cleaning.rows)
        result = np.empty(shape, dtype=np.uint64 if exact else np.uint8)
        for task in np.unique(tasks).tolist():
            mine = tasks == task
            content = self.work.documents(task) if exact else load(self.work.path("clean", task) / "signatures.npy")
            result[mine] = content["low"][numbers[mine]] if exact else content[numbers[mine]]
        return result


def _candidates(hashes: NDArray[np.uint64], documents: NDArray[np.uint64]) -> NDArray[np.uint64]:
    order = np.lexsort((documents, hashes))
    hashes, documents = hashes[order], documents[order]
    same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    first = starts[np.searchsorted(starts, same, side="right") - 1]
    pairs = [np.stack([documents[same - 1], documents[same]], axis=1), np.stack([documents[first], documents[same]], 1)]
    return np.unique(np.concatenate(pairs), axis=0)
