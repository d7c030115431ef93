"""Tasks in local jsonl files: multiple choice and cloze, scored by [MASK] and by [gMASK].

    {"text": "天空是[MASK]的。", "choices": ["蓝色", "圆"], "answer": 0}      multiple choice: the likeliest choice wins
    {"text": "The capital of France is", "answer": " Paris"}                 cloze: would a greedy pick write it?

A mask in the text says where the answer goes: at a [MASK] or [sMASK] it is scored as a blank, its end included (how a
GLM answers, arXiv 2103.10360, section 3.3); at a [gMASK] as a continuation. A text without a mask is scored with each
at its end, and the results stand side by side. A causal model has continuations only. As in training, a space before a
mask belongs to what fills it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.clean import clean_text
from data_prep.errors import ConfigError, DataError
from data_prep.tokenizer import Tokenizer
from train.generation.forms import Form
from train.generation.scoring import Question, Score, check, score
from train.generation.streaming import MASKS
from train.model.build import Model
from train.model.context import Context

WAYS = {"mask": "[MASK]", "gmask": "[gMASK]"}
"""How a text without a mask is scored."""


@dataclass(frozen=True)
class Item:
    """One line of a task. choices: texts to choose from, or the one right word of a cloze. answer: the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int

    @property
    def cloze(self) -> bool:
        """Whether there is nothing to choose from."""
        return len(self.choices) == 1


@dataclass(frozen=True)
class Task:
    """The items of one file, all of one sort."""

    name: str
    path: Path
    items: list[Item]

    @staticmethod
    def read(path: str | Path, limit: int | None = None) -> "Task":
        """limit: take the first so many items. Raises DataError naming the line that is wrong."""
        path = Path(path)
        items: list[Item] = []
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a task ({error})") from error
        for number, line in enumerate(lines):
            if line.strip() and (limit is None or len(items) < limit):
                try:
                    items.append(_item(json.loads(line)))
                except ValueError as error:
                    raise DataError(f"{path}, line {number + 1}: {error}") from error
        if not items:
            raise DataError(f"{path} holds no item; each line is {{text, answer}} or {{text, choices, answer}}")
        if len({item.cloze for item in items}) > 1:
            raise DataError(f"{path} mixes lines with choices and lines without; give two files")
        return Task(path.name.removesuffix(".jsonl"), path, items)


def read_tasks(paths: Sequence[str], limit: int | None = None) -> list[Task]:
    """Several tasks; raises ConfigError where two have one name."""
    tasks = [Task.read(path, limit) for path in paths]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"tasks: two files are called {max(names, key=names.count)}; results go by the file's name")
    return tasks


def run_task(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    *,
    causal: bool,
    share: tuple[int, int] = (0, 1),
) -> dict[str, list[list[Score]]]:
    """Scores of each item's choices by each way that fits it: {way: one list an item, empty where it does not fit}.

    share: (number, of) takes every of-th item only, from `number` on; the other lists stay empty. Raises DataError for
    an item that the model cannot take.
    """
    found: dict[str, list[list[Score]]] = {}
    asked: dict[str, list[tuple[int, Question]]] = {}
    for number in range(share[0], len(task.items), share[1]):
        for way, question in _questions(task.items[number], tokenizer, model.context, causal).items():
            try:
                check(question, model.context.model.max_positions)
            except DataError as error:
                raise DataError(f"{task.path}, item {number + 1}: {error}") from error
            asked.setdefault(way, []).append((number, question))
    for way, pairs in asked.items():
        found[way] = [[] for _ in task.items]
        scores = score(model, tokenizer, [question for _, question in pairs])
        for (number, _), one in zip(pairs, scores, strict=True):
            found[way][number] = one
    return found


