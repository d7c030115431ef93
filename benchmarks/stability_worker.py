"""One run of `benchmarks.stability`: imports everything, waits for its words on standard input, then trains as
`python -m train` does.

What it waits for is one JSON object: `words` of the command line, `log` (a file that takes over the output), `cores`.
"""

import json
import os
import sys

from train.cli import run_train
from train.trainer import main


def wait_and_train() -> int:
    """The run's exit status; 0 where no run came."""
    line = sys.stdin.readline()
    if not line:
        return 0
    task = json.loads(line)
    os.sched_setaffinity(0, task["cores"])
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    return run_train(main, task["words"])


if __name__ == "__main__":
    status = wait_and_train()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
