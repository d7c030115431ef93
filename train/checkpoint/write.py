"""The files of a save: what each rank writes, and the commit that makes them count.

`train.checkpoint.saver` puts them in order. All ranks write into a `.partial` folder, which gets its real name only
when it is whole.
"""

import shutil
from pathlib import Path
from typing import Any

from data_prep.files import checksum, sync_folder, write_bytes, write_json
from train.checkpoint.pieces import save_pieces
from train.checkpoint.select import LATEST, MANIFEST, checkpoint_steps, step_folder, write_manifest
from train.checkpoint.staging import Pieces

VERSION = 1


def make_folders(partial: Path) -> None:
    """An empty `.partial` folder; what a killed save left there goes."""
    shutil.rmtree(partial, ignore_errors=True)
    for part in ("model", "optimizer", "tokenizer"):
        (partial / part).mkdir(parents=True)


def write_files(partial: Path, rank: int, staged: Pieces) -> dict[str, dict[str, Any]]:
    """Write this rank's files; returns their entries for the manifest, by name."""
    names = {f"{part}/rank_{rank:05d}.safetensors": pieces for part, pieces in staged.items() if pieces}
    return {name: save_pieces(partial / name, pieces) for name, pieces in names.items()}


def commit(
    run_dir: Path,
    state: dict[str, Any],
    files: dict[str, dict[str, Any]],
    *,
    layout: dict[str, int],
    dtype: str,
    config_yaml: str,
    tokenizer: Path,
) -> None:
    """Add the small files and the manifest to a whole `.partial` folder, give it its name, and switch `latest`.

    state: what `trainer_state.json` keeps (plain JSON), with the step. files: the entries of all ranks' files.
    tokenizer: folder of the dataset's tokenizer, copied along.
    """
    final = step_folder(run_dir, state["step"])
    partial = partial_folder(final)
    write_json(partial / "trainer_state.json", state)
    write_bytes(partial / "config.yaml", config_yaml.encode())
    small = [partial / "trainer_state.json", partial / "config.yaml"]
    for source in sorted(path for path in tokenizer.iterdir() if path.is_file()):
        write_bytes(partial / "tokenizer" / source.name, source.read_bytes())
        small.append(partial / "tokenizer" / source.name)
    entries = {str(path.relative_to(partial)): _entry(path) for path in small} | files
    for folder in (partial / "model", partial / "optimizer", partial / "tokenizer"):
        sync_folder(folder)
    manifest = {"version": VERSION, "step": state["step"], "layout": layout, "dtype": dtype}
    write_manifest(partial, {**manifest, "files": dict(sorted(entries.items()))})
    if final.exists():
        # Left without its manifest by a removal that was killed.
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)
    write_bytes(final.parent / LATEST, (final.name + "\n").encode())


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return final.with_name(final.name + ".partial")


def prune(run_dir: Path, every: int, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints beyond the newest `keep_last`, and what killed saves left; multiples of keep_every stay.

    every: saving.every_steps. What a signal made in between stays while it is the newest, beside the others: a
    roll-back needs those that an undisturbed run has.
    """
    steps = checkpoint_steps(run_dir)
    regular = [step for step in steps if not every or step % every == 0]
    for step in set(steps) - set(regular[-keep_last:]) - set(steps[-1:]):
        if not (keep_every and step % keep_every == 0):
            # Without its manifest a folder that is only half removed cannot be taken for whole.
            (step_folder(run_dir, step) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(step_folder(run_dir, step), ignore_errors=True)
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if not (folder / MANIFEST).is_file() or folder.suffix == ".partial":
            shutil.rmtree(folder, ignore_errors=True)


def set_aside(run_dir: Path, step: int, attempt: int) -> None:
    """Move checkpoints beyond `step` to discarded/: a run that goes on from there writes its own, and a later resume
    must not find a history that was given up. Damaged ones are kept there too."""
    newer = [later for later in checkpoint_steps(run_dir) if later > step]
    if not newer:
        return
    aside = run_dir / "discarded" / f"checkpoints.attempt-{attempt}"
    aside.mkdir(parents=True, exist_ok=True)
    for later in reversed(newer):  # killed in between, what is left is still one history
        folder = step_folder(run_dir, later)
        # A second roll-back in one attempt may set the same step aside again.
        shutil.rmtree(aside / folder.name, ignore_errors=True)
        folder.rename(aside / folder.name)
    write_bytes(run_dir / "checkpoints" / LATEST, (step_folder(run_dir, step).name + "\n").encode())


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "checksum": checksum(path)}
