"""python -m launch: start the ranks of a training run.

    python -m launch cluster=local cluster.processes=4 model=tiny data.path=DIR run_dir=RUN parallel.tensor_parallel=2

takes every key of `python -m train`. cluster.launcher=ssh, slurm and kubernetes start them on several machines;
`dry_run=true` shows how and starts nothing. The config is composed and checked here first, so that a wrong key costs a
second and starts nothing; the ranks then run `python -m train` with the same words.
"""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep import cli
from data_prep.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from data_prep.files import write_bytes
from launch.starters import LocalStarter, SshStarter, Starter, read_hostfile
from launch.supervise import present_nodes, supervise
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
    dry_run = "dry_run=true" in words
    words = [word for word in words if word not in ("dry_run=true", "dry_run=false")]
    if "-m" in words or "--multirun" in words:
        # Refused before Hydra writes its multirun.yaml.
        print("launch: --multirun is one process a run: use `python -m train --multirun`", file=sys.stderr)
        return EXIT_CONFIG

    def task(config: Config) -> int:
        return launch(config, words, module, dry_run=dry_run)

    return cli.run("train", Config, task, program="launch", aliases=ALIASES, argv=words)


def launch(config: Config, words: Sequence[str], module: str, *, dry_run: bool = False) -> int:
    """Start the ranks of a checked config with the user's words, or only show how."""
    os.environ.setdefault(COMMAND_VARIABLE, shlex.join(["python", "-m", "launch", *words]))
    launcher = config.cluster.launcher
    if launcher == "local":
        return _launch_here(config, words, module, dry_run)
    _check_nodes(config)
    if launcher == "ssh":
        return _launch_by_ssh(config, words, module, dry_run)
    from launch import kubernetes, slurm

    name, render, submit = {
        "slurm": ("job.sbatch", slurm.render, slurm.submit),
        "kubernetes": ("job.yaml", kubernetes.render, kubernetes.submit),
    }[launcher]
    text = render(config, words)
    if dry_run:
        print(text, end="")
        return EXIT_DONE
    file = Path(config.run_dir) / name
    write_bytes(file, text.encode())
    return submit(config, file)


def _launch_here(config: Config, words: Sequence[str], module: str, dry_run: bool) -> int:
    processes = process_count(config)
    check(config, world_size=processes)
    # 2 s of torch, which a wrong setting need not wait for.
    from launch.agent import module_command, run_ranks, thread_count

    if dry_run:
        print(f"{processes} x {shlex.join(module_command(module, words))}")
        return EXIT_DONE
    os.environ["OMP_NUM_THREADS"] = thread_count(processes)
    if config.cluster.max_restarts:
        config.cluster.processes = processes
        return supervise(config, words, module, LocalStarter)
    return run_ranks(module_command(module, words), processes, Path(config.run_dir) / "logs")


def _launch_by_ssh(config: Config, words: Sequence[str], module: str, dry_run: bool) -> int:
    starter = starter_of(config)
    if dry_run:
        shown = starter(config.cluster.supervisor_port, "TOKEN")
        assert isinstance(shown, SshStarter)
        print("\n".join(shlex.join(shown.command(host)) for host in shown.names))
        return EXIT_DONE
    return supervise(config, words, module, starter)


def starter_of(config: Config) -> Callable[[int, str], Starter]:
    """How agents get onto the nodes that the config names, given the supervisor's port and token."""
    cluster = config.cluster
    if cluster.launcher == "local":
        return LocalStarter
    if cluster.launcher == "ssh":
        hosts = read_hostfile(cluster.ssh.hostfile)
        return lambda port, token: SshStarter(cluster, hosts, port, token)
    return present_nodes()


def _check_nodes(config: Config) -> None:
    """Rules of the whole job, as far as they are known before a node has answered."""
    cluster = config.cluster
    ranks = cluster.processes or cluster.gpus_per_node
    check(config, world_size=None if ranks is None else cluster.nodes * ranks)


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
