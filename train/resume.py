"""Which keys may differ between a checkpoint's config and the one that resumes it."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_prep.errors import ConfigError

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
    "data.workers",
    "data.prefetch_batches",
    "data.overwrite",
    "run_dir",
    "max_steps",
    "max_samples",
    "micro_batch_size",
    "initialize_from",
)
"""Keys, or prefixes of keys, that change how a run is carried out but not what it computes."""


def check_same(now: str, before: Path, allow: list[str]) -> None:
    """Raise ConfigError for the first key that differs and may not.

    now: YAML of this run's config. before: the checkpoint's config.yaml. allow: `resume.allow`.
    """
    then = flat(OmegaConf.to_container(OmegaConf.load(before)))
    current = flat(OmegaConf.to_container(OmegaConf.create(now)))
    for key in sorted(set(then) | set(current)):
        if key.startswith(FREE) or key in allow or then.get(key) == current.get(key):
            continue
        raise ConfigError(
            f"{key}={current.get(key)}, but the checkpoint in {before.parent} was made with {key}={then.get(key)}; "
            f"put it back, allow it with resume.allow=[{key}], or start a new run_dir"
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested dictionaries."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    items: dict[str, Any] = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.")
    return items
