"""The contenders of `benchmarks.step`: each builds a model and returns one training step as a function.

All take the same tokens. This project's contenders train the GLM layer (DeepNorm, biases, GeGLU, prefix masks, fp32
master weights and fp32 gradient accumulation) through its own engine; peers are set up as their own documentation says.
"""

import contextlib
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.step_measure import measure_ceilings, profile, timed
from data_prep.batch import Batch, group_of
from train import backend
from train.arithmetic import flops_per_token
from train.cli import compose_train
from train.engine import Engine

LR = 1e-4


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. ffn: width of each half of the gated feed-forward part. slots: sequence length."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    slots: int

    @property
    def overrides(self) -> list[str]:
        """This project's config of such a model, its head untied."""
        return [
            "data.path=unused",
            "model=1b",
            f"model.num_layers={self.layers}",
            f"model.hidden_size={self.hidden}",
            f"model.num_heads={self.heads}",
            f"model.ffn_hidden_size={self.ffn}",
            f"model.padded_vocab_size={self.vocabulary}",
            f"model.max_positions={self.slots}",
            f"sequence_length={self.slots}",
            "model.tied_embeddings=false",
        ]


SHAPES = {
    "anchor": Shape(24, 2048, 16, 5504, 50304, 2048),
    "short": Shape(2, 2048, 16, 5504, 50304, 2048),
    "3b": Shape(24, 3072, 24, 8192, 50304, 2048),
    "7b": Shape(32, 4096, 32, 11008, 50304, 2048),
    "text": Shape(8, 1024, 8, 2752, 8192, 512),
    "toy": Shape(2, 64, 2, 96, 512, 64),
}
Step = Callable[[list[Batch]], Tensor]
"""Trains on the micro-batches of one step; returns its loss, nats a target."""


@dataclass(frozen=True)
class Contender:
    """How to build a step, and whether it is somebody else's."""

    build: Callable[[Shape, int, int], Step]
    peer: bool = True


def batch_of(shape: Shape, size: int, seed: int, text: Tensor | None = None) -> Batch:
    """A micro-batch of gMASK samples: generation lengths uniform in [0.2, 1] of the row, as GLM-130B draws them.

    text: int64 [tokens], of which micro-batch `seed` takes the next rows, round and round; else random words.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, shape.vocabulary - 8, (size, shape.slots + 1), generator=generator)
    if text is not None:
        rows = torch.arange(seed * size, (seed + 1) * size)[:, None]
        words = text[(rows * shape.slots + torch.arange(shape.slots + 1)) % len(text)]
    slots = torch.arange(shape.slots, dtype=torch.int32).expand(size, -1)
    share = 0.2 + 0.8 * torch.rand(size, 1, generator=generator)
    context = ((1 - share) * (shape.slots - 1)).int() + 1
    targeted = slots >= context
    return Batch(
        tokens=words[:, :-1].contiguous(),
        targets=words[:, 1:].contiguous(),
        loss_weight=targeted / targeted.sum(1, keepdim=True),
        positions=torch.stack([slots, torch.zeros_like(slots)], 1),
        attend_from=torch.zeros_like(slots),
        attend_to=torch.where(targeted, slots + 1, context),
        group=torch.full((size,), group_of(0, "en"), dtype=torch.uint8),
        sample_index=torch.arange(seed * size, (seed + 1) * size),
    )


def work(options: Namespace) -> dict[str, Any]:
    """Measure one contender here: `options` are those of `benchmarks.step`."""
    shape, gpu = SHAPES[options.shape], torch.cuda.is_available()
    ceilings = measure_ceilings() if gpu else {}
    batches = [batch_of(shape, options.micro_batch, seed) for seed in range(options.accumulation)]
    step = CONTENDERS[options.worker].build(shape, options.micro_batch, options.accumulation)
    losses = [step(batches) for _ in range(options.warmup)]
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(options.steps):
        seconds, loss = timed(lambda: step(batches), gpu)
        times.append(seconds)
        losses.append(loss)
    seconds = statistics.median(times)
    tokens = options.micro_batch * options.accumulation * shape.slots
    first, last = float(losses[0]), float(losses[-1])
    if not last < first:
        raise RuntimeError(f"the loss did not fall: {first} to {last}")
    found: dict[str, Any] = {
        "micro_batch": options.micro_batch,
        "accumulation": options.accumulation,
        "tokens_per_second": round(tokens / seconds, 1),
        "model_tflops": round(tokens / seconds * flops_per_token(glm(shape, 1, 1).model, shape.slots) / 1e12, 2),
        "step_ms": round(1e3 * seconds, 2),
        "spread": f"{min(times) / seconds:.3f}-{max(times) / seconds:.3f}",
        "memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if gpu else None,
        "first_loss": round(first, 4),
        "last_loss": round(last, 4),
        **ceilings,
    }
    return found | ({"profile": profile(lambda: step(batches))} if options.profile else {})


# ---- this project ----


def words(shape: Shape, micro_batch: int, accumulation: int, *overrides: str) -> list[str]:
    """The GLM layer at a shape, as overrides of the default config."""
    return [
        *shape.overrides,
        "model.hidden_dropout=0",
        "model.attention_dropout=0",
        "precision=bf16",
        "parallel.zero_stage=1",
        f"micro_batch_size={micro_batch}",
        f"global_batch_size={micro_batch * accumulation}",
        *overrides,
    ]


def glm(shape: Shape, micro_batch: int, accumulation: int, *overrides: str) -> Any:
    """Config of the GLM layer at a shape."""
    return compose_train(words(shape, micro_batch, accumulation, *overrides))


def tiankong(*overrides: str) -> Callable[[Shape, int, int], Step]:
    """Through the trainer's own engine."""

    def build(shape: Shape, micro_batch: int, accumulation: int) -> Step:
        config = glm(shape, micro_batch, accumulation, *overrides)
        backend.start()
        engine = Engine.start(config, backend.make_mesh(config))
        return lambda batches: engine.step(batches, LR, 1.0).loss

    return build


