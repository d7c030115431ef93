"""What a report needs to know about the documents: counts, lengths, figures and a few examples, by language."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

SAMPLES = 3
"""Examples that are kept of each reason in each piece of work."""
EXCERPT = 160
BINS = 20
"""Bins of the figures that are parts of a whole."""


class Tally:
    """Counts that add up over pieces of work. Every table is keyed by `language/what`."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        """Documents by `language/reason`; the reason of those that are used is `kept`."""
        self.characters: Counter[str] = Counter()
        """Their characters."""
        self.lengths: Counter[str] = Counter()
        """Used documents by `language/power of two of their length`."""
        self.figures: Counter[str] = Counter()
        """Judged documents by `language/figure/bin of 0 … 1`."""
        self.masked: Counter[str] = Counter()
        """Personal data masked, by `language/kind`."""
        self.samples: dict[str, list[dict[str, Any]]] = {}
        """Examples of documents kept aside, by reason."""

    def count(self, text: str, fields: Mapping[str, Any]) -> None:
        """Count one document; fields: its metadata in the pipeline."""
        lang = fields.get("lang") or "–"
        reason = fields.get("reason", "kept")
        self.documents[f"{lang}/{reason}"] += 1
        self.characters[f"{lang}/{reason}"] += len(text)
        for name, value in fields.get("figures", {}).items():
            if name not in ("length", "word_length"):
                self.figures[f"{lang}/{name}/{min(BINS - 1, int(value * BINS))}"] += 1
        if reason == "kept":
            self.lengths[f"{lang}/{len(text).bit_length()}"] += 1
            for kind, count in fields.get("masked", {}).items():
                self.masked[f"{lang}/{kind}"] += count
        else:
            self._show(reason, lang, text, fields)

    def drop(self, text: str, fields: Mapping[str, Any]) -> None:
        """Take back a document that was counted as kept, for `fields["reason"]`."""
        lang, reason = fields["lang"], fields["reason"]
        for name, sign in (("kept", -1), (reason, 1)):
            self.documents[f"{lang}/{name}"] += sign
            self.characters[f"{lang}/{name}"] += sign * len(text)
        self.lengths[f"{lang}/{len(text).bit_length()}"] -= 1
        self._show(reason, lang, text, fields)

    def _show(self, reason: str, lang: str, text: str, fields: Mapping[str, Any]) -> None:
        shown = self.samples.setdefault(reason, [])
        if len(shown) < SAMPLES:
            place = {name: fields[name] for name in ("file", "line", "detail")}
            shown.append({**place, "lang": lang, "text": text[:EXCERPT]})

    def add(self, other: Mapping[str, Any]) -> None:
        """Add what `to_json` gave."""
        for name in ("documents", "characters", "lengths", "figures", "masked"):
            table = getattr(self, name)
            for key, count in other[name].items():
                table[key] += count
        for reason, samples in other["samples"].items():
            shown = self.samples.setdefault(reason, [])
            shown += samples[: SAMPLES - len(shown)]

    def to_json(self) -> dict[str, Any]:
        """All tables, without zeros."""
        tables = ("documents", "characters", "lengths", "figures", "masked")
        content: dict[str, Any] = {
            name: {key: count for key, count in sorted(getattr(self, name).items()) if count} for name in tables
        }
        return content | {"samples": self.samples}
