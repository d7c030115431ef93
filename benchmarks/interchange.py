"""Export and import of a model of a billion parameters: time beside a plain copy, memory beside the largest tensor.

    python -m benchmarks.interchange [folder for 8 GB of scratch files]

Each conversion is a process of its own. Its memory is the largest resident set less that of the same command on a model
with next to no weights, so libraries do not count; pages of mapped files do. The copy reads the same bytes and flushes
them to the same disk. A round trip must give back the same checksums. Writes interchange.md beside this file.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_prep.tokenizer import Tokenizer
from train.checkpoint.select import read_manifest
from train.checkpoint.tensor_file import Spec
from train.cli import compose_train
from train.config import ModelConfig
from train.convert.mapping import layouts
from train.convert.native import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CASES = (("glm_130b", 2), ("huggingface", 1))
"""Format and tensor-parallel size."""
START_UP = 4.0
"""CPU seconds before anything is read, on the machine of the committed table."""


_MEASURED = """
import re, sys, time
from data_prep import cli
from train.convert.__main__ import main
from train.convert.config import ConvertConfig
status = cli.run("convert", ConvertConfig, main, program="train.convert")
# Of this program alone: what wait4 reports includes the memory of the process that started it.
print(time.process_time(), re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(status)
"""


@dataclass(frozen=True)
class Cost:
    """What a process took: wall and CPU seconds, and the largest resident set in bytes."""

    seconds: float
    cpu_seconds: float
    peak: int


def main() -> int:
    """Measure and write the page."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        scratch = Path(name)
        large = compose_train(["data.path=unknown", "model=1b", "model.num_layers=17"]).model
        small = replace(large, num_layers=1, hidden_size=64, num_heads=2, ffn_hidden_size=64, padded_vocab_size=50304)
        sources = {size: _checkpoint(scratch / size, model) for size, model in (("large", large), ("small", small))}
        bytes_ = sum(path.stat().st_size for path in (sources["large"] / "model").iterdir())
        largest = max(torch.Size(layout.full_shape).numel() for layout in layouts(large).values()) * 2
        rows = []
        for form, ranks in CASES:
            words = [f"format={form}", f"tensor_parallel={ranks}"]
            idle = [_convert(sources["small"], scratch / "small-away", words)]
            idle.append(_convert(scratch / "small-away", scratch / "small-home", words))
            copied = _copy(sources["large"] / "model", scratch / "copy")
            costs = [_convert(sources["large"], scratch / "away", words)]
            costs.append(_convert(scratch / "away", scratch / "home", words))
            assert _weights(scratch / "home") == _weights(sources["large"]), f"{form}: the round trip is not exact"
            for way, cost, base in zip(("export", "import"), costs, idle, strict=True):
                extra = cost.peak - base.peak
                rows.append(
                    f"| {form}, {ranks} rank(s) | {way} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {copied:.1f} | "
                    f"{extra / 1e6:,.0f} | {extra / largest:.2f} |"
                )
                print(rows[-1], flush=True)
            for left in ("small-away", "small-home", "away", "home", "copy"):
                shutil.rmtree(scratch / left)
    text = _page(rows, bytes_, largest)
    (Path(__file__).parent / "interchange.md").write_text(text, encoding="utf-8")
    return 0


def _checkpoint(folder: Path, model: ModelConfig) -> Path:
    """A checkpoint of fp16 weights."""
    config = compose_train(["data.path=unknown", "precision=fp16"])
    config.model, config.sequence_length = model, model.max_positions
    specs = [Spec(name, layout.full_shape, torch.float16) for name, layout in layouts(model).items()]
    # A million values over and over, each time from another place: quick to make, and no two tensors are alike.
    values = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)).half()
    places = {spec.key: number for number, spec in enumerate(specs)}

    def draw(spec: Spec) -> torch.Tensor:
        rolled = values.roll(7919 * places[spec.key])
        return rolled.repeat(-(-spec.numel // len(values)))[: spec.numel].view(spec.shape)

    folder.mkdir()
    write_checkpoint(folder, config, Tokenizer.load(ROOT / "data" / "sample"), specs, draw, 5e9, {})
    return folder


def _convert(source: Path, target: Path, words: list[str]) -> Cost:
    command = [sys.executable, "-c", _MEASURED, f"source={source}", f"target={target}", *words]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - began
    cpu, peak = done.stdout.split()[-2:]
    return Cost(seconds, float(cpu), int(peak) * 1024)


def _copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy that ends on the disk."""
    began = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def _weights(checkpoint: Path) -> dict[str, str]:
    files = read_manifest(checkpoint)["files"]
    return {name: entry["checksum"] for name, entry in files.items() if name.startswith("model/")}


def _page(rows: list[str], size: int, largest: int) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"""# Interchange

Written by `python -m benchmarks.interchange`: a billion parameters (`model=1b` with 17 layers), {size / 1e9:.2f} GB of
fp16 weights, largest tensor {largest / 1e6:.0f} MB. {cpu}, {os.cpu_count()} cores that others were using (load
average {load}); Python {platform.python_version()}, torch {torch.__version__}. Every round trip gave back the same
checksums.

| format | way | seconds | CPU seconds | seconds of a plain copy | extra memory, MB | of the largest tensor |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Extra memory is the largest resident set beyond that of the same command on a model of next to no weights. An export
reads its source twice, once for its checksums; an import computes the checksums of what it writes. CPU seconds include
start-up, about {START_UP:.0f}.
"""


if __name__ == "__main__":
    sys.exit(main())
