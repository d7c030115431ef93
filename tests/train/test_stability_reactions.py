"""Spikes: what counts as one, what is done about it, and that a killed run repeats it bit for bit."""

import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.conftest import ROOT, Command
from tests.train.parity import BATCH, LR, SHRINK, Curve, batch_of, in_ranks, my_batches, saver_of, start_engine
from tests.train.test_resume import lines, started, steps_written, wait_for
from train.checkpoint import read
from train.checkpoint.select import checkpoint_steps, step_folder
from train.cli import compose_train
from train.model.parameters import split
from train.stability.config import StressConfig
from train.stability.detector import SMALLEST_DEVIATION, Detector
from train.stability.reactions import Reactions
from train.stability.stress import NGRAM, flipped, local_index, poisoned
from train.trainer import Trainer

POISON = ["stability.stress.poison_samples=[103,115]", "stability.spike_window=16", "optimizer.lr=5e-3"]
"""Steps 26 to 28 of the tiny run train on garbage; by then it knows enough to be surprised."""


@pytest.mark.unit
def test_the_detector_is_a_window_of_plain_statistics() -> None:
    window, sigma = 64, 6.0
    ours = Detector(window, sigma)
    generator, others = random.Random(3), random.Random(4)
    held: list[list[float]] = [[], [], []]
    counted: list[list[float]] = [[], [], []]
    found, lasting = [], []
    for step in range(120):
        loss, norm = 5 + generator.gauss(0, 0.1), math.exp(generator.gauss(0, 0.2))
        loss += 3.0 if step in (50, 51) else 0.0
        # Fifty times the usual norm is a batch, five thousand times a fault.
        norm *= {70: 50.0, 80: 5000.0}.get(step, 1.0)
        # Each of these alone could be noise; all of them, while the loss lies below its mean, are how a model learns.
        if step in (42, 43, 44):
            loss, norm = loss - 0.3, math.exp(1.6)
        if step in (110, 111, 112):
            loss, norm = loss + 0.3, math.exp(2.4)
        loss = math.inf if step == 100 else loss
        # A third as many different pieces, and later three quarters: a change of the mixture.
        repeats = others.gauss(1, 0.01) + (math.log(3) if step == 90 else math.log(4 / 3) if step > 105 else 0)
        score, three = ours.see(*torch.tensor([loss, norm, repeats], dtype=torch.float64)).tolist()
        high = True
        for number, x in enumerate((loss, math.log(norm), repeats)):
            floor = (SMALLEST_DEVIATION, math.log(1000) / sigma, math.log(2) / sigma)[number]
            known = [value for value in held[number][-window:] if not math.isnan(value)]
            wanted, plain, limit = 0.0, 0.0, math.inf
            if step >= window / 2:
                mean, deviation = statistics.fmean(known), max(statistics.pstdev(known), SMALLEST_DEVIATION)
                wanted, plain = (x - mean) / max(deviation, floor), (x - mean) / deviation
                limit = mean + sigma * deviation
            assert score[number] == pytest.approx(wanted if math.isfinite(x) else math.inf, rel=1e-5, abs=1e-6)
            held[number].append(min(x, limit) if math.isfinite(x) else math.nan)
            counted[number].append(min(plain, sigma) if math.isfinite(x) and (high or number != 1) else 0.0)
            high = wanted > 0 if number == 0 else high
            smallest = min([0, 0, *counted[number]][-3:]) if number < 2 else 0.0
            assert three[number] == pytest.approx(math.sqrt(3) * smallest, rel=1e-5, abs=1e-6)
        if max(score) > sigma:
            found.append(step)
        elif max(three) > sigma:
            lasting.append(step)
        if step in (60, 111):
            again = Detector(window, sigma)
            again.load(json.loads(json.dumps(ours.state())))
            ours = again
    assert found == [50, 51, 80, 90, 100]
    assert lasting == [112]


