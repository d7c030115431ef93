"""What the last stage needs of a batch: its target rows, picked out on the host so that the device never waits.

By NumPy: PyTorch may wake a thread a core for such small operations, and where a container has fewer cores than it sees
they wait for one another: a host of two H200s took 30 to 50 ms a micro-batch, one thread of it takes 0.2.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.batch import Batch


@dataclass(frozen=True)
class Labels:
    """Targets of one micro-batch; T rows with loss_weight > 0 of its B*S.

    rows: int64 [T], index into the flattened [B*S]. targets: int64 [T]. loss_weight: float32 [T], already divided by
    the micro-batch's sequences, so that the mean over micro-batches and ranks is the step's loss. groups: uint8 [T].
    """

    rows: Tensor
    targets: Tensor
    loss_weight: Tensor
    groups: Tensor

    @staticmethod
    def of(batch: Batch) -> "Labels":
        """The labels of a batch on the host."""
        sequences, slots = batch.targets.shape
        weights = batch.loss_weight.flatten().numpy()
        rows = np.flatnonzero(weights > 0)
        return Labels(
            rows=torch.from_numpy(rows),
            targets=torch.from_numpy(batch.targets.flatten().numpy()[rows]),
            loss_weight=torch.from_numpy(weights[rows] / np.float32(sequences)),
            groups=torch.from_numpy(batch.group.numpy().repeat(slots)[rows]),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields in order, as a pipeline carries them."""
        return self.rows, self.targets, self.loss_weight, self.groups

    def to(self, device: torch.device) -> "Labels":
        """The same on another device; the copy waits for what the device was given before (see `inputs`)."""
        return Labels(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))


def inputs(batch: Batch, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the first stage needs: tokens int64 [B,S], meta int64 [B,4,S], sample_index int64 [B].

    device: where to. Copies from memory that is not pinned stand behind the device's queue and may hold up the host, so
    a step makes all of them before its first pass.
    """
    tokens, meta, sample_index = batch.tokens, batch.meta(), batch.sample_index
    if device is None:
        return tokens, meta, sample_index
    return tuple(tensor.to(device, non_blocking=True) for tensor in (tokens, meta, sample_index))  # type: ignore[return-value]
