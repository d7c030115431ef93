"""The page that sets runs beside each other: spike score, steps to divergence, variants and intervals."""

import json
import math
import statistics
from pathlib import Path

import pytest

from data_prep.errors import ConfigError
from train.report import Run
from train.stability.charts import chosen, telemetry_charts
from train.stability.figure import PANELS, curve, over_seeds
from train.stability.report import (
    StabilityReportConfig,
    main,
    mean_and_interval,
    spike_score,
    steps_to_divergence,
    variants,
)

pytestmark = pytest.mark.unit


def calm(count: int) -> list[float]:
    return [5.0 + 0.1 * math.sin(7.3 * step) for step in range(count)]


def test_the_spike_score_is_a_share_of_the_steps_that_can_be_judged() -> None:
    values: list[float | None] = list(calm(264))
    assert spike_score(values) == 0
    values[150], values[200] = 9.0, None
    assert spike_score(values) == pytest.approx(2 / 200)
    assert spike_score(values[:60]) == 0


def test_divergence_is_what_never_comes_back() -> None:
    losses: list[float | None] = list(calm(200))
    assert steps_to_divergence(losses) is None
    recovered = [*losses[:80], *[12.0] * 30, *losses[110:]]
    assert steps_to_divergence(recovered) is None
    lost = [*losses[:120], *[12.0] * 80]
    found = steps_to_divergence(lost)
    assert found is not None
    assert 120 <= found <= 125
    assert steps_to_divergence([*losses[:100], *[None] * 40]) in range(99, 103)


def test_the_interval_is_students() -> None:
    mean, half = mean_and_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.30 * statistics.stdev([1.0, 2.0, 4.0]) / math.sqrt(3))
    assert mean_and_interval([3.0]) == (3.0, None)


def write_run(path: Path, config: str, losses: list[float | None]) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    records = [
        {"step": step, "loss": loss, "grad_norm": loss, "embedding_grad_norm": 0.1, "step_seconds": 0.5}
        for step, loss in enumerate(losses, start=1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(name: str, lr: float, seed: int) -> str:
    return f"seed: {seed}\noptimizer: {{lr: {lr}}}\nstability: {{name: {name}, spike_sigma: 6}}\nrun_dir: r{seed}\n"


def test_runs_that_differ_in_the_seed_are_one_variant(tmp_path: Path) -> None:
    runs = []
    for name in ("none", "modern"):
        for lr in (0.1, 0.01):
            for seed in (1, 2):
                losses: list[float | None] = list(calm(100))
                if name == "none" and lr == 0.1:
                    losses[60:] = [20.0] * 40
                runs.append(write_run(tmp_path / f"{name}-{lr}-{seed}", config(name, lr, seed), losses))
    groups = variants([Run.read(run) for run in runs])
    assert list(groups) == [f"lr={lr}, name={name}" for name in ("none", "modern") for lr in (0.1, 0.01)]
    assert all(len(members) == 2 for members in groups.values())
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    assert main(StabilityReportConfig([str(tmp_path / "*-*")], output=str(page), png=str(picture), last_steps=20)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ConfigError, match="panels holds 'los'"):
        main(StabilityReportConfig([str(tmp_path / "*-*")], output=str(page), png=str(picture), panels=["los"]))
    text = page.read_text()
    assert "8 runs, 4 variants" in text
    assert "2 of 2 (step 60, 60)" in text or "2 of 2 (step 61, 61)" in text
    assert "sensitivity 0.000" in text
    with pytest.raises(ConfigError, match="run_dirs"):
        main(StabilityReportConfig(run_dirs=[str(tmp_path / "nothing-*")], output=str(page)))


def test_the_verdict_is_what_one_works_out_by_hand(tmp_path: Path) -> None:
    ends = {("none", 1): 3.0, ("none", 2): 3.2, ("none", 3): 3.7, ("modern", 1): 2.0, ("modern", 2): 2.0}
    for (name, seed), end in ends.items():
        losses: list[float | None] = [*[6.0] * 80, *[end] * 20]
        write_run(tmp_path / f"{name}-{seed}", config(name, 0.1, seed), losses)
    write_run(tmp_path / "modern-3", config("modern", 0.1, 3), [*[6.0] * 90, *[None] * 10])
    page = tmp_path / "page.html"
    assert main(StabilityReportConfig([str(tmp_path / "*-*")], output=str(page), last_steps=20)) == 0
    text = page.read_text()
    # none: mean 3.3, deviation 0.36056, 4.30 · 0.36056 / √3 = 0.895.
    assert ">3.300 ± 0.895<" in text
    assert ">0 of 3<" in text
    # modern: seed 3 ends in what is not finite: a spike in 10 of the 36 steps that can be judged, 0 in the others.
    assert ">2.000 ± 0.000 (2 of 3 seeds)<" in text
    assert ">9.26 %<" in text
    assert "1 of 3 (step 90)" in text


def test_a_curve_is_the_mean_of_ten_steps_over_the_seeds_that_are_left(tmp_path: Path) -> None:
    first = Run.read(write_run(tmp_path / "a", config("none", 0.1, 1), [float(step) for step in range(1, 31)]))
    second = Run.read(write_run(tmp_path / "b", config("none", 0.1, 2), [3.0] * 10 + [None] * 5))
    curves = [curve(run, PANELS["loss"][1]) for run in (first, second)]
    assert curves == [{10: 5.5, 20: 15.5, 30: 25.5}, {10: 3.0}]
    assert over_seeds(curves) == [(10, 4.25, 3.0, 5.5), (20, 15.5, 15.5, 15.5), (30, 25.5, 25.5, 25.5)]


def test_the_reports_charts_show_what_was_measured() -> None:
    assert telemetry_charts([{"step": 1, "loss": 2.0, "grad_norm": 1.0}]) == []
    groups = {"embedding": 0.5, "layers.0.attention": 1.0, "head": 0.2}
    telemetry = dict.fromkeys(("gradient", "weight", "update", "activation"), groups)
    telemetry |= {"max_logit": {"layers.0": 3.0}, "fp16": {"overflow": 0.0, "underflow": 0.1}}
    records = [
        {"step": step, "grad_norm": 2.0, "embedding_grad_norm": 1.0, "telemetry": telemetry} for step in range(1, 9)
    ]
    page = "".join(telemetry_charts(records))
    for title in (
        "share of the gradient",
        "Gradient norm by group",
        "Update to weight",
        "Activations",
        "attention logit",
        "fp16",
    ):
        assert title in page
    assert chosen([str(number) for number in range(40)]) == ["0", "10", "20", "29", "39"]
