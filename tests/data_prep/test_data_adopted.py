"""Token files that other trainers wrote are used where they lie; the files here are written by hand, field by field."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from data_prep_helpers import document, small_config

from data_prep.config import PrepConfig, SamplingConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.prepare import prepare
from data_prep.samples import Sampler
from data_prep.steps.adopt import split_documents
from data_prep.tokenizer import Tokenizer

pytestmark = pytest.mark.unit
TYPES = {4: "i", 5: "q", 7: "d", 8: "H"}


def foreign(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], code: int = 4) -> Path:
    """A `.bin`/`.idx` pair as Megatron-LM's indexed_dataset.py lays it out: documents of one or more sequences."""
    sequences = [sequence for sequences in documents for sequence in sequences]
    letter = TYPES[code]
    marks, starts = [0], [0]
    for one in documents:
        marks.append(marks[-1] + len(one))
    for one in sequences:
        starts.append(starts[-1] + len(one) * struct.calcsize(letter))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(marks))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(sequences)}q", *starts[:-1])
    Path(f"{prefix}.idx").write_bytes(index + struct.pack(f"<{len(marks)}q", *marks))
    Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack(f"<{len(one)}{letter}", *one) for one in sequences))
    return Path(f"{prefix}.bin")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"第{number}回 宴桃园豪杰三结义，斩黄巾英雄首立功。number {number}\n" * 3 for number in range(40)]


@pytest.fixture(scope="module")
def documents(folder: Path, texts: list[str]) -> list[list[list[int]]]:
    """Each text cut into two sequences, as preprocess_data.py --split-sentences does, eod behind the last."""
    tokenizer = Tokenizer.load(folder)
    ids = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    return [[one[:5], one[5:]] for one in ids]


def config_of(place: Path, folder: Path, *sources: object) -> PrepConfig:
    config = small_config(place, list(sources), split_shares=[80, 15, 5])
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    return config


