"""Parts of the HTML pages: their style, tables and histograms."""

from collections.abc import Sequence
from html import escape

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
details{margin:.3rem 0}pre{white-space:pre-wrap;background:#f6f8fa;padding:.5rem;margin:.3rem 0}
.plots{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}figcaption{font-size:13px}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .8rem;border-bottom:1px solid #d5dde5;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}th{background:#f2f5f8}code{font-size:13px}"""


def bars(title: str, values: Sequence[int], labels: Sequence[str]) -> str:
    """A histogram as an SVG picture."""
    width, height, highest = 14, 90, max(1, *values)
    bars = "".join(
        f'<rect x="{n * width}" y="{height - value * height / highest:.1f}" width="{width - 2}" '
        f'height="{value * height / highest:.1f}" fill="#3b7dd8"><title>{escape(label)}: {value:,}</title></rect>'
        for n, (value, label) in enumerate(zip(values, labels, strict=True))
    )
    across = len(values) * width
    ends = f'<text x="0" y="{height + 12}">{escape(labels[0])}</text>'
    if len(labels) > 1:
        ends += f'<text x="{across}" y="{height + 12}" text-anchor="end">{escape(labels[-1])}</text>'
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg width="{max(across, 80)}" height="{height + 16}" font-size="10">{bars}{ends}</svg></figure>'
    )


def html_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; cells that begin with a digit stand on the right."""
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
