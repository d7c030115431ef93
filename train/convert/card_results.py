"""How good the model is, for its card: held-out loss and tasks, as the run and `train.evaluate` measured them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from train.report import Run
from train.run_folder import read_json

Record = dict[str, Any]


def read_evaluations(paths: Sequence[str], step: int) -> list[Record]:
    """Outputs of `train.evaluate`. Raises DataError for a file that is none, or one of another step's checkpoint."""
    found = []
    for name in paths:
        record = read_json(Path(name))
        if not isinstance(record, dict) or "step" not in record or not ("loss" in record or "tasks" in record):
            raise DataError(f"evaluations: {name} is no output of train.evaluate; give what its output= wrote")
        if record["step"] != step:
            raise DataError(
                f"evaluations: {name} is of step {record['step']}, and the checkpoint of step {step}; evaluate "
                "the one that is written"
            )
        found.append(record)
    return found


def results(run: Run | None, step: int, evaluations: Sequence[Record]) -> list[str]:
    """The sections: the run's last validation and tasks up to the step, its eval.json of exactly that step, and the
    given outputs."""
    held_out: list[tuple[str, Record]] = []
    tasks: list[tuple[str, Record]] = []
    if run is not None:
        for kept, records in ((held_out, run.validation), (tasks, run.tasks)):
            past = [record for record in records if record["step"] <= step]
            kept += [(f"While training, at step {past[-1]['step']:,}.", past[-1])] if past else []
        if run.evaluation.get("step") == step:
            evaluations = [run.evaluation, *evaluations]
    for record in evaluations:
        if "loss" in record:
            held_out.append((_origin(record, "samples"), record))
        if "tasks" in record:
            tasks.append((_origin(record), record))
    sections = []
    if held_out:
        sections.append("\n\n".join(["## Evaluation", *(_losses(title, record) for title, record in held_out)]))
    if tasks:
        sections.append("\n\n".join(["## Tasks", *(_tasks(title, record["tasks"]) for title, record in tasks)]))
    return sections


def _origin(record: Record, count: str | None = None) -> str:
    words = "By `train.evaluate`"
    if count is not None:
        words += f", {record[count]:,} {count} of {record['sequence_length']:,} slots"
    if record.get("quantise"):
        group = record.get("quantise_group")
        words += f", the layers' matrices in {record['quantise']}, a scale " + (f"every {group}" if group else "a row")
    return words + "."


def _losses(title: str, record: Record) -> str:
    parts = {"all": record, **record.get("by_language", {}), **record.get("by_kind", {})}
    if len(record.get("by_domain", {})) > 1:
        parts |= record["by_domain"]
    keys = ("loss", "perplexity", "bits_per_byte", "unigram_loss", "targets")
    rows = [(name, *(_number(part.get(key)) for key in keys)) for name, part in parts.items()]
    header = ("held-out text", "loss (nats a target)", "perplexity", "bits a byte", "unigram loss", "targets")
    return f"{title}\n\n" + table(header, rows)


def _tasks(title: str, tasks: Record) -> str:
    keys = ("accuracy", "accuracy_per_byte", "log_probability", "items")
    rows = [
        (task, record["kind"], way, _number(record.get("chance")), *(_number(found.get(key)) for key in keys))
        for task, record in tasks.items()
        for way, found in record["by_way"].items()
    ]
    header = ("task", "kind", "by", "chance", "accuracy", "accuracy a byte", "log probability (nats)", "items")
    return f"{title}\n\n" + table(header, rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
