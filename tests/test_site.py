"""The documentation site builds offline, its reference is whole, and its navigation names every page."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import bertology_serve
from bertology_serve.cli.main import COMMANDS
from bertology_serve.serving.http.openapi import document
from bertology_serve.serving.observability.metrics import Metrics
from tests.snippets import ROOT
from tools import docs_site, reference

PAGES = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
OTHERS = (
    "--retry --retry-connrefused --retry-delay --retry-all-errors --from-literal --nproc-per-node --num --text "
    "--ignore-scripts --directory"
).split()
"""Flags of curl, kubectl, torchrun, accelerate, the examples, npm and http.server; those of TEI and vLLM stand on
their own pages."""
ABOUT_OTHERS = ("coming-from-tei.md", "coming-from-vllm-lora.md")


def leaves(entry: object) -> Iterator[str]:
    """The pages of a navigation."""
    if isinstance(entry, str):
        yield entry
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from leaves(inner)


def test_the_navigation_names_every_page_once():
    named = sorted(leaves(CONFIG["nav"]))
    made = {f"reference/{name}.md" for name in reference.PAGES}
    assert named == sorted(PAGES | made | {"index.md"}), "mkdocs.yml's nav has each page of docs/ in its group"


def test_the_site_builds_and_every_link_of_it_leads_somewhere(tmp_path: Path):
    gathered = tmp_path / CONFIG["docs_dir"]
    assert docs_site.gather(gathered) > len(PAGES)
    reference.write(gathered / "reference")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert docs_site.check(tmp_path / "site") > 1000


def test_a_page_that_loads_from_elsewhere_or_links_to_nothing_is_seen(tmp_path: Path):
    (tmp_path / "a.html").write_text('<img src="https://cdn.example/x.js"><a href="b.html">b</a>', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"loads https://cdn\.example(?s:.*)b\.html leads nowhere"):
        docs_site.check(tmp_path)


def test_the_reference_names_every_command_option_and_variable():
    text = reference.cli()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(COMMANDS)
    for told in ("`--learning-rate <float>`", "`BERTOLOGY_MAX_ITEMS`", "[default: 8000]", "### analyze heads"):
        assert told in text


def test_every_option_that_a_page_names_is_one():
    known = {*FLAG.findall(reference.cli()), *OTHERS, "--install-completion"}
    pages = [ROOT / "README.md", *(ROOT / "docs" / page for page in PAGES if not page.endswith(ABOUT_OTHERS))]
    named = {flag: page.name for page in pages for flag in FLAG.findall(page.read_text(encoding="utf-8"))}
    assert {flag: page for flag, page in named.items() if flag not in known} == {}


def test_the_reference_has_all_that_the_package_exports():
    text = reference.python()
    functions = [name for name in bertology_serve.__all__ if not name.startswith("_") and name != "analysis"]
    assert [name for name in functions if f"### bs.{name}\n" not in text] == []
    assert "### bs.analysis.heads\n" in text
    assert "method: Method | Iterable[Method] = ()," in text


def test_the_reference_has_every_route_and_metric():
    text = reference.http()
    assert [path for path in document()["paths"] if f" {path}\n" not in text] == []
    told = reference.metrics()
    names = [family.name for family in text_string_to_metric_families(Metrics().render().decode())]
    assert [name for name in names if f"`{name}" not in told and not name.endswith("_created")] == []
    assert "| `bertology_items_total` | counter | `delta`, `outcome` |" in told
