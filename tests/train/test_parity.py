"""Every layout trains the same model: 20 steps against a plain PyTorch loop, with and without dropout.

The baseline's own curve is committed (tests/golden/parity.csv), so that a refactor that moves the loss is seen.
"""

import csv
from pathlib import Path

import pytest

from tests.train.parity import Curve, curves, plain_curve

STEPS = 20
LOSS, NORM = 1e-6, 1e-5
GOLDEN = Path(__file__).parent.parent / "golden" / "parity.csv"

TENSOR, PIPELINE = "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
ZERO = [[f"parallel.zero_stage={stage}"] for stage in range(4)]
TWICE = "micro_batch_size=4"
"""Two micro-batches a step where one data-parallel rank takes them all: the second is what accumulation could get
wrong, and each costs a layout with tensor parallelism dozens of messages."""
TENSOR_2 = [TENSOR, TWICE]
SHARES = [*TENSOR_2, "parallel.sequence_parallel=true"]
BESIDE = "parallel.overlap_tensor=true"
RECOMPUTED = "parallel.activation_checkpointing=full"
OFFLOADED = "parallel.offload_optimizer=true"
UNEVEN = "parallel.layers_per_stage=[3,1]"
LAYOUTS: dict[int, list[list[str]]] = {
    1: [[*ZERO[0], TWICE], *([*zero, TWICE, OFFLOADED] for zero in ZERO[1:])],
    2: [*ZERO, TENSOR_2, [*TENSOR_2, ZERO[0][0]], [PIPELINE], [PIPELINE, ZERO[0][0]]],
    4: [[TENSOR, PIPELINE], [PIPELINE], [TENSOR], [TENSOR, ZERO[3][0], OFFLOADED]],
}
"""By number of ranks; data parallelism takes what tensor and pipeline leave."""
WITH_DROPOUT: dict[int, list[list[str]]] = {
    1: [[RECOMPUTED, TWICE]],
    2: [SHARES, [*SHARES, BESIDE, RECOMPUTED], [*TENSOR_2, BESIDE], [PIPELINE, RECOMPUTED, OFFLOADED, UNEVEN]],
    4: [
        ["parallel.tensor_parallel=4", TWICE],
        ["parallel.tensor_parallel=4", SHARES[-1], BESIDE, TWICE],
        ["parallel.tensor_parallel=4", SHARES[-1], TWICE, RECOMPUTED],
        [*SHARES, PIPELINE],
        [TENSOR, SHARES[-1], ZERO[2][0]],
        [TENSOR, SHARES[-1], ZERO[3][0], RECOMPUTED],
    ],
}
"""More of them, with dropout only: what they could get wrong shows there."""


@pytest.fixture(scope="module", params=["no_dropout", "dropout"])
def baseline(request: pytest.FixtureRequest) -> tuple[list[str], Curve]:
    overrides = DROPOUT if request.param == "dropout" else []
    return overrides, plain_curve(overrides, STEPS)


def deviation(curve: Curve, baseline: Curve) -> tuple[float, float]:
    """Largest relative difference in loss and in gradient norm over all steps."""
    pairs = list(zip(curve, baseline, strict=True))
    return tuple(max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in (0, 1))  # type: ignore[return-value]


@pytest.mark.distributed
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_follows_the_plain_loop(world: int, baseline: tuple[list[str], Curve]) -> None:
    follow(LAYOUTS[world], world, *baseline)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_shares_and_recomputation_follow_the_plain_loop_with_dropout(world: int) -> None:
    follow(WITH_DROPOUT[world], world, DROPOUT, plain_curve(DROPOUT, STEPS))


def follow(layouts: list[list[str]], world: int, overrides: list[str], expected: Curve) -> None:
    """Run the layouts in `world` ranks and hold each to the plain loop's curve."""
    found = curves(world, [[*layout, *overrides] for layout in layouts], STEPS)
    for layout, curve in zip(layouts, found, strict=True):
        loss, norm = deviation(curve, expected)
        assert loss <= LOSS, (layout, loss)
        assert norm <= NORM, (layout, norm)


@pytest.mark.distributed
def test_four_stages_follow_the_plain_loop(baseline: tuple[list[str], Curve]) -> None:
    overrides = [*baseline[0], "model.num_layers=6"]
    loss, norm = deviation(
        curves(4, [["parallel.pipeline_parallel=4", *overrides]], STEPS)[0], plain_curve(overrides, STEPS)
    )
    assert loss <= LOSS
    assert norm <= NORM


