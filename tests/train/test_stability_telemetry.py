"""Norms by group: against plain PyTorch in one process, and the same under every layout."""

import math
from typing import Any
from unittest import mock

import pytest
import torch

from tests.train.parity import BATCH, LR, OVERRIDES, SHRINK, batch_of, in_ranks, my_batches, noisy_vectors, start_engine
from train.cli import compose_train
from train.labels import Labels, inputs
from train.mesh import Mesh
from train.model.build import Model, named_layouts
from train.stability.groups import group_of

STEPS = 3
MEASURED = ["logging.every_steps=1", "kernels.interval_attention=reference", "model.qk_norm=true"]
TENSOR, PIPELINE = "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"


@pytest.mark.unit
def test_groups_follow_the_canonical_names() -> None:
    named = {
        "word_embeddings.weight": "embedding",
        "position_embeddings.weight": "embedding",
        "embedding_norm.bias": "embedding",
        "layers.12.attention.query_key_value.weight": "layers.12.attention",
        "layers.12.attention_output_norm.weight": "layers.12.norms",
        "layers.3.mlp.dense_4h_to_h.bias": "layers.3.ffn",
        "layers.3.mlp_output_norm.weight": "layers.3.norms",
        "layers.0.input_norm.weight": "layers.0.norms",
        "final_norm.weight": "head",
        "lm_head.weight": "head",
    }
    assert {name: group_of(name) for name in named} == named


def plain_telemetry() -> list[dict[str, dict[str, float]]]:
    """The same numbers from a plain loop, module hooks and the difference of the weights."""
    config = compose_train([*OVERRIDES, *MEASURED])
    with noisy_vectors():
        model = Model(config, Mesh.single(), torch.float32)
    names = {layout.name: parameter for layout, parameter in named_layouts(model.parameters())}
    decay = {name: 0.1 if parameter.dim() > 1 else 0.0 for name, parameter in names.items()}
    groups = [{"params": [parameter], "weight_decay": decay[name]} for name, parameter in names.items()]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    model.set_shrink(SHRINK, 1.0)
    seen: dict[str, float] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_: Any, __: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            seen[name] = float(out.detach().double().square().mean().sqrt())

        module.register_forward_hook(hook)

    for index, layer in enumerate(model.items[1:-1]):
        watch(f"layers.{index}.attention", layer.attention)
        watch(f"layers.{index}.ffn", layer.ffn)
        watch(f"layers.{index}.norms", layer)
    found = []
    for step in range(STEPS):
        batch = batch_of(step * BATCH, BATCH)
        seen["embedding"] = float(
            names["word_embeddings.weight"].detach()[batch.tokens].double().square().mean().sqrt()
        )
        optimizer.zero_grad()
        loss, _, _ = model(inputs(batch), Labels.of(batch))
        loss.backward()
        kinds: dict[str, dict[str, float]] = {"gradient": {}, "weight": {}, "update": {}, "activation": dict(seen)}
        before = {name: parameter.detach().double().clone() for name, parameter in names.items()}
        gradients = {name: parameter.grad.double().clone() for name, parameter in names.items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, parameter in names.items():
            moved = parameter.detach().double() - before[name] * (1 - LR * decay[name])
            for kind, tensor in (("gradient", gradients[name]), ("weight", parameter.detach()), ("update", moved)):
                group = kinds[kind]
                group[group_of(name)] = group.get(group_of(name), 0.0) + float(tensor.double().square().sum())
        moved = [names[name].detach() - before[name] for name in names if before[name].dim() == 1]
        for kind in ("gradient", "weight", "update"):
            kinds[kind] = {name: math.sqrt(value) for name, value in kinds[kind].items()}
        kinds["vectors"] = {"update": math.sqrt(sum(float(change.square().sum()) for change in moved))}
        found.append(kinds)
    return found


def telemetry(layouts: list[list[str]]) -> list[list[tuple[dict[str, float], dict[str, Any]]]]:
    """(what the guard saw, telemetry) of each step in each layout."""
    curves = []
    for layout in layouts:
        engine = start_engine([*MEASURED, *layout])
        results = []
        for step in range(STEPS):
            engine.guard.coming(step + 1)
            results.append(engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK))
        numbers = engine.read(results)
        assert all(one.seen["grad_norm"] == pytest.approx(one.grad_norm, rel=1e-5) for one in numbers)
        curves.append([(one.seen, one.telemetry) for one in numbers])
    return curves


