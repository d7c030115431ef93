"""Decoding on one GPU: tokens a second beside transformers, on the same weights in the same run.

    python -m benchmarks.decode                      # writes benchmarks/decode.csv, a row as soon as it is measured
    python -m benchmarks.decode --shape toy --new 24 # a minute on a CPU: does it run?
    python -m benchmarks.decode --profile            # and prints where a step's time goes

Two models at 24 layers of 2048, heads of 128, gated FFN 5504, vocabulary 50304 (1.4 B parameters), random weights:
`llama`, causal and pre-norm, which transformers' LlamaForCausalLM computes too; and `glm`, GLM-130B's layer, filling a
[gMASK]. First, at toy size: greedy text with the cache must equal text without it, and what transformers writes on the
exported weights (fp32); cached logits in half precision, and those of integer weights, must be near the references'. A
failed check ends with status 1 and times nothing.

Tokens a second are those of decoding: of two calls, one `--new` tokens long and one of an eighth of that, the
difference, so that prefill, capture and compilation do not count. Ours is `train.generation.blanks.fill_all`, theirs
`generate` with a static cache, which it compiles with CUDA graphs by itself; all greedy. Bytes a step: the weights that
it reads, and the keys and values of a row of mean length. The limit is the card's own copy rate.
"""

import argparse
import copy
import csv
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_models import Ids, greedy_without_cache, model_of, text_for, theirs_of, with_kernels
from benchmarks.step import device, versions
from benchmarks.step_worker import SHAPES, Shape, measure_ceilings
from train import backend
from train.generation.blanks import fill_all
from train.generation.decoder import Decoder
from train.generation.picking import Decoding
from train.model.build import DTYPES, Model
from train.model.quantised import quantise_model, weight_bytes

FIELDS = (
    "model",
    "who",
    "weights",
    "batch",
    "tokens_per_second",
    "x_transformers",
    "x_half",
    "step_ms",
    "bare_step_ms",
)
FIELDS += ("gb_a_step", "share_of_limit", "same_tokens", "first_call_s", "copy_gb_per_s")
Call = Callable[[int], list[list[int]]]
"""New tokens asked for -> those written, a row each."""


def main() -> int:
    """Check, measure, write; 1 where the check failed."""
    options = parse(sys.argv[1:])
    began, place = time.perf_counter(), backend.device()
    problem = check(place, options.dtype)
    if problem:
        print(problem, file=sys.stderr)
        return 1
    print(f"checks passed after {time.perf_counter() - began:.0f} s", flush=True)
    copied = None if place.type == "cpu" else measure_ceilings()["copy_gb_per_s"]
    table = Table(options, copied)
    shape = SHAPES[options.shape]
    # Ours first: what a peer's compiler takes must not keep them from being measured.
    for form in ("llama", "glm"):
        model, ids = model_of(form, shape, place, options.dtype)
        forms: list[str | None] = [None, "int8", "int4"] if form == "llama" else [None, "int4"]
        for word in forms:
            one = copy.deepcopy(model) if word else model
            if word:
                quantise_model(one, word, None, "auto")
            for batch in options.batch:
                table.add(ours(form, one, ids, word or options.dtype, batch, shape, options))
            del one
        if form == "llama":
            peer = theirs_of(form, model, ids)
        del model
    for batch in options.batch:
        table.add(transformers_row(peer, ids, batch, shape, options))
    print(f"done after {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["anchor", "toy"], default="anchor")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=128, help="tokens before the first new one (default 128)")
    parser.add_argument("--new", type=int, default=256, help="tokens of the long call (default 256)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16" if device()[:3] != "CPU" else "fp32")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each length; their median counts (default 3)")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step of each of our rows")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args(words)
    if options.shape == "toy":
        options.context = min(options.context, SHAPES["toy"].slots - options.new - 4)
    return options


