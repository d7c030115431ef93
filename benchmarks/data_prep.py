"""Measures the data pipeline and prints the tables of benchmarks/data_prep.md.

    python -m benchmarks.data_prep duplicates              # recall and precision on planted near-duplicates
    python -m benchmarks.data_prep languages lid.jsonl     # accuracy; lines {text, lang, set}
    python -m benchmarks.data_prep speed DATASET           # MB/s of each step on one core, with DATASET's tokenizer
    python -m benchmarks.data_prep cost DATASET zh.jsonl en.jsonl 25 50 100 200    # whole preparations of so many MB
    python -m benchmarks.data_prep memory DATASET 200000x90 400000x90 48x2000000     # one file of so many documents
    python -m benchmarks.data_prep start DATASET           # opening a dataset of 1 TB (sparse files)

Times are of the processor, which a shared machine does not falsify.
"""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.clean import clean_text, duplicate_key
from data_prep.config import SamplingConfig
from data_prep.dataset import Dataset
from data_prep.language import detect_language
from data_prep.manifest import Manifest, ShardInfo
from data_prep.personal import mask_personal
from data_prep.quality import figures
from data_prep.samples import Sampler
from data_prep.shards import MAGIC
from data_prep.shingles import by_characters, by_words
from data_prep.signatures import Signer, compact, similarity
from data_prep.sources import BUNDLED
from data_prep.tokenizer import Tokenizer

RATES = (0.01, 0.05, 0.1, 0.2)
BATCH = 64
STAGES = ("clean", "match", "decide", "learn", "tokenise", "finish")


def texts(lang: str) -> list[str]:
    """The embedded corpus in one language."""
    with gzip.open(BUNDLED / f"{lang}.jsonl.gz", "rt", encoding="utf-8") as packed:
        return [json.loads(line)["text"] for line in packed]


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def duplicates() -> None:
    """Copies with units replaced at each rate among originals: pairs found of those planted, and found wrongly."""
    for threshold, signer in ((0.7, Signer()), (0.3, Signer(bands=40, rows=3))):
        print(f"\nsimilarity {threshold}, {signer.bands} bands of {signer.rows} rows\n")
        _duplicates(threshold, signer)


def _duplicates(threshold: float, signer: Signer) -> None:
    rows: list[tuple[object, ...]] = []
    for lang in ("zh", "en"):
        chinese = lang == "zh"
        originals = [text for text in texts(lang) if len(text) > 1000]
        for rate in RATES:
            copies = [edited(text, rate, number, not chinese) for number, text in enumerate(originals)]
            every = originals + copies
            minima, _ = signer.sign(every, [chinese] * len(every))
            cut = by_characters if chinese else by_words
            hashes, owner = cut(every, 5)
            sets = [set(part.tolist()) for part in np.split(hashes, np.flatnonzero(np.diff(owner)) + 1)]
            buckets = signer.band_hashes(minima)
            pairs: set[tuple[int, int]] = set()
            for band in buckets:
                order = np.argsort(band, kind="stable")
                for a, b in pairwise(order):
                    if band[a] == band[b]:
                        pairs.add((min(a, b), max(a, b)))
            candidates = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
            small = compact(minima)
            found = candidates[similarity(small[candidates[:, 0]], small[candidates[:, 1]]) >= threshold]
            n = len(originals)
            planted = sum(int(b - a == n) for a, b in found)
            jaccard = [len(sets[k] & sets[k + n]) / len(sets[k] | sets[k + n]) for k in range(n)]
            above = sum(value >= threshold for value in jaccard)
            true = sum(len(sets[a] & sets[b]) / len(sets[a] | sets[b]) > threshold - 0.1 for a, b in found)
            precision = f"{true / len(found):.1%}" if len(found) else "–"
            mean = float(np.mean(jaccard))
            rows.append(
                (lang, f"{rate:.0%}", n, f"{mean:.2f}", above, f"{planted / n:.1%}", precision, len(found) - planted)
            )
    header = (
        "lang",
        "edits",
        "planted",
        "mean similarity",
        "of these at or over it",
        "found",
        "precision",
        "other pairs found",
    )
    table(header, rows)


def edited(text: str, rate: float, seed: int, words: bool) -> str:
    """The text with a share of its words or characters replaced by others of the same text."""
    generator = random.Random(seed)
    units = text.split(" ") if words else list(text)
    return (" " if words else "").join(u if generator.random() >= rate else generator.choice(units) for u in units)


