"""DeepSpeed's universal checkpoint, out and in: fp32 weights, Adam's moments and the counters of a training run.

    latest_universal                                    name of the folder below
    global_step50_universal/
        [zero_pp_rank_0_]mp_rank_00_model_states.pt     counters; the longer name is what ZeRO-3 looks for
        zero/optimizer_state.pt                         what is left of the optimizer: nothing that is not config
        zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt    {"param": the whole tensor, and how tensor parallelism cuts it}
        zero/NAME/step.pt                               Adam's updates

NAME is the parameter's name in `train.model.build.Model` of one stage, which is the model that `deepspeed.initialize`
is given. One tensor is held at a time. Reading takes what DeepSpeed's `ds_to_universal` makes, by torch's weights-only
rules; `optimizer_state.pt`, which holds DeepSpeed's own objects there, is never opened.
"""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import ConfigError, DataError
from data_prep.files import write_bytes
from data_prep.tokenizer import Tokenizer
from train.checkpoint.model import read_config
from train.checkpoint.pieces import PieceReader
from train.checkpoint.select import LATEST, damage, find, read_state, step_folder
from train.checkpoint.tensor_file import Spec
from train.config import Config, ModelConfig
from train.convert.config import ConvertConfig
from train.convert.folder import whole_folder
from train.convert.mapping import layouts
from train.convert.native import write_checkpoint
from train.convert.registry import UNIVERSAL
from train.convert.tensor_files import load_safely, save
from train.host_moments import MOMENTS
from train.mesh import Mesh
from train.model.build import DTYPES, Model
from train.model.parameters import Layout, layout_of

STATES = ("fp32", *MOMENTS)
"""Files of a parameter: its fp32 value and Adam's moments."""
_LATEST = "latest_universal"
_COUNTERS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def write_universal(settings: ConvertConfig, checkpoint: Path) -> Path:
    """Write `checkpoint` as a folder that DeepSpeed's `load_checkpoint` takes with `load_universal`; returns it.

    Raises ConfigError, DataError; then nothing is left.
    """
    if settings.like is not None:
        raise ConfigError(f"like={settings.like} is for reading; {checkpoint} has a config and a tokenizer")
    if (problem := damage(checkpoint)) is not None:
        raise DataError(f"{problem}; restore the file, or give another step's folder as source=")
    config, state, reader = _config(checkpoint), read_state(checkpoint), PieceReader(checkpoint)
    places = list(_places(config.model))
    # fp32 runs store no master weights: the weights are their own.
    kinds = {"fp32": "master" if reader.names("master") else "weight"} | {key: key for key in MOMENTS}
    for _, layout in places:
        if missing := [kind for kind in kinds.values() if not reader.has(kind, layout.name)]:
            raise DataError(f"{checkpoint}: holds no {missing[0]} of {layout.name}; only a training run's own will do")
    name = f"global_step{state['step']}_universal"
    target = Path(settings.target)
    elements = sum(Spec(key, layout.full_shape, torch.float32).bytes for key, layout in places)
    with whole_folder(target, len(STATES) * elements) as folder:
        for key, layout in places:
            parameter = folder / name / "zero" / key
            parameter.mkdir(parents=True)
            for file, kind in kinds.items():
                save(parameter / f"{file}.pt", {"param": reader.full(kind, layout.name), **_cut(layout)})
            save(parameter / "step.pt", torch.tensor(float(state["optimizer_steps"])))
        save(folder / name / "zero" / "optimizer_state.pt", _rest(len(places), int(state["optimizer_steps"])))
        for counters in _COUNTERS:
            save(folder / name / counters, _counters(state))
        write_bytes(folder / "config.yaml", (checkpoint / "config.yaml").read_bytes())
        write_bytes(folder / _LATEST, name.encode())
    return target


def read_universal(settings: ConvertConfig, source: Path) -> Path:
    """Write a run folder with one checkpoint, `settings.target`, that training resumes from; returns it.

    source: a universal checkpoint, or the folder with its `latest_universal`. Step and position in the data are
    DeepSpeed's counters; the rest of the trainer's state is that of the checkpoint `settings.like`. Raises
    ConfigError, DataError; then nothing is left.
    """
    if settings.like is None:
        raise ConfigError(
            f"format={UNIVERSAL} needs like=, a run of this project whose config and data it goes on with"
        )
    like = find(settings.like)
    if (problem := damage(like, parts=("tokenizer/", "config.yaml", "trainer_state.json"))) is not None:
        raise DataError(f"like=: {problem}")
    folder = _folder(source)
    config, state = _config(like), read_state(like) | _progress(folder)
    state["converted_from"] = {"format": UNIVERSAL, "source": str(source)}
    dtype = DTYPES[config.precision.dtype]
    files: dict[str, Path] = {}
    specs = []
    for key, layout in _places(config.model):
        files[layout.name] = folder / "zero" / key
        specs.append(Spec(layout.name, layout.full_shape, torch.float32))
        for file in STATES:
            _param(files[layout.name] / f"{file}.pt", layout.full_shape, "meta")

    def read(kind: str, spec: Spec) -> Tensor:
        file = files[spec.key] / f"{kind if kind in MOMENTS else 'fp32'}.pt"
        return _param(file, spec.shape, "cpu").to(spec.dtype)

    parts = {"model": [("weight", Spec(spec.key, spec.shape, dtype)) for spec in specs]}
    states = MOMENTS if dtype == torch.float32 else ("master", *MOMENTS)
    parts["optimizer"] = [(kind, spec) for spec in specs for kind in states]
    target = Path(settings.target)
    with whole_folder(target, sum(spec.bytes for part in parts.values() for _, spec in part)) as run:
        made = step_folder(run, state["step"])
        made.mkdir(parents=True)
        tokenizer = Tokenizer.load(like / "tokenizer")
        write_checkpoint(made, config, tokenizer, parts, read, settings.shard_gigabytes * 1e9, state)
        write_bytes(made.parent / LATEST, (made.name + "\n").encode())
    return target


