"""A folder in a foreign layout read into a checkpoint of this project, one tensor at a time.

The checkpoint holds weights, config and tokenizer, no optimizer states: it is for `initialize_from=`, `checkpoint=` and
for writing out again.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import ConfigError, DataError
from data_prep.tokenizer import MODEL_FILE, SPECIALS, Tokenizer
from train import rules
from train.checkpoint.tensor_file import Spec
from train.cli import compose_train
from train.config import Config, ModelConfig
from train.convert.config import ConvertConfig
from train.convert.folder import whole_folder
from train.convert.formats import Format
from train.convert.mapping import Mapping, layouts
from train.convert.native import write_checkpoint
from train.convert.registry import format_of
from train.convert.sources import Ranks, Weights, rank_files, shard_files
from train.convert.vocabulary import Vocabulary
from train.model.build import DTYPES
from train.model.parameters import Layout

_TOKENIZERS = (MODEL_FILE, f"tokenizer/{MODEL_FILE}", "ice_text.model")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_in(settings: ConvertConfig, source: Path) -> Path:
    """Write the checkpoint of `source` as `settings.target`; returns it.

    Raises ConfigError, DataError; then nothing is left.
    """
    if settings.quantise is not None:
        raise ConfigError(f"quantise={settings.quantise} is for writing; {source} is read as it is")
    if settings.evaluations:
        raise ConfigError(f"evaluations= is for the card of what is written; {source} is read")
    if not source.is_dir():
        raise DataError(f"source={source}: no such folder")
    found = format_of(settings.format)
    stored = _config_json(source)
    block = stored.get("tiankong", {})
    if block.get("format", found.name) != found.name:
        raise ConfigError(f"format={found.name}, but {source} was written as {block['format']}; use that")
    config = _config(settings, found, stored)
    tokenizer = _tokenizer(settings, source)
    if block.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise DataError(f"{tokenizer.name} is not the tokenizer that {source} was written with; give that one")
    images = settings.image_tokens or int(block.get("image_tokens", 0))
    vocabulary = Vocabulary(tokenizer, config.model.padded_vocab_size, images, found.specials or SPECIALS)
    places = layouts(config.model)
    mapping = Mapping(
        found.entries(config.model, vocabulary), {name: place.full_shape for name, place in places.items()}
    )
    weights = _weights(settings, source, found, mapping, config)

    def dtype_of(name: str) -> torch.dtype:
        return DTYPES[settings.dtype] if settings.dtype else weights.dtype(mapping.keys_of(name)[0])

    config.precision.dtype = _commonest(places, dtype_of)
    specs = [Spec(name, place.full_shape, dtype_of(name)) for name, place in places.items()]

    def read(kind: str, spec: Spec) -> Tensor:
        full = mapping.inward(spec.key, lambda key: weights.read(key, spec.dtype))
        if settings.dtype is not None and not full.isfinite().all():
            raise DataError(f"{source}: {spec.key} has values beyond dtype={settings.dtype}; use bf16 or fp32")
        return full

    target = Path(settings.target)
    with whole_folder(target, sum(spec.bytes for spec in specs)) as folder:
        state = {"consumed_samples": 0, "converted_from": {"format": found.name, "source": str(source)}}
        parts = {"model": [("weight", spec) for spec in specs]}
        write_checkpoint(folder, config, tokenizer, parts, read, settings.shard_gigabytes * 1e9, state)
    return target


def _weights(settings: ConvertConfig, source: Path, found: Format, mapping: Mapping, config: Config) -> Weights | Ranks:
    if not found.ranked:
        return Weights(shard_files(source), mapping.shapes, found.ignored, source)
    size = settings.tensor_parallel
    files = rank_files(source, size)
    cuts = []
    for rank in range(size):
        native = layouts(config.model, rank, size)
        cuts.append({key: native[entry.parts[0].name] for key, entry in mapping.entries.items()})
    ranks = [
        Weights([file], {key: layout.local_shape for key, layout in cut.items()}, found.ignored, file.path)
        for file, cut in zip(files, cuts, strict=True)
    ]
    return Ranks(ranks, cuts)


def _config(settings: ConvertConfig, found: Format, stored: dict[str, Any]) -> Config:
    """The config that the checkpoint carries: the model, how its text was made into samples, defaults elsewhere."""
    block = stored.get("tiankong", {})
    if settings.model is not None:
        model = settings.model
    else:
        try:
            model = ModelConfig(**(block["model"] if "model" in block else found.model(stored)))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{settings.source}: its config.json does not tell {str(error) or 'the model'}; give the model, such "
                "as model=glm_130b"
            ) from error
    objective = block.get("objective", "causal" if found.causal else "blank_infilling")
    two_dimensional = model.positions in ("rotary_2d", "learned_2d")
    config = compose_train(
        [
            "data.path=unknown",
            f"data.sampling.objective={objective}",
            f"data.sampling.positions={'2d' if two_dimensional else '1d'}",
        ]
    )
    config.model, config.sequence_length = model, model.max_positions
    config.loss.softcap = float(block.get("softcap", 0.0))
    config.parallel.tensor_parallel = settings.tensor_parallel
    rules.check(config)
    found.check(config)
    config.parallel.tensor_parallel = 1
    return config


def _config_json(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        stored = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("tiankong", {}), dict):
        raise DataError(f"{path}: is not a model's config")
    return stored


def _tokenizer(settings: ConvertConfig, source: Path) -> Tokenizer:
    if settings.tokenizer.path is not None:
        return Tokenizer.load(settings.tokenizer.path)
    for name in _TOKENIZERS:
        if (source / name).is_file():
            return Tokenizer.load(source / name)
    raise DataError(f"{source}: has no {' or '.join(_TOKENIZERS)}; give its tokenizer as tokenizer.path=")


def _commonest(places: dict[str, Layout], dtype_of: Callable[[str], torch.dtype]) -> str:
    """The dtype of most weights, as `precision.dtype` has it."""
    counts: Counter[str] = Counter()
    for name, place in places.items():
        counts[_NAMES[dtype_of(name)]] += torch.Size(place.full_shape).numel()
    return counts.most_common(1)[0][0]
