"""The tokenizer as other code loads it: the SentencePiece model itself, and beside it what transformers reads.

Two forms give the same ids. A model of a class that transformers ships gets a `tokenizer.json`, which needs no code of
ours; the others, and a SentencePiece model that such a file cannot express, travel with `tokenization_tiankong.py`. A
`tokenizer.json` that the run was trained with goes out with our special tokens added.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from data_prep.errors import ConfigError
from data_prep.files import write_bytes, write_json
from data_prep.tokenizer import MODEL_FILE, SPECIALS, Tokenizer
from train.config import Config
from train.convert.formats import Format
from train.convert.vocabulary import Vocabulary

REMOTE = Path(__file__).parent / "remote"


def write_tokenizer(folder: Path, found: Format, vocabulary: Vocabulary, config: Config) -> None:
    """Write the tokenizer's files into an export."""
    tokenizer = vocabulary.tokenizer
    if tokenizer.kind == "json" and (found.ranked or vocabulary.image_tokens or vocabulary.specials != SPECIALS):
        raise ConfigError(
            f"format={found.name}: {tokenizer.name} cannot hold this format's special tokens and image_tokens; use "
            "huggingface, glm, llama or qwen2, or a SentencePiece tokenizer"
        )
    if vocabulary.holds_specials and not found.ranked:
        raise ConfigError(
            f"format={found.name}: {tokenizer.name} is icetk's model with its special tokens among the pieces, which "
            "this format's tokenizer files cannot say; use glm_130b"
        )
    if tokenizer.kind != "json":
        write_bytes(folder / MODEL_FILE, tokenizer.model)
    if found.ranked:
        return
    settings: dict[str, Any] = {"model_max_length": config.model.max_positions, "padding_side": "left"}
    fast = None
    if tokenizer.kind == "json":
        fast = json.loads(tokenizer.model)
        fast["truncation"] = fast["padding"] = None
        fast["added_tokens"] = [*(fast.get("added_tokens") or []), *_added(tokenizer)]
    elif found.shipped and not vocabulary.image_tokens and tokenizer.kind == "sentencepiece":
        fast = _fast(tokenizer)
    if fast is not None:
        write_json(folder / "tokenizer.json", fast)
        end = spelling("eop")
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    else:
        settings |= {
            "tokenizer_class": "TiankongTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_tiankong.TiankongTokenizer", None]},
            "specials": vocabulary.order,
            "image_tokens": vocabulary.image_tokens,
            "objective": config.data.sampling.objective,
            "starts_with_enc": config.data.sampling.starts_with_enc,
        }
        _copy(folder, "tokenization_tiankong.py")
    write_json(folder / "tokenizer_config.json", settings)


def write_modeling(folder: Path, vocabulary: Vocabulary) -> None:
    """The modeling file, and what `generate` must never write: masks, starts and padding rows."""
    _copy(folder, "modeling_tiankong.py")
    ids = vocabulary.token_ids()
    stops = ids["eos_token_id"]
    known = {*range(vocabulary.image_tokens, vocabulary.image_tokens + vocabulary.tokenizer.pieces), *stops}
    settings = {
        "eos_token_id": stops,
        "pad_token_id": ids["eop_token_id"],
        "suppress_tokens": [row for row in range(vocabulary.rows) if row not in known],
    }
    write_json(folder / "generation_config.json", settings)


def spelling(special: str) -> str:
    """A special token as text: masks as users write them, the others so that no text holds them by chance."""
    return f"[{special}]" if special in ("MASK", "gMASK", "sMASK") else f"<|{special}|>"


def _copy(folder: Path, name: str) -> None:
    write_bytes(folder / name, (REMOTE / name).read_bytes())


def _added(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Our special tokens as entries of a `tokenizer.json`."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": tokenizer.special_ids[name], "content": spelling(name), **usual} for name in SPECIALS]


def _fast(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """`tokenizer.json` of a unigram model that takes text as it is; None for any other SentencePiece model."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.model)
    normal, trainer = model.normalizer_spec, model.trainer_spec
    plain = normal.name == "identity" and not normal.add_dummy_prefix and not normal.remove_extra_whitespaces
    if not plain or trainer.model_type != trainer.UNIGRAM or not trainer.byte_fallback:
        return None
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokenizer),
        "normalizer": space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "Unigram",
            "unk_id": trainer.unk_id,
            "vocab": [[piece.piece, piece.score] for piece in model.pieces],
            "byte_fallback": True,
        },
    }
