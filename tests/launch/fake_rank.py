"""A stand-in for `python -m train` under the launcher: what it does is named by FAKE_RANK."""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
behaviour = os.environ["FAKE_RANK"]


def join() -> None:
    """The process group of the real trainer."""
    import torch.distributed as dist

    dist.init_process_group("gloo")


def play(steps: list[list[str]], logs: Path) -> None:
    """Say, wait and end as told; a rank waits for words in another's log, so that no order hangs on the clock."""
    for verb, value in steps:
        if verb == "say":
            print(value, file=sys.stderr)
        elif verb == "sleep":
            time.sleep(float(value))
        elif verb == "await":
            log = logs / f"rank_{1 - rank}.log"
            while not (log.exists() and value in log.read_text()):
                time.sleep(0.02)
        elif verb == "exit":
            sys.exit(int(value))
        elif verb == "abort":
            if value == "closing":
                faulthandler.disable()  # as when no Python code runs any more
            os.abort()


def fail_while_others_wait(where: int) -> None:
    """One rank raises inside a step; the others wait for it in a collective and lose the connection."""
    import torch
    import torch.distributed as dist

    join()
    dist.all_reduce(torch.ones(1))
    if rank == where:
        raise RuntimeError("planted: the loss of this rank is broken")
    dist.all_reduce(torch.ones(1))


if behaviour == "play":
    play(json.loads(os.environ["FAKE_STEPS"])[rank], Path(os.environ["FAKE_LOGS"]))
elif behaviour == "hello":
    print(f"rank {rank} of {world} threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    print(f"warning of rank {rank}", file=sys.stderr)
    print("the same from all", file=sys.stderr)
    print("command", os.environ["TIANKONG_COMMAND"], "words", sys.argv[1:])
elif behaviour == "reduce":
    import torch
    import torch.distributed as dist

    join()
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    print("sum", total.item())
    dist.destroy_process_group()
elif behaviour.startswith("raise"):
    fail_while_others_wait(int(behaviour.removeprefix("raise")))
elif behaviour.startswith("close_first"):
    # The worst order: the connections are gone before the traceback is printed, and the process lingers.
    try:
        fail_while_others_wait(int(behaviour.removeprefix("close_first")))
    except RuntimeError as error:
        if "planted" not in str(error):
            raise
        import traceback

        import torch.distributed as dist

        dist.destroy_process_group()
        time.sleep(1.5)
        traceback.print_exc()
        time.sleep(1.0)
        sys.exit(1)
elif behaviour.startswith("exit"):
    where, status = behaviour.removeprefix("exit").split(":")
    if rank == int(where):
        print(f"train: shard {rank} is damaged", file=sys.stderr)
        sys.exit(int(status))
    time.sleep(60)
elif behaviour == "all_alike":
    time.sleep(0.1 * (world - rank))
    print("train: parallel.tensor_parallel=3 does not divide", file=sys.stderr)
    sys.exit(2)
elif behaviour == "killed":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
elif behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == 1:
        time.sleep(0.5)
        sys.exit(3)
    time.sleep(60)
elif behaviour in ("save", "slow_save"):
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    print("ready", flush=True)
    while not stopped:
        time.sleep(0.02)
    # The ranks of a real run end seconds apart.
    time.sleep(rank * 0.5 if behaviour == "save" else 60)
    print(f"saved by rank {rank} on {signal.Signals(stopped[0]).name}", flush=True)
    sys.exit(75)
elif behaviour == "wait":
    print("ready", flush=True)
    time.sleep(60)
elif behaviour == "logged_traceback":
    import traceback

    try:
        raise ValueError("harmless")
    except ValueError:
        traceback.print_exc()
    print("went on", file=sys.stderr)
else:
    raise SystemExit(f"unknown FAKE_RANK {behaviour}")
