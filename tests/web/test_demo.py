"""The page without a build: every task that reads one text, and a question, is answered on it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.web.browser import seen_on
from tests.web.conftest import NAMES


def test_the_page_answers_on_its_own(built: Path, export: Path, tmp_path: Path):
    shutil.copytree(built / "demo", tmp_path / "page")
    shutil.copytree(export, tmp_path / "page" / "export")
    seen = seen_on(tmp_path / "page", "index.html", tmp_path / "profile")
    assert "7 tasks in one batch" in seen, re.findall(r"<span id=.status.*?</span>", seen)
    assert re.findall(r"<h2.*?>(\w+)</h2>", seen) == ["base", *NAMES]
    shown = re.sub(r"<script.*?</script>", "", seen, flags=re.DOTALL)
    assert not re.search("NaN|undefined|null", shown)
    sources = re.findall(r"""(?:src|href|import|from)[ =(]*["'](http[^"']*)""", (built / "demo/index.html").read_text())
    assert sources == []  # nothing comes from elsewhere
