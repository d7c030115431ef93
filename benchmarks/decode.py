"""Decoding on one GPU: tokens a second beside transformers, on the same weights in the same run.

    python -m benchmarks.decode                      # writes benchmarks/decode.csv, a row as soon as it is measured
    python -m benchmarks.decode --shape toy --new 24 # a minute on a CPU: does it run?
    python -m benchmarks.decode --profile            # and prints where a step's time goes
    python -m benchmarks.decode --budget 180         # leaves out what would begin later than so many seconds

Two models at 24 layers of 2048, heads of 128, gated FFN 5504, vocabulary 50304 (1.4 B parameters), random weights:
`llama`, causal and pre-norm, which transformers' LlamaForCausalLM computes too; and `glm`, GLM-130B's layer, filling a
[gMASK]. First, side by side: the GPU tests of decoding's kernels (on a CPU they are `make test`'s), and
`benchmarks.decode_check` at toy size. A failed one ends with status 1 and times nothing.

Tokens a second are those of decoding, without prefill, capture and compilation. Ours is
`train.generation.blanks.fill_all`: the time from when it tells of an eighth of `--new` tokens to the last. Theirs is
`generate` with a static cache, which it compiles with CUDA graphs by itself: what a call of `--new` tokens takes beyond
one of an eighth, and it captures in neither. All greedy; medians of `--repeats`. A bare step is one of ours whose
tokens nobody reads. Weights `int4 aten`: our loop with PyTorch's own product of INT4 weights (the one under torchao's),
groups of 128. Bytes a step: the weights that it reads, and the keys and values of a row of mean length. The limit is
the card's own copy rate.
"""

import argparse
import copy
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_models import Ids, aten_int4, model_of, text_for, theirs_of
from benchmarks.step import device, versions
from benchmarks.step_measure import measure_ceilings
from benchmarks.step_worker import SHAPES, Shape
from train import backend
from train.generation.blanks import fill_all
from train.generation.course import Course
from train.generation.decoder import Decoder
from train.generation.forms import Form
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
WEIGHTS: dict[tuple[str, int], tuple[str | None, ...]] = {
    ("llama", 1): (None, "int4", "int8", "int4 aten"),
    ("glm", 1): (None, "int4"),
    ("llama", 64): (None, "int4", "int4 aten"),
}
"""What is measured of a form at a batch size, other sizes as 64; None: `--dtype`."""


CHECK_SECONDS = 100.0
SHOWN = 40
"""Last lines of a check that are shown."""


def main() -> int:
    """Check, measure, write; 1 where a check failed."""
    options = parse(sys.argv[1:])
    began, place = time.perf_counter(), backend.device()

    def late(what: str) -> bool:
        if time.perf_counter() - began > options.budget:
            print(f"{what}: left out, {options.budget:.0f} s are over", flush=True)
            return True
        return False

    if not check(options.dtype, gpu=place.type == "cuda"):
        return 1
    print(f"checks passed after {time.perf_counter() - began:.0f} s", flush=True)
    copied = None if place.type == "cpu" else measure_ceilings()["copy_gb_per_s"]
    table, shape, peer = Table(options, copied), SHAPES[options.shape], None
    # Most wanted first, in case the budget ends: the form that has a peer, and one text.
    for form in ("llama", "glm"):
        for batch in sorted(options.batch):
            words = WEIGHTS.get((form, batch), WEIGHTS["llama", 64] if form == "llama" else ())
            if not words or late(f"{form}, batch {batch}"):
                continue
            model, ids = model_of(form, shape, place, options.dtype)
            for word in words:
                one = with_weights(model, word)
                if one is not None and not late(f"{form}, {word or options.dtype}, batch {batch}"):
                    table.add(ours(form, one, ids, word or options.dtype, batch, shape, options))
                del one
            if form == "llama" and not late(f"transformers, batch {batch}"):
                peer = peer or theirs_of(form, model, ids)
                table.add(transformers_row(peer, ids, batch, shape, options))
            del model
    print(f"done after {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def with_weights(model: Model, word: str | None) -> Model | None:
    """A copy of the model with such weights, itself for None; None where the device lacks the product."""
    if word is None:
        return model
    one = copy.deepcopy(model)
    if word == "int4 aten":
        try:
            return one if aten_int4(one) else None
        except RuntimeError as problem:
            print(f"{word}: {problem}", flush=True)
            return None
    quantise_model(one, word, None, "auto")
    return one


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
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
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

    heard = list[float]()

    def hear(text: int, *_: object) -> None:
        if text == 0:
            heard.append(time.perf_counter())

    def call(new: int) -> list[list[int]]:
        heard.clear()
        found = fill_all(model, ids, texts, Decoding(new), causal=form == "llama", on_token=hear)
        return [blanks[0] for blanks in found]

    row = timed(call, options, form, batch, heard)
    forms = [Form.of(text, ids, model.context.model, causal=form == "llama") for text in texts]
    decoder = Decoder(model, batch, options.context + options.new + 2)
    decoder.begin([one.context for one in forms], causal=form == "llama")
    run = Course(decoder, forms, ids, Decoding(options.new), range(batch)).start()

    def steps(count: int) -> None:
        for _ in range(count):
            run()
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


def timed(
    call: Call, options: argparse.Namespace, form: str, batch: int, heard: Sequence[float] | None = None
) -> dict[str, Any]:
    """Tokens a second of decoding. heard: when the last call had each token; without it, from calls of two lengths."""
    short = max(2, options.new // 8)
    began = time.perf_counter()
    found = call(options.new)
    first = time.perf_counter() - began
    if heard is None:
        call(short)
    steps = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        call(options.new)
        seconds = time.perf_counter() - began
        if heard is None:
            began = time.perf_counter()
            call(short)
            seconds -= time.perf_counter() - began
        else:
            seconds = heard[options.new - 1] - heard[short - 1]
        steps.append(seconds / (options.new - short))
    step = statistics.median(steps)
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


def check(half: str, *, gpu: bool) -> bool:
    """Run the checks side by side, since most of their time goes into compiling; whether all passed."""
    jobs = [[sys.executable, "-m", "benchmarks.decode_check", form, half] for form in ("llama", "glm")]
    if gpu:
        # Without the shared fixtures, which need what only the development install has.
        quiet = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest", "-m", "gpu"]
        for name, kind in (
            ("quantised_matmul", "8-dtype"),
            ("quantised_matmul", "not 8-dtype"),
            ("decode_attention", ""),
            ("greedy_step", ""),
        ):
            jobs.append([sys.executable, "-m", "pytest", *quiet, f"tests/kernels/test_{name}.py", "-k", kind])
    began = time.perf_counter()
    running = [subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for job in jobs]
    passed = True
    for job, process in zip(jobs, running, strict=True):
        late = False
        try:
            said, _ = process.communicate(timeout=max(1.0, CHECK_SECONDS - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            said = process.communicate()[0] + f"\nnot done after {CHECK_SECONDS} s: {' '.join(job[1:])}"
        print(*said.splitlines()[-SHOWN:], sep="\n", flush=True)
        # Tests that went well as far as they went (-x) may be late, the checks of whole models not.
        if process.returncode and not (late and "pytest" in job):
            print(f"failed: {' '.join(job[1:])}", file=sys.stderr, flush=True)
            passed = False
    return passed


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
