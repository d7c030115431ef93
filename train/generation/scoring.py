"""How likely a model finds given answers: many questions at once, each context run a single time.

A question is a context with one blank (or, for a causal model, a text to go on with) and several answers. Contexts are
packed by intervals, several to a row; their keys and values are then copied out once for each answer, and only the
answers' own tokens run behind them. Answers whose tokens begin alike share a row. `score_alone` is the same sum without
any of that, one forward pass an answer; the two agree to rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import DataError
from data_prep.tokenizer import Tokenizer
from train.generation.forms import Form, Opening
from train.generation.picking import allow
from train.model.build import Model
from train.model.cache import KeyValueCache
from train.progress import alive

PASS_SLOTS = {"cpu": 4096}
"""Slots of one pass by device type: bounds its memory, and on a CPU keeps it in the caches."""
PASS_SLOTS_ELSEWHERE = 32768
HEAD_ROWS = 1024
"""Rows of the head at a time: bounds the logits."""


@dataclass(frozen=True)
class Question:
    """A context and the answers to score at its first blank.

    answers: target tokens of each, at least one, with the blank's end where it is to count.
    """

    form: Form
    answers: list[list[int]]

    @property
    def opening(self) -> Opening:
        """Of the blank that is scored."""
        return self.form.openings[0]

    def inputs(self, answer: Sequence[int]) -> list[int]:
        """What is fed behind the context to predict an answer."""
        return [self.opening.first, *answer[:-1]]


@dataclass(frozen=True)
class Score:
    """log_probability: natural log, over the whole vocabulary. greedy: whether it is what a greedy pick would write."""

    log_probability: float
    greedy: bool


def check(question: Question, limit: int) -> None:
    """Raise DataError where the question with its longest answer does not fit `limit` positions."""
    slots = len(question.form.context) + max(len(answer) for answer in question.answers)
    if slots > limit:
        raise DataError(f"a text and its answer take {slots} slots where the model has {limit} positions")


@torch.no_grad()
def score(
    model: Model, tokenizer: Tokenizer, questions: Sequence[Question], pass_slots: int | None = None
) -> list[list[Score]]:
    """Scores of every answer of every question, in their order. Raises DataError for one that is too long.

    pass_slots: slots of one pass, answers with their contexts; null means the device's.
    """
    limit = model.context.model.max_positions
    pass_slots = pass_slots or PASS_SLOTS.get(model.context.mesh.device.type, PASS_SLOTS_ELSEWHERE)
    for question in questions:
        check(question, limit)
    # Neighbours of like length: little padding.
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].form.context))
    found: list[list[Score]] = [[] for _ in questions]
    for chunk in _chunks(questions, order, pass_slots):
        part = [questions[number] for number in chunk]
        for number, scores in zip(chunk, _score_chunk(model, tokenizer, part, limit), strict=True):
            found[number] = scores
        alive()
    return found


@torch.no_grad()
def score_alone(model: Model, tokenizer: Tokenizer, question: Question, answer: Sequence[int]) -> Score:
    """The score of one answer by one plain forward pass."""
    form, inputs = question.form, question.inputs(answer)
    context, total = len(form.context), len(form.context) + len(inputs)
    place = torch.arange(total)
    upto = place + 1
    if not form.causal:
        upto[:context] = context
    behind = torch.tensor([question.opening.position(slot) for slot in range(len(inputs))]).T
    positions = torch.cat([torch.stack([place[:context], torch.zeros_like(place[:context])]), behind], 1)
    meta = torch.cat([positions, torch.stack([torch.zeros_like(place), upto])])[None]
    state = torch.tensor([[*form.context, *inputs]]), meta, torch.zeros(1, dtype=torch.int64)
    device = model.context.mesh.device
    hidden = model(tuple(tensor.to(device) for tensor in state))[0, context:]
    targets = torch.tensor(list(answer), device=device)
    nats, likeliest = _judge(model, tokenizer, hidden, targets, _stops(question.opening, len(answer)).to(device))
    return Score(float(nats.double().sum()), bool(likeliest.all()))


def log_probability(model: Model, tokenizer: Tokenizer, context: Sequence[int], truth: Sequence[int]) -> float:
    """Natural log of the probability that the context's first mask is filled with `truth`, its end not counted."""
    form = Form.of(context, tokenizer, model.context.model, starts_with_enc=model.context.starts_with_enc)
    return score_alone(model, tokenizer, Question(form, [list(truth)]), truth).log_probability


def _chunks(questions: Sequence[Question], order: Sequence[int], pass_slots: int) -> Iterator[list[int]]:
    """Numbers of questions that go together: the answers' rows, at the chunk's longest, stay under the limit."""
    chunk: list[int] = []
    rows = width = 0
    for number in order:
        question = questions[number]
        longest = len(question.form.context) + max(len(answer) for answer in question.answers)
        if chunk and (rows + len(question.answers)) * max(width, longest) > pass_slots:
            yield chunk
            chunk, rows, width = [], 0, 0
        chunk.append(number)
        rows, width = rows + len(question.answers), max(width, longest)
    if chunk:
        yield chunk


@dataclass(frozen=True)
class _Row:
    """One row of answers: the question's number in its chunk, and what is fed."""

    question: int
    inputs: list[int]


