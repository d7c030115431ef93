"""The planner against published runs, measured steps and its own parts; what bad input gets."""

import contextlib
import itertools
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_prep.errors import ConfigError
from launch import plan as planner
from launch.hardware import TABLE, find
from launch.plan_cost import CostModel, Shares
from launch.plan_data import mixture_shares
from launch.plan_search import EVERY_LAYERS, MICRO_BATCHES, evaluate, follows_slides, search
from tests.launch.plan_helpers import planned
from train.arithmetic import hardware_flops_per_token
from train.config import CHOICES
from train.memory import peak_memory
from train.rules import check_shape, check_world

pytestmark = pytest.mark.unit

DENSE = [
    *("model=glm_130b", "model.activation=gelu", "model.ffn_hidden_size=49152", "model.bias=none", "precision=fp16"),
    *("parallel.activation_checkpointing=full", "tokens=300e9"),
]
"""The published table's size rule: 12 L h^2 + V h at h = 12288."""


@pytest.mark.parametrize(
    "cluster, layers, tensor, pipeline, zero, batch, utilization, days, billions",
    [
        ("a100_96x8", 96, 4, 14, 1, 3584, 0.4106, 50, 175.8),
        ("hygon", 100, 4, 25, 1, 6000, 0.3129, 64, 183.0),
        ("sunway", 94, 4, 6, 1, 4096, 0.1839, 59, 173),
        ("a100_96x8", 96, 1, 1, 3, 3584, 0.33, 62, 175.8),
    ],
)
def test_the_published_days_follow_from_their_utilisation(
    cluster, layers, tensor, pipeline, zero, batch, utilization, days, billions
):
    config = planned(
        *DENSE,
        f"cluster={cluster}",
        f"model.num_layers={layers}",
        f"parallel.tensor_parallel={tensor}",
        f"parallel.pipeline_parallel={pipeline}",
        f"parallel.zero_stage={zero}",
        f"global_batch_size={batch}",
        f"planner.utilization={utilization}",
    )
    plan = planner.make_plan(config)
    chosen = plan["chosen"]
    assert plan["model"]["parameters"] / 1e9 == pytest.approx(billions, rel=0.01)
    assert chosen["days"] == pytest.approx(days, rel=0.03)
    assert chosen["hfu"] == pytest.approx(utilization)
    world = plan["cluster"]["world"]
    assert chosen["data_parallel"] == pytest.approx(world / (tensor * pipeline))
    assert chosen["bubble"] == pytest.approx((pipeline - 1) / (chosen["micro_batches"] + pipeline - 1))
    # The table's own rule, 8 N D over machines x peak x utilisation, counts no attention: 1.1 to 2.6 % fewer days.
    by_rule = 8 * plan["model"]["parameters"] * 300e9 / (world * plan["cluster"]["peak_tflops"] * 1e12 * utilization)
    assert by_rule / 86400 == pytest.approx(days, rel=0.01)


def test_the_peaks_those_days_imply_are_the_ones_in_the_table():
    for name, machines, billions, utilization, days in (
        ("hygon_dcu", 3000 * 4, 183, 0.3129, 64),
        ("sunway_sw26010_pro", 8192, 173, 0.1839, 59),
    ):
        implied = 8 * billions * 1e9 * 300e9 / (machines * utilization * days * 86400)
        assert TABLE[name].peak("fp16") == pytest.approx(implied, rel=0.005)


def test_glm_130b_own_run_follows_from_its_hfu():
    config = planned("experiment=glm_130b", "cluster=a100_96x8", "planner.utilization=0.433")
    chosen = planner.make_plan(config)["chosen"]
    assert chosen["step_seconds"] == pytest.approx(88.5, rel=0.03)
    assert chosen["mfu"] == pytest.approx(0.325, abs=0.005)
    assert chosen["bubble"] == pytest.approx(7 / 183)
    assert chosen["micro_batches"] == 176
    assert 4224 * 2048 * hardware_flops_per_token(
        config.model, 2048, config.parallel
    ) / 768 / 88.5 / 1e12 == pytest.approx(134, abs=3)


SHAPE = ("model=1b", "model.tied_embeddings=false", "model.hidden_dropout=0", "model.attention_dropout=0")


