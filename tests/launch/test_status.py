"""The state of a run as others see it: table, page, token."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console

from data_prep.errors import ConfigError, DataError
from launch.status import Status, StatusConfig, main, rank_rows, terminal
from launch.status_page import make_server, page
from train.heartbeat import Beat

pytestmark = pytest.mark.unit


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of four ranks on two nodes: rank 2 is silent, 1 and 3 slow; a rank 4 is left of a larger attempt."""
    now = time.time()
    for rank in range(5):
        age, own = (95.0 if rank == 2 else 0.4), (0.9 if rank == 3 else 0.3)
        phase, collective = ("step", "all_reduce from train/mesh.py:70") if rank != 3 else ("data", None)
        speed = 0.6 if rank == 1 else 0.99
        start = {"imports": 2.0 + rank}
        beat = Beat(now - age, 12, phase, collective, now - 3, own, speed, 100 + rank, "host", start)
        file = tmp_path / "heartbeat" / f"rank_{rank}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(asdict(beat)).ljust(1023) + "\n")
    records = [
        {"step": step, "loss": 9 - step / 10, "tokens_per_second": 1200.0, "step_seconds": 0.5, "consumed_samples": 8}
        for step in range(1, 13)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    event = {"time": now, "step": 9, "kind": "node_lost", "seen": "node b is lost: <no word>", "action": "restarted"}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000020.partial").mkdir()
    job = {"state": "running", "attempt": 2, "nodes": {"a": [0, 1], "b": [2, 3]}, "spares": ["c"], "silent_seconds": 30}
    (tmp_path / "launch.json").write_text(json.dumps(job))
    return tmp_path


def test_the_table_shows_what_is_wrong_first(run_dir):
    status = Status.read(run_dir)
    assert [row[:3] for row in rank_rows(status)] == [
        ["1", "a", "slow GPU: 0.60 of the fastest GPU"],
        ["2", "b", "silent for 1:35"],
        ["3", "b", "slow host: 0.90 s a step of its own, the others 0.30 s"],
        ["0", "a", "ok"],
    ]
    with Console(width=160, record=True, file=open("/dev/null", "w")) as console:
        console.print(terminal(status))
    text = console.export_text()
    for words in ("running, attempt 2", "7.8000", "1.2k", "step 10", "imports 5.0 s", "node b is lost: <no word>"):
        assert words in text, words


def test_the_page_is_whole_and_escapes_what_it_shows(run_dir):
    text = page(Status.read(run_dir))
    assert "3 ranks in trouble" in text
    assert "node b is lost: &lt;no word&gt;" in text
    assert text.count("<svg") == 3, "loss, rate and step time have values, the gradient norm has none"
    assert 'http-equiv="refresh"' in text
    assert "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize("token", ["", "word"])
def test_the_server_answers_only_get_and_only_with_its_token(run_dir, token):
    server = make_server(run_dir, "127.0.0.1", 0, token)
    Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with urllib.request.urlopen(f"{base}/?token={token}", timeout=60) as answer:
            assert "node b is lost" in answer.read().decode()
        refused = {
            "?token=guess": 403 if token else 200,
            f"events.jsonl?token={token}": 404,
        }
        for path, status in refused.items():
            if status != 200:
                with pytest.raises(urllib.error.HTTPError, match=str(status)):
                    urllib.request.urlopen(f"{base}/{path}", timeout=60)
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(f"{base}/?token={token}", data=b"x", timeout=60)
        with pytest.raises(ConfigError, match="cannot be used"):
            make_server(run_dir, "127.0.0.1", server.server_address[1], token)
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        main(StatusConfig(run_dir=str(tmp_path), every_seconds=0))