VARIANTS: dict[str, list[str]] = {
    "multi_query": ["model.num_kv_heads=1"],
    "grouped": ["model.num_kv_heads=2", "model.bias=qkv"],
    "groups_that_ranks_straddle": ["model.num_heads=6", "model.num_kv_heads=3", "model.head_dim=8"],
    "pre_norm": ["model.norm_placement=pre", "model.norm=rmsnorm", "model.activation=swiglu", "model.bias=none"],
    "sandwich": ["model.norm_placement=sandwich", "model.activation=gelu", "model.init=normal"],
    "post_norm": ["model.norm_placement=post", "model.tied_embeddings=false", "model.rotary_interleaved=true"],
    "learned_positions": ["model.positions=learned_2d", "data.sampling.positions=2d", "model.activation=gelu_tanh"],
    "scaled_softmax": ["stability.softmax=scaled", "loss.z_loss=1e-3", "loss.softcap=20"],
    "peri": ["model.norm_placement=peri", "model.qk_norm=true", "model.tied_embeddings=false"],
    "embedding_norm": ["model.embedding_norm=true", "model.norm_placement=pre", "model.init=normal"],
    "qk_norm_straddled": ["model.qk_norm=true", "model.num_heads=6", "model.num_kv_heads=3", "model.head_dim=8"],
    "pb_relax": ["stability.softmax=pb_relax", "model.init_scale=1.5", "optimizer.eps=1e-5", "optimizer.beta2=0.99"],
    "shrunk_head": ["stability.shrink_head=true", "optimizer.clip=0.05"],
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(TENSOR_2, id="whole_sequence", marks=pytest.mark.slow),
        pytest.param(SHARES, id="shares_of_the_sequence"),
    ],
)
def test_every_variant_follows_the_plain_loop(tensor: list[str]) -> None:
    steps = 4
    found = curves(4, [[*tensor, PIPELINE, *variant] for variant in VARIANTS.values()], steps)
    for (name, variant), curve in zip(VARIANTS.items(), found, strict=True):
        loss, norm = deviation(curve, plain_curve(variant, steps))
        assert loss <= LOSS, (name, loss)
        assert norm <= NORM, (name, norm)


@pytest.mark.distributed
@pytest.mark.slow
def test_all_three_axes_at_once(baseline: tuple[list[str], Curve]) -> None:
    overrides, expected = baseline
    for curve in curves(8, [[TENSOR, PIPELINE, *overrides]], STEPS):
        loss, norm = deviation(curve, expected)
        assert loss <= LOSS
        assert norm <= NORM


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        ("bias_on_every_rank", TENSOR_2),
        ("gradient_not_summed", TENSOR_2),
        ("norm_gradient_of_one_share", SHARES),
        ("dropout_of_the_first_share", [*SHARES, *DROPOUT]),
        ("norm_gradient_of_one_rank", []),
        ("tied_gradient_halved", [PIPELINE]),
    ],
)
def test_planted_faults_are_seen(fault: str, layout: list[str]) -> None:
    steps = 3
    overrides = [word for word in layout if word in DROPOUT]
    loss, norm = deviation(curves(2, [layout], steps, fault)[0], plain_curve(overrides, steps))
    assert loss > LOSS or norm > NORM, (loss, norm)


@pytest.mark.unit
def test_the_baseline_is_the_committed_curve(baseline: tuple[list[str], Curve]) -> None:
    overrides, curve = baseline
    column = "dropout" if overrides else "no_dropout"
    with GOLDEN.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STEPS
    for row, (loss, norm) in zip(rows, curve, strict=True):
        # Another processor or torch version rounds its matrix products differently.
        assert float(row[f"loss_{column}"]) == pytest.approx(loss, rel=1e-5)
        assert float(row[f"grad_norm_{column}"]) == pytest.approx(norm, rel=1e-4)


def write_golden() -> None:
    """Write the committed curve anew: python -c 'import tests.train.test_parity as t; t.write_golden()'."""
    table = {"no_dropout": plain_curve([], STEPS), "dropout": plain_curve(DROPOUT, STEPS)}
    with GOLDEN.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *(f"{name}_{column}" for column in table for name in ("loss", "grad_norm"))])
        for step in range(STEPS):
            writer.writerow([step + 1, *(f"{value:.9g}" for curve in table.values() for value in curve[step])])
