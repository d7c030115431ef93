"""Training with precision=fp8: what it learns, in which layouts, and that nothing else notices."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from data_prep.errors import ConfigError
from kernels.fp8_product import UNIT
from tests.train.parity import BATCH, LR, SHRINK, in_ranks, my_batches, start_engine
from train import backend, rules
from train.checkpoint.model import load_trained, read_config
from train.checkpoint.select import find
from train.config import PrecisionConfig

pytestmark = pytest.mark.distributed
SMALL = ["model.num_layers=2", "model.ffn_hidden_size=64"]  # of which two ranks have multiples of 16
TENSOR = "parallel.tensor_parallel=2"


def _overfitted(kinds: list[list[str]], steps: int) -> list[tuple[list[float], list[list[float]]]]:
    """Of each kind of run the losses on the same samples in each step, and the sums of an evaluation before them."""
    found = []
    for words in kinds:
        engine = start_engine([*SMALL, *words])
        batches = my_batches(engine, 0, BATCH)
        sums = engine.evaluate(batches)
        results = [engine.step(batches, 10 * LR, SHRINK) for _ in range(steps)]
        found.append(([numbers.loss for numbers in engine.read(results)], sums))
    return found


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_a_model_learns_what_it_learns_in_bf16() -> None:
    kinds = [["precision=fp32"], ["precision=bf16"], ["precision=fp8"]]
    (fp32, _), (bf16, plain), (fp8, evaluated) = in_ranks(1, _overfitted, kinds, 8)
    assert fp8[-1] < bf16[0] - 0.9 * (bf16[0] - bf16[-1])
    assert fp8 != bf16
    # Half a step of e4m3 is 2⁻⁴ of a value, of bf16 2⁻⁸, and errors add up alike: at most sixteen times as far apart.
    assert apart(fp8, fp32) < 16 * apart(bf16, fp32)
    assert evaluated == plain  # what trains nothing runs in bf16


def test_tensor_parallel_ranks_learn_what_replicas_learn() -> None:
    shares = [TENSOR, "parallel.sequence_parallel=true"]
    kinds = [["precision=fp8"], ["precision=fp8", *shares], ["precision=bf16", *shares]]
    (alone, _), (tensor, evaluated), (_, plain) = in_ranks(2, _overfitted, kinds, 3)
    # Cut products are summed in bf16; their operands are rounded to e4m3 alike.
    assert apart(tensor, alone) < 2.0**-8 * alone[0]
    assert evaluated == plain


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[TENSOR], ["parallel.zero_stage=3"], ["parallel.activation_checkpointing=full"]])
def test_other_layouts_do_too(layout: list[str]) -> None:
    (alone, _), (other, _) = in_ranks(2, _overfitted, [["precision=fp8"], ["precision=fp8", *layout]], 6)
    assert apart(other, alone) < 2.0**-8 * alone[0]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_stages_multiply_what_one_process_multiplies(schedule: str) -> None:
    stages = ["parallel.pipeline_parallel=2", f"parallel.pipeline_schedule={schedule}"]
    alone = in_ranks(1, _overfitted, [["precision=fp8"]], 6)
    assert in_ranks(2, _overfitted, [["precision=fp8", *stages]], 6) == alone


def test_a_model_trained_so_is_used_in_bf16(tiny_run: Path) -> None:
    config = read_config(find(tiny_run) / "config.yaml")
    config.precision = PrecisionConfig(dtype="bf16", fp8=True)
    with mock.patch("train.checkpoint.model.read_config", return_value=config):
        trained = load_trained(tiny_run, torch.device("cpu"))
    assert not trained.config.precision.fp8
    assert trained.model.context.ops.fp8_product is None


def test_a_gpu_without_fp8_is_named() -> None:
    wanted = PrecisionConfig(dtype="bf16", fp8=True)
    backend.check_precision(wanted)  # on this CPU, by the reference
    with (
        mock.patch.object(backend, "device", return_value=torch.device("cuda:0")),
        mock.patch.object(backend, "device_name", return_value="NVIDIA A100-SXM4-80GB"),
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
        pytest.raises(ConfigError, match=r"precision\.fp8=true: NVIDIA A100-SXM4-80GB lacks it; use an NVIDIA GPU"),
    ):
        backend.check_precision(wanted)


def test_the_rules_know_the_products_unit() -> None:
    assert rules.FP8_UNIT == UNIT
