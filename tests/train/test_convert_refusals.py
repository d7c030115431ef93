"""What cannot be converted is named in one line, with exit status 2 or 3, and nothing is left behind."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep import cli
from data_prep.errors import EXIT_CONFIG, EXIT_DATA
from tests.train.convert_helpers import MODELS, config_of, convert, model_of, same, stored, weights_of, write_checkpoint
from train.convert import folder as folder_module
from train.convert import tensor_files
from train.convert.__main__ import main
from train.convert.config import ConvertConfig

pytestmark = pytest.mark.unit
RANK = "30/mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> dict[str, Path]:
    """A checkpoint, and its export to GLM-130B's files of two ranks and to ChatGLM-6B's."""
    here = tmp_path_factory.mktemp("refusals")
    found = {}
    for form, ranks in (("glm_130b", 2), ("chatglm_6b", 1)):
        model = model_of(**MODELS[form])
        config = config_of(model, objective="blank_infilling")
        source = write_checkpoint(here / f"{form}-source", config, weights_of(model), tiny_dataset)
        found[f"{form}-source"] = source
        found[form] = convert(source, here / form, form, tensor_parallel=ranks)
    return found


def refused(capsys: pytest.CaptureFixture[str], status: int, source: Path, target: Path, *words: str) -> str:
    """The one line that a conversion ends with."""
    capsys.readouterr()
    argv = [f"source={source}", f"target={target}", *words]
    assert cli.run("convert", ConvertConfig, main, program="train.convert", argv=argv) == status
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert not target.exists()
    assert not target.with_name(target.name + ".partial").exists()
    return message


class Evil:
    """Runs a command when it is unpickled by anything that trusts pickles."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def change(path: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a rank's file with changed contents."""
    state = torch.load(path, weights_only=True)["module"]
    how(state)
    torch.save({"module": state}, path)


NORM, QKV = "transformer.final_layernorm.weight", "transformer.layers.1.attention.query_key_value.weight"
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("a tensor is missing", lambda path: change(path, lambda state: state.pop(NORM)), f"{NORM} is missing"),
    ("one too many", lambda path: change(path, lambda state: state.update(extra=torch.ones(2))), "extra is not part"),
    ("a shape", lambda path: change(path, lambda state: state.update({QKV: torch.ones(47, 32)})), "[47, 32]"),
    ("a dtype", lambda path: change(path, lambda state: state.update({QKV: state[QKV].long()})), "torch.int64"),
    ("cut short", lambda path: path.write_bytes(path.read_bytes()[:-4000]), "not a whole file of torch.save"),
    ("empty", lambda path: path.write_bytes(b""), "not a whole file of torch.save"),
    ("code", lambda path: torch.save({"module": {"a": Evil()}}, path), "holds code or objects"),
    ("a bare pickle", lambda path: path.write_bytes(pickle.dumps(Evil())), "not a whole file of torch.save"),
    ("no dictionary", lambda path: torch.save([torch.ones(2)], path), "no dictionary of tensors"),
    ("a file of ranks is gone", lambda path: path.unlink(), "not numbered"),
    ("latest lies", lambda path: (path.parent.parent / "latest").write_text("31"), "no mp_rank_"),
    ("latest is gone", lambda path: (path.parent.parent / "latest").unlink(), "cannot be read"),
]


@pytest.mark.parametrize(("what", "damage", "words"), DAMAGE, ids=[case[0] for case in DAMAGE])
def test_damaged_rank_files(tmp_path, folders, capsys, monkeypatch, what, damage, words):
    source = tmp_path / "source"
    shutil.copytree(folders["glm_130b"], source)
    damage(source / RANK)
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, EXIT_DATA, source, tmp_path / "target", "format=glm_130b", "tensor_parallel=2")
    assert words in message
    assert str(source) in message
    assert not (tmp_path / "evil").exists()


def test_a_flipped_bit_is_found(tmp_path, folders, capsys):
    source = tmp_path / "source"
    shutil.copytree(folders["glm_130b"], source)
    path = source / RANK
    content = bytearray(path.read_bytes())
    value = torch.load(path, weights_only=True)["module"][QKV].numpy().tobytes()
    content[bytes(content).index(value) + 5] ^= 1
    path.write_bytes(content)
    message = refused(capsys, EXIT_DATA, source, tmp_path / "target", "format=glm_130b", "tensor_parallel=2")
    assert QKV in message
    assert "damaged" in message


