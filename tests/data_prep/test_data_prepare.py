"""Preparing a folder: every format, every bad input, and nothing half-made taken for whole."""

import errno
import fcntl
import gzip
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import zstandard
from data_prep_helpers import document, small_config

from data_prep.__main__ import main
from data_prep.cli import run
from data_prep.config import PrepConfig, SamplingConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.manifest import Manifest
from data_prep.prepare import page_of, prepare, split_of
from data_prep.report import html_report, rows
from data_prep.samples import Sampler
from data_prep.shards import Shard
from data_prep.tally import Tally

pytestmark = pytest.mark.unit
ZH = "春天来了，花园里的花都开了，蜜蜂在花丛中飞来飞去。"
EN = "Spring has come and all the flowers in the garden are open."


def prepared(folder: Path, source: Path, folder_of_tokenizer: Path, **data: object) -> Manifest:
    """Prepare one source with a tokenizer that exists already: fast."""
    config = small_config(folder, [str(source)], **data)
    config.tokenizer = TokenizerConfig(path=str(folder_of_tokenizer), threads=1)
    return prepare(config)[0]


def test_folder_holds_what_the_manifest_says(folder: Path, dataset: Dataset) -> None:
    manifest = dataset.manifest
    assert {stream.key for stream in manifest.sources} == {"zh.zh", "en.en"}
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (folder / ".work").exists()
    assert (folder / "rejected" / "zh.jsonl.gz").exists()
    total = np.zeros(dataset.tokenizer.vocab_size, dtype=np.int64)
    for stream in manifest.sources:
        assert sum(counts.documents for counts in stream.counts.values()) == 60
        for info in stream.shards:
            shard = Shard(folder / info.path)
            tokens = shard.read(0, shard.tokens)
            assert (np.flatnonzero(tokens == dataset.tokenizer.eod) + 1 == np.cumsum(shard.sizes())).all()
            if info.split == "train":
                total += np.bincount(tokens, minlength=len(total))
    assert (total == dataset.unigram_counts).all()
    assert manifest.counts("train").tokens == total.sum()
    assert html_report(manifest, Tally()).count("<tr>") > len(rows(manifest))
    assert 1 < dataset.bytes_per_token()["en"] < 5


def test_documents_come_back_from_the_shards(folder: Path, dataset: Dataset, source_files: list[Path]) -> None:
    texts = {json.loads(line)["text"].strip() for file in source_files for line in file.read_text("utf-8").splitlines()}
    for stream in dataset.manifest.sources:
        for info in stream.shards:
            shard = Shard(folder / info.path)
            for number in range(shard.documents):
                assert dataset.tokenizer.decode(shard.document(number)[:-1]) in texts


def test_pages_are_never_split_across_languages(tmp_path: Path, folder: Path) -> None:
    """A page and its translation land in the same split, in every source."""
    for lang, text in (("zh", ZH), ("en", EN)):
        lines = [document(f"{text} {n}", id=f"page-{n}#0:{lang}", lang=lang) for n in range(200)]
        (tmp_path / f"{lang}.jsonl").write_text("".join(lines), encoding="utf-8")
    shares = [50.0, 30.0, 20.0]
    prepared(tmp_path / "out", tmp_path / "*.jsonl", folder, split_shares=shares)
    dataset = Dataset.open(tmp_path / "out", verify=True)
    pages: dict[str, dict[str, set[str]]] = {"zh": {}, "en": {}}
    for stream in dataset.manifest.sources:
        for info in stream.shards:
            shard = Shard(tmp_path / "out" / info.path)
            texts = [dataset.tokenizer.decode(shard.document(number)[:-1]) for number in range(shard.documents)]
            pages[stream.lang][info.split] = {text.rsplit(" ", 1)[1] for text in texts}
    assert pages["zh"] == pages["en"]
    assert sum(map(len, pages["zh"].values())) == 200
    for split, share in zip(("train", "valid", "test"), shares, strict=True):
        assert abs(len(pages["zh"][split]) / 2 - share) < 12
    assert page_of("a/b#3:zh") == "a/b"
    assert split_of("a/b", 1, [0, 1, 0]) == "valid"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "parquet"])
