"""Bytes a rank against ZeRO's published figure, hand-made sums, and tensors that real engines hold."""

import gc
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import pytest
import torch

from kernels.linear import Later
from tests.train import parity
from train.arithmetic import stage_parameters
from train.cli import compose_train
from train.labels import Labels, inputs
from train.memory import layer_saved_bytes, memory_by_stage, peak_memory, state_bytes
from train.mesh import Mesh
from train.model.build import Model

WIDE = ["model.hidden_size=192", "model.ffn_hidden_size=576", "model.padded_vocab_size=512"]
"""Wide enough that alignment and scalars are small beside the state."""


@pytest.mark.unit
def test_zero_divides_optimizer_then_gradients_then_weights():
    # ZeRO's figure 1: 7.5 B parameters on 64 ranks take 31.4, 16.6 and 1.9 GB in fp16.
    gigabytes = [state_bytes(7.5e9, "fp16", stage, 64).total / 1e9 for stage in (1, 2, 3)]
    assert gigabytes == pytest.approx([31.4, 16.6, 1.9], abs=0.05)
    assert state_bytes(7.5e9, "fp16", 1, 1).total / 7.5e9 == 16


@pytest.mark.unit
@pytest.mark.parametrize("shared", ["true", "false"], ids=["activations_over_tensor_ranks", "whole_activations"])
def test_the_slot_rule_saves_what_glm_130b_says(shared: str) -> None:
    """About 10 % of peak memory (arXiv 2210.02414, section 3) on the first stage, which has the most micro-batches."""
    words = ["experiment=glm_130b", "data.path=unused", f"parallel.sequence_parallel={shared}"]
    first = []
    for cut in ("[]", "[9,9,9,8,8,9,9,9]"):
        config = compose_train([*words, f"parallel.layers_per_stage={cut}"])
        first.append(memory_by_stage(config, data_parallel=24, micro_batches=176)[0].total)
    assert first[1] / first[0] == pytest.approx(1.10, abs=0.005)


def held_bytes(overrides: list[str]) -> list[dict[str, float]]:
    """On each rank, bytes of tensors that an engine holds after a step and as its update begins."""
    import torch
    import torch.distributed
    from deepspeed.accelerator import get_accelerator

    from train import backend
    from train.engine import Engine
    from train.memory_use import measured_use

    def held() -> int:
        # gloo's threads let go of what they have sent a moment later, on a busy machine some moments.
        return min(looked_at(), *(time.sleep(0.1) or looked_at() for _ in range(8)))

    def looked_at() -> int:
        gc.collect()
        found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
        found += [one.grad for one in found if one.is_leaf and one.grad is not None]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
        return sum(storages.values()) - batch_bytes

    config = compose_train([*parity.OVERRIDES, *WIDE, *overrides])
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True):
        mesh = backend.make_mesh(config)
        gc.freeze()  # what is there before the engine is not looked at
        engine = Engine.start(config, mesh)
    counted: dict[str, float] = {"stage": mesh.stage}
    update = engine.deepspeed.optimizer.step

    def watched(*words: Any, **settings: Any) -> Any:
        counted["accumulated"] = held()
        return update(*words, **settings)

    count = config.global_batch_size // (config.micro_batch_size * mesh.data)
    batches = [parity.batch_of(2 * index, 2) if engine.needs_batches else None for index in range(count)]
    batch_bytes = sum(
        tensor.untyped_storage().nbytes() for batch in batches if batch for tensor in vars(batch).values()
    )
    engine.step(batches, 1e-3, 1.0)  # Adam's moments exist from the first step on
    with mock.patch.object(engine.deepspeed.optimizer, "step", watched):
        engine.step(batches, 1e-3, 1.0)
    counted["held"] = held()
    used = {"memory_held_bytes": held(), "memory_peak_bytes": 10**9, "memory_reserved_bytes": 10**9 + 5}
    measured = measured_use(engine, used)
    assert sum(measured.values()) == 10**9 + 5
    counted |= {kind: measured[kind] for kind in ("parameters", "optimizer", "fragmentation")}
    gathered: list[Any] = [None] * mesh.world
    torch.distributed.all_gather_object(gathered, counted)
    return gathered


SLOW = pytest.mark.slow
LAYOUTS = [
    pytest.param(2, ["precision=bf16"], id="bf16"),
    pytest.param(2, ["precision=bf16", "parallel.zero_stage=3"], id="bf16-zero3"),
    pytest.param(2, ["precision=bf16", "parallel.pipeline_parallel=2"], id="bf16-pipeline"),
    pytest.param(1, [], id="fp32", marks=SLOW),
    pytest.param(2, ["precision=fp16"], id="fp16", marks=SLOW),
    pytest.param(2, ["precision=bf16", "parallel.zero_stage=2"], id="bf16-zero2", marks=SLOW),
    pytest.param(2, ["parallel.tensor_parallel=2"], id="tensor", marks=SLOW),
    pytest.param(4, ["precision=bf16", "parallel.tensor_parallel=2"], id="bf16-tensor", marks=SLOW),
]


