"""The stages: killed anywhere they go on, workers change nothing, clusters get what they need, caps hold."""

import json
import multiprocessing
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from data_prep_helpers import document, small_config

from data_prep.config import CleaningConfig, PipelineConfig, PrepConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from data_prep.prepare import Submitted, prepare
from data_prep.steps import decide

pytestmark = pytest.mark.unit
FILES = 4


def config_of(folder: Path, source_files: list[Path], tokenizer: Path, place: Path, **pipeline: object) -> PrepConfig:
    """Four files of two languages, so four pieces of work, with every stage."""
    place.mkdir(exist_ok=True)
    for number in range(FILES):
        lines = source_files[number % 2].read_text("utf-8").splitlines(keepends=True)
        own = lines[number // 2 :: 2] + lines[:1]
        (place / f"{number}.jsonl").write_text("".join(own), encoding="utf-8")
    config = small_config(
        folder,
        [{"path": str(place / "*.jsonl"), "name": "all"}],
        task_bytes=1,
        max_shard_tokens=8192,
        cleaning=CleaningConfig(near_duplicates=True, bands=2),
        pipeline=PipelineConfig(**pipeline),  # type: ignore[arg-type]
    )
    config.tokenizer = TokenizerConfig(path=str(tokenizer), threads=1)
    return config


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a dataset folder but the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "lock"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source_files: list[Path], folder: Path) -> tuple[Path, Path]:
    """Sources, and the folder that an undisturbed preparation made of them."""
    place = tmp_path_factory.mktemp("pipeline")
    prepare(config_of(place / "whole", source_files, folder, place / "sources"))
    return place / "sources", place / "whole"


def in_child(task: Callable[[], None]) -> int:
    """Exit code of a forked process that runs `task`."""
    child = multiprocessing.get_context("fork").Process(target=task)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def test_killed_at_any_rename_it_goes_on_to_the_same_folder(
    tmp_path: Path, whole: tuple[Path, Path], source_files: list[Path], folder: Path
) -> None:
    """SIGKILL before or after a rename of each attempt, a later one each time, until one comes through."""
    config = config_of(tmp_path / "out", source_files, folder, whole[0])
    markers = tmp_path / "out" / ".work" / "logs"
    attempts = done_before = 0
    while True:
        attempts += 1

        def attempt(limit: int = 5 * attempts, before: bool = bool(attempts % 2)) -> None:
            calls, replace = [0], os.replace

            def counted(*arguments: object) -> None:
                calls[0] += 1
                if calls[0] == limit and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*arguments)  # type: ignore[arg-type]
                if calls[0] == limit:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = counted
            prepare(config)

        code = in_child(attempt)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        done = {path: path.stat().st_mtime_ns for path in markers.rglob("completions/*")}
        assert len(done) >= done_before, "a finished piece of work stays finished"
        done_before = len(done)
        assert attempts < 20
    assert attempts > 4
    assert content(tmp_path / "out") == content(whole[1])
    Dataset.open(tmp_path / "out", verify=True)


def test_a_rerun_does_only_what_is_missing(
    tmp_path: Path, whole: tuple[Path, Path], source_files: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "out", source_files, folder, whole[0])

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "tokenise":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop)
    cleaned = tmp_path / "out" / ".work" / "clean" / "00000" / "documents.npy"
    made = cleaned.stat().st_mtime_ns
    marker = tmp_path / "out" / ".work" / "logs" / "clean" / "completions" / "00002"
    marker.unlink()
    again: list[str] = []

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "tokenise" and done < total and not again:
            assert cleaned.stat().st_mtime_ns == made
        again.append(stage)

    prepare(config, watch)
    assert "tokenise" in again
    assert content(tmp_path / "out") == content(whole[1])


def test_other_settings_start_over(
    tmp_path: Path, whole: tuple[Path, Path], source_files: list[Path], folder: Path
) -> None:
    config = config_of(tmp_path / "out", source_files, folder, whole[0])

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "decide":
            raise KeyboardInterrupt

    config.data.min_characters = 1000
    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop)
    config.data.min_characters = 16
    prepare(config)
    assert content(tmp_path / "out") == content(whole[1])


def test_workers_change_nothing(
    tmp_path: Path, whole: tuple[Path, Path], source_files: list[Path], folder: Path
) -> None:
    prepare(config_of(tmp_path / "out", source_files, folder, whole[0], workers=2))
    assert content(tmp_path / "out") == content(whole[1])