def test_ranks_of_different_saves(tmp_path, folders, capsys):
    source = tmp_path / "source"
    shutil.copytree(folders["glm_130b"], source)
    change(source / RANK, lambda state: state[NORM].add_(1))
    message = refused(capsys, EXIT_DATA, source, tmp_path / "target", "format=glm_130b", "tensor_parallel=2")
    assert "rank 1 is not what rank 0 holds" in message


@pytest.mark.parametrize("size", [1, 4])
def test_another_tensor_parallel_size_must_be_said(tmp_path, folders, capsys, size):
    words = "format=glm_130b", f"tensor_parallel={size}"
    message = refused(capsys, EXIT_CONFIG, folders["glm_130b"], tmp_path / "target", *words)
    assert "use tensor_parallel=2" in message


HUGGING_FACE: list[tuple[str, Callable[[Path], object], int, str]] = [
    ("cut short", lambda at: _cut(at / "model.safetensors"), EXIT_DATA, "not a whole safetensors file"),
    ("another vocabulary", lambda at: _tokenizer(at), EXIT_DATA, "is not the tokenizer that"),
    ("no tokenizer", lambda at: (at / "tokenizer.model").unlink(), EXIT_DATA, "tokenizer.path="),
    ("no weights", lambda at: (at / "model.safetensors").unlink(), EXIT_DATA, "no model.safetensors"),
    ("broken config", lambda at: (at / "config.json").write_text("{"), EXIT_DATA, "config.json"),
    ("no config", lambda at: (at / "config.json").unlink(), EXIT_CONFIG, "does not tell 'num_layers'"),
    ("shape", lambda at: _reshape(at / "model.safetensors"), EXIT_DATA, "lm_head.weight has shape [639, 32]"),
]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _tokenizer(at: Path) -> None:
    # A model with one piece's score changed: another tokenizer.
    content = bytearray((at / "tokenizer.model").read_bytes())
    content[-1] ^= 1
    (at / "tokenizer.model").write_bytes(content)


def _reshape(path: Path) -> None:
    state = load_file(path)
    state["lm_head.weight"] = state["lm_head.weight"][:-1].clone()
    save_file(state, path)


@pytest.mark.parametrize(("what", "damage", "status", "words"), HUGGING_FACE, ids=[case[0] for case in HUGGING_FACE])
def test_damaged_hugging_face_folders(tmp_path, folders, capsys, what, damage, status, words):
    source = tmp_path / "source"
    shutil.copytree(folders["chatglm_6b"], source)
    damage(source)
    assert words in refused(capsys, status, source, tmp_path / "target", "format=chatglm_6b")


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path, folders, capsys):
    words = "format=chatglm_6b", "image_tokens=100"
    message = refused(capsys, EXIT_CONFIG, folders["chatglm_6b"], tmp_path / "target", *words)
    assert "another model's tokenizer" in message


def test_a_damaged_checkpoint_does_not_leave(tmp_path, folders, capsys):
    source = tmp_path / "source"
    shutil.copytree(folders["glm_130b-source"], source)
    path = source / "model" / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    assert str(path) in refused(capsys, EXIT_DATA, source, tmp_path / "target", "format=glm_130b")


WRONG: list[tuple[str, tuple[str, ...], str]] = [
    ("glm_130b-source", ("format=glm",), "model.norm_placement=deepnorm cannot be written as format=glm"),
    ("glm_130b-source", ("format=chatglm_6b",), "model.positions=rotary_1d"),
    ("glm_130b-source", ("format=glm_131b",), "format=glm_131b is not known; use one of glm_130b"),
    ("glm_130b-source", ("format=glm_130b", "tensor_parallel=3"), "parallel.tensor_parallel=3"),
    ("glm_130b-source", ("format=huggingface", "tensor_parallel=2"), "tensor_parallel=2"),
    ("glm_130b-source", ("format=huggingface", "quantise=int4"), "quantise=int4"),
    ("glm_130b-source", ("format=glm_130b", "quantise=int5"), "quantise=int5"),
    ("glm_130b-source", ("format=glm_130b", "dtype=fp8"), "dtype=fp8"),
    ("glm_130b-source", ("format=glm_130b", "model=tiny"), "model="),
    ("glm_130b", ("format=chatglm_6b",), "written as glm_130b"),
    ("glm_130b", ("format=glm_130b", "tensor_parallel=2", "quantise=int8"), "quantise=int8"),
]


