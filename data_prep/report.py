"""What a preparation tells its user: a table on the terminal, and the same as a self-contained page."""

from collections.abc import Sequence
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from data_prep.clean import REASONS
from data_prep.manifest import SPLITS, Counts, Manifest

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


def html_report(manifest: Manifest) -> str:
    """The same tables, the licences and the split, as one HTML page without outside files."""
    licences = [
        (stream.name, stream.lang, licence, f"{count:,}")
        for stream in manifest.sources
        for licence, count in stream.licence.items()
    ]
    split = manifest.split
    moved = ", ".join(split["moved_to_valid"]) or "none"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Dataset</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}}
table{{border-collapse:collapse;margin:1rem 0}}
td,th{{padding:.25rem .8rem;border-bottom:1px solid #d5dde5;text-align:left}}
td.n{{text-align:right;font-variant-numeric:tabular-nums}}th{{background:#f2f5f8}}code{{font-size:13px}}</style>
<h1>Dataset</h1>
<p>Tokenizer: {manifest.tokenizer["pieces"]:,} pieces, sha256 <code>{escape(manifest.tokenizer["sha256"])}</code>.
Split by {escape(split["key"])}, seed {split["seed"]}, shares {escape(str(split["shares"]))}; pages moved to valid:
{escape(moved)}.</p>
<h2>Text</h2>{_html_table(_COLUMNS, rows(manifest))}
<h2>Rejected</h2>{_html_table(("source", "reason", "documents", "meaning"), rejections(manifest))}
<h2>Licences</h2>{_html_table(("source", "language", "licence", "documents"), licences)}
</html>
"""


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="n">{escape(cell)}</td>' if cell[:1].isdigit() else f"<td>{escape(cell)}</td>" for cell in line
        )
        + "</tr>"
        for line in lines
    )
    return f"<table><tr>{head}</tr>{body}</table>"
