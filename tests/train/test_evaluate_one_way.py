"""Evaluation of one kind alone, and of contexts that are read from the left only."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep import cli
from data_prep.batch import GMASK, MASK
from data_prep.errors import EXIT_CONFIG
from data_prep.samples import Sampler
from train import evaluate
from train.checkpoint.model import Trained, load_trained
from train.evaluate import EvaluateConfig
from train.held_out import HeldOutConfig, held_out

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def trained(tiny_run: Path) -> Trained:
    return load_trained(tiny_run, torch.device("cpu"))


def sampler(trained: Trained, **asked: Any) -> Sampler:
    with ExitStack() as stack:
        return held_out(trained, HeldOutConfig(), "valid", stack, **asked)[0]


def run(*words: str) -> int:
    return cli.run("evaluate", EvaluateConfig, evaluate.main, program="train.evaluate", argv=words)


def test_a_kind_alone_is_all_that_is_seen(trained):
    for kind, number in (("gmask", GMASK), ("mask", MASK)):
        groups = sampler(trained, kind=kind).batch(range(24)).group
        assert (groups // 8 == number).all()
    assert len({int(group) // 8 for group in sampler(trained).batch(range(24)).group}) == 2


def test_one_way_has_the_same_targets_and_sees_nothing_from_the_right(trained):
    both, one = (sampler(trained, kind="gmask", one_way=way) for way in (False, True))
    assert both.rows == one.rows
    for index in range(32):
        wide, narrow = both.sample(index), one.sample(index)
        targets = narrow.targets[narrow.loss_weight > 0].tolist()
        assert targets == wide.targets[wide.loss_weight > 0].tolist()
        # The context stands in front of them, generated too; all of it from one [gMASK] at the start on.
        shown = wide.tokens[: len(wide.tokens) - len(targets) - 1]
        assert narrow.tokens[0] == trained.tokenizer.gmask
        assert narrow.tokens[1] == trained.tokenizer.sop
        assert narrow.tokens[2 : 2 + len(shown)].tolist() == shown.tolist()
        assert narrow.positions[0].tolist() == list(range(len(narrow.tokens)))
        assert (narrow.attend_from == 0).all()
        assert narrow.attend_to.tolist() == [slot + 1 for slot in range(len(narrow.tokens))]


def test_one_way_scores_are_those_of_plain_next_token_passes(trained, tiny_run, tmp_path):
    """Each target by a pass over nothing but what stands before it."""
    words = [f"checkpoint={tiny_run}", "kind=gmask", "samples=2", f"output={tmp_path / 'eval.json'}"]
    assert run(*words, "context=one_way") == 0
    record = json.loads((tmp_path / "eval.json").read_text())
    assert (record["kind"], record["context"]) == ("gmask", "one_way")
    one, nats, count = sampler(trained, kind="gmask", one_way=True), 0.0, 0
    for index in range(2):
        sample = one.sample(index)
        for slot in sample.loss_weight.nonzero()[0].tolist():
            upto = torch.arange(slot + 1)
            meta = torch.stack([upto, 0 * upto, 0 * upto, upto + 1])[None]
            tokens = torch.from_numpy(sample.tokens[: slot + 1])[None]
            with torch.no_grad():
                hidden = trained.model((tokens, meta, torch.zeros(1, dtype=torch.int64)))
                scores = trained.model.head.logits(hidden)[0, -1].double()
            nats -= float(torch.log_softmax(scores, -1)[int(sample.targets[slot])])
            count += 1
    assert record["targets"] == count
    assert record["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert run(*words) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["unigram_loss"] == record["unigram_loss"]


@pytest.mark.parametrize("word", ["kind=spans", "context=left"])
def test_other_words_are_refused(tiny_run, capsys, word):
    assert run(f"checkpoint={tiny_run}", word) == EXIT_CONFIG
    assert word in capsys.readouterr().err
