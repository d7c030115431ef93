"""Tasks: scores equal to one plain forward pass an answer, results by hand, the command line, and bad input."""

import json
import math
from pathlib import Path

import pytest
import torch

from data_prep import cli
from data_prep.dataset import Dataset
from data_prep.errors import EXIT_CONFIG, EXIT_DATA
from data_prep.tokenizer import Tokenizer
from tests.train.variants import VARIANTS, untrained
from train import evaluate
from train.evaluate import EvaluateConfig
from train.generation.blanks import fill
from train.generation.forms import Form
from train.generation.picking import Decoding
from train.generation.scoring import Question, Score, score, score_alone
from train.model.build import Model
from train.tasks import Item, Task, results, run_task

pytestmark = pytest.mark.unit
CHOICES = [
    {"text": "天空是[MASK]的。", "choices": ["蓝色", "圆", "一个很长的答案"], "answer": 0},
    {"text": "The old [MASK] sat down.", "choices": ["man", "woman"], "answer": 1},
    {"text": "他们在城里", "choices": ["住", "吃饭"], "answer": 0},
    {"text": "[gMASK]", "choices": ["a", "b", "c", "d"], "answer": 3},
]
CLOZE = [{"text": "The old", "answer": " man"}, {"text": "我们去[MASK]公园。", "answer": "了"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset: Path) -> Tokenizer:
    return Dataset.open(tiny_dataset).tokenizer


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def questions(tokenizer: Tokenizer, model: Model, causal: bool) -> list[Question]:
    """Contexts of 1 to 40 tokens with 1 to 5 answers of 1 to 8 tokens; some share their beginning."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    found = []
    for number in range(24):
        text = [draw(0, 599) for _ in range(draw(0, 40))]
        mask = tokenizer.gmask if causal or number % 3 == 0 else tokenizer.mask
        context = [*text, mask] if causal or number % 2 else [*text[: len(text) // 2], mask, *text[len(text) // 2 :]]
        form = Form.of(context, tokenizer, model.context.model, causal=causal)
        answers = [[draw(0, 599) for _ in range(draw(1, 8))] for _ in range(draw(1, 5))]
        answers += [[*answers[0], 5], [7]] if number % 4 == 0 else []
        found.append(
            Question(form, [answer + [form.openings[0].stops[0]] * form.openings[0].ends for answer in answers])
        )
    return found


@pytest.mark.parametrize("causal", [False, True], ids=["blanks", "causal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_scores_are_those_of_a_plain_pass_each(tokenizer, variant, causal):
    model = untrained(variant)
    asked = questions(tokenizer, model, causal)
    for pass_slots in (1, 300, 16384):
        found = score(model, tokenizer, asked, pass_slots)
        assert [len(row) for row in found] == [len(question.answers) for question in asked]
        for question, row in zip(asked, found, strict=True):
            for answer, one in zip(question.answers, row, strict=True):
                alone = score_alone(model, tokenizer, question, answer)
                assert one.log_probability == pytest.approx(alone.log_probability, rel=1e-5)
                assert one.greedy == alone.greedy


def test_a_cloze_is_right_where_a_greedy_pick_writes_it(tokenizer):
    model, seen = untrained(), 0
    for text in ("今天天气[MASK]，我们去公园。", "他们在城里[gMASK]", "The old [MASK] sat down."):
        context = tokenizer.encode_with_masks(text)
        form = Form.of(context, tokenizer, model.context.model)
        opening = form.openings[0]
        written = fill(model, tokenizer, context, Decoding(4))[0]
        if opening.ends and len(written) == 4:
            # What is cut off at the limit was not ended by the model: the end would be wrong.
            assert not score(model, tokenizer, [Question(form, [[*written, tokenizer.eop]])])[0][0].greedy or seen
            ended = written
        else:
            ended = [*written, tokenizer.eop] if opening.ends else written
        wrong = [*ended[:-1], (ended[-1] + 1) % 600]
        if ended:
            assert [one.greedy for one in score(model, tokenizer, [Question(form, [ended, wrong])])[0]] == [True, False]
            seen += 1
    assert seen >= 2


def test_results_by_hand():
    items = [Item("", ("长长", "b"), 0), Item("", ("c", "d"), 1), Item("", ("e", "f", "g", "h"), 2)]
    task = Task("t", Path(), items)
    rows = [[-4.0, -3.0], [-1.0, -5.0], [-9.0, -8.0, -2.0, -7.0]]
    scores = [[Score(value, False) for value in row] for row in rows]
    found = results(task, {"mask": scores, "gmask": [[], scores[1], []]})
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert found["by_way"]["mask"] == {
        "items": 3,
        "accuracy": pytest.approx(1 / 3),
        "accuracy_per_byte": pytest.approx(2 / 3),  # six bytes carry −4 better than one carries −3
        "log_probability": pytest.approx((-4 - 5 - 2) / 3),
    }
    assert found["by_way"]["gmask"]["items"] == 1
    cloze = Task("c", Path(), [Item("", ("a",), 0)] * 4)
    rows_of_cloze = [[Score(-1.0, greedy)] for greedy in (True, False, False, True)]
    assert results(cloze, {"mask": rows_of_cloze})["by_way"]["mask"]["accuracy"] == 0.5


def test_choices_are_scored_as_texts_with_their_spaces(tokenizer, tmp_path):
    model = untrained()
    scores = run_task(model, tokenizer, Task.read(write(tmp_path / "t.jsonl", CHOICES)), causal=False)
    assert {way: [len(row) for row in rows] for way, rows in scores.items()} == {
        "mask": [3, 2, 2, 0],
        "gmask": [0, 0, 2, 4],
    }
    context = tokenizer.encode_with_masks("The old [MASK] sat down.")
    form = Form.of(context, tokenizer, model.context.model)
    answer = [*tokenizer.encode(" man"), tokenizer.eop]
    alone = score_alone(model, tokenizer, Question(form, [answer]), answer)
    assert scores["mask"][1][0].log_probability == pytest.approx(alone.log_probability, rel=1e-5)
    # A causal model has continuations only.
    causal = run_task(model, tokenizer, Task.read(tmp_path / "t.jsonl"), causal=True)
    assert {way: [len(row) for row in rows] for way, rows in causal.items()} == {"gmask": [0, 0, 2, 4]}


def test_shares_of_a_task_make_up_the_whole(tokenizer, tmp_path):
    model, task = untrained(), Task.read(write(tmp_path / "t.jsonl", CHOICES))
    whole = run_task(model, tokenizer, task, causal=False)
    parts = [run_task(model, tokenizer, task, causal=False, share=(number, 3)) for number in range(3)]
    for way, rows in whole.items():
        for number, row in enumerate(rows):
            mine = [part[way][number] for part in parts if part.get(way, [[]] * 4)[number]]
            assert len(mine) == (1 if row else 0)
            for one, again in zip(row, mine[0] if mine else [], strict=True):
                assert again.log_probability == pytest.approx(one.log_probability, rel=1e-5)


def run(*words: str) -> int:
    return cli.run("evaluate", EvaluateConfig, evaluate.main, program="train.evaluate", argv=words)


def test_the_command_line_evaluates_task_files(tiny_run, tmp_path, capsys):
    choices, cloze = write(tmp_path / "选择 (1).jsonl", CHOICES), write(tmp_path / "cloze.jsonl", CLOZE)
    output, details = tmp_path / "eval.json", tmp_path / "items.jsonl"
    words = [f"checkpoint={tiny_run}", f"tasks=[{choices},{cloze}]", f"output={output}", f"task_details={details}"]
    assert run(*words) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert "loss" not in record
    assert record["step"] == 40
    assert {name: task["kind"] for name, task in record["tasks"].items()} == {"选择 (1)": "choice", "cloze": "cloze"}
    assert {way: found["items"] for way, found in record["tasks"]["cloze"]["by_way"].items()} == {"mask": 2, "gmask": 1}
    lines = [json.loads(line) for line in details.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == [item["text"] for item in CHOICES + CLOZE]
    right = [max(range(3), key=lambda n: lines[0]["log_probability"]["mask"][n]) == 0]
    right += [max(range(2), key=lambda n: line["log_probability"]["mask"][n]) == line["answer"] for line in lines[1:3]]
    assert record["tasks"]["选择 (1)"]["by_way"]["mask"]["accuracy"] == pytest.approx(sum(right) / 3)
    assert all(math.isfinite(value) for line in lines for row in line["log_probability"].values() for value in row)
    said = capsys.readouterr().out
    assert "cloze" in said
    assert "accuracy" in said


GOOD = json.dumps(CHOICES[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ('{"answer": 0}', "line 2: has no field `text`"),
        ('{"text": "[MASK][MASK]", "choices": ["a", "b"], "answer": 0}', "line 2: `text` holds several masks"),
        ('{"text": "[MASK]", "choices": ["a"], "answer": 0}', "line 2: `choices` must be a list of two texts or more"),
        ('{"text": "[MASK]", "choices": ["a", ""], "answer": 0}', "line 2: `choices` holds something that is no text"),
        ('{"text": "[MASK]", "choices": ["a", "b"], "answer": 2}', "line 2: `answer` is 2; give the number"),
        ('{"text": "[MASK]", "answer": ""}', "line 2: `answer` must be the missing text"),
        ('{"text": "[MASK]", "answer": "word"}', "mixes lines with choices and lines without"),
        (json.dumps({**CHOICES[0], "text": "很长" * 80 + "[MASK]"}), "item 2: a text and its answer take"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tiny_run, tmp_path, capsys, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text(GOOD + "\n" + line + "\n", encoding="utf-8")
    assert run(f"checkpoint={tiny_run}", f"tasks=[{path}]") == EXIT_DATA
    said = capsys.readouterr().err
    assert message in said
    assert "task.jsonl" in said
    assert said.count("\n") == 1


def test_missing_and_namesake_files_are_refused(tiny_run, tmp_path, capsys):
    assert run(f"checkpoint={tiny_run}", "tasks=[no/such.jsonl]") == EXIT_DATA
    assert "no/such.jsonl cannot be read as a task" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    one, two = write(tmp_path / "t.jsonl", CHOICES), write(tmp_path / "a" / "t.jsonl", CHOICES)
    assert run(f"checkpoint={tiny_run}", f"tasks=[{one},{two}]") == EXIT_CONFIG
    assert "two files are called t" in capsys.readouterr().err
