"""What one rank holds on its device while it trains, by kind, from the config alone. Free of torch, like arithmetic.py.

State is counted as DeepSpeed's optimizers hold it, which is not always the textbook's sixteen bytes a parameter: bf16
with ZeRO 1 sums gradients in fp32 (`train/main_grads.py`), and ZeRO keeps fp32 masters of fp32 weights too.
Activations are what the fused kernels' autograd functions save (`kernels/*_triton.py`); tests hold both against tensors
of real engines.

Legend: T tokens of a micro-batch, H hidden_size, F ffn_hidden_size, V padded_vocab_size, e bytes of the compute dtype.
"""

from dataclasses import dataclass, fields

from train.arithmetic import (
    GATED,
    POST_NORM,
    embedding_parameters,
    head_dim,
    kv_heads,
    layer_parameters,
    layers_per_stage,
    recomputed_layers,
    stage_parameters,
)
from train.config import Config, ModelConfig

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LOGITS_BYTES = 1200 * 2**20
"""fp32 logits that the fused head holds at a time, as in `kernels/linear_cross_entropy_triton.py`."""
MOMENTS_PIECE = 1 << 25
"""Elements whose moments pass through the device at a time (`train/host_moments.py`); two pieces are there."""
LIVE_PARAMETERS = 1_000_000_000
"""Gathered parameters that ZeRO 3 keeps at most beyond a layer (DeepSpeed's stage3_max_live_parameters)."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model state a rank; float, since a planned data-parallel size need not be whole."""

    weights: float
    gradients: float
    """While micro-batches accumulate."""
    master: float
    """fp32 copy of the weights."""
    adam: float
    """Both moments, fp32."""
    update: float
    """Gradients while the optimizer steps: what is left of the accumulated ones and the fp32 copy it works from."""

    @property
    def total(self) -> float:
        """All that is held at the end of the backward pass."""
        return self.weights + self.gradients + self.master + self.adam


def state_bytes(parameters: float, dtype: str, zero_stage: int, data_parallel: float) -> StateBytes:
    """State of so many parameters of one rank (its tensor-parallel part of its stage).

    dtype: `fp32`, `bf16` or `fp16` as in precision.dtype. ZeRO 1 divides master and moments over the data-parallel
    ranks, 2 the gradients too, 3 the weights too (arXiv 1910.02054, figure 1).
    """
    size = WEIGHT_BYTES[dtype]
    shares = [parameters / (data_parallel if zero_stage >= stage else 1) for stage in (1, 2, 3)]
    gradient = 4 if dtype == "bf16" else size
    if zero_stage == 0 or _sums_in_place(dtype, zero_stage):
        update = shares[1] * gradient
    elif dtype == "bf16" and zero_stage == 2:
        update = shares[0] * gradient  # accumulated in fp32 already, so there is nothing to copy
    else:
        update = shares[0] * (gradient + 4)
    return StateBytes(
        weights=shares[2] * size,
        gradients=shares[1] * gradient,
        master=0 if zero_stage == 0 else shares[0] * 4,
        adam=shares[0] * 8,
        update=update,
    )


def _sums_in_place(dtype: str, zero_stage: int) -> bool:
    """Whether products add weight gradients into fp32 sums themselves, as under DeepSpeed's bf16 optimizer."""
    return dtype == "bf16" and zero_stage == 1


def layer_saved_bytes(config: Config, recompute: str) -> float:
    """What one layer keeps of one micro-batch for its backward pass.

    recompute: what is not kept, as in parallel.activation_checkpointing.
    """
    size, tensor = WEIGHT_BYTES[config.precision.dtype], config.parallel.tensor_parallel
    if recompute == "full":
        return stream_bytes(config)
    slots = config.micro_batch_size * config.sequence_length
    return slots * _layer_bytes_per_token(config.model, tensor, stream_share(config), size, recompute)