@pytest.mark.parametrize(
    "hardware, world, words, tokens_per_second",
    [
        ("h100", 1, "micro_batch_size=16 global_batch_size=128", 61_724),  # sets plan_cost.SUSTAINED
        ("h100", 1, "micro_batch_size=16 global_batch_size=128 parallel.activation_checkpointing=full", 49_943),
        ("h100", 1, "micro_batch_size=16 global_batch_size=16", 61_844),
        ("h200", 1, "micro_batch_size=16 global_batch_size=16", 63_514),
        ("h200", 2, "micro_batch_size=16 global_batch_size=32", 124_059),
        ("h200", 2, "micro_batch_size=16 global_batch_size=32 parallel.zero_stage=3", 118_535),  # sets GATHER_SECONDS
        ("h200", 2, "micro_batch_size=8 global_batch_size=128 parallel.pipeline_parallel=2", 102_436),  # PASS_SECONDS
        ("h200", 2, "micro_batch_size=8 global_batch_size=256 parallel.pipeline_parallel=2", 105_069),
        ("h200", 2, "micro_batch_size=4 global_batch_size=64 parallel.pipeline_parallel=2", 97_800),
    ],
)
def test_steps_measured_with_other_trainers_are_met_within_ten_per_cent(hardware, world, words, tokens_per_second):
    """1.42 B, causal, every slot a target; trainers with the same maths and fused kernels of their own."""
    config = planned(*SHAPE, "parallel.overlap_communication=true", *words.split())
    data = world / config.parallel.pipeline_parallel
    step = CostModel(config, find(hardware), 8, data, Shares(attended=0.5, targets=1.0)).step()
    predicted = config.global_batch_size * config.sequence_length / step.total
    assert predicted == pytest.approx(tokens_per_second, rel=0.10)


def test_fp8_products_save_what_was_measured_and_nothing_where_rounding_outweighs_them():
    def seconds(*words: str) -> float:
        config = planned(*SHAPE, "loss.z_loss=0", *words)
        return CostModel(config, find("h100"), 8, 1, Shares(attended=0.607, targets=0.6)).step().total

    large = ("micro_batch_size=8", "global_batch_size=128")
    assert seconds(*large, "precision=fp8") == pytest.approx(3.754, rel=0.10)  # benchmarks/step/fp8.csv
    assert seconds(*large, "precision=fp8") < 0.9 * seconds(*large, "precision=bf16")
    thin = ("micro_batch_size=1", "global_batch_size=8", "sequence_length=64")
    assert seconds(*thin, "precision=fp8") > seconds(*thin, "precision=bf16")


def test_the_search_keeps_the_rules_and_finds_what_nobody_beats():
    config = planned("model=glm_130b", "cluster=a100_96x8", "precision=fp16")
    cluster, shares = planner.cluster_of(config), planner.shares_of(config)
    found = search(config, cluster, shares)
    assert found.tried > 100
    seconds = [one.seconds for one in found.best]
    assert seconds == sorted(seconds)
    for one in found.best:
        assert one.memory.total <= 39.4 * 2**30
        check_shape(one.config)
        check_world(one.config, 768)
    layouts = {one.layout for one in found.best} | {layout for layout, _ in found.lost}
    assert {(1, 1), (4, 8), (8, 8), (16, 4)} <= layouts
    why = dict(found.lost)
    assert "does not fit" in why[(1, 8)]
    assert "leaves a stage without a layer" in why[(8, 48)]
    assert "tensor-parallel communication" in why[(16, 4)]
    # The published rule of thumb comes out of the costs: tensor parallelism stays inside a node.
    assert follows_slides(found.best[0], cluster)


def test_what_needs_a_layout_is_left_out_of_the_others():
    words = ["model=1b", "cluster=h100", "cluster.nodes=1", "cluster.gpus_per_node=4", "global_batch_size=32"]
    tensor, pipeline = "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"
    words += [tensor, pipeline, "parallel.sequence_parallel=true"]
    plain = planned(*words)
    moved = planned(*words, "parallel.overlap_tensor=true", "parallel.pipeline_schedule=zero_bubble")
    searches = [search(one, planner.cluster_of(one), planner.shares_of(one)) for one in (plain, moved)]
    layouts = [{one.layout for one in found.best} for found in searches]
    assert layouts[0] == layouts[1]
    assert {(1, 1), (2, 1), (1, 2), (2, 2)} <= layouts[1]


