"""Which language a document is in: zh (Simplified), zh_hant, en, code or other; by characters and function words.

Made for sorting text into these five, not for naming the world's languages: Chinese carries about as much in one
character as English in four letters, so a text with a quarter as many Han characters as letters is Chinese.
benchmarks/data_prep.md has its accuracy on held-out documents.
"""

import re

from data_prep.characters import Kind, count_kinds

HEAD = 4_000
"""Characters looked at."""

_LANGUAGE_NAMES = {
    "zh": ("zh", "zho", "chi", "cmn", "chinese", "zh-cn", "zh-hans", "zh-sg"),
    "zh_hant": ("zh-tw", "zh-hk", "zh-mo", "zh-hant"),
    "en": ("en", "eng", "english", "en-us", "en-gb"),
}
_LANGUAGE_CODES = {alias: code for code, aliases in _LANGUAGE_NAMES.items() for alias in aliases}

ENGLISH_WORDS = frozenset(
    """the of and to in is that it was for on are with as be this have from or by not but at they he she you which their
    has were been if can will would when there what all we an so one do its""".split()  # noqa: SIM905
)
"""Function words of English."""
_OTHER_WORDS = frozenset(
    """und der das ist nicht ein eine mit für auf von zu den dem sich wird sind oder auch le la les des est et une dans
    pour que qui par sur pas au avec ce sont el los las una y en por con del se su es lo como para il di che e non per
    della gli o os um uma da em não com na het een van dat niet op te zijn och att det som på är av til og ikke w nie
    się jest z ve bir bu için yang dan untuk dengan je jsou v""".split()  # noqa: SIM905
)
_WORD = re.compile(r"[a-zA-Z\u00c0-\u024f]+")
_CODE_LINE = re.compile(
    r"^\s*(?:#include|#define|#!|//|/\*|\*/|import |from \w+ import|def |class |return\b|if ?\(|for ?\(|while ?\("
    r"|else\b|public |private |static |const |let |var |function |fn |func |package |using |template|struct "
    r"|</?\w+[ >])|[{};]\s*$|^\s*[\w.\[\]]+ ?[-+*/|&]?= ?\S|^\s*@\w+|\)\s*[:{]\s*$|^\s*[})\]]+[,;]?\s*$"
)


def language_code(name: str) -> str:
    """Short code of a language's name as sources spell it; unknown names are kept, made safe for a file name."""
    plain = name.strip().lower().replace("_", "-")
    return _LANGUAGE_CODES.get(plain, re.sub(r"[^a-z0-9]+", "_", plain).strip("_") or "other")


def detect_language(text: str) -> str:
    """zh, zh_hant, en, code or other, from the first 4,000 characters.

    Latin text is English unless words or accents of another language outweigh it, so a few words are English.
    """
    head = text[:HEAD]
    counts = count_kinds(head)
    han = int(counts[Kind.HAN] + counts[Kind.SIMPLIFIED] + counts[Kind.TRADITIONAL])
    latin = int(counts[Kind.ASCII_LETTER] + counts[Kind.ACCENTED])
    foreign = int(counts[Kind.KANA_HANGUL])
    visible = int(counts.sum() - counts[Kind.WHITE])
    if foreign * 4 > han + foreign or int(counts[Kind.OTHER_LETTER]) * 2 > han + latin:
        return "other"
    if han * 4 >= latin and han:
        if _is_code(head, counts[Kind.CODE] / visible) and han * 4 < visible:
            return "code"
        return "zh_hant" if counts[Kind.TRADITIONAL] > counts[Kind.SIMPLIFIED] else "zh"
    if latin * 2 < visible:
        return "code" if latin and _is_code(head, counts[Kind.CODE] / visible) else "other"
    if _is_code(head, counts[Kind.CODE] / visible):
        return "code"
    words = [word.lower() for word in _WORD.findall(head)]
    english = sum(word in ENGLISH_WORDS for word in words)
    other = sum(word in _OTHER_WORDS for word in words) + int(counts[Kind.ACCENTED]) // 2
    return "other" if other > english and other * 20 > len(words) else "en"


def _is_code(head: str, symbols: float) -> bool:
    """Whether a third of the lines look like statements, or a sixth where symbols abound."""
    lines = [line for line in head.splitlines() if line.strip()]
    if len(lines) < 3:
        return False
    share = sum(_CODE_LINE.search(line) is not None for line in lines) / len(lines)
    return share > 0.35 or (share > 0.15 and symbols > 0.04)
