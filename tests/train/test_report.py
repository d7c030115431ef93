"""The report: whole from a run folder alone, safe with any text, and small."""

import json
import math
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_prep.errors import DataError
from train.charts import Series, line_chart, smoothed, tick_label
from train.report import mean_over_groups, write_report
from train.run_folder import RunFolder

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "model: {name: tiny, num_layers: 4, hidden_size: 256}\nmax_steps: 300\nprecision: {dtype: fp32}\n"
VOID = {"meta", "line", "circle", "path", "br"}


class Checker(HTMLParser):
    """Every tag closed in order; collects text and anything that would be loaded from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.outside: list[str] = []
        self.charts = 0
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [str(value) for name, value in attrs if name in ("src", "href", "data") and value]
        self.charts += tag == "svg"
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def part(loss: float) -> dict[str, float]:
    return {
        "loss": loss,
        "unigram_loss": 7.28,
        "targets": 1000,
        "bits_per_byte": loss / 3,
        "perplexity": math.exp(loss),
    }


def make_run(path: Path, steps: int = 300, **changes: object) -> Path:
    noise = random.Random(1)
    folder = RunFolder.open(path, resume=True)
    folder.write_config(CONFIG)
    folder.write_environment(world_size=2)
    for step in range(1, steps + 1):
        loss = 6.3 + 2.5 * math.exp(-step / 60) + noise.gauss(0, 0.1)
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": 1.0 + noise.random(),
            "lr": 1e-3 * min(1.0, step / 50),
            "loss_scale": 1.0,
            "consumed_samples": step * 2,
            "consumed_tokens": step * 512,
            "target_tokens": step * 250,
            "tokens_per_second": 3000 + noise.gauss(0, 50),
            "step_seconds": 0.17,
            "loss_by_group": {(group := noise.choice(["gmask/zh", "mask/en", "gmask/en"])): loss},
            "targets_by_group": {group: 250},
            **({"bubble": 0.2, "bubble_least": 0.1} if step % 10 == 0 else {}),
        }
        folder.append("metrics", [{**record, **changes}])
    for step in range(100, steps + 1, 100):
        split = {"by_kind": {"gmask": part(6.9), "mask": part(6.1)}, "by_language": {"zh": part(6.8), "en": part(6.4)}}
        folder.append("validation", [{"step": step, **part(6.7), **split}])
    folder.append("events", [{"id": 1, "step": 120, "kind": "spike", "seen": "loss 9.1", "action": "none"}])
    fill = {
        "kind": "mask",
        "blank": "[MASK]",
        "unigram": "的",
        "log_probability": -1.2,
        "unigram_log_probability": -9.8,
    }
    fills = [
        {**fill, "language": "zh", "before": "今天天气", "after": "，我们去公园。", "truth": "很好", "filled": "很好"},
        {**fill, "language": "en", "before": "<b>Men &", "after": "</main>", "truth": "a<b", "filled": ""},
    ]
    folder.write_json("fills.json", fills)
    memory = {"parameters": 3 * 2**30, "fragmentation": 2**20}
    folder.write_json(
        "memory.json", {"source": "measured", "rank": 1, "measured": memory, "predicted": {"parameters": 1e9}}
    )
    folder.close()
    return path


def test_the_page_has_everything_and_loads_nothing(tmp_path):
    target = write_report(make_run(tmp_path / "demo"))
    assert target == tmp_path / "demo" / "report.html"
    page = target.read_text()
    checked = Checker(page)
    assert checked.outside == []
    assert "url(" not in page
    assert "@import" not in page
    assert checked.charts == 8
    for words in (
        "Under the unigram baseline",
        "0.580",
        "nat; unigram 7.280",
        "all 300 steps done",
        "今天天气",
        "很好 ✓",
        "30 %",
        "1 in 18k",
        "2 ranks on",
        "spike",
        "attempt 1, started",
        "hidden_size: 256",
        "3 GiB",
        "1F1B at best",
        "954 MiB",
        "3k",
    ):
        assert words in checked.text, words
    assert "<b>Men" not in page
    assert len(page) < 400_000


def test_mfu_and_the_loss_scale_show_when_they_are_there(tmp_path):
    run = make_run(tmp_path, mfu=0.412, loss_scale=65536.0)
    (run / "config.yaml").write_text(CONFIG.replace("fp32", "fp16"))
    text = Checker(write_report(run).read_text()).text
    assert "41.2 %" in text
    assert "Loss scale" in text


def test_a_run_that_just_started_has_a_report_too(tmp_path):
    folder = RunFolder.open(tmp_path, resume=True)
    folder.write_config(CONFIG)
    folder.close()
    assert "step 0 of 300" in Checker(write_report(tmp_path).read_text()).text


def test_a_live_run_with_a_half_written_line_and_overflows(tmp_path):
    run = make_run(tmp_path, steps=40, loss=None, grad_norm=None)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    text = Checker(write_report(run).read_text()).text
    assert "step 40 of 300" in text


def test_resumed_runs_list_each_command(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.setenv("TIANKONG_COMMAND", "python -m launch resume.step=200")
    folder = RunFolder.open(run, resume=True)
    folder.write_config(CONFIG)
    folder.write_environment()
    folder.close()
    text = Checker(write_report(run).read_text()).text
    assert "attempt 2, resumed" in text
    assert "python -m launch resume.step=200" in text


def test_a_long_run_stays_a_small_page(tmp_path):
    make_run(tmp_path, steps=2)
    line = json.dumps({"step": 0, "loss": 7.0, "grad_norm": 1.0, "lr": 1e-4, "tokens_per_second": 1.0})
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 50_001):
            file.write(line.replace('"step": 0', f'"step": {step}') + "\n")
    assert write_report(tmp_path).stat().st_size < 300_000


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(DataError, match="no run here"):
        write_report(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    run = make_run(tmp_path)
    (run / "fills.json").write_text("[{")
    with pytest.raises(DataError, match=r"fills\.json"):
        write_report(run)


def test_the_command_line(tmp_path):
    run = make_run(tmp_path / "一 run (2)", steps=20)

    def report(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "train.report", f"run_dir={folder}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = report(run)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr
    missing = report(tmp_path / "none")
    assert missing.returncode == 3
    assert "no run here" in missing.stderr.splitlines()[-1]


def test_a_kinds_loss_is_a_mean_over_targets_not_over_groups():
    losses = {"gmask/zh": 2.0, "gmask/en": 6.0, "mask/en": 9.0, "mask/zh": None}
    record = {"loss_by_group": losses, "targets_by_group": {"gmask/zh": 300, "gmask/en": 100, "mask/en": 5}}
    assert mean_over_groups(record, 0, "gmask") == 3.0
    assert mean_over_groups(record, 1, "en") == pytest.approx((600 + 45) / 105)
    assert mean_over_groups(record, 0, "smask") is None


def test_charts_of_nothing_of_one_point_and_of_constants():
    assert line_chart("empty", [Series("a", [(1, None)], 1)]) == ""
    assert line_chart("none", []) == ""
    assert "<circle" in line_chart("one", [Series("a", [(5, 2.0)], 1, "dots")])
    assert "NaN" not in line_chart("same", [Series("a", [(1, 0.0), (2, 0.0)], 1)], log=True)


def test_a_gap_breaks_the_line():
    chart = line_chart("gap", [Series("a", [(1, 1.0), (2, 2.0), (3, None), (4, 1.0), (5, 2.0)], 1)])
    path = chart.split('class="line" d="')[1].split('"')[0]
    assert path.count("M") == 2


def test_smoothing_keeps_a_line_and_a_level():
    line = [(step, 2.0 * step) for step in range(1000)]
    for step, value in smoothed(line)[10:-10]:
        assert value == pytest.approx(2.0 * step, abs=2.1)
    assert {value for _, value in smoothed([(step, 3.0) for step in range(100)])} == {3.0}


@pytest.mark.parametrize("value, label", [(0, "0"), (1500, "1.5k"), (2e6, "2M"), (0.02, "0.02"), (3e-4, "3e-4")])
def test_tick_labels(value, label):
    assert tick_label(value) == label
