"""The adapter for lm-eval: what it answers, and lm-eval's own loop over local tasks where the extra is installed."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.dataset import Dataset
from data_prep.tokenizer import Tokenizer
from tests.train.variants import untrained
from train.checkpoint.model import Trained
from train.config import Config
from train.generation.blanks import fill
from train.generation.forms import Form
from train.generation.picking import Decoding
from train.generation.scoring import Question, score_alone
from train.lm_eval_adapter import Model

pytestmark = pytest.mark.unit
HEAD = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
TASKS = {
    "local_choice": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: c
doc_to_target: a
metric_list: [{metric: acc}]
""",
    "local_text": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{t}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
    "local_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: bits_per_byte}]
""",
}
TEXTS = ["The old man sat down and looked at the sea. " * 5, "天空是", "他们在城里住了很久。"]


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset: Path) -> Tokenizer:
    return Dataset.open(tiny_dataset).tokenizer


def adapter(tokenizer: Tokenizer, objective: str = "blank_infilling") -> Model:
    model = untrained()
    config = Config(model=model.context.model)
    config.data.sampling.objective = objective
    return Model(Trained(model, tokenizer, config, Path()), batch_size=2)


def asked(*requests: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=request) for request in requests]


def test_a_texts_likelihood_is_that_of_its_windows(tokenizer):
    """64 positions: windows of 32 tokens behind what fits of those before; by [gMASK], each by a pass of its own."""
    ours = adapter(tokenizer)
    model = ours._trained.model
    found = ours.loglikelihood_rolling(asked(*((text,) for text in TEXTS)))
    assert len(tokenizer.encode(TEXTS[0])) > 64
    for text, value in zip(TEXTS, found, strict=True):
        tokens, wanted = tokenizer.encode(text.strip()), 0.0
        for start in range(0, len(tokens), 32):
            answer = tokens[start : start + 32]
            context = [*tokens[:start][-(64 - len(answer) - 1) :], tokenizer.gmask]
            form = Form.of(context, tokenizer, model.context.model)
            wanted += score_alone(model, tokenizer, Question(form, [answer]), answer).log_probability
        assert value == pytest.approx(wanted, rel=1e-5)


def test_a_causal_texts_likelihood_is_the_sum_over_its_tokens(tokenizer):
    ours = adapter(tokenizer, "causal")
    model, tokens = ours._trained.model, tokenizer.encode(TEXTS[2])
    slots = torch.arange(len(tokens))
    meta = torch.stack([slots, slots * 0, slots * 0, slots + 1])[None]
    with torch.no_grad():
        state = torch.tensor([[tokenizer.sop, *tokens[:-1]]]), meta, torch.zeros(1, dtype=torch.int64)
        shares = torch.log_softmax(model.head.logits(model(state))[0].double(), -1)
    wanted = float(shares.gather(1, torch.tensor(tokens)[:, None]).sum())
    (found,) = ours.loglikelihood_rolling(asked((TEXTS[2],)))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_text_is_what_generation_writes_cut_at_its_ends(tokenizer):
    ours = adapter(tokenizer)
    plain = [
        tokenizer.decode(fill(ours._trained.model, tokenizer, tokenizer.encode_with_masks(f"{text}[gMASK]"), how)[0])
        for text in TEXTS[1:]
        for how in (Decoding(6), Decoding(12))
    ]
    stop = plain[1][3]
    found = ours.generate_until(
        asked(
            (TEXTS[1], {"max_gen_toks": 6}),
            (TEXTS[1], {"max_gen_toks": 12, "until": stop}),
            (TEXTS[2], {"max_gen_toks": 6, "until": ["\n\n", ""], "do_sample": False, "temperature": 0.0}),
            (TEXTS[2], {"max_gen_toks": 12}),
            # Longer than the model's positions: its beginning goes.
            (TEXTS[0] * 3, {"max_gen_toks": 500}),
        )
    )
    assert found[:4] == [plain[0], plain[1].split(stop)[0], plain[2], plain[3]]
    assert found[1] != plain[1]
    assert found[4]
    drawn = ours.generate_until(asked((TEXTS[2], {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0})))
    assert drawn != [plain[3]]


def test_local_tasks_run_in_lm_evals_own_loop(tokenizer, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    ours = adapter(tokenizer)
    written = ours.generate_until(asked(*((text, {"max_gen_toks": 6, "until": ["\n"]}) for text in TEXTS[1:])))
    lines = [
        {"q": TEXTS[1], "c": ["蓝色", "圆"], "a": 0, "t": written[0]},
        {"q": TEXTS[2], "c": ["a", "b"], "a": 1, "t": "something else"},
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, task in TASKS.items():
        text = f"task: {name}\n" + HEAD % (tmp_path / "items.jsonl") + task
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path))
    found = lm_eval.simple_evaluate(model=ours, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    assert found["local_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert found["local_text"]["exact_match,none"] == 0.5
    nats = -sum(ours.loglikelihood_rolling(asked(*((text,) for text in TEXTS[1:]))))
    size = sum(len(text.encode()) for text in TEXTS[1:])
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
