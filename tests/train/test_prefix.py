"""P-Tuning v2: a prefix is what came before, for each segment alike; only it moves, in any layout; caches hold it."""

import json
from pathlib import Path

import pytest
import torch

from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from kernels.resolve import choose
from tests.train.convert_helpers import convert
from tests.train.parity import assert_two_ranks_follow_one
from tests.train.test_evaluate_tasks import questions
from tests.train.test_generate_decoding import contexts, logits_again
from tests.train.variants import VARIANTS, untrained
from train.checkpoint.model import load_trained
from train.checkpoint.pieces import PieceReader
from train.checkpoint.select import find
from train.cli import compose_train
from train.generation.blanks import fill_all
from train.generation.decoder import Decoder
from train.generation.forms import Form
from train.generation.picking import Decoding
from train.generation.scoring import score, score_alone
from train.mesh import Mesh
from train.model.build import Model
from train.model.prefix import is_prefix

CPU = torch.device("cpu")
PREFIX = ["prefix.length=3"]


def logits(model: Model, tokens: torch.Tensor, place: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Of tokens [slots] at positions `place` that see the slots from `first` up to themselves."""
    slots = torch.arange(len(tokens))
    meta = torch.stack([place, slots * 0, first, slots + 1])[None]
    with torch.no_grad():
        return model.head.logits(model((tokens[None], meta, torch.zeros(1, dtype=torch.int64))))[0]


@pytest.mark.unit
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prefix_of_a_texts_keys_and_values_is_that_text(variant):
    """Of a model without prefix, keys and values of a text's beginning; given as a prefix, the rest comes out the same,
    and so does a second segment of the same sequence."""
    plain, tuned = untrained(variant), untrained(variant, prefix=5)
    tokens = torch.randint(0, 600, (17,), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(plain, 1, 5)
    decoder.begin([tokens[:5].tolist()], causal=True)
    tuned.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for index, layer in enumerate(decoder.cache.layers):
            prefix = tuned.items[index + 1].attention.prefix
            prefix.key.copy_(layer.keys[0].flatten(1))
            prefix.value.copy_(layer.values[0].flatten(1))
    wanted = logits(plain, tokens, torch.arange(17), torch.zeros(17, dtype=torch.int64))[5:]
    rest, place = tokens[5:].repeat(2), torch.arange(5, 17).repeat(2)
    first = torch.arange(24) // 12 * 12
    found = logits(tuned, rest, place, first)
    assert (found - wanted.repeat(2, 1)).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.unit
@pytest.mark.parametrize("variant", ["glm_130b", "rotary_2d", "multi_query"])
def test_generation_and_scoring_over_a_cache_see_the_prefix(tiny_dataset, variant):
    tokenizer = Dataset.open(tiny_dataset).tokenizer
    model, other = untrained(variant, prefix=3), untrained(variant)
    texts = contexts(tokenizer)
    written = fill_all(model, tokenizer, texts, Decoding(5))
    assert written != fill_all(other, tokenizer, texts, Decoding(5))
    for text, blanks in zip(texts, written, strict=True):
        form = Form.of(text, tokenizer, model.context.model)
        again, slot = logits_again(model, form, blanks), 0
        again[:, tokenizer.mask :] = -torch.inf
        for blank in blanks:
            # Where a piece was written, it is the likeliest piece of one pass without a cache.
            assert again[slot : slot + len(blank)].argmax(-1).tolist() == blank
            slot += len(blank) + 1
    asked = questions(tokenizer, model, causal=False)[:6]
    for question, found in zip(asked, score(model, tokenizer, asked), strict=True):
        for answer, one in zip(question.answers, found, strict=True):
            alone = score_alone(model, tokenizer, question, answer)
            assert one.log_probability == pytest.approx(alone.log_probability, rel=1e-5)


@pytest.mark.distributed
def test_layouts_learn_the_same():
    """Heads that the ranks divide, and one key-value head that both hold."""
    kinds = [[*PREFIX], [*PREFIX, "model.num_kv_heads=1"]]
    divided = ["parallel.tensor_parallel=2", "parallel.zero_stage=0"]
    layouts = [divided, [*divided, "parallel.sequence_parallel=true"], ["parallel.zero_stage=2"]]
    assert_two_ranks_follow_one(kinds, layouts, 4)


@pytest.mark.e2e
def test_only_the_prefix_is_trained_and_its_checkpoint_is_used_but_not_converted(
    tmp_path: Path, tiny_run: Path, tiny_overrides: list[str], chat: Path, command
) -> None:
    words = [word for word in tiny_overrides if not word.startswith("data.path")]
    words += [f"data.path={chat}", f"initialize_from={tiny_run}", f"run_dir={tmp_path / 'run'}", "max_steps=12"]
    command("train", *words, *PREFIX, "optimizer.lr=0.05", "data.sampling.instruction_mask=gMASK")
    before, after = (PieceReader(find(run), ("model",)) for run in (tiny_run, tmp_path / "run"))
    assert [name for name in after.names("weight") if not is_prefix(name)] == before.names("weight")
    assert all(torch.equal(before.full("weight", name), after.full("weight", name)) for name in before.names("weight"))
    # What it started from is drawn by address.
    start = Model(compose_train([*words, *PREFIX]), Mesh.single(), torch.float32)
    drawn = {parameter.placement.name: parameter for parameter in start.parameters() if parameter.requires_grad}
    assert sorted(drawn) == [name for name in after.names("weight") if is_prefix(name)]
    assert len(drawn) == 2 * 2
    assert all(not torch.equal(after.full("weight", name), parameter) for name, parameter in drawn.items())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    trained = load_trained(tmp_path / "run", CPU)
    for layer, item in enumerate(trained.model.items[1:-1]):
        assert torch.equal(item.attention.prefix.key, after.full("weight", f"layers.{layer}.attention.prefix_key"))
    with pytest.raises(ConfigError, match=r"prefix\.length=3.*cannot be merged.*lora\.rank"):
        convert(tmp_path / "run", tmp_path / "away", "huggingface")
    assert not (tmp_path / "away").exists()


@pytest.mark.unit
def test_a_kernel_without_it_is_refused_by_name_and_auto_takes_another():
    assert choose("interval_attention", "auto", "cuda", torch.bfloat16, {"prefix"}) == "sdpa"
    assert choose("interval_attention", "auto", "cuda", torch.bfloat16, {"prefix", "dropout"}) == "reference"
    with pytest.raises(ValueError, match=r"kernels\.interval_attention=triton: triton lacks prefix; use reference"):
        choose("interval_attention", "triton", "cuda", torch.bfloat16, {"prefix"})
