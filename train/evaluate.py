"""`python -m train.evaluate checkpoint=RUN data.sources='[held_out.jsonl.gz]' output=eval.json`: how good a model is.

Loss on held-out text: from a prepared folder (`data.path`, one of its held-out splits), from files that are cleaned and
tokenised here with the checkpoint's own tokenizer (`data.sources`), or, where neither is given, from the dataset that
the run was trained on. It is the mean over all targets, in nats. Beside it stands what a unigram model pays for the
same targets; its counts come from the run's training data, and `unigram_source` in the output says where they were
taken from instead when that is out of reach.

Tasks (`tasks='[choices.jsonl,cloze.jsonl]'`): multiple choice and cloze, see `train/tasks.py`.

One process, one device, weights only.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING
from rich.progress import track
from torch import Tensor

from data_prep import cli
from data_prep.batch import NUM_GROUPS
from data_prep.errors import ConfigError
from data_prep.files import write_bytes, write_json
from data_prep.samples import Sampler
from train import backend
from train.checkpoint.model import Trained, load_trained
from train.checkpoint.select import read_manifest
from train.evaluate_output import show
from train.held_out import SHARES, HeldOutConfig, held_out
from train.labels import Labels, inputs
from train.model.quantised import check_quantise
from train.scores import Baseline, summary, total
from train.tasks import Task, details, read_tasks, results, run_task

SPLITS = ("valid", "test")
CONTEXTS = ("both_ways", "one_way")


@dataclass
class EvaluateConfig:
    """One evaluation."""

    checkpoint: str = MISSING
    """Run folder (its newest whole checkpoint) or one step's folder."""
    data: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What to evaluate on."""
    split: str = "valid"
    """valid or test; data.sources are all one split."""
    samples: int | None = None
    """Samples to evaluate; null means every row once."""
    micro_batch_size: int = 8
    """Sequences in one forward pass."""
    sequence_length: int | None = None
    """Slots of a sample; null means the run's."""
    seed: int | None = None
    """Seed of the order and the masks; null means the run's, with which the same samples are seen as while training."""
    kind: str | None = None
    """gmask or mask: samples of this kind alone; null means the run's shares."""
    context: str = "both_ways"
    """both_ways, or one_way: what stands in front of a gMASK's target is read from the left only, with the [gMASK] at
    the start of the text (GLM as a left-to-right language model, arXiv 2103.10360, section 3.3)."""
    quantise: str | None = None
    """int8 or int4: the layers' matrices are rounded while loading; null leaves them."""
    quantise_group: int | None = None
    """Columns of a matrix that share a scale, such as 128; null means one scale a row."""
    tasks: list[str] = field(default_factory=list)
    """Task files, jsonl (see train/tasks.py); without data.path or data.sources they alone are evaluated."""
    task_items: int | None = None
    """Items of each task to take, from its start; null means all."""
    task_details: str | None = None
    """File for every item's scores, one JSON object a line; null writes none."""
    output: str | None = None
    """JSON file for the result; null prints it only."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"split={self.split} must be one of {', '.join(SPLITS)}")
        if self.kind not in (None, *SHARES):
            raise ConfigError(f"kind={self.kind} must be null or one of {', '.join(SHARES)}")
        if self.context not in CONTEXTS:
            raise ConfigError(f"context={self.context} must be one of {', '.join(CONTEXTS)}")
        if self.data.path is not None and self.data.sources:
            raise ConfigError(f"data.path={self.data.path} and data.sources are both given; give one of them")
        check_quantise(self.quantise, self.quantise_group)
        for name in ("samples", "micro_batch_size", "sequence_length", "task_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


def main(config: EvaluateConfig) -> int:
    """Evaluate, print the tables, write `output`. Raises ConfigError, DataError."""
    tasks = read_tasks(config.tasks, config.task_items)
    trained = load_trained(
        config.checkpoint, backend.device(), quantise=config.quantise, quantise_group=config.quantise_group
    )
    record: dict[str, Any] = {}
    if not tasks or config.data.path is not None or config.data.sources:
        with ExitStack() as stack:
            sampler, origin = held_out(
                trained,
                config.data,
                config.split,
                stack,
                sequence_length=config.sequence_length,
                seed=config.seed,
                kind=config.kind,
                one_way=config.context == "one_way",
            )
            samples = config.samples or sampler.rows
            record = evaluate(trained, sampler, samples, config.micro_batch_size)
        record |= {"seed": sampler.seed, "samples": samples, "sequence_length": sampler.sequence_length, **origin}
        record |= {"kind": config.kind, "context": config.context}
    if tasks:
        record["tasks"] = _run_tasks(config, trained, tasks)
    if config.quantise is not None:
        record |= {"quantise": config.quantise, "quantise_group": config.quantise_group}
    record |= {"checkpoint": str(trained.folder), "step": read_manifest(trained.folder)["step"]}
    if config.output is not None:
        write_json(config.output, record)
    show(record, config.output)
    return 0


def _run_tasks(config: EvaluateConfig, trained: Trained, tasks: list[Task]) -> dict[str, Any]:
    """Each task's results by its name; every item's scores go to `task_details`."""
    causal = trained.config.data.sampling.objective == "causal"
    found, lines = {}, []
    for task in track(tasks, description="tasks", transient=True, disable=_piped()):
        scores = run_task(trained.model, trained.tokenizer, task, causal=causal)
        found[task.name] = results(task, scores)
        lines += [json.dumps(line, ensure_ascii=False) + "\n" for line in details(task, scores)]
    if config.task_details is not None:
        write_bytes(config.task_details, "".join(lines).encode())
    return found


def evaluate(trained: Trained, sampler: Sampler, samples: int, micro_batch_size: int) -> dict[str, Any]:
    """Scores of the first `samples` samples: what `train.scores.summary` returns, and `by_domain`, by source."""
    whole, parts = Baseline(sampler), {}
    sums = torch.zeros(NUM_GROUPS, 2, dtype=torch.float64)
    for domain, indices in _domains(sampler, samples).items():
        baseline = Baseline(sampler)
        part = _evaluate_samples(trained, sampler, indices, micro_batch_size, baseline, domain)
        parts[domain] = total(part.tolist(), baseline)
        sums += part
        whole.merge(baseline)
    return {**summary(sums.tolist(), whole), "by_domain": parts}


def _domains(sampler: Sampler, samples: int) -> dict[str, list[int]]:
    """Sample indices by the source that they come from."""
    found: dict[str, list[int]] = {}
    for index in range(samples):
        found.setdefault(sampler.address(index).stream.info.name, []).append(index)
    return dict(sorted(found.items()))


def _evaluate_samples(
    trained: Trained, sampler: Sampler, indices: list[int], size: int, baseline: Baseline, name: str
) -> Tensor:
    """Sums by group of some samples, float64 [NUM_GROUPS, 2] on the host; the baseline counts them too."""
    device, head = trained.model.context.mesh.device, trained.model.head
    assert head is not None
    sums = torch.zeros(NUM_GROUPS, 2, dtype=torch.float64, device=device)
    for first in track(range(0, len(indices), size), description=name, transient=True, disable=_piped()):
        batch = sampler.batch(indices[first : first + size])
        baseline.add(batch)
        with torch.no_grad():
            hidden = trained.model(tuple(tensor.to(device) for tensor in inputs(batch)))
            sums += head.loss(hidden, Labels.of(batch).to(device))[2]
    return sums.cpu()


def _piped() -> bool:
    return not sys.stdout.isatty()


if __name__ == "__main__":
    sys.exit(cli.run("evaluate", EvaluateConfig, main, program="train.evaluate"))
