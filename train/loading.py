"""The loader of a run: its sampler under the data plan, from a number of consumed samples on."""

from collections.abc import Iterator

from data_prep.batch import Batch
from data_prep.dataset import Dataset
from data_prep.loader import SampleStream, make_loader
from data_prep.order import DataPlan
from data_prep.samples import Sampler
from train.config import Config
from train.mesh import Mesh
from train.schedule import BatchSize
from train.stability.stress import poisoned


def sampler(config: Config, dataset: Dataset, plan: DataPlan | None = None, split: str = "train") -> Sampler:
    """The sampler of a split as the config describes it; raises ConfigError or DataError."""
    return Sampler(
        dataset,
        config.data.sampling,
        config.sequence_length,
        seed=config.seed,
        weighting=config.loss.weighting,
        split=split,
        plan=plan,
    )


def open_loader(config: Config, mesh: Mesh, dataset: Dataset, plan: DataPlan, consumed: int) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches from `consumed` samples on, endless."""
    stream = SampleStream(
        sampler(config, dataset, plan),
        consumed_samples=consumed,
        micro_batch_size=config.micro_batch_size,
        batch_size_at=BatchSize.of(config),
        data_parallel_rank=mesh.data_rank,
        data_parallel_size=mesh.data,
    )
    loader = make_loader(
        stream,
        workers=config.data.workers,
        prefetch_batches=config.data.prefetch_batches,
        pin_memory=mesh.device.type != "cpu",
    )
    for batch in loader:
        yield poisoned(batch, config.stability.stress, config.seed, dataset.tokenizer.pieces)