def languages(path: str) -> None:
    """Accuracy by set."""
    right: Counter[tuple[str, str]] = Counter()
    every: Counter[tuple[str, str]] = Counter()
    wrong: dict[tuple[str, str], Counter[str]] = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            one = json.loads(line)
            key = (one["lang"], one["set"])
            found = detect_language(one["text"])
            every[key] += 1
            right[key] += found == one["lang"]
            if found != one["lang"]:
                wrong.setdefault(key, Counter())[found] += 1
    rows: list[tuple[object, ...]] = [
        (lang, name, every[lang, name], f"{right[lang, name] / every[lang, name]:.1%}", _said(wrong.get((lang, name))))
        for lang, name in sorted(every)
    ]
    rows.append(("all", "", sum(every.values()), f"{sum(right.values()) / sum(every.values()):.1%}", ""))
    table(("language", "set", "documents", "right", "taken for"), rows)


def _said(wrong: Counter[str] | None) -> str:
    return ", ".join(f"{lang} {count}" for lang, count in wrong.most_common()) if wrong else ""


def speed(folder: str) -> None:
    """MB/s of each step, best of three rounds."""
    tokenizer = Tokenizer.load(folder)
    signer = Signer()
    rows: list[tuple[object, ...]] = []
    for lang in ("zh", "en"):
        documents = texts(lang)
        size = sum(len(text.encode()) for text in documents)
        parts = [documents[n : n + BATCH] for n in range(0, len(documents), BATCH)]

        def sign(parts: list[list[str]] = parts, lang: str = lang) -> None:
            for part in parts:
                minima, _ = signer.sign(part, [lang == "zh"] * len(part))
                signer.band_hashes(minima)
                compact(minima)

        steps: dict[str, Callable[[], object]] = {
            "normalise": lambda d=documents: [clean_text(text) for text in d],
            "duplicate key": lambda d=documents: [duplicate_key(text) for text in d],
            "language": lambda d=documents: [detect_language(text) for text in d],
            "quality": lambda d=documents, la=lang: [figures(text, la) for text in d],
            "personal data": lambda d=documents: [mask_personal(text) for text in d],
            "near-duplicate signatures": sign,
            "tokenise": lambda d=documents: tokenizer.encode_batch(d),
        }
        for name, step in steps.items():
            taken = min(_seconds(step) for _ in range(3))
            more = ""
            if name == "tokenise":
                tokens = sum(map(len, tokenizer.encode_batch(documents)))
                more = f"{tokens / taken / 1e6:.1f} M tokens/s"
            rows.append((lang, name, f"{size / taken / 1e6:.0f}", more))
    table(("lang", "step", "MB/s", ""), rows)


def _seconds(step: Callable[[], object]) -> float:
    before = time.process_time()
    step()
    return time.process_time() - before


def cost(folder: str, zh: str, en: str, *megabytes: str) -> None:
    """Whole preparations with `data=web`, two workers and the tokenizer of `folder`: each stage's CPU, and memory.

    Memory is what all processes hold together (pages that they share are counted in each).
    """
    header = ("text MB", "kept", "kept aside", "M tokens", *STAGES, "CPU s", "MB / CPU s", "folder MB")
    rows: list[tuple[object, ...]] = []
    for wanted in map(int, megabytes):
        with tempfile.TemporaryDirectory() as place:
            files = [(Path(path), Path(place) / f"{lang}.jsonl") for path, lang in ((zh, "zh"), (en, "en"))]
            size = sum(_head(source, target, wanted * 500_000) for source, target in files) / 1e6
            out = Path(place) / "out"
            words = [f"data.sources=[{place}/zh.jsonl,{place}/en.jsonl]", f"data.path={out}", "data=web"]
            words += [f"tokenizer.path={folder}", "tokenizer.threads=1", "data.pipeline.workers=2"]
            cpu, memory = _watched([sys.executable, "-m", "data_prep", *words], out / ".work" / "logs")
            manifest = Manifest.read(out)
            counts = manifest.counts("train").plus(manifest.counts("valid")).plus(manifest.counts("test"))
            written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            refused = sum(sum(reasons.values()) for reasons in manifest.rejected.values())
        stages = (f"{cpu[stage]:.0f} s, {memory[stage] / 2**20:.0f} MiB" for stage in STAGES)
        row = f"{size:.0f}", f"{counts.documents:,}", f"{refused:,}", f"{counts.tokens / 1e6:.1f}", *stages
        total = sum(cpu.values())
        rows.append((*row, f"{total:.0f}", f"{size / total:.1f}", f"{written / 1e6:.0f}"))
        print(rows[-1], file=sys.stderr, flush=True)
    table(header, rows)


