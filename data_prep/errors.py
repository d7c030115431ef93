"""The errors a user can cause, and the exit status each one means.

Every command maps them the same way (`data_prep.cli`): a launcher or a batch script can tell a wrong setting from a
broken file without reading the text.
"""

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_STOPPED = 75
"""Stopped after a save: the same command resumes (EX_TEMPFAIL of sysexits.h)."""


class ConfigError(ValueError):
    """A setting is wrong. The message names the key, its value and what would be right."""


class DataError(RuntimeError):
    """A file is missing, damaged or unreadable. The message names the path and what to do."""


class RunFailed(RuntimeError):
    """Training cannot go on: non-finite numbers, a loss scale at its floor, ranks that disagree. The message says which
    step, rank and layer, and what to try."""


class RankFailed(RunFailed):
    """One rank cannot go on and the others do not know: no collective may follow."""


class Stopped(Exception):
    """The run was asked to stop and has saved itself; the message holds the command that resumes it."""
