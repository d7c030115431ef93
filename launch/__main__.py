"""python -m launch: start the ranks of a training run.

    python -m launch cluster=local cluster.processes=4 model=tiny data.path=DIR run_dir=RUN parallel.tensor_parallel=2

takes every key of `python -m train`. The config is composed and checked here first, so that a wrong key costs a second
and starts nothing; the ranks then run `python -m train` with the same words.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import cli
from data_prep.errors import EXIT_CONFIG, ConfigError
from train.cli import ALIASES
from train.config import Config
from train.rules import check
from train.run_folder import COMMAND_VARIABLE


def main(argv: Sequence[str] | None = None, *, module: str = "train") -> int:
    """Launch `python -m <module>` on every rank of a training config; returns the exit status.

    argv: the user's words; default those of this process. 2 for a wrong setting before anything starts, 0, 75, 3 and
    any other status as the ranks ended.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-m" in words or "--multirun" in words:
        # Refused before Hydra writes its multirun.yaml.
        print("launch: --multirun is one process a run: use `python -m train --multirun`", file=sys.stderr)
        return EXIT_CONFIG

    def task(config: Config) -> int:
        return launch(config, words, module)

    return cli.run("train", Config, task, program="launch", aliases=ALIASES, argv=words)


def launch(config: Config, words: Sequence[str], module: str) -> int:
    """Start the ranks of a checked config with the user's words."""
    if config.cluster.launcher != "local":
        raise ConfigError(f"cluster.launcher={config.cluster.launcher} is not known; use local")
    if "-m" in words or "--multirun" in words:
        raise ConfigError(
            "--multirun starts one process a run: use `python -m train --multirun`, or a loop of launches"
        )
    processes = process_count(config)
    check(config, world_size=processes)
    # 2 s of torch, which a wrong setting need not wait for.
    from launch.agent import module_command, run_ranks, thread_count

    os.environ.setdefault(COMMAND_VARIABLE, shlex.join(["python", "-m", "launch", *words]))
    os.environ["OMP_NUM_THREADS"] = thread_count(processes)
    return run_ranks(module_command(module, words), processes, Path(config.run_dir) / "logs")


def process_count(config: Config) -> int:
    """Ranks on this machine: cluster.processes, else one an accelerator, else one. Raises ConfigError."""
    cluster = config.cluster
    if cluster.processes is not None and cluster.processes < 1:
        raise ConfigError(f"cluster.processes={cluster.processes} must be at least 1")
    found = accelerators()
    if cluster.processes is not None:
        if found and cluster.processes > found:
            raise ConfigError(f"cluster.processes={cluster.processes}, but this machine has {found} accelerators")
        return cluster.processes
    if cluster.gpus_per_node is None:
        return found or 1
    if cluster.gpus_per_node < 1 or cluster.gpus_per_node > found:
        raise ConfigError(
            f"cluster.gpus_per_node={cluster.gpus_per_node}, but this machine has {found} accelerators; "
            "leave it null to use them all, or set cluster.processes"
        )
    return cluster.gpus_per_node


def accelerators() -> int:
    """Accelerators that torch sees on this machine."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


if __name__ == "__main__":
    sys.exit(main())