@pytest.mark.parametrize(("source", "words", "message"), WRONG)
def test_settings_that_make_no_sense(tmp_path, folders, capsys, source, words, message):
    assert message in refused(capsys, EXIT_CONFIG, folders[source], tmp_path / "target", *words)


def test_a_model_whose_context_sees_itself_is_not_causal(tmp_path, tiny_dataset, capsys):
    model = model_of(**MODELS["glm"])
    config = config_of(model, objective="blank_infilling")
    source = write_checkpoint(tmp_path / "source", config, weights_of(model), tiny_dataset)
    message = refused(capsys, EXIT_CONFIG, source, tmp_path / "target", "format=glm")
    assert "data.sampling.objective=blank_infilling" in message


def test_a_scaling_that_the_format_is_not_asked_to_carry(tmp_path, tiny_dataset, capsys):
    scaling = {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_original_positions": 64}
    model = model_of(**MODELS["llama"], **scaling)
    config = config_of(model, objective="causal")
    source = write_checkpoint(tmp_path / "source", config, weights_of(model), tiny_dataset)
    message = refused(capsys, EXIT_CONFIG, source, tmp_path / "target", "format=llama")
    assert "model.rotary_scaling=yarn cannot be written as format=llama" in message


def test_values_beyond_fp16(tmp_path, tiny_dataset, capsys):
    model = model_of()
    weights = weights_of(model)
    weights["layers.1.mlp.dense_4h_to_h.weight"][3, 4] = 1e6
    config = config_of(model, objective="blank_infilling")
    source = write_checkpoint(tmp_path / "source", config, weights, tiny_dataset)
    message = refused(capsys, EXIT_DATA, source, tmp_path / "target", "format=glm_130b", "dtype=fp16")
    assert "layers.1.mlp.dense_4h_to_h.weight has values beyond dtype=fp16" in message


def test_an_existing_target_stays(tmp_path, folders, capsys):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("keep")
    argv = [f"source={folders['glm_130b-source']}", f"target={target}", "format=glm_130b"]
    assert cli.run("convert", ConvertConfig, main, program="train.convert", argv=argv) == EXIT_CONFIG
    assert f"target={target} exists already" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_a_source_that_is_not_there(tmp_path, capsys):
    assert "no such folder" in refused(capsys, EXIT_DATA, tmp_path / "no", tmp_path / "target", "format=glm")


def test_a_disk_that_is_too_small_and_one_that_fills_up(tmp_path, folders, capsys, monkeypatch):
    source, target = folders["chatglm_6b-source"], tmp_path / "target"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "GB are free" in refused(capsys, EXIT_DATA, source, target, "format=chatglm_6b")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files.os, "fsync", full)
    assert "the disk is full" in refused(capsys, EXIT_DATA, source, target, "format=chatglm_6b")


def test_a_foreign_config_of_an_unknown_rope_or_a_window(tmp_path, tiny_dataset, capsys):
    model = model_of(**MODELS["qwen2"])
    config = config_of(model, objective="causal")
    source = write_checkpoint(tmp_path / "source", config, weights_of(model), tiny_dataset)
    away = convert(source, tmp_path / "away", "qwen2")
    description = json.loads((away / "config.json").read_text())
    del description["tiankong"]
    (away / "config.json").write_text(json.dumps(description))
    # As Qwen2's own files are: nothing of ours, and no word on the bias that its class always has.
    assert "attention_bias" in description
    (away / "config.json").write_text(json.dumps({key: description[key] for key in description if "bias" not in key}))
    assert same(stored(convert(away, tmp_path / "home", "qwen2")), stored(source))
    rope = {**description["rope_parameters"], "rope_type": "yarn"}
    for change, said in (
        ({"rope_parameters": rope}, "rope_type=yarn"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ):
        (away / "config.json").write_text(json.dumps(description | change))
        assert said in refused(capsys, EXIT_CONFIG, away, tmp_path / "target", "format=qwen2")
    wide = model_of(**MODELS["qwen2"], head_dim=16)
    other = write_checkpoint(tmp_path / "wide", config_of(wide, objective="causal"), weights_of(wide), tiny_dataset)
    assert "model.head_dim=16" in refused(capsys, EXIT_CONFIG, other, tmp_path / "target", "format=qwen2")
