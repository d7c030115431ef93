"""A checkpoint of this project written tensor by tensor: weights, config and tokenizer, no optimizer states."""

import json
from collections.abc import Callable, Sequence
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
    specs: Sequence[Spec],
    read: Callable[[Spec], Tensor],
    shard_bytes: float,
    origin: dict[str, str],
) -> None:
    """Fill an existing, empty folder.

    specs: every parameter by its canonical name. read: gives its whole value. shard_bytes: largest file of weights.
    origin: what `trainer_state.json` says about where it came from. Raises DataError where the disk is full.
    """
    files = _write_weights(folder, specs, read, shard_bytes)
    write_json(folder / "trainer_state.json", {"consumed_samples": 0, "converted_from": origin})
    write_bytes(folder / "config.yaml", as_yaml(config).encode())
    tokenizer.save(folder / "tokenizer")
    for name in ("trainer_state.json", "config.yaml", f"tokenizer/{tokenizer.file_name}"):
        files[name] = {"bytes": (folder / name).stat().st_size, "checksum": checksum(folder / name)}
    manifest = {
        "version": VERSION,
        "step": 0,
        "layout": {**Mesh.single().describe(), "zero_stage": 0},
        "dtype": config.precision.dtype,
        "files": dict(sorted(files.items())),
    }
    write_manifest(folder, manifest)


def _write_weights(
    folder: Path, specs: Sequence[Spec], read: Callable[[Spec], Tensor], shard_bytes: float
) -> dict[str, dict[str, Any]]:
    """The files of `model/`; returns their entries of the manifest."""
    (folder / "model").mkdir()
    entries = {}
    for number, part in enumerate(shards(specs, shard_bytes)):
        # As `train.checkpoint.pieces` lays them out: whole tensors of one rank, flattened.
        pieces = [Piece("weight", Layout(spec.key, spec.shape), 0, spec.numel) for spec in part]
        flat = [Spec(piece.key, (spec.numel,), spec.dtype) for piece, spec in zip(pieces, part, strict=True)]
        name = f"model/rank_{number:05d}.safetensors"
        places = json.dumps({piece.key: piece.describe() for piece in pieces})
        writer = SafetensorsWriter(folder / name, flat, {"pieces": places})
        for spec in part:
            writer.add(read(spec).reshape(-1))
        entries[name] = writer.close()
    return entries
