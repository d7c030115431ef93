"""The engine beyond plain fp32: batch ramp-up, loss scale, bf16, recomputation, evaluation over layouts."""

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch

from data_prep.errors import RunFailed
from tests.train.parity import (
    BATCH,
    LR,
    OVERRIDES,
    SHRINK,
    batch_of,
    curves,
    in_ranks,
    my_batches,
    noisy_vectors,
    plain_curve,
    start_engine,
)
from train import backend
from train.cli import compose_train
from train.labels import Labels, inputs
from train.mesh import Mesh
from train.model.build import Model, named_layouts
from train.progress import last_alive
from train.schedule import BatchSize

TENSOR, PIPELINE = "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"
BESIDE = "parallel.overlap_tensor=true"
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
pytestmark = pytest.mark.distributed


def _ramped(overrides: list[str], steps: int) -> list[tuple[float, float]]:
    engine = start_engine(overrides)
    size_at, consumed, results = BatchSize.of(engine.config), 0, []
    for _ in range(steps):
        count = size_at(consumed)
        results.append(engine.step(my_batches(engine, consumed, count), LR, SHRINK))
        consumed += count
    return [(numbers.loss, numbers.grad_norm) for numbers in engine.read(results)]


def test_a_ramped_batch_counts_each_sample_alike() -> None:
    ramp = ["schedule.rampup_start=4", "schedule.rampup_increment=4", "schedule.rampup_samples=24"]
    size_at = BatchSize.of(compose_train([*OVERRIDES, *ramp]))
    assert [size_at(consumed) for consumed in (0, 4, 20, 24, 32)] == [4, 4, 4, 8, 8]
    one = in_ranks(1, _ramped, ramp, 9)
    for layout in ([], [PIPELINE]):
        for (loss, norm), (expected, expected_norm) in zip(in_ranks(2, _ramped, [*ramp, *layout], 9), one, strict=True):
            assert loss == pytest.approx(expected, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-5)
    # The first step's loss is the mean over its four samples.
    with noisy_vectors():
        model = Model(compose_train(OVERRIDES), Mesh.single(), torch.float32)
    loss, _, _ = model(inputs(batch_of(0, 4)), Labels.of(batch_of(0, 4)))
    assert one[0][0] == pytest.approx(float(loss.detach()), rel=1e-6)


def test_recomputed_activations_change_nothing() -> None:
    modes = [["none"], ["full"], ["attention"], ["ffn"], ["full", "parallel.activation_checkpointing_every_layers=3"]]
    words = [[f"parallel.activation_checkpointing={name}", *rest, *DROPOUT] for name, *rest in modes]
    pre = ["model.norm_placement=sandwich", "micro_batch_size=4"]
    shares = [TENSOR, "parallel.sequence_parallel=true", *pre]
    # What divides the ranks recomputes `full` for 20 steps in test_parity.py.
    for world, layout, tried in ((1, pre, words), (2, [PIPELINE, pre[1]], words), (2, shares, [words[0], *words[2:4]])):
        kept, *recomputed = curves(world, [[*layout, *mode] for mode in tried], 3)
        assert recomputed == [kept] * (len(tried) - 1), layout


def _measured(settings: list[list[str]]) -> list[list[Any]]:
    """Loss, norm and telemetry of four steps of each settings; every second step is measured."""
    found = []
    for overrides in settings:
        engine = start_engine(["precision=bf16", "logging.every_steps=2", *DROPOUT, *overrides])
        results = []
        for step in range(4):
            engine.guard.coming(step + 1)
            results.append(engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK))
        found.append([vars(numbers) for numbers in engine.read(results)])
        assert found[-1][1]["telemetry"] is not None
    return found


@pytest.mark.parametrize("world, layout", [(1, ["model.norm_placement=sandwich"]), (1, ["lora.rank=2"]), (2, [TENSOR])])
def test_layers_run_through_graphs_change_nothing(world: int, layout: list[str]) -> None:
    # On a CPU a graph is the very function that would be captured; what goes into it and comes out is the same.
    graphs, recomputed = "parallel.cuda_graphs=true", "parallel.activation_checkpointing=full"
    plain, *others = in_ranks(world, _measured, [layout, [*layout, graphs], [*layout, graphs, recomputed]])
    assert others[0] == plain
    losses = [[(numbers["loss"], numbers["grad_norm"]) for numbers in steps] for steps in (plain, others[1])]
    assert losses[1] == losses[0]


def test_graphs_are_given_up_before_the_communicators_that_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    graph = mock.Mock(reset=lambda: said.append("graph given up"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: said.append("group destroyed"))
    backend._graphs.add(graph)
    backend.stop()
    assert said == ["graph given up", "group destroyed"]


@pytest.mark.parametrize("layout", [[], [TENSOR], [PIPELINE], ["parallel.zero_stage=2"], ["parallel.zero_stage=3"]])
def test_bf16_stays_near_fp32(layout: list[str]) -> None:
    steps = 12
    expected = plain_curve([], steps)
    found = curves(2, [["precision=bf16", *layout]], steps)[0]
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-2)
        assert norm == pytest.approx(expected_norm, rel=5e-2)
    drop = expected[0][0] - expected[-1][0]
    assert found[0][0] - found[-1][0] == pytest.approx(drop, abs=0.05)


