"""Training a SentencePiece unigram tokenizer on balanced text.

Byte fallback keeps any text encodable, digits are split, and a line break is a piece of its own. Text is not changed
by the model's own normaliser: cleaning did that, and what was written must come back on decoding.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import sentencepiece

from data_prep.config import TokenizerConfig
from data_prep.errors import ConfigError, DataError
from data_prep.tokenizer import Tokenizer

_FIXED_PIECES = 258
"""256 bytes, the unknown, and the line break."""
_THREADS = 8
"""Fixed, whatever the machine: SentencePiece sums in an order that depends on it, and so would the pieces."""
_PIECE_OF_TEXT = re.compile(r"[^\n]{1,1000}")


def balanced(texts_by_language: Mapping[str, Iterable[str]], total_bytes: int) -> Iterator[str]:
    """Pieces of at most 1,000 characters and without line breaks, equally many bytes of each language.

    A language that has less than its share gives all it has; nothing is repeated.
    """
    share = total_bytes // max(1, len(texts_by_language))
    for texts in texts_by_language.values():
        left = share
        for text in texts:
            for match in _PIECE_OF_TEXT.finditer(text):
                yield match.group()
                left -= len(match.group().encode())
            if left <= 0:
                break


def train_tokenizer(pieces_of_text: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Tokenizer of about `config.vocab_size` pieces (fewer where the text is small).

    Raises DataError when there is too little text, ConfigError when the vocabulary cannot hold the characters.
    """
    lines = list(pieces_of_text)
    characters: Counter[str] = Counter()
    for line in lines:
        characters.update(line)
    total = sum(characters.values())
    kept = covered_characters(characters, config)
    if len(kept) < len(characters):
        # SentencePiece refuses a coverage under 0.98, so the rare characters are cut out of its text instead.
        rare = re.compile("[" + re.escape("".join(sorted(set(characters) - kept))) + "]+")
        lines = [part for line in lines for part in rare.split(line) if part]
    if total < 1000:
        raise DataError(f"{total} characters are too few to train a tokenizer; add text, or give tokenizer.path")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_drained(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=_THREADS,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size} with tokenizer.character_coverage={config.character_coverage} "
            f"cannot be trained on this text: {str(error).strip()}"
        ) from error
    return Tokenizer(model.getvalue())


def _drained(lines: list[str]) -> Iterator[str]:
    """The lines in their order, each let go when it is taken: SentencePiece keeps a copy."""
    lines.reverse()
    while lines:
        yield lines.pop()


def covered_characters(characters: Counter[str], config: TokenizerConfig) -> set[str]:
    """The characters that get a piece of their own: the commonest ones, up to the configured part of the text, and at
    most half of the free pieces."""
    room = max(1, (config.vocab_size - _FIXED_PIECES) // 2)
    wanted = config.character_coverage * sum(characters.values())
    kept: set[str] = set()
    covered = 0
    for character, count in sorted(characters.items(), key=lambda item: (-item[1], item[0]))[:room]:
        if covered >= wanted:
            break
        kept.add(character)
        covered += count
    return kept
