"""Tiankong's tokenizer for transformers: SentencePiece pieces, then GLM's special tokens with the ids after them.

`AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)`. For a blank-infilling model the text is followed by sop,
so that it can go to `generate` as it is; a text without a mask gets an open end, [gMASK].
"""

import os
import re
import shutil

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer

MASKS = ("MASK", "gMASK", "sMASK")


class TiankongTokenizer(PreTrainedTokenizer):
    """The ids of the model beside it. `specials`: their names in the order of their ids. `image_tokens`: ids before
    the pieces that no text uses."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, specials, image_tokens=0, objective="causal", starts_with_enc=False, **kwargs):
        self.starts_with_enc = starts_with_enc
        self.vocab_file = vocab_file
        self.image_tokens, self.specials, self.objective = image_tokens, list(specials), objective
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        pieces = ("<n>", "<|tab|>", "<|blank_2|>")
        self.ice = all(self.processor.id_to_piece(self.processor.piece_to_id(piece)) == piece for piece in pieces)
        first = image_tokens + self.processor.vocab_size()
        self.ids = {name: first + offset for offset, name in enumerate(self.specials)}
        self._added_tokens_decoder = {
            number: AddedToken(self.spelling(name), special=True, normalized=False) for name, number in self.ids.items()
        }
        for name in ("pad_token", "eos_token"):
            kwargs.setdefault(name, self.spelling("eop"))
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("extra_special_tokens", [self.spelling(name) for name in self.specials if name != "eop"])
        kwargs |= {"objective": objective, "starts_with_enc": starts_with_enc}
        super().__init__(specials=specials, image_tokens=image_tokens, **kwargs)

    @staticmethod
    def spelling(name):
        """Masks are written as users write them; the others so that no text holds them by chance."""
        return f"[{name}]" if name in MASKS else f"<|{name}|>"

    @property
    def vocab_size(self):
        return self.image_tokens + self.processor.vocab_size()

    def get_vocab(self):
        pieces = {
            self.processor.id_to_piece(number): self.image_tokens + number
            for number in range(self.processor.vocab_size())
        }
        return {**pieces, **self.added_tokens_encoder}

    def prepare_for_tokenization(self, text, is_split_into_words=False, **kwargs):
        # Pieces carry their space in front, so the one before a mask belongs to what fills it.
        for name in MASKS:
            text = text.replace(f" [{name}]", f"[{name}]")
        return text, kwargs

    def _tokenize(self, text, **_):
        if self.ice:  # icetk's text model has pieces of its own for white space
            text = re.sub(r"\n|\t| {2,80}", lambda found: self.spelt(found.group()), text)
        return self.processor.encode(text, out_type=str)

    @staticmethod
    def spelt(white):
        """Line break, tab or 2 to 80 spaces as icetk spells them."""
        return {"\n": "<n>", "\t": "<|tab|>"}.get(white) or f"<|blank_{len(white)}|>"

    @staticmethod
    def white(text):
        """Text with icetk's spellings of white space put back."""
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda found: " " * int(found[1]), text)

    def _convert_token_to_id(self, token):
        return self.image_tokens + self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.processor.id_to_piece(max(0, index - self.image_tokens))

    def convert_tokens_to_string(self, tokens):
        text, run = "", []
        for token in [*tokens, None]:
            if token is not None and token not in self._added_tokens_encoder:
                run.append(token)
                continue
            if run:
                part = self.processor.decode_pieces(run)
                part = self.white(part) if self.ice else part
                # A model with a dummy prefix drops the first piece's space; inside a longer text it belongs there.
                text += " " + part if text and run[0].startswith("▁") and part[:1] != " " else part
            text, run = text + (token or ""), []
        return text

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        ids = token_ids_0 + (token_ids_1 or [])
        if self.objective == "causal":
            return ids
        if not any(self.ids[name] in ids for name in MASKS):
            ids = [*ids, self.ids["gMASK"]]
        if self.starts_with_enc:
            ids = [self.ids["ENC"], *ids]
        return [*ids, self.ids["sop"]]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = os.path.join(save_directory, (filename_prefix + "-" if filename_prefix else "") + "tokenizer.model")
        if os.path.abspath(self.vocab_file) != os.path.abspath(target):
            shutil.copyfile(self.vocab_file, target)
        return (target,)
