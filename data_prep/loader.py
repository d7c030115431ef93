"""The loader: the micro-batches of one data-parallel rank, in an order that workers and ranks cannot change.

Its only state is `consumed_samples`, the cursor of the sample index that the trainer keeps.
"""

import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_prep.batch import Batch
from data_prep.errors import ConfigError
from data_prep.samples import Sampler


class SampleStream(IterableDataset[Batch]):
    """Endless micro-batches of one data-parallel rank.

    The step that starts at cursor c takes the next G = batch_size_at(c) indices that the data plan does not skip; of
    these, micro-batch k of rank r holds number (k·D + r)·m … + m − 1, for D ranks and micro-batches of m.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        batch_size_at: Callable[[int], int],
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        """consumed_samples: cursor to start at. batch_size_at: global batch size of the step that starts at a cursor;
        picklable, and a multiple of micro_batch_size · data_parallel_size. Raises ConfigError otherwise."""
        super().__init__()
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigError(f"data_parallel_rank={data_parallel_rank} is outside 0 … {data_parallel_size - 1}")
        self.sampler = sampler
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.batch_size_at = batch_size_at
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self._micro_batches_at(consumed_samples)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            torch.set_num_threads(1)
        micro_batch = 0
        cursor = self.consumed_samples
        size, ranks = self.micro_batch_size, self.data_parallel_size
        while True:
            micro_batches = self._micro_batches_at(cursor)
            count = micro_batches * size * ranks
            indices = self.sampler.plan.indices(cursor, count)
            for k in range(micro_batches):
                # The DataLoader asks its workers in turn, so worker w builds micro-batches w, w + workers, …
                if micro_batch % workers == number:
                    first = (k * ranks + self.data_parallel_rank) * size
                    yield self.sampler.batch(indices[first : first + size])
                micro_batch += 1
            cursor = int(indices[-1]) + 1

    def _micro_batches_at(self, cursor: int) -> int:
        total = self.batch_size_at(cursor)
        each = self.micro_batch_size * self.data_parallel_size
        if total <= 0 or total % each:
            raise ConfigError(
                f"global_batch_size={total} (at sample {cursor}) is no multiple of micro_batch_size="
                f"{self.micro_batch_size} × {self.data_parallel_size} data-parallel ranks"
            )
        return total // each


def make_loader(
    stream: SampleStream, *, workers: int = 0, prefetch_batches: int = 4, pin_memory: bool = False
) -> DataLoader[Batch]:
    """DataLoader over a stream's micro-batches; the order is the same for any number of workers.

    workers: processes that build samples (`data.workers`); 0 builds them in this process.
    prefetch_batches: micro-batches that each worker keeps ready.
    """
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch_batches if workers else None,
        pin_memory=pin_memory,
        persistent_workers=False,
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(_: int) -> None:
    """Leave SIGTERM and Ctrl-C to the training process: sent to the whole group, they must not end the workers under a
    run that is about to save. Workers end with their parent."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