def stream_share(config: Config) -> int:
    """Ranks that share the sequence where norms, dropout and residuals stand: the tensor-parallel ones, or one."""
    return config.parallel.tensor_parallel if config.parallel.sequence_parallel else 1


def stream_bytes(config: Config) -> float:
    """[T, H] of one micro-batch, what flows from layer to layer on a rank."""
    slots = config.micro_batch_size * config.sequence_length
    return slots * config.model.hidden_size * WEIGHT_BYTES[config.precision.dtype] / stream_share(config)


def _layer_bytes_per_token(model: ModelConfig, tensor: int, share: int, size: int, recompute: str) -> float:
    heads, dim, width = model.num_heads / tensor, head_dim(model), model.ffn_hidden_size / tensor
    shared_kv = kv_heads(model) % tensor != 0
    pairs = 2 * (kv_heads(model) if shared_kv else kv_heads(model) / tensor)
    # Input of both norms' sums and products: the stream, its norm (the same tensor after a post-norm), both branches.
    hidden = 4 * model.hidden_size / share
    statistics = 4.0 * 2 * 2  # each norm's mean and deviation
    inner = 0.0
    if recompute != "attention":
        inner += (heads + pairs + heads) * dim  # query, key and value as attention reads them, its output
        # Its log-sum-exp; positions and intervals as int32, the intervals twice where a batch makes them contiguous.
        statistics += 4 * heads + 4 * 4
    if recompute != "ffn":
        inner += ((2 if model.activation in GATED else 1) + 1) * width
    if model.norm_placement == "sandwich":
        # Each branch's norm saves its input; the sum of the attention's saves the norm's output as before.
        hidden += 2 * model.hidden_size / share
        statistics += 2 * 2 * 4
    if model.norm_placement not in POST_NORM and model.hidden_dropout:
        hidden += model.hidden_size / share  # the last sum's dropout is not fused and keeps its mask
    return size * (hidden + inner) + statistics


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step on the rank that needs most, by kind."""

    stage: int
    """Pipeline stage of that rank."""
    weights: float
    gradients: float
    master: float
    adam: float
    activations: float
    """Saved for the backward pass, over all micro-batches in flight; operands of products that are put off."""
    working: float
    """One layer's backward pass: what it recomputes, and the gradients inside it."""
    head: float
    """Logits of a chunk, the gradients of hidden states and table."""
    buffers: float
    """Reduction buckets, gathered parameters, what the pipeline sends, what FP8 products round into."""
    update: float
    """What the optimizer's step needs beyond the backward pass's peak."""
    fragmentation: float
    """Reserved by the allocator and not usable."""
    runtime: float
    """Device context, compiled kernels, communication library."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.kinds().values())

    def kinds(self) -> dict[str, float]:
        """Bytes by kind, largest groups as named above."""
        return {one.name: float(getattr(self, one.name)) for one in fields(self) if one.name != "stage"}


def peak_memory(config: Config, **how: float) -> Memory:
    """Peak of a step on the fullest stage. how: as for `memory_by_stage`."""
    return max(memory_by_stage(config, **how), key=lambda memory: memory.total)


def memory_by_stage(
    config: Config,
    *,
    data_parallel: float,
    micro_batches: float,
    target_share: float = 1.0,
    fragmentation: float = 0.0,
    runtime_bytes: float = 0.0,
) -> list[Memory]:
    """Peak of a step on a rank of each stage.

    data_parallel, micro_batches (a step and replica): need not be whole. target_share: targets a slot; the head runs on
    those rows only. fragmentation: share of all that comes and goes during a step. runtime_bytes: added as they are.
    """
    stages = range(config.parallel.pipeline_parallel)
    each = [_stage_memory(config, stage, data_parallel, micro_batches, target_share) for stage in stages]
    return [_with_overheads(memory, fragmentation, runtime_bytes) for memory in each]


def _stage_memory(
    config: Config, stage: int, data_parallel: float, micro_batches: float, target_share: float
) -> Memory:
    model, parallel, dtype = config.model, config.parallel, config.precision.dtype
    tensor, stages = parallel.tensor_parallel, parallel.pipeline_parallel
    size, tokens = WEIGHT_BYTES[dtype], config.micro_batch_size * config.sequence_length
    cut = parallel.layers_per_stage
    held = stage_parameters(model, stages, tensor, cut)[stage]
    state = state_bytes(held, dtype, parallel.zero_stage, data_parallel)
    layers = layers_per_stage(model.num_layers, stages, cut)[stage]
    recompute = parallel.activation_checkpointing
    first = sum(layers_per_stage(model.num_layers, stages, cut)[:stage])
    recomputed = recomputed_layers(parallel, first, layers)
    whole, kept = layer_saved_bytes(config, "none"), layer_saved_bytes(config, recompute)
    in_flight = max(1.0, min(float(stages - stage), micro_batches))
    boundary = stream_bytes(config)
    activations = (layers - recomputed) * whole + recomputed * kept
    if stage == 0:
        # Token ids; the lookup, which dropout and the first norm save.
        copies = (model.norm_placement in POST_NORM) + (model.hidden_dropout > 0)
        activations += tokens * 8 + copies * boundary
    if stage == stages - 1 and model.norm_placement not in POST_NORM:
        activations += boundary  # the final norm's input
    working = _layer_backward_bytes(config, size)
    if recomputed:
        working += whole if recompute == "full" else whole - kept
    head = _head_bytes(config, size, target_share) if stage == stages - 1 else 0.0
    buffers = _bucket_bytes(config, held, size)
    if config.precision.fp8:
        buffers += _rounded_bytes(config)
    if parallel.offload_optimizer:
        buffers += 2 * min(8 * MOMENTS_PIECE, state.adam)
    if stages > 1:
        meta = config.micro_batch_size * 8 * (4 * config.sequence_length + 1)
        # Each micro-batch in flight keeps what it received and what it sent; two gradients are on their way.
        buffers += in_flight * (boundary + 2 * meta) + 2 * boundary
    kept_back = min(stage, micro_batches) if parallel.pipeline_schedule == "zero_bubble" else 0.0
    held_back = kept_back * layers * _operand_bytes(config, size)
    # The head's gradients are gone when the last layer's backward pass is at its widest, and the other way round.
    working, head = (working, 0.0) if working >= head else (0.0, head)
    during = state.gradients + in_flight * activations + held_back + working + head + buffers
    return Memory(
        stage=stage,
        weights=state.weights,
        gradients=state.gradients,
        master=state.master,
        adam=0.0 if parallel.offload_optimizer else state.adam,
        activations=in_flight * activations + held_back,
        working=working,
        head=head,
        buffers=buffers,
        update=max(0.0, state.update - during),
        fragmentation=0.0,
        runtime=0.0,
    )


def _with_overheads(memory: Memory, fragmentation: float, runtime_bytes: float) -> Memory:
    kinds = memory.kinds()
    moving = memory.activations + memory.working + memory.head + memory.buffers
    kinds |= {"fragmentation": fragmentation * moving, "runtime": runtime_bytes}
    return Memory(stage=memory.stage, **kinds)


def _operand_bytes(config: Config, size: int) -> float:
    """What a layer's four products need for their weights' gradients: inputs, and gradients of outputs."""
    model, tensor = config.model, config.parallel.tensor_parallel
    dim, inner = head_dim(model), model.ffn_hidden_size * ((2 if model.activation in GATED else 1) + 1)
    heads = 2 * model.num_heads + 2 * kv_heads(model)
    slots = config.micro_batch_size * config.sequence_length
    return slots * size * (4 * model.hidden_size + (heads * dim + inner) / tensor)


def _layer_backward_bytes(config: Config, size: int) -> float:
    """Gradients that live at once inside a layer: of the FFN's wide tensors and of three streams."""
    model, tensor = config.model, config.parallel.tensor_parallel
    wide = ((2 if model.activation in GATED else 1) + 1) * model.ffn_hidden_size / tensor
    whole = 1 if stream_share(config) > 1 else 0  # a product gathers its input
    slots = config.micro_batch_size * config.sequence_length
    return slots * size * (wide + whole * model.hidden_size) + 3 * stream_bytes(config)