def test_every_format_gives_the_same_document(tmp_path: Path, folder: Path, ending: str) -> None:
    source = tmp_path / f"我的 (1).{ending}"
    text = ZH * 5 + "\n" + EN
    line = (document(text, id="a") + document(ZH * 9, id="b")).encode()
    if ending == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": [text, ZH * 9], "id": ["a", "b"]}), source)
    else:
        packed = {
            "jsonl": lambda: line,
            "jsonl.gz": lambda: gzip.compress(line[:50]) + gzip.compress(line[50:]),
            "jsonl.zst": lambda: b"".join(zstandard.ZstdCompressor().compress(part) for part in (line[:50], line[50:])),
            "txt": lambda: text.encode(),
        }
        source.write_bytes(packed[ending]())
    manifest = prepared(tmp_path / "out", source, folder, split_shares=[1, 0, 0])
    (stream,) = manifest.sources
    assert stream.key == "我的_1.zh"
    dataset = Dataset.open(tmp_path / "out", verify=True)
    shard = Shard(tmp_path / "out" / stream.shards[0].path)
    assert shard.documents == (1 if ending == "txt" else 2)
    assert dataset.tokenizer.decode(shard.document(0)) == text + "[eod]"


def test_refused_documents_are_kept_aside_with_their_line(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "mixed.jsonl"
    lines = [
        document(ZH, id="good").encode(),
        b'{"text": "\xff\xfe"}\n',
        b"{broken\n",
        b"[1]\n",
        b'{"body": "no text"}\n',
        document("短").encode(),
        document("  \x00\u200b ").encode(),
        document(ZH.replace("，", "， ")).encode(),
        b'{"text": "half \\ud800 surrogate, still a good document by its length and by the rest of what it says. '
        b'One in a hundred characters may be broken."}\n',
        document("�" * 40).encode(),
        document("x" * 3000).encode(),
        b"\n",
        document("y" * 2500).encode(),
    ]
    source.write_bytes(b"".join(lines))
    manifest = prepared(tmp_path / "out", source, folder, max_line_bytes=3000, max_characters=2000)
    assert manifest.rejected["mixed"] == {
        "bad_json": 2,
        "broken_utf8": 1,
        "duplicate": 1,
        "empty": 2,
        "line_too_long": 1,
        "missing_text": 1,
        "too_long": 1,
        "too_short": 1,
    }
    with gzip.open(tmp_path / "out" / "rejected" / "mixed.jsonl.gz", "rt", encoding="utf-8") as packed:
        kept = [json.loads(line) for line in packed]
    # What later stages find stands behind what reading found.
    assert [record["line"] for record in kept] == [2, 3, 4, 5, 6, 7, 10, 11, 13, 8]
    assert kept[-1]["detail"] == f"of {source}:1"
    assert json.loads(kept[3]["text"]) == {"body": "no text"}
    assert all(record["file"] == str(source) for record in kept)
    assert {stream.lang: stream.counts["train"].documents for stream in manifest.sources} == {"zh": 1, "en": 1}


def bad_sources(folder: Path) -> dict[str, Path]:
    """One file for each thing that stops a preparation."""
    many = "".join(document(f"{ZH} {n}") for n in range(3000)).encode()
    contents = {
        "empty.jsonl": b"",
        "binary.jsonl": b"\x7fELF\x02\x01\x01\x00\x00" * 50,
        "null.txt": b"abc\x00def\n",
        "cut.jsonl.gz": gzip.compress(many)[:-400],
        "cut.jsonl.zst": zstandard.ZstdCompressor().compress(many)[:-10],
        "damaged.jsonl.gz": b"this is no gzip",
        "nofield.jsonl": b'{"body": "x"}\n{"body": "y"}\n',
        "unknown.docx": b"x",
        "bad.parquet": b"PAR1 not really",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents} | {"missing.jsonl": folder / "missing.jsonl"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.jsonl", "the file is empty"),
        ("binary.jsonl", "line 1: this is a binary file"),
        ("null.txt", "line 1: this is a binary file"),
        ("cut.jsonl.gz", r"after line \d+: the compressed file is cut off"),
        ("cut.jsonl.zst", r"after line \d+: the compressed file is cut off"),
        ("damaged.jsonl.gz", "after line 0: the compressed file"),
        ("nofield.jsonl", r"line 1: no string in field 'text'; fields are body"),
        ("unknown.docx", "unknown kind of file"),
        ("bad.parquet", "not a readable parquet file"),
        ("missing.jsonl", "no such file"),
    ],
)
def test_a_bad_source_is_named_and_leaves_no_manifest(tmp_path: Path, folder: Path, name: str, message: str) -> None:
    source = bad_sources(tmp_path)[name]
    with pytest.raises(DataError, match=message) as caught:
        prepared(tmp_path / "out", source, folder)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    # The same folder serves the corrected command.
    (tmp_path / "good.jsonl").write_text(document(ZH * 3), encoding="utf-8")
    prepared(tmp_path / "out", tmp_path / "good.jsonl", folder)
    Dataset.open(tmp_path / "out", verify=True)


