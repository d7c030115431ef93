"""Personal data in text: phone numbers, identity numbers and e-mail addresses become placeholders.

Written for few false alarms: a Chinese identity number must have its check digit (GB 11643), a date and a province;
a phone number must be written as one.
"""

import re

PLACEHOLDERS = {"email": "<EMAIL>", "identity": "<ID>", "phone": "<PHONE>"}
"""What stands in the text instead, by kind."""

_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])", re.ASCII)
_CHINESE_ID = re.compile(
    r"(?<![0-9A-Za-z])([1-9]\d{5})((?:18|19|20)\d{2})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![0-9A-Za-z])"
)
_SOCIAL_SECURITY = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_PHONE = re.compile(
    r"(?<![\d.+-])(?:"
    r"(?:\+?86[- ]?)?1[3-9]\d(?:\d{8}|[- ]\d{4}[- ]\d{4})"  # Chinese mobile
    r"|0\d{2,3}-\d{7,8}"  # Chinese landline
    r"|\+\d{1,3}[ -]?(?:\(\d{1,4}\)[ -]?)?\d{2,4}(?:[ -]\d{2,4}){1,4}"  # international
    r"|(?:\(\d{3}\) ?|\d{3}-)\d{3}-\d{4}"  # North American
    r")(?![\d-])"
)
_DIGITS = re.compile(r"\d[\d() -]{5,}\d")
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CHECK_DIGITS = "10X98765432"


def mask_personal(text: str) -> tuple[str, dict[str, int]]:
    """The text with placeholders, and how many of each kind were put in."""
    counts: dict[str, int] = {}

    def replace(kind: str, pattern: re.Pattern[str], text: str) -> str:
        text, found = pattern.subn(PLACEHOLDERS[kind], text)
        if found:
            counts[kind] = counts.get(kind, 0) + found
        return text

    def identity(match: re.Match[str]) -> str:
        if not _checks(match.group()):
            return match.group()
        counts["identity"] = counts.get("identity", 0) + 1
        return PLACEHOLDERS["identity"]

    if "@" in text:
        text = replace("email", _EMAIL, text)
    if _DIGITS.search(text) is None:
        return text, counts
    text = _CHINESE_ID.sub(identity, text)
    text = replace("identity", _SOCIAL_SECURITY, text)
    return replace("phone", _PHONE, text), counts


def _checks(number: str) -> bool:
    """Whether the last digit of an 18-digit identity number is right."""
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, number, strict=False))
    return _CHECK_DIGITS[total % 11] == number[17].upper()
