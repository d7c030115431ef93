"""Tokenizers that users bring: `tokenizer.json` and icetk's text model, held against the libraries they come from."""

import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from data_prep_helpers import document, small_config
from sentencepiece import sentencepiece_model_pb2
from tokenizer_files import SPECIAL, byte_level, ice_text_model, metaspace

from data_prep.cli import run
from data_prep.config import TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.prepare import prepare
from data_prep.tokenizer import SPECIALS, Tokenizer
from data_prep.tokenizer_report import TokenizerReportConfig, main, measure, unused

pytestmark = pytest.mark.unit
TEXTS = [
    "孔明曰：“主公勿忧。”\n\n今天\t天气很好，3.14 小时。",
    "It was a bright cold day in April,\nand the  clocks were striking thirteen. don't!",
    "emoji 🙂 and 繁體字    four spaces",
]


@pytest.fixture(scope="module")
def texts(source_files: list[Path]) -> list[str]:
    return [json.loads(line)["text"] for file in source_files for line in file.read_text("utf-8").splitlines()[:20]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": byte_level(folder / "byte_level.json", texts),
        "metaspace": metaspace(folder / "metaspace.json", texts),
        "ice": ice_text_model(folder / "ice_text.model", texts),
    }


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_a_tokenizer_json_gives_the_ids_of_its_library(files: dict[str, Path], texts: list[str], name: str) -> None:
    ours, theirs = Tokenizer.load(files[name]), tokenizers.Tokenizer.from_file(str(files[name]))
    theirs.no_truncation()
    for text in [*TEXTS, *texts[:6]]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
        # The space that this one puts in front of a text is in its first piece.
        assert ours.token_bytes[ids].sum() == len(text.encode()) + (name == "metaspace")
    batch = ours.encode_batch(TEXTS, threads=2)
    assert [ids.tolist() for ids in batch] == [ours.encode(text) for text in TEXTS]
    again = pickle.loads(pickle.dumps(ours))
    assert (again.sha256, again.special_ids) == (ours.sha256, ours.special_ids)


def test_special_tokens_of_a_tokenizer_json_are_taken_and_the_others_added(files: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(files["byte_level"])
    end = tokenizers.Tokenizer.from_file(str(files["byte_level"])).get_vocab_size()
    taken = {"eod": 0, "MASK": 1, "gMASK": 2, "sop": 3}
    added = {name: end + place for place, name in enumerate(("sMASK", "eop", "ENC", "dBLOCK"))}
    assert tokenizer.special_ids == {name: {**taken, **added}[name] for name in SPECIALS}
    assert (tokenizer.pieces, tokenizer.vocab_size) == (end, end + 4)
    assert tokenizer.no_text.nonzero()[0].tolist() == [*range(len(SPECIAL)), *range(end, end + 4)]
    assert tokenizer.no_text_ranges == [slice(0, 5), slice(end, None)]
    assert tokenizer.decode([1, *tokenizer.encode("中"), 0]) == "[MASK]中[eod]"
    given = Tokenizer.load(files["byte_level"], specials={"eop": "<|user|>"})
    assert (given.eop, given.vocab_size) == (4, end + 3)
    assert given.sha256 != tokenizer.sha256


def test_a_text_cannot_write_a_special_token(files: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(files["byte_level"])
    text = "a [MASK] b <|endoftext|> c <|user|>"
    ids = tokenizer.encode(text)
    assert not tokenizer.no_text[ids].any()
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_with_masks("a [MASK] b")[1:2] == [tokenizer.mask]


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "ice"])
def test_a_fragment_behind_a_mask_is_cut_as_inside_a_document(files: dict[str, Path], name: str) -> None:
    tokenizer = Tokenizer.load(files[name])
    for before, after in (("the house", " and the garden"), ("今天", "天气很好"), ("the house", "\n\tthe")):
        whole, blank = tokenizer.encode(before + after), tokenizer.encode_with_masks(f"{before}[MASK]{after}")
        at = blank.index(tokenizer.mask)
        assert blank[:at] == tokenizer.encode(before)
        assert tokenizer.decode(blank) == f"{before}[MASK]{after}"
        if before == "the house":
            assert whole == blank[:at] + blank[at + 1 :]


