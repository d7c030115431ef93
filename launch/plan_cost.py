"""Seconds of a training step, from what its kernels compute, read and send.

A product takes its FLOPs over a share of the peak, everything else its least bytes over a share of the memory
bandwidth; the shares are measured ones (`benchmarks/kernels/*.csv`, one H100) and taken to hold on other devices.
Communication is rings: 2 (n - 1) / n of the bytes for an all-reduce, half of that for a gather or scatter (Patarasuk
and Yuan 2009).

Legend: T tokens of a micro-batch, H hidden_size, F ffn_hidden_size, V padded_vocab_size, t, p, d tensor-, pipeline- and
data-parallel sizes, m micro-batches a step, e bytes of the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.hardware import Hardware
from train.arithmetic import (
    GATED,
    flops_per_token,
    hardware_flops_per_token,
    head_dim,
    kv_heads,
    layer_parameters,
    layers_per_stage,
    recomputed_layers,
    stage_parameters,
)
from train.config import Config
from train.memory import WEIGHT_BYTES, stream_bytes, stream_share, whole_micro_batches

PRODUCT = 0.80
"""Share of the peak that a large bf16 product reaches: 791 of 989 TFLOP/s on an H100."""
FP8_PRODUCT = 1.85
"""A large product of e4m3 values by rows, as a multiple of a bf16 one's speed: 1479 and 799 TFLOP/s on an H100
(`benchmarks/kernels/fp8_alone.csv`)."""
COPY = 0.90
"""Share of the data sheet's memory bandwidth that a copy reaches: 3004 of 3350 GB/s on an H100."""
HEAD = 0.71
"""The fused head and loss, as a share of a large product."""
ATTENTION = {"forward": 0.56, "backward": 0.44}
"""Interval attention at head_dim 128, as a share of a large product; attended pairs, 4 and 10 FLOPs a dimension."""
ATTENTION_DROPOUT = {"forward": 0.23, "backward": 0.27}
"""The same with dropout on the probabilities."""
ELEMENTWISE = {"forward": 0.97, "backward": 0.85}
"""Fused element-wise kernels, as a share of a copy."""
SUSTAINED = 0.878
"""A whole step against its kernels timed alone: clocks under load, gaps, weight gradients of long products. Set by one
measured run (1.42 B, ZeRO 1, micro-batch 16, one H100: 61,724 tokens/s); docs/planning.md holds others against it."""
KERNEL_SECONDS = 5e-6
"""From one kernel to the next when the host is the slower one."""
KERNELS = {"forward": 12, "backward": 24}
"""Kernels of a layer."""
RING = 0.80
"""Share of a link or network that a collective's ring reaches."""
HOP_SECONDS = {"link": 5e-6, "network": 12e-6}
"""Latency of one step of a ring."""
HIDDEN = 0.3
"""What communication costs though a computation hides it, as a share of its time: both want the memory. Assumed."""
GATHER_SECONDS = 7.5e-4
"""What gathering a layer's weights adds to a pass beyond what is sent. Set by one measured run of sharded weights
(1.42 B, two H200s, FSDP2, micro-batch 16: 118,535 tokens/s)."""
PASS_SECONDS = 6e-3
"""What the pipeline engine adds to each forward and backward pass: its instructions, and sends that wait. Set by one
measured run (1.42 B, two H200s, two stages, micro-batch 8, 16 a step: 102,436 tokens/s)."""


@dataclass(frozen=True)
class Shares:
    """What the data leaves of the work."""

    attended: float
    """Query-key pairs that the mask leaves, of all S x S."""
    targets: float
    """Slots with a target, of all S."""


