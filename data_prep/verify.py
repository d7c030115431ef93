"""`python -m data_prep.verify data.path=DIR`: read every shard and compare it with its checksum in the manifest.

A training run compares sizes only, since reading terabytes would take hours at each start. Ends with 3 where a file is
not what it was, each one named.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from data_prep.cli import run
from data_prep.config import DataConfig
from data_prep.dataset import Dataset
from data_prep.errors import DataError


@dataclass
class VerifyConfig:
    """Everything `python -m data_prep.verify` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    """The dataset folder (`data.path`)."""


def main(config: VerifyConfig) -> int:
    """Print what is damaged. Raises DataError if anything is."""
    console = Console(stderr=True)
    dataset = Dataset.open(config.data.path)
    files = dataset.checksums
    with console.status("") as status:

        def tell(path: Path) -> None:
            status.update(f"reading {path}")

        problems = list(dataset.damages(tell))
    size = sum(path.stat().st_size for path in files if path.exists())
    if problems:
        raise DataError("\n".join([*problems, f"{len(problems)} of {len(files)} files are damaged"]))
    print(f"{config.data.path}: {len(files)} files, {size:,} bytes, all as the manifest says")
    return 0


if __name__ == "__main__":
    sys.exit(run("verify", VerifyConfig, main, program="data_prep.verify"))
