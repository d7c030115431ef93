"""Packed documents: each is in one sequence of an epoch, whole and alone; the sequences are as full as is said."""

import pickle
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from data_prep_helpers import document, small_config
from sample_checks import take_apart

from data_prep.cli import run
from data_prep.config import PrepConfig, SamplingConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.pack import PackConfig, main
from data_prep.packing import PackedStream, PackPlan, cut, pack
from data_prep.prepare import prepare
from data_prep.samples import Sampler

pytestmark = pytest.mark.unit
SLOTS = 128


def config_of(place: Path, folder: Path, sources: list[object]) -> PrepConfig:
    config = small_config(place, sources, split_shares=[90, 10, 0])
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    return config


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Dataset:
    """Documents from a few tokens to several sequences, two languages in several shards, packed for 128 slots."""
    place = tmp_path_factory.mktemp("short")
    sizes = np.random.default_rng(2).lognormal(1.5, 1.1, 300).astype(int) + 1
    lines = {
        "zh": [document(f"第{n}件事。" + f"孔明曰{n}，主公勿忧。" * k, lang="zh") for n, k in enumerate(sizes)],
        "en": [document(f"This is number {n}. " + f"He went {n} times. " * k, lang="en") for n, k in enumerate(sizes)],
    }
    for lang, texts in lines.items():
        (place / f"{lang}.jsonl").write_text("".join(texts), encoding="utf-8")
    config = config_of(place / "data", folder, [str(place / "zh.jsonl"), str(place / "en.jsonl")])
    config.data.max_shard_tokens = 4096
    prepare(config)
    assert (
        run("pack", PackConfig, main, program="p", argv=[f"data.path={place / 'data'}", f"sequence_length={SLOTS}"])
        == 0
    )
    return Dataset.open(place / "data")


def sampler_of(dataset: Dataset, split: str = "train", **settings: object) -> Sampler:
    wanted = {"isolate_documents": True, "pack_documents": True, **settings}
    return Sampler(dataset, SamplingConfig(**wanted), SLOTS, seed=3, split=split)  # type: ignore[arg-type]


def documents_of(dataset: Dataset, split: str) -> list[list[int]]:
    """Documents by their eods, read without the code under test."""
    found: list[list[int]] = []
    for info in dataset.manifest.sources:
        for shard in info.shards:
            if shard.split == split:
                dtype = np.uint16 if dataset.tokenizer.vocab_size < 65_500 else np.int32
                tokens = np.fromfile(dataset.folder / f"{shard.path}.bin", dtype)
                ends = np.flatnonzero(tokens == dataset.tokenizer.eod) + 1
                found += [part.tolist() for part in np.split(tokens, ends)[:-1]]
    return found


def test_an_epoch_holds_every_document_whole_once_and_is_as_full_as_it_says(short: Dataset) -> None:
    sampler = sampler_of(short, "valid", gmask_share=1.0, mask_share=0.0)
    seen: list[list[int]] = []
    filled = 0
    for index in range(sampler.rows):
        sample = sampler.sample(index)
        segments = take_apart(sample, short.tokenizer)
        seen += [segment.text.tolist() for segment in segments]
        filled += sum(segment.slots for segment in segments)
    wanted: list[list[int]] = []
    for one in documents_of(short, "valid"):
        wanted += [one[start : start + SLOTS - 1] for start in range(0, len(one), SLOTS - 1)]
    assert Counter(map(tuple, seen)) == Counter(map(tuple, wanted))
    packs = sampler.summary()["packs"]
    slots = sampler.rows * SLOTS
    assert sum(one["fill"] * one["packs"] * SLOTS for one in packs.values()) == pytest.approx(filled)
    assert filled / slots > 0.9
    assert sum(one["documents"] for one in packs.values()) == len(documents_of(short, "valid"))


def test_packed_rows_are_drawn_like_others(short: Dataset) -> None:
    """Without replacement, by exact shares, from the index alone; every kind keeps to single documents."""
    sampler = sampler_of(short, sentence_share=0.5, positions="2d", mixture_period=20)
    assert len(sampler.streams) == 2
    assert all(isinstance(stream, PackedStream) and len(stream.shards) > 1 for stream in sampler.streams)
    least = min(stream.rows for stream in sampler.streams)
    draws = Counter((a.stream.key, a.epoch, a.row) for a in map(sampler.address, range(least)))
    assert max(draws.values()) == 1
    known = "".join("".join(map(chr, one)) for one in documents_of(short, "train"))
    again = pickle.loads(pickle.dumps(sampler_of(short, sentence_share=0.5, positions="2d", mixture_period=20)))
    for index in reversed(range(200)):
        sample = sampler.sample(index)
        assert (sample.tokens == again.sample(index).tokens).all()
        for segment in take_apart(sample, short.tokenizer, two_dimensional=True):
            # Whole, a part of a longer one, or the part that spans left room for.
            text = segment.text.tolist()
            assert "".join(map(chr, text)) in known
            assert short.tokenizer.eod not in text[:-1]