def _score_chunk(model: Model, tokenizer: Tokenizer, part: Sequence[Question], limit: int) -> list[list[Score]]:
    contexts, row_of, start_of = _run_contexts(model, part, limit)
    rows, at = _rows(part)
    device = model.context.mesh.device
    lengths = torch.tensor([len(part[row.question].form.context) for row in rows])
    new = max(len(row.inputs) for row in rows)
    slots = int(lengths.max()) + new
    numbers = torch.tensor([row.question for row in rows])
    # Slots behind a context are copied too, of whatever stands there: the answer takes them, or nobody looks.
    places = (start_of[numbers][:, None] + torch.arange(slots)).clamp(max=contexts.layers[0].slots - 1)
    cache = contexts.spread(row_of[numbers].to(device), places.to(device))
    tokens = torch.zeros(len(rows), new, dtype=torch.int64)
    positions = torch.zeros(len(rows), 2, new, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.inputs)] = torch.tensor(row.inputs)
        opening = part[row.question].opening
        steps = [opening.position(slot) for slot in range(len(row.inputs))]
        positions[number, :, : len(steps)] = torch.tensor(steps).T
    place = lengths[:, None] + torch.arange(new)
    meta = torch.cat([positions, torch.stack([torch.zeros_like(place), place + 1, place], 1)], 1)
    sample_index = torch.zeros(len(rows), dtype=torch.int64, device=device)
    with cache.attached():
        hidden = model((tokens.to(device), meta.to(device), sample_index))
    return _read(model, tokenizer, part, hidden, at)


def _run_contexts(model: Model, part: Sequence[Question], limit: int) -> tuple[KeyValueCache, Tensor, Tensor]:
    """A cache of all contexts, packed; the row and the first slot of each, int64 [questions] on the host."""
    rows: list[list[int]] = []
    used: list[int] = []
    row_of, start_of = [], []
    width = max(limit, *(len(question.form.context) for question in part))
    for question in part:
        length = len(question.form.context)
        # Sorted by length, so the row opened last is the one with room.
        if not rows or used[-1] + length > width:
            rows.append([])
            used.append(0)
        row_of.append(len(rows) - 1)
        start_of.append(used[-1])
        used[-1] += length
    slots = max(1, *used)
    tokens = torch.zeros(len(rows), slots, dtype=torch.int64)
    meta = torch.zeros(len(rows), 5, slots, dtype=torch.int64)
    meta[:, 4] = torch.arange(slots)
    meta[:, 2], meta[:, 3] = meta[:, 4], meta[:, 4] + 1  # padding sees itself
    for question, row, start in zip(part, row_of, start_of, strict=True):
        length = len(question.form.context)
        end = start + length
        tokens[row, start:end] = torch.tensor(question.form.context, dtype=torch.int64)
        meta[row, 0, start:end] = torch.arange(length)
        meta[row, 2, start:end] = start
        if not question.form.causal:
            meta[row, 3, start:end] = end
    device = model.context.mesh.device
    cache = KeyValueCache.empty(model, len(rows), slots)
    with cache.attached():
        model((tokens.to(device), meta.to(device), torch.zeros(len(rows), dtype=torch.int64, device=device)))
    return cache, torch.tensor(row_of), torch.tensor(start_of)


def _rows(part: Sequence[Question]) -> tuple[list[_Row], list[list[int]]]:
    """The rows to run, and for each answer of each question the row that holds its inputs."""
    rows: list[_Row] = []
    at: list[list[int]] = []
    for number, question in enumerate(part):
        first = len(rows)
        place = [0] * len(question.answers)
        by_length = sorted(range(len(place)), key=lambda answer: -len(question.answers[answer]))
        for answer in by_length:
            inputs = question.inputs(question.answers[answer])
            shared = (row for row in range(first, len(rows)) if rows[row].inputs[: len(inputs)] == inputs)
            place[answer] = next(shared, len(rows))
            if place[answer] == len(rows):
                rows.append(_Row(number, inputs))
        at.append(place)
    return rows, at


def _read(
    model: Model, tokenizer: Tokenizer, part: Sequence[Question], hidden: Tensor, at: Sequence[Sequence[int]]
) -> list[list[Score]]:
    """Scores from the answers' hidden states [rows, new, hidden]."""
    slots, targets, stops, sizes = [], [], [], []
    for question, places in zip(part, at, strict=True):
        for answer, row in zip(question.answers, places, strict=True):
            slots.append(row * hidden.shape[1] + torch.arange(len(answer)))
            targets += answer
            stops.append(_stops(question.opening, len(answer)))
            sizes.append(len(answer))
    device = hidden.device
    wanted, flat = torch.cat(slots).to(device), hidden.flatten(0, 1)
    right, ends = torch.tensor(targets, device=device), torch.cat(stops).to(device)
    judged = [
        _judge(model, tokenizer, flat[wanted[i : i + HEAD_ROWS]], right[i : i + HEAD_ROWS], ends[i : i + HEAD_ROWS])
        for i in range(0, len(wanted), HEAD_ROWS)
    ]
    nats = torch.cat([one for one, _ in judged]).double().cpu().split(sizes)
    likeliest = torch.cat([one for _, one in judged]).cpu().split(sizes)
    scores = iter(Score(float(a.sum()), bool(b.all())) for a, b in zip(nats, likeliest, strict=True))
    return [[next(scores) for _ in question.answers] for question in part]


def _stops(opening: Opening, length: int) -> Tensor:
    """The ends that a greedy pick may write at each place of an answer, int64 [length, 2]."""
    return torch.tensor([opening.stops_at(place) for place in range(length)])


def _judge(model: Model, tokenizer: Tokenizer, hidden: Tensor, targets: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of each target, and whether it is the likeliest that may stand there. hidden: [n, hidden]."""
    assert model.head is not None
    logits = model.head.logits(hidden)
    nats = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    allow(logits, tokenizer, stops)
    return nats, logits.argmax(-1) == targets