def test_foreign_files_are_used_where_they_lie(
    tmp_path: Path, folder: Path, texts: list[str], documents: list[list[list[int]]]
) -> None:
    first, second = (foreign(tmp_path / name, documents[a:b]) for name, a, b in (("a.v1", 0, 30), ("b", 30, 40)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    own = tmp_path / "own.jsonl"
    own.write_text("".join(document(f"own text {number}, rather short", lang="en") for number in range(30)))
    entry = {"path": str(tmp_path / "*.[bi][id][nx]"), "name": "old", "lang": "zh", "licence": "MIT", "weight": 2}
    manifest, _ = prepare(config_of(tmp_path / "data", folder, entry, {"path": str(own), "weight": 1}))
    assert {path: path.read_bytes() for path in before} == before
    assert not list((tmp_path / "data").rglob("old*.bin"))
    dataset = Dataset.open(tmp_path / "data", verify=True)
    stream = next(stream for stream in manifest.sources if stream.name == "old")
    assert (stream.key, stream.weight, stream.licence) == ("old.zh", 2, {"MIT": 40})
    # By order in each file: 80 %, 15 %, 5 %.
    wanted = {"train": [*range(24), *range(30, 38)], "valid": [*range(24, 28), 38, 39], "test": [28, 29]}
    tokenizer, counts = dataset.tokenizer, np.zeros(dataset.tokenizer.vocab_size, dtype=np.int64)
    for split, numbers in wanted.items():
        (opened,) = [one for one in dataset.streams(split, 33) if one.key == "old.zh"]
        found = np.concatenate([shard.read(0, shard.tokens) for shard in opened.shards]).tolist()
        assert found == [token for number in numbers for sequence in documents[number] for token in sequence]
        assert stream.counts[split].documents == len(numbers)
        assert stream.counts[split].bytes == sum(len(texts[number].encode()) for number in numbers)
        assert stream.counts[split].characters == sum(len(texts[number]) for number in numbers)
        if split == "train":
            counts = np.bincount(found, minlength=len(counts))
            assert opened.shards[1].document(2).tolist() == documents[31][0]
    other = next(one for one in dataset.streams("train", 33) if one.key != "old.zh")
    for shard in other.shards:
        counts += np.bincount(shard.read(0, shard.tokens), minlength=len(counts))
    assert dataset.unigram_counts.tolist() == counts.tolist()
    sampler = Sampler(dataset, SamplingConfig(mixture_period=3), 64, seed=1)
    keys = [sampler.address(index).stream.key for index in range(30)]
    assert keys.count("old.zh") == 20
    assert tokenizer.decode(sampler.sample(keys.index("old.zh")).targets.tolist())
    # The folder is reused, and what happens to the files later is noticed.
    assert prepare(config_of(tmp_path / "data", folder, entry, {"path": str(own), "weight": 1}))[1]
    content = bytearray(first.read_bytes())
    content[400] ^= 1
    first.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.v1\.bin: checksum"):
        Dataset.open(tmp_path / "data", verify=True)
    second.unlink()
    with pytest.raises(DataError, match=r"b\.bin: cannot be read"):
        Dataset.open(tmp_path / "data")


def test_files_named_from_where_the_user_stands(
    tmp_path: Path, folder: Path, documents: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path / "a", documents)
    monkeypatch.chdir(tmp_path)
    prepare(config_of(Path("data"), folder.absolute(), {"path": "a.bin", "lang": "zh"}))
    monkeypatch.chdir("/")
    Dataset.open(tmp_path / "data", verify=True)


@pytest.mark.parametrize("code", [5, 8])
def test_other_token_types_and_a_missing_eod(
    tmp_path: Path, folder: Path, documents: list[list[list[int]]], code: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = foreign(tmp_path / "a", [[one[0]] for one in documents], code)
    manifest, _ = prepare(config_of(tmp_path / "data", folder, {"path": str(path), "lang": "zh"}))
    assert manifest.counts("train").tokens == 5 * 32
    assert "40 of 40 documents do not end in [eod]" in caplog.text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def overlapping(path: Path) -> None:
    content = path.with_suffix(".idx").read_bytes()
    at = 34 + 4 * 80 + 8  # the second sequence's place in the .bin
    path.with_suffix(".idx").write_bytes(content[:at] + struct.pack("<q", 4) + content[at + 8 :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"a\.bin: \d+ bytes, but its index says \d+: truncated"),
        (lambda path: cut(path.with_suffix(".idx")), r"a\.idx: \d+ bytes instead of \d+: truncated"),
        (lambda path: path.with_suffix(".idx").unlink(), r"a\.idx: cannot be read"),
        (lambda path: foreign(path.with_suffix(""), [[[1, 2]]], 7), r"a\.idx: version 1 with token type 7"),
        (lambda path: foreign(path.with_suffix(""), [[[1, 2]], [[3, 1099]]]), r"id 1099 is outside .*tokenizer\.path"),
        (lambda path: foreign(path.with_suffix(""), [[[1, 2]], [[3, -2]]]), r"token id -2 is outside"),
        (overlapping, r"do not lie end to end"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(
    tmp_path: Path, folder: Path, documents: list[list[list[int]]], damage: object, message: str
) -> None:
    path = foreign(tmp_path / "a", documents)
    damage(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        prepare(config_of(tmp_path / "data", folder, {"path": str(path), "lang": "zh"}))
    assert not (tmp_path / "data" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "say their language"),
        ({"lang": "zh", "cap": 3}, "cap needs text"),
        ({"lang": "zh", "template": "plain"}, "template needs text"),
    ],
)
def test_a_wrong_entry_is_refused(
    tmp_path: Path, folder: Path, documents: list[list[list[int]]], entry: dict[str, object], message: str
) -> None:
    path = foreign(tmp_path / "a", documents[:3])
    with pytest.raises(ConfigError, match=message):
        prepare(config_of(tmp_path / "data", folder, {"path": str(path), **entry}))


def test_tokens_need_their_tokenizer(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    path = foreign(tmp_path / "a", documents[:3])
    with pytest.raises(ConfigError, match=r"a\.bin holds tokens; give the tokenizer .* as tokenizer\.path"):
        prepare(small_config(tmp_path / "data", [{"path": str(path), "lang": "zh"}]))


def test_documents_are_split_by_their_order() -> None:
    assert split_documents(1000, [949, 50, 1]) == {"train": (0, 949), "valid": (949, 999), "test": (999, 1000)}
    assert split_documents(3, [949, 50, 1]) == {"train": (0, 2), "valid": (2, 3), "test": (3, 3)}
    assert split_documents(4, [0, 1, 0]) == {"train": (0, 0), "valid": (0, 4), "test": (4, 4)}
    assert split_documents(1, [940, 50, 10])["train"] == (0, 1)
