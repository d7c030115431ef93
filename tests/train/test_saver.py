"""Saves in the background: training goes on meanwhile, what is saved is the step it was begun at, errors reach all."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import DataError
from tests.train.parity import LR, in_ranks, my_batches, saver_of, start_engine
from train.host_memory import host_memory

pytestmark = pytest.mark.distributed
WORLD = 2


def test_training_goes_on_while_files_are_written(tmp_path: Path) -> None:
    committed, saved, later, goes_on = in_ranks(WORLD, _blocked, str(tmp_path))
    files = sorted((tmp_path / "checkpoints" / "step_00000001" / "model").iterdir())
    shares = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    assert len(shares) == WORLD, "what all data-parallel ranks hold is written by all of them"
    assert max(shares) - min(shares) <= 1
    assert committed == [False, True]
    assert saved == [True] * len(saved)
    assert not any(later)
    assert goes_on, "what the thread writes while its rank waits for it is progress"


def test_an_update_waits_for_the_copy_that_a_save_makes(tmp_path: Path) -> None:
    layouts = [
        ["parallel.zero_stage=0"],
        ["parallel.zero_stage=3"],
        ["precision=bf16", "parallel.offload_optimizer=true"],
    ]
    assert in_ranks(WORLD, _copied_late, layouts, str(tmp_path)) == [(True, False)] * len(layouts)


def test_an_error_in_one_ranks_thread_reaches_all_ranks(tmp_path: Path) -> None:
    errors, kept = in_ranks(WORLD, _failing, str(tmp_path))
    assert len(set(errors)) == 1
    assert "rank_00001.safetensors: the disk is full" in errors[0]
    assert kept == ["latest", "step_00000001"]


def test_host_memory_is_locked_while_its_owner_lives() -> None:
    module, owner = mock.MagicMock(), type("Owner", (), {})()
    runtime = module.cudart.return_value
    runtime.cudaHostRegister.return_value = 0
    with mock.patch.object(torch, "get_device_module", return_value=module):
        memory = host_memory(1 << 20, torch.device("cuda", 1), owner)
        runtime.cudaHostRegister.assert_called_once_with(memory.data_ptr(), 1 << 20, 0)
        values = memory[64:128].view(torch.float32).fill_(2.0)
        # As the loader's workers are started; the memory is not theirs, and they must end well without it.
        child = multiprocessing.get_context("fork").Process(target=int)
        child.start()
        child.join(20)
        assert child.exitcode == 0
        address = memory.data_ptr()
        del memory
        runtime.cudaHostUnregister.assert_not_called()
        del owner
        runtime.cudaHostUnregister.assert_called_once_with(address)
    assert values.tolist() == [2.0] * 16


def _blocked(run_dir: str) -> tuple[list[bool], list[bool], list[bool], bool]:
    """A save whose second rank is slow: is it committed before and after, does it hold the step it was begun at?"""
    from train.checkpoint import write
    from train.checkpoint.pieces import PieceReader
    from train.checkpoint.select import checkpoint_steps, find
    from train.collective import gather
    from train.progress import last_alive

    engine = start_engine([])
    saver = saver_of(engine, run_dir)
    step = _stepper(engine)
    step(0)
    before = _weights(engine)
    written, released = write.write_files, threading.Event()

    def slow(*settings: Any) -> Any:
        assert engine.mesh.rank == 0 or released.wait(60)
        return written(*settings)

    with mock.patch.object(write, "write_files", slow):
        saver.start(_state(1))
        for number in (1, 2, 3):
            step(number)
            saver.poll()
        committed = [bool(checkpoint_steps(Path(run_dir)))]
        progress = last_alive()
        released.set()
        assert saver.finish()
        goes_on = gather(engine.mesh, last_alive() > progress)[1]
        assert not saver.finish()
    committed.append(checkpoint_steps(Path(run_dir)) == [1])
    reader = PieceReader(find(run_dir))
    after = _weights(engine)
    names = reader.names("weight")
    saved = [torch.equal(reader.full("weight", name), before[name]) for name in names]
    return committed, saved, [torch.equal(before[name], after[name]) for name in names], goes_on


def _copied_late(layouts: list[list[str]], run_dir: str) -> list[tuple[bool, bool]]:
    """For each layout a save whose copy begins only when the next update asks for it, and takes its time.

    Whether every piece was copied as it was before that update, and whether they are still so after it.
    """
    from train.checkpoint.staging import Staging

    def same(pieces: Any, before: Any) -> bool:
        return all(
            torch.equal(tensor.reshape(-1), other)
            for part in ("model", "optimizer")
            for (_, tensor), (_, other) in zip(pieces[part], before[part], strict=True)
        )

    def layout(number: int) -> tuple[bool, bool]:
        engine = start_engine(layouts[number])
        saver = saver_of(engine, f"{run_dir}/{number}")
        step = _stepper(engine)
        step(0)
        pieces = saver._staging.pieces()
        before = {part: [(p, t.detach().reshape(-1).clone()) for p, t in held] for part, held in pieces.items()}
        asked, waits, copied = threading.Event(), engine.before_change, []

        def ask() -> None:
            asked.set()
            waits()

        def late(staging: Any, pieces: Any) -> Any:
            asked.wait(20)
            time.sleep(0.2)
            copied.append(copy(staging, pieces))
            return copied[0]

        copy = Staging.copy
        with mock.patch.object(Staging, "copy", late):
            saver.start(_state(1))
            engine.before_change = ask
            step(1)
            saver.finish()
        return same(copied[0], before), same(pieces, before)

    return [layout(number) for number in range(len(layouts))]


def _failing(run_dir: str) -> tuple[list[str], list[str]]:
    """The second save's file does not fit on the second rank's disk."""
    from train.checkpoint import tensor_file
    from train.collective import gather

    engine = start_engine([])
    saver = saver_of(engine, run_dir)
    step = _stepper(engine)
    step(0)
    saver.start(_state(1))
    assert saver.finish()
    full = mock.patch.object(tensor_file.os, "fsync", side_effect=OSError(28, "No space left on device"))
    said = "nothing"
    if engine.mesh.rank == 1:
        full.start()
    saver.start(_state(2))
    try:
        for number in range(1, 1000):
            step(number)
            saver.poll()
    except DataError as error:
        said = str(error)
    finally:
        if engine.mesh.rank == 1:
            full.stop()
    errors = gather(engine.mesh, said)
    return errors, sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    from train.model.build import named_layouts

    return {layout.name: parameter.detach().clone() for layout, parameter in named_layouts(engine.model.parameters())}


def _stepper(engine: Any) -> Callable[[int], Any]:
    return lambda number: engine.step(my_batches(engine, number * 8, 8), LR, 1.0)


def _state(step: int) -> dict[str, Any]:
    return {"step": step, "optimizer_steps": step, "loss_scaler": {}}