def compare(found: dict[str, Any], wanted: dict[str, Any], rel: float) -> None:
    for kind, groups in wanted.items():
        for group, value in groups.items():
            assert found[kind][group] == pytest.approx(value, rel=rel), (kind, group)


@pytest.fixture(scope="module")
def alone() -> list[tuple[dict[str, float], dict[str, Any]]]:
    return in_ranks(1, telemetry, [["parallel.zero_stage=0"]])[0]


@pytest.mark.distributed
def test_one_process_tells_what_a_plain_loop_finds(alone: list[tuple[dict[str, float], dict[str, Any]]]) -> None:
    for step, ((seen, found), wanted) in enumerate(zip(alone, plain_telemetry(), strict=True)):
        repeats = [math.log(len(row) / len(set(row))) for row in batch_of(step * BATCH, BATCH).tokens.tolist()]
        assert seen["repetition"] == pytest.approx(sum(repeats) / BATCH)
        assert seen["update_size"] == pytest.approx(wanted.pop("vectors")["update"], rel=1e-5)
        # Weights move by LR a step, and the difference of two fp32 weights is rounded to about 1e-4 of that.
        compare({"update": found["update"]}, {"update": wanted.pop("update")}, rel=1e-3)
        compare(found, wanted, rel=2e-5)
        assert seen["embedding_grad_norm"] == pytest.approx(wanted["gradient"]["embedding"], rel=1e-5)
        assert set(found["max_logit"]) == {f"layers.{index}" for index in range(4)}
        assert all(0 < value < 50 for value in found["max_logit"].values())
        assert "fp16" not in found


LAYOUTS = {
    2: [[], ["parallel.zero_stage=0"], ["parallel.zero_stage=2"], ["parallel.zero_stage=3"], [TENSOR], [PIPELINE]],
    4: [[TENSOR, PIPELINE], [PIPELINE, "parallel.activation_checkpointing=full"]],
}


@pytest.mark.distributed
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_tells_the_same(world: int, alone: list[tuple[dict[str, float], dict[str, Any]]]) -> None:
    for layout, curve in zip(LAYOUTS[world], in_ranks(world, telemetry, LAYOUTS[world]), strict=True):
        for (seen, found), (wanted_seen, wanted) in zip(curve, alone, strict=True):
            # Adam's first steps magnify rounding where a gradient is nearly nothing.
            assert seen["update_size"] == pytest.approx(wanted_seen["update_size"], rel=1e-4), layout
            assert seen == pytest.approx({**wanted_seen, "update_size": seen["update_size"]}, rel=1e-5), layout
            compare({"update": found["update"]}, {"update": wanted["update"]}, rel=1e-4)
            compare(found, {kind: value for kind, value in wanted.items() if kind != "update"}, rel=2e-5)


def _half(precision: str) -> tuple[list[float], dict[str, Any]]:
    from train import backend

    with mock.patch.object(type(backend.get_accelerator()), "is_fp16_supported", return_value=True):
        engine = start_engine([*MEASURED, f"precision={precision}", "precision.loss_scale=1024"])
        engine.guard.coming(1)
        numbers = engine.read([engine.step(my_batches(engine, 0, BATCH), LR, SHRINK)])[0]
    assert numbers.telemetry is not None
    return [numbers.seen["grad_norm"], numbers.grad_norm], numbers.telemetry


@pytest.mark.distributed
def test_half_precision_is_measured_without_its_scale(alone: list[tuple[dict[str, float], dict[str, Any]]]) -> None:
    seen, wanted = alone[0]
    for precision in ("fp16", "bf16"):
        norms, found = in_ranks(2, _half, precision)
        assert norms == pytest.approx([seen["grad_norm"]] * 2, rel=2e-2)
        compare({"weight": found["weight"]}, {"weight": wanted["weight"]}, rel=1e-3)
        assert found["gradient"]["layers.1.ffn"] == pytest.approx(wanted["gradient"]["layers.1.ffn"], rel=5e-2)
        assert ("fp16" in found) == (precision == "fp16")
        if precision == "fp16":
            assert found["fp16"]["overflow"] == 0
            assert 0 < found["fp16"]["underflow"] < 1
