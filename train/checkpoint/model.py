"""A trained model for use: from any checkpoint, whatever layout wrote it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.cli import to_object
from data_prep.errors import DataError
from data_prep.tokenizer import Tokenizer
from kernels.config import KernelsConfig
from train import rules
from train.checkpoint.select import damage, find
from train.config import Config, LoraConfig
from train.mesh import Mesh
from train.model.build import DTYPES, Model, named_layouts
from train.model.lora import MergedReader
from train.model.quantised import quantise_model


@dataclass(frozen=True)
class Trained:
    """A model ready for evaluation, with what it was trained with."""

    model: Model
    tokenizer: Tokenizer
    config: Config
    folder: Path


def load_trained(
    path: str | Path,
    device: torch.device,
    mesh: Mesh | None = None,
    *,
    quantise: str | None = None,
    quantise_group: int | None = None,
) -> Trained:
    """The model of a run folder's newest whole checkpoint, or of one step's folder, on one device.

    mesh: ranks that share it by tensor parallelism; null means this process alone. quantise, quantise_group: round the
    layers' matrices, see `train.model.quantised`. Reads the weights only, after their checksums. Raises DataError where
    the checkpoint is missing, damaged or another model's, ConfigError where the model does not divide among the ranks.
    """
    mesh = mesh or Mesh.single(device)
    folder = find(path)
    problem = damage(folder, parts=("model/", "tokenizer/", "config.yaml"))
    if problem is not None:
        raise DataError(f"{problem}; restore the file, or give another step's folder as checkpoint=")
    config = read_config(folder / "config.yaml")
    config.parallel.one_stage(mesh.tensor)
    config.parallel.activation_checkpointing, config.parallel.activation_checkpointing_every_layers = "none", 1
    config.precision.fp8 = False  # it needs a GPU that training had, and gains nothing here
    reader, config.lora = MergedReader(folder, config.lora), LoraConfig()
    dtype = DTYPES[config.precision.dtype]
    if device.type == "cpu":
        # What it was trained with may need an accelerator; here the references do the same sums.
        dtype, config.kernels = torch.float32, KernelsConfig()
    rules.check(config)
    model = Model(config, mesh, dtype).eval()
    with torch.no_grad():
        for layout, parameter in named_layouts(model.parameters()):
            parameter.data = reader.local("weight", layout).to(device, dtype)
    if quantise is not None:
        quantise_model(model, quantise, quantise_group, config.kernels.quantised_matmul)
    return Trained(model, Tokenizer.load(folder / "tokenizer"), config, folder)


def read_config(path: Path) -> Config:
    """The training config that a checkpoint carries; raises DataError naming the file."""
    try:
        stored = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        return to_object(stored, Config)  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, OmegaConfBaseException) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read as a training config ({why})") from error
