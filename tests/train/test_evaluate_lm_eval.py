"""lm-eval's own loop over our models, on a local task; runs where the extra `lm-eval` is installed."""

import json

import pytest

from data_prep.dataset import Dataset
from tests.train.variants import untrained
from train.checkpoint.model import Trained
from train.config import Config

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.unit
TASK = """task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: c
doc_to_target: a
metric_list: [{metric: acc}]
"""


def test_a_local_task_runs(tiny_dataset, tmp_path):
    from lm_eval.tasks import TaskManager

    from train.lm_eval_adapter import Model

    lines = [{"q": "The old man sat", "c": ["down", "up"], "a": 0}, {"q": "天空是", "c": ["蓝色", "圆"], "a": 0}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "local.yaml").write_text(TASK % (tmp_path / "items.jsonl"), encoding="utf-8")
    model = untrained()
    trained = Trained(model, Dataset.open(tiny_dataset).tokenizer, Config(model=model.context.model), tmp_path)
    manager = TaskManager(include_path=str(tmp_path))
    result = lm_eval.simple_evaluate(
        model=Model(trained), tasks=["local_choice"], task_manager=manager, bootstrap_iters=0
    )
    assert result["results"]["local_choice"]["acc,none"] in (0.0, 0.5, 1.0)
