"""What cleaning finds and what it leaves alone: language, quality, personal data, near-duplicates, evaluation text."""

import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from data_prep_helpers import document, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clean import clean_text, normalize_width, simplifier
from data_prep.config import CleaningConfig, TokenizerConfig
from data_prep.decontaminate import read_evaluation_files
from data_prep.errors import ConfigError, DataError
from data_prep.language import detect_language
from data_prep.manifest import Manifest
from data_prep.personal import mask_personal
from data_prep.prepare import prepare
from data_prep.quality import FIGURES, LIMITS, figures, limits_of, outside
from data_prep.shingles import by_characters, by_words
from data_prep.signatures import Signer, compact, similarity
from data_prep.sources import BUNDLED
from data_prep.steps import decide, match
from data_prep.steps.decide import group

pytestmark = pytest.mark.unit
ZH = "春天来了，花园里的花都开了，蜜蜂在花丛中飞来飞去，孩子们在草地上放风筝，老人们坐在树下说话。"
EN = "Spring has come and all the flowers in the garden are open, and the bees fly from one to the other. "


def texts(lang: str, count: int) -> list[str]:
    """The first documents of the embedded corpus."""
    with gzip.open(BUNDLED / f"{lang}.jsonl.gz", "rt", encoding="utf-8") as packed:
        return [json.loads(next(packed))["text"] for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ZH, "zh"),
        ("春天來了，花園裡的花都開了，蜜蜂在花叢中飛來飛去。", "zh_hant"),
        (EN, "en"),
        ("GPU 的显存不够时，把 micro_batch_size 调小，或者打开 activation checkpointing。", "zh"),
        ("春が来て、庭の花がみんな咲いた。蜂が花から花へ飛んでいる。", "other"),
        ("Der Frühling ist da und alle Blumen im Garten sind offen, auch die im Wald.", "other"),
        ("Le printemps est là et toutes les fleurs du jardin sont ouvertes pour les abeilles.", "other"),
        ("Весна пришла, и все цветы в саду раскрылись.", "other"),
        (
            "import os\n\ndef main(path):\n    for name in os.listdir(path):\n        print(name)\n    return 0\n",
            "code",
        ),
        ('#include <stdio.h>\nint main(void) {\n  printf("hi\\n");\n  return 0;\n}\n', "code"),
        ("12345 67890 !!! ???", "other"),
        ("hello world", "en"),
    ],
)
def test_language(text: str, expected: str) -> None:
    assert detect_language(text) == expected


def test_width_and_normal_form() -> None:
    assert normalize_width("ＡＢＣ１２３　ｘ，。！") == "ABC123 x，。！"
    assert clean_text("e\u0301\r\nx\u200b \n\n\n\ny") == "é\nx\n\ny"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("写信到 li.ming+a@mail.example.com.cn。", "写信到 <EMAIL>。"),
        ("call 13812345678 now", "call <PHONE> now"),
        ("电话：+86 138-1234-5678，座机 010-62345678", "电话：<PHONE>，座机 <PHONE>"),
        ("ring (212) 555-0123 or +44 20 7946 0958", "ring <PHONE> or <PHONE>"),
        ("身份证11010519491231002X。", "身份证<ID>。"),
        ("SSN 078-05-1120", "SSN <ID>"),
        ("not an id: 110105194912310021", "not an id: 110105194912310021"),
        ("pi is 3.14159265358, in 1998-2004, ISBN 978-7-111-40701-0", None),
        ("order 20240131123456789 at 12:30, ratio 1234-5678", None),
        ("user@localhost and a@b", None),
    ],
)
def test_personal_data(text: str, expected: str | None) -> None:
    assert mask_personal(text)[0] == (text if expected is None else expected)


