"""Where a run starts from, and which keys may differ between a checkpoint's config and the one that resumes it."""

import logging
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from train.checkpoint import read
from train.checkpoint.inspect import flat
from train.checkpoint.select import damage, find, read_state, tokenizer_sha256
from train.collective import from_rank_zero, together
from train.config import Config
from train.mesh import Mesh
from train.run_folder import is_restart

logger = logging.getLogger(__name__)

FREE = (
    "parallel.",  # tensor_parallel, pipeline_parallel and zero_stage under resume.reshape
    "kernels.",
    "saving.",
    "resume.",
    "evaluation.",
    "logging.",
    "cluster.",
    "tokenizer.",  # the dataset's own tokenizer is checked against the checkpoint's
    "data.path",
    "data.sources",
    "data.cleaning.",
    "data.pipeline.",
    "data.mixture",  # what was consumed is kept (DataPlan.with_mixture)
    "data.task_bytes",
    "data.workers",
    "data.prefetch_batches",
    "data.overwrite",
    "run_dir",
    "max_steps",
    "max_samples",
    "micro_batch_size",
    "stability.telemetry",
    "stability.events",  # a new act lies ahead of the checkpoint, see train.stability.reactions
    "initialize_from",
)
"""Keys, or prefixes of keys, that change how a run is carried out but not what it computes."""


def starting_point(config: Config, mesh: Mesh, dataset: Dataset, yaml: str) -> Path | None:
    """The checkpoint to go on from, known to fit this run's config (`yaml`) and data; None for a new run.

    Weights that a new run is to start from (`initialize_from`) are checked here too. Errors are raised on all ranks.
    """
    found = read.choose(mesh, Path(config.run_dir), _wanted_step(config, mesh))
    if found is not None:
        together(mesh, lambda: _check_checkpoint(config, mesh, dataset, yaml, found))
    elif config.initialize_from is not None:
        together(mesh, lambda: _check_source(str(config.initialize_from), mesh, dataset))
    return found


def _wanted_step(config: Config, mesh: Mesh) -> int | None:
    """resume.step; None for a restart, whose job has gone back there already and goes on from its newest checkpoint."""
    step = config.resume.step
    if step is None or not from_rank_zero(mesh, lambda: is_restart(config.run_dir)):
        return step
    if mesh.rank == 0:
        logger.info(
            "resume.step=%d was obeyed by an earlier attempt of this job; going on from the newest checkpoint", step
        )
    return None


def _check_checkpoint(config: Config, mesh: Mesh, dataset: Dataset, yaml: str, found: Path) -> None:
    layout = {**mesh.describe(), "zero_stage": config.parallel.zero_stage}
    read.check_layout(found, layout, reshape=config.resume.reshape)
    check_same(yaml, found / "config.yaml", config.resume.allow)
    _check_tokenizer(dataset, found)
    if read_state(found)["dataset"] != dataset.digest and "data.path" not in config.resume.allow:
        raise ConfigError(
            f"data.path={config.data.path} holds other data than {found} was trained on; use that dataset, or "
            "go on with this one by resume.allow=[data.path]"
        )


def _check_source(initialize_from: str, mesh: Mesh, dataset: Dataset) -> None:
    """Weights to start from must be whole, and speak this dataset's tokens."""
    source = find(initialize_from)
    problem = damage(source, share=(mesh.rank, mesh.world), parts=("model/", "tokenizer/"))
    if problem is not None:
        raise DataError(f"initialize_from: {problem}")
    _check_tokenizer(dataset, source)


def _check_tokenizer(dataset: Dataset, found: Path) -> None:
    if tokenizer_sha256(found) != dataset.tokenizer.sha256:
        raise DataError(
            f"{dataset.folder / 'tokenizer'} is not the tokenizer of {found}; use the dataset that it was trained on"
        )


def check_same(now: str, before: Path, allow: list[str]) -> None:
    """Raise ConfigError for the first key that differs and may not.

    now: YAML of this run's config. before: the checkpoint's config.yaml. allow: `resume.allow`.
    """
    # A key that is younger than the checkpoint had its default's effect.
    then = flat(asdict(Config())) | flat(OmegaConf.to_container(OmegaConf.load(before)))
    current = flat(OmegaConf.to_container(OmegaConf.create(now)))
    for key in sorted(set(then) | set(current)):
        if key.startswith(FREE) or key in allow or then.get(key) == current.get(key):
            continue
        raise ConfigError(
            f"{key}={current.get(key)}, but the checkpoint in {before.parent} was made with {key}={then.get(key)}; "
            f"put it back, allow it with resume.allow=[{key}], or start a new run_dir"
        )
