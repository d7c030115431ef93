"""`python -m launch.supervise` over the stand-in for the trainer."""

import sys

from launch.supervise import main

if __name__ == "__main__":
    sys.exit(main(module="tests.launch.fake_train"))
