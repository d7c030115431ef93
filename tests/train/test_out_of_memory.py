"""Memory that runs out: what the rank says, and what it leaves behind."""

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from data_prep.errors import RankFailed
from tests.train.parity import BATCH, LR, SHRINK, in_ranks, my_batches, start_engine

TENSOR = "parallel.tensor_parallel=2"
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nmore"


def _in_a_step(overrides: list[str], dump: Any = None) -> str:
    """What the engine says; dump: stands in for the allocator's own, which a CPU has not."""
    engine = start_engine(overrides)
    if dump is not None:
        torch.cpu.memory = SimpleNamespace(_dump_snapshot=dump)  # type: ignore[attr-defined]
    error = torch.OutOfMemoryError(SAID)
    with mock.patch.object(engine, "_train", side_effect=error), pytest.raises(RankFailed) as caught:
        engine.step(my_batches(engine, 0, BATCH), LR, SHRINK)
    return str(caught.value)


def _at_the_start(overrides: list[str]) -> str:
    from train import backend

    error = torch.OutOfMemoryError(SAID)
    with mock.patch.object(backend, "make_plain_engine", side_effect=error), pytest.raises(RankFailed) as caught:
        start_engine(overrides)
    return str(caught.value)


@pytest.mark.parametrize("works", [True, False], ids=["written", "disk_full"])
def test_it_leaves_what_the_allocator_holds(works: bool, tmp_path: Path) -> None:
    def dump(path: str) -> None:
        if not works:
            raise OSError("No space left on device")
        Path(path).write_bytes(b"blocks")

    said = in_ranks(1, _in_a_step, [f"run_dir={tmp_path}"], dump)
    path = tmp_path / "logs" / "memory_rank_0.pickle"
    assert path.is_file() == works
    assert (f"{path} has every block" in said) == works
    assert said.startswith("rank 0 is out of memory: ")


def test_it_names_the_largest_holders_and_what_would_help() -> None:
    said = in_ranks(1, _in_a_step, ["parallel.zero_stage=0", "micro_batch_size=8", "sequence_length=32"])
    assert said.startswith("rank 0 is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …. ")
    assert said.count(" GiB (") == 3
    assert "every block" not in said
    assert "activations" in said
    assert "(parallel.activation_checkpointing=full)" in said
    recomputed = in_ranks(2, _in_a_step, ["parallel.activation_checkpointing=full", TENSOR, "parallel.zero_stage=0"])
    assert "(parallel.activation_checkpointing=full)" not in recomputed
    assert "(parallel.zero_stage=1)" in recomputed


def test_a_model_that_does_not_fit_says_the_same() -> None:
    said = in_ranks(1, _at_the_start, ["model.padded_vocab_size=40000"])
    assert said.startswith("rank 0 is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …. ")
    assert said.count(" GiB (") == 3


FOR_REAL = "import sys; from tests.train.test_out_of_memory import for_real; print(for_real(sys.argv[1:]))"
"""In a process of its own: this one has asked for a GPU already, so what it forks may not use one."""


def for_real(overrides: list[str]) -> str:
    """What an engine says that must run out of memory, at its start or in its first step."""
    from train import backend

    backend.start()
    try:
        engine = start_engine(overrides)
        engine.step(my_batches(engine, 0, engine.config.global_batch_size), LR, SHRINK)
    except RankFailed as error:
        return str(error)
    return "it fitted"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("overrides", "holder", "least"),
    [
        # 1.7 B parameters, 30 GB of state; 131,072 tokens of 1.6 MB.
        (
            ["model.hidden_size=2048", "model.ffn_hidden_size=65536", "micro_batch_size=4096"],
            "activations",
            30 << 30,
        ),
        # A table of 320 GB.
        (["model.hidden_size=2048", "model.padded_vocab_size=40000000"], "adam", 0),
    ],
    ids=["step", "start"],
)
def test_on_a_gpu(overrides: list[str], holder: str, least: int, tmp_path: Path) -> None:
    whole = [word.replace("micro_batch_size", "global_batch_size") for word in overrides if "batch" in word]
    words = [*overrides, *whole, "precision=bf16", "kernels=reference", f"run_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", FOR_REAL, *words], capture_output=True, text=True, timeout=120)
    said = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    path = tmp_path / "logs" / "memory_rank_0.pickle"
    assert said.startswith("rank 0 is out of memory: CUDA out of memory. Tried to allocate ")
    assert f"{path} has every block" in said
    assert f"{holder} " in said
    assert said.count(" GiB (") == 3
    # The allocator's own record, made by this test a moment ago.
    snapshot = pickle.loads(path.read_bytes())
    assert sum(segment["total_size"] for segment in snapshot["segments"]) >= least
