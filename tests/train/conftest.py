"""What tests of tuning share."""

import json
from pathlib import Path

import pytest

from data_prep.config import DataConfig, PrepConfig, TokenizerConfig
from train.checkpoint.select import find


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """Instructions in both languages, in the tokens of the run that they are to tune."""
    from data_prep.prepare import prepare  # a machine that only trains runs tests too, and has no datatrove

    folder = tmp_path_factory.mktemp("chat")
    lines = [{"text": f"问：{n}加{n}是多少？", "answer": f"是{2 * n}。"} for n in range(150)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    source = {"path": str(folder / "chat.jsonl"), "template": "plain", "target_field": "answer", "lang": "zh"}
    data = DataConfig(path=str(folder / "dataset"), sources=[source], split_shares=[80, 10, 10], min_characters=1)
    prepare(PrepConfig(data=data, tokenizer=TokenizerConfig(path=str(find(tiny_run) / "tokenizer"))))
    return folder / "dataset"