def _rounded_bytes(config: Config) -> float:
    """What FP8 products round into, a byte a value: the largest one's operands, gradients of outputs and a weight."""
    model = config.model
    heads = model.num_heads * head_dim(model) * (3 if kv_heads(model) == model.num_heads else 1)
    first = model.ffn_hidden_size * (2 if model.activation in GATED else 1)
    slots = config.micro_batch_size * config.sequence_length
    return max(heads, first) / config.parallel.tensor_parallel * (slots + model.hidden_size)


def _head_bytes(config: Config, size: int, target_share: float) -> float:
    model, tensor = config.model, config.parallel.tensor_parallel
    rows = config.micro_batch_size * config.sequence_length * target_share
    vocabulary = model.padded_vocab_size / tensor
    chunk = min(4 * rows * vocabulary, LOGITS_BYTES)
    table = vocabulary * model.hidden_size
    made = 4 if _sums_in_place(config.precision.dtype, config.parallel.zero_stage) else 4 + size
    return chunk + made * table + rows * model.hidden_size * (4 + size)


def _bucket_bytes(config: Config, held: float, size: int) -> float:
    parallel, dtype = config.parallel, config.precision.dtype
    if parallel.zero_stage == 0 or _sums_in_place(dtype, parallel.zero_stage):
        return 0.0  # sums in fp32 are scattered where they lie
    bucket = min(parallel.reduce_bucket_elements, held)
    buckets = (2 if parallel.overlap_communication else 1) * bucket * size
    if parallel.zero_stage < 3:
        return float(buckets)
    layer = layer_parameters(config.model).total + embedding_parameters(config.model).total
    gathered = min(held, LIVE_PARAMETERS + layer, parallel.allgather_bucket_elements + layer)
    return float(buckets + size * gathered)


