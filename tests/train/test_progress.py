"""Long healthy work says that it goes on, piece by piece, and work in the background does not speak for the step."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from train import progress
from train.checkpoint import pieces, select, tensor_file
from train.checkpoint.pieces import Piece, PieceReader, save_pieces
from train.heartbeat import Heartbeat, read_beat
from train.model.parameters import Layout
from train.progress import alive, waiting_for_a_thread

pytestmark = pytest.mark.unit


def pieces_done(monkeypatch: pytest.MonkeyPatch, module: object, work: Callable[[], object]) -> int:
    """How often the work of one module said that it goes on."""
    said: list[None] = []
    monkeypatch.setattr(module, "alive", lambda: said.append(None))
    work()
    return len(said)


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_phase_that_goes_on_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(time=lambda: 2e9)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_last", 0.0)

    def since() -> float:
        heart._beat()
        beat = read_beat(tmp_path, 0)
        assert beat is not None
        return beat.since

    heart = Heartbeat(tmp_path, 0)
    heart.start()
    heart.now("save", 5)
    begun = since()
    in_a_thread(alive)
    assert since() == begun, "files written in the background are not the training's progress"
    with waiting_for_a_thread():
        in_a_thread(alive)
    assert since() == 2e9
    clock.time = lambda: 2e9 + 60
    alive()
    assert since() == 2e9 + 60
    assert since() == 2e9 + 60, "nothing more was done"
    heart.close()


def test_files_and_tensors_are_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_BLOCK", 1 << 10)
    monkeypatch.setattr(tensor_file, "_FLUSHED", 4 << 10)
    layout, values = Layout("table", (4096,)), torch.arange(4096.0)
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "rank_00000.safetensors"
    entries = {}

    def write() -> None:
        entries["model/rank_00000.safetensors"] = save_pieces(file, [(Piece("weight", layout, 0, 4096), values)])

    def read() -> None:
        assert torch.equal(PieceReader(tmp_path, ("model",)).full("weight", "table"), values)

    assert pieces_done(monkeypatch, tensor_file, write) >= 16, "each block that is written"
    select.write_manifest(tmp_path, {"files": entries, "layout": {}})
    assert pieces_done(monkeypatch, select, lambda: select.damage(tmp_path)) == 1, "each MiB that is checked"
    assert pieces_done(monkeypatch, pieces, read) == 1, "each piece that is read"
