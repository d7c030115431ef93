"""A rank of `benchmarks.rendezvous`: notes when its process ran, beats for some seconds and ends."""

import os
import sys
import time
from pathlib import Path

from train.heartbeat import Heartbeat

if __name__ == "__main__":
    (run_dir,) = [Path(word.removeprefix("run_dir=")) for word in sys.argv[1:] if word.startswith("run_dir=")][-1:]
    rank = int(os.environ["RANK"])
    (run_dir / "started").mkdir(exist_ok=True)
    (run_dir / "started" / str(rank)).write_text(str(time.time()))
    heart = Heartbeat(run_dir, rank)
    heart.start()
    heart.now("step")
    time.sleep(float(os.environ["BEATING_SECONDS"]))
    heart.close()
