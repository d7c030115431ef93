"""Shared by the tests of data_prep: a config that prepares quickly, and one line of a source."""

import json
from pathlib import Path

from data_prep.config import DataConfig, PrepConfig, TokenizerConfig


def small_config(folder: Path, sources: list[object], **data: object) -> PrepConfig:
    """A config that prepares in about a second."""
    return PrepConfig(
        data=DataConfig(path=str(folder), sources=sources, **data),  # type: ignore[arg-type]
        tokenizer=TokenizerConfig(vocab_size=1000, threads=1),
    )


def document(text: str, **fields: object) -> str:
    """One line of a jsonl source."""
    return json.dumps({"text": text, **fields}, ensure_ascii=False) + "\n"
