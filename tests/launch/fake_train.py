"""A stand-in for `python -m train` under the supervisor: steps, checkpoints, beats and metrics, without a model.

<run_dir>/fault.json names one fault: {"rank", "step", "do"} with do = exit:STATUS, kill, stop, sleep or disk; it
happens once, or each time with "always". Ranks wait for each other after every step through files.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from train.heartbeat import Heartbeat

SAVE_EVERY, LAST, BATCH = 5, 20, 8


def main(run_dir: Path) -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    heart = Heartbeat(run_dir, rank)
    heart.start()
    saved = [int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*")]
    step = max(saved, default=0)
    metrics = run_dir / "metrics.jsonl"
    if rank == 0 and metrics.exists():
        kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step]
        metrics.write_text("".join(f"{line}\n" for line in kept))
    meeting = run_dir / f"meeting-{os.environ['MASTER_PORT']}"
    meeting.mkdir(exist_ok=True)
    while step < LAST:
        heart.now("step")
        misbehave(run_dir, rank, step)
        step += 1
        wait_for_all(meeting, rank, world, step)
        heart.now("data", step)
        if rank == 0:
            record = {"step": step, "consumed_samples": BATCH * step, "world": world, "job": os.environ["TIANKONG_JOB"]}
            with open(metrics, "a") as file:
                file.write(json.dumps(record) + "\n")
        stop = (meeting / f"stop-{step}").exists()
        if stopped and rank == 0:
            # After the next step, so that all ranks see it there.
            (meeting / f"stop-{step + 1}").touch()
        if step % SAVE_EVERY == 0 or stop:
            heart.now("save", step)
            (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
        if stop and step < LAST:
            heart.close()
            return 75
    heart.close()
    return 0


def wait_for_all(meeting: Path, rank: int, world: int, step: int) -> None:
    (meeting / f"{step}-{rank}").touch()
    while any(not (meeting / f"{step}-{other}").exists() for other in range(world)):
        time.sleep(0.02)
    time.sleep(float(os.environ.get("FAKE_PACE", "0.15")))


def misbehave(run_dir: Path, rank: int, step: int) -> None:
    file = run_dir / "fault.json"
    fault = json.loads(file.read_text()) if file.exists() else {}
    if fault.get("rank") != rank or fault["step"] != step:
        return
    if not fault.get("always"):
        file.unlink()
    # How many steps are redone must not depend on who is faster: rank 0 has written the last one.
    while len((run_dir / "metrics.jsonl").read_text().splitlines()) < step:
        time.sleep(0.01)
    do = fault["do"]
    if do.startswith("exit:"):
        print(f"planted: rank {rank} ends", file=sys.stderr)
        sys.exit(int(do.removeprefix("exit:")))
    elif do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif do == "kill agent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    elif do == "sleep":
        stuck_in_the_loader()


def stuck_in_the_loader() -> None:
    time.sleep(600)


if __name__ == "__main__":
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    sys.exit(main(Path(words["run_dir"])))
