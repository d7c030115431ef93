"""Conversion there and back: every format, dtype and tensor-parallel size, bit for bit; names as published."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import ConfigError
from data_prep.tokenizer import SPECIALS, Tokenizer
from tests.data_prep.tokenizer_files import ice_text_model
from tests.train.convert_helpers import (
    CAUSAL,
    LLAMA,
    MODELS,
    composed,
    config_of,
    convert,
    model_of,
    read_config,
    same,
    stored,
    weights_of,
    write_checkpoint,
)
from train.checkpoint.model import load_trained
from train.checkpoint.select import damage, find
from train.convert.mapping import Mapping, layouts
from train.convert.registry import FORMATS
from train.convert.tokenizers import write_tokenizer
from train.convert.vocabulary import Vocabulary

pytestmark = pytest.mark.unit


def objective_of(form: str) -> str:
    return "causal" if FORMATS[form].causal else "blank_infilling"


def checkpoint(folder: Path, dataset: Path, form: str, dtype: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    model = model_of(**{**MODELS[form], **changes})
    weights = weights_of(model, dtype)
    config = config_of(model, objective=objective_of(form), dtype=dtype)
    return write_checkpoint(folder, config, weights, dataset), weights


CASES = [
    ("glm_130b", "fp32", 1, {}),
    ("glm_130b", "fp16", 2, {}),
    ("glm_130b", "bf16", 4, {}),
    ("chatglm_6b", "fp16", 1, {}),
    ("chatglm2_6b", "bf16", 1, {}),
    # Halves become neighbours and back; heads of their own become groups of one; a tied head.
    ("glm", "fp32", 1, LLAMA),
    ("llama", "bf16", 1, {"rotary_interleaved": True, "num_kv_heads": None}),
    ("qwen2", "fp16", 1, {}),
    ("glm", "fp16", 1, {"num_kv_heads": None, "tied_embeddings": True, "rotary_interleaved": False}),
    ("huggingface", "fp16", 1, {}),
    ("huggingface", "fp32", 1, CAUSAL),
]


@pytest.mark.parametrize(("form", "dtype", "ranks", "changes"), CASES)
def test_there_and_back_is_exact(tmp_path, tiny_dataset, form, dtype, ranks, changes):
    source, weights = checkpoint(tmp_path / "source", tiny_dataset, form, dtype, **changes)
    away = convert(source, tmp_path / "away", form, tensor_parallel=ranks)
    home = convert(away, tmp_path / "home", form, tensor_parallel=ranks)
    assert same(stored(home), weights)
    before, after = read_config(source / "config.yaml"), read_config(home / "config.yaml")
    assert asdict(after.model) == asdict(before.model)
    assert after.precision.dtype == dtype
    assert after.data.sampling.objective == before.data.sampling.objective
    # The result is a whole checkpoint, and what leaves it again is the same files.
    assert damage(find(home)) is None
    again = convert(home, tmp_path / "again", form, tensor_parallel=ranks)
    for path in [*away.rglob("*.pt"), *away.rglob("*.safetensors")]:
        name = str(path.relative_to(away))
        twin = again / (name if not name.startswith("30/") else f"0/{path.name}")
        assert twin.read_bytes() == path.read_bytes(), name


def test_the_imported_model_computes_the_same(tmp_path, tiny_dataset):
    """Rotary halves turned into neighbours by the way to `glm` and read back without our block give the same logits."""
    source, _ = checkpoint(tmp_path / "source", tiny_dataset, "glm", "fp32", rotary_interleaved=False)
    away = convert(source, tmp_path / "away", "glm")
    description = json.loads((away / "config.json").read_text())
    del description["tiankong"]
    (away / "config.json").write_text(json.dumps(description))
    home = convert(away, tmp_path / "home", "glm")
    one, other = (load_trained(folder, torch.device("cpu")) for folder in (source, home))
    assert other.config.model.rotary_interleaved
    assert not same(stored(source), stored(home))
    tokens = torch.randint(0, 600, (2, 40), generator=torch.Generator().manual_seed(1))
    slots = torch.arange(40).expand(2, 40)
    meta = torch.stack([slots, 0 * slots, 0 * slots, slots + 1], 1)
    logits = [trained.model.head.logits(trained.model((tokens, meta, torch.arange(2)))) for trained in (one, other)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()


def test_names_and_shapes_of_the_released_glm_130b():
    """One rank of eight, from the published table."""
    model = composed(["data.path=x", "model=glm_130b"]).model
    cuts = layouts(model, 3, 8)
    entries = _mapping("glm_130b", model).entries
    found = {key: cuts[entry.parts[0].name].local_shape for key, entry in entries.items()}
    layer = {
        "input_layernorm.weight": (12288,),
        "input_layernorm.bias": (12288,),
        "attention.query_key_value.weight": (4608, 12288),
        "attention.query_key_value.bias": (4608,),
        "attention.dense.weight": (12288, 1536),
        "attention.dense.bias": (12288,),
        "post_attention_layernorm.weight": (12288,),
        "post_attention_layernorm.bias": (12288,),
        "mlp.dense_h_to_4h.weight": (8192, 12288),
        "mlp.dense_h_to_4h.bias": (8192,),
        "mlp.dense_4h_to_h.weight": (12288, 4096),
        "mlp.dense_4h_to_h.bias": (12288,),
    }
    wanted = {f"transformer.layers.{n}.{key}": shape for n in range(70) for key, shape in layer.items()}
    wanted["transformer.word_embeddings.weight"] = (18816, 12288)
    wanted |= {f"transformer.final_layernorm.{kind}": (12288,) for kind in ("weight", "bias")}
    assert found == wanted


def test_names_and_shapes_of_the_released_chatglm_models():
    first = _mapping("chatglm_6b", composed(["data.path=x", "model=chatglm_6b"]).model).shapes
    assert len(first) == 28 * 12 + 4
    assert first["lm_head.weight"] == first["transformer.word_embeddings.weight"] == (130528, 4096)
    assert first["transformer.layers.27.mlp.dense_h_to_4h.weight"] == (16384, 4096)
    second = _mapping("chatglm2_6b", composed(["data.path=x", "model=chatglm2_6b"]).model).shapes
    assert len(second) == 28 * 7 + 3
    assert second["transformer.encoder.layers.0.self_attention.query_key_value.weight"] == (4608, 4096)
    assert second["transformer.encoder.layers.0.self_attention.query_key_value.bias"] == (4608,)
    assert second["transformer.encoder.layers.27.mlp.dense_h_to_4h.weight"] == (27392, 4096)
    assert second["transformer.output_layer.weight"] == (65024, 4096)


class _Pieces(Tokenizer):
    """A tokenizer's counts without its model."""

    kind = "sentencepiece"

    def __init__(self, pieces: int) -> None:
        self.pieces, self.vocab_size, self.name = pieces, pieces + len(SPECIALS), "pieces"
        self.special_ids = {special: pieces + offset for offset, special in enumerate(SPECIALS)}