def test_quality_limits_catch_what_they_name() -> None:
    def reason(text: str, lang: str) -> str | None:
        found = outside(figures(text, lang), LIMITS[lang])
        return found and found[0]

    prose = " ".join(texts("en", 1)[0].split()[:300])
    assert reason(prose, "en") is None
    assert reason(texts("zh", 40)[-1], "zh") is None
    assert reason("short", "en") == "quality_length"
    assert reason("\n".join([EN] * 10), "en") == "quality_repeated_lines"
    assert reason("buy cheap shoes " * 60, "en") == "quality_repeated_ngrams"
    assert reason("### $$$ *** " * 60 + prose, "en") == "quality_symbols"
    assert reason("1234 5678 9012 " * 60 + prose, "en") == "quality_digits"
    nouns = " ".join(f"noun{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(200))
    assert reason(nouns, "en") == "quality_stop_words"
    assert reason(" ".join(f"{chr(97 + n % 26)} {n % 7}" for n in range(300)), "en") in (
        "quality_word_length",
        "quality_digits",
    )
    assert reason(ZH + EN * 5, "zh") == "quality_chinese"
    flat = texts("zh", 40)[-1].replace("\n", "")
    assert reason("……\n".join(flat[n : n + 40] for n in range(0, 800, 40)), "zh") == "quality_unfinished_lines"
    mixed = limits_of({"zh": {"chinese": [0, 1], "length": None}, "fr": {"digits": [0, 0.1]}})
    assert mixed["zh"]["chinese"] == (0, 1)
    assert "length" not in mixed["zh"]
    assert mixed["fr"]["digits"] == (0, 0.1)
    assert set().union(*LIMITS.values()) == set(FIGURES)
    for wrong in ({"zh": {"beauty": [0, 1]}}, {"zh": {"digits": [1, 0]}}):
        with pytest.raises(ConfigError, match=r"data\.cleaning\.limits\.zh\."):
            limits_of(wrong)


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_shingles_are_those_of_a_plain_loop(lang: str) -> None:
    """As many different hashes as there are different pieces, each document on its own, wherever it stands."""
    some = [text[:1500] for text in texts(lang, 6)] + ["", "一", "two words", "“It’s” – «the café’s» naïve… way"]
    hashes, owner = (by_characters if lang == "zh" else by_words)(some, 5)
    seen: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(some):
        if lang == "zh":
            units = [c.lower() if len(c.lower()) == 1 else c for c in text if c.isalnum()]
        else:
            letters = (c if c > "\x7f" else c.lower() if c.isalnum() else " " for c in text)
            units = re.sub("[\x80-\xbf\u2000-\u203f\u3000-\u303f]", " ", "".join(letters)).split(" ")
            units = [unit for unit in units if unit]
        own = hashes[owner == number].tolist()
        pieces = [tuple(units[i : i + 5]) for i in range(len(units) - 4)]
        assert len(own) == len(pieces)
        for piece, value in zip(pieces, own, strict=True):
            assert seen.setdefault(piece, value) == value
    assert len(set(seen.values())) == len(seen)


def edited(text: str, rate: float, seed: int, words: bool) -> str:
    """The text with a share of its units replaced by others of the same text."""
    generator = random.Random(seed)
    units = text.split(" ") if words else list(text)
    return (" " if words else "").join(u if generator.random() >= rate else generator.choice(units) for u in units)


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_signatures_estimate_similarity(lang: str) -> None:
    some = [text for text in texts(lang, 60) if len(text) > 2000][:20]
    signer = Signer()
    chinese = lang == "zh"
    for rate in (0.0, 0.02, 0.05, 0.2):
        other = [edited(text, rate, n, not chinese) for n, text in enumerate(some)]
        cut = by_characters if chinese else by_words
        sets = [[set(h[o == n].tolist()) for n in range(len(some))] for h, o in (cut(some, 5), cut(other, 5))]
        true = np.array([len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)])
        first, enough = signer.sign(some, [chinese] * len(some))
        second, _ = signer.sign(other, [chinese] * len(other))
        assert enough.all()
        assert abs(float((similarity(compact(first), compact(second)) - true).mean())) < 0.03
        alone = np.concatenate([signer.sign([text], [chinese])[0] for text in some])
        assert (alone == first).all(), "a signature depends on its text alone"
    assert not signer.sign(["too short to say"], [False])[1].any()


