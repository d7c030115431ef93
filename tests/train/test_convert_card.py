"""The model card says what the run folder and the dataset say, and leaves out what it cannot know."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import ConfigError, DataError
from data_prep.manifest import Manifest
from tests.train.convert_helpers import config_of, convert, model_of, weights_of, write_checkpoint
from tests.train.test_evaluate_tasks import CHOICES, CLOZE, write
from train import evaluate
from train.checkpoint.select import find, step_folder
from train.evaluate import EvaluateConfig

pytestmark = pytest.mark.unit


def test_the_card_of_a_run(tmp_path: Path, tiny_run: Path, tiny_dataset: Path) -> None:
    text = (convert(tiny_run, tmp_path / "away", "huggingface") / "README.md").read_text()
    front = text.split("---")[1]
    assert "language: [en, zh]" in front
    assert "library_name: transformers" in front
    validation = json.loads((tiny_run / "validation.jsonl").read_text().splitlines()[-1])
    assert "While training, at step 40." in text
    assert f"| all | {validation['loss']:,.4g} | {validation['perplexity']:,.4g} |" in text
    for language, part in validation["by_language"].items():
        assert f"| {language} | {part['loss']:,.4g} |" in text
    for source in Manifest.read(tiny_dataset).sources:
        counts = source.counts["train"]
        row = f"| {source.name} | {source.lang} | {counts.documents:,} | {counts.tokens:,} | "
        assert row in text
        assert all(f"{name} ({count})" in text for name, count in source.licence.items())
    assert "| steps | 40 in 1 attempt(s) |" in text
    assert "seed: 1\n" in text
    assert "![loss by step: training, held-out](loss.svg)" in text
    assert (tmp_path / "away" / "loss.svg").read_text().startswith("<svg ")


def evaluated(run: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """What `train.evaluate` writes of a run's two tasks."""
    tasks = [str(write(folder / f"{name}.jsonl", items)) for name, items in (("choices", CHOICES), ("cloze", CLOZE))]
    evaluate.main(EvaluateConfig(str(run), tasks=tasks, output=str(folder / "eval.json"), **settings))
    record: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return record


def test_tasks_of_the_run_and_of_an_evaluation(tmp_path: Path, tiny_run: Path) -> None:
    record = evaluated(tiny_run, tmp_path, quantise="int8")
    # The run's own, as it would have them with evaluation.tasks: of steps 20 and 40.
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    earlier = {"step": 20, "tasks": {"choices": {"kind": "choice", "chance": 0.4, "items": 4, "by_way": {}}}}
    kept = {"step": 40, "tasks": {name.upper(): task for name, task in record["tasks"].items()}}
    write(run / "tasks.jsonl", [earlier, kept])
    settings = {"evaluations": [str(tmp_path / "eval.json")]}
    text = (convert(run, tmp_path / "away", "huggingface", **settings) / "README.md").read_text()
    own, other = text.partition("## Tasks")[2].partition("By `train.evaluate`, the layers' matrices in int8")[::2]
    assert "While training, at step 40." in own
    assert len(record["tasks"]) == 2
    for name, task in record["tasks"].items():
        for way, found in task["by_way"].items():
            chance = f"{task['chance']:,.4g}" if "chance" in task else ""
            row = f"| {task['kind']} | {way} | {chance} | {found['accuracy']:,.4g} | "
            assert f"| {name.upper()} {row}" in own
            assert f"| {name} {row}" in other


def test_an_evaluation_of_another_step_or_no_evaluation_is_refused(tmp_path: Path, tiny_run: Path) -> None:
    target = tmp_path / "away"
    (tmp_path / "eval.json").write_text('{"step": 20, "loss": 1.0}')
    with pytest.raises(DataError, match=r"eval\.json is of step 20, and the checkpoint of step 40"):
        convert(tiny_run, target, "huggingface", evaluations=[str(tmp_path / "eval.json")])
    with pytest.raises(DataError, match=r"is no output of train\.evaluate"):
        convert(tiny_run, target, "huggingface", evaluations=[str(find(tiny_run) / "manifest.json")])
    with pytest.raises(ConfigError, match="evaluations= is for the card of what is written"):
        convert(tmp_path, target, "huggingface", evaluations=[str(tmp_path / "eval.json")])
    assert not target.exists()


def test_an_earlier_step_tells_its_own_history(tmp_path: Path, tiny_run: Path) -> None:
    text = (convert(step_folder(tiny_run, 20), tmp_path / "away", "glm_130b") / "README.md").read_text()
    assert "| steps | 20 in 1 attempt(s) |" in text
    assert "## Evaluation" not in text, "it was validated at step 40 only"
    assert "## Tasks" not in text
    assert "fp32 rotary angles" in text


def test_a_checkpoint_that_stands_alone(tmp_path: Path, tiny_dataset: Path) -> None:
    model = model_of()
    config = config_of(model, objective="blank_infilling")
    source = write_checkpoint(tmp_path / "source", config, weights_of(model), tiny_dataset)
    text = (convert(source, tmp_path / "away", "glm_130b", quantise="int4") / "README.md").read_text()
    assert "## Model" in text
    assert "int4 with an fp16 scale a row" in text
    assert not any(title in text for title in ("## Data", "## Training", "## Evaluation", "loss.svg"))
