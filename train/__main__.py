"""`python -m train model=tiny data.path=DIR run_dir=RUN`: one rank of a training run."""

import sys

from train.cli import run_train
from train.trainer import main

if __name__ == "__main__":
    sys.exit(run_train(main))