def test_a_cap_holds_over_all_pieces(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "AT_ONCE", 7)
    for name in "ab":
        lines = [document(f"这是第 {n} 个文件里写的一句话，文件叫 {name}。") for n in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    config = small_config(
        tmp_path / "out",
        [{"path": str(tmp_path / "*.jsonl"), "name": "s", "cap": 40, "lang": "zh"}],
        task_bytes=1,
        split_shares=[1, 0, 0],
    )
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    manifest, _ = prepare(config)
    assert manifest.rejected == {"s": {"over_cap": 20}}
    assert [shard.documents for shard in manifest.sources[0].shards] == [30, 10]


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ({"executor": "slurm", "partition": "cpu"}, "needs Slurm's sbatch"),
        ({"executor": "ray"}, "needs the package ray"),
    ],
)
def test_a_missing_scheduler_is_named(
    tmp_path: Path,
    whole: tuple[Path, Path],
    source_files: list[Path],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pipeline: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        prepare(config_of(tmp_path / "out", source_files, folder, whole[0], **pipeline))
    assert not (tmp_path / "out").exists()


_SBATCH = """#!/usr/bin/env python3
import os, pathlib, re, subprocess, sys
here = pathlib.Path(__file__).parent
text = pathlib.Path(sys.argv[-1]).read_text()
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:-1]) + "\\n")
if os.environ.get("FAKE_RUNS") and "merge_stats" not in text:
    for rank in range(int(re.search("--array=0-([0-9]+)", text)[1]) + 1):
        env = os.environ | {"SLURM_ARRAY_TASK_ID": str(rank), "SLURM_NODELIST": "localhost", "RUN_OFFSET": "0"}
        subprocess.run(["bash", sys.argv[-1]], check=True, env=env, capture_output=True)
print("Submitted batch job", 100 + len((here / "calls").read_text().splitlines()))
"""


def fake_slurm(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, srun and scontrol that do at once what a cluster would do in its time."""
    place.mkdir()
    scripts = {
        "sbatch": _SBATCH,
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* || "$1" =~ ^[0-9]+$ ]]; do shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho localhost\n",
    }
    for name, script in scripts.items():
        (place / name).write_text(script)
        (place / name).chmod((place / name).stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place / "calls"


def test_slurm_gets_a_chain_of_array_jobs(
    tmp_path: Path, whole: tuple[Path, Path], source_files: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_slurm(tmp_path / "bin", monkeypatch)
    options = {"executor": "slurm", "partition": "cpu", "workers": 3, "memory_gb": 6, "sbatch": {"account": "lab"}}
    config = config_of(tmp_path / "out", source_files, folder, whole[0], **options)
    with pytest.raises(Submitted, match="are submitted"):
        prepare(config)
    jobs = [line for line in calls.read_text().splitlines() if "--export" in line]
    assert len(jobs) == 6
    assert all(f"--dependency=afterok:{101 + 2 * number}" in job for number, job in enumerate(jobs[1:]))
    script = (tmp_path / "out" / ".work" / "logs" / "clean" / "launch_script.slurm").read_text()
    for line in ("partition=cpu", "array=0-3%3", "mem-per-cpu=6G", "account=lab", "time=24:00:00"):
        assert f"#SBATCH --{line}" in script
    with pytest.raises(ConfigError, match="were submitted to Slurm before"):
        prepare(config)


@pytest.mark.slow
def test_slurm_jobs_make_the_same_folder(
    tmp_path: Path, whole: tuple[Path, Path], source_files: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs themselves, run one after another by a stand-in for sbatch."""
    fake_slurm(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("FAKE_RUNS", "1")
    config = config_of(tmp_path / "out", source_files, folder, whole[0], executor="slurm", partition="cpu")
    with pytest.raises(Submitted):
        prepare(config)
    made, expected = content(tmp_path / "out"), content(whole[1])
    assert {name: made[name] for name in expected} == expected
    assert json.loads(made["manifest.json"])["version"] == 1
    assert prepare(config)[1]
    assert content(tmp_path / "out") == expected


def test_a_hub_data_set_is_read_in_shards(tmp_path: Path, folder: Path) -> None:
    """A folder that `datasets` opens as it would a data set of the hub; too many shards are refused."""
    place = tmp_path / "hub"
    place.mkdir()
    for name in "ab":
        lines = [document(f"文件 {name} 里的第 {n} 句话，写得不长也不短。", lang="zh") for n in range(20)]
        (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    entry = {"hub": str(place), "name": "hub", "shards": 2}
    config = small_config(tmp_path / "out", [entry], split_shares=[1, 0, 0])
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    manifest, _ = prepare(config)
    assert [shard.documents for shard in manifest.sources[0].shards] == [20, 20]
    config.data.path, entry["shards"] = str(tmp_path / "more"), 3
    with pytest.raises(ConfigError, match="has 2 files, fewer than shards=3"):
        prepare(config)
