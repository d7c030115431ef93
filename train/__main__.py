"""`python -m train model=tiny data.path=DIR run_dir=RUN`: one rank of a training run."""

import os
import sys

from train.cli import run_train
from train.trainer import main

if __name__ == "__main__":
    status = run_train(main)
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk by now. A library's thread that aborts while the interpreter is torn down must not turn a
    # finished or stopped run into a crash.
    os._exit(status)
