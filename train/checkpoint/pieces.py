"""How tensors lie in a checkpoint's files, and how a full one is put together from them.

A piece is a contiguous range of one tensor-parallel shard of one parameter, under the parameter's canonical name:

    model/…       "weight|NAME"                                  compute dtype, a share for each data-parallel rank
    optimizer/…   "master|NAME" "exp_avg|NAME" "exp_avg_sq|NAME"  fp32, the ranges that ZeRO gave each rank

Each file's safetensors header says where its pieces belong, so that any layout can read what any other wrote.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import DataError
from train.checkpoint.tensor_file import write_tensors
from train.model.parameters import Layout
from train.progress import alive

KINDS = ("weight", "master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Where one stored range belongs: elements [start, start + numel) of the flattened shard that `layout` cuts."""

    kind: str
    layout: Layout
    start: int
    numel: int
    file: str = ""

    @property
    def key(self) -> str:
        """Name of the tensor in its file."""
        return f"{self.kind}|{self.layout.name}"

    def describe(self) -> dict[str, Any]:
        """The place as the header stores it."""
        layout = self.layout
        return {"shape": layout.full_shape, "dim": layout.dim, "blocks": layout.blocks, "start": self.start}


def save_pieces(path: Path, pieces: Iterable[tuple[Piece, Tensor]]) -> dict[str, Any]:
    """Write one file of flattened CPU tensors and flush it to disk; returns its entry for the manifest.

    A full disk is a DataError naming the path.
    """
    tensors, places = {}, {}
    for piece, tensor in pieces:
        tensors[piece.key] = tensor.reshape(-1)
        places[piece.key] = piece.describe()
    return write_tensors(path, tensors, {"pieces": json.dumps(places)})


class PieceReader:
    """Reads full tensors, or one rank's cut of them, from all files of a checkpoint folder."""

    def __init__(self, folder: Path, parts: tuple[str, ...] = ("model", "optimizer")) -> None:
        """parts: sub-folders to look in. Raises DataError for a file that cannot be read."""
        self.folder = folder
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        for part in parts:
            for path in sorted((folder / part).glob("*.safetensors")):
                for piece in _pieces(folder, path):
                    self._pieces.setdefault((piece.kind, piece.layout.name), []).append(piece)

    def names(self, kind: str) -> list[str]:
        """Canonical names of the parameters that have this kind stored."""
        return sorted(name for stored, name in self._pieces if stored == kind)

    def has(self, kind: str, name: str) -> bool:
        """Whether this parameter has this kind stored."""
        return (kind, name) in self._pieces

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a stored parameter."""
        return self._pieces[kind, name][0].layout.full_shape

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """Dtype that a parameter is stored in."""
        piece = self._pieces[kind, name][0]
        with safe_open(self.folder / piece.file, framework="pt") as file:
            return file.get_slice(piece.key)[:1].dtype

    def local(self, kind: str, layout: Layout) -> Tensor:
        """The cut of a parameter that `layout` describes, in the stored dtype, on the CPU.

        Raises DataError where the parameter is missing, has another shape, or is not covered by the files.
        """
        return self.part(kind, layout, 0, _numel(layout)).view(layout.local_shape)

    def part(self, kind: str, layout: Layout, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened cut; only these are read where the layout was written so."""
        pieces = self._found(kind, layout)
        mine = [piece for piece in pieces if piece.layout == layout]
        if mine:
            return self._range(mine, start, numel)
        shards: dict[Layout, list[Piece]] = {}
        for piece in pieces:
            shards.setdefault(piece.layout, []).append(piece)
        if sum(_numel(other) for other in shards) < math.prod(layout.full_shape):
            raise DataError(f"{self.folder}: {kind} of {layout.name} is incomplete; a rank's file is missing")
        full: Tensor | None = None
        for other, ranges in shards.items():
            shard = self._range(ranges, 0, _numel(other)).view(other.local_shape)
            full = torch.empty(layout.full_shape, dtype=shard.dtype) if full is None else full
            other.paste(full, shard)
        assert full is not None
        return layout.cut(full).reshape(-1).narrow(0, start, numel)

    def full(self, kind: str, name: str) -> Tensor:
        """The whole, unsharded parameter."""
        return self.local(kind, Layout(name, self.shape(kind, name)))

    def _found(self, kind: str, layout: Layout) -> list[Piece]:
        pieces = self._pieces.get((kind, layout.name))
        if pieces is None:
            raise DataError(f"{self.folder}: holds no {kind} of {layout.name}; it was written by another model")
        if pieces[0].layout.full_shape != layout.full_shape:
            raise DataError(
                f"{self.folder}: {layout.name} has shape {list(pieces[0].layout.full_shape)}, "
                f"but the model wants {list(layout.full_shape)}; use the model config it was written with"
            )
        return pieces

    def _range(self, pieces: list[Piece], start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of one flattened shard, from the ranges that hold them."""
        tensors, end = [], start + numel
        for piece in sorted(pieces, key=lambda piece: piece.start):
            upto = min(end, piece.start + piece.numel)
            if piece.start <= start < upto:
                with safe_open(self.folder / piece.file, framework="pt") as file:
                    tensors.append(file.get_slice(piece.key)[start - piece.start : upto - piece.start])
                alive()
                start = upto
        if start != end:
            kind, name = pieces[0].kind, pieces[0].layout.name
            raise DataError(f"{self.folder}: {kind} of {name} is incomplete; the file of a rank is missing")
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _pieces(folder: Path, path: Path) -> Iterator[Piece]:
    try:
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {})["pieces"])
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, _, name = key.partition("|")
                place = places[key]
                blocks = tuple((int(a), int(b)) for a, b in place["blocks"])
                layout = Layout(name, tuple(place["shape"]), place["dim"], blocks)
                numel = file.get_slice(key).get_shape()[0]
                yield Piece(kind, layout, int(place["start"]), int(numel), str(path.relative_to(folder)))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a checkpoint file ({error})") from error


def _numel(layout: Layout) -> int:
    return math.prod(layout.local_shape)
