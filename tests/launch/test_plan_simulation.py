"""The simulated step and month against the schedule they copy and the closed forms they must meet."""

import csv
import math

import numpy as np
import pytest

from launch import simulate
from launch.plan_failures import Failures, daly_interval, goodput, young_interval
from launch.simulate_month import DAY, Job, simulate_month
from launch.simulate_step import Noise, StageTimes, commands, simulate_step

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("stages, micro_batches", [(1, 3), (2, 1), (2, 5), (4, 4), (5, 9), (8, 3)])
def test_the_lists_are_deepspeed_s(stages, micro_batches):
    schedule = pytest.importorskip("deepspeed.runtime.pipe.schedule")
    names = {
        schedule.ForwardPass: "forward",
        schedule.BackwardPass: "backward",
        schedule.SendActivation: "send_activation",
        schedule.RecvActivation: "receive_activation",
        schedule.SendGrad: "send_gradient",
        schedule.RecvGrad: "receive_gradient",
    }
    for stage in range(stages):
        theirs = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
        kinds = [names[type(one)] for slot in theirs for one in slot if type(one) in names]
        assert [one.kind for one in commands(stage, stages, micro_batches)] == kinds


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("micro_batches", [1, 4, 16, 64])
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_equal_stages_leave_the_known_bubble(stages, micro_batches, backward):
    found = simulate_step([StageTimes(1.0, backward)] * stages, micro_batches)
    assert found.seconds == pytest.approx((micro_batches + stages - 1) * (1 + backward))
    assert found.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_the_slowest_stage_sets_the_pace():
    stages = [StageTimes(1, 2), StageTimes(1.5, 3), StageTimes(1, 2), StageTimes(0.5, 1)]
    many = simulate_step(stages, 200).seconds - simulate_step(stages, 100).seconds
    assert many == pytest.approx(100 * 4.5)
    closed = 99 * 4.5 + sum(one.forward + one.backward for one in stages)
    assert simulate_step(stages, 100).seconds == pytest.approx(closed, rel=0.01)


def test_sends_meet_and_noise_makes_replicas_wait():
    even = [StageTimes(1.0, 2.0)] * 4
    quiet = simulate_step(even, 32)
    assert simulate_step(even, 32, send_seconds=0.1).seconds == pytest.approx(quiet.seconds + 0.1 * 4 * 32, rel=0.2)
    few = simulate_step(even, 32, replicas=4, noise=Noise(operation=0.05, node=0.02), seed=1)
    many = simulate_step(even, 32, replicas=512, noise=Noise(operation=0.05, node=0.02), seed=1)
    assert quiet.seconds < few.seconds < many.seconds < 1.3 * quiet.seconds
    assert np.array_equal(
        many.finish, simulate_step(even, 32, replicas=512, noise=Noise(operation=0.05, node=0.02), seed=1).finish
    )


def test_young_and_daly_are_near_the_best_interval():
    failures = Failures(mtbf=20_000, checkpoint=60, restart=600)
    assert young_interval(failures) == pytest.approx(math.sqrt(2 * 60 * 20_000))
    best = max(np.arange(100, 20_000, 5.0), key=lambda interval: goodput(failures, interval))
    assert daly_interval(failures) == pytest.approx(best, rel=0.01)
    assert abs(daly_interval(failures) - best) < abs(young_interval(failures) - best)
    assert daly_interval(Failures(mtbf=10, checkpoint=60, restart=0)) == 10
    assert goodput(Failures(mtbf=1, checkpoint=60, restart=600), 1000) == 0


@pytest.mark.parametrize("mtbf, checkpoint, restart", [(50_000, 45, 780), (8_000, 60, 600), (2_000, 30, 300)])
def test_months_agree_with_daly_s_formula(mtbf, checkpoint, restart):
    failures = Failures(mtbf, checkpoint, restart)
    interval = daly_interval(failures)
    job = Job(96, failures, interval, spares=10**6, repair=0.0, minimum_nodes=96)
    horizon = 2000 * mtbf
    ledger = simulate_month(job, horizon=horizon, seed=3)
    assert ledger.goodput(horizon) == pytest.approx(goodput(failures, interval), abs=0.012)
    assert set(ledger.sizes) == {96}


def test_a_month_s_ledger_adds_up_with_and_without_spares():
    failures = Failures(mtbf=0.5 * DAY, checkpoint=45, restart=780)
    results = {}
    for spares in (0, 2, 20):
        job = Job(96, failures, 2000.0, spares, repair=3 * DAY, minimum_nodes=48, granularity=12)
        ledger = simulate_month(job, seed=5)
        parts = (ledger.work, ledger.redone, ledger.saving, ledger.down, ledger.waiting, ledger.slowed)
        assert sum(parts) == pytest.approx(30 * DAY)
        assert all(size % 12 == 0 for size in ledger.sizes)
        assert 30 < ledger.failures < 90
        results[spares] = ledger.goodput(30 * DAY)
    assert results[0] < results[2] < results[20]


def test_without_enough_nodes_the_job_waits_for_a_repair():
    failures = Failures(mtbf=1 * DAY, checkpoint=45, restart=780)
    ledger = simulate_month(Job(8, failures, 2000.0, spares=0, repair=DAY, minimum_nodes=8), seed=2)
    assert ledger.waiting > 0.2 * 30 * DAY
    assert ledger.slowed == 0


def test_the_command_writes_the_table_and_its_page(tmp_path, capsys):
    target = tmp_path / "scale.csv"
    words = ["model=1b", "cluster=h100", "simulation.nodes=[2,4,64]", "global_batch_size=512"]
    words += ["simulation.spare_share=1", f"output={target}"]
    assert simulate.main(words) == 0
    rows = list(csv.DictReader(line for line in target.read_text().splitlines() if not line.startswith("#")))
    assert [row["nodes"] for row in rows] == ["2", "4", "4", "64", "64"]
    for row in rows:
        assert float(row["simulated_step_s"]) == pytest.approx(float(row["closed_form_step_s"]), rel=0.15)
        assert float(row["simulated_goodput"]) == pytest.approx(float(row["formula_goodput"]), abs=0.06)
    same, grows = rows[-2:]
    assert int(same["global_batch_size"]) < int(grows["global_batch_size"])
    assert float(same["mfu"]) < float(grows["mfu"])
    assert "<svg" in target.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    "words, says",
    [
        (["simulation.nodes=[]"], "simulation.nodes=[] must be a list of positive numbers"),
        (["output=scale.txt"], "must end in .csv"),
        (["cluster=sunway"], "no known memory_gib"),
        (
            ["parallel.tensor_parallel=8", "planner.search=false", "simulation.nodes=[1]", "cluster.gpus_per_node=4"],
            "8",
        ),
    ],
)
def test_bad_input_is_named(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert simulate.main(["model=1b", "cluster=h100", *words]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