def check(fp8: bool, shape: Shape) -> str | None:
    """Hold the fused kernels to the references: loss and gradient norm of two steps; what differs, or None.

    fp8: in FP8 too.
    """
    batches = [batch_of(shape, 2, seed) for seed in range(2)]
    backend.start()
    curves: dict[str, list[list[float]]] = {}
    for precision in ("bf16", "fp8") if fp8 else ("bf16",):
        for kernels in ("auto", "reference"):
            config = glm(shape, 2, 2, f"kernels={kernels}", f"precision={precision}")
            engine = Engine.start(config, backend.make_mesh(config))
            numbers = engine.read([engine.step(batches, LR, 1.0) for _ in range(2)])
            found = [value for number in numbers for value in (number.loss, number.grad_norm)]
            curves.setdefault(precision, []).append(found)
    backend.stop()
    worst = max(abs(a - b) / abs(b) for pair in curves.values() for a, b in zip(*pair, strict=True))
    # bf16 keeps 8 bits: two correct ways to round differ by less than this after two layers. Values that they place on
    # two sides of an e4m3's edge are many, and loss and norm sum over them.
    return None if worst < 4e-3 else f"fused kernels differ from the references by {worst:.2e}: {curves}"


# ---- peers ----


def accumulated(
    loss_of: Callable[[Batch], Tensor],
    parameters: list[torch.nn.Parameter],
    before: Callable[[bool], object] = lambda last: None,
) -> Step:
    """Plain accumulation with PyTorch's fused AdamW on the parameters as they are.

    before: called ahead of each micro-batch with whether it is the last of its step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: list[Batch]) -> Tensor:
        total = torch.zeros((), device=parameters[0].device)
        for number, batch in enumerate(batches):
            before(number == len(batches) - 1)
            loss = loss_of(batch)
            (loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def litgpt(*, compiled: bool) -> Callable[[Shape, int, int], Step]:
    """litgpt's GPT with LayerNorm and GeGLU, causal flash attention, weights and Adam in bf16."""

    def build(shape: Shape, micro_batch: int, accumulation: int) -> Step:
        device = backend.device()
        with torch.device(device), default_dtype(torch.bfloat16):
            model = litgpt_model(shape)

        def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())

        chosen = torch.compile(loss_of) if compiled else loss_of
        return accumulated(
            lambda batch: chosen(
                batch.tokens.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True)
            ),
            list(model.parameters()),
        )

    return build


