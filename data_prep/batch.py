"""What data_prep hands to the trainer: a batch of samples, and the names of its groups.

Shapes: B sequences of S slots. Under every objective query q attends to one contiguous range of keys,
[attend_from[q], attend_to[q]), so two vectors stand for the S×S mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

KINDS = ("gmask", "mask", "smask", "causal", "instruction")
"""Names of a sample's kind by number; at most 8."""
GMASK, MASK, SMASK, CAUSAL, INSTRUCTION = range(5)
LANGUAGES = ("other", "zh", "en", "zh_hant", "code")
"""Languages that losses are split by, by number; at most 8, any other language counts as `other`."""
NUM_GROUPS = 64


def group_of(kind: int, lang: str) -> int:
    """Number of the (kind, language) group: kind · 8 + language."""
    return kind * 8 + (LANGUAGES.index(lang) if lang in LANGUAGES else 0)


def group_kind(group: int) -> str:
    """Kind's name of a group."""
    return KINDS[group // 8]


def group_language(group: int) -> str:
    """Language of a group."""
    return LANGUAGES[group % 8]


def group_name(group: int) -> str:
    """A group's name as metrics show it, such as `gmask/zh`."""
    return f"{group_kind(group)}/{group_language(group)}"


def all_groups() -> list[int]:
    """Numbers of the groups that have a name."""
    return [kind * 8 + language for kind in range(len(KINDS)) for language in range(len(LANGUAGES))]


class Sample(NamedTuple):
    """One sequence in numpy, as `Batch` holds it without the first dimension."""

    tokens: NDArray[np.int64]  # [S]
    targets: NDArray[np.int64]  # [S]
    loss_weight: NDArray[np.float32]  # [S]
    positions: NDArray[np.int32]  # [2, S]
    attend_from: NDArray[np.int32]  # [S]
    attend_to: NDArray[np.int32]  # [S]
    group: int
    sample_index: int


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass. A target counts where loss_weight > 0; elsewhere it is 0."""

    tokens: Tensor
    """int64 [B, S]"""
    targets: Tensor
    """int64 [B, S]"""
    loss_weight: Tensor
    """float32 [B, S]"""
    positions: Tensor
    """int32 [B, 2, S]; the second row is zero for 1D positions"""
    attend_from: Tensor
    """int32 [B, S], first key that the query sees"""
    attend_to: Tensor
    """int32 [B, S], one past the last key; padding sees itself"""
    group: Tensor
    """uint8 [B], kind · 8 + language"""
    sample_index: Tensor
    """int64 [B], the global index each sample was made from"""

    @staticmethod
    def from_samples(samples: Sequence[Sample]) -> "Batch":
        """Stack samples of equal length."""
        return Batch(
            tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
            targets=torch.from_numpy(np.stack([sample.targets for sample in samples])),
            loss_weight=torch.from_numpy(np.stack([sample.loss_weight for sample in samples])),
            positions=torch.from_numpy(np.stack([sample.positions for sample in samples])),
            attend_from=torch.from_numpy(np.stack([sample.attend_from for sample in samples])),
            attend_to=torch.from_numpy(np.stack([sample.attend_to for sample in samples])),
            group=torch.tensor([sample.group for sample in samples], dtype=torch.uint8),
            sample_index=torch.tensor([sample.sample_index for sample in samples], dtype=torch.int64),
        )

    @property
    def size(self) -> int:
        """Sequences in the batch."""
        return self.tokens.shape[0]

    @property
    def sequence_length(self) -> int:
        """Slots a sequence."""
        return self.tokens.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on a device."""
        return Batch(**{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._items()})

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's DataLoader calls it."""
        return Batch(**{name: tensor.pin_memory() for name, tensor in self._items()})

    def select(self, index: Tensor | slice) -> "Batch":
        """The sequences that `index` picks, in its order."""
        return Batch(**{name: tensor[index] for name, tensor in self._items()})

    def meta(self) -> Tensor:
        """int64 [B, 4, S]: both position rows, attend_from, attend_to, as pipeline stages pass it on."""
        parts = self.positions, self.attend_from[:, None], self.attend_to[:, None]
        # By NumPy, which wakes no threads (`train.labels`).
        return torch.from_numpy(np.concatenate([part.numpy() for part in parts], axis=1, dtype=np.int64))

    def repetition(self) -> float:
        """log(slots / different pieces), the mean over the sequences, nats: 0 where no piece comes twice."""
        rows = np.sort(self.tokens.numpy().astype(np.int32), axis=1)
        different = 1 + (rows[:, 1:] != rows[:, :-1]).sum(1)
        return float(np.log(rows.shape[1] / different).mean())

    def hash(self) -> int:
        """Hash of all fields in 0 … 2⁶³−1, equal wherever the batch is equal. Copies from a device."""
        digest = xxhash.xxh3_64()
        for name, tensor in self._items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return int(digest.intdigest() >> 1)

    def _items(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]
