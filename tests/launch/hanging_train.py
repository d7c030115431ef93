"""`python -m train` with one rank that never comes to a step's all-reduce: its loader hands out a batch no more.

It happens once, on rank TIANKONG_HANG_RANK (1), when it reaches sample TIANKONG_HANG_AT; a file in the run folder
remembers that it has.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.batch import Batch
from train import trainer
from train.cli import run_train
from train.config import Config
from train.loading import open_loader


def hanging_loader(config: Config, *rest: Any) -> Iterator[Batch]:
    """The trainer's own loader, up to that sample."""
    done = Path(config.run_dir) / "has-hung"
    for batch in open_loader(config, *rest):
        late = int(batch.sample_index.max()) >= int(os.environ["TIANKONG_HANG_AT"])
        if late and os.environ["RANK"] == os.environ.get("TIANKONG_HANG_RANK", "1") and not done.exists():
            done.touch()
            wait_for_a_shard_that_never_comes()
        yield batch


def wait_for_a_shard_that_never_comes() -> None:
    time.sleep(3600)


if __name__ == "__main__":
    trainer.open_loader = hanging_loader
    status = run_train(trainer.main)
    sys.stdout.flush()
    os._exit(status)
