"""Cut a pipeline's stages by what their parts cost on this device.

    python -m train.balance model=1b data.path=data/mine precision=bf16 parallel.pipeline_parallel=4 micro_batch_size=4

takes the keys of `python -m train`, times the embedding, one layer and the head (forward and backward, one real
micro-batch) in one process, and prints the `parallel.layers_per_stage=[…]` whose slowest stage is fastest, beside what
cutting by slots would give. Tensor parallelism divides all three parts alike, so they are timed whole.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from data_prep.order import DataPlan
from train import backend, rules
from train.arithmetic import layers_per_stage
from train.cli import run_train
from train.config import Config
from train.labels import Labels, inputs
from train.loading import open_loader
from train.mesh import Mesh
from train.model.build import DTYPES, Model

WARM_UP, TIMED = 3, 10
"""Passes that compile and allocate, and those whose median counts."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a forward and a backward pass."""

    embedding: float
    layer: float
    head: float

    def of_stages(self, cut: Sequence[int]) -> list[float]:
        """Each stage's, with so many layers."""
        seconds = [count * self.layer for count in cut]
        seconds[0] += self.embedding
        seconds[-1] += self.head
        return seconds


def balance(costs: Costs, num_layers: int, stages: int) -> list[int]:
    """Layers of each stage, one or more, so that the slowest stage is as fast as can be.

    Each layer goes where the stage is fastest with it, of equals to the earliest: since layers cost the same, no other
    order does better.
    """
    cut = [1] * stages
    for _ in range(num_layers - stages):
        after = [seconds + costs.layer for seconds in costs.of_stages(cut)]
        cut[after.index(min(after))] += 1
    return cut


def measure(config: Config, dataset: Dataset) -> Costs:
    """Time the three parts on this device, on the first micro-batch of the data."""
    # One layer stands for all of them, and nothing is divided.
    config.model.num_layers = 1
    config.parallel.one_stage(tensor_parallel=1)
    mesh = Mesh.single(backend.device())
    dtype = DTYPES[config.precision.dtype]
    model = Model(config, mesh, dtype).to(dtype)  # parameters are made in fp32
    batch = next(open_loader(config, mesh, dataset, DataPlan(), 0))
    state = tuple(tensor.to(mesh.device) for tensor in inputs(batch))
    labels = Labels.of(batch).to(mesh.device)
    embedding, layer, head = model.items
    hidden, meta, sample_index = (tensor.detach() for tensor in embedding(*state))

    def through(item: Any) -> None:
        into = hidden.detach().requires_grad_()
        item(into, meta, sample_index)[0].backward(hidden)

    def ends(item: Any) -> None:
        item(hidden.detach().requires_grad_(), meta, sample_index, labels)[0].backward()

    return Costs(
        embedding=_seconds(lambda: embedding(*state)[0].backward(hidden)),
        layer=_seconds(lambda: through(layer)),
        head=_seconds(lambda: ends(head)),
    )


def main(config: Config) -> int:
    """Measure, and print the cut. Raises ConfigError, DataError."""
    layers, stages = config.model.num_layers, config.parallel.pipeline_parallel
    if stages == 1:
        raise ConfigError("parallel.pipeline_parallel=1 has no stages to balance; give 2 or more")
    config.parallel.layers_per_stage = []
    rules.check(config)
    backend.check_precision(config.precision)
    costs = measure(config, Dataset.open(config.data.path))
    slots = f"{config.micro_batch_size} x {config.sequence_length} slots on {backend.device_name()}"
    parts = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in vars(costs).items())
    print(f"forward and backward of {slots}: {parts}")
    for name, cut in (("by slots", layers_per_stage(layers, stages)), ("measured", balance(costs, layers, stages))):
        seconds = costs.of_stages(cut)
        slowest = f"slowest stage {1e3 * max(seconds):.2f} ms, {max(seconds) * stages / sum(seconds):.3f} x the mean"
        print(f"{name}: parallel.layers_per_stage=[{','.join(map(str, cut))}]  {slowest}")
    return 0


def _seconds(work: Callable[[], object]) -> float:
    """Median wall time of one call, device included."""
    seconds = []
    for _ in range(WARM_UP + TIMED):
        backend.synchronize()
        begun = time.perf_counter()
        work()
        backend.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    sys.exit(run_train(main))
