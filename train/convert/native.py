"""A checkpoint of this project written tensor by tensor, from another layout."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.cli import as_yaml
from data_prep.files import checksum, write_bytes, write_json
from data_prep.tokenizer import Tokenizer
from train.checkpoint.pieces import Piece
from train.checkpoint.select import write_manifest
from train.checkpoint.tensor_file import SafetensorsWriter, Spec
from train.checkpoint.write import VERSION
from train.config import Config
from train.convert.folder import shards
from train.mesh import Mesh
from train.model.parameters import Layout


def write_checkpoint(
    folder: Path,
    config: Config,
    tokenizer: Tokenizer,
    parts: Mapping[str, Sequence[tuple[str, Spec]]],
    read: Callable[[str, Spec], Tensor],
    shard_bytes: float,
    state: Mapping[str, Any],
) -> None:
    """Fill an existing, empty folder.

    parts: what goes into `model/` (and `optimizer/`): kinds of `train.checkpoint.pieces` with each parameter by its
    canonical name. read: gives the whole value of one. shard_bytes: largest file of tensors. state: what
    `trainer_state.json` says. Raises DataError where the disk is full.
    """
    files: dict[str, dict[str, Any]] = {}
    for part, wanted in parts.items():
        files |= _write_part(folder / part, wanted, read, shard_bytes)
    write_json(folder / "trainer_state.json", dict(state))
    write_bytes(folder / "config.yaml", as_yaml(config).encode())
    tokenizer.save(folder / "tokenizer")
    for name in ("trainer_state.json", "config.yaml", f"tokenizer/{tokenizer.file_name}"):
        files[name] = {"bytes": (folder / name).stat().st_size, "checksum": checksum(folder / name)}
    manifest = {
        "version": VERSION,
        "step": state.get("step", 0),
        "layout": {**Mesh.single().describe(), "zero_stage": 0},
        "dtype": config.precision.dtype,
        "files": dict(sorted(files.items())),
    }
    write_manifest(folder, manifest)


def _write_part(
    folder: Path, wanted: Sequence[tuple[str, Spec]], read: Callable[[str, Spec], Tensor], shard_bytes: float
) -> dict[str, dict[str, Any]]:
    """The files of one sub-folder; returns their entries of the manifest."""
    folder.mkdir()
    # As `train.checkpoint.pieces` lays them out: whole tensors of one rank, flattened.
    pieces = {}
    for kind, spec in wanted:
        piece = Piece(kind, Layout(spec.key, spec.shape), 0, spec.numel)
        pieces[piece.key] = (piece, spec)
    flat = [Spec(key, (spec.numel,), spec.dtype) for key, (_, spec) in pieces.items()]
    entries = {}
    for number, part in enumerate(shards(flat, shard_bytes)):
        path = folder / f"rank_{number:05d}.safetensors"
        places = json.dumps({spec.key: pieces[spec.key][0].describe() for spec in part})
        writer = SafetensorsWriter(path, part, {"pieces": places})
        for spec in part:
            piece, whole = pieces[spec.key]
            writer.add(read(piece.kind, whole).reshape(-1))
        entries[f"{folder.name}/{path.name}"] = writer.close()
    return entries
