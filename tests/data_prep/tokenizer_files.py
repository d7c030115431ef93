"""Tokenizer files that users bring, made small: `tokenizer.json` of two usual kinds, and a text model as icetk has it.

The ICE model itself cannot be redistributed; this one has its pieces for white space, its prefix and its normaliser.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|user|>"]
"""Special tokens in front of the pieces of `byte_level`: four of ours, and one that is only the file's."""


def byte_level(path: Path, texts: Sequence[str]) -> Path:
    """A byte-level BPE, as GPT-2, Llama 3, Qwen and GLM-4 use."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=560, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.enable_truncation(16)
    tokenizer.save(str(path))
    return path


def metaspace(path: Path, texts: Sequence[str]) -> Path:
    """A BPE with byte fallback and a space in front of every text, as Llama 2 and Mistral use; no special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=first, limit_alphabet=150, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = stored["added_tokens"][:1]
    path.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
    return path


def ice_text_model(path: Path, texts: Sequence[str], complete: bool = True) -> Path:
    """A SentencePiece model as icetk's ice_text.model; complete: with pieces for tabs, spaces and bytes in it."""
    model = io.BytesIO()
    lines = [line[:1000] for text in texts for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=3000,
        hard_vocab_limit=False,
        character_coverage=0.99,
        byte_fallback=complete,
        pad_id=3,
        user_defined_symbols=["<n>", *(["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))] if complete else [])],
        minloglevel=3,
    )
    path.write_bytes(model.getvalue())
    return path
