"""Look at checkpoints.

    python -m train.checkpoint list RUN             each checkpoint of a run: step, size, layout
    python -m train.checkpoint verify RUN | STEP    compare every file with its checksum; names each damaged one
    python -m train.checkpoint diff A B             config keys, trainer state and tensors that differ, with norms

STEP is a step's folder (`RUN/checkpoints/step_…`); of a run folder `verify` takes all of them, `diff` the newest whole
one. Exit status: 0, or 3 where a file is damaged or missing; `diff` ends with 0 whether or not there is a difference.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import EXIT_DATA, EXIT_DONE, DataError
from train.checkpoint.inspect import TensorDifference, entries, problems, tensor_differences, value_differences
from train.checkpoint.select import find


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three commands; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="list | verify | diff")
    for name, task, paths in (("list", _list, 1), ("verify", _verify, 1), ("diff", _diff, 2)):
        command = commands.add_parser(name)
        command.add_argument("paths", nargs=paths, type=Path, metavar="RUN" if name == "list" else "RUN|STEP")
        command.set_defaults(task=task)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.task(*arguments.paths))
    except DataError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return EXIT_DATA


def _list(run_dir: Path) -> int:
    for entry in entries(run_dir):
        mark = "  <- latest" if entry.newest else ""
        if entry.problem is not None:
            print(f"{entry.step:>10}  {entry.problem}{mark}")
            continue
        size = f"{entry.size_bytes / 1e9:.3g} GB" if entry.size_bytes >= 1e8 else f"{entry.size_bytes / 1e6:.3g} MB"
        print(f"{entry.step:>10}  {size:>9}  {entry.layout}  {entry.dtype}  {entry.consumed_samples} samples{mark}")
    return EXIT_DONE


def _verify(path: Path) -> int:
    status = EXIT_DONE
    for folder, found in problems(path):
        if not found:
            print(f"{folder}: whole")
        for problem in found:
            print(problem)
            status = EXIT_DATA
    return status


def _diff(left: Path, right: Path) -> int:
    one, other = find(left), find(right)
    print(f"A {one}\nB {other}")
    alike = True
    for key, a, b in value_differences(one, other):
        alike = False
        print(f"{key}: {a} | {b}")
    for found in tensor_differences(one, other):
        alike = False
        if not isinstance(found, TensorDifference):
            print(found)
            continue
        share = found.difference / found.left if found.left else float("inf")
        print(
            f"{found.kind} {found.name}: |A-B| {found.difference:.4g} ({share:.2%} of |A|), "
            f"largest {found.largest:.4g}, |A| {found.left:.6g}, |B| {found.right:.6g}"
        )
    if alike:
        print("no difference")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
