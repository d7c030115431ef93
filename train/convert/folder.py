"""A folder that appears under its name only when it is whole, and how tensors are shared out over its files."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import ConfigError, DataError
from data_prep.files import sync_folder, write_error
from train.checkpoint.tensor_file import Spec


@contextmanager
def whole_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into; renamed to `target` when the block ends without an error, removed otherwise.

    Raises ConfigError where the target exists, DataError where the disk cannot hold `needed_bytes` or refuses.
    """
    if target.exists():
        raise ConfigError(f"target={target} exists already; give a new folder, or remove it")
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes:
            raise DataError(
                f"{target}: needs {needed_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; free some space"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for folder in {path.parent for path in partial.rglob("*")}:
            sync_folder(folder)
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def shards(specs: Sequence[Spec], limit: float) -> list[list[Spec]]:
    """Tensors in order, cut into files of at most `limit` bytes; a larger tensor stands alone."""
    found: list[list[Spec]] = []
    size = 0
    for spec in specs:
        if not found or size + spec.bytes > limit:
            found.append([])
            size = 0
        found[-1].append(spec)
        size += spec.bytes
    return found
