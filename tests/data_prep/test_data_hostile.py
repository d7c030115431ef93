"""Input that is legal and hostile, and scratch that a killed process left: a preparation gets through both."""

import os
import unicodedata
from pathlib import Path

import pytest
from data_prep_helpers import document, small_config
from datatrove.data import Document

from data_prep.clean import clean_text, duplicate_key
from data_prep.config import PrepConfig, TokenizerConfig
from data_prep.language import detect_language
from data_prep.personal import mask_personal
from data_prep.prepare import prepare
from data_prep.quality import figures
from data_prep.sources import Source
from data_prep.steps.clean import WriteClean
from data_prep.steps.work import Work

pytestmark = pytest.mark.unit
ZH = "春天来了，花园里的花都开了，蜜蜂在花丛中飞来飞去。"


def config_for(folder: Path, sources: list[object], tokenizer: Path) -> PrepConfig:
    """A config with a tokenizer that exists already: fast."""
    config = small_config(folder, sources)
    config.tokenizer = TokenizerConfig(path=str(tokenizer), threads=1)
    return config


@pytest.mark.parametrize(
    "unit", [*" \t\u3000\xa07@.-a字\n(", "1 ", "a.", "a@", "1(", "字，", "-1", "a\u0301", "\u0301\u0316"]
)
def test_a_million_of_anything_takes_a_moment(unit: str) -> None:
    """Rules that take the square of a run's length would need hours here."""
    text = "x" + unit * (1_000_000 // len(unit)) + "x"
    cleaned = clean_text(text)
    assert cleaned.startswith(unicodedata.normalize("NFC", text[:10])[:1])
    assert cleaned.endswith("x")
    assert clean_text(cleaned) == cleaned
    mask_personal(cleaned)
    detect_language(cleaned)
    duplicate_key(cleaned)
    for lang in ("zh", "en"):
        figures(cleaned, lang)


def test_long_runs_of_marks_are_put_in_order_in_parts() -> None:
    short, long = "a" + "\u0301\u0316" * 100, "a" + "\u0301\u0316" * 1000
    assert clean_text(short) == unicodedata.normalize("NFC", short)
    assert sorted(clean_text(long)) == sorted(unicodedata.normalize("NFC", long))
    assert clean_text("x \t\u3000\n\n y\xa0\n z") == "x\n\n y\n z"


def test_hostile_json_is_refused_and_nothing_is_lost(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = [
        document(ZH, id="good"),
        '{"text": 1' + "0" * 5000 + "}\n",
        '{"\\ud800": 1}\n',
        '{"text": {"\\udfff": 2}}\n',
    ]
    source.write_text("".join(lines), encoding="utf-8")
    manifest, _ = prepare(config_for(tmp_path / "out", [str(source)], folder))
    assert manifest.rejected["a"] == {"bad_json": 1, "missing_text": 2}
    assert "fields are ?" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_killed_process_of_the_same_number_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """In a container every attempt may have the same process number."""
    work = Work(tmp_path, PrepConfig(), (), {})
    remains = [tmp_path / ".work" / "clean" / f".00003.{number}.tmp" for number in (os.getpid(), 1)]
    other = tmp_path / ".work" / "clean" / ".00004.1.tmp"
    for place in (*remains, other):
        place.mkdir(parents=True)
        (place / "half").touch()
    with work.output("clean", 3) as made:
        assert not any(made.iterdir())
        (made / "whole").touch()
    assert sorted(p.name for p in (tmp_path / ".work" / "clean").iterdir()) == [other.name, "00003"]


def test_a_piece_of_work_may_hold_more_files_than_two_bytes_count(tmp_path: Path) -> None:
    files = tuple(tmp_path / f"{number}.jsonl" for number in range(70_000))
    work = Work(tmp_path, PrepConfig(), (Source("many", files),), {})
    place = {"file": str(files[66_000]), "line": 7, "lang": "zh", "licence": None, "target": None, "raw": ZH}
    list(WriteClean(work).run([Document(text=ZH, id="a", metadata=place)]))
    assert work.place(0, 0) == f"{files[66_000]}:7"
    assert [record["text"] for record in work.cleaned(0, "zh")] == [ZH]
