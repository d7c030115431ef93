"""What `python -m train.evaluate` prints: a table of losses, one of tasks, and where the figures come from."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def show(record: dict[str, Any], output: str | None) -> None:
    """Print an evaluation's record; output: the file it went to."""
    console = Console()
    if "loss" in record:
        console.print(_losses(record))
    if "tasks" in record:
        console.print(_tasks(record["tasks"]))
    console.print(_notes(record, output), soft_wrap=True, markup=False, highlight=False)


def _losses(record: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for name in ("loss", "unigram", "perplexity", "bits/byte", "targets"):
        table.add_column(name, justify="right")
    rows = {"all": record, **record["by_language"], **record["by_kind"]}
    if len(record["by_domain"]) > 1:
        rows |= record["by_domain"]
    for name, row in rows.items():
        bits = row["bits_per_byte"]
        table.add_row(
            name,
            f"{row['loss']:.4f}",
            f"{row['unigram_loss']:.4f}",
            f"{row['perplexity']:,.2f}",
            "–" if bits is None else f"{bits:.4f}",
            f"{row['targets']:,}",
        )
    return table


def _tasks(tasks: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("by")
    for name in ("accuracy", "a byte", "chance", "log p", "items"):
        table.add_column(name, justify="right")
    for task, record in tasks.items():
        chance = f"{record['chance']:.4f}" if "chance" in record else "–"
        for way, found in record["by_way"].items():
            per_byte = f"{found['accuracy_per_byte']:.4f}" if "accuracy_per_byte" in found else "–"
            row = (
                f"{found['accuracy']:.4f}",
                per_byte,
                chance,
                f"{found['log_probability']:.3f}",
                f"{found['items']:,}",
            )
            table.add_row(task, way, *row)
    return table


def _notes(record: dict[str, Any], output: str | None) -> str:
    notes = [f"step {record['step']}"]
    if "loss" in record:
        notes[0] += f", {record['samples']:,} samples of {record['sequence_length']} slots"
        notes.append(f"unigram counts: {record['unigram_source']}")
        if record.get("rejected"):
            notes.append("kept out: " + ", ".join(f"{count} {reason}" for reason, count in record["rejected"].items()))
        if record["left_out"]:
            notes.append(f"less than one row, left out: {', '.join(record['left_out'])}")
    if output is not None:
        notes.append(f"written to {output}")
    return "\n".join(notes)
