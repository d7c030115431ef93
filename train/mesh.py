"""Where this rank stands among data-, tensor- and pipeline-parallel ranks, and the groups it talks to.

Made once at start-up (`train.backend.make_mesh`) and passed down; there are no module-level process groups. Ranks are
laid out with the tensor axis innermost (neighbours share a node), then data, then pipeline, as DeepSpeed's
PipeModelDataParallelTopology does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mesh:
    """Sizes, this rank's coordinates and its process groups.

    A group is None where its size is 1. grid: the backend's own view of the same layout (None in one process).
    """

    device: torch.device
    rank: int = 0
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    data_rank: int = 0
    tensor_rank: int = 0
    stage: int = 0
    data_group: Any = None
    tensor_group: Any = None
    pipeline_group: Any = None
    embedding_group: Any = None
    """First and last stage of this pipeline, where the tied embedding lives twice; None with one stage."""
    host_group: Any = None
    """All ranks, over a backend that moves host memory; None is the default group."""
    grid: Any = None

    @staticmethod
    def single(device: torch.device | str = "cpu") -> "Mesh":
        """One process without process groups."""
        return Mesh(device=torch.device(device))

    @property
    def world(self) -> int:
        """All ranks."""
        return self.data * self.tensor * self.pipeline

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.stage == self.pipeline - 1

    def describe(self) -> dict[str, int]:
        """The layout as a checkpoint records it."""
        return {"data_parallel": self.data, "tensor_parallel": self.tensor, "pipeline_parallel": self.pipeline}

    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        return self.rank if self.pipeline == 1 else int(self.grid.stage_to_global(self.pipeline - 1))

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """In-place sum over the data-parallel ranks."""
        if self.data_group is not None:
            torch.distributed.all_reduce(tensor, group=self.data_group)
        return tensor

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """In-place broadcast of the last stage's value over this pipeline."""
        if self.pipeline_group is not None:
            torch.distributed.broadcast(tensor, src=self.last_stage_rank(), group=self.pipeline_group)
        return tensor
