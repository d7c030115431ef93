"""What leaves loads in transformers from the folder alone and computes the same logits, text and token ids."""

import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.batch import Batch
from data_prep.clean import clean_text
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from data_prep.samples import Sampler
from data_prep.sources import BUNDLED
from data_prep.tokenizer import SPECIALS, Tokenizer
from kernels.rotary import rotary_angles
from tests.data_prep.tokenizer_files import byte_level, ice_text_model, metaspace
from tests.train.convert_helpers import (
    CAUSAL,
    CHATGLM,
    MODELS,
    config_of,
    convert,
    model_of,
    weights_of,
    write_checkpoint,
)
from train.checkpoint.model import load_trained
from train.convert.registry import format_of
from train.convert.tokenizers import spelling, write_tokenizer
from train.convert.vocabulary import Vocabulary
from train.generation.blanks import fill
from train.generation.picking import Decoding
from train.labels import inputs
from train.mesh import Mesh
from train.model.build import Model

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
ROPE_INIT_FUNCTIONS = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
YARN = {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_original_positions": 2048}
OWN = [
    ("blank_infilling", {}),
    ("blank_infilling", {"rotary_fp16_angles": True, "norm_placement": "post"}),
    ("causal", {"rotary_scaling": "linear", "rotary_scaling_factor": 4.0}),
    ("causal", {"rotary_scaling": "ntk", "rotary_scaling_factor": 4.0}),
    ("blank_infilling", YARN),
    ("causal", {**YARN, **CHATGLM}),
    ("blank_infilling", CHATGLM),
    ("blank_infilling", {"positions": "learned_2d", "norm_placement": "sandwich", "activation": "gelu"}),
    ("causal", CAUSAL),
    ("causal", {"positions": "none", "norm_placement": "pre", "deepnorm_alpha": 2.0}),
]
TEXTS = [
    "孔明曰：“主公勿忧。” 今天天气很好，我们去公园玩了3.14个小时。",
    "It was a bright cold day in April,\nand the  clocks were striking thirteen. don't!",
    " leading space, emoji 🙂, 繁體字 and\ttabs ",
]


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers copies remote code into a cache before it runs it."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    folder = str(tmp_path_factory.mktemp("hf_modules"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (dynamic_module_utils, hub):
            patch.setattr(module, "HF_MODULES_CACHE", folder, raising=False)
        yield


def exported(folder: Path, dataset: Path, form: str, objective: str, changes: dict[str, Any]) -> tuple[Any, Path]:
    """A random checkpoint loaded as ours, and its export."""
    model = model_of(**changes)
    config = config_of(model, objective=objective)
    source = write_checkpoint(folder / "source", config, weights_of(model), dataset)
    return load_trained(source, CPU), convert(source, folder / "away", form)


def theirs(folder: Path) -> Any:
    # dtype in words: the default of transformers has changed before.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def our_logits(trained: Any, tokens: Tensor, meta: Tensor) -> Tensor:
    return trained.model.head.logits(trained.model((tokens, meta, torch.zeros(len(tokens), dtype=torch.int64))))


def causal_meta(tokens: Tensor) -> Tensor:
    slots = torch.arange(tokens.shape[1]).expand_as(tokens)
    return torch.stack([slots, 0 * slots, 0 * slots, slots + 1], 1)


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * one.abs().max().clamp(min=1))


@pytest.mark.parametrize(("objective", "changes"), OWN)
def test_our_modeling_file_computes_training_samples(tmp_path, tiny_dataset, objective, changes):
    """Logits of whole training samples, with positions and intervals read off the token ids alone."""
    trained, folder = exported(tmp_path, tiny_dataset, "huggingface", objective, changes)
    model = theirs(folder)
    sampling = trained.config.data.sampling
    sampling.mask_segments, sampling.mask_share, sampling.gmask_share = 1, 0.5, 0.5
    sampling.short_text_probability = 0.0
    dataset = Dataset.open(tiny_dataset)
    sampler = Sampler(dataset, sampling, 64, seed=3)
    samples = [sampler.sample(index) for index in range(24)]
    # A [gMASK] sample may hold no context; several spans come shuffled, where `generate` writes them in order.
    tokenizer = dataset.tokenizer
    simple = [sample for sample in samples if objective == "causal" or (sample.tokens == tokenizer.sop).sum() == 1]
    assert len(simple) > 5
    batch = Batch.from_samples(simple)
    tokens, meta, _ = inputs(batch)
    wanted = our_logits(trained, tokens, meta)
    with torch.no_grad():
        found = model(tokens).logits
    used = (batch.loss_weight > 0)[..., None]
    assert close(wanted * used, found * used)


