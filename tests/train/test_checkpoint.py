"""Checkpoints: whole or absent, readable in any layout, and a flipped byte anywhere is seen."""

import itertools
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import DataError
from data_prep.files import checksum
from train.checkpoint import tensor_file
from train.checkpoint.model import load_trained
from train.checkpoint.pieces import Piece, PieceReader, save_pieces
from train.checkpoint.read import choose
from train.checkpoint.select import (
    checkpoint_steps,
    damage,
    damages,
    find,
    read_manifest,
    read_state,
    step_folder,
    write_manifest,
)
from train.checkpoint.write import prune
from train.mesh import Mesh
from train.model.build import stage_bounds
from train.model.parameters import Layout, split
from train.stability.roll_back import checkpoint_before

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("rows", "halves"), [(12, 1), (24, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_any_layout_read_as_any_other(tmp_path: Path, rows: int, halves: int, dim: int) -> None:
    full = torch.arange(rows * 24, dtype=torch.float32).view(rows, 24)
    name = "layers.0.mlp.dense_h_to_4h.weight"
    (tmp_path / "model").mkdir()
    for rank in range(2):
        layout = split(name, tuple(full.shape), dim, rank, 2, halves=halves)
        local = layout.cut(full).reshape(-1)
        cut = local.numel() // 3  # two ranges a shard, as ZeRO leaves them
        for part, (start, stop) in enumerate([(0, cut), (cut, local.numel())]):
            piece = Piece("weight", layout, start, stop - start)
            save_pieces(tmp_path / "model" / f"rank_{rank}{part}.safetensors", [(piece, local[start:stop])])
    reader = PieceReader(tmp_path, ("model",))
    assert torch.equal(reader.full("weight", name), full)
    for size in (1, 2, 3, 4):
        for rank in range(size):
            layout = split(name, tuple(full.shape), dim, rank, size, halves=halves)
            cut = layout.cut(full)
            assert torch.equal(reader.local("weight", layout), cut)
            for start, numel in ((0, 1), (3, cut.numel() - 5), (cut.numel() - 2, 2)):
                assert torch.equal(reader.part("weight", layout, start, numel), cut.reshape(-1)[start : start + numel])
    (tmp_path / "model" / "rank_11.safetensors").unlink()
    with pytest.raises(DataError, match="incomplete"):
        PieceReader(tmp_path, ("model",)).full("weight", name)


def test_a_missing_parameter_or_another_shape_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    layout = Layout("final_norm.weight", (8,))
    save_pieces(tmp_path / "model" / "rank_0.safetensors", [(Piece("weight", layout, 0, 8), torch.ones(8))])
    reader = PieceReader(tmp_path, ("model",))
    with pytest.raises(DataError, match=r"no weight of layers\.9\.mlp"):
        reader.local("weight", Layout("layers.9.mlp", (8,)))
    with pytest.raises(DataError, match=r"final_norm\.weight has shape \[8\]"):
        reader.local("weight", Layout("final_norm.weight", (16,)))


def test_every_flipped_byte_is_found(tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    folder, before = step_folder(run, 40), step_folder(run, 20)
    assert choose(Mesh.single(), run) == folder
    generator = random.Random(5)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) >= 6
    for path in [*files, *generator.choices(files, k=100 - len(files))]:
        content = path.read_bytes()
        place = generator.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ generator.randrange(1, 256)]) + content[place + 1 :])
        caplog.clear()
        assert choose(Mesh.single(), run) == before
        assert f"{path} is damaged" in caplog.text
        assert [str(path) in message for message in damages(folder)] == [True]
        path.write_bytes(content)
    for path in files:
        if path.name != "manifest.json":
            moved = path.rename(path.with_suffix(".gone"))
            assert f"{path} is missing" in str(damage(folder))
            moved.rename(path)
    with files[0].open("ab") as file:
        file.write(b"x")
    assert str(files[0]) in str(damage(folder))


