"""Small checkpoints of any model, written as two tensor-parallel ranks write them, and folders compared."""

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from data_prep.cli import as_yaml
from data_prep.files import checksum
from train.checkpoint import model as checkpoint_model
from train.checkpoint.pieces import Piece, PieceReader, save_pieces
from train.checkpoint.select import write_manifest
from train.cli import compose_train
from train.config import Config, ModelConfig
from train.convert import inward, outward
from train.convert.__main__ import main
from train.convert.config import ConvertConfig
from train.convert.mapping import layouts
from train.model.build import DTYPES

ROWS = 640
"""Rows of the vocabulary: the 608 tokens of `tiny_dataset`'s tokenizer and padding."""
CAUSAL: dict[str, Any] = {
    "norm_placement": "pre",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": "qkv",
    "num_kv_heads": 2,
    "rotary_fraction": 0.5,
    "rotary_interleaved": True,
    "tied_embeddings": False,
}
LLAMA: dict[str, Any] = {**CAUSAL, "bias": "none", "rotary_fraction": 1.0, "rotary_interleaved": False}
CHATGLM: dict[str, Any] = {"positions": "rotary_2d", "activation": "gelu_tanh", "tied_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "glm_130b": {},
    "chatglm_6b": CHATGLM,
    "chatglm2_6b": CAUSAL,
    "glm": CAUSAL,
    "llama": LLAMA,
    "qwen2": {**LLAMA, "bias": "qkv"},
    "huggingface": {"positions": "learned_2d", "norm_placement": "sandwich", "activation": "gelu"},
}
"""A model that each format can hold, as changes to `model_of`'s defaults."""


def model_of(**changes: Any) -> ModelConfig:
    """Two layers of GLM-130B's architecture, 32 wide."""
    settings: dict[str, Any] = {
        "name": "small",
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "ffn_hidden_size": 48,
        "padded_vocab_size": ROWS,
        "max_positions": 64,
    }
    return ModelConfig(**{**settings, **changes})


def config_of(model: ModelConfig, *, objective: str, dtype: str = "fp32") -> Config:
    """A training config of that model."""
    positions = "2d" if model.positions in ("rotary_2d", "learned_2d") else "1d"
    words = [f"data.sampling.objective={objective}", f"data.sampling.positions={positions}"]
    config = composed(["data.path=unknown", f"precision={dtype}", *words])
    config.model, config.sequence_length = model, model.max_positions
    return config


@lru_cache
def _composed(*words: str) -> Config:
    return compose_train(words)


def composed(words: Sequence[str]) -> Config:
    """`compose_train`, which takes half a second, once for the same words."""
    return deepcopy(_composed(*words))


_read: dict[bytes, Config] = {}


def read_config(path: Path) -> Config:
    """`train.checkpoint.model.read_config`, once for the same content."""
    content = path.read_bytes()
    if content not in _read:
        _read[content] = checkpoint_model.read_config(path)
    return deepcopy(_read[content])


def weights_of(model: ModelConfig, dtype: str = "fp32", seed: int = 0) -> dict[str, Tensor]:
    """Random values for every parameter, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layout in layouts(model).items():
        value = torch.randn(layout.full_shape, generator=generator)
        scale = 0.05 if len(layout.full_shape) == 1 else layout.full_shape[-1] ** -0.5
        found[name] = (value * scale + ("norm.weight" in name)).to(DTYPES[dtype])
    return found


def write_checkpoint(
    folder: Path, config: Config, weights: dict[str, Tensor], tokenizer: Path, *, ranks: int = 2
) -> Path:
    """A checkpoint folder as a run on `ranks` tensor-parallel ranks leaves it, without optimizer states."""
    (folder / "model").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    for rank in range(ranks):
        pieces = []
        for name, layout in layouts(config.model, rank, ranks).items():
            if layout.dim is not None or rank == 0:
                local = layout.cut(weights[name])
                pieces.append((Piece("weight", layout, 0, local.numel()), local))
        save_pieces(folder / "model" / f"rank_{rank:05d}.safetensors", pieces)
    (folder / "config.yaml").write_text(as_yaml(config))
    (folder / "trainer_state.json").write_text("{}")
    (folder / "tokenizer" / "tokenizer.model").write_bytes((tokenizer / "tokenizer" / "tokenizer.model").read_bytes())
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "checksum": checksum(path)} for path in paths
    }
    manifest = {"version": 1, "step": 30, "layout": {"tensor_parallel": ranks}, "dtype": "fp32", "files": files}
    write_manifest(folder, manifest)
    return folder


def convert(source: Path, target: Path, form: str, **settings: Any) -> Path:
    """`python -m train.convert` in this process."""
    with patch.object(inward, "compose_train", composed), patch.object(outward, "read_config", read_config):
        assert main(ConvertConfig(source=str(source), target=str(target), format=form, **settings)) == 0
    return target


def stored(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint of this project."""
    reader = PieceReader(folder, ("model",))
    return {name: reader.full("weight", name) for name in reader.names("weight")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
