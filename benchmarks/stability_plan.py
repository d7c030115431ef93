"""The runs of `benchmarks.stability`, the wanted most first: which experiment, which variant, which faults."""

from collections.abc import Sequence
from dataclasses import dataclass

FAULT = 301
"""Step in which a planted fault begins: the schedule's warm-up is long over and the detector's window is full."""
LONG = 2000
"""Steps of the undisturbed runs, and of the schedule of those that meet a fault."""
ENDS = ("fused_fp32", "stored_half")
"""The two kinds of softmax that are also run where nothing should break."""


@dataclass(frozen=True)
class Size:
    """How large the runs are; steps are counted in units that a toy run makes short."""

    batch: int = 16
    unit: float = 1.0

    def steps(self, count: int) -> int:
        return max(3, round(count * self.unit))

    def samples(self, step: int) -> int:
        """Samples before a step."""
        return (self.steps(step) - 1) * self.batch

    def range(self, step: int, steps: int) -> str:
        """The samples of so many steps from one on, as a config value."""
        first = self.samples(step)
        return f"[{first},{first + steps * self.batch}]"


@dataclass(frozen=True)
class Run:
    """One training run."""

    group: str
    variant: str
    seed: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.group}/{self.variant}.seed_{self.seed}"


def plan(size: Size, seeds: Sequence[int]) -> list[Run]:
    """All runs, the wanted most first."""
    runs: list[Run] = []

    def add(group: str, steps: int, variants: dict[str, list[str]], *shared: str, schedule: int | None = None) -> None:
        """A group: each variant with each seed. schedule: steps of the learning rate's schedule, if not `steps`."""
        samples = size.steps(schedule or steps) * size.batch
        ends = [f"max_steps={size.steps(steps)}", f"schedule.decay_samples={samples}"]
        for variant, words in variants.items():
            always = (*COMMON, *ends, *shared, *words)
            runs.extend(Run(group, variant, seed, (f"seed={seed}", *always)) for seed in seeds)

    fault, poisoned = size.steps(FAULT), size.range(FAULT, 5)
    garbage = [f"stability.stress.poison_samples={poisoned}"]
    repeat = [*garbage, "stability.stress.poison=repeat"]
    flip = [f"stability.stress.flip_step={fault}"]
    judged = f"evaluation.every_steps={size.steps(100)}"
    base = ("experiment=stability/base", *BF16)
    add("clean", LONG, {"clean": []}, *base, judged)

    faults = {
        "garbage": garbage,
        "repeat": repeat,
        "lr_x10": [f"stability.stress.lr_steps=[{fault},{size.steps(FAULT + 19)}]"],
        "flip_weight": [*flip, "stability.stress.flip=weight"],
        "flip_gradient": [*flip, "stability.stress.flip=gradient", "stability.reactions=[skip]"],
    }
    add("faults", FAULT + 29, faults, *base, schedule=LONG)
    back = [f"saving.every_steps={size.steps(50)}", "stability.reactions=[roll_back]", judged]
    back += [f"stability.skip_ahead_samples={5 * size.batch}"]
    add("roll_back", 500, {"garbage": [*garbage, *back], "repeat": [*repeat, *back]}, *base, schedule=LONG)

    names = ("default", "glm_130b", "opt_175b", "bloom_176b", "modern", "none")
    stress = (
        f"stability.stress.lr_steps=[{size.steps(201)},{size.steps(220)}]",
        f"stability.stress.poison_samples={size.range(301, 5)}",
    )
    presets = {name: [f"stability={name}"] for name in names}
    add("presets", 400, presets, "experiment=stability/remedies", *BF16, *stress)

    alphas = {
        f"alpha_{alpha}.{'tied' if tied else 'untied'}": [
            f"stability.embedding_gradient_shrink={alpha}",
            f"model.tied_embeddings={str(tied).lower()}",
        ]
        for alpha in ("1", "0.1", "0.01")
        for tied in (True, False)
    }
    egs = ("experiment=stability/egs", "optimizer.clip=1", *BF16)
    add("egs", 1000, alphas, *egs)
    add("egs_eps", 1000, {"alpha_0.01.untied.eps_1e-15": [*alphas["alpha_0.01.untied"], "optimizer.eps=1e-15"]}, *egs)

    scores = {"fused_fp32": ["stability.softmax=fp32", "kernels.interval_attention=triton"]}
    scores |= {f"stored_{kind}": [f"stability.softmax={kind}"] for kind in ("half", "fp32", "scaled", "pb_relax")}
    for gain in (128, 104, 32):
        named = {f"gain_{gain}.{name}": words for name, words in scores.items() if gain > 32 or name in ENDS}
        stored = (f"stability.stress.query_key_gain={gain}", "kernels.interval_attention=unfused")
        add("softmax", 250, named, "experiment=stability/softmax", "precision=fp16", "optimizer.lr=1e-3", *stored)

    high = {f"lr_0.01.{name}": [*words, "optimizer.lr=1e-2"] for name, words in alphas.items() if "untied" not in name}
    add("egs_high_lr", 300, high, *egs)
    rates = {
        f"lr_{lr}.qk_norm_{norm}": [f"optimizer.lr={lr}", f"model.qk_norm={norm}", "loss.z_loss=0"]
        for lr in ("0.0003", "0.001", "0.003", "0.01", "0.03", "0.1")
        for norm in ("true", "false")
    }
    add("lr_sensitivity", 250, rates, "experiment=stability/lr_sensitivity", *BF16)
    grown = {name: [*scores[name], "optimizer.lr=3e-2"] for name in ("fused_fp32", "stored_half", "stored_fp32")}
    add(
        *("softmax_high_lr", 250, grown, "experiment=stability/softmax", "precision=fp16"),
        *("model.norm_placement=pre", "kernels.interval_attention=unfused", "stability.stress.query_key_gain=1"),
    )
    norms = {
        f"{norm}.lr_{lr}": [f"model.norm_placement={norm}", f"optimizer.lr={lr}"]
        for lr in ("0.0003", "0.001", "0.01")
        for norm in ("deepnorm", "post", "pre", "sandwich", "peri")
    }
    add("norms", 250, norms, "experiment=stability/norms", *BF16)

    formats = {"bf16": [], "fp8": ["precision.fp8=true"]}
    kinds = {
        f"{norm}.{name}": [f"model.norm_placement={norm}", *words]
        for norm in ("deepnorm", "pre")
        for name, words in formats.items()
    }
    add("fp8", 800, kinds, *base, f"evaluation.every_steps={size.steps(200)}", *WIDE)
    return runs


BF16 = ("precision=bf16", "parallel.cuda_graphs=true")
WIDE = ("model.hidden_size=1024", "model.ffn_hidden_size=2752")
"""117 M parameters."""
COMMON = [
    *("model=34m", "parallel.zero_stage=1", "optimizer.lr=3e-4", "schedule.min_lr=3e-5", "schedule.warmup_samples=800"),
    *("kernels.interval_attention=triton", "evaluation.samples=256", "evaluation.blanks=0"),
    *("data.workers=0", "logging.every_steps=10", "logging.progress=false", "logging.report=false"),
]


def steps_of(run: Run) -> int:
    """Steps that a run is to take."""
    return next(int(word.partition("=")[2]) for word in run.words if word.startswith("max_steps="))
