"""The model card: README.md of an export, written from what the run left behind and nothing else.

Sections whose source is out of reach are left out: a checkpoint alone tells its config, its run folder the history, the
dataset folder where the text came from.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from data_prep.cli import as_yaml
from data_prep.dataset import Dataset
from data_prep.errors import DataError
from data_prep.files import write_bytes
from data_prep.manifest import Manifest
from train.arithmetic import parameters
from train.config import Config
from train.convert.card_results import Record, results, table
from train.convert.config import ConvertConfig
from train.convert.plot import loss_plot
from train.report import Run
from train.run_folder import holds_run

_USES = {
    "huggingface": (
        "Loads in transformers with the files beside it:\n\n```python\nfrom transformers import AutoModelForCausalLM, "
        "AutoTokenizer\n\nmodel = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)\n```"
    ),
    "glm": "Loads as `GlmForCausalLM` in transformers and vLLM, no code of its own needed.",
    "llama": "Loads as `LlamaForCausalLM` in transformers and vLLM, no code of its own needed.",
    "qwen2": "Loads as `Qwen2ForCausalLM` in transformers and vLLM, no code of its own needed.",
    "glm_130b": "The layout of GLM-130B's release (SwissArmyTransformer): one file a tensor-parallel rank.",
    "chatglm_6b": "ChatGLM-6B's layout: put that model's own modeling files beside it.",
    "chatglm2_6b": "ChatGLM2-6B's layout: put that model's own modeling files beside it.",
}


def card(folder: Path, checkpoint: Path, config: Config, settings: ConvertConfig, evaluations: Sequence[Record]) -> str:
    """Text of the card; writes `loss.svg` into `folder` where there is a history to draw.

    evaluations: outputs of `train.evaluate` to show beside the run's own.
    """
    step = json.loads((checkpoint / "manifest.json").read_text("utf-8"))["step"]
    run = _run(checkpoint)
    manifest = _manifest(config, checkpoint)
    sections = [
        _front(config, settings, manifest),
        f"# {config.model.name}\n\n{_summary(config, settings, step)}\n\n{_USES[settings.format]}",
        *_notes(config, settings),
        _model(config),
        *([] if manifest is None else [_data(config, manifest)]),
        *([] if run is None else [_training(run, config, step), *_events(run, step)]),
        *results(run, step, evaluations),
        *_plot(run, step, folder),
        f"## Config\n\n<details><summary>Every key of the run</summary>\n\n```yaml\n{as_yaml(config)}```\n\n</details>",
    ]
    return "\n\n".join(sections) + "\n"


def _run(checkpoint: Path) -> Run | None:
    """The run that a checkpoint lies in, or None where it stands alone or its logs cannot be read."""
    folder = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not holds_run(folder):
        return None
    try:
        return Run.read(folder)
    except DataError:
        return None


def _manifest(config: Config, checkpoint: Path) -> Manifest | None:
    """The manifest of the dataset that the run was trained on; None where it is gone or another now."""
    try:
        dataset = Dataset.open(config.data.path)
        state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (DataError, OSError, ValueError):
        return None
    return dataset.manifest if dataset.digest == state.get("dataset") else None


def _front(config: Config, settings: ConvertConfig, manifest: Manifest | None) -> str:
    """The header that model hubs read."""
    lines = ["---", f"tags: [glm, {config.data.sampling.objective.replace('_', '-')}]"]
    if settings.format in ("huggingface", "glm", "llama", "qwen2"):
        lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    if manifest is not None:
        languages = sorted({source.lang for source in manifest.sources} & {"zh", "en"})
        lines.append(f"language: [{', '.join(languages)}]")
    return "\n".join([*lines, "---"])


def _summary(config: Config, settings: ConvertConfig, step: int) -> str:
    stored = settings.dtype or config.precision.dtype
    words = [
        f"A {parameters(config.model).total / 1e6:,.1f} M parameter model after {step:,} steps, stored in {stored}"
    ]
    if settings.quantise:
        words.append(f"(the layers' matrices in {settings.quantise} with an fp16 scale a row)")
    words.append(f"as format={settings.format}, trained by Tiankong 填空 with the objective")
    words.append(f"{config.data.sampling.objective}. Up to {config.model.max_positions:,} positions.")
    return " ".join(words)


def _notes(config: Config, settings: ConvertConfig) -> list[str]:
    notes = []
    if settings.format == "glm_130b" and not config.model.rotary_fp16_angles:
        notes.append(
            "This model was trained with fp32 rotary angles. GLM-130B's released code computes them in fp16, which is "
            "up to 0.63 rad off at position 2047: let it compute them in fp32."
        )
    if settings.format in ("glm_130b", "chatglm_6b", "chatglm2_6b"):
        notes.append("Text goes through `tokenizer.model` (SentencePiece); special tokens follow its pieces.")
    return ["\n\n".join(notes)] if notes else []


def _model(config: Config) -> str:
    model = config.model
    heads = f"{model.num_heads}" + (f" ({model.num_kv_heads} key-value)" if model.num_kv_heads else "")
    rows = [
        ("layers × hidden × FFN", f"{model.num_layers} × {model.hidden_size} × {model.ffn_hidden_size}"),
        ("heads", heads),
        ("norm", f"{model.norm_placement}, {model.norm}"),
        ("positions", model.positions),
        ("activation", model.activation),
        ("vocabulary", f"{model.padded_vocab_size:,} rows, {'tied' if model.tied_embeddings else 'untied'} head"),
    ]
    return "## Model\n\n" + table(("", ""), rows)


def _data(config: Config, manifest: Manifest) -> str:
    rows = []
    for source in manifest.sources:
        counts = source.counts["train"]
        licences = "; ".join(f"{name} ({count})" for name, count in sorted(source.licence.items())) or "not stated"
        rows.append((source.name, source.lang, f"{counts.documents:,}", f"{counts.tokens:,}", licences))
    sources = table(("source", "language", "documents", "tokens", "licences (documents)"), rows)
    rejected = sum(count for reasons in manifest.rejected.values() for count in reasons.values())
    tokenizer = manifest.tokenizer
    return (
        f"## Data\n\nThe training split; {rejected:,} documents were rejected. Tokenizer: {tokenizer['pieces']:,} "
        f"pieces, sha256 `{tokenizer['sha256']}`.\n\n{sources}"
    )


def _training(run: Run, config: Config, step: int) -> str:
    done = [record for record in run.metrics if record["step"] <= step]
    last = done[-1] if done else {}
    environment = run.environment
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("tiankong", "torch", "deepspeed") if name in packages)
    rows = [
        ("steps", f"{step:,} in {last.get('attempt', 1)} attempt(s)"),
        ("samples, tokens consumed", f"{last.get('consumed_samples', 0):,}, {last.get('consumed_tokens', 0):,}"),
        ("batch", f"{config.global_batch_size} sequences of {config.sequence_length}"),
        ("learning rate", f"{config.optimizer.lr:g}, {config.schedule.kind} to {config.schedule.min_lr:g}"),
        ("precision", config.precision.dtype + (", layers' products in FP8" if config.precision.fp8 else "")),
        ("ranks", f"{environment.get('world_size', '?')} on {environment.get('device', '?')}"),
        ("versions", versions),
        ("seed", str(config.seed)),
    ]
    return "## Training\n\n" + table(("", ""), rows)


def _events(run: Run, step: int) -> list[str]:
    rows = [
        tuple(str(event.get(key, "")) for key in ("step", "kind", "seen", "action"))
        for event in run.events
        if (event.get("step") or 0) <= step
    ]
    return ["## Events\n\n" + table(("step", "kind", "seen", "action"), rows)] if rows else []


def _plot(run: Run | None, step: int, folder: Path) -> list[str]:
    svg = None if run is None else loss_plot(run, step)
    if svg is None:
        return []
    write_bytes(folder / "loss.svg", svg.encode())
    return ["![loss by step: training, held-out](loss.svg)"]
