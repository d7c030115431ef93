"""Saving: every rank writes its pieces into a `.partial` folder, which gets its real name only when it is whole."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import DataError
from data_prep.files import checksum, sync_folder, write_bytes, write_json
from train.checkpoint.pieces import Piece, save_pieces
from train.checkpoint.select import LATEST, checkpoint_steps, step_folder
from train.collective import gather, on_rank_zero, together
from train.engine import Engine
from train.model.build import named_layouts

VERSION = 1


def save(engine: Engine, run_dir: Path, step: int, state: dict[str, Any], *, config_yaml: str, tokenizer: Path) -> Path:
    """Write checkpoint `step` of a run; all ranks call it together. Returns its folder.

    state: what `trainer_state.json` keeps (plain JSON). tokenizer: folder of the dataset's tokenizer, copied along.
    Raises DataError on every rank where any rank failed to write; the half-written folder is removed, and `latest`
    still names the one before.
    """
    mesh = engine.mesh
    final = step_folder(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    try:
        on_rank_zero(mesh, lambda: _make_folders(partial))
        files = together(mesh, lambda: _write_pieces(engine, partial))
        every = {name: entry for part in gather(mesh, files) for name, entry in part.items()}
        on_rank_zero(mesh, lambda: _finish(engine, partial, final, step, state, every, config_yaml, tokenizer))
    except DataError:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def prune(run_dir: Path, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints beyond the newest `keep_last`, and what killed saves left; multiples of keep_every stay."""
    for step in checkpoint_steps(run_dir)[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            # Without its manifest a folder that is only half removed cannot be taken for whole.
            (step_folder(run_dir, step) / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(step_folder(run_dir, step), ignore_errors=True)
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if not (folder / "manifest.json").is_file() or folder.suffix == ".partial":
            shutil.rmtree(folder, ignore_errors=True)


def set_aside(run_dir: Path, step: int, attempt: int) -> None:
    """Move checkpoints beyond `step` to discarded/: a run that goes on from there writes its own, and a later resume
    must not find a history that was given up. Damaged ones are kept there too."""
    newer = [later for later in checkpoint_steps(run_dir) if later > step]
    if not newer:
        return
    aside = run_dir / "discarded" / f"checkpoints.attempt-{attempt}"
    aside.mkdir(parents=True, exist_ok=True)
    for later in newer:
        folder = step_folder(run_dir, later)
        folder.rename(aside / folder.name)
    write_bytes(run_dir / "checkpoints" / LATEST, (step_folder(run_dir, step).name + "\n").encode())


def _make_folders(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for part in ("model", "optimizer", "tokenizer"):
        (partial / part).mkdir(parents=True)


def _write_pieces(engine: Engine, partial: Path) -> dict[str, dict[str, Any]]:
    """This rank's files, by name, with bytes and checksum."""
    mesh = engine.mesh
    paths = []
    if engine.zero_stage == 3:
        weights = _zero3_weights(engine)
    else:
        weights = _weights(engine) if mesh.data_rank == 0 else iter(())
    for part, pieces in (("model", weights), ("optimizer", _states(engine))):
        found = list(pieces)
        if found:
            paths.append(partial / part / f"rank_{mesh.rank:05d}.safetensors")
            save_pieces(paths[-1], found)
    return {str(path.relative_to(partial)): _entry(path) for path in paths}


def _weights(engine: Engine) -> Iterator[tuple[Piece, Tensor]]:
    for layout, parameter in named_layouts(engine.model.parameters()):
        replica = getattr(parameter, "ds_pipe_replicated", False)
        if not replica and (layout.dim is not None or engine.mesh.tensor_rank == 0):
            yield Piece("weight", layout, 0, parameter.numel()), parameter


def _zero3_weights(engine: Engine) -> Iterator[tuple[Piece, Tensor]]:
    for fragment in engine.fragments():
        if fragment.owner:
            stored = fragment.parameter.ds_tensor.narrow(0, 0, fragment.master.numel())  # type: ignore[attr-defined]
            yield Piece("weight", fragment.layout, fragment.start, stored.numel()), stored


def _states(engine: Engine) -> Iterator[tuple[Piece, Tensor]]:
    """Moments, and master weights where the compute dtype does not hold them already."""
    for fragment in engine.fragments():
        if not fragment.owner:
            continue
        tensors = dict(fragment.moments)
        if engine.dtype != torch.float32:
            tensors["master"] = fragment.master
        for kind, tensor in tensors.items():
            yield Piece(kind, fragment.layout, fragment.start, tensor.numel()), tensor


def _finish(
    engine: Engine,
    partial: Path,
    final: Path,
    step: int,
    state: dict[str, Any],
    files: dict[str, dict[str, Any]],
    config_yaml: str,
    tokenizer: Path,
) -> None:
    write_json(partial / "trainer_state.json", state)
    write_bytes(partial / "config.yaml", config_yaml.encode())
    small = [partial / "trainer_state.json", partial / "config.yaml"]
    for source in sorted(path for path in tokenizer.iterdir() if path.is_file()):
        write_bytes(partial / "tokenizer" / source.name, source.read_bytes())
        small.append(partial / "tokenizer" / source.name)
    files |= {str(path.relative_to(partial)): _entry(path) for path in small}
    layout = {**engine.mesh.describe(), "zero_stage": engine.zero_stage}
    manifest = {
        "version": VERSION,
        "step": step,
        "layout": layout,
        "dtype": engine.config.precision.dtype,
        "files": dict(sorted(files.items())),
    }
    write_json(partial / "manifest.json", manifest)
    for folder in (partial / "model", partial / "optimizer", partial / "tokenizer", partial):
        sync_folder(folder)
    if final.exists():
        # Left without its manifest by a removal that was killed.
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)
    write_bytes(final.parent / LATEST, (final.name + "\n").encode())


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "checksum": checksum(path)}
