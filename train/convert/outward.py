"""A checkpoint of this project written in a foreign layout, one tensor at a time."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import ConfigError, DataError
from data_prep.files import write_bytes, write_json
from data_prep.tokenizer import SPECIALS, Tokenizer
from kernels.quantised_weight import SCALE_SUFFIX, quantise
from train import rules
from train.checkpoint.model import read_config
from train.checkpoint.pieces import PieceReader
from train.checkpoint.select import damage, read_manifest
from train.checkpoint.tensor_file import SafetensorsWriter, Spec
from train.config import Config
from train.convert.card import card
from train.convert.card_results import read_evaluations
from train.convert.config import BITS, ConvertConfig
from train.convert.folder import shards, whole_folder
from train.convert.formats import Format
from train.convert.mapping import Mapping, layouts
from train.convert.registry import format_of
from train.convert.sources import ROWS_AT_ONCE
from train.convert.tensor_files import TorchWriter
from train.convert.tokenizers import write_modeling, write_tokenizer
from train.convert.vocabulary import Vocabulary
from train.model.build import DTYPES
from train.model.lora import MergedReader
from train.model.parameters import Layout

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass
class Plan:
    """Everything an export needs, checked before a byte is written."""

    settings: ConvertConfig
    checkpoint: Path
    config: Config
    format: Format
    vocabulary: Vocabulary
    mapping: Mapping
    layouts: dict[str, Layout]
    reader: PieceReader
    evaluations: list[dict[str, Any]]

    @property
    def bits(self) -> int | None:
        """Bits of the stored integers, None where nothing is quantised."""
        return None if self.settings.quantise is None else BITS[self.settings.quantise]

    def native(self, name: str) -> Tensor:
        """A native tensor in the dtype to store. Raises DataError where a cast overflows."""
        full = self.reader.full("weight", name)
        wanted = self._dtype(name)
        if full.dtype == wanted:
            return full
        cast = full.to(wanted)
        if not cast.isfinite().all() and full.isfinite().all():
            raise DataError(
                f"{self.checkpoint}: {name} has values beyond dtype={self.settings.dtype}; use bf16 or fp32"
            )
        return cast

    def _dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.settings.dtype] if self.settings.dtype else self.reader.dtype("weight", name)

    def quantised(self, key: str) -> bool:
        """Whether a foreign tensor is stored as integers: the matrices of the layers."""
        first = self.mapping.entries[key].parts[0].name
        return self.bits is not None and first.startswith("layers.") and len(self.mapping.shapes[key]) == 2

    def specs(self, rank: int = 0, size: int = 1) -> list[Spec]:
        """What one rank's file holds."""
        cuts = layouts(self.config.model, rank, size) if size > 1 else self.layouts
        found = []
        for key, entry in self.mapping.entries.items():
            name = entry.parts[0].name
            shape = cuts[name].local_shape if size > 1 else self.mapping.shapes[key]
            if self.quantised(key):
                columns = shape[1] if self.bits == 8 else shape[1] // 2
                found.append(Spec(key, (shape[0], columns), torch.int8))
                found.append(Spec(key + SCALE_SUFFIX, shape[:1], torch.float16))
            else:
                found.append(Spec(key, shape, self._dtype(name)))
        return found

    def stored(self, key: str, tensor: Tensor) -> tuple[Tensor, ...]:
        """What is stored of one tensor (or one rank's cut of it): itself, or integers and scales."""
        if not self.quantised(key):
            return (tensor,)
        assert self.bits is not None
        try:
            # Rows do not depend on each other, and the fp32 values in between take several times their bytes.
            pairs = [quantise(rows, self.bits) for rows in tensor.split(ROWS_AT_ONCE)]
            return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        except ValueError as error:
            raise DataError(f"{self.checkpoint}: {key} cannot be quantised ({error})") from error


def export(settings: ConvertConfig, checkpoint: Path) -> Path:
    """Write `checkpoint` as `settings.target`; returns it. Raises ConfigError, DataError; then nothing is left."""
    plan = _plan(settings, checkpoint)
    ranks = [plan.specs(rank, settings.tensor_parallel) for rank in range(settings.tensor_parallel)]
    target = Path(settings.target)
    with whole_folder(target, sum(spec.bytes for specs in ranks for spec in specs)) as folder:
        if plan.format.ranked:
            _write_ranks(plan, folder, ranks)
        else:
            _write_shards(plan, folder, ranks[0])
        write_json(folder / "config.json", _config_json(plan, ranks[0]))
        write_tokenizer(folder, plan.format, plan.vocabulary, plan.config)
        if plan.format.name == "huggingface":
            write_modeling(folder, plan.vocabulary)
        text = card(folder, plan.checkpoint, plan.config, settings, plan.evaluations)
        write_bytes(folder / "README.md", text.encode())
    return target


