"""What the last stage needs of a batch: its target rows, picked out on the host so that the device never waits."""

from dataclasses import dataclass

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
        rows = (batch.loss_weight.flatten() > 0).nonzero().squeeze(1)
        return Labels(
            rows=rows,
            targets=batch.targets.flatten()[rows],
            loss_weight=batch.loss_weight.flatten()[rows] / sequences,
            groups=batch.group.repeat_interleave(slots)[rows],
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
