"""What a config may not say: one line that names the key, for every rule there is."""

import ast
import inspect
import traceback
from copy import deepcopy
from typing import Any

import pytest

from data_prep.errors import ConfigError
from train import rules
from train.cli import compose_train
from train.config import CHOICES, Config, get

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def demo() -> Config:
    """The demo's config; tests change copies of it."""
    return compose_train(["experiment=demo"])


def changed(config: Config, **values: Any) -> Config:
    """A copy with other values; a key's dots are written as double underscores."""
    config = deepcopy(config)
    for key, value in values.items():
        *sections, name = key.split("__")
        setattr(get(config, ".".join(sections)) if sections else config, name, value)
    return config


SHARES = {"parallel__tensor_parallel": 2, "parallel__sequence_parallel": True}
BROKEN: list[tuple[str, dict[str, Any], int | None]] = [
    *[(key, {key.replace(".", "__"): "nonsense"}, None) for key in CHOICES],
    ("lora.rank", {"lora__rank": -1}, None),
    ("lora.targets", {"lora__rank": 2, "lora__targets": ["head"]}, None),
    ("lora.rank", {"lora__rank": 2, "parallel__zero_stage": 3}, None),
    ("prefix.length", {"prefix__length": -1}, None),
    ("prefix.length", {"prefix__length": 4, "lora__rank": 2}, None),
    ("prefix.length", {"prefix__length": 4, "parallel__zero_stage": 3}, None),
    ("kernels.interval_attention", {"kernels__interval_attention": "flash4"}, None),
    *[
        (key, {"precision__fp8": True, "precision__dtype": "bf16", **values}, None)
        for key, values in (
            ("precision.dtype=fp16", {"precision__dtype": "fp16"}),
            ("parallel.overlap_tensor", {"parallel__overlap_tensor": True, **SHARES}),
            ("lora.rank", {"lora__rank": 2}),
            ("prefix.length", {"prefix__length": 4}),
            ("model.hidden_size", {"model__hidden_size": 260, "model__num_heads": 4, "model__head_dim": 64}),
            ("model.num_heads", {"model__num_heads": 2, "model__head_dim": 20}),
            ("model.ffn_hidden_size", {"model__ffn_hidden_size": 344, "parallel__tensor_parallel": 2}),
            ("model.num_kv_heads", {"model__num_kv_heads": 1, "model__num_heads": 4, "model__head_dim": 4}),
        )
    ],
    ("parallel.cuda_graphs", {"parallel__cuda_graphs": True}, None),
    ("parallel.overlap_tensor", {"parallel__overlap_tensor": True}, None),
    ("parallel.pipeline_schedule", {"parallel__pipeline_schedule": "zero_bubble"}, None),
    ("evaluation.tasks", {"evaluation__tasks": ["t.jsonl"], "parallel__zero_stage": 3}, None),
    *[
        (f"model.{name}", {f"model__{name}": 0}, None)
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "ffn_hidden_size",
            "padded_vocab_size",
            "max_positions",
        )
    ],
    ("model.num_heads", {"model__num_heads": 5}, None),
    ("model.num_kv_heads", {"model__num_kv_heads": 3}, None),
    ("model.rotary_fraction", {"model__rotary_fraction": 0.51}, None),
    ("model.rotary_fraction", {"model__rotary_fraction": 1.5}, None),
    ("model.rotary_scaling_factor", {"model__rotary_scaling": "linear"}, None),
    ("model.rotary_scaling_factor", {"model__rotary_scaling_factor": 2.0}, None),
    (
        "model.rotary_scaling",
        {"model__rotary_scaling": "ntk", "model__rotary_scaling_factor": 2.0, "model__positions": "none"},
        None,
    ),
    (
        "model.rotary_scaling",
        {"model__rotary_scaling": "ntk", "model__rotary_scaling_factor": 2.0, "model__head_dim": 2},
        None,
    ),
    (
        "model.rotary_original_positions",
        {"model__rotary_scaling": "yarn", "model__rotary_scaling_factor": 2.0},
        None,
    ),
    ("model.rotary_original_positions", {"model__rotary_original_positions": 2048}, None),
    (
        "model.rotary_base",
        {
            "model__rotary_scaling": "yarn",
            "model__rotary_scaling_factor": 2.0,
            "model__rotary_original_positions": 64,
            "model__rotary_base": 1.0,
        },
        None,
    ),
    ("model.positions", {"model__positions": "rotary_2d", "model__head_dim": 6}, None),
    ("model.hidden_dropout", {"model__hidden_dropout": 1.0}, None),
    ("model.attention_dropout", {"model__attention_dropout": -0.1}, None),
    ("parallel.tensor_parallel", {"parallel__tensor_parallel": 0}, None),
    ("parallel.pipeline_parallel", {"parallel__pipeline_parallel": 0}, None),
    ("model.num_heads", {"parallel__tensor_parallel": 3}, None),
    ("model.ffn_hidden_size", {"parallel__tensor_parallel": 4, "model__ffn_hidden_size": 690}, None),
    ("model.padded_vocab_size", {"parallel__tensor_parallel": 4, "model__padded_vocab_size": 8066}, None),
    ("parallel.pipeline_parallel", {"parallel__pipeline_parallel": 7}, None),
    ("parallel.zero_stage", {"parallel__zero_stage": 4}, None),
    ("parallel.layers_per_stage", {"parallel__layers_per_stage": [1, 2]}, None),
    ("parallel.layers_per_stage", {"parallel__pipeline_parallel": 2, "parallel__layers_per_stage": [4, 1]}, None),
    ("parallel.offload_optimizer", {"parallel__zero_stage": 0, "parallel__offload_optimizer": True}, None),
    ("parallel.zero_stage", {"parallel__zero_stage": 2, "parallel__pipeline_parallel": 2}, None),
    ("sequence_length", {"sequence_length": 8}, None),
    ("sequence_length", {"sequence_length": 512}, None),
    ("data.sampling.positions", {"model__positions": "learned_2d"}, None),
    ("micro_batch_size", {"micro_batch_size": 0}, None),
    ("global_batch_size", {"global_batch_size": 0}, None),
    ("schedule.rampup_increment", {"schedule__rampup_start": 1, "global_batch_size": 4}, None),
    ("schedule.rampup_increment", {"schedule__rampup_start": 8, "global_batch_size": 4}, None),
    ("optimizer.lr", {"optimizer__lr": 0.0}, None),
    ("optimizer.eps", {"optimizer__eps": -1.0}, None),
    ("schedule.decay_samples", {"schedule__decay_samples": 0}, None),
    ("logging.every_steps", {"logging__every_steps": 0}, None),
    ("saving.keep_last", {"saving__keep_last": 0}, None),
    ("saving.every_steps", {"saving__every_steps": -1}, None),
    ("cluster.kernel_times_every_steps", {"cluster__kernel_times_every_steps": -1}, None),
    ("saving.keep_every", {"saving__keep_every": -1}, None),
    ("evaluation.every_steps", {"evaluation__every_steps": -1}, None),
    ("optimizer.clip", {"optimizer__clip": -1.0}, None),
    ("schedule.warmup_samples", {"schedule__warmup_samples": 5000}, None),
    ("max_steps", {"max_steps": 0}, None),
    ("stability.embedding_gradient_shrink_schedule", {"stability__embedding_gradient_shrink_schedule": [[1]]}, None),
    ("stability.shrink_head", {"stability__shrink_head": True, "model__tied_embeddings": False}, None),
    ("stability.softmax", {"stability__softmax": "half"}, None),
    ("stability.reactions", {"stability__reactions": ["pray"]}, None),
    ("stability.reactions", {"stability__reactions": ["roll_back"], "saving__every_steps": 0}, None),
    ("stability.spike_window", {"stability__spike_window": 8}, None),
    ("stability.spike_sigma", {"stability__spike_sigma": 0.0}, None),
    ("optimizer.clip_decay", {"optimizer__clip_decay": 1.0}, None),
    ("model.deepnorm_alpha", {"model__deepnorm_alpha": 0.0}, None),
    ("model.deepnorm_beta", {"model__deepnorm_beta": -1.0}, None),
    ("optimizer.clip_warmup_steps", {"optimizer__clip_warmup_steps": 0}, None),
    ("stability.rewarm_samples", {"stability__rewarm_samples": -1}, None),
    ("stability.events", {"stability__events": [{"action": "lower_lr"}]}, None),
    ("stability.events", {"stability__events": [{"step": 3, "action": "pray"}]}, None),
    ("stability.events", {"stability__events": [{"step": 3, "action": "lower_lr", "factor": 0.5}] * 2}, None),
    ("factor is wrong", {"stability__events": [{"step": 3, "action": "lower_lr"}]}, None),
    ("samples is wrong", {"stability__events": [{"step": 3, "action": "skip_samples", "samples": [9, 2]}]}, None),
    ("alpha is wrong", {"stability__events": [{"step": 3, "action": "reset_optimizer", "alpha": 1}]}, None),
    ("stability.stress.lr_steps", {"stability__stress__lr_steps": [5]}, None),
    ("stability.stress.flip_bit", {"stability__stress__flip_bit": 32}, None),
    ("cluster.nodes", {"cluster__nodes": 2}, None),
    ("parallel.tensor_parallel", {"parallel__tensor_parallel": 4}, 6),
    ("parallel.sequence_parallel", {"parallel__sequence_parallel": True}, None),
    (
        "parallel.activation_checkpointing_every_layers",
        {"parallel__activation_checkpointing_every_layers": 2},
        None,
    ),
    ("global_batch_size", {"micro_batch_size": 3}, 1),
    (
        "schedule.rampup_start",
        {"schedule__rampup_start": 3, "schedule__rampup_increment": 1, "global_batch_size": 4},
        1,
    ),
    ("parallel.zero_stage", {"parallel__zero_stage": 0, "precision__dtype": "bf16"}, 1),
]
"""The key that the message must name, what breaks the rule, and the world size where the rule needs one."""


def broken(config: Config, values: dict[str, Any], world_size: int | None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        # `rampup_increment=2` does not lead from 1 to 4.
        rules.check(changed(config, **{"schedule__rampup_increment": 2} | values), world_size=world_size)
    return caught.value


@pytest.mark.parametrize(("key", "values", "world_size"), BROKEN)
def test_a_broken_rule_is_one_line_that_names_the_key(demo, key, values, world_size):
    message = str(broken(demo, values, world_size))
    assert key in message
    assert "\n" not in message


def test_every_rule_was_tried(demo):
    tried = set()
    for _, values, world_size in BROKEN:
        tried.add(traceback.extract_tb(broken(demo, values, world_size).__traceback__)[-1].lineno)
    with pytest.raises(ConfigError, match=r"model.padded_vocab_size=8064 .* use at least 9088") as caught:
        rules.check_vocabulary(demo, 9000)
    tried.add(traceback.extract_tb(caught.value.__traceback__)[-1].lineno)
    raises = {node.lineno for node in ast.walk(ast.parse(inspect.getsource(rules))) if isinstance(node, ast.Raise)}
    assert raises == tried, f"train/rules.py raises in lines {sorted(raises - tried)} that no case here reaches"
