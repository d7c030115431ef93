"""The parts that every HTML page of the project is made of: shell, header, tiles, sections, tables.

Free of torch, so that the launcher's pages look like the reports of runs. One self-contained page: `train.report_style`
gives the style sheet, `train.charts` the drawings, and nothing is loaded from elsewhere.
"""

from collections.abc import Sequence
from html import escape

from train.report_style import CSS


def whole_page(title: str, sections: Sequence[str], footer: str) -> str:
    """The document around sections of HTML. title and footer are plain text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>{''.join(sections)}"
        f"<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def header(title: str, line: str, place: str, status: str, *, warn: bool = False) -> str:
    """The page's head: brand, title, one line of facts, and where it ran with how it stands."""
    return (
        f'<header><p class="brand">TIANKONG 填空</p><h1>{escape(title)}</h1><p>{escape(line)}</p>'
        f'<p>{escape(place)} · <span class="status{" warn" if warn else ""}">{escape(status)}</span></p></header>'
    )


def tile_row(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers side by side, each (name, value, a few words); rows of four, a rest beyond eight is left out."""
    tiles = tiles[: len(tiles) - len(tiles) % 4] if len(tiles) > 8 else tiles
    cells = "".join(
        f'<div class="tile{" first" if index == 0 else ""}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd>'
        f"<p>{escape(more)}</p></div>"
        for index, (name, value, more) in enumerate(tiles)
    )
    return f'<dl class="tiles">{cells}</dl>' if tiles else ""


def section(title: str, content: str, hint: str = "") -> str:
    """A titled part of the page; nothing where there is nothing to show. content is HTML, hint plain text."""
    if not content:
        return ""
    paragraph = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{content}</section>"


def chart_grid(charts: Sequence[str]) -> str:
    """Charts (or cards) in one column on a phone and two on a desk."""
    joined = "".join(charts)
    return f'<div class="charts">{joined}</div>' if joined else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A table of plain text. numbers: every column but the first holds numbers, set to the right."""
    style = ' class="number"' if numbers else ""
    head = "".join(f"<th{style if index else ''}>{escape(name)}</th>" for index, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{style if index else ''}>{escape(cell)}</td>" for index, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def table_card(heads: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", numbers: bool = True) -> str:
    """A table in a card of its own that scrolls sideways on a narrow screen; nothing without rows."""
    if not rows:
        return ""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card scroll">{heading}{table(heads, rows, numbers=numbers)}</div>'
