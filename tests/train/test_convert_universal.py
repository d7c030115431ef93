"""DeepSpeed's universal checkpoint both ways, with DeepSpeed's own loader and converter on the other side.

"Plain" is a user's script: `deepspeed.initialize` of the model, torch's AdamW, no engine of this project.
"""

import argparse
import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep import cli
from data_prep.errors import EXIT_CONFIG, EXIT_DATA
from tests.train.parity import (
    BATCH,
    LR,
    OVERRIDES,
    SHRINK,
    Curve,
    batch_of,
    in_ranks,
    my_batches,
    noisy_vectors,
    saver_of,
    start_engine,
)
from train.checkpoint.pieces import PieceReader
from train.checkpoint.read import load
from train.checkpoint.select import find, read_state
from train.cli import compose_train
from train.convert.__main__ import main
from train.convert.config import ConvertConfig
from train.labels import Labels, inputs
from train.model.build import Model
from train.model.parameters import layout_of

BEFORE, AFTER, TOLERANCE = 2, 4, 1e-5
MODEL = ["model.num_layers=2", "model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
PLAIN = {"zero_1": [], "zero_3": ["parallel.zero_stage=3"], "tensor_2": ["parallel.tensor_parallel=2"]}
"""Layouts of two ranks that load what we write."""
READ = ("zero_1", "zero_3")
"""Those that then save and convert it by DeepSpeed's own means, for us to read."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> tuple[Path, dict[str, Curve]]:
    """How the runs in a folder go on: `ours` (of two data-parallel ranks), `out` (it, written for DeepSpeed), `zero_N`
    (plain runs that went on from there, converted) and `zero_N_in` (these read in)."""
    folder = tmp_path_factory.mktemp("universal")
    shutil.copytree(tiny_dataset / "tokenizer", folder / "ours" / "tokenizer")
    curves: dict[str, Curve] = in_ranks(2, _all_runs, folder)
    return folder, curves


def test_deepspeed_goes_on_from_what_we_write(runs: tuple[Path, dict[str, Curve]]) -> None:
    for name in PLAIN:
        assert_alike(runs[1][f"out/{name}"], runs[1]["ours"])


def test_we_go_on_from_what_deepspeed_converts(runs: tuple[Path, dict[str, Curve]]) -> None:
    steps = BEFORE + AFTER
    for name in READ:
        assert_alike(runs[1][f"{name}_in"], runs[1][name])
        state = read_state(find(runs[0] / f"{name}_in"))
        assert (state["step"], state["consumed_samples"], state["optimizer_steps"]) == (steps, steps * BATCH, steps)


def test_there_and_back_is_exact(runs: tuple[Path, dict[str, Curve]]) -> None:
    folder = runs[0]
    convert(folder / "out", folder / "back", like=str(folder / "ours"))
    ours, back = (PieceReader(find(folder / name)) for name in ("ours", "back"))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert ours.names(kind) == back.names(kind)
        for name in ours.names(kind):
            assert torch.equal(ours.full(kind, name), back.full(kind, name)), (kind, name)
    before, after = read_state(find(folder / "ours")), read_state(find(folder / "back"))
    for key in ("step", "consumed_samples", "optimizer_steps", "data_plan", "dataset"):
        assert before[key] == after[key]


class Evil:
    """Runs a command when it is unpickled by anything that trusts pickles."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


WEIGHT = "zero/items.2.attention.dense_weight/exp_avg.pt"
BAD: list[tuple[str, Callable[[Path], object], list[str], int, str]] = [
    ("no like", lambda tag: None, [], EXIT_CONFIG, "needs like="),
    ("code", lambda tag: torch.save({"param": Evil()}, tag / WEIGHT), ["like"], EXIT_DATA, "holds code or objects"),
    ("a shape", lambda tag: torch.save({"param": torch.ones(31)}, tag / WEIGHT), ["like"], EXIT_DATA, "[32, 32]"),
    ("a file", lambda tag: (tag / WEIGHT).unlink(), ["like"], EXIT_DATA, "is missing"),
    ("a cut", lambda tag: (tag / WEIGHT).write_bytes(b"PK"), ["like"], EXIT_DATA, "not a whole file of torch.save"),
    ("zero/", lambda tag: shutil.rmtree(tag / "zero"), ["like"], EXIT_DATA, "has a folder zero/"),
    ("counters", lambda tag: [f.unlink() for f in tag.glob("*_states.pt")], ["like"], EXIT_DATA, "has no mp_rank_00"),
    ("a dtype", lambda tag: None, ["like", "dtype=bf16"], EXIT_CONFIG, "dtype= has no meaning"),
]


@pytest.mark.parametrize(("name", "damage", "words", "status", "said"), BAD, ids=[bad[0] for bad in BAD])
def test_what_cannot_be_read_is_refused(
    name: str,
    damage: Callable[[Path], object],
    words: list[str],
    status: int,
    said: str,
    runs: tuple[Path, dict[str, Curve]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(runs[0] / "out", tmp_path / "source")
    damage(next((tmp_path / "source").glob("global_step*")))
    words = [f"like={runs[0] / 'ours'}" if word == "like" else word for word in words]
    argv = [f"source={tmp_path / 'source'}", f"target={tmp_path / 'target'}", "format=deepspeed_universal", *words]
    assert cli.run("convert", ConvertConfig, main, program="train.convert", argv=argv) == status
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def assert_alike(curve: Curve, expected: Curve) -> None:
    assert len(curve) == len(expected) == AFTER
    for (loss, norm), (other_loss, other_norm) in zip(curve, expected, strict=True):
        assert loss == pytest.approx(other_loss, rel=TOLERANCE)
        assert norm == pytest.approx(other_norm, rel=10 * TOLERANCE)


def convert(source: Path, target: Path, **settings: Any) -> None:
    """`python -m train.convert` in this process."""
    assert main(ConvertConfig(str(source), str(target), "deepspeed_universal", **settings)) == 0


def _all_runs(folder: Path) -> dict[str, Curve]:
    """In two ranks: every run of this file, and the steps that it takes after it was saved or loaded."""
    ours = start_engine(MODEL)
    curves = {"ours": _ours(ours, folder / "ours")}
    _on_first(lambda: convert(folder / "ours", folder / "out"))
    for name, layout in PLAIN.items():
        plain = _plain(layout)
        plain.load_checkpoint(str(folder / "out"))
        assert (plain.global_steps, plain.global_samples) == (BEFORE, BEFORE * BATCH)
        for state in plain.optimizer.optimizer.state.values():
            # DeepSpeed's ZeRO-3 hands one counter to all groups, where AdamW would count each of them (docs).
            state["step"] = state["step"].clone()
        curves[f"out/{name}"] = _plain_steps(plain, BEFORE, AFTER)
        if name not in READ:
            continue
        plain.save_checkpoint(str(folder / name), tag="made")
        _on_first(lambda name=name: _to_universal(folder / name / "made", folder / name / "universal"))
        curves[name] = _plain_steps(plain, BEFORE + AFTER, AFTER)
        _on_first(lambda name=name: convert(folder / name, folder / f"{name}_in", like=str(folder / "ours")))
        assert load(ours, find(folder / f"{name}_in"))["step"] == BEFORE + AFTER
        curves[f"{name}_in"] = _steps(ours, BEFORE + AFTER, AFTER)
    return curves


def _ours(engine: Any, run_dir: Path) -> Curve:
    """This project's engine: a few steps, a save, and the steps after that."""
    _steps(engine, 0, BEFORE)
    progress = {"step": BEFORE, "consumed_samples": BEFORE * BATCH, "optimizer_steps": BEFORE}
    rest = {"loss_scaler": {}, "data_plan": [], "dataset": "digest", "target_tokens": 5, "trained_samples": 1}
    saver_of(engine, str(run_dir), asynchronous=False).start({**progress, **rest})
    return _steps(engine, BEFORE, AFTER)


def _steps(engine: Any, first: int, count: int) -> Curve:
    steps = range(first, first + count)
    results = [engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK) for step in steps]
    return [(numbers.loss, numbers.grad_norm) for numbers in engine.read(results)]


def _plain(overrides: list[str]) -> Any:
    """A plain DeepSpeed engine over the parity experiment's model that loads universal checkpoints."""
    import deepspeed

    from train import backend

    config = compose_train([*OVERRIDES, *overrides, *MODEL])
    mesh = backend.make_mesh(config)
    with noisy_vectors():
        model = Model(config, mesh, torch.float32)
    model.set_shrink(SHRINK, 1.0)
    matrices = [p for p in model.parameters() if len(layout_of(p).full_shape) > 1]
    vectors = [p for p in model.parameters() if len(layout_of(p).full_shape) == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // mesh.data,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "checkpoint": {"load_universal": True},
    }
    with backend.quiet():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(groups, lr=LR, betas=(0.9, config.optimizer.beta2), eps=config.optimizer.eps),
            config=settings,
            mpu=mesh.grid,
            dist_init_required=False,
        )
    engine.our_mesh = mesh
    return engine


def _plain_steps(engine: Any, first: int, count: int) -> Curve:
    curve = []
    for step in range(first, first + count):
        share = BATCH // engine.our_mesh.data
        batch = batch_of(step * BATCH + engine.our_mesh.data_rank * share, share)
        loss, _, _ = engine(inputs(batch), Labels.of(batch))
        engine.backward(loss)
        engine.step()
        mean = engine.our_mesh.sum_over_data(loss.detach().clone()) / engine.our_mesh.data
        curve.append((float(mean), float(engine.get_global_grad_norm())))
    return curve


def _to_universal(made: Path, universal: Path) -> None:
    """`python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state`."""
    from deepspeed.checkpoint import ds_to_universal

    from train import backend

    paths = {"input_folder": str(made), "output_folder": str(universal)}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    with backend.quiet(), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(argparse.Namespace(**paths, **workers, **flags))


def _on_first(task: Callable[[], None]) -> None:
    if torch.distributed.get_rank() == 0:
        task()
    torch.distributed.barrier()