def test_what_the_search_leaves_out_is_never_the_fastest():
    """Against every combination, on two devices so small that recomputation and host memory are needed."""
    words = ["model=1b", "cluster=h100", "cluster.nodes=1", "cluster.gpus_per_node=2", "planner.memory_gib=16"]
    config = planned(*words, "global_batch_size=32")
    cluster, shares = planner.cluster_of(config), planner.shares_of(config)
    fastest: dict[tuple[int, int], float] = {}
    for layout, zero, sequence, mode, every, offload, micro in itertools.product(
        [(1, 1), (1, 2), (2, 1)],
        (1, 2, 3),
        (False, True),
        CHOICES["parallel.activation_checkpointing"],
        EVERY_LAYERS,
        (False, True),
        MICRO_BATCHES,
    ):
        parallel = replace(
            config.parallel,
            tensor_parallel=layout[0],
            pipeline_parallel=layout[1],
            zero_stage=zero,
            sequence_parallel=sequence,
            activation_checkpointing=mode,
            activation_checkpointing_every_layers=every,
            offload_optimizer=offload,
            overlap_communication=zero > 1,
        )
        trial = replace(config, parallel=parallel, micro_batch_size=micro)
        with contextlib.suppress(ConfigError):
            check_shape(trial)
            check_world(trial, cluster.world)
            if evaluate(trial, cluster, shares, timed=False).fits:
                seconds = evaluate(trial, cluster, shares).seconds
                fastest[layout] = min(seconds, fastest.get(layout, seconds))
    found = search(config, cluster, shares)
    assert {layout: min(one.seconds for one in found.best if one.layout == layout) for layout in fastest} == fastest
    assert {one.layout for one in found.best} == set(fastest)
    savings = {one.savings() for one in found.best}
    assert any("moments on the host" in one for one in savings)
    assert any("1 layer of" in one for one in savings)


def test_the_run_s_own_layout_fits_its_machines_in_fp16():
    config = planned("experiment=glm_130b", "cluster=a100_96x8", "planner.search=false")
    plan = planner.make_plan(config)
    assert plan["chosen"]["fits"]
    assert plan["chosen"]["memory_gib"] > 20
    # Four all-reduces a layer and micro-batch, two more to recompute; one stream each way between stages.
    stream = 2048 * 12288 * 2
    assert plan["volumes"]["tensor"] == pytest.approx(176 * 9 * 6 * 2 * 3 / 4 * stream)
    assert plan["volumes"]["pipeline"] == pytest.approx(176 * 2 * stream)


def test_a_step_adds_up_and_slower_links_slow_it():
    config = planned("experiment=glm_130b", "cluster=a100_96x8")
    cluster, shares = planner.cluster_of(config), planner.shares_of(config)
    base = evaluate(config, cluster, shares)
    assert base.step is not None
    assert base.seconds == pytest.approx(sum(vars(base.step).values()))
    stages = CostModel(config, cluster.hardware, 8, 24, shares).stages()
    alike = [replace(stages[1])] * 8
    step = CostModel(config, cluster.hardware, 8, 24, shares).step_of(alike)
    pipeline = step.total - step.reduce - step.optimizer
    assert step.bubble / pipeline == pytest.approx(7 / 183)
    halved = replace(cluster, hardware=replace(cluster.hardware, link_gb_per_second=150))
    slower = evaluate(config, halved, shares)
    assert slower.step is not None
    assert slower.step.tensor == pytest.approx(2 * base.step.tensor, rel=0.1)


def test_recomputing_a_branch_lies_between_none_and_all():
    def costs(mode: str, every: int = 1) -> tuple[float, float]:
        words = [f"parallel.activation_checkpointing={mode}", f"parallel.activation_checkpointing_every_layers={every}"]
        config = planned("experiment=glm_130b", "cluster=a100_96x8", *words)
        found = evaluate(config, planner.cluster_of(config), planner.shares_of(config))
        return found.seconds, found.memory.activations

    none, full = costs("none"), costs("full")
    for part in (costs("ffn"), costs("attention"), costs("full", 3)):
        assert none[0] < part[0] < full[0]
        assert none[1] > part[1] > full[1]
    # The first stage keeps most micro-batches; of its layers 0 to 7 every third is recomputed.
    assert costs("full", 3)[1] == pytest.approx((5 * none[1] + 3 * full[1]) / 8)


