"""Loading: the newest checkpoint whose checksums hold, into any layout."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import ConfigError, DataError
from train.checkpoint.pieces import PieceReader
from train.checkpoint.select import checkpoint_steps, damage, find, read_manifest, read_state, step_folder
from train.collective import from_rank_zero, gather
from train.engine import Engine
from train.fragments import release_gathered, set_adam_steps
from train.mesh import Mesh
from train.model.build import named_layouts
from train.model.lora import is_lora
from train.model.prefix import is_prefix

logger = logging.getLogger(__name__)


def choose(mesh: Mesh, run_dir: Path, step: int | None = None) -> Path | None:
    """The checkpoint to resume from, verified by all ranks together; None where the run has none yet.

    A damaged one is named in the log and the one before it is used; nothing is removed. With `step` only that one will
    do. Raises DataError, on every rank, where none is whole.
    """
    # One rank's listing counts for all: a file system may show them different ones for a moment.
    folder, said = newest_whole(mesh, run_dir, from_rank_zero(mesh, lambda: _candidates(run_dir, step)))
    if folder is not None:
        if said and mesh.rank == 0:
            logger.warning("%s; resuming from %s instead", said, folder)
        return folder
    if said and step is not None:
        raise DataError(f"{said}; choose another resume.step, or leave it out for the newest whole checkpoint")
    if said:
        raise DataError(f"{said}; no earlier checkpoint is whole. Restore the file, or start a new run_dir")
    return None


def newest_whole(mesh: Mesh, run_dir: Path, steps: Sequence[int]) -> tuple[Path | None, str]:
    """The newest checkpoint of `steps` whose files are whole, and what is wrong with the first that is not.

    steps: ascending, the same on all ranks, which share the reading.
    """
    said = ""
    for candidate in reversed(steps):
        folder = step_folder(run_dir, candidate)
        problems = gather(mesh, damage(folder, share=(mesh.rank, mesh.world)))
        problem = next((found for found in problems if found is not None), None)
        if problem is None:
            return folder, said
        said = said or problem
    return None, said


def _candidates(run_dir: Path, step: int | None) -> list[int]:
    if step is None:
        return checkpoint_steps(run_dir)
    find(run_dir, step)
    return [step]


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Put weights, master weights and Adam moments of a checkpoint into the engine; returns the trainer's state.

    The engine's layout may be any other than the one that wrote it.
    """
    state = read_state(folder)
    reader = PieceReader(folder)
    load_weights(engine, reader)
    with torch.no_grad():
        for fragment in engine.fragments():
            # fp32 runs store no master weights: the weights are their own.
            master = "master" if reader.has("master", fragment.layout.name) else "weight"
            for kind, target in {master: fragment.master, **fragment.moments}.items():
                target.copy_(reader.part(kind, fragment.layout, fragment.start, target.numel()))
    set_adam_steps(engine.deepspeed.optimizer, int(state["optimizer_steps"]))
    engine.load_scaler_state(state["loss_scaler"])
    return state


def load_weights(engine: Engine, reader: PieceReader) -> None:
    """The weights alone, into parameters and master weights; a fp32 engine takes stored master weights if there are."""
    release_gathered(engine.deepspeed.optimizer)
    fragments = {id(fragment.parameter): fragment for fragment in engine.fragments()}
    with torch.no_grad():
        for layout, parameter in named_layouts(engine.model.parameters()):
            if (is_lora(layout.name) or is_prefix(layout.name)) and not reader.has("weight", layout.name):
                # A model without LoRA or prefix to start from: what is to be learnt beside it keeps its initial values.
                continue
            exact = engine.dtype == torch.float32 and reader.has("master", layout.name)
            local = reader.local("master" if exact else "weight", layout)
            fragment = fragments.get(id(parameter))
            if fragment is not None:
                part = local.reshape(-1).narrow(0, fragment.start, fragment.master.numel())
                fragment.master.copy_(part)
                if engine.zero_stage == 3:
                    parameter.ds_tensor.narrow(0, 0, part.numel()).copy_(part)  # type: ignore[attr-defined]
            if engine.zero_stage != 3:
                parameter.copy_(local)


def check_layout(folder: Path, now: dict[str, int], *, reshape: bool) -> None:
    """Raise ConfigError where a checkpoint is of another layout and `resume.reshape` is not set.

    The number of data-parallel ranks may always differ.
    """
    before = read_manifest(folder)["layout"]
    for key in ("tensor_parallel", "pipeline_parallel", "zero_stage"):
        if now[key] != before[key] and not reshape:
            raise ConfigError(
                f"parallel.{key}={now[key]}, but {folder} was written with {before[key]}; "
                "set resume.reshape=true to change the layout"
            )
