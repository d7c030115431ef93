"""Rules between keys, checked before any process group starts. Every message names the key and what would be right."""

import math
from typing import Any

from data_prep.errors import ConfigError
from train.config import CHOICES, Config, ModelConfig, get

LORA_TARGETS = ("qkv", "dense", "ffn")
"""The words of lora.targets."""
REACTIONS = ("warn", "skip", "roll_back", "lower_lr", "lower_shrink", "reset_loss_scale", "reset_optimizer")
"""What stability.reactions may hold."""
FP8_UNIT = 16
"""`kernels.fp8_product.UNIT`, without torch."""
_BASE = {"step": "number", "action": "word"}
EVENTS: dict[str, dict[str, str]] = {
    "lower_lr": {**_BASE, "factor": "number", "rewarm_samples": "samples"},
    "lower_shrink": {**_BASE, "factor": "number"},
    "skip_samples": {**_BASE, "samples": "range"},
    "reset_loss_scale": _BASE,
    "reset_optimizer": _BASE,
}
"""Actions of stability.events, and the kind of each thing they take."""
OPTIONAL = ("rewarm_samples",)
"""What an event may leave out."""


def check(config: Config, *, world_size: int | None = None) -> None:
    """Raise ConfigError for the first broken rule.

    world_size: number of ranks, when known; without it the rules that need it are left out.
    """
    for key, words in CHOICES.items():
        if get(config, key) not in words:
            raise ConfigError(f"{key}={get(config, key)!r} is not known; use one of {', '.join(words)}")
    check_shape(config)
    _lora(config)
    _prefix(config)
    _kernels(config)
    _numbers(config)
    _stability(config)
    if world_size is not None:
        check_world(config, world_size)


def check_shape(config: Config) -> None:
    """Rules of the model, its layout and its batch alone: what the planner tries. Raises ConfigError."""
    _model(config.model)
    _parallel(config)
    _fp8(config)
    _batch(config)


def check_world(config: Config, world_size: int) -> None:
    """Rules that hold for a number of ranks; raises ConfigError."""
    parallel = config.parallel
    shard = parallel.tensor_parallel * parallel.pipeline_parallel
    if world_size % shard:
        raise ConfigError(
            f"parallel.tensor_parallel={parallel.tensor_parallel} x parallel.pipeline_parallel="
            f"{parallel.pipeline_parallel} = {shard} does not divide the {world_size} ranks; start a multiple of it"
        )
    unit = config.micro_batch_size * (world_size // shard)
    sizes = {"global_batch_size": config.global_batch_size}
    if config.schedule.rampup_start is not None:
        sizes["schedule.rampup_start"] = config.schedule.rampup_start
        sizes["schedule.rampup_increment"] = config.schedule.rampup_increment
    for key, size in sizes.items():
        if size % unit:
            raise ConfigError(
                f"{key}={size} is not micro_batch_size={config.micro_batch_size} x accumulation x data_parallel="
                f"{world_size // shard}; use a multiple of {unit}, such as {math.ceil(size / unit) * unit}"
            )
    if parallel.zero_stage == 0 and config.precision.dtype != "fp32":
        raise ConfigError(
            f"parallel.zero_stage=0 with precision.dtype={config.precision.dtype}: DeepSpeed's half-precision "
            "optimizer without ZeRO is subtly wrong; use parallel.zero_stage=1"
        )


def divisors(number: int, limit: int = 1024) -> list[int]:
    """Divisors of a number up to a limit, for error messages."""
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def _model(model: ModelConfig) -> None:
    for name in ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "padded_vocab_size", "max_positions"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}={getattr(model, name)} must be at least 1")
    if model.head_dim is None and model.hidden_size % model.num_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} does not divide by model.num_heads={model.num_heads}; "
            f"use one of {divisors(model.hidden_size)} heads or set model.head_dim"
        )
    kv_heads = model.num_kv_heads or model.num_heads
    if model.num_heads % kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"use one of {divisors(model.num_heads)}"
        )
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    if model.positions.startswith("rotary"):
        rotated = head_dim * model.rotary_fraction
        unit = 4 if model.positions == "rotary_2d" else 2
        if not 0 < model.rotary_fraction <= 1 or rotated % unit:
            raise ConfigError(
                f"model.rotary_fraction={model.rotary_fraction} of {head_dim} dims is {rotated:g}; "
                f"model.positions={model.positions} needs a multiple of {unit}, at most {head_dim}"
            )
    _rotary_scaling(model, head_dim)
    for name in ("hidden_dropout", "attention_dropout"):
        if not 0 <= getattr(model, name) < 1:
            raise ConfigError(f"model.{name}={getattr(model, name)} must lie in [0, 1)")