def test_the_mixture_leaves_half_of_the_pairs():
    causal = mixture_shares(planned("data.sampling.objective=causal").data.sampling)
    assert (causal.attended, causal.targets) == (0.5, 1.0)
    glm = mixture_shares(planned("experiment=glm_130b").data.sampling)
    # Uniform u on [0.2, 1]: E[1 - u + u^2/2] = 0.6067, E[u] = 0.6; four packed segments of (0.85 + 0.15^2/2)/4.
    assert glm.attended == pytest.approx(0.7 * 0.6067 + 0.3 * 0.2153, abs=1e-3)
    assert glm.targets == pytest.approx(0.7 * 0.6 + 0.3 * 0.15)


class _Balanced(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.charts = 0
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not any(name in ("src", "href") for name, _ in attrs)
        self.charts += tag == "svg"
        if tag not in ("meta", "line", "circle", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "line", "circle", "path", "rect"):
            assert self.open.pop() == tag


def test_the_command_writes_the_plan_and_its_page(tmp_path: Path, capsys):
    target = tmp_path / "计划" / "plan.json"
    words = ["model=1b", "cluster=h100", "cluster.nodes=1", "tokens=30e9", f"output={target}"]
    assert planner.main(words) == 0
    plan = json.loads(target.read_text())
    said = capsys.readouterr().out
    assert plan["chosen"]["layout"] in said
    assert "why others lose" in said
    assert len(plan["search"]["best"]) == 10
    assert plan["chosen"]["petaflop_days"] == pytest.approx(
        (6 * 1.317e9 + 12 * 24 * 2048 * 2048) * 30e9 / 8.64e19, rel=0.01
    )
    whats = {row["what"] for row in plan["what_if"]}
    assert {"as planned", "network x 0.5", "on a100_80g", "a node fails each 248 days"} <= whats
    assert _Balanced(target.with_suffix(".html").read_text()).charts >= 4


@pytest.mark.parametrize(
    "words, says",
    [
        (["cluster=local"], "cluster.hardware is not set"),
        (["cluster=h100", "cluster.hardware=b300"], "cluster.hardware=b300 is not known; use one of a100_40g"),
        (["cluster=nowhere"], "use one of a100_80g, a100_96x8"),
        (["cluster=hygon"], "no known memory_gib"),
        (["cluster=h100", "cluster.nodes=1", "model=glm_130b"], "the smallest, TP "),
        (["cluster=a100_80g", "precision=fp16", "planner.utilization=1.2"], "planner.utilization=1.2 is a share"),
        (["cluster=h100", "tokens=-1"], "tokens=-1 must be more than 0"),
        (["cluster=h100", "global_batch_size=7", "planner.search=false"], "global_batch_size=7"),
        (["cluster=h100", "output=plan.txt"], "must end in .json"),
    ],
)
def test_bad_input_is_named(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert planner.main(["model=1b", *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_peak_is_an_error_where_mfu_is_planned():
    config = planned("cluster=h100", "model=1b")
    nameless = replace(find("h100"), name="a new accelerator")
    with pytest.raises(ConfigError, match=r"no known bf16 peak.*planner\.peak_tflops"):
        nameless.peak("bf16")
    assert replace(nameless, implied_tflops=100.0).peak("bf16") == 1e14
    assert planner.cluster_of(replace(config, planner=replace(config.planner, peak_tflops=500.0))).hardware.peak(
        "bf16"
    ) == pytest.approx(5e14)


@pytest.mark.parametrize("recompute, gib", [("none", 71.2), ("full", 29.2)])
def test_memory_measured_with_another_trainer_is_met_within_eight_per_cent(recompute, gib):
    """1.42 B under DeepSpeed ZeRO 1 on one H100, micro-batch 16: 16 bytes a parameter, as fp16 has here; its peak of
    allocated bytes knows no fragmentation and no device context."""
    config = planned(
        *SHAPE,
        "precision=fp16",
        "micro_batch_size=16",
        "global_batch_size=128",
        f"parallel.activation_checkpointing={recompute}",
    )
    assert peak_memory(config, data_parallel=1, micro_batches=8).total / 2**30 == pytest.approx(gib, rel=0.08)