@pytest.mark.parametrize("form", ["glm", "llama", "qwen2"])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": None, "rotary_interleaved": True, "tied_embeddings": True}])
def test_the_classes_that_transformers_ships(tmp_path, tiny_dataset, form, changes):
    settings = {**MODELS[form], **changes}
    trained, folder = exported(tmp_path, tiny_dataset, form, "causal", settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == f"{form.capitalize()}ForCausalLM"
    tokens = torch.randint(0, 600, (3, 50), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert close(our_logits(trained, tokens, causal_meta(tokens)), model(tokens).logits)


@pytest.mark.parametrize("form", ["huggingface", "glm", "chatglm2_6b"])
def test_token_ids_are_ours(tmp_path, tiny_dataset, form):
    _, folder = exported(tmp_path, tiny_dataset, form, "causal", CAUSAL)
    tokenizer = Tokenizer.load(tiny_dataset)
    there = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert len(there) >= tokenizer.vocab_size
    unseen = []
    for lang in ("zh", "en"):
        with gzip.open(BUNDLED / f"{lang}.jsonl.gz", "rt", encoding="utf-8") as packed:
            unseen += [json.loads(line)["text"] for line in itertools.islice(packed, 100, 115)]
    for text in [*TEXTS, *(clean_text(text)[:3000] for text in unseen)]:
        ids = tokenizer.encode(text)
        assert there(text, add_special_tokens=False).input_ids == ids, text
        assert there.decode(ids) == tokenizer.decode(ids) == text
    for text in ("中[MASK]国[gMASK]", "a[sMASK]"):
        assert there(text, add_special_tokens=False).input_ids == tokenizer.encode_with_masks(text)
    assert there.convert_tokens_to_ids("<|sop|>") == tokenizer.sop - (form == "chatglm2_6b")
    if form == "huggingface":
        assert there("two [MASK] here", add_special_tokens=False).input_ids == tokenizer.encode_with_masks(
            "two [MASK] here"
        )
        assert there.decode(there("中 [MASK] a").input_ids, skip_special_tokens=True) == "中 a"
        there.save_pretrained(tmp_path / "again")
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert again(TEXTS[0]).input_ids == there(TEXTS[0]).input_ids


def test_generate_writes_what_we_write(tmp_path, tiny_run):
    """Greedy filling by transformers' generate with its cache, alone and in a left-padded batch."""
    folder = convert(tiny_run, tmp_path / "away", "huggingface")
    trained, model = load_trained(tiny_run, CPU), theirs(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = ["孔明曰[MASK]主公", "It was the best of[gMASK]", "天[MASK]"]
    wanted = []
    for text in texts:
        ours = trained.tokenizer.encode_with_masks(text)
        wanted.append(fill(trained.model, trained.tokenizer, ours, Decoding(max_new_tokens=9))[0])
    for text, filled in zip(texts, wanted, strict=True):
        asked = tokenizer(text, return_tensors="pt")
        for cached in (True, False):
            ids = model.generate(**asked, max_new_tokens=9, do_sample=False, use_cache=cached)[0].tolist()
            assert [token for token in ids[asked.input_ids.shape[1] :] if token < trained.tokenizer.pieces] == filled
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    written = model.generate(**batch, max_new_tokens=9, do_sample=False)[:, batch.input_ids.shape[1] :]
    for row, filled in zip(written.tolist(), wanted, strict=True):
        assert [token for token in row if token < trained.tokenizer.pieces] == filled


@pytest.mark.parametrize("kind", ["json", "ice"])
def test_tokenizers_that_were_brought_go_out_with_their_ids(tmp_path, kind):
    """A tokenizer.json with our special tokens behind it, and icetk's text model with its pieces for white space."""
    source = tmp_path / ("brought.json" if kind == "json" else "ice_text.model")
    tokenizer = Tokenizer.load((metaspace if kind == "json" else ice_text_model)(source, [*TEXTS, "the cat sat on it"]))
    config = config_of(model_of(), objective="causal")
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    write_tokenizer(tmp_path / "away", format_of("huggingface"), vocabulary, config)
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "away", trust_remote_code=True)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert there(text, add_special_tokens=False).input_ids == ids
        assert there.decode(ids) == tokenizer.decode(ids)
    assert [there.convert_tokens_to_ids(spelling(name)) for name in SPECIALS] == list(tokenizer.special_ids.values())


def test_special_tokens_among_the_pieces_do_not_convert(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "brought.json", TEXTS))
    with pytest.raises(ConfigError, match=r"brought\.json: some special tokens stand among its pieces"):
        Vocabulary(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("dim", "fraction", "base", "factor", "before"),
    [
        (128, 1.0, 1e4, 4.0, 2048),
        (128, 0.5, 1e4, 16.0, 4096),
        (64, 1.0, 5e5, 40.0, 8192),
        (8, 1.0, 1e4, 8.0, 2048),
        # Every pair turns less than 32 times; the last one more than once.
        (32, 1.0, 10.0, 2.0, 150),
    ],
)
def test_yarn_is_that_of_transformers(dim, fraction, base, factor, before):
    """Frequencies, and the factor that transformers puts on queries and keys and we on their product."""
    model = model_of(
        hidden_size=4 * dim,
        num_heads=4,
        rotary_base=base,
        rotary_fraction=fraction,
        rotary_scaling="yarn",
        rotary_scaling_factor=factor,
        rotary_original_positions=before,
    )
    context = Model(config_of(model, objective="causal"), Mesh.single(), torch.float32).context
    rotated = round(dim * fraction)
    angles = rotary_angles(
        torch.ones(1, 2, 1, dtype=torch.int32), rotary_dim=rotated, mode="1d", **context.rotary_options
    )
    config = transformers.LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=9 * before)
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": base, "factor": factor}
    config.rope_parameters |= {"original_max_position_embeddings": before, "partial_rotary_factor": fraction}
    wanted, on_each = ROPE_INIT_FUNCTIONS["yarn"](config)
    torch.testing.assert_close(torch.atan2(angles[1], angles[0])[0, 0], wanted, rtol=2e-6, atol=1e-9)
    assert context.attention_scale == pytest.approx(dim**-0.5 * on_each**2, rel=1e-12)