def results(task: Task, scores: dict[str, list[list[Score]]]) -> dict[str, Any]:
    """What a task's scores come to.

    {kind: choice, items, chance, by_way: {way: {items, accuracy, accuracy_per_byte, log_probability}}} where the
    likeliest choice wins, or the likeliest a byte; {kind: cloze, items, by_way: …} with an accuracy alone.
    log_probability: the right answer's, mean over items, in nats.
    """
    by_way = {}
    for way, rows in sorted(scores.items()):
        done = [(item, row) for item, row in zip(task.items, rows, strict=True) if row]
        if not done:
            continue
        right = [row[item.answer] for item, row in done]
        found: dict[str, Any] = {"items": len(done)}
        if task.items[0].cloze:
            found["accuracy"] = sum(one.greedy for one in right) / len(done)
        else:
            found["accuracy"] = sum(_best(row) == item.answer for item, row in done) / len(done)
            per_byte = sum(_best(row, item.choices) == item.answer for item, row in done) / len(done)
            found["accuracy_per_byte"] = per_byte
        found["log_probability"] = sum(one.log_probability for one in right) / len(done)
        by_way[way] = found
    record: dict[str, Any] = {"kind": "cloze" if task.items[0].cloze else "choice", "items": len(task.items)}
    if record["kind"] == "choice":
        record["chance"] = sum(1 / len(item.choices) for item in task.items) / len(task.items)
    return {**record, "by_way": by_way}


def details(task: Task, scores: dict[str, list[list[Score]]]) -> Iterator[dict[str, Any]]:
    """One record an item: {task, item, text, choices, answer, log_probability: {way: one a choice}, greedy: {…}}."""
    for number, item in enumerate(task.items):
        rows = {way: found[number] for way, found in sorted(scores.items()) if found[number]}
        yield {
            "task": task.name,
            "item": number,
            "text": item.text,
            "choices": list(item.choices),
            "answer": item.answer,
            "log_probability": {way: [one.log_probability for one in row] for way, row in rows.items()},
            "greedy": {way: [one.greedy for one in row] for way, row in rows.items()},
        }


def _best(row: Sequence[Score], choices: Sequence[str] | None = None) -> int:
    """The first of the likeliest choices, by log probability or, with the choices' texts, by that over their bytes."""
    sizes = [max(1, len(choice.strip().encode())) for choice in choices] if choices else [1] * len(row)
    return max(range(len(row)), key=lambda number: row[number].log_probability / sizes[number])


def _questions(item: Item, tokenizer: Tokenizer, context: Context, causal: bool) -> dict[str, Question]:
    """The item by each way that fits it."""
    mask = MASKS.search(item.text)
    if mask is not None:
        texts = {mask[2].lower(): item.text}
        if causal and mask[2] != "gMASK":
            return {}
    else:
        texts = {way: item.text + word for way, word in WAYS.items() if not causal or way == "gmask"}
    questions = {}
    for way, text in texts.items():
        # The space before a mask belongs to what fills it, and so does one that a choice brings along.
        spaced = MASKS.search(text)[1]  # type: ignore[index]
        fillings = [
            (" " if spaced or choice.startswith(" ") else "") + clean_text(choice.strip()) for choice in item.choices
        ]
        tokens = tokenizer.encode_with_masks(clean_text(text))
        form = Form.of(tokens, tokenizer, context.model, causal=causal, starts_with_enc=context.starts_with_enc)
        end = [form.openings[0].stops[0]] if form.openings[0].ends else []
        questions[way] = Question(form, [tokenizer.encode(filling) + end for filling in fillings])
    return questions


def _item(record: Any) -> Item:
    """Raises ValueError saying what is wrong with a line."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError("has no field `text`")
    if len(MASKS.findall(record["text"])) > 1:
        raise ValueError("`text` holds several masks; one answer is scored at one mask")
    if "choices" not in record:
        if not isinstance(record.get("answer"), str) or not record["answer"].strip():
            raise ValueError("`answer` must be the missing text, or give `choices`")
        return Item(record["text"], (record["answer"],), 0)
    choices, answer = record["choices"], record.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("`choices` must be a list of two texts or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("`choices` holds something that is no text")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"`answer` is {answer!r}; give the number of the right choice, counted from 0")
    return Item(record["text"], tuple(choices), answer)