def _rotary_scaling(model: ModelConfig, head_dim: int) -> None:
    kind, factor = model.rotary_scaling, model.rotary_scaling_factor
    if (kind == "none") != (factor == 1) or factor < 1:
        raise ConfigError(
            f"model.rotary_scaling_factor={factor:g} with model.rotary_scaling={kind}; use more than 1 with linear, "
            "ntk or yarn, and 1 with none"
        )
    if (kind == "yarn") != (model.rotary_original_positions > 0):
        raise ConfigError(
            f"model.rotary_original_positions={model.rotary_original_positions} with model.rotary_scaling={kind}; give "
            "the sequence length that the weights were trained on with yarn, and 0 with the others"
        )
    if kind == "yarn" and model.rotary_base <= 1:
        raise ConfigError(f"model.rotary_base={model.rotary_base:g} must be more than 1 with model.rotary_scaling=yarn")
    if kind != "none" and not model.positions.startswith("rotary"):
        raise ConfigError(f"model.rotary_scaling={kind} needs rotary positions, not model.positions={model.positions}")
    axes = 2 if model.positions == "rotary_2d" else 1
    if kind == "ntk" and head_dim * model.rotary_fraction / axes <= 2:
        raise ConfigError(f"model.rotary_scaling=ntk needs more than one rotated pair of the {head_dim} dims of a head")


def _parallel(config: Config) -> None:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_parallel
    for key, size in (("tensor_parallel", tensor), ("pipeline_parallel", parallel.pipeline_parallel)):
        if size < 1:
            raise ConfigError(f"parallel.{key}={size} must be at least 1")
    divided = {
        "model.num_heads": model.num_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.padded_vocab_size": model.padded_vocab_size,
    }
    for key, size in divided.items():
        if size % tensor:
            raise ConfigError(
                f"{key}={size} does not divide by parallel.tensor_parallel={tensor}; use one of {divisors(size, 64)}"
            )
    if parallel.sequence_parallel and (tensor == 1 or config.sequence_length % tensor):
        raise ConfigError(
            f"parallel.sequence_parallel=true needs parallel.tensor_parallel={tensor} to be more than 1 and to divide "
            f"sequence_length={config.sequence_length}"
        )
    every = parallel.activation_checkpointing_every_layers
    if every < 1 or (every > 1 and parallel.activation_checkpointing == "none"):
        raise ConfigError(
            f"parallel.activation_checkpointing_every_layers={every} must be at least 1, and more only with "
            f"parallel.activation_checkpointing={parallel.activation_checkpointing} other than none"
        )
    if parallel.pipeline_parallel > 1 and 2 * parallel.pipeline_parallel > model.num_layers + 2:
        # A head alone has matrices but no vectors: ZeRO's norms, one a parameter group, would wait for ever.
        raise ConfigError(
            f"parallel.pipeline_parallel={parallel.pipeline_parallel} leaves a stage without a layer of "
            f"model.num_layers={model.num_layers}; use at most {(model.num_layers + 2) // 2}"
        )
    cut, stages = parallel.layers_per_stage, parallel.pipeline_parallel
    if cut and (len(cut) != stages or min(cut) < 1 or sum(cut) != model.num_layers):
        raise ConfigError(
            f"parallel.layers_per_stage={cut} must share model.num_layers={model.num_layers} out over "
            f"parallel.pipeline_parallel={stages} stages, one layer or more to each; or leave it empty"
        )
    if config.evaluation.tasks and (parallel.pipeline_parallel > 1 or parallel.zero_stage == 3):
        raise ConfigError(
            f"evaluation.tasks needs the whole model in each replica, but parallel.pipeline_parallel="
            f"{parallel.pipeline_parallel} and parallel.zero_stage={parallel.zero_stage} divide it; run them on the "
            "checkpoints with train.evaluate"
        )
    if parallel.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"parallel.zero_stage={parallel.zero_stage}; use 0, 1, 2 or 3")
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        raise ConfigError("parallel.offload_optimizer=true needs parallel.zero_stage=1, 2 or 3")
    if parallel.zero_stage > 1 and parallel.pipeline_parallel > 1:
        raise ConfigError(
            f"parallel.zero_stage={parallel.zero_stage} needs one stage, but parallel.pipeline_parallel="
            f"{parallel.pipeline_parallel}; use parallel.zero_stage=1 or parallel.pipeline_parallel=1"
        )

    if parallel.overlap_tensor and parallel.tensor_parallel == 1:
        raise ConfigError("parallel.overlap_tensor=true needs parallel.tensor_parallel of more than 1")
    if parallel.pipeline_schedule == "zero_bubble" and (
        parallel.pipeline_parallel == 1 or parallel.zero_stage != 1 or config.precision.dtype != "bf16"
    ):
        raise ConfigError(
            f"parallel.pipeline_schedule=zero_bubble needs several stages with gradients summed in place, but "
            f"parallel.pipeline_parallel={parallel.pipeline_parallel}, parallel.zero_stage={parallel.zero_stage} and "
            f"precision.dtype={config.precision.dtype}; use more than 1, 1 and bf16, or parallel.pipeline_schedule=1f1b"
        )
    if parallel.cuda_graphs and (
        parallel.pipeline_parallel > 1 or parallel.zero_stage != 1 or config.precision.dtype != "bf16"
    ):
        raise ConfigError(
            f"parallel.cuda_graphs=true needs one stage with gradients summed in place, but "
            f"parallel.pipeline_parallel={parallel.pipeline_parallel}, parallel.zero_stage={parallel.zero_stage} and "
            f"precision.dtype={config.precision.dtype}; use 1, 1 and bf16, or parallel.cuda_graphs=false"
        )


