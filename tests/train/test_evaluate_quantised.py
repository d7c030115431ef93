"""Quantised models: equal to a model with the rounded weights, on one rank and on several, near the exact one."""

from pathlib import Path

import pytest
import torch

from data_prep import cli
from data_prep.errors import EXIT_CONFIG
from kernels.quantised_weight import dequantise, quantise
from tests.train.parity import in_ranks
from tests.train.variants import VARIANTS, untrained
from train import backend, evaluate
from train.checkpoint.model import load_trained
from train.evaluate import EvaluateConfig
from train.model.build import Model
from train.model.layers import Attention, FeedForward
from train.model.quantised import BITS, MATRICES, QuantisedWeight, quantise_model, weight_bytes

pytestmark = pytest.mark.unit


def hidden(model: Model) -> torch.Tensor:
    slots = torch.arange(12)
    meta = torch.stack([slots, slots * 0, slots * 0, (slots + 1).clamp(min=8)])[None].expand(2, -1, -1)
    tokens = torch.randint(0, 600, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model((tokens, meta, torch.zeros(2, dtype=torch.int64)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("word, group", [("int8", None), ("int4", None), ("int4", 8)])
def test_it_computes_with_the_rounded_weights(variant, word, group):
    quantised, rounded = untrained(variant), untrained(variant)
    quantise_model(quantised, word, group, "auto")
    for part in rounded.modules():
        if isinstance(part, Attention | FeedForward):
            for name in MATRICES:
                if (weight := part._parameters.get(name)) is not None:
                    pair = quantise(weight.detach(), BITS[word], group_size=group)
                    weight.data = dequantise(*pair, BITS[word])
    assert sum(isinstance(module, QuantisedWeight) for module in quantised.modules()) >= 8
    assert torch.allclose(hidden(quantised), hidden(rounded), atol=1e-5)
    assert not torch.allclose(hidden(quantised), hidden(untrained(variant)), atol=1e-5)


def test_packed_weights_take_a_quarter_and_an_eighth_of_fp32():
    sizes = []
    for word in (None, "int8", "int4"):
        model = untrained(hidden_size=256, num_heads=4, ffn_hidden_size=512)
        if word is not None:
            quantise_model(model, word, None, "auto")
        sizes.append(weight_bytes(model.items[1:-1]))
    assert sizes[1] / sizes[0] == pytest.approx(1 / 4, rel=0.05)
    assert sizes[2] / sizes[0] == pytest.approx(1 / 8, rel=0.1)


def test_a_trained_model_keeps_its_loss(tiny_run: Path, tiny_dataset: Path):
    """INT8 within 0.1 % and INT4 within 3 % of the exact perplexity; the demo's figures are in benchmarks/."""
    found = {}
    for word in (None, "int8", "int4"):
        trained = load_trained(tiny_run, torch.device("cpu"), quantise=word)
        stack = evaluate.ExitStack()
        sampler, _ = evaluate.held_out(trained, evaluate.HeldOutConfig(str(tiny_dataset)), "valid", stack)
        found[word] = evaluate.evaluate(trained, sampler, 16, 8)["perplexity"]
    assert found["int8"] == pytest.approx(found[None], rel=1e-3)
    assert found["int4"] == pytest.approx(found[None], rel=3e-2)
    assert len(set(found.values())) == 3


def _on_ranks(variants: list[str]) -> list[list[float]]:
    mesh = backend.tensor_mesh()
    models = [untrained(variant, mesh) for variant in variants]
    exact = [hidden(model) for model in models]
    for model in models:
        quantise_model(model, "int8", None, "auto")
    return [torch.stack([one, hidden(model)]).tolist() for one, model in zip(exact, models, strict=True)]


@pytest.mark.distributed
def test_ranks_quantise_their_own_pieces():
    variants = ["glm_130b", "multi_query"]
    runs = in_ranks(1, _on_ranks, variants), in_ranks(2, _on_ranks, variants)
    for alone, shared in zip(*(torch.tensor(run) for run in runs), strict=True):
        assert torch.allclose(shared[0], alone[0], atol=1e-5)
        rounding = (alone[1] - alone[0]).abs().max()
        assert 0 < (shared[1] - alone[0]).abs().max() < 2 * rounding


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantise=int2"], "quantise=int2 is not known; use int8, int4 or null"),
        (["quantise_group=64"], "quantise_group=64 needs quantise=int8 or int4"),
        (["quantise=int4", "quantise_group=48"], "quantise_group=48 does not divide the 64 columns"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_run, capsys, words, message):
    words = [f"checkpoint={tiny_run}", *words]
    assert cli.run("evaluate", EvaluateConfig, evaluate.main, program="e", argv=words) == EXIT_CONFIG
    assert message in capsys.readouterr().err
