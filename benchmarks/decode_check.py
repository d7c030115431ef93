"""`python -m benchmarks.decode_check llama bf16`: decoding held to independent computations, at toy size.

Greedy text with the cache must equal text without it, and what transformers writes on the exported weights (fp32).
Draws must be the same in a second call, and alone as in a batch. Cached logits in half precision, and those of integer
weights, must be near those of the PyTorch references.
"""

import sys
from collections.abc import Sequence

import torch

from benchmarks.decode_models import greedy_without_cache, model_of, text_for, theirs_of, with_kernels
from benchmarks.step_worker import SHAPES
from train import backend
from train.generation.blanks import fill_all
from train.generation.decoder import Decoder
from train.generation.picking import Decoding
from train.model.build import Model
from train.model.quantised import quantise_model

NEW = 12
"""Tokens that are written."""
WORST = 3e-2
"""bf16 keeps 8 bits: correct ways to round differ by less than this after two layers, wrong sums by more."""


def main() -> int:
    """Check one form; 1 where something differs."""
    form, half = sys.argv[1:]
    problem = check_texts(form) or check_logits(form, half)
    if problem:
        print(f"{form}: {problem}", flush=True)
    return int(problem is not None)


def check_texts(form: str) -> str | None:
    """Texts in fp32, greedy ones and draws; what differs, or None."""
    place, causal = backend.device(), form == "llama"
    model, ids = model_of(form, SHAPES["toy"], place, "fp32")
    peer = theirs_of(form, model, ids)
    texts = [[*text[: 9 + 7 * row], ids.gmask] for row, text in enumerate(text_for(form, ids, 3, 40))]
    cached = [blanks[0] for blanks in fill_all(model, ids, texts, Decoding(NEW), causal=causal)]
    for text, found in zip(texts, cached, strict=True):
        start = [ids.sop, *text[:-1]] if causal else [*text, ids.sop]
        asked = torch.tensor([start], device=place)
        plain = greedy_without_cache(model, start, NEW, causal=causal)
        theirs = peer.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW, do_sample=False)
        theirs = theirs[0, len(start) :].tolist()
        if not found == plain == theirs:
            return f"cached {found}, without a cache {plain}, transformers {theirs}"
    print(f"{form}: greedy text equals that without a cache and transformers' (fp32)", flush=True)
    how = Decoding(NEW, temperature=0.8, top_k=50, top_p=0.9, seed=3)
    drawn = fill_all(model, ids, texts, how, causal=causal)
    again = fill_all(model, ids, texts, how, causal=causal)
    alone = [fill_all(model, ids, [text], how, causal=causal, numbers=[row])[0] for row, text in enumerate(texts)]
    if not drawn == again == alone:
        return f"drawn {drawn}, again {again}, alone {alone}"
    print(f"{form}: draws are the same again, and alone", flush=True)
    return None


def check_logits(form: str, half: str) -> str | None:
    """Half precision and integers: the fused step against the references, same weights, same tokens."""
    for word in (None, "int8", "int4"):
        one, ids = model_of(form, SHAPES["toy"], backend.device(), half)
        two = with_kernels(one, "reference")
        for each, kernel in ((one, "auto"), (two, "reference")):
            if word:
                quantise_model(each, word, None, kernel)
        context = text_for(form, ids, 1, 10)[0][:-1]
        worst = max(step_difference(one, two, context, rows, form == "llama") for rows in (1, 6))
        print(f"{form}, {word or half}: cached logits differ from the references by {worst:.1e}", flush=True)
        if not worst < WORST:
            return f"{word or half}: the fused step differs from the references by {worst:.2e}"
    return None


def step_difference(one: Model, two: Model, context: Sequence[int], rows: int, causal: bool) -> float:
    """Relative difference of the logits of three steps of `rows` rows."""
    decoders = [Decoder(model, rows, len(context) + 8) for model in (one, two)]
    differences = []
    for decoder in decoders:
        decoder.begin([context] * rows, causal=causal)
    for number in range(3):
        tokens = torch.arange(rows, device=decoders[0].device) + 5 + number
        positions = torch.stack([decoders[0].lengths, torch.zeros_like(tokens)], 1)
        a, b = (decoder.step(tokens, positions) for decoder in decoders)
        differences.append(float((a - b).norm() / b.norm()))
    return max(differences)


if __name__ == "__main__":
    raise SystemExit(main())