def litgpt_model(shape: Shape) -> Any:
    """litgpt's GPT at a shape, on the default device and in the default dtype."""
    from litgpt import GPT, Config

    config = Config(
        name="anchor",
        block_size=shape.slots,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.hidden,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocabulary,
        padded_vocab_size=shape.vocabulary,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="LayerNorm",
        mlp_class_name="GemmaMLP",
    )
    return GPT(config)


def liger(*, deepspeed: bool, checkpointing: bool = False, prefix: bool = False) -> Callable[[Shape, int, int], Step]:
    """transformers' Llama with Liger's kernels.

    deepspeed: under ZeRO-1 with fp32 master weights; else weights and Adam in bf16. prefix: this project's prefix masks
    through FlexAttention, fp32 gradient accumulation; else causal.
    """

    def build(shape: Shape, micro_batch: int, accumulation: int) -> Step:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        from transformers import LlamaConfig, LlamaForCausalLM

        apply_liger_kernel_to_llama()
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.slots,
            use_cache=False,
        )
        config._attn_implementation = "flex_attention" if prefix else "sdpa"
        device = backend.device()
        with torch.device(device), default_dtype(torch.bfloat16):
            model = LlamaForCausalLM(config)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        def loss_of(batch: Batch) -> Tensor:
            labels = torch.where(batch.loss_weight > 0, batch.targets, -100) if prefix else batch.targets
            # transformers shifts labels by one itself; the last slot has none left.
            shifted = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], 1)
            masks = {"attention_mask": block_mask(batch.attend_to.to(device))} if prefix else {}
            return model(input_ids=batch.tokens.to(device), labels=shifted.to(device), **masks).loss

        if not deepspeed:
            return accumulated(loss_of, list(model.parameters()))
        return zero_one(model, loss_of, micro_batch, accumulation, full_sums=prefix)

    return build


def block_mask(attend_to: Tensor) -> Any:
    """FlexAttention's mask of the intervals [0, attend_to)."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, slots = attend_to.shape
    return create_block_mask(
        lambda b, h, q, k: k < attend_to[b, q], batch, None, slots, slots, device=attend_to.device, _compile=True
    )


def zero_one(model: Any, loss_of: Callable[[Batch], Tensor], micro: int, accumulation: int, *, full_sums: bool) -> Step:
    """DeepSpeed ZeRO-1 in bf16 with fp32 master weights. full_sums: gradients accumulate in fp32."""
    backend.start()
    import deepspeed

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    settings |= {"data_types": {"grad_accum_dtype": "fp32"}} if full_sums else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    with backend.quiet():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(batches: list[Batch]) -> Tensor:
        total = torch.zeros((), device=engine.device)
        for batch in batches:
            loss = loss_of(batch)
            total += loss.detach() / len(batches)
            engine.backward(loss)
            engine.step()
        return total

    return step


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


OURS: dict[str, tuple[str, ...]] = {
    "tiankong": (),
    "tiankong_graphs": ("parallel.cuda_graphs=true",),
    "tiankong_recompute": ("parallel.activation_checkpointing=full",),
    "tiankong_selective": (
        "parallel.activation_checkpointing=ffn",
        "parallel.activation_checkpointing_every_layers=2",
    ),
    "tiankong_fp8": ("precision=fp8",),
    "tiankong_fp8_flash4": ("precision=fp8", "kernels=flash4"),
    "tiankong_flash4": ("kernels=flash4",),
    "tiankong_references": ("kernels=reference",),
    "tiankong_compiled_references": ("kernels=compile",),
}
"""This project's contenders, as overrides."""
CONTENDERS = {
    **{name: Contender(tiankong(*overrides), peer=False) for name, overrides in OURS.items()},
    "litgpt": Contender(litgpt(compiled=True)),
    "litgpt_eager": Contender(litgpt(compiled=False)),
    "liger": Contender(liger(deepspeed=False)),
    "liger_deepspeed": Contender(liger(deepspeed=True)),
    "liger_deepspeed_recompute": Contender(liger(deepspeed=True, checkpointing=True)),
    "liger_deepspeed_prefix": Contender(liger(deepspeed=True, prefix=True)),
}