def _batch(config: Config) -> None:
    model, sampling = config.model, config.data.sampling
    if config.sequence_length < 16:
        raise ConfigError(f"sequence_length={config.sequence_length} is too short for a blank; use at least 16")
    if config.sequence_length > model.max_positions:
        raise ConfigError(
            f"sequence_length={config.sequence_length} is more than model.max_positions={model.max_positions}"
        )
    wanted = "2d" if model.positions in ("rotary_2d", "learned_2d") else "1d"
    if model.positions != "none" and sampling.positions != wanted:
        raise ConfigError(
            f"data.sampling.positions={sampling.positions} does not fit model.positions={model.positions}; "
            f"use data.sampling.positions={wanted}"
        )
    for key in ("micro_batch_size", "global_batch_size"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key}={getattr(config, key)} must be at least 1")
    schedule = config.schedule
    if schedule.rampup_start is not None:
        grow = config.global_batch_size - schedule.rampup_start
        if grow < 0 or min(schedule.rampup_increment, schedule.rampup_samples) < 1 or grow % schedule.rampup_increment:
            raise ConfigError(
                f"schedule.rampup_increment={schedule.rampup_increment} must lead from schedule.rampup_start="
                f"{schedule.rampup_start} to global_batch_size={config.global_batch_size} in whole steps, over "
                f"schedule.rampup_samples={schedule.rampup_samples} > 0"
            )


def _lora(config: Config) -> None:
    lora, parallel = config.lora, config.parallel
    if not lora.rank:
        return
    if lora.rank < 0 or not 0 < lora.alpha < math.inf:
        raise ConfigError(f"lora.rank={lora.rank} and lora.alpha={lora.alpha} must be more than 0; rank 0 is no LoRA")
    unknown = [word for word in lora.targets if word not in LORA_TARGETS]
    if unknown or not lora.targets:
        raise ConfigError(f"lora.targets={lora.targets}; use some of {', '.join(LORA_TARGETS)}")
    if parallel.pipeline_parallel > 1 or parallel.zero_stage == 3:
        raise ConfigError(
            f"lora.rank={lora.rank} needs the whole model in each replica; use parallel.pipeline_parallel=1 and "
            "parallel.zero_stage of 2 or less"
        )


def _prefix(config: Config) -> None:
    length, parallel = config.prefix.length, config.parallel
    if not length:
        return
    if length < 0 or config.lora.rank:
        raise ConfigError(
            f"prefix.length={length} with lora.rank={config.lora.rank}; give one of them, and a length of 0 for none"
        )
    if parallel.pipeline_parallel > 1 or parallel.zero_stage == 3:
        raise ConfigError(
            f"prefix.length={length} needs the whole model in each replica; use parallel.pipeline_parallel=1 and "
            "parallel.zero_stage of 2 or less"
        )