class Table:
    """The CSV, written anew with each row."""

    def __init__(self, options: argparse.Namespace, copied: float | None) -> None:
        command = " ".join(["python -m benchmarks.decode", *sys.argv[1:]])
        self.heading = f"# {device()}, {versions()}; {command}; context {options.context}, {SHAPES[options.shape]}"
        self.path, self.copied, self.rows = options.output, copied, list[dict[str, Any]]()

    def add(self, row: dict[str, Any]) -> None:
        """One more row; ratios are filled in where the other row is there."""
        row["copy_gb_per_s"] = self.copied
        if self.copied:
            row["share_of_limit"] = round(row["gb_a_step"] / self.copied / row["step_ms"] * 1e3, 3)
        self.rows.append(row)
        for one in self.rows:
            plain = [other for other in self._beside(one) if other["weights"] == self.rows[0]["weights"]]
            rate = {other["who"]: other["tokens_per_second"] for other in plain}
            half, peer = rate.get("tiankong"), rate.get("transformers")
            one["x_half"] = round(one["tokens_per_second"] / half, 3) if half and one["who"] == "tiankong" else None
            one["x_transformers"] = round(one["tokens_per_second"] / peer, 3) if peer else None
        print({name: row.get(name) for name in FIELDS}, flush=True)
        with self.path.open("w", newline="") as file:
            file.write(self.heading + "\n")
            table = csv.DictWriter(file, FIELDS, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)

    def _beside(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        return [other for other in self.rows if (other["model"], other["batch"]) == (row["model"], row["batch"])]


def ours(
    form: str, model: Model, ids: Ids, weights: str, batch: int, shape: Shape, options: argparse.Namespace
) -> dict[str, Any]:
    """A row of this project: the whole call, and steps alone whose tokens never leave the device."""
    texts = text_for(form, ids, batch, options.context)

    def call(new: int) -> list[list[int]]:
        return [blanks[0] for blanks in fill_all(model, ids, texts, Decoding(new), causal=form == "llama")]

    row = timed(call, options, form, batch)
    decoder = Decoder(model, batch, options.context + options.new + 2)
    decoder.begin([text[:-1] for text in texts], causal=form == "llama")
    tokens = torch.zeros(batch, dtype=torch.int64, device=decoder.device)
    positions = torch.zeros(batch, 2, dtype=torch.int64, device=decoder.device)

    def steps(count: int) -> None:
        nonlocal tokens
        for _ in range(count):
            positions[:, 0] = decoder.lengths
            tokens = decoder.step(tokens, positions).argmax(-1)
        backend.synchronize()

    steps(4)
    began, count = time.perf_counter(), options.new - 8
    steps(count)
    row["bare_step_ms"] = round(1e3 * (time.perf_counter() - began) / count, 3)
    if options.profile:
        print(profile(lambda: steps(1)), flush=True)
    read = weight_bytes(model.items[1:-1]) + weight_bytes(model.items[-1:])
    size = DTYPES[options.dtype].itemsize
    cached = 2 * batch * (options.context + options.new / 2) * shape.layers * shape.hidden * size
    row["gb_a_step"] = round((read + cached) / 1e9, 6)
    return {"model": form, "who": "tiankong", "weights": weights, "batch": batch} | row


def transformers_row(peer: Any, ids: Ids, batch: int, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """A row of transformers' LlamaForCausalLM: one static cache, one compiled step, reused by all calls."""
    from transformers import StaticCache

    torch._dynamo.reset()
    texts = text_for("llama", ids, batch, options.context)
    asked = torch.tensor([[ids.sop, *text[:-1]] for text in texts], device=peer.device)
    cache = StaticCache(config=peer.config, max_cache_len=asked.shape[1] + options.new)

    def call(new: int) -> list[list[int]]:
        cache.reset()
        found = peer.generate(
            asked, attention_mask=torch.ones_like(asked), past_key_values=cache, max_new_tokens=new, do_sample=False
        )
        return found[:, asked.shape[1] :].tolist()

    row = timed(call, options, "llama", batch)
    read = sum(tensor.numel() * tensor.element_size() for tensor in peer.parameters())
    table = peer.get_input_embeddings().weight
    cached = 2 * batch * (options.context + options.new / 2) * shape.layers * shape.hidden * table.element_size()
    row["gb_a_step"] = round((read - table.numel() * table.element_size() + cached) / 1e9, 6)
    return {"model": "llama", "who": "transformers", "weights": options.dtype, "batch": batch} | row


written: dict[tuple[str, int], list[list[int]]] = {}
"""By model and batch, what the first contender wrote: how far later ones agree."""


def timed(call: Call, options: argparse.Namespace, form: str, batch: int) -> dict[str, Any]:
    """Tokens a second of decoding, from calls of two lengths."""
    short = max(2, options.new // 8)
    began = time.perf_counter()
    found = call(options.new)
    first = time.perf_counter() - began
    call(short)
    seconds = {}
    for length in (options.new, short):
        times = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            call(length)
            times.append(time.perf_counter() - began)
        seconds[length] = sorted(times)[len(times) // 2]
    step = (seconds[options.new] - seconds[short]) / (options.new - short)
    wanted = written.setdefault((form, batch), found)
    same = [agreeing(one, other) for one, other in zip(found, wanted, strict=True)]
    return {
        "tokens_per_second": round(batch / step, 1),
        "step_ms": round(1e3 * step, 3),
        "same_tokens": f"{min(same)}-{max(same)}",
        "first_call_s": round(first, 1),
    }


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that two texts share."""
    pairs = list(zip(one, other, strict=True))
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))


def check(place: torch.device, half: str) -> str | None:
    """Hold decoding to independent computations at toy size; what differs, or None."""
    shape, new = SHAPES["toy"], 12
    for form in ("llama", "glm"):
        model, ids = model_of(form, shape, place, "fp32")
        peer = theirs_of(form, model, ids)
        texts = [[*text[: 9 + 7 * row], ids.gmask] for row, text in enumerate(text_for(form, ids, 3, 40))]
        causal = form == "llama"
        cached = [blanks[0] for blanks in fill_all(model, ids, texts, Decoding(new), causal=causal)]
        for text, found in zip(texts, cached, strict=True):
            start = [ids.sop, *text[:-1]] if causal else [*text, ids.sop]
            asked = torch.tensor([start], device=place)
            plain = greedy_without_cache(model, start, new, causal=causal)
            theirs = peer.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=new, do_sample=False)
            if not found == plain == theirs[0, len(start) :].tolist():
                return (
                    f"{form}: cached {found}, without a cache {plain}, transformers {theirs[0, len(start) :].tolist()}"
                )
        print(f"{form}: greedy text equals that without a cache and transformers' (fp32)", flush=True)
        # Half precision and integers: the fused step against the references, same weights, same tokens.
        for word in (None, "int8", "int4"):
            one, ids = model_of(form, shape, place, half)
            two = with_kernels(one, "reference")
            for each, kernel in ((one, "auto"), (two, "reference")):
                if word:
                    quantise_model(each, word, None, kernel)
            worst = max(step_difference(one, two, texts[0][:-1], rows, causal) for rows in (1, 6))
            print(f"{form}, {word or half}: cached logits differ from the references by {worst:.1e}", flush=True)
            # bf16 keeps 8 bits: correct ways to round differ by less than this after two layers, wrong sums by more.
            if not worst < 3e-2:
                return f"{form}, {word or half}: the fused step differs from the references by {worst:.2e}"
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


def profile(function: Callable[[], None]) -> str:
    """The kernels of one call by their time on the device."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with record(activities=kinds) as found:
        function()
    events = found.key_averages()
    order = "device_time_total" if torch.cuda.is_available() else "cpu_time_total"
    return str(events.table(sort_by=order, row_limit=16, max_name_column_width=50))


if __name__ == "__main__":
    raise SystemExit(main())
