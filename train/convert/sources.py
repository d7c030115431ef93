"""Foreign weights opened for reading: every name, shape and dtype is checked before the first tensor is read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import ConfigError, DataError
from kernels.quantised_weight import SCALE_SUFFIX, dequantise
from train.checkpoint.tensor_file import Spec
from train.convert.tensor_files import SafetensorsFile, TensorFile, TorchFile
from train.model.build import DTYPES
from train.model.parameters import Layout

Shapes = Mapping[str, tuple[int, ...]]
ROWS_AT_ONCE = 1024
"""Rows that are quantised, or turned back, at a time."""


class Weights:
    """The tensors of one set of files that together hold one state dictionary."""

    def __init__(self, files: Sequence[TensorFile], shapes: Shapes, ignored: tuple[str, ...], where: Path) -> None:
        """shapes: what there must be. ignored: ends of keys of buffers. Raises DataError for the first difference."""
        self._file = {key: file for file in files for key in file.specs}
        self._bits: dict[str, int] = {}
        missing = [key for key in shapes if key not in self._file]
        if missing:
            raise DataError(f"{where}: {_listed(missing)} missing; it is another model's or incomplete")
        scales = {key + SCALE_SUFFIX for key in shapes if self.spec(key).dtype == torch.int8}
        extra = [key for key in self._file if key not in shapes and key not in scales and not key.endswith(ignored)]
        if extra:
            raise DataError(f"{where}: {_listed(extra)} not part of this model; check format= and model=")
        for key, shape in shapes.items():
            self._check(key, shape)

    def _check(self, key: str, shape: tuple[int, ...]) -> None:
        file, spec = self._file[key], self.spec(key)
        found = spec.shape
        if spec.dtype == torch.int8 and key + SCALE_SUFFIX in self._file and len(shape) == 2 and len(found) == 2:
            self._bits[key] = 8 if found[1] == shape[1] else 4
            found = (found[0], found[1] * 8 // self._bits[key])
            scale = self.spec(key + SCALE_SUFFIX)
            if scale.dtype != torch.float16 or scale.shape[:1] != shape[:1]:
                raise DataError(f"{file.path}: {scale.key} is not one fp16 scale for each of {shape[0]} rows")
        elif spec.dtype not in DTYPES.values():
            raise DataError(f"{file.path}: {key} is stored as {spec.dtype}; weights are fp32, bf16 or fp16")
        if found != shape:
            raise DataError(
                f"{file.path}: {key} has shape {list(found)}, but the model wants {list(shape)}; check model= and "
                "the vocabulary"
            )

    def spec(self, key: str) -> Spec:
        """What is stored under a key."""
        return self._file[key].specs[key]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a tensor is read in where nothing else is asked for; integers with a scale give fp16."""
        return torch.float16 if key in self._bits else self.spec(key).dtype

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in `dtype`, or as `dtype()` says. Raises DataError naming the file."""
        file = self._file[key]
        tensor = file.read(key)
        if key in self._bits:
            scale = self._file[key + SCALE_SUFFIX].read(key + SCALE_SUFFIX)
            blocks = zip(tensor.split(ROWS_AT_ONCE), scale.split(ROWS_AT_ONCE), strict=True)
            return torch.cat([dequantise(*block, self._bits[key], dtype or torch.float16) for block in blocks])
        return tensor if dtype is None else tensor.to(dtype)


class Ranks:
    """Weights divided over tensor-parallel ranks, one set of files each, read as whole tensors."""

    def __init__(self, ranks: Sequence[Weights], cuts: Sequence[Mapping[str, Layout]]) -> None:
        """cuts: each rank's layout of every foreign key."""
        self._ranks, self._cuts = ranks, cuts

    def dtype(self, key: str) -> torch.dtype:
        """As `Weights.dtype`."""
        return self._ranks[0].dtype(key)

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor from all ranks; one that every rank holds must be the same on each."""
        first = self._ranks[0].read(key, dtype)
        layout = self._cuts[0][key]
        if layout.dim is None:
            for number, rank in enumerate(self._ranks[1:], 1):
                if not torch.equal(first, rank.read(key, dtype)):
                    raise DataError(
                        f"{key} of rank {number} is not what rank 0 holds; the files are of different saves"
                    )
            return first
        full = torch.empty(layout.full_shape, dtype=first.dtype)
        layout.paste(full, first)
        del first
        for rank, cut in zip(self._ranks[1:], self._cuts[1:], strict=True):
            cut[key].paste(full, rank.read(key, dtype))
        return full


def rank_files(source: Path, tensor_parallel: int) -> list[TorchFile]:
    """GLM-130B's files of the step that `latest` names. Raises DataError, ConfigError for another number of them."""
    latest = source / "latest"
    try:
        step = latest.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{latest}: cannot be read; a GLM-130B folder names its step there") from error
    paths = sorted((source / step).glob("mp_rank_*_model_states.pt"))
    if not paths:
        raise DataError(f"{source / step}: no mp_rank_…_model_states.pt there, though {latest} names it")
    if [path.name for path in paths] != [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(len(paths))]:
        raise DataError(
            f"{source / step}: the files of its ranks are not numbered 0 … {len(paths) - 1}; one is missing"
        )
    if len(paths) != tensor_parallel:
        raise ConfigError(
            f"tensor_parallel={tensor_parallel}, but {source / step} holds {len(paths)} ranks' files; "
            f"use tensor_parallel={len(paths)}"
        )
    return [TorchFile(path) for path in paths]


def shard_files(source: Path) -> list[TensorFile]:
    """The files of a Hugging Face folder: safetensors where there are any, else torch files. Raises DataError."""
    for name, kind in (("model.safetensors", SafetensorsFile), ("pytorch_model.bin", TorchFile)):
        index = source / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise DataError(f"{index}: cannot be read ({error})") from error
            return [kind(source / part) for part in names]
        if (source / name).is_file():
            return [kind(source / name)]
    raise DataError(f"{source}: no model.safetensors, pytorch_model.bin or index of such files there")


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more tensors are" if len(keys) > 1 else " is"
    return keys[0] + more