def whole_micro_batches(config: Config, data_parallel: float) -> float:
    """Micro-batches a step and replica; fractional where the layout does not divide."""
    return config.global_batch_size / (config.micro_batch_size * data_parallel)


def largest_holders(config: Config, memory: Memory) -> str:
    """The three largest kinds of a prediction, each with the key that would make it smaller; for a message."""
    kinds = sorted(memory.kinds().items(), key=lambda item: -item[1])[:3]
    return "; ".join(f"{kind} {size / 2**30:.3g} GiB ({_remedy(config, kind)})" for kind, size in kinds)


def _remedy(config: Config, kind: str) -> str:
    parallel = config.parallel
    fewer = "a smaller micro_batch_size" if config.micro_batch_size > 1 else "more parallel.tensor_parallel"
    if kind == "activations" and parallel.activation_checkpointing != "full":
        return "parallel.activation_checkpointing=full"
    if kind == "activations" and parallel.activation_checkpointing_every_layers > 1:
        return "a smaller parallel.activation_checkpointing_every_layers"
    if kind in ("activations", "working") and parallel.tensor_parallel > 1 and not parallel.sequence_parallel:
        return "parallel.sequence_parallel=true"
    if kind in ("activations", "working", "head"):
        return fewer
    if kind == "buffers":
        return "a smaller parallel.reduce_bucket_elements"
    if kind == "adam" and parallel.zero_stage > 0:
        return "parallel.offload_optimizer=true"
    # The ZeRO stage from which this kind is divided over the data-parallel ranks.
    stage = {"weights": 3, "gradients": 2}.get(kind, 1)
    if parallel.zero_stage >= stage:
        return "more ranks"
    return f"parallel.zero_stage={stage}" if stage == 1 or parallel.pipeline_parallel == 1 else "more pipeline stages"