@dataclass(frozen=True)
class StageSeconds:
    """One micro-batch on one pipeline stage."""

    forward: float
    """Everything of the forward pass, communication included."""
    backward: float
    """The same of the backward pass, recomputation included."""
    recompute: float
    tensor: float
    """Collectives of tensor parallelism, both passes."""
    send: float
    """Between stages, both passes."""
    gather: float
    """ZeRO 2 and 3: scattered gradients and gathered weights that no computation hides."""

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class StepSeconds:
    """One step, by what takes the time; the parts add up to `total`. Communication is what no computation hides."""

    compute: float
    recompute: float
    tensor: float
    send: float
    gather: float
    bubble: float
    """Waiting of the slowest stage while the pipeline fills and drains."""
    reduce: float
    """Gradients over the data-parallel ranks at the end of the step, and the new weights gathered."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Volumes:
    """Bytes that one rank sends in a step, by axis."""

    tensor: float
    pipeline: float
    data: float


class CostModel:
    """Times of one layout on one kind of machine."""

    def __init__(
        self, config: Config, hardware: Hardware, gpus_per_node: int, data_parallel: float, shares: Shares
    ) -> None:
        self.config, self.hardware, self.node, self.data, self.shares = (
            config,
            hardware,
            gpus_per_node,
            data_parallel,
            shares,
        )
        self.size = WEIGHT_BYTES[config.precision.dtype]
        self.tokens = config.micro_batch_size * config.sequence_length
        self.micro_batches = whole_micro_batches(config, data_parallel)
        self.product = hardware.peak(config.precision.dtype) * PRODUCT * SUSTAINED
        self.copy = (hardware.memory_gb_per_second or 0.0) * 1e9 * COPY * SUSTAINED

    def stages(self) -> list[StageSeconds]:
        """Each pipeline stage's micro-batch."""
        return [self._stage(stage) for stage in range(self.config.parallel.pipeline_parallel)]

    def step(self) -> StepSeconds:
        """1F1B: (m - 1) times the slowest stage, and once through all of them; then reduction and update."""
        return self.step_of(self.stages())

    def step_of(self, stages: Sequence[StageSeconds]) -> StepSeconds:
        """The step of given stage times."""
        slowest, count = max(stages, key=lambda stage: stage.total), self.micro_batches
        parts = ("recompute", "tensor", "send", "gather")
        known = {name: count * getattr(slowest, name) for name in parts}
        busy = count * slowest.total
        held = max(self._held())
        return StepSeconds(
            compute=busy - sum(known.values()),
            **known,
            bubble=(count - 1) * slowest.total + sum(stage.total for stage in stages) - busy,
            reduce=self._reduce_seconds(held),
            optimizer=self._update_seconds(held),
        )

    def volumes(self) -> Volumes:
        """What the busiest rank sends a step."""
        parallel = self.config.parallel
        layers = max(self._layers())
        held = max(self._held())
        # All-reduces a layer, or as much in gathers and scatters.
        passes = (
            4 + parallel.sequence_parallel + self._recomputed_sums() * recomputed_layers(parallel, 0, layers) / layers
        )
        ring = 2 * (parallel.tensor_parallel - 1) / parallel.tensor_parallel
        per_micro_batch = self._gather_bytes(held)
        return Volumes(
            tensor=self.micro_batches * layers * passes * ring * self._whole_bytes(),
            pipeline=0.0 if parallel.pipeline_parallel == 1 else self.micro_batches * 2 * self._stream_bytes(),
            data=self.micro_batches * per_micro_batch + self._reduce_bytes(held),
        )

    def _layers(self) -> list[int]:
        """Layers of each stage."""
        parallel = self.config.parallel
        return layers_per_stage(self.config.model.num_layers, parallel.pipeline_parallel, parallel.layers_per_stage)

    def _held(self) -> list[int]:
        """Parameters on one rank of each stage."""
        parallel = self.config.parallel
        sizes = parallel.pipeline_parallel, parallel.tensor_parallel
        return stage_parameters(self.config.model, *sizes, parallel.layers_per_stage)

    def _stage(self, stage: int) -> StageSeconds:
        model, parallel = self.config.model, self.config.parallel
        stages = parallel.pipeline_parallel
        layers = self._layers()[stage]
        forward, backward = (layers * self._layer_seconds(way) for way in ("forward", "backward"))
        tensor = self._tensor_seconds()
        tensor_forward, tensor_backward = 2 * layers * tensor, layers * self._tensor_backward_seconds(tensor)
        first = sum(self._layers()[:stage])
        recomputed = recomputed_layers(parallel, first, layers)
        recompute = recomputed * self._recompute_seconds()
        tensor_backward += self._recomputed_sums() * recomputed * tensor
        table = model.padded_vocab_size * model.hidden_size / parallel.tensor_parallel
        if stage == 0:
            tensor_forward += tensor
            forward += 3 * self._stream_bytes() / self.copy
            backward += (3 * self._stream_bytes() + 2 * table * self.size) / self.copy
        if stage == stages - 1:
            rows = self.tokens * self.shares.targets
            forward += 6 * rows * table / (self.product * HEAD)  # the fused head makes its gradients on the way
            tensor_backward += tensor * self.shares.targets * 2
        held = self._held()[stage]
        backward += self._accumulate_bytes(held) / self.copy
        send = 0.0
        if stages > 1:
            send = PASS_SECONDS + self._stream_bytes() / self._bandwidth("pipeline") + HOP_SECONDS["network"]
        gather = self._gather_seconds(held, forward + backward + recompute)
        return StageSeconds(
            forward=forward + tensor_forward + send,
            backward=backward + recompute + tensor_backward + send + gather,
            recompute=recompute,
            tensor=tensor_forward + tensor_backward,
            send=2 * send,
            gather=gather,
        )

    def _layer_seconds(self, way: str) -> float:
        """Computation of one layer for one micro-batch in one direction, on one rank."""
        model, tensor = self.config.model, self.config.parallel.tensor_parallel
        twice = 1 if way == "forward" else 2
        weights = layer_parameters(model, tensor)
        matrices = weights.attention + weights.ffn
        products = 2 * twice * self.tokens * matrices / self.product
        rounded = 0.0
        if self.config.precision.fp8:
            # Of the backward pass half: the gradients of the weights stay in bf16.
            products *= 1 / FP8_PRODUCT if way == "forward" else (1 + 1 / FP8_PRODUCT) / 2
            rounded = self._rounded_bytes(way, matrices) / self.copy
        # A thin micro-batch reads its weights for longer than it multiplies.
        products = max(products, twice * matrices * self.size / self.copy)
        pairs = self.tokens * self.config.sequence_length * self.shares.attended
        flops = (4 if way == "forward" else 10) * pairs * model.num_heads * head_dim(model) / tensor
        share = (ATTENTION_DROPOUT if model.attention_dropout else ATTENTION)[way]
        elementwise = self._elementwise_bytes(way) / (self.copy * ELEMENTWISE[way])
        return max(products + rounded + flops / (self.product * share) + elementwise, KERNELS[way] * KERNEL_SECONDS)

    def _rounded_bytes(self, way: str, matrices: int) -> float:
        """What FP8 products read in bf16 and write in e4m3 first: the weights, and their inputs or their gradients."""
        model, tensor = self.config.model, self.config.parallel.tensor_parallel
        attended, wide = model.num_heads * head_dim(model), model.ffn_hidden_size
        if way == "backward":
            attended += 2 * kv_heads(model) * head_dim(model)
            wide *= 2 if model.activation in GATED else 1
        return (self.size + 1) * (matrices + self.tokens * (2 * model.hidden_size + (attended + wide) / tensor))

    def _recompute_seconds(self) -> float:
        """What one layer computes again: the forward pass, or its branch's share of the operations."""
        model, parallel = self.config.model, self.config.parallel
        useful = flops_per_token(model, self.config.sequence_length)
        every = replace(parallel, activation_checkpointing_every_layers=1)
        full = replace(every, activation_checkpointing="full")
        again, whole = (
            hardware_flops_per_token(model, self.config.sequence_length, one) - useful for one in (every, full)
        )
        return self._layer_seconds("forward") * again / whole

    def _recomputed_sums(self) -> float:
        """All-reduces over the tensor-parallel ranks that a recomputed layer repeats.

        The whole forward pass has two; a branch stops before its own, but gathers its input where that is a share.
        """
        parallel = self.config.parallel
        branch = 0.5 * parallel.sequence_parallel
        return {"none": 0.0, "full": 2.0}.get(parallel.activation_checkpointing, branch)

    def _elementwise_bytes(self, way: str) -> float:
        """Least bytes of a layer's fused kernels, from the heads of `kernels/*.py`."""
        model, tensor = self.config.model, self.config.parallel.tensor_parallel
        norms: float = (4 if model.norm_placement == "sandwich" else 2) * model.hidden_size
        packed = (model.num_heads + 2 * kv_heads(model)) * head_dim(model) / tensor
        wide = model.ffn_hidden_size / tensor
        if model.activation in GATED:
            wide *= 3 if way == "forward" else 5
        else:
            wide *= 2 if way == "forward" else 3
        norms *= 3 if way == "forward" else 5
        norms /= stream_share(self.config)
        copies = 4 * model.hidden_size if tensor > 1 else 0  # what a collective must not overwrite is copied
        return self.tokens * self.size * (norms + 2 * packed + wide + copies)

    def _stream_bytes(self) -> float:
        return stream_bytes(self.config)  # [T, H], or a rank's share of it

    def _whole_bytes(self) -> float:
        return float(self.tokens * self.config.model.hidden_size * self.size)  # [T, H]

    def _accumulate_bytes(self, held: float) -> float:
        """Adding a micro-batch's gradients to those before."""
        return held * (10 if self.config.precision.dtype == "bf16" else 3 * self.size)

    def _update_seconds(self, held: float) -> float:
        """Master, moments and gradients read, master, moments and weights written, the norm read once more."""
        share = held / (self.data if self.config.parallel.zero_stage else 1)
        link = self.hardware.host_gb_per_second * 1e9
        moved = share * 8 / link if self.config.parallel.offload_optimizer else 0.0
        return max(moved, share * (12 + 12 + 4 + self.size + 4) / self.copy)

    def _tensor_seconds(self) -> float:
        """One all-reduce of the stream over the tensor-parallel ranks, or a gather and a scatter of its shares."""
        ranks = self.config.parallel.tensor_parallel
        if ranks == 1:
            return 0.0
        hop = HOP_SECONDS["network" if self._crosses("tensor") else "link"]
        return 2 * (ranks - 1) * (self._whole_bytes() / ranks / (self._bandwidth("tensor") * RING) + hop)

    def _tensor_backward_seconds(self, once: float) -> float:
        """A layer's collectives of the backward pass that its weight gradients do not hide.

        once: seconds of one all-reduce. Two run beside the weight gradients of the column-parallel products; with
        shares of the sequence, the row-parallel products wait for two gathers besides.
        """
        model, parallel = self.config.model, self.config.parallel
        packed = (model.num_heads + 2 * kv_heads(model)) * head_dim(model)
        first = (2 if model.activation in GATED else 1) * model.ffn_hidden_size
        columns = (packed + first) * model.hidden_size / parallel.tensor_parallel
        beside = 2 * self.tokens * columns / self.product
        return max(2 * once - beside, HIDDEN * 2 * once) + (once if parallel.sequence_parallel else 0.0)

    def _gather_bytes(self, held: float) -> float:
        """What ZeRO 2 and 3 send for each micro-batch; DeepSpeed reduces each micro-batch's gradients there."""
        parallel = self.config.parallel
        if parallel.zero_stage < 2 or self.data <= 1:
            return 0.0
        return held * self.size * (1 + self._gathers()) * (self.data - 1) / self.data

    def _gathers(self) -> int:
        """How often ZeRO 3 gathers a layer for one micro-batch; recomputed layers once more."""
        if self.config.parallel.zero_stage < 3:
            return 0
        return 2 if self.config.parallel.activation_checkpointing == "none" else 3

    def _gather_seconds(self, held: float, compute: float) -> float:
        parallel = self.config.parallel
        seconds = self._gather_bytes(held) / (self._bandwidth("data") * RING)
        if parallel.overlap_communication:
            seconds = max(seconds - compute, HIDDEN * seconds)
        layers = self.config.model.num_layers if parallel.zero_stage == 3 and self.data > 1 else 0
        return seconds + layers * self._gathers() * GATHER_SECONDS

    def _reduce_bytes(self, held: float) -> float:
        parallel, dtype = self.config.parallel, self.config.precision.dtype
        if self.data <= 1 or parallel.zero_stage == 3:
            return 0.0
        share = (self.data - 1) / self.data
        # In bf16 ZeRO 1 scatters its fp32 sums (`train.main_grads`); DeepSpeed's own reduce whole gradients everywhere.
        reduced = 0 if parallel.zero_stage > 1 else 4 if dtype == "bf16" else 2 * self.size
        gathered = self.size if parallel.zero_stage else 0
        return held * share * (reduced + gathered)

    def _reduce_seconds(self, held: float) -> float:
        if self.data <= 1:
            return 0.0
        hops = 2 * (self.data - 1) * HOP_SECONDS["network" if self._crosses("data") else "link"]
        return self._reduce_bytes(held) / (self._bandwidth("data") * RING) + hops

    def _crosses(self, axis: str) -> bool:
        """Whether an axis leaves the node. Ranks are laid out tensor first, then data, then pipeline."""
        parallel = self.config.parallel
        span = {"tensor": float(parallel.tensor_parallel), "data": parallel.tensor_parallel * self.data}
        if axis == "pipeline":
            return parallel.pipeline_parallel * parallel.tensor_parallel * self.data > self.node
        return span[axis] > self.node

    def _bandwidth(self, axis: str) -> float:
        """Bytes a second that one rank can send along an axis."""
        link = (self.hardware.link_gb_per_second or 0.0) * 1e9
        if not self._crosses(axis):
            return link
        network = (self.hardware.network_gb_per_second or 0.0) * 1e9
        if axis == "pipeline":
            return network
        # The rings of one node share its network: a group with several ranks there uses all of theirs.
        inside = min(self.node, self.config.parallel.tensor_parallel)
        together = self.node if axis == "tensor" else max(1.0, self.node / inside)
        return min(link, network * together)
