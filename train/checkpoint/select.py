"""Finding a checkpoint: by step, the newest, or the newest whose files are what the manifest says."""

import json
import re
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.files import checksum
from data_prep.tokenizer import Tokenizer

LATEST = "latest"
_NAME = re.compile(r"step_(\d{8,})")


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps with a checkpoint that was finished, ascending."""
    names = (_NAME.fullmatch(path.parent.name) for path in (run_dir / "checkpoints").glob("step_*/manifest.json"))
    return sorted(int(match[1]) for match in names if match)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of one checkpoint; raises DataError naming the file."""
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["layout"], dict):
            raise KeyError("files")
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a whole checkpoint: it has no manifest.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    return manifest


def damage(
    folder: Path, *, share: tuple[int, int] = (0, 1), deep: bool = True, parts: tuple[str, ...] = ("",)
) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    share: (number, of) cuts the work over ranks. deep: compare checksums, not only sizes. parts: what the names of the
    files to look at start with.
    """
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return str(error)
    for name in sorted(name for name in manifest["files"] if name.startswith(parts))[share[0] :: share[1]]:
        entry, path = manifest["files"][name], folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes where its manifest says {entry['bytes']}"
        try:
            whole = not deep or checksum(path) == entry["checksum"]
        except OSError as error:
            return f"{path} cannot be read ({error})"
        if not whole:
            return f"{path} is damaged: its checksum is not the manifest's"
    return None


def find(path: str | Path, step: int | None = None) -> Path:
    """The checkpoint folder that a user means: a step's own folder, or a run folder's newest whole one.

    Raises DataError where there is none.
    """
    path = Path(path)
    if (path / "manifest.json").is_file() and (path / "trainer_state.json").is_file():
        return path
    steps = checkpoint_steps(path)
    if step is not None:
        if step not in steps:
            raise DataError(f"{path} holds no checkpoint of step {step}; there are {steps or 'none'}")
        return step_folder(path, step)
    for candidate in reversed(steps):
        if damage(step_folder(path, candidate), deep=False) is None:
            return step_folder(path, candidate)
    if steps:
        raise DataError(f"{damage(step_folder(path, steps[-1]), deep=False)}; no other checkpoint in {path} is whole")
    raise DataError(f"{path} holds no checkpoint; give a run folder or a checkpoints/step_… folder")


def tokenizer_sha256(folder: Path) -> str:
    """Digest of the tokenizer that a checkpoint carries; raises DataError where it cannot be read."""
    return Tokenizer.load(folder / "tokenizer").sha256
