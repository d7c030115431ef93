"""Stage decide: of each group of equal or like documents the first stays; sources end at their caps."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import write_error
from data_prep.steps.clean import Step
from data_prep.steps.keys import GrowingArray
from data_prep.steps.match import read_pairs
from data_prep.steps.work import DROP, DROP_REASONS

AT_ONCE = 4_000_000
"""Pairs or documents that are held in memory: about 400 MB."""


class Decide(Step):
    """Writes the `DROP` records of each piece of work.

    Its memory is the same whatever the size: pairs pass by `AT_ONCE` at a time, and what is known of a document, 9
    bytes, lies in files that the system keeps in memory as far as there is room.
    """

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Ends the pipeline: yields nothing."""
        try:
            with self.work.output("decide", 0) as folder:
                self._write(folder)
        except OSError as error:
            raise write_error(error.filename or self.work.folder, error) from error
        yield from ()

    def _write(self, folder: Path) -> None:
        work = self.work
        starts = np.cumsum([0, *(len(work.documents(task)) for task in range(len(work.tasks)))])
        documents = range(0, int(starts[-1]), AT_ONCE)
        first = _stored(folder / "first", np.int64, (np.arange(n, min(n + AT_ONCE, starts[-1])) for n in documents))
        equal = _stored(folder / "equal", np.bool_, (np.zeros(min(AT_ONCE, starts[-1] - n), bool) for n in documents))
        group(first, lambda: (_numbered(pairs, starts) for pairs in read_pairs(work, AT_ONCE)))
        for pairs in read_pairs(work, AT_ONCE, exact=True):
            equal[_numbered(pairs[:, 1], starts)] = True
        taken: Counter[str] = Counter()
        for task, source in enumerate(work.tasks):
            with closing(GrowingArray(folder / f"{task:05d}.npy", DROP)) as file:
                for start in range(starts[task], starts[task + 1], AT_ONCE):
                    mine = np.arange(start, min(start + AT_ONCE, starts[task + 1]))
                    later = np.flatnonzero(first[mine] != mine)
                    earlier = first[mine[later]]
                    drops = np.zeros(len(later), dtype=DROP)
                    drops["number"] = mine[later] - starts[task]
                    drops["reason"] = np.where(equal[mine[later]], 0, 1)
                    drops["task"] = np.searchsorted(starts, earlier, side="right") - 1
                    drops["first"] = earlier - starts[drops["task"]]
                    left = np.delete(mine, later) - starts[task]
                    if source.cap is not None:
                        over = left[max(0, source.cap - taken[source.name]) :]
                        capped = np.zeros(len(over), dtype=DROP)
                        capped["number"], capped["reason"] = over, DROP_REASONS.index("over_cap")
                        drops = np.sort(np.concatenate([drops, capped]), order="number")
                        left = left[: len(left) - len(over)]
                    taken[source.name] += len(left)
                    file.add(drops)
        for name in ("first", "equal"):
            (folder / name).unlink()


def group(first: NDArray[np.int64], pairs: Callable[[], Iterable[NDArray[np.int64]]]) -> None:
    """Make `first[d]`, which is d at the start, the first document of the group in which d is, for all documents.

    pairs: gives all pairs at each call, int64 [N, 2] at a time. Each document takes the smallest label of its pairs,
    and so does the document whose number its label was; then every label its own label (pointer jumping), so that long
    chains need few rounds. It ends when no pair has two labels.
    """
    changed = True
    while changed:
        changed = False
        for some in pairs():
            left, right = some.T
            ours, theirs = first[left], first[right]
            if (ours != theirs).any():
                changed = True
                lower = np.minimum(ours, theirs)
                for places in (left, right, ours, theirs):
                    np.minimum.at(first, places, lower)
        for start in range(0, len(first), AT_ONCE):
            part = first[start : start + AT_ONCE]
            part[:] = first[part]


def _numbered(documents: NDArray[np.uint64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """task · 2³² + number as one number over all pieces of work."""
    return starts[documents >> np.uint64(32)] + (documents & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _stored(path: Path, dtype: type[np.generic], parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """An array in a file, written through: a map of a file with holes would end in SIGBUS on a full disk."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part.astype(dtype).tobytes())
    if not path.stat().st_size:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype, "r+").view(np.ndarray)
