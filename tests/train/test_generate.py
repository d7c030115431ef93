"""Filling blanks: the form of training, the user's text untouched, the real command line, and bad input."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import cli
from data_prep.batch import GMASK, MASK, SMASK, Batch
from data_prep.config import SamplingConfig
from data_prep.dataset import Dataset
from data_prep.errors import EXIT_CONFIG, EXIT_DATA, ConfigError
from data_prep.samples import Sampler
from train import generate
from train.checkpoint.model import Trained, load_trained
from train.config import Config, ModelConfig
from train.generate import GenerateConfig, complete
from train.generation.blanks import fill
from train.generation.picking import Decoding
from train.generation.scoring import log_probability
from train.labels import inputs
from train.mesh import Mesh
from train.model.build import Model

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
POSITIONS = {"rotary_1d": "1d", "rotary_2d": "2d", "learned_2d": "2d"}


@pytest.fixture(scope="module")
def trained(tiny_run: Path) -> Trained:
    return load_trained(tiny_run, CPU)


def run(*words: str) -> int:
    return cli.run("generate", GenerateConfig, generate.main, program="train.generate", argv=words)


def untrained(positions: str) -> Model:
    shape = ModelConfig(
        name="untrained",
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        ffn_hidden_size=48,
        padded_vocab_size=640,
        max_positions=64,
        positions=positions,
    )
    return Model(Config(model=shape), Mesh.single(), torch.float32).eval()


@pytest.mark.parametrize("kind", [GMASK, MASK, SMASK])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_blank_is_scored_as_the_training_sample_scores_it(tiny_dataset, positions, kind):
    """Positions, intervals and special tokens of generation are those of training."""
    model, dataset = untrained(positions), Dataset.open(tiny_dataset)
    sampling = SamplingConfig(
        positions=POSITIONS[positions],
        mask_segments=1,
        single_span_probability=1.0,
        short_text_probability=0.0,
        spans_cross_documents=True,
    )
    sampler = Sampler(dataset, sampling, 64, seed=3)
    compared = 0
    for row in range(40):
        stream = sampler.streams[row % 2]
        generator = np.random.default_rng(row)
        sample = sampler.build(stream.read_row(row), kind, stream.info.lang, generator)
        wanted = np.flatnonzero(sample.loss_weight > 0)
        ends = int((sample.targets[wanted] == dataset.tokenizer.eop).sum())
        if ends != (kind != GMASK):
            continue  # a sentence sample may hide several, or fall back on spans
        context = sample.tokens[: wanted[0]].tolist()
        truth = sample.targets[wanted[: len(wanted) - ends]].tolist()
        with torch.no_grad():
            hidden = model(inputs(Batch.from_samples([sample])))
        scores = torch.log_softmax(model.head.logits(hidden)[0], -1)
        trained_with = float(scores[wanted[: len(truth)], truth].sum())
        assert log_probability(model, dataset.tokenizer, context, truth) == pytest.approx(trained_with, rel=1e-5)
        compared += 1
    assert compared >= 3


def test_the_text_around_blanks_is_the_users_own(trained):
    text = "“今天”  ＡＢＣ [MASK]\t，e\u0301 \\n $x {[sMASK]} 。\n\n\n\n[gMASK] "
    whole, blanks = complete(trained, text, Decoding(max_new_tokens=4))
    assert [blank.mask for blank in blanks] == ["MASK", "sMASK", "gMASK"]
    rest, end = "", 0
    for blank in blanks:
        rest += whole[end : blank.start] + f"[{blank.mask}]"
        assert whole[blank.start : blank.start + len(blank.text)] == blank.text
        end = blank.start + len(blank.text)
    # A space before a mask belongs to what fills it.
    assert (rest + whole[end:]).replace(" [MASK]", "[MASK]") == text.replace(" [MASK]", "[MASK]")


def test_tokens_are_those_of_fill_and_shown_decoded(trained):
    text = "今天天气[MASK]，我们去公园。[gMASK]"
    context = trained.tokenizer.encode_with_masks(text)
    for decoding in (Decoding(max_new_tokens=5), Decoding(max_new_tokens=5, temperature=1.0, seed=4)):
        _, blanks = complete(trained, text, decoding)
        assert [blank.tokens for blank in blanks] == fill(trained.model, trained.tokenizer, context, decoding)
        for blank in blanks:
            # A blank of training hides at least one token.
            assert 1 <= len(blank.tokens) <= 5
            assert blank.text == trained.tokenizer.decode(blank.tokens)
            assert max(blank.tokens, default=0) < trained.tokenizer.pieces


def test_greedy_takes_the_likeliest_token_and_draws_depend_on_the_seed_alone(trained):
    text = "他们在城里[gMASK]"
    context = trained.tokenizer.encode_with_masks(text)
    (first,) = fill(trained.model, trained.tokenizer, context, Decoding(max_new_tokens=1))
    best = log_probability(trained.model, trained.tokenizer, context, first)
    assert all(
        log_probability(trained.model, trained.tokenizer, context, [token]) <= best
        for token in range(trained.tokenizer.pieces)
    )
    drawn = [complete(trained, text, Decoding(8, temperature=1.5, seed=seed))[0] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_a_piece_brings_its_own_space():
    class Stub:
        """Decodes every blank to the same words."""

        def __init__(self, words: str) -> None:
            self.words = words

        def encode_with_masks(self, text: str) -> list[int]:
            return [0]

        def decode(self, tokens: list[int]) -> str:
            return self.words

    config = Config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "fill_all", lambda *_, **__: [[[1], [2]]])
        for words, wanted in ((" old", "the old man, [a] old"), ("", "the  man, [a] "), ("x", "thex man, [a]x")):
            stub = Trained(None, Stub(words), config, Path())  # type: ignore[arg-type]
            assert complete(stub, "the [MASK] man, [a] [gMASK]", Decoding())[0] == wanted


def test_the_real_command_line_keeps_every_character(command, tiny_run, tmp_path):
    text = "\"今天\" it's $HOME ${a} \\ \\n [1, 2] {b: c} 'x' 天气[MASK]，我们去公园。[MASK]'"
    output = tmp_path / "结果 (1).json"
    done = command("train.generate", f"checkpoint={tiny_run}", f"text={text}", "max_new_tokens=1", f"output={output}")
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["text"] == text
    assert done.stdout == record["filled"] + "\n"
    assert done.stderr == ""
    first, middle, last = text.split("[MASK]")
    assert done.stdout.startswith(first)
    assert middle in done.stdout
    assert done.stdout.rstrip("\n").endswith(last)
    assert [blank["mask"] for blank in record["blanks"]] == ["MASK", "MASK"]
    assert Path(record["checkpoint"]).name == "step_00000040"


def test_a_file_of_texts_is_completed_in_its_order(trained, capsys, tmp_path):
    texts = ["今天天气[MASK]，我们去公园。", "The old man[gMASK]", "他说：[MASK]。", "[sMASK]"]
    lines, plain, output = tmp_path / "文本.jsonl", tmp_path / "texts.txt", tmp_path / "out.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    plain.write_text("\n".join(texts), encoding="utf-8")
    said = []
    for file in (lines, plain):
        words = [f"input={file}", "batch_size=3", "max_new_tokens=4", "temperature=1", "top_k=20", f"output={output}"]
        assert run(f"checkpoint={trained.folder}", *words) == 0
        said.append(capsys.readouterr().out)
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [record["text"] for record in records] == texts
        assert said[-1] == "".join(record["filled"] + "\n" for record in records)
    assert said[0] == said[1]
    lines.write_text('{"text": "[MASK]"}\n{"text": "none"}\n', encoding="utf-8")
    assert run(f"checkpoint={trained.folder}", f"input={lines}") == EXIT_CONFIG
    assert "line 2: holds no [MASK]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_share_the_model(command, tiny_run):
    words = [f"checkpoint={tiny_run}", "text=今天[MASK]，[gMASK]", "max_new_tokens=4"]
    alone = command("train.generate", *words).stdout
    assert command("torch.distributed.run", "--nproc-per-node=2", "-m", "train.generate", *words).stdout == alone


def test_blanks_are_marked_on_a_terminal_only(trained, capsys, monkeypatch):
    text = "今天[MASK]，[b]我们[/b]去公园。[gMASK]"
    words = [f"checkpoint={trained.folder}", f"text={text}", "max_new_tokens=3"]
    assert run(*words) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(*words) == 0
    coloured = capsys.readouterr().out
    whole, blanks = complete(trained, text, Decoding(max_new_tokens=3))
    assert plain == whole + "\n"
    assert "[b]我们[/b]去公园。" in coloured
    # The text grows from left to right, what the model writes marked: as many pieces as it came in.
    assert coloured.count("\x1b[1;4;32m") >= sum(len(blank.text) > 0 for blank in blanks)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == whole + "\n"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["text=今天天气很好"], EXIT_CONFIG, "text holds no [MASK], [sMASK] or [gMASK]"),
        (["text="], EXIT_CONFIG, "text holds no [MASK]"),
        ([], EXIT_CONFIG, "text is not set; give text=…"),
        (["text=[MASK]", "max_new_tokens=0"], EXIT_CONFIG, "max_new_tokens=0 must be at least 1"),
        (["text=[MASK]", "max_new_tokens=64"], EXIT_CONFIG, "do not fit the model's 64 positions"),
        (["text=" + "很长" * 80 + "[MASK]"], EXIT_CONFIG, "do not fit the model's 64 positions"),
        (["text=[MASK]", "temperature=-1"], EXIT_CONFIG, "temperature=-1.0 must be 0 or more"),
        (["text=[MASK]", "temperature=inf"], EXIT_CONFIG, "temperature=inf must be 0 or more"),
        (["text=[MASK]", "beams=2", "temperature=1"], EXIT_CONFIG, "beams=2 and temperature=1.0 exclude each other"),
        (["text=[MASK]", "top_p=0.5"], EXIT_CONFIG, "no effect with temperature=0"),
        (["text=[MASK]", "input=texts.txt"], EXIT_CONFIG, "give text or input, not both"),
        (["input=no/such/file.txt"], EXIT_DATA, "input=no/such/file.txt cannot be read"),
        (["text=[MASK]", "temprature=1"], EXIT_CONFIG, "temprature is not a known key; did you mean temperature?"),
        (["text=[MASK]", "checkpoint=no/such/run"], EXIT_DATA, "no/such/run holds no checkpoint"),
        (["text=[MASK]", "max_new_tokens=2", "output=/proc/no/where.json"], EXIT_DATA, "/proc/no"),
        (["text=\udce4[MASK]"], EXIT_CONFIG, "text is not UTF-8"),
    ],
    ids=lambda value: value[-1][:24].encode("ascii", "replace").decode() if isinstance(value, list) and value else None,
)
def test_bad_input_is_one_line_that_names_the_key(tiny_run, capsys, words, status, message):
    assert run(f"checkpoint={tiny_run}", *words) == status
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("train.generate: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_causal_model_is_refused(trained):
    config = Config()
    config.data.sampling.objective = "causal"
    with pytest.raises(ConfigError, match=r"data\.sampling\.objective=causal"):
        complete(Trained(trained.model, trained.tokenizer, config, trained.folder), "[MASK]", Decoding())


def test_log_probability_is_a_probability(trained):
    context = trained.tokenizer.encode_with_masks("我们[MASK]。")
    total = sum(
        math.exp(log_probability(trained.model, trained.tokenizer, context, [token]))
        for token in range(trained.model.context.model.padded_vocab_size)
    )
    assert total == pytest.approx(1.0, rel=1e-4)
