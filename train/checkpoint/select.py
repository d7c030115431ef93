"""Finding a checkpoint: by step, the newest, or the newest whose files are what the manifest says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from data_prep.errors import DataError
from data_prep.files import checksum, write_bytes
from data_prep.tokenizer import Tokenizer
from train.progress import alive

LATEST = "latest"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8,})")


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps with a checkpoint that was finished, ascending."""
    names = (_NAME.fullmatch(path.parent.name) for path in (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}"))
    return sorted(int(match[1]) for match in names if match)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a checkpoint's manifest with its own checksum inside."""
    write_bytes(folder / MANIFEST, _sealed(manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of one checkpoint; raises DataError naming the file where it is not as it was written."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["layout"], dict):
            raise KeyError("files")
        del manifest["checksum"]
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a whole checkpoint: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    if content != _sealed(manifest):
        raise DataError(f"{path} is damaged: its checksum is not its content's")
    return manifest


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest file."""
    seal = xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    return (json.dumps({**manifest, "checksum": seal}, indent=1) + "\n").encode()


def read_state(folder: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint; raises DataError naming it."""
    path = folder / "trainer_state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    return state


def damages(
    folder: Path, *, share: tuple[int, int] = (0, 1), deep: bool = True, parts: tuple[str, ...] = ("",)
) -> Iterator[str]:
    """What is wrong with a checkpoint's files, one message a file.

    share: (number, of) cuts the work over ranks. deep: compare checksums, not only sizes. parts: what the names of the
    files to look at start with.
    """
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        yield str(error)
        return
    for name in sorted(name for name in manifest["files"] if name.startswith(parts))[share[0] :: share[1]]:
        problem = _damage_of(folder / name, manifest["files"][name], deep)
        if problem is not None:
            yield problem


def damage(folder: Path, **how: Any) -> str | None:
    """The first of `damages`, or None."""
    return next(damages(folder, **how), None)


def _damage_of(path: Path, entry: dict[str, Any], deep: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path} has {size} bytes where its manifest says {entry['bytes']}"
        whole = not deep or checksum(path, alive) == entry["checksum"]
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None if whole else f"{path} is damaged: its checksum is not the manifest's"


def find(path: str | Path, step: int | None = None) -> Path:
    """The checkpoint folder that a user means: a step's own folder, or a run folder's newest whole one.

    Raises DataError where there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() and (path / "trainer_state.json").is_file():
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