def _kernels(config: Config) -> None:
    model = config.model
    dim, kv_heads = model.head_dim or model.hidden_size // model.num_heads, model.num_kv_heads or model.num_heads
    if config.kernels.interval_attention == "flash4" and (dim != 128 or kv_heads != model.num_heads):
        raise ConfigError(
            f"kernels.interval_attention=flash4 takes heads of 128, as many for keys and values as for queries, not "
            f"{model.num_heads} heads of {dim} over {kv_heads}; use auto"
        )


def _fp8(config: Config) -> None:
    """FP8 products: from bf16, of matrices whose sides on a rank are multiples of 16."""
    model, parallel = config.model, config.parallel
    if not config.precision.fp8:
        return
    wrong = {
        "precision.dtype": (config.precision.dtype, config.precision.dtype != "bf16", "bf16"),
        "parallel.overlap_tensor": (parallel.overlap_tensor, parallel.overlap_tensor, "false"),
        "lora.rank": (config.lora.rank, config.lora.rank > 0, "0"),
        "prefix.length": (config.prefix.length, config.prefix.length > 0, "0"),
    }
    for key, (value, refused, right) in wrong.items():
        if refused:
            raise ConfigError(f"precision.fp8=true does not go with {key}={value}; use {right}, or precision.fp8=false")
    ranks, dim = parallel.tensor_parallel, model.head_dim or model.hidden_size // model.num_heads
    sides = {
        "model.hidden_size": model.hidden_size,
        "model.num_heads": model.num_heads * dim / ranks,
        "model.ffn_hidden_size": model.ffn_hidden_size / ranks,
    }
    if model.num_kv_heads and model.num_kv_heads != model.num_heads:
        shared = model.num_kv_heads % ranks  # then each rank computes all of them
        sides["model.num_kv_heads"] = 2 * model.num_kv_heads * dim / (1 if shared else ranks)
    for key, size in sides.items():
        if size % FP8_UNIT:
            raise ConfigError(
                f"precision.fp8=true needs matrices with sides of a multiple of {FP8_UNIT} on each of "
                f"parallel.tensor_parallel={ranks} ranks, but {key}={get(config, key)} gives {size:g}; change it, or "
                "use precision.fp8=false"
            )