def _mapping(form: str, model: Any) -> Mapping:
    vocabulary = Vocabulary(_Pieces(500), model.padded_vocab_size)
    shapes = {name: layout.full_shape for name, layout in layouts(model).items()}
    return Mapping(FORMATS[form].entries(model, vocabulary), shapes)


def test_special_tokens_and_images_move_to_the_foreign_rows(tmp_path, tiny_dataset):
    """ChatGLM2 has no eod and so sop, eop one row earlier; icetk's tables begin with images."""
    tokenizer = Tokenizer.load(tiny_dataset)
    source, weights = checkpoint(tmp_path / "one", tiny_dataset, "chatglm2_6b", "fp16")
    table = weights["word_embeddings.weight"]
    away = load_file(convert(source, tmp_path / "away", "chatglm2_6b") / "model.safetensors")
    there = away["transformer.embedding.word_embeddings.weight"]
    assert torch.equal(there[: tokenizer.pieces + 3], table[: tokenizer.pieces + 3])
    assert torch.equal(there[tokenizer.pieces + 3], table[tokenizer.sop])
    assert torch.equal(there[tokenizer.pieces + 4], table[tokenizer.eop])
    source, weights = checkpoint(tmp_path / "two", tiny_dataset, "chatglm_6b", "fp16")
    table = weights["word_embeddings.weight"]
    folder = convert(source, tmp_path / "images", "chatglm_6b", image_tokens=20)
    there = load_file(folder / "model.safetensors")["transformer.word_embeddings.weight"]
    assert torch.equal(there[20 : 20 + tokenizer.vocab_size], table[: tokenizer.vocab_size])
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == 20 + tokenizer.sop
    assert same(stored(convert(folder, tmp_path / "home", "chatglm_6b")), weights)


