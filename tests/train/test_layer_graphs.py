"""Layers through graphs: the passes that are captured train the same model, and no graph outlives its communicator.

A CPU has no graphs: the captured functions then run each time, so what is shown here is what they compute.
"""

import pytest
import torch

from tests.train.parity import curves
from train import backend

BF16 = ["precision=bf16", "parallel.zero_stage=1", "model.hidden_dropout=0.1", "logging.every_steps=2"]


@pytest.mark.distributed
def test_layers_through_graphs_train_the_same_model_on_two_tensor_ranks():
    words = [*BF16, "parallel.tensor_parallel=2"]
    plain, graphs = curves(2, [words, [*words, "parallel.cuda_graphs=true"]], 5)
    assert graphs == plain


class Graph:
    """Stands in for a device's graph."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def reset(self) -> None:
        self._said.append("graph given up")


@pytest.mark.unit
def test_graphs_are_given_up_before_the_communicators_that_they_hold(monkeypatch):
    said: list[str] = []
    graph = Graph(said)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: said.append("group destroyed"))
    backend._graphs.add(graph)
    backend.stop()
    assert said == ["graph given up", "group destroyed"]
