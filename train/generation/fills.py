"""A few blanks filled from held-out text, for the report: the model's words, the true ones, the unigram baseline's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.dataset import Stream
from data_prep.order import mix
from data_prep.samples import Sampler
from train.checkpoint.model import Trained, load_trained
from train.generation.blanks import fill
from train.generation.picking import Decoding
from train.generation.scoring import log_probability

CONTEXT_TOKENS = 48
"""Text on either side of a blank."""
LANGUAGES = ("zh", "en")


def fill_blanks(run_dir: Path, held_out: Sampler, count: int, device: torch.device) -> list[dict[str, Any]]:
    """`count` short blanks a language, at places fixed by the seed.

    Each: {language, kind, before, blank, after, truth, filled, unigram, log_probability, unigram_log_probability}, the
    last two of the truth, in nats.
    """
    trained = load_trained(run_dir, device)
    result = []
    # Rows of running text, also where the samples are packed documents.
    every = held_out.dataset.streams(held_out.split, held_out.sequence_length)
    texts = [stream for stream in every if isinstance(stream, Stream) and stream.rows]
    for language in LANGUAGES:
        streams = [stream for stream in texts if stream.info.lang == language]
        for number in range(count if streams else 0):
            generator = np.random.default_rng(mix(held_out.seed, 11, number, LANGUAGES.index(language)))
            stream = streams[int(generator.integers(len(streams)))]
            result.append(_one(trained, held_out, stream, generator, language))
    return result


def _one(
    trained: Trained, held_out: Sampler, stream: Stream, generator: np.random.Generator, language: str
) -> dict[str, Any]:
    tokenizer, dataset = trained.tokenizer, held_out.dataset
    row = stream.read_row(int(generator.integers(stream.rows)))
    side = min(CONTEXT_TOKENS, len(row) // 3, trained.config.model.max_positions // 4)
    length = int(generator.integers(1, 3))
    start = int(generator.integers(side, len(row) - side - length))
    truth = [int(token) for token in row[start : start + length]]
    before = [int(token) for token in row[start - side : start]]
    after = [int(token) for token in row[start + length : start + length + side]]
    context = [*before, tokenizer.mask, *after]
    nats = dataset.unigram_nats
    frequent = int(np.argmin(np.where(tokenizer.no_text, np.inf, nats)))
    filled = fill(trained.model, tokenizer, context, Decoding(max_new_tokens=8))[0]
    return {
        "language": language,
        "kind": "mask",
        "before": tokenizer.decode(before),
        "blank": "[MASK]",
        "after": tokenizer.decode(after),
        "truth": tokenizer.decode(truth),
        "filled": tokenizer.decode(filled),
        "unigram": tokenizer.decode([frequent] * length),
        "log_probability": log_probability(trained.model, tokenizer, context, truth),
        "unigram_log_probability": -float(nats[truth].sum()),
    }