def test_wrong_entries_are_named(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text(document(ZH), encoding="utf-8")
    for sources, message in [
        ([], "data.sources is empty"),
        ([{"path": str(good), "weigth": 1}], "unknown key weigth"),
        ([{"path": str(good), "weight": -1}], "weight=-1"),
        ([{"name": "x"}], "either path or hub"),
        ([{"path": str(good), "weight": 1}, str(good)], "has no weight"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare(small_config(tmp_path / "out", sources))
    with pytest.raises(DataError, match="too few to train a tokenizer"):
        prepare(small_config(tmp_path / "out", [str(good)]))


def test_same_settings_reuse_the_folder_and_others_are_refused(
    folder: Path, source_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(folder, [str(file) for file in source_files], split_shares=[80, 15, 5])
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert main(config) == 0
    assert "kept as it is" in capsys.readouterr().out
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    config.tokenizer.vocab_size = 1200
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size=1000, now 1200; .*data\.overwrite=true"):
        prepare(config)
    config = small_config(folder, [str(source_files[0])], split_shares=[80, 15, 5])
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]"):
        prepare(config)


def test_overwriting_and_foreign_files(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(document(ZH * 4), encoding="utf-8")
    prepared(tmp_path / "out", source, folder)
    source.write_text(document(EN * 4), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]"):
        prepared(tmp_path / "out", source, folder)
    manifest = prepared(tmp_path / "out", source, folder, overwrite=True)
    assert [stream.key for stream in manifest.sources] == ["a.en"]
    assert not list((tmp_path / "out").glob("*/a.zh*"))
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt"):
        prepared(tmp_path / "out", source, folder, overwrite=True)
    Dataset.open(tmp_path / "out", verify=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt"):
        prepared(home, source, folder)
    assert (home / "thesis.txt").exists()


@pytest.mark.parametrize("marker", ["recipe.json", "submitted.json"])
def test_scratch_that_outlived_its_preparation_is_not_gone_on_from(tmp_path: Path, folder: Path, marker: str) -> None:
    """Killed between the manifest and the end, or made by Slurm's jobs, which leave it."""
    source = tmp_path / "a.jsonl"
    source.write_text(document(ZH * 4), encoding="utf-8")
    with mock.patch("data_prep.prepare._remove_work"):
        before = prepared(tmp_path / "out", source, folder)
    (tmp_path / "out" / ".work" / marker).touch()
    assert prepared(tmp_path / "out", source, folder, overwrite=True) == before
    Dataset.open(tmp_path / "out", verify=True)
    (tmp_path / "out" / ".work").mkdir()
    prepared(tmp_path / "out", source, folder)
    assert not list((tmp_path / "out").glob(".work*"))


def test_what_a_dataset_was_made_from_is_told_by_content(tmp_path: Path, folder: Path) -> None:
    source, evaluation = tmp_path / "a.jsonl", tmp_path / "eval.txt"
    source.write_text(document(ZH * 4), encoding="utf-8")
    evaluation.write_text("one")
    config = small_config(tmp_path / "out", [str(source)])
    config.data.cleaning.decontaminate = [str(evaluation)]
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    prepare(config)
    evaluation.write_text("two")
    with pytest.raises(ConfigError, match=r"made with data\.cleaning\.decontaminate\[0\]="):
        prepare(config)
    with (
        mock.patch("data_prep.prepare.fingerprint", side_effect=PermissionError(13, "Permission denied")),
        pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(Permission denied\)"),
    ):
        prepare(config)


def test_two_preparations_cannot_write_one_folder(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(document(ZH * 4), encoding="utf-8")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="being written by another process"):
            prepared(tmp_path / "out", source, folder)
    prepared(tmp_path / "out", source, folder)


@pytest.mark.parametrize("fails_at", range(6))
def test_a_full_disk_leaves_no_manifest(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """The n-th flush fails as on a full disk: a DataError, no manifest, and the rerun succeeds."""
    source = tmp_path / "a.jsonl"
    source.write_text(document(ZH * 4), encoding="utf-8")
    calls = 0
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2 * fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"out.*: the disk is full"):
        prepared(tmp_path / "out", source, folder)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(DataError, match="unfinished"):
        Dataset.open(tmp_path / "out")
    prepared(tmp_path / "out", source, folder)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_languages_are_detected_where_not_given(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    texts = [ZH * 2, EN * 2, "これはひらがなで書かれた日本語の文章です。" * 2, "1234567890 " * 5]
    given = document(EN * 3, lang="zh-CN")
    source.write_text("".join(document(text) for text in texts) + given, encoding="utf-8")
    manifest = prepared(tmp_path / "out", source, folder, split_shares=[1, 0, 0])
    assert {stream.lang: stream.counts["train"].documents for stream in manifest.sources} == {
        "zh": 2,
        "en": 1,
        "other": 2,
    }


def test_large_streams_are_cut_into_shards_that_rows_respect(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(document(f"{ZH} {n}") for n in range(300)), encoding="utf-8")
    manifest = prepared(tmp_path / "out", source, folder, max_shard_tokens=2000, split_shares=[1, 0, 0])
    names = [shard.path for shard in manifest.sources[0].shards]
    assert names == [f"train/a.zh-{n:05d}" for n in range(len(names))]
    assert len(names) > 3
    (stream,) = Dataset.open(tmp_path / "out").streams("train", 65)
    tokens = [Shard(tmp_path / "out" / name) for name in names]
    expected = [shard.read(row * 64, 64) for shard in tokens for row in range(shard.tokens // 64)]
    assert stream.rows == len(expected)
    assert all(np.array_equal(stream.read_row(row), expected[row]) for row in range(stream.rows))
    assert stream.unused_tokens == sum(shard.tokens % 64 for shard in tokens)


def test_preparation_is_reproducible(tmp_path: Path, folder: Path, source_files: list[Path]) -> None:
    config = small_config(tmp_path / "again", [str(file) for file in source_files], split_shares=[80, 15, 5])
    prepare(config)
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_held_out_text_can_be_prepared_with_a_runs_tokenizer(tmp_path: Path, folder: Path, dataset: Dataset) -> None:
    """What `train.evaluate data.sources=…` needs: everything in valid, the given tokenizer, no training text."""
    source = tmp_path / "held_out.jsonl"
    source.write_text(document(ZH * 40), encoding="utf-8")
    prepared(tmp_path / "out", source, folder, split_shares=[0, 1, 0])
    opened = Dataset.open(tmp_path / "out")
    assert opened.tokenizer.sha256 == dataset.tokenizer.sha256
    assert opened.manifest.counts("valid").documents == 1
    config = PrepConfig(data=small_config(tmp_path / "other", [str(source)], split_shares=[0, 1, 0]).data)
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        prepare(config)


def test_hub_names_stream_through_datasets(tmp_path: Path, folder: Path) -> None:
    """`datasets.load_dataset` opens a local folder by the code path that a hub name takes."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text(document(ZH, id="a") + document(EN, id="b"), encoding="utf-8")
    config = small_config(tmp_path / "out", [{"hub": str(tmp_path / "hub"), "name": "web"}], split_shares=[1, 0, 0])
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    manifest, _ = prepare(config)
    assert {stream.key for stream in manifest.sources} == {"web.en", "web.zh"}
    config = small_config(tmp_path / "other", [f"hub:{tmp_path / 'nothing'}"])
    config.tokenizer = TokenizerConfig(path=str(folder))
    with pytest.raises(DataError, match=r"hub:.*nothing: cannot be opened"):
        prepare(config)


def test_weights_and_licences_reach_the_manifest(tmp_path: Path, folder: Path) -> None:
    lines = [document(f"{ZH} {n}", licence="MIT" if n % 2 else "CC0-1.0") for n in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_text(EN * 30, encoding="utf-8")
    sources: list[object] = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 3},
        {"path": str(tmp_path / "b.txt"), "weight": 1, "licence": "public domain", "name": "book"},
    ]
    config = small_config(tmp_path / "out", sources, split_shares=[1, 0, 0])
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    manifest, _ = prepare(config)
    assert {stream.key: (stream.weight, stream.licence) for stream in manifest.sources} == {
        "a.zh": (3.0, {"CC0-1.0": 5, "MIT": 5}),
        "book.en": (1.0, {"public domain": 1}),
    }
    sampler = Sampler(Dataset.open(tmp_path / "out"), SamplingConfig(), 32, seed=1)
    streams = [sampler.address(index).stream.key for index in range(40)]
    assert streams.count("a.zh") == 30


def test_the_command_and_its_exit_status(tmp_path: Path, folder: Path) -> None:
    """Chinese names, spaces and parentheses on the command line; 0, 2 and 3 for done, wrong setting, bad source."""
    source = tmp_path / "语料 (第 1 版).jsonl"
    source.write_text(document(ZH * 4), encoding="utf-8")

    def command(*words: str) -> int:
        given = [f"data.path={tmp_path / '输出 (1)'}", f"tokenizer.path={folder}", *words]
        return run("data_prep", PrepConfig, main, program="data_prep", argv=given)

    assert command(f"data.sources=[{source}]") == 0
    assert command(f"data.sources=[{source}]") == 0
    assert command(f"data.sources=[{source}]", "data.min_characters=20") == 2
    assert command(f"data.sources=[{source}]", "data.min_charakters=20") == 2
    assert command(f"data.sources=[{tmp_path / 'none.jsonl'}]") == 3
    Dataset.open(tmp_path / "输出 (1)", verify=True)
