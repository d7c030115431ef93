"""Tasks while training: on their own schedule, the same from any layout, in the run folder and the report."""

import json
from pathlib import Path

import pytest

from data_prep.errors import ConfigError
from tests.train.test_evaluate_tasks import CHOICES, CLOZE, write
from train import rules
from train.cli import compose_train
from train.report import write_report
from train.run_folder import read_log


def words(folder: Path) -> list[str]:
    tasks = write(folder / "choices.jsonl", CHOICES), write(folder / "cloze.jsonl", CLOZE)
    return [f"evaluation.tasks=[{tasks[0]},{tasks[1]}]", "evaluation.tasks_every_steps=2", "evaluation.task_items=3"]


@pytest.mark.e2e
def test_tasks_run_now_and_then_and_show_in_the_report(command, tiny_overrides, tmp_path):
    run = [*tiny_overrides, *words(tmp_path), "max_steps=5"]
    command("train", *run, f"run_dir={tmp_path / 'run'}")
    records = read_log(tmp_path / "run" / "tasks.jsonl")
    assert [record["step"] for record in records] == [2, 4, 5]
    assert {name: task["items"] for name, task in records[0]["tasks"].items()} == {"choices": 3, "cloze": 2}
    # Killed between the last save and the last evaluation, the same command makes up for it.
    log = tmp_path / "run" / "tasks.jsonl"
    log.write_text("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    command("train", *run, f"run_dir={tmp_path / 'run'}")
    assert [(one["step"], one["tasks"]) for one in read_log(log)] == [(one["step"], one["tasks"]) for one in records]
    # What the checkpoint gives afterwards is what the run saw at its end.
    output = tmp_path / "eval.json"
    task_files = f"tasks=[{tmp_path / 'choices.jsonl'},{tmp_path / 'cloze.jsonl'}]"
    command("train.evaluate", f"checkpoint={tmp_path / 'run'}", task_files, "task_items=3", f"output={output}")
    again = json.loads(output.read_text(encoding="utf-8"))["tasks"]
    for name, task in records[-1]["tasks"].items():
        for way, found in task["by_way"].items():
            assert again[name]["by_way"][way] == pytest.approx(found, rel=1e-5)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "choices" in page
    assert "chance" in page


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", [["parallel.tensor_parallel=2"], ["parallel.zero_stage=2"]], ids=["tp", "zero_2"])
def test_every_layout_sees_the_same(command, tiny_overrides, tmp_path, layout):
    run = [*tiny_overrides, *words(tmp_path), "max_steps=2"]
    command("train", *run, f"run_dir={tmp_path / 'one'}")
    command("launch", "cluster=local", "cluster.processes=2", *run, *layout, f"run_dir={tmp_path / 'two'}")
    one, two = (read_log(tmp_path / name / "tasks.jsonl")[-1]["tasks"] for name in ("one", "two"))
    for name, task in one.items():
        for way, found in task["by_way"].items():
            assert two[name]["by_way"][way] == pytest.approx(found, rel=1e-4)


@pytest.mark.unit
def test_layouts_that_divide_the_model_otherwise_are_refused(tiny_overrides):
    for layout in ("parallel.pipeline_parallel=2", "parallel.zero_stage=3"):
        with pytest.raises(ConfigError, match=r"evaluation\.tasks needs the whole model in each replica"):
            rules.check(compose_train([*tiny_overrides, "evaluation.tasks=[t.jsonl]", layout, "run_dir=R"]))