@pytest.mark.distributed
@pytest.mark.parametrize("world, overrides", LAYOUTS)
def test_state_is_what_engines_hold(world: int, overrides: list[str]) -> None:
    config = compose_train([*parity.OVERRIDES, *WIDE, *overrides])
    parallel, dtype = config.parallel, config.precision.dtype
    data = world // (parallel.tensor_parallel * parallel.pipeline_parallel)
    stages = stage_parameters(config.model, parallel.pipeline_parallel, parallel.tensor_parallel)
    for rank in parity.in_ranks(world, held_bytes, overrides):
        state = state_bytes(stages[int(rank["stage"])], dtype, parallel.zero_stage, data)
        persistent = state.weights + state.master + state.adam
        assert rank["parameters"] == pytest.approx(state.weights, rel=0.02)
        assert rank["optimizer"] == pytest.approx(state.master + state.adam, rel=0.02)
        assert rank["fragmentation"] == 5
        # ZeRO 3 keeps its reduction bucket and its divided gradients; bf16 with ZeRO 1 keeps the fp32 sums.
        bucket = 0
        if parallel.zero_stage == 3:
            bucket = stages[0] * (2 if dtype != "fp32" else 4)
            persistent += state.gradients
        elif parallel.zero_stage == 1 and dtype == "bf16":
            persistent += 4 * stages[int(rank["stage"])]
        # A tied table's fp32 gradient, 10 % of this small model, outlives the step in some of the optimizers.
        table = 512 * 192 * (4 if dtype == "fp32" else 2) / parallel.tensor_parallel
        assert persistent + bucket <= rank["held"] * 1.02
        assert rank["held"] <= (persistent + bucket) * 1.02 + table
        if parallel.zero_stage == 1 and dtype == "bf16":
            assert rank["accumulated"] == pytest.approx(state.total, rel=0.02)


SAVED = """
import sys
from tests.train.saved_activations import measured
for words in sys.argv[1:]:
    print(*measured(words.split()))
"""
VARIANTS = [
    "model=tiny micro_batch_size=2",
    "model=tiny micro_batch_size=2 model.hidden_dropout=0.1 model.norm_placement=sandwich model.activation=gelu",
    "model=1b model.num_layers=4 precision=bf16 micro_batch_size=4",
    "model=1b model.num_layers=4 precision=bf16 micro_batch_size=4 parallel.activation_checkpointing=full",
    "model=1b model.num_layers=4 precision=bf16 micro_batch_size=4 parallel.activation_checkpointing=attention",
    "model=1b model.num_layers=8 precision=bf16 micro_batch_size=4 parallel.activation_checkpointing=ffn "
    "parallel.activation_checkpointing_every_layers=3",
    "model=glm_130b model.num_layers=3 precision=bf16 parallel.tensor_parallel=8 parallel.sequence_parallel=true "
    "model.norm_placement=sandwich parallel.activation_checkpointing=ffn",
    "model=glm_130b model.num_layers=3 precision=fp16 parallel.tensor_parallel=4 micro_batch_size=1",
    "model=glm_130b model.num_layers=3 precision=bf16 parallel.tensor_parallel=8 parallel.sequence_parallel=true",
    "model=1b model.num_layers=3 precision=bf16 parallel.tensor_parallel=4 parallel.sequence_parallel=true "
    "parallel.activation_checkpointing=full",
    "model=glm_10b model.num_layers=3 precision=bf16 data.sampling.positions=2d parallel.tensor_parallel=2",
    "model=chatglm2_6b precision=bf16 micro_batch_size=1 parallel.tensor_parallel=4 model.num_layers=3",
]


@pytest.mark.unit
def test_activations_are_what_the_fused_kernels_save() -> None:
    """Every tensor that autograd saves, in a process where the fused kernels may be chosen without a GPU."""
    done = subprocess.run([sys.executable, "-c", SAVED, *VARIANTS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words, line in zip(VARIANTS, done.stdout.splitlines(), strict=True):
        layer, whole = map(float, line.split())
        config = compose_train(["data.path=unused", *words.split()])
        # The layer that is looked at is the second, which every_layers leaves out.
        skipped = config.parallel.activation_checkpointing_every_layers > 1
        predicted = layer_saved_bytes(config, "none" if skipped else config.parallel.activation_checkpointing)
        assert layer == pytest.approx(predicted, rel=0.01), words
        memory = peak_memory(config, data_parallel=1, micro_batches=1)
        assert whole == pytest.approx(memory.activations, rel=0.08), words


@pytest.mark.unit
def test_fp8_products_round_into_the_largest_ones_operands():
    words = ["data.path=unused", "model=1b", "micro_batch_size=4", "sequence_length=512"]
    plain, rounded = (
        peak_memory(compose_train([*words, f"precision={one}"]), data_parallel=1, micro_batches=1)
        for one in ("bf16", "fp8")
    )
    model = compose_train(words).model
    largest = 2 * model.ffn_hidden_size * (4 * 512 + model.hidden_size)
    assert rounded.buffers - plain.buffers == largest
    assert rounded.total - plain.total == largest


@pytest.mark.unit
def test_a_later_stage_holds_the_operands_of_what_it_puts_off():
    words = [*parity.OVERRIDES, "precision=bf16", "model.num_kv_heads=2"]
    config = compose_train(words)
    model, later = Model(config, Mesh.single(), torch.bfloat16).bfloat16(), Later()
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.main_grad.later = later
    batch = parity.batch_of(0, config.micro_batch_size)
    model(inputs(batch), Labels.of(batch))[0].backward()
    # Query and key-value products share their input.
    operands = {one.data_ptr(): one.nbytes for x, dout, _ in later.take() for one in (x, dout)}
    held = sum(operands.values())
    found = []
    for schedule in ("1f1b", "zero_bubble"):
        layout = ["parallel.pipeline_parallel=2", f"parallel.pipeline_schedule={schedule}"]
        found.append(memory_by_stage(compose_train([*words, *layout]), data_parallel=1, micro_batches=4))
    first, last = (moved.activations - plain.activations for plain, moved in zip(*found, strict=True))
    assert first == 0
    assert last == held / 2
