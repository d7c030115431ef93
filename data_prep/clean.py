"""Cleaning of one document: normal form, control characters, length, exact duplicates, language.

Every rule is a plain function of the text; the reason a document is refused for is one of `REASONS`.
"""

import re
import unicodedata

import xxhash

REASONS = {
    "broken_utf8": "the bytes are not UTF-8",
    "bad_json": "the line is not a JSON object",
    "missing_text": "the text field is missing or not a string",
    "line_too_long": "the line is longer than data.max_line_bytes",
    "empty": "nothing is left after cleaning",
    "too_short": "fewer characters than data.min_characters",
    "too_long": "more characters than data.max_characters",
    "unreadable": "over 1 % of the characters are U+FFFD, control characters or half surrogates",
    "empty_target": "the answer to the prompt is empty",
    "over_cap": "the source's cap is reached",
    "duplicate": "equal to an earlier document but for white space",
}
"""Why a document is kept aside, by the name used in reports and in rejected/."""

_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ufffd\ud800-\udfff]"
)
_NEWLINES = re.compile("\r\n?|\u2028|\u2029|\x85")
_TRAILING = re.compile(r"[ \t\u3000\xa0]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")
_WHITE = re.compile(r"\s+")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]")
_KANA_HANGUL = re.compile("[\u3040-\u30ff\uac00-\ud7af]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")

_LANGUAGE_NAMES = {
    "zh": ("zh", "zho", "chi", "cmn", "chinese", "zh-cn", "zh-hans", "zh-sg"),
    "zh_hant": ("zh-tw", "zh-hk", "zh-mo", "zh-hant"),
    "en": ("en", "eng", "english", "en-us", "en-gb"),
}
_LANGUAGE_CODES = {alias: code for code, aliases in _LANGUAGE_NAMES.items() for alias in aliases}


def clean_text(text: str) -> str:
    """Text in Unicode NFC, with \\n line ends, no control or invisible characters, no long runs of blank lines."""
    text = _NEWLINES.sub("\n", text)
    text = _CONTROL.sub("", unicodedata.normalize("NFC", text))
    return _BLANK_LINES.sub("\n\n", _TRAILING.sub("\n", text)).strip()


def refusal(raw: str, cleaned: str, min_characters: int, max_characters: int) -> str | None:
    """Name of the reason to refuse a document, or None."""
    if not cleaned:
        return "empty"
    if len(_CONTROL.findall(raw)) * 100 > len(raw):
        return "unreadable"
    if len(cleaned) < min_characters:
        return "too_short"
    if len(cleaned) > max_characters:
        return "too_long"
    return None


def duplicate_key(cleaned: str) -> int:
    """128-bit hash that two documents share when they differ in white space only."""
    return int(xxhash.xxh3_128_intdigest(_WHITE.sub("", cleaned).encode()))


def language_code(name: str) -> str:
    """Short code of a language's name as sources spell it; unknown names are kept, made safe for a file name."""
    plain = name.strip().lower().replace("_", "-")
    return _LANGUAGE_CODES.get(plain, re.sub(r"[^a-z0-9]+", "_", plain).strip("_") or "other")


def detect_language(text: str) -> str:
    """zh, en or other by script: Chinese carries about as much in one character as English in four letters.

    Looks at the first 10,000 characters. A first guess for sources that do not say; English stands for every Latin
    text, Traditional counts as zh.
    """
    head = text[:10_000]
    han, latin, foreign = (len(pattern.findall(head)) for pattern in (_HAN, _LATIN, _KANA_HANGUL))
    if foreign * 4 > han + foreign:
        return "other"
    if han * 4 >= latin and han:
        return "zh"
    return "en" if latin * 2 >= len(_WHITE.sub("", head)) else "other"
