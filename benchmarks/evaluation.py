"""Scoring of multiple-choice items: packed with shared contexts, beside one forward pass an answer.

    python -m benchmarks.evaluation checkpoint=runs/demo [items=10000] [alone=500]

Items are made from held-out text: a blank of 1 to 4 tokens in up to 80 tokens of context, the true words and three
others of like length from elsewhere. Correctness first: the first items' scores must agree to 1e-5. Then CPU seconds
(process time, so that other work on the machine does not count) of all items packed, and of the first `alone` items one
pass an answer. Writes benchmarks/evaluation.md.
"""

import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data_prep.dataset import Dataset
from data_prep.order import mix
from train.checkpoint.model import Trained, load_trained
from train.generation.forms import Form
from train.generation.scoring import Question, score, score_alone

TARGET = Path(__file__).with_suffix(".md")
CHOICES = 4


def questions(trained: Trained, data: str, count: int) -> list[Question]:
    """The items, each a pure function of its number."""
    streams = [stream for stream in Dataset.open(data).streams("valid", 256) if stream.rows]
    tokenizer, found = trained.tokenizer, []
    for number in range(count):
        generator = np.random.default_rng(mix(1, number))
        rows = [streams[number % len(streams)].read_row(int(generator.integers(streams[number % len(streams)].rows)))]
        rows += [rows[0]] * (CHOICES - 1)
        before, after = generator.integers(8, 41, 2).tolist()
        length = int(generator.integers(1, 5))
        starts = generator.integers(before, len(rows[0]) - 4 - after, CHOICES).tolist()
        text = rows[0]
        context = [*text[starts[0] - before : starts[0]], tokenizer.mask]
        context += [*text[starts[0] + length : starts[0] + length + after]]
        form = Form.of([int(token) for token in context], tokenizer, trained.config.model)
        answers = [[int(token) for token in text[start : start + length]] for start in starts]
        found.append(Question(form, [[*answer, tokenizer.eop] for answer in answers]))
    return found


def main(words: list[str]) -> int:
    """Measure and write the table."""
    settings = {"checkpoint": "runs/demo", "data": "data/sample", "items": "10000", "alone": "500"}
    settings |= dict(word.split("=", 1) for word in words)
    torch.set_num_threads(1)
    trained = load_trained(settings["checkpoint"], torch.device("cpu"))
    model, tokenizer = trained.model, trained.tokenizer
    items = questions(trained, settings["data"], int(settings["items"]))
    some = items[: int(settings["alone"])]
    packed = score(model, tokenizer, some)
    start = time.process_time()
    singly = [[score_alone(model, tokenizer, item, answer) for answer in item.answers] for item in some]
    alone = time.process_time() - start
    pairs = [
        (one.log_probability, two.log_probability)
        for row, again in zip(packed, singly, strict=True)
        for one, two in zip(row, again, strict=True)
    ]
    error = max(abs(a - b) / abs(b) for a, b in pairs)
    if error > 1e-5:
        raise SystemExit(f"packed and single scores differ by {error:.1e}")
    start = time.process_time()
    score(model, tokenizer, items)
    together = time.process_time() - start
    rates = len(some) / alone, len(items) / together
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mean = sum(len(item.form.context) for item in items) / len(items)
    text = f"""# Multiple choice: packed scoring

Written by `python -m benchmarks.evaluation`. {parameters / 1e6:.1f} M parameters (`model={trained.config.model.name}`),
fp32, one thread of {platform.processor() or platform.machine()}, torch {torch.__version__}, CPU seconds of the process.
Items: a blank in {mean:.0f} tokens of held-out text on average, {CHOICES} choices of 1 to 4 tokens and the blank's end.
Largest relative difference between the two ways over {len(pairs):,} scores: {error:.1e}.

| way | items | CPU seconds | items a second | ratio |
|---|---|---|---|---|
| one forward pass an answer | {len(some):,} | {alone:.1f} | {rates[0]:.2f} | 1 |
| packed contexts, cache shared by the choices | {len(items):,} | {together:.1f} | {rates[1]:.2f} | \
{rates[1] / rates[0]:.1f} |
"""
    TARGET.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
