"""Small untrained models of every kind, for tests of what runs a model: cache, decoding, scoring."""

from typing import Any

import torch

from train.config import Config, ModelConfig
from train.mesh import Mesh
from train.model.build import Model

VARIANTS: dict[str, dict[str, Any]] = {
    "glm_130b": {},
    "rotary_2d": {"positions": "rotary_2d", "activation": "gelu"},
    "learned_2d": {"positions": "learned_2d", "norm_placement": "pre"},
    "no_positions": {"positions": "none", "norm_placement": "sandwich"},
    "grouped": {"num_kv_heads": 2, "norm": "rmsnorm", "norm_placement": "pre", "bias": "qkv"},
    "multi_query": {"num_kv_heads": 1, "rotary_fraction": 0.5, "rotary_interleaved": True, "tied_embeddings": False},
}
"""Differences from GLM-130B's layer."""


def untrained(variant: str = "glm_130b", mesh: Mesh | None = None, prefix: int = 0, **changes: Any) -> Model:
    """A 2 x 32 model with 640 tokens and 64 positions, weights drawn large enough that its choices differ."""
    shape: dict[str, Any] = {
        "name": "untrained",
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "ffn_hidden_size": 48,
        "padded_vocab_size": 640,
        "max_positions": 64,
        **VARIANTS[variant],
        **changes,
    }
    mesh = mesh or Mesh.single()
    config = Config(model=ModelConfig(**shape))
    config.parallel.tensor_parallel, config.prefix.length = mesh.tensor, prefix
    model = Model(config, mesh, torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model
