"""`python -m train.checkpoint`: what it lists, which file it calls damaged, what it finds different."""

import shutil
from pathlib import Path

import pytest
import torch

from data_prep.files import checksum, write_bytes
from train.checkpoint.__main__ import main
from train.checkpoint.inspect import TensorDifference, tensor_differences
from train.checkpoint.pieces import PieceReader
from train.checkpoint.select import read_manifest, step_folder, write_manifest

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_list_shows_each_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(run)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "20"
    assert "DP 1 TP 1 PP 1 ZeRO 1  fp32  80 samples" in first
    assert second.endswith("160 samples  <- latest")
    file = next((step_folder(run, 20) / "model").iterdir())
    file.unlink()
    assert main(["list", str(run)]) == 0
    assert f"{file} is missing" in capsys.readouterr().out.splitlines()[0]


def test_verify_names_every_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole") == 2
    files = [next((step_folder(run, 20) / part).iterdir()) for part in ("model", "optimizer")]
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert main(["verify", str(run)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(f"{file} is damaged: its checksum is not the manifest's" for file in files), lines[-1]]
    assert lines[-1] == f"{step_folder(run, 40)}: whole"
    assert main(["verify", str(step_folder(run, 40))]) == 0


def test_a_path_without_checkpoints_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["list"], ["verify"], ["diff", str(tmp_path)]):
        assert main([*words, str(tmp_path)]) == 3
        assert f"{tmp_path} holds no checkpoint" in capsys.readouterr().err


def test_diff_shows_keys_and_norms(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = step_folder(run, 20), step_folder(run, 40)
    assert main(["diff", str(left), str(left)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no difference"
    text = (right / "config.yaml").read_text().replace("seed: 1\n", "seed: 2\n")
    write_bytes(right / "config.yaml", text.encode())
    manifest = read_manifest(right)
    manifest["files"]["config.yaml"]["checksum"] = checksum(right / "config.yaml")
    write_manifest(right, manifest)
    assert main(["diff", str(left), str(run)]) == 0
    out = capsys.readouterr().out
    assert "\nseed: 1 | 2\n" in out
    assert "\nstate.consumed_samples: 80 | 160\n" in out
    found = [entry for entry in tensor_differences(left, right) if isinstance(entry, TensorDifference)]
    kinds = {entry.kind for entry in found}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
    name = "layers.1.mlp.dense_4h_to_h.weight"
    entry = next(entry for entry in found if (entry.kind, entry.name) == ("weight", name))
    a, b = (PieceReader(folder).full("weight", name) for folder in (left, right))
    assert entry.difference == pytest.approx(float(torch.dist(a, b)), rel=1e-5)
    assert entry.largest == pytest.approx(float((a - b).abs().max()), rel=1e-6)
    assert f"weight {name}: |A-B| {entry.difference:.4g}" in out