def _config(checkpoint: Path) -> Config:
    config = read_config(checkpoint / "config.yaml")
    for key, value in (("lora.rank", config.lora.rank), ("prefix.length", config.prefix.length)):
        if value:
            raise ConfigError(f"{key}={value}: {checkpoint} trains a part of its parameters; format={UNIVERSAL} is all")
    return config


def _places(model: ModelConfig) -> Iterator[tuple[str, Layout]]:
    """Each parameter's name in the module, with its place on the first of several tensor-parallel ranks.

    Of as many ranks as the model divides among at all, two at best: that tells along which dimension it is cut.
    """
    sizes = (model.num_heads, model.ffn_hidden_size, model.padded_vocab_size)
    ranks = next((size for size in range(2, model.num_heads + 1) if not any(n % size for n in sizes)), 1)
    cuts = layouts(model, 0, ranks)
    for key, parameter in Model(Config(model=model), Mesh.single("meta"), torch.float32).named_parameters():
        yield key, cuts[layout_of(parameter).name]


def _cut(layout: Layout) -> dict[str, int]:
    """How DeepSpeed's loader cuts a tensor for a rank whose own is smaller: a chunk, or one of each half."""
    cut = {"cat_dim": layout.dim or 0}
    return cut if len(layout.blocks) < 2 else {**cut, "param_n_sub_params": len(layout.blocks)}


def _rest(groups: int, steps: int) -> dict[str, Any]:
    """`optimizer_state.pt`. DeepSpeed takes over what each group of parameters says here: nothing, so that rates and
    decays are those of its optimizer, for as many groups as there can be. The loss scale begins anew."""
    nothing: list[dict[str, Any]] = [{} for _ in range(groups)]
    inner = {"state": {0: {"step": torch.tensor(float(steps))}}, "param_groups": nothing}
    return {"ds_version": version("deepspeed"), "param_groups": nothing, "optimizer_state_dict": inner}


def _counters(state: dict[str, Any]) -> dict[str, Any]:
    """`…_model_states.pt`; its weights are in `zero/`."""
    return {
        "module": {},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": state["step"],
        "global_samples": state["consumed_samples"],
        "skipped_steps": state["step"] - state["optimizer_steps"],
    }


def _folder(source: Path) -> Path:
    """The folder with `zero/` that a user means."""
    latest = source / _LATEST
    folder = source / latest.read_text("utf-8").strip() if latest.is_file() else source
    if not (folder / "zero").is_dir():
        raise DataError(f"{folder}: is no universal checkpoint, which has a folder zero/; make one by ds_to_universal")
    return folder


def _progress(folder: Path) -> dict[str, Any]:
    """The parts of the trainer's state that DeepSpeed counts."""
    paths = [folder / name for name in _COUNTERS if (folder / name).is_file()]
    if not paths:
        raise DataError(f"{folder}: has no {_COUNTERS[0]}; copy it from the checkpoint that it was made of")
    counters = load_safely(paths[0], "meta")
    try:
        step, samples = int(counters["global_steps"]), int(counters["global_samples"])
        updates = step - int(counters["skipped_steps"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{paths[0]}: does not count steps and samples ({error})") from error
    return {
        "step": step,
        "consumed_samples": samples,
        "trained_samples": samples,
        "optimizer_steps": updates,
        "loss_scaler": {},
        "stability": {},
    }


def _param(path: Path, shape: tuple[int, ...], device: str) -> Tensor:
    """A parameter's tensor; with ZeRO-3 `ds_to_universal` leaves it flat and alone."""
    if not path.is_file():
        raise DataError(f"{path}: is missing; {UNIVERSAL} is read into the model that it was trained as")
    found = load_safely(path, device)
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, Tensor) or tensor.shape not in (
        torch.Size(shape),
        torch.Size([torch.Size(shape).numel()]),
    ):
        raise DataError(f"{path}: holds no tensor of shape {list(shape)}, which the model of like= wants")
    return tensor.reshape(shape)
