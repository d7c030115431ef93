"""Fixtures that several rooms share: a small bilingual dataset, a model small enough for it, and one trained run.

All are made once a session. Training runs in a process of its own, so that no process group, no environment variable
and no DeepSpeed state is left behind in the tests' process.
"""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Read when torch is imported: the tests share their cores with each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from data_prep.config import DataConfig, PrepConfig, TokenizerConfig
from data_prep.sources import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = 50
"""Documents of each language in `tiny_dataset`."""

# The same examples each time, on however slow a machine; new ones are searched by --hypothesis-profile=default.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(scope="session")
def command() -> Command:
    """`command("train", "model=tiny", …)` runs `python -m train …` in the repository's root with captured output.

    Keyword arguments go to `subprocess.run`; `check=True` is the default and shows stderr where it fails.
    """

    def run(module: str, *words: str, check: bool = True, **options: object) -> "subprocess.CompletedProcess[str]":
        done: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
            [sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
        )
        assert not check or done.returncode == 0, f"{module} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete dataset folder: 50 Chinese and 50 English documents of the embedded corpus, 600 pieces."""
    from data_prep.prepare import prepare  # the kernels' tests run where nothing that prepares data is installed

    sources = tmp_path_factory.mktemp("tiny_sources")
    files = []
    for lang in ("zh", "en"):
        with gzip.open(BUNDLED / f"{lang}.jsonl.gz", "rt", encoding="utf-8") as packed:
            lines = [next(packed) for _ in range(DOCUMENTS)]
        files.append(sources / f"{lang}.jsonl")
        files[-1].write_text("".join(lines), encoding="utf-8")
    folder = tmp_path_factory.mktemp("tiny_data") / "dataset"
    prepare(
        PrepConfig(
            data=DataConfig(path=str(folder), sources=[str(file) for file in files], split_shares=[80, 10, 10]),
            tokenizer=TokenizerConfig(vocab_size=600, threads=1),
        )
    )
    return folder


@pytest.fixture(scope="session")
def tiny_overrides(tiny_dataset: Path) -> list[str]:
    """Overrides of `python -m train` for a 2 x 64 model on 64 slots of `tiny_dataset`; `run_dir` is left to the test.

    4 heads, 640 rows of vocabulary and 4 samples a step: they divide by 2 and 4 ranks along any axis.
    """
    return [
        "model=tiny",
        "model.name=tiny_test",
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.num_heads=4",
        "model.ffn_hidden_size=160",
        "model.padded_vocab_size=640",
        "model.max_positions=64",
        f"data.path={tiny_dataset}",
        "data.workers=0",
        "seed=1",
        "precision=fp32",
        "micro_batch_size=1",
        "global_batch_size=4",
        "schedule.warmup_samples=16",
        "schedule.decay_samples=400",
        "evaluation.every_steps=0",
        "logging.progress=false",
        "logging.report=false",
    ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str], command: Command) -> Path:
    """A finished run of 40 steps of that model: checkpoints of steps 20 and 40, validated at step 40 on 8 samples.

    Read it, never write in it.
    """
    run_dir = tmp_path_factory.mktemp("tiny_run") / "run"
    wanted = ["max_steps=40", "saving.every_steps=20", "evaluation.every_steps=40", "evaluation.samples=8"]
    command("train", *tiny_overrides, f"run_dir={run_dir}", *wanted)
    return run_dir