def cleaned(tmp_path: Path, folder: Path, lines: list[str], **cleaning: object) -> Manifest:
    """Documents prepared in two files, so in two pieces of work."""
    half = len(lines) // 2
    for name, part in (("a", lines[:half]), ("b", lines[half:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    config = small_config(
        tmp_path / "out",
        [{"path": str(tmp_path / "*.jsonl"), "name": "both"}],
        cleaning=CleaningConfig(**cleaning),  # type: ignore[arg-type]
        task_bytes=1,
        split_shares=[1, 0, 0],
    )
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    return prepare(config)[0]


def rejected(tmp_path: Path) -> list[dict[str, object]]:
    with gzip.open(tmp_path / "out" / "rejected" / "both.jsonl.gz", "rt", encoding="utf-8") as packed:
        return [json.loads(line) for line in packed]


def test_near_duplicates_are_found_across_pieces_of_work(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy with 1 % of it changed points at the earlier document; in small parts as well."""
    some = [(text, lang) for lang in ("zh", "en") for text in texts(lang, 40) if len(text) > 1500][:40]
    copies = [(edited(text, 0.01, n, lang == "en"), lang) for n, (text, lang) in enumerate(some)]
    lines = [document(text, lang=lang, id=str(n)) for n, (text, lang) in enumerate(some + copies)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    manifest = cleaned(tmp_path / "one", folder, lines, near_duplicates=True)
    found = rejected(tmp_path / "one")
    assert len(found) == manifest.rejected["both"]["near_duplicate"] == len(copies)
    for record in found:
        assert record["detail"] == f"of {tmp_path / 'one' / 'a.jsonl'}:{record['line']}"
    monkeypatch.setattr(match, "DOCUMENTS_AT_ONCE", 7)
    monkeypatch.setattr(decide, "AT_ONCE", 5)
    cleaned(tmp_path / "two", folder, lines, near_duplicates=True)
    assert [one["line"] for one in rejected(tmp_path / "two")] == [one["line"] for one in found]
    page = (tmp_path / "one" / "out" / "report.html").read_text(encoding="utf-8")
    assert "near-duplicates" in page
    assert "<svg" in page


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40), st.integers(1, 40))
@settings(max_examples=60)
def test_groups_are_the_connected_ones(pairs: list[tuple[int, int]], at_once: int) -> None:
    first = np.arange(31)
    parts = [np.array(pairs[n : n + at_once]) for n in range(0, len(pairs), at_once)]
    group(first, lambda: parts)
    label = list(range(31))
    for _ in label:
        for a, b in pairs:
            label[a] = label[b] = min(label[a], label[b])
    assert first.tolist() == label


def test_every_cleaning_step_through_the_pipeline(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("opencc")
    evaluation = tmp_path / "exam" / "exam.jsonl"
    evaluation.parent.mkdir()
    question = "下列哪一项说法是正确的？甲说太阳从东边升起，乙说月亮自己会发光，丙说地球是平的，请选择。"
    evaluation.write_text(document("no", question=question), encoding="utf-8")
    some = [text[:900] for text in texts("zh", 60) if len(text) > 1000]
    lines = [
        document(some[0] + "電話１３８１２３４５６７８", lang="zh-tw"),
        document(some[1] + question),
        document("短短的一句话，写得很好，可是不够一百个字，因此不要。"),
        document("Der Frühling ist da und alle Blumen im Garten sind offen, auch die im Wald. " * 3),
        document(" ".join(texts("en", 1)[0].split()[:200]) + " me@example.org"),
        document(some[2]),
    ]
    manifest = cleaned(
        tmp_path,
        folder,
        lines,
        normalize_width=True,
        simplify=True,
        languages=["zh", "en"],
        quality=True,
        mask_personal=True,
        near_duplicates=True,
        decontaminate=[str(evaluation)],
    )
    reasons = {record["line"]: (record["reason"], record["detail"]) for record in rejected(tmp_path)}
    assert manifest.rejected["both"] == {"contaminated": 1, "other_language": 1, "quality_length": 1}
    assert reasons[2] == ("contaminated", "exam.jsonl:1")
    assert {stream.key for stream in manifest.sources} == {"both.zh", "both.en"}
    from data_prep.dataset import Dataset

    dataset = Dataset.open(tmp_path / "out", verify=True)
    stream = next(stream for stream in dataset.streams("train", 16) if stream.key == "both.zh")
    assert dataset.tokenizer.decode(stream.shards[0].document(0)[:-1]).endswith("电话<PHONE>")


def test_a_bad_evaluation_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text("{broken\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"exam\.jsonl: line 1: not JSON"):
        read_evaluation_files(CleaningConfig(decontaminate=[str(tmp_path / "exam.jsonl")]))
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_evaluation_files(CleaningConfig(decontaminate=[str(tmp_path / "none.jsonl")]))


def test_evaluation_text_is_found_however_it_is_typed(tmp_path: Path) -> None:
    """Quotes, accents, widths and scripts as in the document's normal form; a line separator does not end a line."""
    sentence = "“It’s the café’s own recipe” – said the cook… and nobody in the whole town would ever doubt his word"
    plain = "It's the cafe\u0301's own recipe, said the cook: and nobody in the whole town would ever doubt his word"
    chinese = "下列哪一項說法是正確的？甲說太陽從東邊升起，乙說月亮自己會發光，丙說地球是平的，請選擇ＡＢＣ。"
    file = tmp_path / "exam.jsonl"
    file.write_text(document(plain) + "\n" + document(chinese) + document("two\u2028lines of a few words"), "utf-8")
    pytest.importorskip("opencc")
    cleaning = CleaningConfig(decontaminate=[str(file)], normalize_width=True, simplify=True)
    known = read_evaluation_files(cleaning)
    assert known.names == ("exam.jsonl:1", "exam.jsonl:3", "exam.jsonl:4")
    assert known.short == ["exam.jsonl:4"]
    texts = [clean_text(sentence), simplifier()(normalize_width(chinese)), "nothing of the kind " * 9]
    assert known.found_in(texts, [False, True, False]) == ["exam.jsonl:1", "exam.jsonl:3", None]