def memory(folder: str, *shapes: str) -> None:
    """What each stage holds when one file has so many Chinese documents of so many characters, COUNTxCHARACTERS.

    Their characters are drawn from the embedded corpus, so that no two documents are alike.
    """
    characters = np.array(list("".join(texts("zh"))))
    rows: list[tuple[object, ...]] = []
    for shape in shapes:
        count, size = map(int, shape.split("x"))
        with tempfile.TemporaryDirectory() as place:
            random_ = np.random.default_rng(0)
            with open(Path(place) / "zh.jsonl", "w", encoding="utf-8") as file:
                for _ in range(count):
                    text = "".join(characters[random_.integers(0, len(characters), size)])
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            out = Path(place) / "out"
            words = [f"data.sources=[{place}/zh.jsonl]", f"data.path={out}", f"tokenizer.path={folder}"]
            words += ["data.cleaning.near_duplicates=true", "tokenizer.threads=1", "data.pipeline.workers=1"]
            cpu, held = _watched([sys.executable, "-m", "data_prep", *words], out / ".work" / "logs")
        rows.append((f"{count:,}", f"{size:,}", *(f"{cpu[s]:.0f} s, {held[s] / 2**20:.0f} MiB" for s in STAGES)))
        print(rows[-1], file=sys.stderr, flush=True)
    table(("documents", "characters each", *STAGES), rows)


def _watched(command: list[str], logs: Path) -> tuple[Counter[str], Counter[str]]:
    """Run a preparation; CPU seconds and most resident bytes of its processes, by stage.

    A stage lasts from the moment its folder of logs appears; the start-up counts as the first one's.
    """
    cpu, memory = Counter[str](), Counter[str]()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        spent = 0.0
        stage = STAGES[0]
        while process.poll() is None:
            time.sleep(0.05)
            seen, resident = _tree(process.pid)
            # A process that ended between two looks is counted once its parent has waited for it.
            cpu[stage] += max(0.0, seen - spent)
            spent = max(spent, seen)
            memory[stage] = max(memory[stage], resident)
            stage = next((name for name in reversed(STAGES) if (logs / name).exists()), stage)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return cpu, memory


def _tree(root: int) -> tuple[float, int]:
    """CPU seconds (of the dead waited for too) and resident bytes of a process and all below it."""
    processes: dict[int, tuple[int, float, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # Behind the name: state, parent, …; 11 to 14 are user and system time, own and of children; 21 is pages.
        times = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        processes[int(path.parent.name)] = int(fields[1]), times, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    ours, seconds, resident = {root}, 0.0, 0
    for number in sorted(processes):
        parent, times, size = processes[number]
        if number in ours or parent in ours:
            ours.add(number)
            seconds, resident = seconds + times, resident + size
    return seconds, resident


def _head(source: Path, target: Path, size: int) -> int:
    """The first documents of a file up to a size of text; returns their text's bytes."""
    taken = 0
    with open(source, "rb") as lines, open(target, "wb") as out:
        for line in _whole(lines):
            taken += len(json.loads(line)["text"].encode())
            out.write(line)
            if taken >= size:
                break
    return taken


def _whole(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines that end."""
    return (line for line in lines if line.endswith(b"\n"))


def start(folder: str) -> None:
    """Open a dataset of 1 TB whose files are sparse, and build its sampler and first sample."""
    shards, tokens, documents = 466, 1 << 30, 1 << 20
    with tempfile.TemporaryDirectory() as place:
        target = Path(place)
        manifest = Manifest.read(Path(folder))
        os.symlink(Path(folder).absolute() / "tokenizer", target / "tokenizer")
        os.symlink(Path(folder).absolute() / "unigram.npy", target / "unigram.npy")
        (target / "train").mkdir()
        stream = manifest.sources[0]
        stream.shards = []
        for number in range(shards):
            name = f"train/{stream.key}-{number:05d}"
            with open(target / f"{name}.bin", "wb") as file:
                file.truncate(tokens * 2)
            with open(target / f"{name}.idx", "wb") as file:
                head = (
                    MAGIC
                    + np.array([1], "<u8").tobytes()
                    + b"\x08"
                    + np.array([documents, documents + 1], "<u8").tobytes()
                )
                file.write(head)
                file.seek(len(head) + 4 * (documents - 1))
                file.write(np.array([tokens // documents], "<i4").tobytes())
                file.seek(len(head) + 12 * documents - 8)
                file.write(np.array([(tokens - tokens // documents) * 2], "<i8").tobytes())
                file.truncate(len(head) + 12 * documents + 8 * (documents + 1))
            stream.shards.append(ShardInfo(name, "train", tokens * 2, tokens, documents, "0" * 32, "0" * 32))
        manifest.sources = [stream]
        manifest.write(target)
        size = (target / "manifest.json").stat().st_size
        begin, cpu = time.perf_counter(), time.process_time()
        sampler = Sampler(Dataset.open(target), SamplingConfig(), 2048, seed=1)
        sampler.sample(0)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    total = shards * tokens
    row = (shards, f"{total / 1e9:.0f}", f"{total * 2 / 1e12:.2f}", f"{size / 1e6:.2f}", f"{wall:.2f}", f"{cpu:.2f}")
    table(("shards", "G tokens", "TB", "manifest MB", "wall s", "CPU s"), [row])


if __name__ == "__main__":
    known: dict[str, Callable[..., None]] = {f.__name__: f for f in (duplicates, languages, speed, cost, memory, start)}
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(str(__doc__))
    known[sys.argv[1]](*sys.argv[2:])
