"""How each kind of file becomes text: HTML, Mallard pages, man pages, POD, code comments, catalogues, JSON.

Prose is kept; navigation, code blocks and pictures are dropped. A reader returns a document's text, or yields (place,
text) where a file holds several.
"""

import ast
import gzip
import html
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lxml.etree
import lxml.html
import polib


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CHINESE = re.compile(r"[一-鿿]")
DROPPED = _names("script style nav pre footer header head svg button form noscript math img iframe colgroup")
BLOCKS = _names(
    "p div li dd dt h1 h2 h3 h4 h5 h6 blockquote tr ul ol dl section article table td th br body main caption summary "
    "details page title note item list steps figure"
)
BOXES = _names("div ul ol table a span p dl section")
"""Tags that are dropped where their class or id says navigation."""
NAVIGATION = re.compile(
    r"\b(nav|navheader|navfooter|toc|sphinxsidebar|related|headerlink|footer|sidebar|navsettop|navsetbottom|tocset|"
    r"versionbox|contents|search|breadcrumb|index|genindextable|modindextable|navigation|copyright|langlist|menu|"
    r"highlight|src|srclink)\b",
    re.I,
)
BODIES = (
    *("//*[@role='main']", "//main", "//div[@class='body']", "//article", "//div[@id='DisplayArea']"),
    *("//div[@class='main']", "//body"),
)
"""Where a page's own text is, tried in this order."""


def raw(path: Path) -> bytes:
    """A file's bytes, unpacked."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read()


def paragraphs(text: str) -> str:
    """One line a paragraph: what two line ends divide."""
    text = text.replace("¶", "").replace("\u200b", "").replace("\xad", "")
    kept = []
    for part in re.split(r"\n[ \r]*\n+", text):
        line = re.sub(r"[ \r\n\xa0]+", " ", part)
        line = re.sub(r"\s*\t\s*", "\t", line).strip()
        line = re.sub(r"(?<=[一-鿿，。；：、）]) (?=[一-鿿（])", "", line)
        if line:
            kept.append(line)
    return "\n".join(kept)


def _walk(element: Any, out: list[str]) -> None:
    """The text of an element and of what follows it, blocks divided by empty lines and cells by tabs."""
    tag = element.tag.split("}")[-1].lower() if isinstance(element.tag, str) else None
    named = f"{element.get('class') or ''} {element.get('id') or ''}".strip() if tag else ""
    if tag and tag not in DROPPED and not (named and tag in BOXES and NAVIGATION.search(named)):
        block = tag in BLOCKS
        if block:
            out.append({"br": "\n", "td": "\t", "th": "\t"}.get(tag, "\n\n"))
        if element.text:
            out.append(element.text)
        for child in element:
            _walk(child, out)
        if block:
            out.append("\n")
    if element.tail:
        out.append(element.tail)


def web_page(path: Path) -> str:
    """HTML; empty where it cannot be parsed."""
    try:
        page = lxml.html.fromstring(raw(path))
        body = next((found[0] for place in BODIES if (found := page.xpath(place))), page)
        out: list[str] = []
        _walk(body, out)
    except (lxml.etree.LxmlError, ValueError, RecursionError):
        return ""
    return paragraphs("".join(out))


def mallard(path: Path) -> str:
    """A page of GNOME's help."""
    root = lxml.etree.parse(str(path)).getroot()
    for element in root.xpath("//*[local-name()='info' or local-name()='media' or local-name()='code']"):
        parent = element.getparent()
        if parent is not None:
            tail, place = element.tail or "", parent.index(element)
            if place:
                parent[place - 1].tail = (parent[place - 1].tail or "") + tail
            else:
                parent.text = (parent.text or "") + tail
            parent.remove(element)
    out: list[str] = []
    _walk(root, out)
    return paragraphs("".join(out))