def test_icetks_own_special_tokens_stay_among_its_pieces(tmp_path):
    """Only the rows of images move; a format whose tokenizer files cannot say it is refused."""
    tokenizer = Tokenizer.load(
        ice_text_model(tmp_path / "ice_text.model", ["好的 " * 40, "it is " * 40, "天气很好，花开了。"], complete=False)
    )
    rows = tokenizer.vocab_size + 30
    vocabulary = Vocabulary(tokenizer, rows, image_tokens=20)
    native = vocabulary.native_rows().tolist()
    assert sorted(native) == list(range(rows))
    assert native[20 : 20 + tokenizer.vocab_size] == list(range(tokenizer.vocab_size))
    assert vocabulary.foreign_id("MASK") == 20 + tokenizer.mask < 20 + tokenizer.pieces - 256
    assert Vocabulary(tokenizer, rows).native_rows() is None
    assert Vocabulary(tokenizer, rows).token_ids()["sop_token_id"] == tokenizer.sop
    with pytest.raises(ConfigError, match=r"format=chatglm_6b: .*ice_text\.model is icetk's model .* use glm_130b"):
        write_tokenizer(tmp_path, FORMATS["chatglm_6b"], vocabulary, config=None)


def test_shards_and_their_index(tmp_path, tiny_dataset):
    source, weights = checkpoint(tmp_path / "source", tiny_dataset, "llama", "fp16")
    away = convert(source, tmp_path / "away", "llama", shard_gigabytes=20e-6)
    index = json.loads((away / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(index["weight_map"][key] == name for name in files for key in load_file(away / name))
    home = convert(away, tmp_path / "home", "llama", shard_gigabytes=20e-6)
    assert len(list((home / "model").iterdir())) > 3
    assert same(stored(home), weights)


@pytest.mark.parametrize(("form", "bits"), [("glm_130b", 4), ("chatglm_6b", 8), ("chatglm2_6b", 4)])
def test_quantised_files_hold_what_they_say_and_come_back(tmp_path, tiny_dataset, form, bits):
    """Written, read into fp32 and written again, the integers and scales are the same bits."""
    source, weights = checkpoint(tmp_path / "source", tiny_dataset, form, "fp16")
    ranks = 2 if form == "glm_130b" else 1
    away = convert(source, tmp_path / "away", form, quantise=f"int{bits}", tensor_parallel=ranks)
    home = convert(away, tmp_path / "home", form, dtype="fp32", tensor_parallel=ranks)
    for name, value in stored(home).items():
        if value.dim() == 2 and name.startswith("layers."):
            step = value.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert 0 < (value - weights[name]).abs().max() <= (step * 0.51).max()
        else:
            assert torch.equal(value, weights[name].float())
    again = convert(home, tmp_path / "again", form, quantise=f"int{bits}", dtype="fp16", tensor_parallel=ranks)
    for path in [*away.rglob("*.pt"), *away.rglob("*.safetensors")]:
        name = str(path.relative_to(away)).replace("30/", "0/")
        assert (again / name).read_bytes() == path.read_bytes()
    if form == "glm_130b":
        state = torch.load(away / "30" / "mp_rank_01_model_states.pt", weights_only=True)["module"]
        assert state["transformer.layers.0.mlp.dense_4h_to_h.weight"].shape == (32, 12)
        assert state["transformer.layers.0.mlp.dense_4h_to_h.weight_scale"].dtype == torch.float16


def test_a_cast_on_the_way(tmp_path, tiny_dataset):
    source, weights = checkpoint(tmp_path / "source", tiny_dataset, "glm_130b", "fp32")
    home = convert(convert(source, tmp_path / "away", "glm_130b", dtype="bf16"), tmp_path / "home", "glm_130b")
    assert same(stored(home), {name: value.bfloat16() for name, value in weights.items()})


@pytest.mark.slow
@pytest.mark.e2e
def test_imported_weights_train_and_generate(tmp_path, tiny_run, tiny_overrides, command):
    """The command line, from a run to GLM-130B's files and back, then a new run that starts from there."""
    command(
        "train.convert", f"source={tiny_run}", f"target={tmp_path / 'away'}", "format=glm_130b", "tensor_parallel=2"
    )
    words = f"source={tmp_path / 'away'}", f"target={tmp_path / '回家'}", "format=glm_130b", "tensor_parallel=2"
    command("train.convert", *words)
    home = tmp_path / "回家"
    texts = [
        command("train.generate", f"checkpoint={folder}", "text=孔明曰[MASK]主公", "max_new_tokens=4").stdout
        for folder in (tiny_run, home)
    ]
    assert texts[0] == texts[1]
    assert "孔明曰" in texts[0]
    command("train", *tiny_overrides, f"run_dir={tmp_path / 'run'}", f"initialize_from={home}", "max_steps=1")
    before = [json.loads(line)["loss"] for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    after = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    # The same first samples, now with trained weights.
    assert after < before[0] - 0.2
