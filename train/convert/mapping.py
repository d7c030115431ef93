"""How foreign tensors are made of native rows, and native tensors of foreign ones: one description for both directions.

A foreign tensor is a stack of rows taken from native tensors, in an order that may be any permutation (heads regrouped,
rotary pairs re-ordered, gate before linear). Columns never move. So a list of `Entry`s is a bijection on the values of
a model, and a round trip is exact by construction; `check` proves that each native row is used exactly once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.config import Config, ModelConfig
from train.mesh import Mesh
from train.model.build import Model, named_layouts
from train.model.parameters import Layout

Read = Callable[[str], Tensor]
"""Gives a tensor by its key or native name."""


@dataclass(frozen=True)
class Part:
    """Rows of one native tensor, in the order wanted; None means all of them as they stand."""

    name: str
    rows: Tensor | None = None


@dataclass(frozen=True)
class Entry:
    """One foreign tensor: the parts stacked along the first dimension."""

    key: str
    parts: tuple[Part, ...]


def layouts(model: ModelConfig, rank: int = 0, size: int = 1) -> dict[str, Layout]:
    """Every parameter's place on one of `size` tensor-parallel ranks, by canonical name, in the model's order.

    Asked of the model itself, built without memory, so that names, shapes and cuts have one source.
    """
    config = Config(model=model)
    config.parallel.tensor_parallel = size
    mesh = replace(Mesh.single("meta"), tensor=size, tensor_rank=rank)
    return {layout.name: layout for layout, _ in named_layouts(Model(config, mesh, torch.float32).parameters())}


class Mapping:
    """The entries of a format for one model, with shapes, usable both ways."""

    def __init__(self, entries: Sequence[Entry], shapes: dict[str, tuple[int, ...]]) -> None:
        self.entries = {entry.key: entry for entry in entries}
        self.native = shapes
        self.shapes = {entry.key: self._shape(entry) for entry in entries}
        """Shape of each foreign tensor by key."""
        self._sources: dict[str, list[tuple[str, int, Part]]] = {name: [] for name in shapes}
        for entry in entries:
            offset = 0
            for part in entry.parts:
                self._sources[part.name].append((entry.key, offset, part))
                offset += self._count(part)
        self.check()

    def _count(self, part: Part) -> int:
        return self.native[part.name][0] if part.rows is None else len(part.rows)

    def _shape(self, entry: Entry) -> tuple[int, ...]:
        return (sum(self._count(part) for part in entry.parts), *self.native[entry.parts[0].name][1:])

    def check(self) -> None:
        """Each row of each native tensor stands in exactly one place."""
        for name, sources in self._sources.items():
            rows = [torch.arange(self.native[name][0]) if part.rows is None else part.rows for _, _, part in sources]
            assert rows, f"{name} is in no entry"
            assert torch.equal(torch.cat(rows).sort().values, torch.arange(self.native[name][0])), name

    def outward(self, key: str, native: Read) -> Tensor:
        """A foreign tensor from native ones."""
        parts = self.entries[key].parts
        if len(parts) == 1:
            return _pick(native(parts[0].name), parts[0].rows)
        full: Tensor | None = None
        offset = 0
        for part in parts:
            picked = _pick(native(part.name), part.rows)
            full = torch.empty(self.shapes[key], dtype=picked.dtype) if full is None else full
            full[offset : offset + len(picked)] = picked
            offset += len(picked)
        assert full is not None
        return full

    def inward(self, name: str, foreign: Read) -> Tensor:
        """A native tensor from foreign ones."""
        sources = self._sources[name]
        if len(sources) == 1 and sources[0][2].rows is None:
            key, offset, part = sources[0]
            return foreign(key).narrow(0, offset, self._count(part))
        full: Tensor | None = None
        for key, offset, part in sources:
            piece = foreign(key).narrow(0, offset, self._count(part))
            full = torch.empty(self.native[name], dtype=piece.dtype) if full is None else full
            if part.rows is None:
                full.copy_(piece)
            else:
                full.index_copy_(0, part.rows, piece)
        assert full is not None
        return full

    def keys_of(self, name: str) -> list[str]:
        """Foreign tensors that hold rows of a native one."""
        return [key for key, _, _ in self._sources[name]]


def _pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return tensor
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count)):
        return tensor.narrow(0, first, count)
    return tensor.index_select(0, rows)