def _numbers(config: Config) -> None:
    optimizer, schedule, stability = config.optimizer, config.schedule, config.stability
    positive = {
        "optimizer.lr": optimizer.lr,
        "optimizer.eps": optimizer.eps,
        "schedule.decay_samples": schedule.decay_samples,
        "logging.every_steps": config.logging.every_steps,
        "saving.keep_last": config.saving.keep_last,
        "evaluation.samples": config.evaluation.samples,
        "model.init_scale": config.model.init_scale,
        "optimizer.clip_relative": optimizer.clip_relative,
        "optimizer.clip_z": optimizer.clip_z,
        "stability.spike_sigma": stability.spike_sigma,
        "stability.lr_factor": stability.lr_factor,
        "stability.shrink_factor": stability.shrink_factor,
        "stability.pb_relax_alpha": stability.pb_relax_alpha,
        "stability.stress.query_key_gain": stability.stress.query_key_gain,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{key}={value} must be more than 0")
    switched = ["saving.every_steps", "saving.keep_every", "evaluation.every_steps", "evaluation.tasks_every_steps"]
    switched += ["optimizer.clip", "parallel.compare_replicas_every_steps", "cluster.kernel_times_every_steps"]
    counts = ("cooldown_steps", "max_acts", "roll_back_margin_steps", "skip_ahead_samples", "rewarm_samples")
    for key in (*switched, *(f"stability.{name}" for name in counts)):
        if get(config, key) < 0:
            raise ConfigError(f"{key}={get(config, key)} must not be negative; 0 switches it off")
    for key in ("model.deepnorm_alpha", "model.deepnorm_beta"):
        if (value := get(config, key)) is not None and not value > 0:
            raise ConfigError(f"{key}={value} must be more than 0; null means GLM-130B's")
    if optimizer.clip_warmup_steps is not None and optimizer.clip_warmup_steps < 1:
        raise ConfigError(f"optimizer.clip_warmup_steps={optimizer.clip_warmup_steps} must be at least 1")
    if optimizer.clip_decay is not None and not 0 <= optimizer.clip_decay < 1:
        raise ConfigError(f"optimizer.clip_decay={optimizer.clip_decay} must lie in [0, 1)")
    if schedule.warmup_samples > schedule.decay_samples:
        raise ConfigError(
            f"schedule.warmup_samples={schedule.warmup_samples} is more than "
            f"schedule.decay_samples={schedule.decay_samples}"
        )
    for key in ("max_steps", "max_samples", "evaluation.task_items"):
        if (limit := get(config, key)) is not None and limit < 1:
            raise ConfigError(f"{key}={limit} must be at least 1")
    if config.cluster.launcher == "local" and config.cluster.nodes != 1:
        raise ConfigError(f"cluster.nodes={config.cluster.nodes} needs another launcher than cluster.launcher=local")


def _stability(config: Config) -> None:
    stability, stress = config.stability, config.stability.stress
    for pair in stability.embedding_gradient_shrink_schedule:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, int | float) for part in pair)):
            raise ConfigError(
                f"stability.embedding_gradient_shrink_schedule holds {pair}; each entry is [consumed_samples, alpha]"
            )
    if stability.shrink_head and not config.model.tied_embeddings:
        raise ConfigError("stability.shrink_head=true needs model.tied_embeddings=true")
    if stability.softmax == "half" and config.precision.dtype == "fp32":
        raise ConfigError("stability.softmax=half has no meaning with precision.dtype=fp32; use fp16 or bf16")
    for word in stability.reactions:
        if word not in REACTIONS:
            raise ConfigError(f"stability.reactions holds {word!r}; use any of {', '.join(REACTIONS)}")
    if stability.spike_window < 16:
        raise ConfigError(f"stability.spike_window={stability.spike_window} is too short to judge by; use 16 or more")
    if "roll_back" in stability.reactions and not config.saving.every_steps:
        raise ConfigError("stability.reactions=[roll_back] needs checkpoints to go back to; set saving.every_steps")
    for event in stability.events:
        _event(event)
    planned = [(event["step"], event["action"]) for event in stability.events]
    if twice := [one for one in planned if planned.count(one) > 1]:
        raise ConfigError(f"stability.events asks for {twice[0][1]} at step {twice[0][0]} twice; make one act of them")
    for key in ("lr_steps", "poison_samples"):
        pair = getattr(stress, key)
        if pair and not (len(pair) == 2 and 0 <= pair[0] <= pair[1]):
            raise ConfigError(f"stability.stress.{key}={pair} must be [first, end] with 0 <= first <= end")
    if not 0 <= stress.flip_bit < 32:
        raise ConfigError(f"stability.stress.flip_bit={stress.flip_bit} must lie in 0 … 31")


def _event(event: Any) -> None:
    """An entry of stability.events: {step, action} and what the action takes, nothing else."""
    known = EVENTS.get(str(event.get("action"))) if isinstance(event, dict) else None
    if known is None or not isinstance(event.get("step"), int) or event["step"] < 1:
        raise ConfigError(
            f"stability.events holds {event}; each entry is {{step: N, action: …}} with a step from 1 on "
            f"and an action of {', '.join(EVENTS)}"
        )
    wrong = [key for key, value in event.items() if key not in known or not _fits(known[key], value)]
    missing = [key for key in known if key not in event and key not in OPTIONAL]
    if wrong or missing:
        raise ConfigError(
            f"stability.events holds {event}, where {' and '.join(wrong or missing)} is wrong; {event['action']} takes "
            f"{', '.join(f'{key} ({kind})' for key, kind in known.items())}"
        )


def _fits(kind: str, value: Any) -> bool:
    if kind == "range":
        return isinstance(value, list) and len(value) == 2 and 0 <= value[0] < value[1]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) if kind == "word" else number and (value >= 0 if kind == "samples" else value > 0)


def check_vocabulary(config: Config, vocab_size: int) -> None:
    """The dataset's tokens must have rows in the embedding; raises ConfigError."""
    if vocab_size > config.model.padded_vocab_size:
        raise ConfigError(
            f"model.padded_vocab_size={config.model.padded_vocab_size} is less than the {vocab_size} tokens of "
            f"data.path={config.data.path}; use at least {math.ceil(vocab_size / 128) * 128}"
        )