@pytest.mark.unit
def test_poison_replaces_the_text_and_nothing_else() -> None:
    batch, pieces = batch_of(0, 4), 100
    for kind in ("garbage", "repeat"):
        hit = poisoned(batch, StressConfig(poison_samples=[1, 3], poison=kind), seed=5, pieces=pieces)
        again = poisoned(batch_of(1, 1), StressConfig(poison_samples=[1, 3], poison=kind), seed=5, pieces=pieces)
        assert torch.equal(hit.tokens[1], again.tokens[0])
        for row in range(4):
            same = bool((hit.tokens[row] == batch.tokens[row]).all() and (hit.targets[row] == batch.targets[row]).all())
            assert same == (row in (0, 3))
        special = batch.tokens >= pieces
        assert torch.equal(hit.tokens[special], batch.tokens[special])
        assert torch.equal(hit.loss_weight, batch.loss_weight)
        words = hit.tokens[1][~special[1]]
        assert bool((words[NGRAM:] == words[:-NGRAM]).all()) == (kind == "repeat")
        assert (hit.repetition() > batch.repetition() + 0.5) == (kind == "repeat")
    assert poisoned(batch, StressConfig(), seed=5, pieces=pieces) is batch


@pytest.mark.unit
def test_a_bit_is_flipped_where_the_address_says() -> None:
    assert flipped(1.0, 31) == -1.0
    assert flipped(1.0, 23) == 0.5
    assert flipped(flipped(0.3, 30), 30) == pytest.approx(0.3)
    full = torch.arange(8 * 6).view(8, 6)
    for rank in range(2):
        for dim, halves in ((0, 1), (0, 2), (1, 1)):
            layout = split("w", (8, 6), dim, rank, 2, halves=halves)
            shard = layout.cut(full).flatten().tolist()
            for index in range(48):
                place = local_index(layout, index)
                assert (shard[place] == index) if place is not None else (index not in shard)


def _flipped(layouts: list[list[str]]) -> list[list[float]]:
    curves = []
    for layout in layouts:
        engine = start_engine(["stability.stress.flip_step=3", "stability.stress.flip_index=7", *layout])
        results = []
        for step in range(4):
            engine.guard.coming(step + 1)
            results.append(engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK))
        curves.append([one.grad_norm for one in engine.read(results)])
    return curves


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "bit", "name"),
    [("weight", 29, "layers.0.post_attention_norm.weight"), ("gradient", 26, "layers.0.mlp.dense_4h_to_h.weight")],
)
def test_a_flipped_bit_hits_the_same_element_in_every_layout(kind: str, bit: int, name: str) -> None:
    # One bit of the exponent: a norm's weight of nearly 1 becomes nearly 0, a gradient 256 times as large.
    words = [f"stability.stress.flip={kind}", f"stability.stress.flip_bit={bit}"]
    words.append(f"stability.stress.flip_parameter={name}")
    alone, clean = in_ranks(1, _flipped, [["parallel.zero_stage=0", *words], ["stability.stress.flip_step=null"]])
    assert alone[:2] == pytest.approx(clean[:2], rel=1e-5)
    assert alone != pytest.approx(clean, rel=5e-5)
    two = [[], ["parallel.zero_stage=3"], ["parallel.tensor_parallel=2"], ["parallel.pipeline_parallel=2"]]
    for curve in in_ranks(2, _flipped, [[*layout, *words] for layout in two]):
        assert curve == pytest.approx(alone, rel=1e-5)


