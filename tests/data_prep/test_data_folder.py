"""Opening a folder: every kind of damage is found and named; shards others wrote can be read; the tokenizer."""

import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clean import clean_text
from data_prep.cli import run
from data_prep.dataset import Dataset
from data_prep.errors import DataError
from data_prep.shards import Shard, ShardWriter, token_dtype
from data_prep.tokenizer import SPECIALS, Tokenizer
from data_prep.verify import VerifyConfig
from data_prep.verify import main as verify

pytestmark = pytest.mark.unit


@pytest.fixture
def copy(tmp_path: Path, folder: Path) -> Path:
    """A dataset folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_truncated_shard_is_named(copy: Path) -> None:
    path = copy / "train" / "zh.zh-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"zh\.zh-00000\.bin: \d+ bytes, but its index says \d+: truncated"):
        Dataset.open(copy)


def test_a_flipped_byte_is_found_by_verification(copy: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "valid" / "en.en-00000.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    Dataset.open(copy)
    with pytest.raises(DataError, match=r"en\.en-00000\.bin: checksum [0-9a-f]{32} is not [0-9a-f]{32}"):
        Dataset.open(copy, verify=True)
    (copy / "unigram.npy").write_bytes(b"")
    words = [f"data.path={copy}"]
    assert run("verify", VerifyConfig, verify, program="data_prep.verify", argv=words) == 3
    said = capsys.readouterr().err
    assert "valid/en.en-00000.bin: checksum" in said
    assert "unigram.npy: checksum" in said
    assert "2 of 13 files are damaged" in said
    assert run("verify", VerifyConfig, verify, program="data_prep.verify", argv=[f"data.path={folder}"]) == 0
    assert "13 files, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/zh.zh-00000.idx", b"MMIDIDX\x00\x00" + b"\x01" * 10, "not an index"),
        ("train/zh.zh-00000.idx", b"x" * 100, "not an index"),
        ("manifest.json", b"{", "damaged"),
        ("manifest.json", b'{"version": 99}', "version 99 is not 1"),
        ("tokenizer/tokenizer.model", b"x", "not a SentencePiece model"),
    ],
)
def test_damage_is_named(copy: Path, name: str, content: bytes, message: str) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Dataset.open(copy)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.model", "train/en.en-00000.idx"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(DataError, match=r"manifest\.json|tokenizer|en\.en-00000\.idx"):
        Dataset.open(copy)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(copy: Path, dataset: Dataset) -> None:
    model = copy / "tokenizer" / "tokenizer.model"
    # An unknown protobuf field at the end: another file, still a model.
    model.write_bytes(model.read_bytes() + b"\xf8\x7f\x01")
    with pytest.raises(DataError, match="tokenizer that made the shards"):
        Dataset.open(copy)


def test_shards_of_another_vocabulary_are_refused(copy: Path) -> None:
    shutil.copy(copy / "train" / "en.en-00000.bin", copy / "train" / "zh.zh-00000.bin")
    shutil.copy(copy / "train" / "en.en-00000.idx", copy / "train" / "zh.zh-00000.idx")
    with pytest.raises(DataError, match="but the manifest says"):
        Dataset.open(copy)


def test_index_has_the_layout_that_other_trainers_read(tmp_path: Path) -> None:
    """Written out by hand from the format's description."""
    writer = ShardWriter(tmp_path / "a", token_dtype(8008))
    for tokens in ([1, 2, 3], [4], [5, 6]):
        writer.add(tokens)
    writer.close()
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)
    shard = pickle.loads(pickle.dumps(Shard(tmp_path / "a")))
    assert [shard.document(number).tolist() for number in range(3)] == [[1, 2, 3], [4], [5, 6]]
    assert token_dtype(150_008) is np.int32


@given(st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=9), max_size=9))
@settings(max_examples=30)
def test_shards_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "x"
    writer = ShardWriter(prefix, token_dtype(60_001))
    for tokens in documents:
        writer.add(tokens)
    writer.close()
    shard = Shard(prefix)
    assert [shard.document(number).tolist() for number in range(shard.documents)] == documents


def test_special_tokens_follow_the_pieces(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    assert [tokenizer.special_ids[name] for name in SPECIALS] == list(range(tokenizer.pieces, tokenizer.pieces + 8))
    assert (tokenizer.mask, tokenizer.eop) == (tokenizer.pieces, tokenizer.pieces + 5)
    assert tokenizer.vocab_size == tokenizer.pieces + 8
    assert tokenizer.token_bytes[tokenizer.pieces :].sum() == 0
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.sha256 == tokenizer.sha256
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


@given(st.text(max_size=60).map(clean_text).filter(lambda text: "▁" not in text))
@settings(max_examples=80)
def test_text_comes_back_and_bytes_add_up(dataset: Dataset, text: str) -> None:
    ids = dataset.tokenizer.encode(text)
    assert dataset.tokenizer.decode(ids) == text
    assert dataset.tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_masks_in_text(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    for text in ("今天天气[MASK]，我们去公园。", "I like [MASK] and [sMASK]", "[gMASK]"):
        ids = tokenizer.encode_with_masks(text)
        assert tokenizer.decode(ids) == text.replace(" [", "[")
    # A blank's neighbours get the ids that they have inside a document.
    whole = tokenizer.encode("the house and the garden")
    blank = tokenizer.encode_with_masks("the house [MASK] the garden")
    assert blank[: blank.index(tokenizer.mask)] == tokenizer.encode("the house")
    assert blank[blank.index(tokenizer.mask) + 1 :] == whole[-len(blank) + blank.index(tokenizer.mask) + 1 :]


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.model or tokenizer\.json there"):
        Tokenizer.load(tmp_path)