WORDS_APART = _names("B I SM Nm Nd Xr Fl Ar Pa Em Sy Li Va Dv Ql Dq Sq")
WORDS_JOINED = _names("BR IR RB RI BI IB")
BREAKS = _names("TP PP P LP IP sp Pp It HP br")
ESCAPES = [("\\-", "-"), ("\\e", "\\"), ("\\(aq", "'"), ("\\(bu", "•"), ("\\ ", " "), ("\\(co", "©"), ("\\(em", "—")]
ESCAPES += [("\\(en", "–"), ("\\(lq", "“"), ("\\(rq", "”"), ("\\*(lq", "“"), ("\\*(rq", "”"), ("\\.", ".")]


def man_page(path: Path) -> str:
    """troff of the man and mdoc macros, without examples and tables; empty for a page that points to another."""
    source = raw(path).decode("utf8", "ignore")
    if source.startswith(".so"):
        return ""
    out: list[str] = []
    skip = False
    for line in source.split("\n"):
        if re.match(r"\.(nf|EX|TS|de|ig)\b", line):
            skip = True
        if re.match(r"\.(fi|EE|TE|\.)", line):
            skip = False
            continue
        if skip or line.startswith(('.\\"', "'\\\"", '\\"')):
            continue
        if not line.startswith((".", "'")):
            out.append(line + "\n" if line.strip() else "\n\n")
            continue
        found = re.match(r"[.'] *(\w*) *(.*)", line)
        macro, words = (found.group(1), found.group(2)) if found else ("", "")
        words = words.replace('"', "")
        if macro in ("SH", "SS", "Sh", "Ss"):
            out.append(f"\n\n{words}\n\n")
        elif macro in BREAKS:
            out.append("\n\n" + (words if macro == "It" else "") + " ")
        elif macro in WORDS_APART:
            out.append(f" {words} ")
        elif macro in WORDS_JOINED:
            out.append(" " + words.replace(" ", "") + " ")
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d|\\&|\\c|\\/|\\,|\\\||\\%", "", "".join(out))
    for escape, plain in ESCAPES:
        text = text.replace(escape, plain)
    return paragraphs(text)


def pod(path: Path) -> str:
    """Perl's documentation, by pod2text, without code."""
    done = subprocess.run(["pod2text", "-u", "-w", "100000", str(path)], capture_output=True, check=False)
    parts = done.stdout.decode("utf8", "ignore").split("\n\n")
    return paragraphs("\n\n".join(part for part in parts if not part.startswith("        ")))


def plain(path: Path) -> str:
    """A text file."""
    return paragraphs(raw(path).decode("utf8", "ignore"))


def without_marks(text: str) -> str:
    """Short text without tags, links and emphasis."""
    text = html.unescape(text).replace("**", "").replace("\\\\*", "*")
    text = re.sub(r"<[^>]{1,80}>", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"[ \t]+", " ", text)
    return "\n".join(line.strip() for line in text.split("\n") if line.strip())


def pieces(parts: Iterator[str], over: int) -> Iterator[tuple[int, str]]:
    """Parts put together until they are longer than `over`, numbered."""
    text, number = "", 0
    for part in parts:
        text += part + "\n\n"
        if len(text) > over:
            yield number, text
            text, number = "", number + 1
    if text:
        yield number, text


def chinese_reference(root: Path, properties: bool = False) -> Iterator[tuple[str, str]]:
    """Chinese descriptions of a Python SDK's classes, methods and fields, each once.

    properties: fields are described at their properties, not in `__init__`.
    """
    seen: Counter[str] = Counter()
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(errors="ignore")
        if not CHINESE.search(source):
            continue
        try:
            classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        except SyntaxError:
            continue
        for number, text in pieces((part for node in classes if (part := _described(node, properties, seen))), 3000):
            yield f"{path.relative_to(root)}#{number}", text