def _errors_of_sums(overrides: list[str]) -> dict[str, float]:
    """How far each parameter's sum is from that, in float64, of what the model gives for each micro-batch alone."""
    engine = start_engine(["precision=bf16", "optimizer.clip=1e9", *overrides])
    optimizer = engine.deepspeed.optimizer
    # The sums are read before they are emptied.
    with mock.patch.object(optimizer.optimizer, "step"), mock.patch.object(optimizer, "clear_hp_grads"):
        engine.step(my_batches(engine, 0, BATCH), LR, SHRINK)
    whole = [words for words in overrides if words != TENSOR]
    with noisy_vectors():
        model = Model(compose_train([*OVERRIDES, *whole]), Mesh.single(), torch.bfloat16).bfloat16()
    model.set_shrink(SHRINK, 1.0)
    expected = {at.name: torch.zeros_like(p, dtype=torch.float64) for at, p in named_layouts(model.parameters())}
    for first in range(0, BATCH, 2):
        model.zero_grad()
        for parameter in model.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        batch = batch_of(first, 2)
        loss, _, _ = model(inputs(batch), Labels.of(batch))
        (loss / (BATCH // 2)).backward()
        for at, parameter in named_layouts(model.parameters()):
            expected[at.name] += parameter.main_grad.double()
            if parameter.grad is not None:
                expected[at.name] += parameter.grad.double()
    errors = {}
    for at, parameter in named_layouts(engine.model.parameters()):
        wanted = at.cut(expected.pop(at.name))
        errors[at.name] = float((parameter.main_grad.double() - wanted).norm() / wanted.norm())
    assert not expected
    return errors


@pytest.mark.parametrize("world, layout", [(1, []), (1, ["model.tied_embeddings=false"]), (2, [TENSOR, BESIDE])])
def test_bf16_gradients_are_whole_fp32_sums(world: int, layout: list[str]) -> None:
    # The ranks' parts of a bf16 sum round in another order than the whole.
    tolerance = 0.004 if world == 1 else 0.02
    errors = in_ranks(world, _errors_of_sums, layout)
    assert {name: error for name, error in errors.items() if not error < tolerance} == {}


def _half(overrides: list[str], steps: int) -> list[dict[str, Any]]:
    from train import backend

    with mock.patch.object(type(backend.get_accelerator()), "is_fp16_supported", return_value=True):
        engine = start_engine(["precision=fp16", *overrides])
        results = [engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK) for step in range(steps)]
        state = engine.scaler_state()
        assert state["cur_scale"] == engine.loss_scale
    return [vars(numbers) for numbers in engine.read(results)]


@pytest.mark.parametrize("layout", [[], [TENSOR], [PIPELINE]])
def test_fp16_finds_its_loss_scale(layout: list[str]) -> None:
    steps = 16
    scale = ["precision.loss_scale_initial_power=24", "precision.loss_scale_hysteresis=1"]
    found = in_ranks(2, _half, [*scale, "precision.loss_scale_window=4", *layout], steps)
    skipped = [numbers["skipped"] for numbers in found]
    assert skipped[0]
    assert not all(skipped)
    for numbers, after in itertools.pairwise(found):
        if numbers["skipped"]:
            assert math.isinf(numbers["grad_norm"])
            assert after["loss_scale"] == numbers["loss_scale"] / 2
        else:
            assert after["loss_scale"] >= numbers["loss_scale"]
    assert max(numbers["loss_scale"] for numbers in found[-5:]) >= min(numbers["loss_scale"] for numbers in found)
    assert found[0]["loss_scale"] == 2**24
    assert found[-1]["loss"] < found[0]["loss"] + 0.05


def _floor() -> str:
    try:
        _half(["precision.loss_scale_initial_power=24", "precision.loss_scale_minimum=16777216"], 6)
    except RunFailed as error:
        return str(error)
    return "went on"


def test_an_overflow_at_the_floor_stops_with_a_reason() -> None:
    message = in_ranks(1, _floor)
    assert "precision.loss_scale_minimum=1.67772e+07" in message
    assert "resume.step" in message


def _evaluated(overrides: list[str]) -> list[list[float]]:
    engine = start_engine([*overrides, *DROPOUT])
    before = engine.evaluate(my_batches(engine, 0, BATCH))
    engine.step(my_batches(engine, 0, BATCH), LR, SHRINK)
    progress = last_alive()
    again = engine.evaluate(my_batches(engine, 0, BATCH))
    assert before != again
    assert last_alive() > progress or not engine.mesh.last_stage, "a long evaluation is no hang"
    sums: list[list[float]] = again
    return sums


def test_evaluation_is_the_same_in_every_layout() -> None:
    expected = torch.tensor(in_ranks(1, _evaluated, []))
    targets = (batch_of(0, BATCH).loss_weight > 0).sum()
    assert expected[:, 1].sum() == targets
    for layout in ([], [TENSOR], [PIPELINE], ["parallel.zero_stage=3"]):
        assert torch.allclose(torch.tensor(in_ranks(2, _evaluated, layout)), expected, rtol=1e-6)


def _different_batches() -> str:
    engine = start_engine([TENSOR])
    batches = my_batches(engine, 0, BATCH)
    if engine.mesh.tensor_rank == 1:
        batches[1].tokens[0, 3] += 1
    result = engine.step(batches, LR, SHRINK)
    try:
        engine.read([result])
    except RunFailed as error:
        return str(error)
    return "went on"


def test_ranks_that_read_different_batches_are_stopped() -> None:
    assert "read different batches" in in_ranks(2, _different_batches)
