"""Parameters that know their place in the full, unsharded model, and their initial values.

Every parameter carries a `Layout`: its canonical name, its full shape and which slices of the full tensor this
tensor-parallel rank holds. Checkpoints, weight initialisation and interchange speak of canonical names and full shapes
only; nothing there depends on the parallel layout of a run.

Initial values are drawn by address, (seed, canonical name, index in the full tensor), so that any shard of any layout
draws the numbers that the whole tensor would.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.random import mix_key, normal_slice


@dataclass(frozen=True)
class Layout:
    """A parameter's place in the full model.

    dim: the dimension that is cut over the tensor-parallel ranks, None where every rank holds all of it.
    blocks: half-open ranges of that dimension which this rank holds, concatenated in this order.
    """

    name: str
    full_shape: tuple[int, ...]
    dim: int | None = None
    blocks: tuple[tuple[int, int], ...] = field(default=())

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's piece."""
        if self.dim is None:
            return self.full_shape
        held = sum(stop - start for start, stop in self.blocks)
        return (*self.full_shape[: self.dim], held, *self.full_shape[self.dim + 1 :])

    def cut(self, full: Tensor) -> Tensor:
        """This rank's piece of the full tensor."""
        if self.dim is None:
            return full
        return torch.cat([full.narrow(self.dim, start, stop - start) for start, stop in self.blocks], self.dim)

    def paste(self, full: Tensor, local: Tensor) -> None:
        """Write this rank's piece into the full tensor, in place."""
        if self.dim is None:
            full.copy_(local)
            return
        offset = 0
        for start, stop in self.blocks:
            full.narrow(self.dim, start, stop - start).copy_(local.narrow(self.dim, offset, stop - start))
            offset += stop - start


def split(name: str, full_shape: tuple[int, ...], dim: int, rank: int, size: int, *, halves: int = 1) -> Layout:
    """The layout of a dimension cut into `size` equal pieces.

    halves: 2 for a gated FFN's [linear; gate], where each rank holds its piece of both halves.
    """
    if size == 1:
        return Layout(name, full_shape)
    half = full_shape[dim] // halves
    piece = half // size
    if piece * size * halves != full_shape[dim]:
        raise ValueError(f"{name}: {full_shape[dim]} rows do not divide into {halves} x {size}")
    blocks = tuple((h * half + rank * piece, h * half + (rank + 1) * piece) for h in range(halves))
    return Layout(name, full_shape, dim, blocks)


def layout_of(parameter: Tensor) -> Layout:
    """The layout that `make_parameter` gave it."""
    layout: Layout = parameter.placement  # type: ignore[attr-defined]
    return layout


def make_parameter(
    layout: Layout, device: torch.device, *, seed: int = 0, std: float | Tensor | None = None, value: float = 0.0
) -> nn.Parameter:
    """An fp32 parameter: constant `value`, or normal with deviation `std` drawn by address.

    std: a number, or a tensor that broadcasts against the local shape (rows with their own gain). On the meta device
    nothing is drawn: a model there tells its layouts only.
    """
    shape = layout.local_shape
    if device.type == "meta":
        data = torch.empty(shape, dtype=torch.float32, device=device)
    elif std is None:
        data = torch.full(shape, value, dtype=torch.float32, device=device)
    else:
        data = _addressed(layout, mix_key(seed, "weight", layout.name), device).mul_(std)
    parameter = nn.Parameter(data)
    parameter.placement = layout  # type: ignore[attr-defined]
    # DeepSpeed counts such parameters' gradients on every tensor-parallel rank, the others' on the first only.
    parameter.tensor_model_parallel = layout.dim is not None  # type: ignore[attr-defined]
    return parameter


def xavier_std(fan_in: int, fan_out: int, gain: float = 1.0) -> float:
    """Glorot and Bengio 2010: gain * sqrt(2 / (fan_in + fan_out)) of the full, unsharded matrix."""
    return gain * math.sqrt(2.0 / (fan_in + fan_out))


def _addressed(layout: Layout, key: int, device: torch.device) -> Tensor:
    rows, columns = layout.full_shape
    if layout.dim == 0:
        pieces = [normal_slice(key, block, (0, columns), columns, device=device) for block in layout.blocks]
        return torch.cat(pieces, 0)
    across = layout.blocks if layout.dim == 1 else ((0, columns),)
    return torch.cat([normal_slice(key, (0, rows), block, columns, device=device) for block in across], 1)