def _described(node: ast.ClassDef, properties: bool, seen: Counter[str]) -> str:
    lines = [without_marks(told)] if CHINESE.search(told := ast.get_docstring(node) or "") else []
    for function in (one for one in node.body if isinstance(one, ast.FunctionDef)):
        doc = ast.get_docstring(function) or ""
        if not CHINESE.search(doc):
            continue
        if function.name == "__init__":
            fields = re.finditer(r":param (\w+):(.*?)(?=\n\s*:(?:type|param|rtype)|\Z)", doc, re.S)
            told_fields = [field.group(2) for field in fields if CHINESE.search(field.group(2))]
            lines += [without_marks(re.sub(r"^\s*\(Optional\)", "", told)) for told in told_fields]
        elif properties or not function.decorator_list:
            body = doc.split(":param")[0].split(":return")[0].split(":rtype")[0]
            if body.startswith(("Gets", "Sets")):
                body = "\n".join(body.split("\n")[1:])
            if CHINESE.search(body):
                lines.append(without_marks(body))
    kept = []
    for line in lines:
        seen[line] += 1
        if seen[line] == 1 and len(line) >= 6:
            kept.append(line)
    return "\n".join(kept)


def verse(root: Path) -> Iterator[tuple[str, str]]:
    """chinese-poetry: all of it but a second edition of the Tang, rankings, and five sixths of the Song's 254,000."""
    for folder in sorted(one for one in root.iterdir() if one.name not in ("rank", "strains", "yudingquantangshi")):
        for path in sorted(folder.rglob("*.json")):
            song = re.match(r"poet\.song\.(\d+)", path.name)
            if song and int(song.group(1)) // 1000 % 6:
                continue
            if "/error/" in str(path) or "宋词三百首" in path.name or "唐诗三百首" in path.name:
                continue
            try:
                found = json.loads(path.read_text())
            except ValueError:
                continue
            for number, text in pieces(_poems(found), 3000):
                yield f"{path.relative_to(root)}#{number}", text


def _poems(found: Any, above: str = "") -> Iterator[str]:
    if isinstance(found, list):
        if found and all(isinstance(line, str) for line in found):
            yield "\n".join(found)
        else:
            for one in found:
                yield from _poems(one, above)
    elif isinstance(found, dict):
        title = found.get("title") or found.get("rhythmic") or found.get("chapter") or ""
        body = found.get("paragraphs") or found.get("content") or found.get("para")
        if isinstance(body, list) and body and all(isinstance(line, str) for line in body):
            yield f"{title}\n{found.get('author') or ''}\n".strip() + "\n" + "\n".join(body)
        elif isinstance(body, list):
            yield from _poems(body, title)
        for key in ("desc", "biography"):
            if isinstance(found.get(key), str) and len(found[key]) > 40:
                yield (found.get("name") or title) + "\n" + found[key]


def electron(path: Path, locales: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Electron's documentation in some locales."""
    found = json.loads(path.read_text())
    for locale in locales:
        for place, page in found.get(locale, {}).items():
            text = re.sub(r"<pre.*?</pre>", "", page.get("html") or "", flags=re.S)
            text = html.unescape(re.sub(r"<[^>]+>", "", text))
            yield f"{locale}{place}", re.sub(r"\n\s*\n+", "\n", text)


def factbook(root: Path) -> Iterator[tuple[str, str]]:
    """The World Factbook, a country a document."""
    for path in sorted(root.rglob("*.json")):
        out: list[str] = []
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            _facts(found, out)
        yield path.name, html.unescape(re.sub(r"<[^>]+>", " ", "\n".join(out)))


def _facts(found: dict[str, Any], out: list[str]) -> None:
    for key, value in found.items():
        if isinstance(value, dict):
            if isinstance(value.get("text"), str):
                out.append(f"{key}: {value['text']}")
            _facts({name: one for name, one in value.items() if name != "text" and isinstance(one, dict)}, out)


def catalogue(root: Path, locale: str, english: bool) -> Iterator[tuple[str, str]]:
    """The longer messages of gettext catalogues: the translations into a locale, or what they were made from."""
    shortest, over = (60, 6000) if english else (20, 3000)
    for path in sorted(root.rglob(f"{locale}/LC_MESSAGES/*.mo")):
        entries = polib.mofile(str(path))
        said = (entry.msgid.replace("\x04", "|").split("|")[-1] if english else entry.msgstr for entry in entries)
        for number, text in pieces((one for one in map(without_marks, said) if len(one) >= shortest), over):
            yield f"{path.name}/{locale}#{number}", text
