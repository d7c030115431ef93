"""The command line and the config: recipes, error messages, quoting, schedules."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import data_prep.config
import kernels.config
import train.cluster
import train.config
import train.evaluate
import train.generate
from data_prep.cli import as_yaml, quote_values
from data_prep.errors import EXIT_CONFIG
from kernels.resolve import TABLE
from tests import update_golden
from train import rules
from train.cli import compose_train, run_train
from train.config import CHOICES, Config, get

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def glm_130b() -> Config:
    """The GLM-130B recipe."""
    return compose_train(["experiment=glm_130b"])


# Recipes


@pytest.mark.parametrize("file", update_golden.files())
def test_the_resolved_config_of_every_recipe_is_the_committed_one(file):
    golden = update_golden.GOLDEN / file
    assert golden.exists(), f"no {golden}: run python -m tests.update_golden"
    assert update_golden.resolved(file) == golden.read_text(encoding="utf-8"), "run python -m tests.update_golden"


def test_no_golden_file_is_left_over():
    on_disk = {
        str(path.relative_to(update_golden.GOLDEN)).replace("\\", "/")
        for ending in ("yaml", "sbatch", "manifest")
        for path in update_golden.GOLDEN.rglob(f"*.{ending}")
    }
    assert on_disk == set(update_golden.files())


@pytest.mark.parametrize("name", update_golden.recipes("experiment"))
def test_every_experiment_keeps_the_rules(name):
    rules.check(compose_train(update_golden.overrides("experiment", name)))


@pytest.mark.parametrize("name", update_golden.recipes("model"))
def test_every_model_keeps_the_rules(name):
    rules.check(compose_train(update_golden.overrides("model", name)))


def test_the_glm_130b_recipe_is_that_of_the_paper(glm_130b):
    facts = {
        "model.num_layers": 70,
        "model.hidden_size": 12288,
        "model.num_heads": 96,
        "model.ffn_hidden_size": 32768,
        "model.padded_vocab_size": 150528,
        "model.activation": "geglu",
        "model.norm_placement": "deepnorm",
        "model.positions": "rotary_1d",
        "model.rotary_base": 10000.0,
        "model.tied_embeddings": True,
        "model.bias": "all",
        "model.norm_eps": 1e-5,
        "model.hidden_dropout": 0.1,
        "model.attention_dropout": 0.1,
        "model.init": "xavier",
        "sequence_length": 2048,
        "seed": 1234,
        "parallel.tensor_parallel": 4,
        "parallel.pipeline_parallel": 8,
        "parallel.zero_stage": 1,
        "parallel.activation_checkpointing": "full",
        "parallel.reduce_bucket_elements": 500_000_000,
        "parallel.allgather_bucket_elements": 500_000_000,
        "micro_batch_size": 1,
        "global_batch_size": 4224,
        "schedule.rampup_start": 192,
        "schedule.rampup_increment": 24,
        "schedule.rampup_samples": 5_493_164,
        "schedule.kind": "cosine",
        "schedule.warmup_samples": 1_098_632,
        "schedule.decay_samples": 197_753_905,
        "schedule.min_lr": 8e-6,
        "max_samples": 219_726_562,
        "optimizer.lr": 8e-5,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.95,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip": 1.0,
        "precision.dtype": "fp16",
        "precision.loss_scale": 0.0,
        "precision.loss_scale_initial_power": 16,
        "precision.loss_scale_window": 2000,
        "precision.loss_scale_hysteresis": 2,
        "precision.loss_scale_minimum": 1.0,
        "stability.softmax": "fp32",
        "stability.embedding_gradient_shrink": 0.1,
        "data.sampling.gmask_share": 0.7,
        "data.sampling.mask_share": 0.3,
        "data.sampling.mask_ratio": 0.15,
        "data.sampling.poisson_mean": 3.0,
        "data.sampling.max_span_tokens": 39,
        "data.sampling.min_gmask_ratio": 0.2,
        "data.sampling.single_span_probability": 0.02,
        "data.sampling.short_text_probability": 0.02,
        "data.sampling.mask_segments": 4,
        "data.split_shares": [949, 50, 1],
        "tokenizer.vocab_size": 150_000,
        "saving.every_steps": 250,
        "evaluation.every_steps": 1000,
    }
    for key, value in facts.items():
        assert get(glm_130b, key) == value, key
    assert glm_130b.max_samples * 2048 == pytest.approx(450e9, rel=1e-6)
    rules.check(glm_130b, world_size=96 * 8)


def test_small_scale_is_the_same_recipe_but_for_its_size():
    names = ("stability/small_scale", "glm_130b")
    small, whole = (compose_train([f"experiment={name}", "data.path=D"]) for name in names)
    for group in ("precision", "stability", "loss"):
        assert getattr(small, group) == getattr(whole, group), group
    assert small.data.sampling == whole.data.sampling
    assert small.sequence_length == whole.sequence_length
    sizes = {"name", "num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "padded_vocab_size"}
    for key in vars(whole.model).keys() - sizes:
        assert getattr(small.model, key) == getattr(whole.model, key), key
    assert dataclasses.replace(small.optimizer, lr=whole.optimizer.lr) == whole.optimizer
    for config in (small, whole):
        assert config.schedule.min_lr == pytest.approx(0.1 * config.optimizer.lr)
        planned = config.max_samples or config.schedule.decay_samples
        assert config.schedule.rampup_samples == pytest.approx(0.025 * planned, rel=1e-6)
    rules.check(small, world_size=1)


def test_experiment_is_chosen_with_and_without_a_plus():
    assert as_yaml(compose_train(["+experiment=demo"])) == as_yaml(compose_train(["experiment=demo"]))


def test_overrides_win_over_the_experiment():
    config = compose_train(["experiment=demo", "optimizer.lr=0.5", "model.num_layers=2", "sequence_length=64"])
    assert (config.optimizer.lr, config.model.num_layers, config.sequence_length) == (0.5, 2, 64)


def test_checkpoint_stands_for_saving():
    assert compose_train(["data.path=D", "checkpoint.every_steps=7", "checkpoint.keep_last=3"]).saving.every_steps == 7


WRONG_WORDS = [
    (["data.path=D", "model.num_headz=5"], "model.num_headz is not a known key; did you mean model.num_heads"),
    (["data.path=D", "+colour=red"], "colour is not a known key"),
    (["data.path=D", "+model.colour=red"], "model.colour is not a known key"),
    (["data.path=D", "model.num_layers=many"], "model.num_layers: Value 'many'"),
    (["data.path=D", "model=gigantic"], "model=gigantic is not known; use one of 125m"),
    (["data.path=D", "precision=16"], "precision=16 is not known; use one of bf16"),
    (["data.path=D", "max_steps=[1"], "max_steps=[1: "),
    (["model=tiny"], "data.path is not set; give data.path=…"),
    (["data.path=D", "data.sampling.mask_share=0.9"], "data.sampling.mask_share=0.9 must add up"),
    (["data.path=D", "parallel.tensor_parallel=3"], "use one of [1, 2, 4]"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_WORDS, ids=[words[-1] for words, _ in WRONG_WORDS])
def test_a_wrong_word_is_exit_status_2_and_one_line(words, message, capsys):
    assert run_train(lambda config: rules.check(config), words) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert said.startswith("train: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.e2e
def test_the_real_command_refuses_a_layout_before_anything_starts(command, tmp_path):
    done = command("train", "data.path=D", f"run_dir={tmp_path / 'run'}", "parallel.pipeline_parallel=9", check=False)
    assert done.returncode == EXIT_CONFIG
    assert done.stderr.count("\n") == 1
    assert "parallel.pipeline_parallel=9 leaves a stage without a layer of model.num_layers=4" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
def test_cfg_job_prints_the_resolved_config_and_nothing_else(command):
    done = command("train", "experiment=demo", "run_dir=运行 (1)", "--cfg", "job")
    printed = OmegaConf.to_container(OmegaConf.create(done.stdout))
    wanted = compose_train(["experiment=demo", "run_dir=运行 (1)"])
    assert printed == OmegaConf.to_container(OmegaConf.create(as_yaml(wanted)))
    assert printed["run_dir"] == "运行 (1)"
    assert done.stderr == ""


def test_flags_may_stand_anywhere_and_a_sweep_runs_each_value(capsys):
    seen: list[int] = []
    for words in (
        ["--cfg", "job", "data.path=D"],
        ["data.path=D", "--cfg=job"],
        ["data.path=D", "-c", "job", "seed=3"],
    ):
        assert run_train(lambda config: seen.append(config.seed), words) == 0
        printed = OmegaConf.create(capsys.readouterr().out)
        assert (printed.data.path, printed.sequence_length) == ("D", 256)
    assert seen == []
    assert run_train(lambda config: seen.append(config.seed), ["-m", "seed=1,2", "data.path=D"]) == 0
    assert seen == [1, 2]


def test_the_words_for_kernels_are_the_implementations_there_are():
    for operation, table in TABLE.items():
        assert set(CHOICES[f"kernels.{operation}"]) == {"auto", *table.implementations}


# Values with characters that Hydra's grammar knows


def arrived(word: str) -> Any:
    """The value of a word as it stands in a composed config."""
    (quoted,) = quote_values([word])
    override = OverridesParser.create().parse_override(quoted)
    config = OmegaConf.create({})
    OmegaConf.update(config, override.key_or_group, override.value())
    return get(config, override.key_or_group)


@settings(max_examples=300)
@example("今天天气[MASK]，我们去公园。")
@example("[MASK]和[gMASK]")
@example("[gMASK]")
@example('"He said: \\"[MASK]\\""')
@example("'[MASK]'")
@example("a\\")
@example("\\${HOME} ${x} $[MASK] {a: b}, c=d")
@example(" [MASK]\n\t ")
@given(st.text(st.sampled_from("\\'\"${}[]()ab,=:中。 \n\t#!~*&|%"), min_size=1))
def test_text_arrives_unchanged(text):
    # "???" is how the config says that a value is missing.
    assert text == "???" or arrived(f"text={text}") == text


@pytest.mark.parametrize(
    "path", ["我的 数据/(v2)", "a[1]", "[v2]", "C:\\data\\zh", "it's", "$HOME/x", "${x}", "a,b", "a=b", "x#y", "{a}"]
)
@pytest.mark.parametrize("key", ["data.path", "run_dir", "checkpoint", "output", "initialize_from", "tokenizer.path"])
def test_paths_arrive_unchanged(key, path):
    assert arrived(f"{key}={path}") == path


@pytest.mark.parametrize(
    ("given_value", "wanted"),
    [
        ("[zh.jsonl.gz,en.jsonl.gz]", ["zh.jsonl.gz", "en.jsonl.gz"]),
        ("[我的 文件 (1).jsonl, b[2].txt]", ["我的 文件 (1).jsonl", "b[2].txt"]),
        ("""["a,b.jsonl",'c d.txt']""", ["a,b.jsonl", "c d.txt"]),
        ("one file.jsonl", ["one file.jsonl"]),
        ("[]", []),
        ("[{path: a.jsonl, lang: zh}]", [{"path": "a.jsonl", "lang": "zh"}]),
    ],
)
def test_sources_arrive_as_a_list(given_value, wanted):
    assert arrived(f"data.sources={given_value}") == wanted


def test_values_reach_the_config_through_the_whole_command_line():
    seen: list[Config] = []
    words = ["data.path=我的 数据/(v2) [a]", "run_dir='运行 1'", "checkpoint.every_steps=3", "seed=5"]
    assert run_train(lambda config: seen.append(config), words) == 0
    (config,) = seen
    assert (config.data.path, config.run_dir) == ("我的 数据/(v2) [a]", "运行 1")
    assert (config.saving.every_steps, config.seed) == (3, 5)


# Every key does something


def fields_of_all_schemas() -> list[tuple[str, str]]:
    modules = (train.config, train.cluster, data_prep.config, kernels.config, train.evaluate, train.generate)
    schemas = {
        schema
        for module in modules
        for schema in vars(module).values()
        if inspect.isclass(schema) and schema.__name__.endswith("Config") and dataclasses.is_dataclass(schema)
    }
    return sorted((schema.__name__, item.name) for schema in schemas for item in dataclasses.fields(schema))


REFUSED: set[str] = set()
"""Keys that only a rule reads: any value but the default is refused until there is something that can use it."""


def test_every_key_is_read_somewhere():
    source = "".join(
        path.read_text(encoding="utf-8")
        for room in ("train", "data_prep", "kernels", "launch")
        for path in (ROOT / room).rglob("*.py")
        if path.name not in ("config.py", "rules.py")
    )
    read = set(re.findall(r"\.(\w+)\b(?!\s*=[^=])", source))
    idle = [f"{schema}.{name}" for schema, name in fields_of_all_schemas() if name not in read]
    assert set(idle) == REFUSED


def test_every_key_is_documented():
    for module in (train.config, train.cluster, data_prep.config, kernels.config, train.evaluate, train.generate):
        for node in ast.parse(inspect.getsource(module)).body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
                continue
            for item, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(item, ast.AnnAssign) and not (module is train.config and node.name == "Config"):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{node.name}.{item.target.id} has no doc under it"
