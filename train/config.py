"""The schema of a training run: every key, its type, its unit and what it does.

`configs/` holds the values, this file the meaning; `train/rules.py` the rules between keys. Hydra refuses a key that is
not here. Lists of allowed words stand in `CHOICES` and are checked with the rules.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from data_prep.config import DataConfig, TokenizerConfig
from kernels.config import KernelsConfig
from train.cluster import ClusterConfig
from train.stability.config import StabilityConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "model.norm_placement": ("deepnorm", "post", "pre", "sandwich", "peri"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.positions": ("rotary_1d", "rotary_2d", "learned_2d", "none"),
    "model.rotary_scaling": ("none", "linear", "ntk", "yarn"),
    "model.activation": ("geglu", "swiglu", "gelu", "gelu_tanh"),
    "model.bias": ("all", "qkv", "none"),
    "model.init": ("xavier", "normal"),
    "parallel.pipeline_schedule": ("1f1b", "zero_bubble"),
    "parallel.activation_checkpointing": ("none", "full", "attention", "ffn"),
    "schedule.kind": ("cosine", "linear", "constant"),
    "precision.dtype": ("fp32", "bf16", "fp16"),
    "optimizer.clip_kind": ("global", "adagc", "zclip"),
    "stability.softmax": ("fp32", "scaled", "half", "pb_relax"),
    "stability.stress.poison": ("repeat", "garbage"),
    "stability.stress.flip": ("weight", "gradient"),
    "loss.weighting": ("sequence", "token"),
    "logging.wandb": ("online", "offline", "disabled"),
    "cluster.launcher": ("local", "ssh", "slurm", "kubernetes"),
    "cluster.slurm.container": ("none", "pyxis", "apptainer"),
    "kernels.residual_norm": ("auto", "reference", "compile", "triton"),
    "kernels.bias_activation": ("auto", "reference", "compile", "triton"),
    "kernels.rotary": ("auto", "reference", "compile", "triton"),
    "kernels.interval_attention": ("auto", "reference", "compile", "triton", "flex", "flash4", "unfused", "sdpa"),
    "kernels.linear_cross_entropy": ("auto", "reference", "compile", "triton"),
    "kernels.embedding": ("auto", "reference", "compile"),
    "kernels.decode_attention": ("auto", "reference", "triton"),
    "kernels.greedy_step": ("auto", "reference", "triton"),
    "kernels.fp8_product": ("auto", "reference", "triton"),
    "kernels.quantised_matmul": ("auto", "reference", "compile", "triton"),
}
"""The words a key may hold."""


@dataclass
class ModelConfig:
    """One decoder-like GLM: a list of equal layers between an embedding and a head."""

    name: str = MISSING
    """Name shown in logs and reports."""
    num_layers: int = MISSING
    """Transformer layers."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    num_heads: int = MISSING
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads: null means one for each query head, 1 is multi-query attention."""
    head_dim: int | None = None
    """Dimensions of a head; null means hidden_size / num_heads."""
    ffn_hidden_size: int = MISSING
    """Width inside the feed-forward block (of one half, when it is gated)."""
    padded_vocab_size: int = MISSING
    """Rows of the embedding: pieces, specials and padding. A model value, never a function of tensor parallelism."""
    max_positions: int = MISSING
    """Longest sequence in slots; the default of sequence_length."""
    norm_placement: str = "deepnorm"
    """deepnorm, post, pre, sandwich (a second norm on each branch's output) or peri (sandwich and embedding_norm)."""
    norm: str = "layernorm"
    """layernorm or rmsnorm."""
    norm_eps: float = 1e-5
    """Epsilon inside the norms."""
    deepnorm_alpha: float | None = None
    """Residual scale of deepnorm; null means sqrt(2 * num_layers)."""
    deepnorm_beta: float | None = None
    """Gain of deepnorm's initial value, output and FFN matrices; null means 1 / sqrt(2 * num_layers)."""
    positions: str = "rotary_1d"
    """rotary_1d, rotary_2d (half of the dims for the position, half for the block), learned_2d or none."""
    rotary_fraction: float = 1.0
    """Share of a head's dims that are rotated (ChatGLM2: 0.5)."""
    rotary_interleaved: bool = False
    """Rotate neighbouring pairs (ChatGLM2) in place of the two halves (GLM-130B)."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_scaling: str = "none"
    """none; linear (positions divided by rotary_scaling_factor, arXiv 2306.15595), ntk (a larger base: the slowest
    pair of dims turns as with linear, the fastest as before) or yarn (pairs that turn often over
    rotary_original_positions as before, those that turn less than once as with linear, and sharper attention, arXiv
    2309.00071), for a longer context than that of initialize_from."""
    rotary_scaling_factor: float = 1.0
    """That factor, more than 1 where there is a scaling."""
    rotary_original_positions: int = 0
    """For yarn: the sequence length that initialize_from was trained on; 0 with the others."""
    rotary_fp16_angles: bool = False
    """Compute the angles in fp16 as the released GLM-130B does; only to continue from its weights."""
    activation: str = "geglu"
    """geglu (exact erf), swiglu, gelu (erf) or gelu_tanh."""
    bias: str = "all"
    """Which linear layers carry a bias: all, qkv or none."""
    tied_embeddings: bool = True
    """Share the embedding with the head."""
    embedding_norm: bool = False
    """A norm on the embedding's output, before anything else reads it (BLOOM)."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key before they are rotated, one weight a dimension for all heads."""
    hidden_dropout: float = 0.0
    """Dropout on the embedding and on each branch's output."""
    attention_dropout: float = 0.0
    """Dropout on the attention probabilities."""
    init: str = "xavier"
    """xavier (on the full, unsharded fans; with deepnorm's gain) or normal (init_std, output layers / sqrt(2 L))."""
    init_std: float | None = 0.02
    """Standard deviation for init=normal; null means sqrt(1 / (3 * hidden_size)), BLOOM's."""
    init_scale: float = 1.0
    """Factor on the deviation of every matrix and table, whichever init is chosen."""


@dataclass
class ParallelConfig:
    """How the model and the batch are divided; data_parallel is what remains of the world size."""

    tensor_parallel: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_parallel: int = 1
    """Stages that share the list of layers; more than one means zero_stage <= 1."""
    pipeline_schedule: str = "1f1b"
    """1f1b; zero_bubble: weights' gradients are put off until a stage would wait (bf16, zero_stage 1), same numbers."""
    layers_per_stage: list[int] = field(default_factory=list)
    """Layers of each stage, as `python -m train.balance` measures them; empty: embedding and head count as one each."""
    sequence_parallel: bool = False
    """Each tensor-parallel rank holds a share of sequence_length (it must divide it) between products: less memory."""
    overlap_tensor: bool = False
    """Tensor-parallel traffic beside products, the same numbers. With sequence_parallel this rank's rows are multiplied
    while the others' come in or leave; else half of a row-parallel product while the other half is summed. Branches
    that activation_checkpointing=attention or ffn recompute repeat their sums."""
    zero_stage: int = 1
    """0 plain, 1 optimizer states, 2 and gradients, 3 and parameters divided over the data-parallel ranks."""
    activation_checkpointing: str = "none"
    """What the backward pass computes again in place of keeping it: none; full (a layer is kept as its input alone);
    attention or ffn (that branch of a layer, from its input)."""
    activation_checkpointing_every_layers: int = 1
    """Do so in one layer of so many, layers.0 first; the others keep everything."""
    compare_replicas_every_steps: int = 100
    """Compare what several ranks hold alike, bit for bit, each so many steps: a difference ends the run and names the
    parameter and the ranks. 0 switches it off."""
    offload_optimizer: bool = False
    """Keep Adam's moments (8 bytes a parameter of this rank's share) in host memory; needs zero_stage 1 or more."""
    reduce_bucket_elements: int = 500_000_000
    """Elements of a gradient-reduction bucket; smaller buckets use less memory."""
    allgather_bucket_elements: int = 500_000_000
    """Elements of a parameter all-gather bucket."""
    overlap_communication: bool = False
    """Reduce gradients while the backward pass goes on: one stage, on accelerators, zero_stage 1 to 3. In bf16 with
    zero_stage 1 that is done unasked. Elsewhere it has no effect, and a warning says so."""
    cuda_graphs: bool = False
    """Launch each micro-batch's layers as one CUDA graph forward and one backward: faster wherever the host, not the
    device, sets the pace (small models, tensor parallelism). One stage, bf16, zero_stage 1; on a CPU without effect."""

    def one_stage(self, tensor_parallel: int) -> None:
        """Divide the model over so many tensor-parallel ranks and nothing else."""
        self.tensor_parallel, self.pipeline_parallel, self.layers_per_stage = tensor_parallel, 1, []
        self.sequence_parallel, self.overlap_tensor, self.pipeline_schedule = False, False, "1f1b"


@dataclass
class OptimizerConfig:
    """AdamW with decay on matrices only."""

    lr: float = MISSING
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; never on biases and norms."""
    decay_embeddings: bool = True
    """Whether embedding tables decay too."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off (the norm is logged all the same). With clip_kind adagc it
    holds for the warm-up only, with zclip beside the z-score."""
    clip_kind: str = "global"
    """global; adagc (each tensor against an average of its own norms) or zclip (the global norm's z-score)."""
    clip_decay: float | None = None
    """adagc, zclip: decay of the running averages; null: 0.98 and 0.97."""
    clip_warmup_steps: int | None = None
    """adagc, zclip: steps that only fill the averages and are clipped to optimizer.clip; null: 100 and 25."""
    clip_relative: float = 1.05
    """adagc: largest norm of a tensor relative to its average."""
    clip_z: float = 2.5
    """zclip: deviations over the mean from which a norm is clipped."""


@dataclass
class ScheduleConfig:
    """Learning rate and batch size as functions of the samples consumed."""

    kind: str = "cosine"
    """cosine, linear or constant after the warm-up."""
    warmup_samples: int = 0
    """Samples of linear warm-up from 0 to optimizer.lr."""
    decay_samples: int = MISSING
    """Samples, counted from 0, after which the rate stays at min_lr. Explicit, so that stopping early or going on later
    never bends the curve."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    rampup_start: int | None = None
    """Global batch size of the first step; null switches the ramp-up off."""
    rampup_increment: int = 1
    """Samples by which the batch grows at a time."""
    rampup_samples: int = 0
    """Samples over which it grows from rampup_start to global_batch_size."""


@dataclass
class PrecisionConfig:
    """Number formats. Master weights and optimizer states are fp32 whatever is chosen."""

    dtype: str = MISSING
    """fp32, bf16 or fp16: weights in the forward pass, activations and communication."""
    fp8: bool = False
    """With bf16, on Hopper GPUs: the layers' products of values rounded to e4m3, forward and for the inputs' gradients.
    Gradients of weights, attention, embedding, head, and all that runs without gradients (evaluation, generation) stay
    in bf16. mfu stays a share of the bf16 peak."""
    loss_scale: float = 0.0
    """fp16: a fixed loss scale; 0 means dynamic."""
    loss_scale_initial_power: int = 16
    """fp16: the dynamic scale starts at 2 to this power."""
    loss_scale_window: int = 2000
    """fp16: steps without overflow after which the scale doubles."""
    loss_scale_hysteresis: int = 2
    """fp16: overflows that are borne before the scale halves."""
    loss_scale_minimum: float = 1.0
    """fp16: the floor; an overflow there stops the run."""


@dataclass
class LossConfig:
    """What a training step minimises: the sum of loss_weight times cross entropy, over samples."""

    weighting: str = "sequence"
    """sequence (each sequence counts 1, GLM-130B's) or token (each target counts the same)."""
    z_loss: float = 0.0
    """Coefficient of the squared log-partition; logged apart from the loss."""
    softcap: float = 0.0
    """Cap c of the logits, c * tanh(logit / c); 0 switches it off."""


@dataclass
class LoraConfig:
    """Low-rank adaptation of a model that `initialize_from` names: its own weights stay as they are."""

    rank: int = 0
    """Rank of what is added to each matrix; 0 trains the whole model."""
    alpha: float = 32.0
    """What is added is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["qkv"])
    """Which matrices of a layer: qkv (query, key and value), dense (attention's output), ffn (both)."""


@dataclass
class PrefixConfig:
    """P-Tuning v2 of a model that `initialize_from` names: learnt keys and values in front of every layer's."""

    length: int = 0
    """Slots of the prefix; 0 is none. The attention then runs through sdpa or reference."""


@dataclass
class SavingConfig:
    """Checkpoints under run_dir/checkpoints."""

    every_steps: int = 100
    """Save each so many steps; 0 saves only at the end and on a signal."""
    keep_last: int = 2
    """Newest checkpoints that are kept, multiples of every_steps; one made on a signal stays while it is the newest."""
    keep_every: int = 0
    """Steps whose multiples are kept for ever; 0 keeps none beyond keep_last."""
    asynchronous: bool = True
    """Write files in the background from a copy in host memory (what this rank saves: in half precision 14 bytes for
    each of its parameters, divided by the data-parallel ranks); false makes the step wait for the disk."""


@dataclass
class ResumeConfig:
    """What happens when run_dir already holds a run."""

    enabled: bool = True
    """Continue from the newest whole checkpoint; false refuses to touch an existing run. Restarts of a job continue."""
    step: int | None = None
    """Resume from this step's checkpoint in place of the newest; restarts of the job go on from the newest again."""
    reshape: bool = False
    """Allow another tensor_parallel, pipeline_parallel or zero_stage than the checkpoint was written with."""
    allow: list[str] = field(default_factory=list)
    """Keys that differ from the checkpoint's config on purpose, such as optimizer.lr; `train/resume.py` lists those
    that always may."""


@dataclass
class EvaluationConfig:
    """Validation on held-out shards during training, and the end of the run."""

    every_steps: int = 100
    """Validate each so many steps and at the end; 0 switches validation off."""
    samples: int = 64
    """Held-out samples a validation; the same ones each time."""
    blanks: int = 3
    """Blanks a language to fill in the report at the end."""
    tasks: list[str] = field(default_factory=list)
    """Task files, jsonl (see train/tasks.py), to run now and then while training."""
    tasks_every_steps: int = 500
    """Run the tasks each so many steps and at the end; 0 runs them at the end only."""
    task_items: int | None = 200
    """Items of each task to take, from its start; null means all."""


@dataclass
class LoggingConfig:
    """What the user sees while it runs."""

    every_steps: int = 10
    """Steps between two reads of the device: progress line, metrics.jsonl, wandb. Each step keeps its own line."""
    wandb: str = "disabled"
    """online, offline or disabled; a failing wandb never stops a run."""
    wandb_project: str = "tiankong"
    """Project name there."""
    progress: bool = True
    """The live line on rank 0."""
    report: bool = True
    """Write report.html at the end."""


@dataclass
class Config:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    run_dir: str = "runs/default"
    """Folder of this run: config, metrics, checkpoints, report."""
    seed: int = 1234
    """Root of every random number: data, masks, dropout, initial weights."""
    sequence_length: int = MISSING
    """Slots of a sample."""
    micro_batch_size: int = 1
    """Sequences a rank takes through one forward pass."""
    global_batch_size: int = MISSING
    """Sequences a step, over all ranks and micro-batches."""
    max_steps: int | None = None
    """Stop after this step; null leaves the end to max_samples."""
    max_samples: int | None = None
    """Stop when so many samples are consumed; null means schedule.decay_samples."""
    initialize_from: str | None = None
    """Checkpoint whose weights start this run; step, data position and optimizer start anew."""


def get(config: Any, key: str) -> Any:
    """The value at a dotted key of nested dataclasses."""
    for part in key.split("."):
        config = getattr(config, part)
    return config
