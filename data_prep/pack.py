"""`python -m data_prep.pack data.path=DIR sequence_length=N`: which whole documents share a sequence.

Says how full the sequences are, here and in the folder's report.html. Stores the plan that
`data.sampling.pack_documents=true` reads, for one sequence length; a folder may hold several.
"""

import sys
from dataclasses import dataclass, field

from omegaconf import MISSING
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_prep.cli import run
from data_prep.config import DataConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from data_prep.files import write_bytes
from data_prep.packing import COLUMNS, PackPlan
from data_prep.report import with_packs


@dataclass
class PackConfig:
    """Everything `python -m data_prep.pack` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    """The dataset folder (`data.path`), and whether segments begin with ENC (`data.sampling.starts_with_enc`)."""
    sequence_length: int = MISSING
    """Slots a sequence, as the training run has them."""

    def __post_init__(self) -> None:
        if self.sequence_length != MISSING and self.sequence_length < 32:
            raise ConfigError(f"sequence_length={self.sequence_length} must be at least 32")


def main(config: PackConfig) -> int:
    """Store the plan and print how full it fills the sequences."""
    dataset = Dataset.open(config.data.path)
    plan = PackPlan.write(dataset, config.sequence_length, int(config.data.sampling.starts_with_enc))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("stream", "split") else "right")
    for row in plan.rows():
        table.add_row(*row)
    report = dataset.folder / "report.html"
    if report.exists():
        rows = [row for one in PackPlan.every(dataset) for row in one.rows()]
        write_bytes(report, with_packs(report.read_text(encoding="utf-8"), COLUMNS, rows).encode())
    console = Console()
    console.print(table)
    use = "data.sampling.isolate_documents=true data.sampling.pack_documents=true"
    console.print(f"{plan.folder} is ready: train with {use}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(run("pack", PackConfig, main, program="data_prep.pack"))
