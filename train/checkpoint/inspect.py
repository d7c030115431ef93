"""What a checkpoint holds, whether it is whole, and how two of them differ; no model is built."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.errors import DataError
from train.checkpoint.pieces import KINDS, PieceReader
from train.checkpoint.select import (
    LATEST,
    MANIFEST,
    checkpoint_steps,
    damage,
    damages,
    find,
    read_manifest,
    read_state,
    step_folder,
)


@dataclass(frozen=True)
class Entry:
    """One line of `list`. problem: what a look at names and sizes finds wrong, or None."""

    folder: Path
    step: int
    size_bytes: int
    layout: str
    dtype: str
    consumed_samples: int | None
    newest: bool
    problem: str | None


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of two checkpoints. difference, left, right: 2-norms of left - right and of each, in float64."""

    kind: str
    name: str
    difference: float
    largest: float
    """Largest absolute difference of an element."""
    left: float
    right: float


def entries(run_dir: Path) -> Iterator[Entry]:
    """Every finished checkpoint of a run, oldest first; raises DataError where there is none."""
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise DataError(f"{run_dir} holds no checkpoint; give a run folder")
    latest = run_dir / "checkpoints" / LATEST
    newest = latest.read_text("utf-8", errors="replace").strip() if latest.is_file() else ""
    for step in steps:
        yield _entry(step_folder(run_dir, step), step, newest)


def _entry(folder: Path, step: int, newest: str) -> Entry:
    try:
        manifest, state = read_manifest(folder), read_state(folder)
    except DataError as error:
        return Entry(folder, step, 0, "?", "?", None, folder.name == newest, str(error))
    size, cut = sum(entry["bytes"] for entry in manifest["files"].values()), manifest["layout"]
    layout = (
        f"DP {cut['data_parallel']} TP {cut['tensor_parallel']} PP {cut['pipeline_parallel']} ZeRO {cut['zero_stage']}"
    )
    problem = damage(folder, deep=False)
    return Entry(
        folder, step, size, layout, manifest["dtype"], state["consumed_samples"], folder.name == newest, problem
    )


def problems(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each checkpoint that `path` means (a step's folder, or all of a run), with every damaged file's message."""
    single = (path / MANIFEST).is_file()
    folders = [path] if single else [step_folder(path, step) for step in checkpoint_steps(path)]
    if not folders:
        find(path)
    for folder in folders:
        yield folder, list(damages(folder))


def value_differences(left: Path, right: Path) -> Iterator[tuple[str, Any, Any]]:
    """(key, left's value, right's value) where the configs, or the trainer's states (`state.…`), differ."""
    for prefix, one, other in (
        ("", _config(left), _config(right)),
        ("state.", flat(read_state(left)), flat(read_state(right))),
    ):
        for key in sorted(set(one) | set(other)):
            if one.get(key) != other.get(key):
                yield prefix + key, one.get(key), other.get(key)


def tensor_differences(left: Path, right: Path) -> Iterator[TensorDifference | str]:
    """Each tensor that differs, one at a time in memory; a sentence for one that only one side has or has otherwise.

    The layouts that wrote them may differ: full tensors are compared.
    """
    one, other = PieceReader(left), PieceReader(right)
    for kind in KINDS:
        for name in sorted(set(one.names(kind)) | set(other.names(kind))):
            if not one.has(kind, name) or not other.has(kind, name):
                yield f"{kind} of {name} is only in {left if one.has(kind, name) else right}"
            elif one.shape(kind, name) != other.shape(kind, name):
                yield f"{kind} of {name} has shape {list(one.shape(kind, name))} and {list(other.shape(kind, name))}"
            else:
                a, b = one.full(kind, name).double(), other.full(kind, name).double()
                if not torch.equal(a, b):
                    norms = [float(part.norm()) for part in (a - b, a, b)]
                    yield TensorDifference(kind, name, norms[0], float((a - b).abs().max()), *norms[1:])


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested dictionaries."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    items: dict[str, Any] = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.")
    return items


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        return flat(OmegaConf.to_container(OmegaConf.load(path)))
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