def _plan(settings: ConvertConfig, checkpoint: Path) -> Plan:
    if settings.model is not None or settings.tokenizer.path is not None:
        raise ConfigError(f"model= and tokenizer.path= are for reading; {checkpoint} has a model and a tokenizer")
    problem = damage(checkpoint, parts=("model/", "tokenizer/", "config.yaml"))
    if problem is not None:
        raise DataError(f"{problem}; restore the file, or give another step's folder as source=")
    config = read_config(checkpoint / "config.yaml")
    config.parallel.one_stage(settings.tensor_parallel)
    rules.check(config)
    if config.prefix.length:
        raise ConfigError(
            f"prefix.length={config.prefix.length}: the keys and values that {checkpoint} learnt in front of each "
            f"layer's cannot be merged into its weights, and format={settings.format} has no place for them; use it "
            "with train.generate and train.evaluate, or tune with lora.rank, which merges"
        )
    found = format_of(settings.format)
    found.check(config)
    tokenizer = Tokenizer.load(checkpoint / "tokenizer")
    vocabulary = Vocabulary(
        tokenizer, config.model.padded_vocab_size, settings.image_tokens, found.specials or SPECIALS
    )
    places = layouts(config.model)
    reader = MergedReader(checkpoint, config.lora)
    for name, layout in places.items():
        if not reader.has("weight", name) or reader.shape("weight", name) != layout.full_shape:
            raise DataError(f"{checkpoint}: {name} is missing or has another shape than config.yaml says")
    mapping = Mapping(
        found.entries(config.model, vocabulary), {name: layout.full_shape for name, layout in places.items()}
    )
    evaluations = read_evaluations(settings.evaluations, read_manifest(checkpoint)["step"])
    return Plan(settings, checkpoint, config, found, vocabulary, mapping, places, reader, evaluations)


def _write_ranks(plan: Plan, folder: Path, ranks: list[list[Spec]]) -> None:
    """GLM-130B's files; each tensor is read once and cut for every rank."""
    step = str(read_manifest(plan.checkpoint)["step"])
    (folder / step).mkdir()
    cuts = [layouts(plan.config.model, rank, len(ranks)) for rank in range(len(ranks))]
    writers = [
        TorchWriter(folder / step / f"mp_rank_{rank:02d}_model_states.pt", specs) for rank, specs in enumerate(ranks)
    ]
    for key, entry in plan.mapping.entries.items():
        full = plan.mapping.outward(key, plan.native)
        for writer, cut in zip(writers, cuts, strict=True):
            for tensor in plan.stored(key, cut[entry.parts[0].name].cut(full)):
                writer.add(tensor)
    for writer in writers:
        writer.close()
    write_bytes(folder / "latest", step.encode())


def _write_shards(plan: Plan, folder: Path, specs: list[Spec]) -> None:
    """Safetensors files and, where there are several, their index, as transformers names them."""
    files = shards(specs, plan.settings.shard_gigabytes * 1e9)
    names = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    pending: list[Tensor] = []
    keys = iter(plan.mapping.entries)
    for name, part in zip(names, files, strict=True):
        writer = SafetensorsWriter(folder / name, part, {"format": "pt"})
        for _ in part:
            if not pending:
                key = next(keys)
                pending.extend(plan.stored(key, plan.mapping.outward(key, plan.native)))
            writer.add(pending.pop(0))
        writer.close()
    if len(files) > 1:
        where = {spec.key: name for name, part in zip(names, files, strict=True) for spec in part}
        total = sum(spec.bytes for spec in specs)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _config_json(plan: Plan, specs: list[Spec]) -> dict[str, Any]:
    """The format's own entries, and a block from which this project reads the model back exactly."""
    dtypes = [spec.dtype for spec in specs if spec.dtype in DTYPE_NAMES]
    described = plan.format.describe(plan.config, plan.vocabulary)
    if plan.bits is not None:
        described["quantization_bit"] = plan.bits
    return {
        **described,
        "torch_dtype": DTYPE_NAMES[dtypes[0]],
        "tiankong": {
            "format": plan.format.name,
            "model": asdict(plan.config.model),
            "objective": plan.config.data.sampling.objective,
            "softcap": plan.config.loss.softcap,
            "image_tokens": plan.vocabulary.image_tokens,
            "tokenizer_sha256": plan.vocabulary.tokenizer.sha256,
        },
    }