def _skipping(layout: list[str]) -> list[tuple[bool, float]]:
    words = ["stability.reactions=[skip]", "stability.spike_window=16", "stability.spike_sigma=4"]
    words += ["stability.stress.flip=gradient", "stability.stress.flip_bit=30", "stability.stress.flip_step=13"]
    engine = start_engine([*words, *layout])
    found = []
    for step in range(15):
        engine.guard.coming(step + 1)
        before = [fragment.master.clone() for fragment in engine.fragments()]
        moments = [fragment.moments["exp_avg"].clone() for fragment in engine.fragments()]
        numbers = engine.read([engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK)])[0]
        moved = max(float((one.master - old).abs().max()) for one, old in zip(engine.fragments(), before, strict=True))
        for one, old in zip(engine.fragments(), moments, strict=True):
            moved = max(moved, float((one.moments["exp_avg"] - old).abs().max()))
        found.append((numbers.skipped, moved))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [["parallel.zero_stage=0"], [], ["precision=bf16"], ["parallel.zero_stage=3"]])
def test_skip_leaves_weights_and_moments_as_they_were(layout: list[str]) -> None:
    for number, (skipped, moved) in enumerate(in_ranks(2, _skipping, layout)):
        assert skipped == (number == 12)
        assert (moved > 0) == (number != 12)


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str]) -> list[str]:
    acts = [
        "{step: 6, action: lower_shrink, factor: 0.5}",
        "{step: 9, action: skip_samples, samples: [34, 37]}",
        "{step: 34, action: reset_optimizer}",
    ]
    return [
        *tiny_overrides,
        *POISON,
        "stability.embedding_gradient_shrink=0.8",
        "stability.reactions=[roll_back,lower_lr]",
        "stability.rewarm_samples=8",
        "stability.spike_sigma=2.3",
        "stability.roll_back_margin_steps=2",
        f"stability.events=[{','.join(acts)}]",
        "optimizer.clip_kind=zclip",
        "optimizer.clip_warmup_steps=4",
        "max_steps=40",
        "saving.every_steps=4",
        "saving.keep_last=12",
        "logging.every_steps=5",
    ]


def events(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [{key: value for key, value in event.items() if key != "attempt"} for event in found]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, overrides: list[str], command: Command) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    command("train", *overrides, f"run_dir={run_dir}")
    return run_dir


