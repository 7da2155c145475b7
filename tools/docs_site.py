"""Gathers the pages of the documentation site: ``make docs`` runs this, then Zensical.

``python tools/docs_site.py gather build/docs`` writes the README as first page, docs/, and under ``repository/`` what
they link to elsewhere in the repository. ``check site`` follows every link of what was built from them.
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
DOCS = ROOT / "docs"
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
        return Path("index.md")
    return file.relative_to(DOCS) if DOCS in file.parents else "repository" / file.relative_to(ROOT)


def gather(folder: Path) -> int:
    """Writes a folder anew, and returns the number of its files. Raises SystemExit for a link that leads nowhere."""
    shutil.rmtree(folder, ignore_errors=True)
    waiting = [ROOT / "README.md", *(file for file in DOCS.rglob("*") if file.is_file())]
    seen = set(waiting)
    while waiting:
        file = waiting.pop()
        target = folder / place(file)
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
            new = os.path.relpath(place(to), place(file).parent) if name else ""
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


def check(site: Path) -> int:
    """Follows every link of a site to a file and a place in it, without network, and returns how many there are.

    Raises SystemExit for those that lead nowhere, and for pages that load anything from elsewhere."""
    pages = {file: Page(file) for file in site.resolve().rglob("*.html") if file.name != "404.html"}
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
                wrong.append(f"{file}: {address} leads nowhere")
    if wrong:
        raise SystemExit("\n".join(wrong))
    return count


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("gather", "check"):
        raise SystemExit(__doc__)
    work = gather if sys.argv[1] == "gather" else check
    print(f"{sys.argv[1]}: {work(Path(sys.argv[2]))} {'files' if work is gather else 'links'}")
