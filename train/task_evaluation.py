"""Tasks during training: scored on the model as it is, their items divided over the data-parallel ranks."""

from typing import Any

from data_prep.tokenizer import Tokenizer
from train.collective import gather, together
from train.config import Config
from train.engine import Engine
from train.generation.scoring import Score
from train.tasks import read_tasks, results, run_task


class TaskEvaluation:
    """The tasks of `evaluation.tasks`, the first `evaluation.task_items` items of each; all ranks call it together.

    Each replica needs the whole model between its tensor-parallel ranks (`train.rules` sees to it).
    """

    def __init__(self, config: Config, engine: Engine, tokenizer: Tokenizer) -> None:
        """Raises ConfigError, DataError."""
        self._engine, self._tokenizer = engine, tokenizer
        self._causal = config.data.sampling.objective == "causal"
        self._tasks = together(engine.mesh, lambda: read_tasks(config.evaluation.tasks, config.evaluation.task_items))

    def run(self, step: int) -> dict[str, Any]:
        """{step, tasks: results by the task's name}, the same on every rank."""
        return {"step": step, "tasks": {task.name: results(task, self._scores(task)) for task in self._tasks}}

    def _scores(self, task: Any) -> dict[str, list[list[Score]]]:
        mesh, model = self._engine.mesh, self._engine.model
        model.eval()
        try:
            mine = together(
                mesh,
                lambda: run_task(model, self._tokenizer, task, causal=self._causal, share=(mesh.data_rank, mesh.data)),
            )
        finally:
            model.train()
        whole: dict[str, list[list[Score]]] = {}
        for part in gather(mesh, mine):
            for way, rows in part.items():
                kept = whole.setdefault(way, [[] for _ in task.items])
                for number, row in enumerate(rows):
                    kept[number] = kept[number] or row
        return whole
