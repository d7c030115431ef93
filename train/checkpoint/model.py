"""A trained model in one process: from any checkpoint, whatever layout wrote it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data_prep.cli import to_object
from data_prep.errors import DataError
from data_prep.tokenizer import Tokenizer
from train.checkpoint.pieces import PieceReader
from train.checkpoint.select import find
from train.config import Config
from train.mesh import Mesh
from train.model.build import Model, named_layouts


@dataclass(frozen=True)
class Trained:
    """A model ready for evaluation, with what it was trained with."""

    model: Model
    tokenizer: Tokenizer
    config: Config
    folder: Path


def load_trained(path: str | Path, device: torch.device) -> Trained:
    """The model of a run folder's newest whole checkpoint, or of one step's folder, on one device.

    Reads the weights only. Raises DataError where the checkpoint is missing, damaged or another model's.
    """
    folder = find(path)
    config = read_config(folder / "config.yaml")
    config.parallel.tensor_parallel = config.parallel.pipeline_parallel = 1
    config.parallel.activation_checkpointing = "none"
    reader = PieceReader(folder, ("model",))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision.dtype]
    if device.type == "cpu":
        dtype = torch.float32
    model = Model(config, Mesh.single(device), dtype).eval()
    with torch.no_grad():
        for layout, parameter in named_layouts(model.parameters()):
            parameter.data = reader.local("weight", layout).to(device, dtype)
    return Trained(model, Tokenizer.load(folder / "tokenizer"), config, folder)


def read_config(path: Path) -> Config:
    """The training config that a checkpoint carries; raises DataError naming the file."""
    try:
        stored = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        return to_object(stored, Config)  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a training config ({error})") from error