def test_blanks_leave_out_another_document_each_time(short: Dataset) -> None:
    """Under [MASK] a full pack has no room for all: what is cut changes from epoch to epoch."""
    sampler = sampler_of(short, gmask_share=0.0, mask_share=1.0)
    stream = max(sampler.streams, key=lambda one: one.rows)
    row = max(range(stream.rows), key=lambda n: len(stream.read_pieces(n)))  # type: ignore[union-attr]
    addresses = ((index, sampler.address(index)) for index in range(20 * sampler.rows))
    epochs = [index for index, one in addresses if one.stream is stream and one.row == row]
    assert len(epochs) > 5
    firsts = {tuple(take_apart(sampler.sample(index), short.tokenizer)[0].text[:6].tolist()) for index in epochs}
    assert len(firsts) > 1


def test_a_plan_is_the_same_whenever_it_is_made_and_foreign_documents_keep_together(
    short: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(short.folder, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in (short.folder / "packs").rglob("*.*")}
    shutil.rmtree(tmp_path / "copy" / "packs")
    PackPlan.write(Dataset.open(tmp_path / "copy"), SLOTS)
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy" / "packs").rglob("*.*")} == before
    shard = next(iter(short.text_shards("train")[0][1]))
    whole = shard.document_starts()
    part = shard.part(3, 5)
    assert (part.document_starts() == whole[3:9] - whole[3]).all()
    pieces = cut(np.array([0, 5, 5, 30]), 10)
    assert pieces.tolist() == [(0, 5), (5, 10), (15, 10), (25, 5)]


def test_best_fit_is_a_partition_and_fills_well() -> None:
    sizes = np.random.default_rng(1).integers(3, 300, 5000)
    order, edges = pack(sizes, 512)
    assert sorted(order.tolist()) == list(range(5000))
    used = np.add.reduceat(sizes[order], edges[:-1])
    assert used.max() <= 512
    assert used.sum() / (512 * len(used)) > 0.98
    assert [values.tolist() for values in pack(sizes[:0], 512)] == [[], [0]]


def test_what_does_not_fit_is_refused_in_one_line(short: Dataset, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="isolate_documents=true too"):
        SamplingConfig(pack_documents=True)
    with pytest.raises(DataError, match=r"packs/64/plan.json: missing.* -m data_prep.pack .* sequence_length=64$"):
        Sampler(short, SamplingConfig(isolate_documents=True, pack_documents=True), 64, seed=1)
    with pytest.raises(DataError, match=r"packs/128-enc/plan.json: missing.*starts_with_enc=true$"):
        sampler_of(short, starts_with_enc=True)
    shutil.copytree(short.folder, tmp_path / "copy")
    dataset = Dataset.open(tmp_path / "copy")
    PackPlan.write(dataset, SLOTS, opening=1)
    sample = sampler_of(dataset, starts_with_enc=True).sample(0)
    assert sample.tokens[0] == dataset.tokenizer.special_ids["ENC"]
    cut_off = next((tmp_path / "copy" / "packs" / "128" / "train").glob("*.pieces.npy"))
    cut_off.write_bytes(cut_off.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"packs/128/train/.*: cannot be read"):
        sampler_of(dataset)
    manifest = tmp_path / "copy" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(DataError, match="made for other data than the folder holds now"):
        sampler_of(Dataset.open(tmp_path / "copy"))
    (tmp_path / "qa.jsonl").write_text(document("Is it so?", target="Yes."), encoding="utf-8")
    config = config_of(tmp_path / "tasks", folder, [{"path": str(tmp_path / "qa.jsonl"), "template": "plain"}])
    config.data.min_characters = 1
    prepare(config)
    with pytest.raises(DataError, match=r"holds no text to pack; leave data.sampling.pack_documents out"):
        PackPlan.write(Dataset.open(tmp_path / "tasks"), SLOTS)


def test_the_command_says_how_full_and_so_does_the_page(
    short: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(short.folder, tmp_path / "copy")
    words = [f"data.path={tmp_path / 'copy'}"]
    assert run("pack", PackConfig, main, program="data_prep.pack", argv=[*words, "sequence_length=512"]) == 0
    shown = capsys.readouterr().out
    plans = PackPlan.every(Dataset.open(tmp_path / "copy"))
    assert [plan.slots for plan in plans] == [128, 512]
    page = (tmp_path / "copy" / "report.html").read_text(encoding="utf-8")
    assert page.count("Packed documents") == 1
    for row in plans[1].rows():
        assert row[-1] in shown
    for cell in chain(*plans[0].rows(), *plans[1].rows()):
        assert f">{cell}</td>" in page
    assert run("pack", PackConfig, main, program="data_prep.pack", argv=words) == 2
    assert "sequence_length" in capsys.readouterr().err
