"""Evaluation: the numbers against sums by hand and against the run's own validation, sources, and bad input."""

import gzip
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep import cli
from data_prep.batch import group_kind, group_language
from data_prep.config import DataConfig, PrepConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import EXIT_CONFIG, EXIT_DATA
from data_prep.prepare import prepare
from data_prep.samples import Sampler
from data_prep.sources import BUNDLED
from train import evaluate
from train.checkpoint.model import Trained, load_trained
from train.evaluate import EvaluateConfig
from train.held_out import HeldOutConfig
from train.held_out import held_out as open_held_out
from train.labels import inputs

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tiny_run: Path) -> Trained:
    return load_trained(tiny_run, CPU)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that `tiny_dataset` does not hold, Chinese and English in one file."""
    path = tmp_path_factory.mktemp("held_out") / "留出 (1).jsonl.gz"
    lines: list[str] = []
    for lang in ("zh", "en"):
        with gzip.open(BUNDLED / f"{lang}.jsonl.gz", "rt", encoding="utf-8") as packed:
            lines += [line for _, line in zip(range(54), packed, strict=False)][50:]
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.write("".join(lines) + json.dumps({"text": "短"}) + "\n")
    return path


def run(*words: str) -> int:
    return cli.run("evaluate", EvaluateConfig, evaluate.main, program="train.evaluate", argv=words)


def result(tmp_path: Path, *words: str) -> dict[str, Any]:
    assert run(*words, f"output={tmp_path / 'eval.json'}") == 0
    return json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))


def by_hand(trained: Trained, sampler: Sampler, samples: int) -> dict[str, dict[str, float]]:
    """Nats, unigram nats, bytes and targets, added up target by target, in all and by language, kind and source."""
    tokenizer = trained.tokenizer
    sums: dict[str, dict[str, float]] = {}
    for index in range(samples):
        batch = sampler.batch([index])
        with torch.no_grad():
            scores = trained.model.head.logits(trained.model(inputs(batch)))[0].double()
        unigram = sampler.unigram_loss(batch)[0]
        group = int(batch.group[0])
        domain = f"from {sampler.address(index).stream.info.name}"
        for slot in torch.nonzero(batch.loss_weight[0]).flatten().tolist():
            target = int(batch.targets[0, slot])
            for name in ("all", group_language(group), group_kind(group), domain):
                entry = sums.setdefault(name, {"nats": 0.0, "unigram": 0.0, "bytes": 0.0, "targets": 0.0})
                entry["nats"] -= float(torch.log_softmax(scores[slot], -1)[target])
                entry["unigram"] += float(unigram[slot])
                entry["bytes"] += int(tokenizer.token_bytes[target])
                entry["targets"] += 1
    return sums


def test_the_numbers_are_the_sums_by_hand(trained, tiny_dataset):
    sampling = trained.config.data.sampling
    sampler = Sampler(Dataset.open(tiny_dataset), sampling, 64, seed=1, split="test")
    wanted = by_hand(trained, sampler, 13)
    for size in (1, 5, 32):
        record = evaluate.evaluate(trained, sampler, 13, size)
        found = {"all": record, **record["by_language"], **record["by_kind"]}
        found |= {f"from {name}": part for name, part in record["by_domain"].items()}
        assert found.keys() == wanted.keys() == {"all", "zh", "en", "gmask", "mask", "from zh", "from en"}
        for name, sums in wanted.items():
            assert found[name]["targets"] == sums["targets"]
            assert found[name]["loss"] == pytest.approx(sums["nats"] / sums["targets"], rel=1e-6)
            assert found[name]["unigram_loss"] == pytest.approx(sums["unigram"] / sums["targets"], rel=1e-5)
            assert found[name]["perplexity"] == pytest.approx(math.exp(sums["nats"] / sums["targets"]), rel=1e-5)
            assert found[name]["bits_per_byte"] == pytest.approx(sums["nats"] / math.log(2) / sums["bytes"], rel=1e-6)


def test_it_repeats_the_validation_of_the_run(tiny_run, tmp_path):
    validation = json.loads((tiny_run / "validation.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    record = result(tmp_path, f"checkpoint={tiny_run}", "samples=8", "micro_batch_size=3")
    assert validation["step"] == record["step"] == 40
    assert record["targets"] == validation["targets"]
    for key in ("loss", "unigram_loss", "bits_per_byte"):
        assert record[key] == pytest.approx(validation[key], rel=1e-6), key
    for lang, part in validation["by_language"].items():
        assert record["by_language"][lang]["loss"] == pytest.approx(part["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "layout"),
    [(4, ["parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"]), (2, ["parallel.zero_stage=3"])],
    ids=["tensor_2_pipeline_2", "zero_3"],
)
def test_it_reads_what_any_layout_wrote(tiny_overrides, tmp_path, command, processes, layout):
    wanted = ["max_steps=5", "evaluation.every_steps=5", "evaluation.samples=8", f"run_dir={tmp_path / 'run'}"]
    command("launch", "cluster=local", f"cluster.processes={processes}", *tiny_overrides, *wanted, *layout)
    validation = json.loads((tmp_path / "run" / "validation.jsonl").read_text(encoding="utf-8"))
    record = result(tmp_path, f"checkpoint={tmp_path / 'run'}", "samples=8")
    assert record["loss"] == pytest.approx(validation["loss"], rel=1e-6)
    assert record["targets"] == validation["targets"]


@pytest.mark.gpu
def test_an_accelerator_gives_the_cpus_loss(trained, tiny_run, tiny_dataset):
    sampler = Sampler(Dataset.open(tiny_dataset), trained.config.data.sampling, 64, seed=1, split="valid")
    wanted = evaluate.evaluate(trained, sampler, 16, 8)
    found = evaluate.evaluate(load_trained(tiny_run, torch.device("cuda")), sampler, 16, 8)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert found["targets"] == wanted["targets"]


def test_a_prepared_folder_needs_no_pipeline():
    """A machine that only trains and evaluates has neither datatrove nor what its executors bring."""
    blocked = "sys.modules.update(dict.fromkeys(['datatrove', 'multiprocess', 'datasets', 'ray']))"
    done = subprocess.run([sys.executable, "-c", f"import sys; {blocked}; import train.evaluate"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_output_holds_what_it_should(tiny_run, tiny_dataset, tmp_path, capsys):
    record = result(tmp_path, f"checkpoint={tiny_run}/checkpoints/step_00000020", f"data.path={tiny_dataset}")
    names = {"loss", "perplexity", "bits_per_byte", "targets", "unigram_loss", "by_language", "by_kind"}
    assert names | {"checkpoint", "seed", "unigram_source"} <= record.keys()
    assert Path(record["checkpoint"]) == tiny_run / "checkpoints" / "step_00000020"
    assert (record["step"], record["seed"], record["split"], record["sequence_length"]) == (20, 1, "valid", 64)
    assert record["unigram_source"].startswith("training data of the run")
    rows = Dataset.open(tiny_dataset).streams("valid", 64)
    assert record["samples"] == sum(stream.rows for stream in rows)
    said = capsys.readouterr().out
    assert f"{record['loss']:.4f}" in said
    assert f"{record['by_kind']['mask']['loss']:.4f}" in said
    assert "training data of the run" in said


def test_seed_and_split_change_what_is_seen_and_nothing_else_does(tiny_run, tmp_path):
    words = [f"checkpoint={tiny_run}", "samples=12"]
    first = result(tmp_path, *words)
    assert result(tmp_path, *words) == first
    assert result(tmp_path, *words, "micro_batch_size=1")["targets"] == first["targets"]
    assert result(tmp_path, *words, "seed=2")["loss"] != first["loss"]
    assert result(tmp_path, *words, "split=test")["loss"] != first["loss"]
    assert result(tmp_path, *words, "sequence_length=32")["sequence_length"] == 32


def test_files_are_cleaned_tokenised_and_evaluated_whole(trained, held_out, tiny_dataset, tmp_path, command):
    """The real command on a file name with Chinese, a space and brackets, against the pipeline taken apart."""
    words = [f"checkpoint={trained.folder}", f"data.sources=[{held_out}]", f"output={tmp_path / '结果 1.json'}"]
    done = command("train.evaluate", *words)
    record = json.loads((tmp_path / "结果 1.json").read_text(encoding="utf-8"))
    assert done.stderr == ""
    assert f"{record['loss']:.4f}" in done.stdout
    assert record["rejected"] == {"too_short": 1}
    assert record["data"] == [str(held_out)]
    prepare(
        PrepConfig(
            data=DataConfig(path=str(tmp_path / "data"), sources=[str(held_out)], split_shares=[0, 0, 1]),
            tokenizer=TokenizerConfig(path=str(tiny_dataset / "tokenizer")),
        )
    )
    dataset = Dataset.open(tmp_path / "data")
    dataset.unigram_counts = Dataset.open(tiny_dataset).unigram_counts
    sampler = Sampler(dataset, trained.config.data.sampling, 64, seed=1, split="test")
    assert record["samples"] == sampler.rows > 100
    wanted = evaluate.evaluate(trained, sampler, sampler.rows, 8)
    for key in ("loss", "unigram_loss", "bits_per_byte", "targets"):
        assert record[key] == wanted[key], key
    # All 8 documents are in it, but for the rest of a row in each language.
    assert dataset.manifest.counts("test").documents == 8
    assert dataset.manifest.counts("test").tokens - 63 * sampler.rows < 2 * 63


def test_without_the_training_data_the_baseline_says_where_it_comes_from(
    trained, held_out, tiny_dataset, tmp_path, monkeypatch
):
    def moved(path: str, device: torch.device, **settings: Any) -> Trained:
        again = load_trained(path, device, **settings)
        again.config.data.path = str(tmp_path / "moved away")
        return again

    words = [f"checkpoint={trained.folder}", "samples=20"]
    own = result(tmp_path, *words, f"data.sources=[{held_out}]")
    given = result(tmp_path, *words, f"data.path={tiny_dataset}")
    monkeypatch.setattr(evaluate, "load_trained", moved)
    alone = result(tmp_path, *words, f"data.sources=[{held_out}]")
    assert alone["unigram_source"].startswith("the evaluated text itself")
    assert alone["loss"] == own["loss"]
    assert alone["unigram_loss"] != own["unigram_loss"]
    elsewhere = result(tmp_path, *words, f"data.path={tiny_dataset}")
    assert elsewhere["unigram_source"].startswith("train split of")
    assert elsewhere["unigram_loss"] == given["unigram_loss"]
    assert run(*words) == EXIT_CONFIG


def test_text_counts_are_all_tokens_of_the_text(trained, held_out, tmp_path):
    with evaluate.ExitStack() as stack:
        trained.config.data.path, before = str(tmp_path / "gone"), trained.config.data.path
        try:
            data = HeldOutConfig(sources=[str(held_out)])
            sampler, _ = open_held_out(trained, data, "valid", stack)
        finally:
            trained.config.data.path = before
        counts = sampler.dataset.unigram_counts
        assert counts.sum() == sampler.dataset.manifest.counts("test").tokens
        assert counts[trained.tokenizer.eod] == 8
        assert np.all(counts[trained.tokenizer.eod + 1 :] == 0)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["checkpoint=no/such/run"], EXIT_DATA, "no/such/run holds no checkpoint"),
        (["checkpoint=null"], EXIT_CONFIG, "checkpoint"),
        (["split=train"], EXIT_CONFIG, "split=train must be one of valid, test"),
        (["samples=0"], EXIT_CONFIG, "samples=0 must be at least 1"),
        (["micro_batch_size=0"], EXIT_CONFIG, "micro_batch_size=0 must be at least 1"),
        (["sequence_length=128"], EXIT_CONFIG, "sequence_length=128 is more than the model.max_positions=64"),
        (["sequence_length=20"], EXIT_CONFIG, "sequence_length=20 must be at least 32"),
        (["sample=5"], EXIT_CONFIG, "sample is not a known key; did you mean samples"),
        (["data.path=no/such/data"], EXIT_DATA, "no/such/data/manifest.json: missing, no such folder"),
        (["data.path=D", "data.sources=[x.jsonl]"], EXIT_CONFIG, "data.path=D and data.sources are both given"),
        (["data.sources=[no/such.jsonl]"], EXIT_DATA, "no/such.jsonl: no such file (data.sources)"),
        (["data.sources=[{file: x}]"], EXIT_CONFIG, "data.sources: unknown key file"),
        (["samples=2", "output=/proc/no/where.json"], EXIT_DATA, "/proc/no"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_that_names_key_or_file(tiny_run, capsys, words, status, message):
    assert run(f"checkpoint={tiny_run}", *words) == status
    assert_one_line(capsys, message)


SOURCES = {
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "binary.jsonl": (b"\x00\x01\x02\xff" * 100, "binary.jsonl: line 1: this is a binary file"),
    "other.docx": (b"text", "other.docx: unknown kind of file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "' + b"abc " * 9999 + b'"}')[:-30], "cut off or damaged"),
    "short.txt": (
        "今天天气很好，我们去公园散步。".encode(),
        "data.sources: no document is left after cleaning (1 too_short)",
    ),
    "few.txt": ("今天天气很好，我们去公园散步，明天再来。".encode(), "no source fills one row of 63"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_cannot_be_evaluated_is_one_line(tiny_run, tmp_path, capsys, name):
    content, message = SOURCES[name]
    (tmp_path / name).write_bytes(content)
    assert run(f"checkpoint={tiny_run}", f"data.sources=[{tmp_path / name}]") == EXIT_DATA
    assert_one_line(capsys, message)


def test_another_tokenizers_data_is_refused(tiny_run, held_out, tmp_path, capsys):
    prepare(
        PrepConfig(
            data=DataConfig(path=str(tmp_path / "data"), sources=[str(held_out)], split_shares=[1, 1, 1]),
            tokenizer=TokenizerConfig(vocab_size=400, threads=1),
        )
    )
    assert run(f"checkpoint={tiny_run}", f"data.path={tmp_path / 'data'}") == EXIT_DATA
    assert_one_line(capsys, f"{tmp_path / 'data' / 'tokenizer'} is not the tokenizer of")


def damaged_byte(step: Path) -> str:
    file = step / "model" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"{file} is damaged: its checksum is not the manifest's"


def missing_file(step: Path) -> str:
    file = step / "model" / "rank_00000.safetensors"
    file.unlink()
    return f"{file} is missing"


def no_manifest(step: Path) -> str:
    (step / "manifest.json").unlink()
    return f"{step} holds no checkpoint"


def other_tokenizer(step: Path) -> str:
    file = step / "tokenizer" / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-1])
    return str(file)


def later_config(step: Path) -> str:
    with (step / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("a_key_of_a_later_version: 1\n")
    return str(step / "config.yaml")


@pytest.mark.parametrize("damage", [damaged_byte, missing_file, no_manifest, other_tokenizer, later_config])
def test_a_damaged_checkpoint_is_named(tiny_run, tmp_path, capsys, damage):
    step = tmp_path / "step_00000040"
    shutil.copytree(tiny_run / "checkpoints" / "step_00000040", step)
    message = damage(step)
    assert run(f"checkpoint={step}") == EXIT_DATA
    assert_one_line(capsys, message)


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("train.evaluate: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
