"""`python -m data_prep.inspect data.path=DIR index=N`: sample N as a person would want to see it.

For each segment the text with its blanks, what fills them and at which positions; then the interval mask as a small
picture on the terminal, and with `output=mask.png` slot by slot as a PNG file.
"""

import struct
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import MISSING
from rich.console import Console
from rich.text import Text

from data_prep.batch import Sample, group_name
from data_prep.cli import run
from data_prep.config import DataConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from data_prep.files import write_bytes
from data_prep.manifest import SPLITS
from data_prep.order import mixture_plan
from data_prep.samples import Sampler
from data_prep.tokenizer import Tokenizer

_COLUMNS = 64
"""Widest picture on the terminal; two rows of it share a line."""
_HIDDEN, _CONTEXT, _GENERATED = 0, 1, 2
_COLOURS = {_HIDDEN: (255, 255, 255), _CONTEXT: (59, 125, 216), _GENERATED: (230, 126, 34)}
"""What a query does not see; what one of the context sees; what a generated one, or padding, sees."""


@dataclass
class InspectConfig:
    """Everything `python -m data_prep.inspect` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    """The dataset folder (`data.path`) and how its rows become samples (`data.sampling`)."""
    index: int = MISSING
    """Which sample."""
    split: str = "train"
    """train, valid or test."""
    sequence_length: int = 256
    """Slots a sequence; take the training run's to see its samples."""
    seed: int = 1234
    """Seed of the sampling; take the training run's."""
    output: str | None = None
    """PNG file to write the interval mask to, a pixel a slot."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"split={self.split} must be one of {', '.join(SPLITS)}")
        if self.index != MISSING and self.index < 0:
            raise ConfigError(f"index={self.index} must be ≥ 0")


def main(config: InspectConfig) -> int:
    """Print the sample, and write its picture where one is asked for."""
    dataset = Dataset.open(config.data.path)
    plan = mixture_plan(config.data.mixture)
    sampler = Sampler(
        dataset, config.data.sampling, config.sequence_length, seed=config.seed, split=config.split, plan=plan
    )
    address, sample = sampler.address(config.index), sampler.sample(config.index)
    console = Console()
    used = int((sample.attend_to - sample.attend_from > 1).sum())
    console.print(
        f"sample {config.index} of {config.split}: {group_name(sample.group)}, {address.stream.key}, row {address.row} "
        f"in epoch {address.epoch}; {int((sample.loss_weight > 0).sum())} targets in {len(sample.tokens)} slots, "
        f"{used / len(sample.tokens):.0%} filled by {len(segments(sample))} segments",
        markup=False,
        highlight=False,
    )
    for part in describe(sample, dataset.tokenizer):
        console.print(part)
    console.print(small_picture(sample, colour=console.color_system is not None))
    if config.output is not None:
        write_bytes(Path(config.output), png(picture(sample)))
        console.print(f"the mask, a pixel a slot: {config.output}", markup=False)
    return 0


def segments(sample: Sample) -> list[tuple[int, int, int]]:
    """(first slot, end of the context, end) of each segment; padding is left out."""
    found = []
    is_target = sample.loss_weight > 0
    first = 0
    while first < len(sample.tokens):
        end = int(np.flatnonzero(sample.attend_from == first)[-1]) + 1
        if is_target[first:end].any():
            found.append((first, first + int(np.argmax(is_target[first:end])), end))
        first = end
    return found


def describe(sample: Sample, tokenizer: Tokenizer) -> list[Text]:
    """The segments in words: context with its blanks, then each generated piece with its positions."""
    parts = []
    for number, (first, context_end, end) in enumerate(segments(sample), 1):
        text = Text(f"\nsegment {number}, slots {first} … {end - 1}\n", style="bold")
        for token in np.split(sample.tokens[first:context_end], _edges(sample.tokens[first:context_end], tokenizer)):
            blank = len(token) and tokenizer.no_text[token[0]]
            text.append(tokenizer.decode(token.tolist()), style="bold blue" if blank else "not bold")
        begins = np.flatnonzero(sample.tokens[context_end:end] == tokenizer.sop) + context_end
        for begin, stop in zip(begins, [*begins[1:], end], strict=True):
            positions = sample.positions[:, begin:stop]
            place = ", ".join(f"{row[0]} … {row[-1]}" for row in positions if row.any() or row is positions[0])
            text.append(f"\n  targets at slots {begin} … {stop - 1}, positions {place}: ", style="not bold dim")
            text.append(tokenizer.decode(sample.targets[begin:stop].tolist()), style="not bold dark_orange")
        parts.append(text)
    return parts


def _edges(tokens: NDArray[np.int64], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Where a run of pieces or of special tokens ends."""
    special = tokenizer.no_text[tokens]
    return np.flatnonzero(special[1:] != special[:-1]) + 1


def picture(sample: Sample) -> NDArray[np.uint8]:
    """What each query (row) sees of each key (column), uint8 [S, S]: 0 hidden, 1 from the context, 2 from elsewhere."""
    slots = np.arange(len(sample.tokens))
    sees = (slots >= sample.attend_from[:, None]) & (slots < sample.attend_to[:, None])
    generated = np.ones(len(slots), dtype=bool)
    for first, context_end, _ in segments(sample):
        generated[first:context_end] = False
    return np.where(sees, np.where(generated, _GENERATED, _CONTEXT)[:, None], _HIDDEN).astype(np.uint8)


def small_picture(sample: Sample, colour: bool = True) -> Text:
    """The picture in half blocks, at most 64 columns: a cell shows what most of its slots are, hidden or seen.

    Without colour, every other row of cells in shades: empty for hidden, light for context, dark for generation."""
    whole = picture(sample)
    step = -(-len(whole) // _COLUMNS)
    size = len(whole) // step
    cells = whole[: size * step, : size * step].reshape(size, step, size, step)
    counts = np.stack([(cells == value).sum(axis=(1, 3)) for value in _COLOURS], axis=-1)
    small = counts.argmax(axis=-1)
    if size % 2:
        small = np.concatenate([small, np.zeros((1, size), dtype=small.dtype)])
    text = Text(f"\nqueries down, keys across, {step} slots a cell; blue: context, orange: generation\n")
    if not colour:
        return Text("\n".join("".join(" ░█"[cell] for cell in row) for row in small[::2].tolist()))
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", style=f"rgb{_css(above)} on rgb{_css(below)}")
        text.append("\n")
    return text


def _css(value: int) -> str:
    return "({},{},{})".format(*_COLOURS[value])


def png(values: NDArray[np.uint8]) -> bytes:
    """A PNG file with a palette of `_COLOURS`; values: uint8 [height, width]."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    palette = bytes(part for colour in _COLOURS.values() for part in colour)
    # Each row of a PNG begins with the number of its filter, 0 for none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), values], axis=1).tobytes()
    parts = [chunk(b"IHDR", header), chunk(b"PLTE", palette), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


if __name__ == "__main__":
    sys.exit(run("inspect", InspectConfig, main, program="data_prep.inspect"))