def test_sentence_ends_of_a_byte_level_vocabulary_are_found(files: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(files["byte_level"])
    always, spaced, white = tokenizer.sentence_marks
    assert spaced[tokenizer.encode(".")[-1]]
    assert white[tokenizer.encode(" the")[0]]
    assert always[tokenizer.encode("\n")[0]]
    assert always[tokenizer.encode("好。")[-1]]


def upstream_ice(model: bytes, text: str) -> list[int]:
    """As the published inference code does it: white space from the longest run to the shortest, then SentencePiece."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return [20000 + token for token in sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)]


def test_the_ice_text_model_gives_icetks_ids(files: dict[str, Path], texts: list[str]) -> None:
    model = files["ice"].read_bytes()
    tokenizer = Tokenizer.load(files["ice"], image_tokens=20000)
    assert tokenizer.kind == "ice"
    for text in [*TEXTS, " " * 173 + "x\n\n", *texts[:6]]:
        ids = tokenizer.encode(text)
        assert ids == upstream_ice(model, text)
        assert tokenizer.encode_batch([text])[0].tolist() == ids
    for text in TEXTS:
        # Its normaliser writes full-width punctuation in half width; white space comes back as it was.
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFKC", text)
    blank = tokenizer.encode("a" + " " * 7 + "\tb\n")
    assert tokenizer.decode(blank) == "a       \tb\n"
    assert tokenizer.token_bytes[blank].sum() == len(" a       \tb\n")
    first = 20000 + sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    assert list(tokenizer.special_ids.values()) == list(range(first, first + 8))
    assert tokenizer.vocab_size == first + 8
    assert tokenizer.no_text[:20000].all()
    assert not tokenizer.surfaces[19999]
    # Without the image tokens the pieces come first, as in a converted checkpoint.
    assert (np.array(Tokenizer.load(files["ice"]).encode(TEXTS[0])) + 20000).tolist() == tokenizer.encode(TEXTS[0])


def test_icetks_own_file_is_completed_as_glm_130b_does_it(tmp_path: Path, texts: list[str]) -> None:
    """Without tab, spaces and bytes: ids, specials and text are those of the published code, which adds them."""
    path = ice_text_model(tmp_path / "ice_text.model", texts, complete=False)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    first = 20000 + len(proto.pieces)
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    for name in names:
        proto.pieces.add(piece=name, score=0.0, type=4)
    for name in ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]:
        proto.pieces.add(piece=name, score=0.0, type=4)
    proto.trainer_spec.byte_fallback = True
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)
    upstream = proto.SerializeToString()
    # ChatGLM-6B's file holds all of this.
    (tmp_path / "chatglm.model").write_bytes(upstream)
    for name in ("ice_text.model", "chatglm.model"):
        tokenizer = Tokenizer.load(tmp_path / name, image_tokens=20000)
        assert tokenizer.kind == "ice"
        assert tokenizer.vocab_size == 20000 + len(proto.pieces)
        assert list(tokenizer.special_ids.values()) == list(range(first, first + 8))
        for text in [*TEXTS, " " * 173 + "x\n\n\t", "𠮷🙂", *texts[:3]]:
            assert tokenizer.encode(text) == upstream_ice(upstream, text)
        spelt = tokenizer.encode("[MASK] <sop>")
        assert not tokenizer.no_text[spelt].any()
        assert tokenizer.decode(tokenizer.encode("a\t\tb\n[gMASK]  c")) == "a\t\tb\n[gMASK]  c"
        assert tokenizer.no_text[first : first + 8].all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.json", b"[1, 2]", "not a tokenizer.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer.json"),
        ("ice_text.model", b"x", "not a SentencePiece model"),
        ("tiankong.json", b"{", "tiankong.json: damaged"),
        ("tiankong.json", b"[1]", "tiankong.json: damaged"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    tmp_path: Path, files: dict[str, Path], name: str, content: bytes, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files["byte_level"].read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path / ("tokenizer.json" if name == "tiankong.json" else name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("specials", "message"),
    [
        ({"end": "</s>"}, "unknown token end"),
        ({"eod": "the"}, "no special token 'the'"),
        ({"eop": "[MASK]"}, "two special tokens are the same"),
    ],
)
def test_wrong_special_tokens_are_refused(files: dict[str, Path], specials: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tokenizer.load(files["byte_level"], specials=specials)


def test_settings_without_a_file_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        TokenizerConfig(image_tokens=20000)


@pytest.mark.parametrize("name", ["byte_level", "ice"])
def test_shards_are_written_with_it_and_stay_with_it(tmp_path: Path, files: dict[str, Path], name: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(
        "".join(document(f"第{n}篇。 {TEXTS[n % 3]} number {n}\n", lang="zh") for n in range(40)), "utf-8"
    )
    config = small_config(tmp_path / "data", [str(source)])
    settings = {"image_tokens": 20000} if name == "ice" else {"specials": {"eop": "<|user|>"}}
    config.tokenizer = TokenizerConfig(path=str(files[name]), threads=1, **settings)  # type: ignore[arg-type]
    prepare(config)
    dataset = Dataset.open(tmp_path / "data", verify=True)
    tokenizer = Tokenizer.load(files[name], **settings)  # type: ignore[arg-type]
    assert dataset.tokenizer.special_ids == tokenizer.special_ids
    (stream,) = dataset.streams("train", 32)
    assert stream.shards[0].document(0)[:-1].tolist() == tokenizer.encode(f"第0篇。 {TEXTS[0]} number 0")
    assert dataset.unigram_counts.shape == (tokenizer.vocab_size,)
    # The same settings reuse the folder; a folder as the tokenizer keeps its settings; others are another recipe.
    assert prepare(config)[1]
    assert Tokenizer.load(tmp_path / "data").sha256 == tokenizer.sha256
    config.tokenizer = TokenizerConfig(path=str(files[name]), threads=1)
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        prepare(config)
    (tmp_path / "data" / "tokenizer" / "tiankong.json").unlink()
    with pytest.raises(DataError, match="tokenizer that made the shards"):
        Dataset.open(tmp_path / "data")


def test_the_report_counts_what_a_tokenizer_does(files: dict[str, Path]) -> None:
    """One document of three characters without a piece, held against counts by hand."""
    tokenizer = Tokenizer.load(files["metaspace"])
    texts = ["the house and the garden", "𠮷𠮷🙂 the house"]
    found = measure(tokenizer, texts)
    ids = [token for text in texts for token in tokenizer.encode(text)]
    assert found.counts.tolist() == np.bincount(ids, minlength=tokenizer.vocab_size).tolist()
    assert found.byte_share == pytest.approx(3 * 4 / len(ids))
    assert (found.characters, found.bytes) == (24 + 13, 24 + 3 * 4 + 10)
    assert found.uncovered == [("𠮷", 2), ("🙂", 1)]
    assert found.covered == pytest.approx(1 - 3 / 37)
    assert (found.unchanged, found.unknown_share) == (1.0, 0.0)
    pieces, never = unused(tokenizer, found.counts)
    assert pieces == tokenizer.pieces - 257
    assert len(never) == pieces - len({token for token in ids if not tokenizer.byte_tokens[token]})
    # icetk's normaliser changes full-width punctuation, and a prefix on nothing else.
    ice = measure(Tokenizer.load(files["ice"], image_tokens=20000), ["好：好", "好。"])
    assert ice.unchanged == 0.5


def test_the_report_is_a_page_and_a_table(
    tmp_path: Path, folder: Path, files: dict[str, Path], source_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*words: str) -> int:
        argv = [f"data.sources=[{source_files[0]},{source_files[1]}]", "characters=2000", *words]
        return run("tokenizer_report", TokenizerReportConfig, main, program="data_prep.tokenizer_report", argv=argv)

    output = tmp_path / "page.html"
    assert report(f"tokenizers=[{folder},{files['byte_level']}]", f"output={output}") == 0
    shown, written = capsys.readouterr().out, output.read_text("utf-8")
    for name in ("small", "byte_level.json", "(bytes)", "(characters)"):
        assert name in shown
        assert name in written
    assert Tokenizer.load(folder).sha256 in written
    assert report(f"tokenizers=[{folder},{folder}]") == 2
    assert report(f"tokenizers={tmp_path}") == 3
    assert "no tokenizer.model or tokenizer.json" in capsys.readouterr().err
