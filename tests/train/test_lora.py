"""LoRA: the plain model at the start, merged equal to unmerged at the end, only A and B move, in any layout."""

import json
from pathlib import Path

import pytest
import torch

from tests.train.parity import assert_two_ranks_follow_one, curves, plain_curve
from train.checkpoint.model import load_trained, read_config
from train.checkpoint.pieces import PieceReader
from train.checkpoint.select import find
from train.mesh import Mesh
from train.model.build import Model, named_layouts
from train.model.lora import MergedReader, is_lora
from train.model.tensor_parallel import LowRank

CPU = torch.device("cpu")
LORA = ["lora.rank=4", "lora.alpha=16", "lora.targets=[qkv,dense,ffn]"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_run, tiny_overrides, chat, command) -> Path:
    """The tiny run tuned on it for 12 steps with LoRA."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    words = [word for word in tiny_overrides if not word.startswith("data.path")]
    words += [
        f"data.path={chat}",
        f"initialize_from={tiny_run}",
        f"run_dir={run_dir}",
        "max_steps=12",
        "optimizer.lr=0.01",
    ]
    command("train", *words, *LORA, "data.sampling.instruction_mask=gMASK")
    return run_dir


@pytest.mark.e2e
def test_only_the_low_rank_parts_are_trained_and_the_loss_falls(tiny_run, tuned):
    before, after = (PieceReader(find(run), ("model",)) for run in (tiny_run, tuned))
    assert [name for name in after.names("weight") if not is_lora(name)] == before.names("weight")
    for name in before.names("weight"):
        assert torch.equal(before.full("weight", name), after.full("weight", name))
    low = [name for name in after.names("weight") if is_lora(name)]
    assert len(low) == 2 * 4 * 2  # A and B of four matrices in two layers
    assert all(after.full("weight", name).abs().max() > 0 for name in low)
    metrics = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in metrics]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    assert {group for record in metrics for group in record["loss_by_group"]} == {"instruction/zh"}


@pytest.mark.e2e
def test_merged_weights_compute_what_the_parts_do(tiny_run, tuned):
    folder = find(tuned)
    config, merged = read_config(folder / "config.yaml"), load_trained(tuned, CPU)
    apart, reader = Model(config, Mesh.single(), torch.float32).eval(), PieceReader(folder, ("model",))
    assert sum(isinstance(module, LowRank) for module in apart.modules()) == 8
    assert not any(isinstance(module, LowRank) for module in merged.model.modules())
    slots = torch.arange(30)
    meta = torch.stack([slots, slots * 0, slots * 0, (slots + 1).clamp(min=20)])[None]
    state = torch.arange(30)[None] + 5, meta, torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        for layout, parameter in named_layouts(apart.parameters()):
            parameter.data = reader.local("weight", layout)
        one, two = (model.head.logits(model(state)) for model in (apart, merged.model))
        base = load_trained(tiny_run, CPU).model
        assert (one - base.head.logits(base(state))).abs().max() > 1e-2
    assert (one - two).abs().max() < 1e-5 * one.abs().max()
    # Converting reads the same: canonical names, merged.
    plain = MergedReader(folder, config.lora)
    weights = {layout.name: parameter for layout, parameter in named_layouts(merged.model.parameters())}
    assert plain.names("weight") == sorted(weights)
    assert all(torch.equal(plain.full("weight", name), weight.data) for name, weight in weights.items())


@pytest.mark.distributed
def test_layouts_learn_the_same():
    """Heads that the ranks divide, and one key-value head that both hold."""
    kinds = [[*LORA], [*LORA, "model.num_kv_heads=1"]]
    layouts = [
        ["parallel.tensor_parallel=2", "parallel.zero_stage=0"],
        ["parallel.zero_stage=1"],
        ["parallel.zero_stage=2"],
    ]
    assert_two_ranks_follow_one(kinds, layouts, 6)


@pytest.mark.unit
def test_it_starts_from_the_model_as_it_is():
    """B is zero at first: the first step's loss is the plain model's, the later ones are not."""
    plain, low = plain_curve(["lora.rank=0"], 2), curves(1, [[*LORA, "parallel.zero_stage=0"]], 2)[0]
    assert low[0][0] == pytest.approx(plain[0][0], rel=1e-6)
    assert low[1][0] != pytest.approx(plain[1][0], rel=1e-6)
