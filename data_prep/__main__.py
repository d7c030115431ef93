"""`python -m data_prep data=sample`: make a dataset folder, with a progress bar and a summary."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_prep.cli import run
from data_prep.config import PrepConfig
from data_prep.prepare import Submitted, prepare
from data_prep.report import summary_table


def main(config: PrepConfig) -> int:
    """Prepare the folder and print what is in it."""
    console = Console()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    tasks: dict[str, object] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total or None)
        bar.update(tasks[stage], completed=done, total=total or None)  # type: ignore[arg-type]

    try:
        with bar:
            manifest, reused = prepare(config, show)
    except Submitted as submitted:
        console.print(str(submitted), soft_wrap=True, markup=False)
        return 0
    console.print(summary_table(manifest))
    folder = Path(config.data.path)
    if reused:
        last = f"{folder} is complete and was made with the same settings: kept as it is"
    else:
        last = f"{folder} is ready; {folder / 'report.html'} tells more"
    console.print(last, soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(run("data_prep", PrepConfig, main, program="data_prep"))