def test_an_unfinished_checkpoint_is_never_picked(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    newest = step_folder(run, checkpoint_steps(run)[-1])
    shutil.copytree(newest, newest.with_name("step_00000099.partial"))
    shutil.copytree(newest, step_folder(run, 98))
    (step_folder(run, 98) / "manifest.json").unlink()
    assert find(run) == newest
    (newest / "trainer_state.json").unlink()
    assert find(run) == step_folder(run, 20)
    shutil.rmtree(step_folder(run, 20))
    with pytest.raises(DataError, match=r"trainer_state\.json is missing"):
        find(run)


def test_find_says_what_is_wrong(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no checkpoint"):
        find(tmp_path)
    with pytest.raises(DataError, match=r"no checkpoint of step 7; there are \[20, 40\]"):
        find(tiny_run, 7)
    assert find(step_folder(tiny_run, 20)) == step_folder(tiny_run, 20)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_a_roll_back_goes_to_a_checkpoint_that_is_whole(tiny_run: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(tiny_run, tmp_path / "run"))

    def before(step: int, every: int = 20) -> tuple[int, int] | None:
        return checkpoint_before(Mesh.single(), run_dir, step, every)

    samples = read_state(step_folder(run_dir, 20))["consumed_samples"]
    assert before(41) == (40, 2 * samples)
    assert before(40) == (20, samples)
    assert before(41, every=30) is None, "made on a signal"
    for step, wanted in ((40, (20, samples)), (20, None)):
        file = next((step_folder(run_dir, step) / "model").iterdir())
        file.write_bytes(file.read_bytes()[:-1])
        assert before(41) == wanted


def test_prune_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 27, 28):
        step_folder(tmp_path, step).mkdir(parents=True)
        (step_folder(tmp_path, step) / "manifest.json").write_text("{}")
    prune(tmp_path, every=5, keep_last=2, keep_every=10)
    assert checkpoint_steps(tmp_path) == [10, 20, 25, 28], "27 and 28 were made on a signal"
    step_folder(tmp_path, 30).with_suffix(".partial").mkdir()
    step_folder(tmp_path, 3).mkdir()
    prune(tmp_path, every=0, keep_last=1, keep_every=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000028"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    piece = Piece("weight", Layout("final_norm.weight", (8,)), 0, 8)
    full = OSError(28, "No space left on device")
    with (
        mock.patch.object(tensor_file.os, "fsync", side_effect=full),
        pytest.raises(DataError, match=r"rank_0\.safetensors.*disk is full"),
    ):
        save_pieces(tmp_path / "rank_0.safetensors", [(piece, torch.ones(8))])


def test_files_are_what_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"weight|名前.{size}": torch.randn(size, generator=generator).to(dtype)
        for size, dtype in ((7, torch.bfloat16), (0, torch.float32), (3_000_001, torch.float32), (5, torch.float16))
    }
    entry = tensor_file.write_tensors(tmp_path / "a.safetensors", tensors, {"pieces": "{}"})
    assert entry == {
        "bytes": (tmp_path / "a.safetensors").stat().st_size,
        "checksum": checksum(tmp_path / "a.safetensors"),
    }
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_manifest_lists_every_file(tiny_run: Path) -> None:
    folder = find(tiny_run)
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == set(manifest["files"]) | {"manifest.json"}
    assert manifest["layout"] == {
        "data_parallel": 1,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "zero_stage": 1,
    }
    assert not list(folder.rglob("*.pt")) + list(folder.rglob("*.pkl"))


@pytest.mark.parametrize(("layers", "stages"), [(70, 8), (4, 2), (4, 4), (5, 3), (24, 1), (2, 4)])
def test_end_stages_hold_one_layer_fewer(layers: int, stages: int) -> None:
    bounds = stage_bounds(layers, stages)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == layers + 2
    assert max(sizes) - min(sizes) <= 1
    if (layers + 2) % stages == 0:
        assert len(set(sizes)) == 1
    else:
        assert sizes[0] == min(sizes)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2, "sequence_parallel": "true", "overlap_tensor": "true"},
        {"pipeline_parallel": 2, "pipeline_schedule": "zero_bubble"},
    ],
)
def test_weights_of_any_layout_load_in_one_process(layout: dict[str, Any], tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(find(tiny_run), tmp_path / "step"))
    text = (folder / "config.yaml").read_text()
    for key, value in layout.items():
        text, count = re.subn(rf"^(  {key}): .*", rf"\1: {value}", text, flags=re.MULTILINE)
        assert count == 1
    (folder / "config.yaml").write_text(text)
    manifest = read_manifest(folder)
    manifest["files"]["config.yaml"] = {
        "bytes": (folder / "config.yaml").stat().st_size,
        "checksum": checksum(folder / "config.yaml"),
    }
    write_manifest(folder, manifest)
    trained = load_trained(folder, torch.device("cpu"))
    assert not trained.model.context.sequence_parallel
    assert trained.config.parallel.pipeline_schedule == "1f1b"
