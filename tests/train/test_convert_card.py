"""The model card says what the run folder and the dataset say, and leaves out what it cannot know."""

import json
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from tests.train.convert_helpers import config_of, convert, model_of, weights_of, write_checkpoint
from train.checkpoint.select import step_folder

pytestmark = pytest.mark.unit


def test_the_card_of_a_run(tmp_path: Path, tiny_run: Path, tiny_dataset: Path) -> None:
    text = (convert(tiny_run, tmp_path / "away", "huggingface") / "README.md").read_text()
    front = text.split("---")[1]
    assert "language: [en, zh]" in front
    assert "library_name: transformers" in front
    validation = json.loads((tiny_run / "validation.jsonl").read_text().splitlines()[-1])
    assert f"| all | {validation['loss']:,.4g} | {validation['perplexity']:,.4g} |" in text
    for language, part in validation["by_language"].items():
        assert f"| {language} | {part['loss']:,.4g} |" in text
    for source in Manifest.read(tiny_dataset).sources:
        counts = source.counts["train"]
        row = f"| {source.name} | {source.lang} | {counts.documents:,} | {counts.tokens:,} | "
        assert row in text
        assert all(f"{name} ({count})" in text for name, count in source.licence.items())
    assert "| steps | 40 in 1 attempt(s) |" in text
    assert "seed: 1\n" in text
    assert "![loss by step: training, held-out](loss.svg)" in text
    assert (tmp_path / "away" / "loss.svg").read_text().startswith("<svg ")


def test_an_earlier_step_tells_its_own_history(tmp_path: Path, tiny_run: Path) -> None:
    text = (convert(step_folder(tiny_run, 20), tmp_path / "away", "glm_130b") / "README.md").read_text()
    assert "| steps | 20 in 1 attempt(s) |" in text
    assert "## Evaluation" not in text, "it was validated at step 40 only"
    assert "fp32 rotary angles" in text


def test_a_checkpoint_that_stands_alone(tmp_path: Path, tiny_dataset: Path) -> None:
    model = model_of()
    config = config_of(model, objective="blank_infilling")
    source = write_checkpoint(tmp_path / "source", config, weights_of(model), tiny_dataset)
    text = (convert(source, tmp_path / "away", "glm_130b", quantise="int4") / "README.md").read_text()
    assert "## Model" in text
    assert "int4 with an fp16 scale a row" in text
    assert not any(title in text for title in ("## Data", "## Training", "## Evaluation", "loss.svg"))
