"""Our checkpoints under EleutherAI's lm-eval (`pip install '.[lm-eval]'`), so that its tasks run on them.

    python -m train.lm_eval_adapter checkpoint=RUN tasks='[arc_easy,my_task]' include=DIR output=result.json

A request's continuation is scored behind its context and a [gMASK] (a causal model's behind the context itself), many
at once as in `train.generation.scoring`; contexts too long for the model lose their beginning. `include`: a folder of
task files.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from data_prep import cli
from data_prep.clean import clean_text
from data_prep.errors import ConfigError
from data_prep.files import write_json
from train import backend
from train.checkpoint.model import Trained, load_trained
from train.generation.blanks import fill_all
from train.generation.forms import Form
from train.generation.picking import Decoding
from train.generation.scoring import Question, score

try:
    from lm_eval.api.model import LM
except ImportError:  # the extra is not installed; `main` says so
    LM = object


@dataclass
class HarnessConfig:
    """One run of lm-eval."""

    checkpoint: str = MISSING
    """Run folder (its newest whole checkpoint) or one step's folder."""
    tasks: list[str] = field(default_factory=list)
    """Names of lm-eval's tasks."""
    include: str | None = None
    """Folder with task files of one's own."""
    limit: int | None = None
    """Items of each task; null means all."""
    batch_size: int = 8
    """Texts that are written side by side."""
    output: str | None = None
    """JSON file for the result; null prints it only."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1")


class Model(LM):
    """What lm-eval asks of a model: log likelihoods, and text."""

    def __init__(self, trained: Trained, batch_size: int = 8) -> None:
        super().__init__()
        self._trained, self._batch_size = trained, batch_size
        self._causal = trained.config.data.sampling.objective == "causal"
        self._limit = trained.config.model.max_positions

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log likelihood, whether greedy) of each (context, continuation)."""
        tokenizer = self._trained.tokenizer
        asked: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            asked.setdefault(request.args[0], []).append(number)
        questions, numbers = [], []
        for context, places in asked.items():
            answers = [tokenizer.encode(requests[number].args[1]) for number in places]
            room = self._limit - max(len(answer) for answer in answers)
            questions.append(Question(self._form(tokenizer.encode(clean_text(context)), room), answers))
            numbers += places
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        scores = score(self._trained.model, tokenizer, questions)
        for number, one in zip(numbers, (one for row in scores for one in row), strict=True):
            found[number] = one.log_probability, one.greedy
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log likelihood of whole texts, in windows of half the model's positions behind as much context."""
        tokenizer, step = self._trained.tokenizer, self._limit // 2
        questions, sizes = [], []
        for request in requests:
            tokens = tokenizer.encode(clean_text(request.args[0]))
            starts = range(0, len(tokens), step)
            sizes.append(len(starts))
            for start in starts:
                answer = tokens[start : start + step]
                questions.append(Question(self._form(tokens[:start], self._limit - len(answer)), [answer]))
        scores = iter(score(self._trained.model, tokenizer, questions))
        return [sum(next(scores)[0].log_probability for _ in range(size)) for size in sizes]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Text behind each context, cut before the first of its `until` strings: greedy, or drawn at a temperature."""
        found = [""] * len(requests)
        alike: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(self._decoding(request.args[1]), []).append(number)
        for decoding, numbers in alike.items():
            # Neighbours of like length: little padding.
            numbers.sort(key=lambda number: len(requests[number].args[0]))
            for first in range(0, len(numbers), self._batch_size):
                part = numbers[first : first + self._batch_size]
                for number, text in zip(
                    part, self._written([requests[n].args[0] for n in part], decoding), strict=True
                ):
                    found[number] = _cut(text, requests[number].args[1].get("until"))
        return found

    def _decoding(self, settings: dict[str, Any]) -> Decoding:
        """What a request's settings mean here; an answer takes at most half of the model's positions."""
        longest = min(int(settings.get("max_gen_toks", 64)), self._limit // 2)
        if not settings.get("do_sample", False) or not settings.get("temperature", 1.0):
            return Decoding(longest)
        return Decoding(
            longest,
            temperature=float(settings.get("temperature", 1.0)),
            top_k=int(settings.get("top_k", 0)),
            top_p=float(settings.get("top_p", 1.0)),
        )

    def _written(self, contexts: Sequence[str], decoding: Decoding) -> list[str]:
        tokenizer, room = self._trained.tokenizer, self._limit - decoding.max_new_tokens - 1
        tokens = [self._with_mask(tokenizer.encode(clean_text(context)), room) for context in contexts]
        written = fill_all(self._trained.model, tokenizer, tokens, decoding, causal=self._causal)
        return [tokenizer.decode(blanks[0]) for blanks in written]

    def _form(self, tokens: list[int], room: int) -> Form:
        """A context that takes at most `room` slots; what is too much goes from its start."""
        return Form.of(
            self._with_mask(tokens, room),
            self._trained.tokenizer,
            self._trained.config.model,
            causal=self._causal,
            starts_with_enc=self._trained.model.context.starts_with_enc,
        )

    def _with_mask(self, tokens: list[int], room: int) -> list[int]:
        room -= self._trained.model.context.starts_with_enc
        return [*tokens[max(0, len(tokens) + 1 - room) :], self._trained.tokenizer.gmask]


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text


def main(config: HarnessConfig) -> int:
    """Run the tasks, print lm-eval's table, write `output`. Raises ConfigError, DataError."""
    if LM is object:
        raise ConfigError("lm-eval is not installed; pip install 'tiankong[lm-eval]', or use train.evaluate tasks=")
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=config.include)
    unknown = [name for name in config.tasks if name not in manager.all_tasks]
    if unknown or not config.tasks:
        raise ConfigError(f"tasks={config.tasks}: lm-eval knows no {unknown or 'task of that name'}; see include=")
    model = Model(load_trained(config.checkpoint, backend.device()), config.batch_size)
    result = lm_eval.simple_evaluate(
        model=model, tasks=list(config.tasks), task_manager=manager, limit=config.limit, bootstrap_iters=0
    )
    if config.output is not None:
        write_json(config.output, {"results": result["results"], "checkpoint": config.checkpoint})
    print(make_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("lm_eval_adapter", HarnessConfig, main, program="train.lm_eval_adapter"))