@pytest.mark.e2e
def test_a_poisoned_range_is_rolled_back_and_skipped(whole_run: Path) -> None:
    found, steps = events(whole_run), lines(whole_run)
    assert [event["kind"].endswith("spike") for event in found] == [False, False, True, True, False]
    spike, again = found[2:4]
    back, lower = spike["acts"]
    # The three samples that the planned act skips move the poison to the samples of step 26 exactly.
    assert spike["step"] == 26
    assert back["action"] == "roll_back"
    assert back["to_step"] == 20
    assert back["skip"] == [95, 107]
    assert (lower["action"], lower["factor"], lower["step"]) == ("lower_lr", 0.5, 21)
    # Two thirds of the poison still lie ahead: found again, from the same checkpoint.
    assert again["acts"][0]["to_step"] == 20
    assert [line["step"] for line in steps] == list(range(1, 41))
    aside = (whole_run / "discarded" / "metrics.attempt-1.jsonl").read_text()
    assert json.loads(aside.splitlines()[0])["step"] == 21
    plan = json.loads((whole_run / "checkpoints" / "step_00000040" / "trainer_state.json").read_text())["data_plan"]
    assert {"from_sample": 32, "skip": [34, 37]} in plan
    consumed = [line["consumed_samples"] for line in steps]
    for event in (spike, again):
        first, end = event["acts"][0]["skip"]
        assert {"from_sample": 83, "skip": [first, end]} in plan
        assert not any(first < cursor <= end for cursor in consumed)
    # Twice half of the schedule's rate, once the 8 samples of its warm-up are over.
    last, size = steps[-1], 400
    wanted = 1e-4 + (5e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (last["consumed_samples"] - 16) / (size - 16)))
    assert last["lr"] == pytest.approx(wanted * 0.25)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "when", [pytest.param((4, 19), marks=pytest.mark.slow), (21, 25), pytest.param((26, 36), marks=pytest.mark.slow)]
)
def test_a_killed_run_with_events_repeats_itself_bit_for_bit(
    when: tuple[int, int], whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    generator = random.Random()
    process = started(overrides, tmp_path / "run")
    wanted = generator.randint(*when)
    wait_for(lambda: steps_written(tmp_path / "run") >= wanted, process)
    time.sleep(generator.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps_written(tmp_path / "run") < 40
    command("train", *overrides, f"run_dir={tmp_path / 'run'}")
    assert lines(tmp_path / "run") == lines(whole_run)
    assert events(tmp_path / "run") == events(whole_run)


DIES = """
import os, sys
from unittest import mock
from train.cli import run_train
from train.run_folder import RunFolder
from train.trainer import Trainer, main
where = sys.argv.pop(1)
if where == "told":
    mock.patch.object(Trainer, "_roll_back", lambda trainer: os._exit(9)).start()
else:
    rewind = RunFolder.rewind
    mock.patch.object(RunFolder, "rewind", lambda *a: os._exit(9) if a[1] else rewind(*a)).start()
run_train(main)
"""
"""`python -m train` that dies within a roll-back: before it changes anything, or once later checkpoints are aside."""


@pytest.mark.e2e
@pytest.mark.parametrize("where", ["told", pytest.param("aside", marks=pytest.mark.slow)])
def test_a_run_killed_in_a_roll_back_goes_on_as_if_it_had_not_been(
    where: str, whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    words = [*overrides, f"run_dir={tmp_path / 'run'}"]
    assert subprocess.run([sys.executable, "-c", DIES, where, *words], cwd=ROOT, check=False).returncode == 9
    assert checkpoint_steps(tmp_path / "run")[-1] == (24 if where == "told" else 20)
    assert events(tmp_path / "run") == events(whole_run)[:3]
    command("train", *words)
    assert lines(tmp_path / "run") == lines(whole_run)
    # One that was decided and not carried out is decided again.
    twice = events(whole_run)[2:3] if where == "told" else []
    assert events(tmp_path / "run") == [*events(whole_run)[:3], *twice, *events(whole_run)[3:]]


@pytest.mark.e2e
def test_a_run_sent_back_before_its_roll_backs_finds_them_again(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    """Stopped where the checkpoint that they go back to was made anew, it takes up those of the new history alone."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    stop = [word for word in overrides if not word.startswith("max_steps")]
    command("train", *stop, f"run_dir={run_dir}", "resume.step=16", "max_steps=22")
    shutil.rmtree(step_folder(run_dir, 22))
    assert checkpoint_steps(run_dir)[-1] == 20
    command("train", *overrides, f"run_dir={run_dir}")
    assert lines(run_dir) == lines(whole_run)
    assert events(run_dir) == [*events(whole_run), *events(whole_run)[2:4]]


def _roll_back_to(step: int, number: int) -> dict[str, Any]:
    acts = [
        {"id": f"spike-{number}/{action}", "step": step + 1, "action": action} for action in ("roll_back", "lower_lr")
    ]
    acts[0] |= {"to_step": step, "skip": [number, number + 1]}
    acts[1] |= {"factor": 0.5}
    return {"id": f"spike-{number}", "step": number, "acts": acts}


@pytest.mark.unit
def test_a_roll_back_past_another_undoes_its_acts() -> None:
    """Back to 300, then to 200, then over a new 300: what the first did is not done again, killed or not."""

    def start() -> Reactions:
        return Reactions(compose_train(["experiment=demo"]), mock.Mock(guard=None))

    live, saved = start(), {200: start().state(), 300: start().state()}
    for number, target in ((306, 300), (302, 200)):
        live.history.append(_roll_back_to(target, number))
        live.load_state(saved[target])
        assert live.go_on_from(target) == [[number, number + 1]]
    assert live.roll_backs == ["spike-306", "spike-302"]
    for found in (live, start()):
        found.remember(live.history)
        found.load_state(live.state())
        assert found.go_on_from(300) == []
        assert found.learning_rate(301, 0, 1.0) == 0.5
        assert found.roll_backs == ["spike-306", "spike-302"]


@pytest.mark.unit
def test_a_roll_back_says_what_it_is_at() -> None:
    """It loads, then the samples from there on are read: both take long, and neither is a rank that reads numbers."""
    seen = mock.Mock()
    going_back = mock.Mock(heart=seen, _resume=seen.resume, _rolls_back=_roll_back_to(16, 20), step=16)
    with mock.patch.object(read, "choose"):
        Trainer._roll_back(going_back)
    names = [(name, *arguments) if name == "now" else name for name, arguments, _ in seen.mock_calls]
    assert names == [("now", "checkpoint"), "resume", ("now", "data", 16)]


def _gone_back(layout: list[str], run_dir: str) -> tuple[Curve, Curve]:
    """Steps 4 to 6, and once more from the checkpoint of step 3 with all weights lost."""
    engine = start_engine(layout)

    def steps(first: int, end: int) -> Curve:
        done = [engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK) for step in range(first, end)]
        return [(number.loss, number.grad_norm) for number in engine.read(done)]

    steps(0, 3)
    saver = saver_of(engine, run_dir, asynchronous=False)
    saver.start({"step": 3, "optimizer_steps": 3, "loss_scaler": engine.scaler_state()})
    saver.finish()
    wanted = steps(3, 6)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(math.nan)
    read.load(engine, step_folder(Path(run_dir), 3))
    return wanted, steps(3, 6)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.zero_stage=3"],
        pytest.param(["parallel.zero_stage=3", "precision=bf16"], marks=pytest.mark.slow),
        pytest.param(["parallel.zero_stage=3", "parallel.tensor_parallel=2"], marks=pytest.mark.slow),
        pytest.param(["parallel.zero_stage=1", "precision=bf16"], marks=pytest.mark.slow),
        pytest.param(["parallel.pipeline_parallel=2", "precision=bf16"], marks=pytest.mark.slow),
    ],
)
def test_a_running_engine_goes_back_to_a_checkpoint_exactly(layout: list[str], tmp_path: Path) -> None:
    wanted, found = in_ranks(2, _gone_back, layout, str(tmp_path))
    assert found == wanted


def _reset_scale(step: int) -> list[float]:
    from train import backend

    with mock.patch.object(type(backend.get_accelerator()), "is_fp16_supported", return_value=True):
        act = f"stability.events=[{{step: {step}, action: reset_loss_scale}}]"
        scale = ["precision.loss_scale_initial_power=24", "precision.loss_scale_hysteresis=1"]
        engine = start_engine(["precision=fp16", *scale, act])
        reactions, scales = Reactions(engine.config, engine), []
        for number in range(1, step + 3):
            told = reactions.before(number, (number - 1) * BATCH)
            assert [event["step"] for event in told] == ([step] if number == step else [])
            result = engine.step(my_batches(engine, (number - 1) * BATCH, BATCH), LR, SHRINK)
            scales.append(result.loss_scale)
    return scales


@pytest.mark.distributed
def test_the_loss_scale_goes_back_to_its_start() -> None:
    """It overflows at 2^24, falls, and after the act stands at 2^24 again, from where it falls once more."""
    step = 4
    scales = in_ranks(1, _reset_scale, step)
    assert scales[0] == 2**24 == scales[step - 1]
    assert scales[step - 2] < 2**24
    assert scales[step] == 2**23


@pytest.mark.e2e
def test_an_act_that_should_have_happened_is_refused(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    words = [word for word in overrides if not word.startswith(("stability.events", "max_steps"))]
    words += [f"run_dir={whole_run}", "max_steps=42"]
    done = command("train", *words, "stability.events=[{step: 39, action: reset_optimizer}]", check=False)
    assert done.returncode == 2
    assert "act at step 39, but the run stands at step 40" in done.stderr
