"""Gathers the pages of the documentation site: ``make docs`` runs this, then Zensical.

``python tools/site.py gather`` writes build/docs: the README as its first page, docs/, the generated reference, and
under ``repository/`` what they link to elsewhere in the repository. ``check`` follows every link of the built site/.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
DOCS, GATHERED, SITE = ROOT / "docs", ROOT / "build" / "docs", ROOT / "site"
CODE = re.compile(r"^```.*?^```$|(`+)[^`].*?\1", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()[^()\s]+(?=\))|(?<=<img src=\")[^\"]+(?=\")")


def links(text: str) -> Iterator[re.Match[str]]:
    """The links of a page to files and headings of the repository; those inside of code are none."""
    code = [match.span() for match in CODE.finditer(text)]
    for match in LINK.finditer(text):
        outside = all(not begin <= match.start() < end for begin, end in code)
        if outside and not urlsplit(match[0]).scheme:
            yield match


def place(file: Path) -> Path:
    """Where a file of the repository lies among the gathered pages."""
    if file == ROOT / "README.md":
        return GATHERED / "index.md"
    return GATHERED / (file.relative_to(DOCS) if DOCS in file.parents else "repository" / file.relative_to(ROOT))


def gather() -> int:
    """Writes build/docs; the number of its files."""
    shutil.rmtree(GATHERED, ignore_errors=True)
    waiting = [ROOT / "README.md", *(file for file in DOCS.rglob("*") if file.is_file())]
    seen = set(waiting)
    while waiting:
        file = waiting.pop()
        target = place(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".md":
            shutil.copy(file, target)
            continue
        text = file.read_text(encoding="utf-8")
        for match in reversed(list(links(text))):
            name, mark, anchor = match[0].partition("#")
            to = (file.parent / name).resolve() if name else file
            if not to.is_file():
                raise SystemExit(f"error: {file.relative_to(ROOT)} links to {match[0]}, which is no file")
            if to not in seen:
                seen.add(to)
                waiting.append(to)
            new = os.path.relpath(place(to), target.parent) if name else ""
            text = text[: match.start()] + new + mark + anchor + text[match.end() :]
        target.write_text(text, encoding="utf-8")
    return len(seen)


class Page(HTMLParser):
    """What a built page has: the names of its places, and what it links to or loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.names, self.linked, self.loaded = {"", "__top"}, list[str](), list[str]()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes note of a tag's names and addresses."""
        found = {name: value for name, value in attrs if value}
        self.names |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.linked.append(found["href"])
        elif tag in ("script", "img", "link") and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded += [found[name] for name in ("src", "href") if name in found]


def check() -> int:
    """Follows every link of site/ to a file and to a place in it, without network; how many there are."""
    pages = {file: Page(file) for file in SITE.rglob("*.html") if file.name != "404.html"}
    wrong, count = [], 0
    for file, page in pages.items():
        wrong += [f"{file}: loads {address} from elsewhere" for address in page.loaded if urlsplit(address).netloc]
        for address in (*page.linked, *page.loaded):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            to = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            to = to / "index.html" if to.is_dir() else to
            if not to.is_file() or (to in pages and unquote(parts.fragment) not in pages[to].names):
                wrong.append(f"{file.relative_to(SITE)}: {address} leads nowhere")
    if wrong:
        raise SystemExit("\n".join(wrong))
    return count


if __name__ == "__main__":
    if sys.argv[1:] == ["gather"]:
        print(f"{gather()} files gathered in {GATHERED.relative_to(ROOT)}")
    elif sys.argv[1:] == ["check"]:
        print(f"{check()} links of {SITE.relative_to(ROOT)} lead somewhere")
    else:
        raise SystemExit(__doc__)
