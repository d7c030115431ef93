"""What a preparation tells its user: a table on the terminal, and a self-contained page with examples and plots."""

import re
from collections import Counter
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from data_prep.clean import REASONS
from data_prep.html import STYLE, bars, html_table
from data_prep.manifest import SPLITS, Counts, Manifest
from data_prep.quality import FIGURES
from data_prep.tally import BINS, Tally

_COLUMNS = ("source", "lang", "docs", "characters", "tokens", "tok/char", "bytes/tok", "valid", "test")


def rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """One row a stream, one a language, and one for all; the columns are `_COLUMNS`."""
    result = [_row(stream.name, stream.lang, stream.counts) for stream in manifest.sources]
    languages = sorted({stream.lang for stream in manifest.sources})
    for lang in [*languages, "all"]:
        total = {split: Counts() for split in SPLITS}
        for stream in manifest.sources:
            if lang in ("all", stream.lang):
                total = {split: total[split].plus(stream.counts[split]) for split in SPLITS}
        result.append(_row("all", lang, total))
    return result


def _row(name: str, lang: str, counts: dict[str, Counts]) -> tuple[str, ...]:
    total = Counts()
    for part in counts.values():
        total = total.plus(part)
    return (
        name,
        lang,
        f"{total.documents:,}",
        f"{total.characters:,}",
        f"{total.tokens:,}",
        f"{total.tokens / max(1, total.characters):.3f}",
        f"{total.bytes / max(1, total.tokens):.2f}",
        f"{counts['valid'].tokens:,}",
        f"{counts['test'].tokens:,}",
    )


def rejections(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """(source, reason, documents, meaning) of everything kept aside."""
    return [
        (source, reason, f"{count:,}", REASONS.get(reason, ""))
        for source, reasons in manifest.rejected.items()
        for reason, count in reasons.items()
    ]


def summary_table(manifest: Manifest) -> RenderableType:
    """Documents, characters and tokens of each source and language, and what was rejected and why."""
    title = f"{manifest.tokenizer['pieces']:,} pieces · valid and test in tokens"
    table = _table(title)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=number > 0)
    streams = len(manifest.sources)
    for number, row in enumerate(rows(manifest)):
        table.add_row(*row, end_section=number == streams - 1)
    refused = rejections(manifest)
    if not refused:
        return Group(table, "rejected: none")
    second = _table("rejected (kept in rejected/)")
    for column in ("source", "reason", "documents", "meaning"):
        second.add_column(column, justify="right" if column == "documents" else "left")
    for line in refused:
        second.add_row(*line)
    return Group(table, second)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def html_report(manifest: Manifest, tally: Tally) -> str:
    """One HTML page without outside files: these tables, what each stage left of each language, examples of what was
    kept aside, histograms, licences and the split."""
    licences = [
        (stream.name, stream.lang, licence, f"{count:,}")
        for stream in manifest.sources
        for licence, count in stream.licence.items()
    ]
    split = manifest.split
    moved = ", ".join(split["moved_to_valid"]) or "none"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Dataset</title>
<style>{STYLE}</style>
<h1>Dataset</h1>
<p>Tokenizer: {manifest.tokenizer["pieces"]:,} pieces, sha256 <code>{escape(manifest.tokenizer["sha256"])}</code>.
Split by {escape(split["key"])}, seed {split["seed"]}, shares {escape(str(split["shares"]))}; pages moved to valid:
{escape(moved)}.</p>
<h2>Text</h2>{html_table(_COLUMNS, rows(manifest))}
<section id="packs"></section>
<h2>Stages</h2><p>Documents that are left after each stage.</p>{html_table(*_stages(tally))}
<h2>Rejected</h2>{html_table(("source", "reason", "documents", "meaning"), rejections(manifest))}
{_examples(tally)}
<h2>Length of the documents</h2><p>Characters, in powers of two.</p>{_lengths(tally)}
{_figures(tally)}{_masked(tally)}
<h2>Licences</h2>{html_table(("source", "language", "licence", "documents"), licences)}
</html>
"""


def with_packs(page: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """The page with a table of how full packed sequences are, in place of an earlier one."""
    section = f'<section id="packs"><h2>Packed documents</h2>{html_table(header, lines)}</section>'
    return re.sub(r'<section id="packs">.*?</section>', lambda _: section, page, flags=re.S)


_STAGES = (
    ("read", ("broken_utf8", "bad_json", "missing_text", "line_too_long")),
    ("normalise", ("empty", "too_short", "too_long", "unreadable", "empty_target")),
    ("language", ("other_language",)),
    ("quality", tuple(f"quality_{name}" for name in FIGURES)),
    ("decontaminate", ("contaminated",)),
    ("duplicates", ("duplicate",)),
    ("near-duplicates", ("near_duplicate",)),
    ("caps", ("over_cap",)),
)
"""The reasons that each stage gives, in the order of the stages."""


def _stages(tally: Tally) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines: what is left of each language after each stage."""
    languages = sorted({key.partition("/")[0] for key in tally.documents})
    left = {lang: sum(n for key, n in tally.documents.items() if key.startswith(f"{lang}/")) for lang in languages}
    lines = [("found", *(f"{left[lang]:,}" for lang in languages))]
    for name, reasons in _STAGES:
        for lang in languages:
            left[lang] -= sum(tally.documents[f"{lang}/{reason}"] for reason in reasons)
        lines.append((name, *(f"{left[lang]:,}" for lang in languages)))
    return ("after", *languages), lines


def _examples(tally: Tally) -> str:
    return "".join(
        f"<details><summary>{escape(reason)}: {escape(REASONS.get(reason, ''))}</summary>"
        + "".join(
            f"<p>{escape(str(one['file']))}, line {one['line']} ({escape(str(one['lang']))}): "
            f"{escape(str(one['detail']))}</p><pre>{escape(one['text'])}</pre>"
            for one in examples
        )
        + "</details>"
        for reason, examples in sorted(tally.samples.items())
    )


def _lengths(tally: Tally) -> str:
    plots = []
    for lang, table in _by_first(tally.lengths).items():
        bins = {int(power): count for power, count in table.items() if count}
        if bins:
            labels = [f"2^{power - 1}" for power in range(min(bins), max(bins) + 1)]
            plots.append(bars(lang, [bins.get(n, 0) for n in range(min(bins), max(bins) + 1)], labels))
    return f'<div class="plots">{"".join(plots)}</div>'


def _figures(tally: Tally) -> str:
    parts = []
    for lang, table in _by_first(tally.figures).items():
        plots = []
        for name, bins in _by_first(Counter(table)).items():
            values = [int(bins.get(str(number), 0)) for number in range(BINS)]
            plots.append(bars(f"{name}: {FIGURES[name]}", values, [f"{n / BINS:.2f}" for n in range(BINS)]))
        parts.append(f'<h3>{escape(lang)}</h3><div class="plots">{"".join(plots)}</div>')
    return f"<h2>Quality</h2>{''.join(parts)}" if parts else ""


def _masked(tally: Tally) -> str:
    lines = [(*key.split("/"), f"{count:,}") for key, count in sorted(tally.masked.items())]
    return f"<h2>Personal data masked</h2>{html_table(('language', 'kind', 'times'), lines)}" if lines else ""


def _by_first(counts: Counter[str]) -> dict[str, dict[str, int]]:
    """Counts by `a/b` as {a: {b: count}}."""
    tables: dict[str, dict[str, int]] = {}
    for key, count in sorted(counts.items()):
        first, _, rest = key.partition("/")
        tables.setdefault(first, {})[rest] = count
    return tables
