"""`python -m train.generate checkpoint=RUN text='今天天气[MASK]，我们去公园。'`: the text with its blanks filled.

[MASK] is a short blank inside the text, [sMASK] a sentence, [gMASK] an open end; a text may hold several. On a terminal
the text appears as it is written, what the model wrote marked; in a pipe it comes plain. `input=` completes a file of
texts, `batch_size` at a time.

Under `torchrun --nproc-per-node N -m train.generate …` the N ranks share the model by tensor parallelism.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console

from data_prep import cli
from data_prep.clean import clean_text
from data_prep.errors import ConfigError, DataError
from data_prep.files import write_bytes, write_json
from train import backend
from train.checkpoint.model import Trained, load_trained
from train.generation.blanks import fill_all
from train.generation.picking import Decoding
from train.generation.streaming import MASKS, Stream
from train.mesh import Mesh
from train.model.quantised import check_quantise


@dataclass
class GenerateConfig:
    """Texts to complete."""

    checkpoint: str = MISSING
    """Run folder (its newest whole checkpoint) or one step's folder."""
    text: str | None = None
    """Text with [MASK], [sMASK] or [gMASK] where something is to be written."""
    input: str | None = None
    """File of texts in place of one: .jsonl with a field `text`, else one text a line."""
    max_new_tokens: int = 32
    """Longest blank in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach p; 1 for all."""
    beams: int = 1
    """Above 1: beam search with so many hypotheses a blank, the best by log probability / length^length_penalty."""
    length_penalty: float = 1.0
    """Exponent of the length that a beam's log probability is divided by."""
    seed: int = 1234
    """Seed of the draws."""
    batch_size: int = 8
    """Texts of `input` that are written side by side."""
    quantise: str | None = None
    """int8 or int4: the layers' matrices are rounded while loading; null leaves them."""
    quantise_group: int | None = None
    """Columns of a matrix that share a scale, such as 128; null means one scale a row."""
    compile: bool = False
    """Decode through torch.compile: a minute or more at first, then faster steps on a CPU. A GPU gains little by it:
    there a step is one graph of fused kernels anyway."""
    output: str | None = None
    """File for the result: JSON, or with `input` one JSON object a line; null prints it only."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1")
        self.decoding()
        check_quantise(self.quantise, self.quantise_group)

    def decoding(self) -> Decoding:
        """How tokens are picked. Raises ConfigError."""
        return Decoding(
            self.max_new_tokens,
            self.temperature,
            self.seed,
            self.top_k,
            self.top_p,
            self.beams,
            self.length_penalty,
            self.compile,
        )


@dataclass(frozen=True)
class Blank:
    """One filled mask. start: where its text stands in the whole, in characters."""

    mask: str
    text: str
    tokens: list[int]
    start: int


def main(config: GenerateConfig) -> int:
    """Fill the blanks, print the text, write `output`. Raises ConfigError, DataError."""
    texts = _texts(config)
    alone = backend.world_size() == 1
    if not alone:
        backend.start()
    try:
        mesh = Mesh.single(backend.device()) if alone else backend.tensor_mesh()
        trained = load_trained(
            config.checkpoint,
            mesh.device,
            mesh,
            quantise=config.quantise,
            quantise_group=config.quantise_group,
        )
        _complete_all(config, trained, texts, speaks=mesh.rank == 0)
    finally:
        if not alone:
            backend.stop()
    return 0


def _complete_all(config: GenerateConfig, trained: Trained, texts: list[str], *, speaks: bool) -> None:
    decoding = config.decoding()
    console = Console(soft_wrap=True, highlight=False)
    stream = None
    if speaks and config.input is None and sys.stdout.isatty():
        stream = Stream(trained.tokenizer, texts[0], console)
    results = complete_all(trained, texts, decoding, config.batch_size, stream)
    if stream is not None:
        stream.close()
    if not speaks:
        return
    records = [_record(config, trained, text, *result) for text, result in zip(texts, results, strict=True)]
    if config.output is not None and config.input is None:
        write_json(config.output, records[0])
    elif config.output is not None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_bytes(config.output, lines.encode())
    if stream is None:
        for whole, _ in results:
            print(whole, flush=True)


def complete(trained: Trained, text: str, decoding: Decoding) -> tuple[str, list[Blank]]:
    """`complete_all` for one text."""
    return complete_all(trained, [text], decoding)[0]


def complete_all(
    trained: Trained, texts: list[str], decoding: Decoding, batch_size: int = 8, stream: Stream | None = None
) -> list[tuple[str, list[Blank]]]:
    """Each text with every mask replaced by what the model writes there, and the blanks in their order.

    The text around the masks is the user's own, character by character; the model reads it cleaned as its training
    text was. Raises ConfigError for a text without a mask, or one too long for the model, and for a causal model's text
    that does not simply end in a [gMASK].
    """
    tokenizer = trained.tokenizer
    causal = trained.config.data.sampling.objective == "causal"
    contexts = [tokenizer.encode_with_masks(clean_text(text)) for text in texts]
    # Texts of like length side by side.
    order = sorted(range(len(texts)), key=lambda number: len(contexts[number]))
    results: list[tuple[str, list[Blank]]] = [("", [])] * len(texts)
    for first in range(0, len(texts), batch_size):
        numbers = order[first : first + batch_size]
        written = fill_all(
            trained.model,
            tokenizer,
            [contexts[number] for number in numbers],
            decoding,
            causal=causal,
            numbers=numbers,
            on_token=None if stream is None else stream.on_token,
        )
        for number, tokens in zip(numbers, written, strict=True):
            results[number] = _joined(trained, texts[number], tokens)
    return results


def _joined(trained: Trained, text: str, written: list[list[int]]) -> tuple[str, list[Blank]]:
    parts: list[str] = []
    blanks: list[Blank] = []
    end = length = 0
    for match, tokens in zip(MASKS.finditer(text), written, strict=True):
        filled = trained.tokenizer.decode(tokens)
        # A piece carries its space in front, so the one before a mask is part of what fills the blank.
        before = text[end : match.start()] + (match[1] if not filled else "")
        parts += [before, filled]
        blanks.append(Blank(match[2], filled, tokens, length + len(before)))
        length += len(before) + len(filled)
        end = match.end()
    return "".join([*parts, text[end:]]), blanks


def _texts(config: GenerateConfig) -> list[str]:
    if (config.text is None) == (config.input is None):
        raise ConfigError(
            "text is not set; give text=… or input=FILE" if config.text is None else "give text or input, not both"
        )
    if config.text is not None:
        _check(config.text, "text")
        return [config.text]
    assert config.input is not None
    path = Path(config.input)
    try:
        lines = path.read_text("utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"input={path} cannot be read as texts ({error})") from error
    if not texts:
        raise DataError(f"input={path} holds no text")
    for number, text in enumerate(texts):
        _check(text, f"{path}, line {number + 1}:")
    return texts


def _check(text: str, name: str) -> None:
    if not isinstance(text, str) or not MASKS.search(text):
        raise ConfigError(f"{name} holds no [MASK], [sMASK] or [gMASK] to fill; put one where something is missing")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 (character {error.start + 1}); check the terminal's encoding"
        ) from error


def _record(config: GenerateConfig, trained: Trained, text: str, whole: str, blanks: list[Blank]) -> dict[str, Any]:
    settings = asdict(config.decoding())
    del settings["compiled"]
    return {
        "text": text,
        "filled": whole,
        "blanks": [asdict(blank) for blank in blanks],
        "checkpoint": str(trained.folder),
        **settings,
        "quantise": config.quantise,
        "quantise_group": config.quantise_group,
    }


if __name__ == "__main__":
    sys.exit(cli.run("generate", GenerateConfig, main, program="train.generate"))
