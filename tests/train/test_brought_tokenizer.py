"""The whole path with a tokenizer that the user brings: data_prep, train, generate."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from data_prep.config import DataConfig, PrepConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.prepare import prepare
from data_prep.sources import BUNDLED
from data_prep.tokenizer import Tokenizer
from tests.conftest import Command
from tests.data_prep.tokenizer_files import byte_level, ice_text_model

pytestmark = pytest.mark.e2e


def trained(folder: Path, overrides: list[str], command: Command, kind: str, rows: int) -> Path:
    """A run of two steps on the embedded corpus with a tokenizer of that kind."""
    texts = []
    for lang in ("zh", "en"):
        with gzip.open(BUNDLED / f"{lang}.jsonl.gz", "rt", encoding="utf-8") as packed:
            texts += [json.loads(line) for line in itertools.islice(packed, 12)]
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    if kind == "json":
        settings = {"path": str(byte_level(folder / "brought.json", [text["text"] for text in texts]))}
    else:
        settings = {"path": str(ice_text_model(folder / "ice_text.model", [text["text"] for text in texts]))}
        settings |= {"image_tokens": 20000}  # type: ignore[dict-item]
    data = DataConfig(path=str(folder / "data"), sources=[str(source)], split_shares=[80, 10, 10])
    prepare(PrepConfig(data=data, tokenizer=TokenizerConfig(threads=1, **settings)))  # type: ignore[arg-type]
    own = [f"data.path={folder / 'data'}", f"model.padded_vocab_size={rows}", "max_steps=2"]
    command("train", *overrides, *own, f"run_dir={folder / 'run'}")
    return folder / "run"


def filled(command: Command, run: Path, tokenizer: Tokenizer) -> None:
    """Fill a blank through the command line; only text comes out."""
    output = run.parent / "out.json"
    command(
        "train.generate",
        f"checkpoint={run}",
        "text=今天天气[MASK]，我们去公园。",
        f"output={output}",
        "max_new_tokens=6",
    )
    assert Tokenizer.load(next((run / "checkpoints").glob("step_*")) / "tokenizer").sha256 == tokenizer.sha256
    content = output.read_text("utf-8")
    assert "今天天气" in content
    assert not any(f"[{name}]" in content.replace("[MASK]", "", 1) for name in ("gMASK", "sop", "image"))


def test_a_tokenizer_json_whose_special_tokens_stand_in_front(
    tmp_path: Path, tiny_overrides: list[str], command: Command
) -> None:
    run = trained(tmp_path, tiny_overrides, command, "json", 640)
    tokenizer = Dataset.open(tmp_path / "data").tokenizer
    assert tokenizer.mask == 1
    filled(command, run, tokenizer)


@pytest.mark.slow
def test_icetks_text_model_with_its_own_ids(tmp_path: Path, tiny_overrides: list[str], command: Command) -> None:
    run = trained(tmp_path, tiny_overrides, command, "ice", 23040)
    tokenizer = Dataset.open(tmp_path / "data").tokenizer
    assert tokenizer.mask > 20000
    filled(command, run, tokenizer)
