"""python -m launch.supervise WORDS: the supervisor of a job whose agents something else starts.

Slurm's batch script and Kubernetes' first pod run it; people run `python -m launch`. TIANKONG_NODES names the nodes in
their order, TIANKONG_TOKEN is the word by which agents and supervisor know each other.
"""

import os
import secrets
import sys
from collections.abc import Callable, Sequence

from data_prep import cli
from data_prep.errors import ConfigError
from launch.crew import Crew
from launch.starters import PresentStarter, Starter
from launch.supervisor import Supervisor
from launch.wire import TOKEN_VARIABLE, Switchboard
from train.cli import ALIASES
from train.config import Config
from train.rules import check

NODES_VARIABLE = "TIANKONG_NODES"


def supervise(config: Config, words: Sequence[str], module: str, starter: Callable[[int, str], Starter]) -> int:
    """Run a job on the nodes of a starter, which is made of the supervisor's port and token; returns the exit status.

    Raises ConfigError for what is wrong with a node, RunFailed when too few are left.
    """
    return muster(config, words, module, starter).run()


def muster(config: Config, words: Sequence[str], module: str, starter: Callable[[int, str], Starter]) -> Supervisor:
    """The supervisor of a job with its listening port; nothing is started yet."""
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_hex(16)
    board = Switchboard(config.cluster.supervisor_port, token)
    crew = Crew(board, starter(board.port, token), config.cluster.silent_seconds)
    return Supervisor(config, words, module, crew)


def present_nodes() -> Callable[[int, str], Starter]:
    """The nodes of a batch script or pod, whose agents come by themselves. Raises ConfigError outside of one."""
    names = [name for name in os.environ.get(NODES_VARIABLE, "").split(",") if name]
    if not names or TOKEN_VARIABLE not in os.environ:
        raise ConfigError(
            f"{NODES_VARIABLE} and {TOKEN_VARIABLE} are not set: this works inside a job's script; use python -m launch"
        )
    return lambda port, token: PresentStarter(names)


def main(argv: Sequence[str] | None = None, *, module: str = "train") -> int:
    """Supervise `python -m <module>` on the nodes that TIANKONG_NODES names; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)

    def task(config: Config) -> int:
        check(config)
        return supervise(config, words, module, present_nodes())

    return cli.run("train", Config, task, program="launch", aliases=ALIASES, argv=words)


if __name__ == "__main__":
    sys.exit(main())
