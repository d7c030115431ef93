"""The trainer's command lines: `data_prep.cli` with the names that users of the trainer write."""

from collections.abc import Callable, Sequence

from data_prep import cli
from train.config import Config

ALIASES = {"checkpoint.": "saving."}
"""`checkpoint.every_steps=` reads better than the group's name; `checkpoint=` stays free for a path."""


def run_train(task: Callable[[Config], int | None], argv: Sequence[str] | None = None) -> int:
    """Compose and validate a training config, call `task`, return the exit status."""
    return cli.run("train", Config, task, program="train", aliases=ALIASES, argv=argv)


def compose_train(overrides: Sequence[str]) -> Config:
    """The training config of a command line's overrides, without running. Raises ConfigError."""
    return cli.compose("train", Config, overrides, ALIASES)
