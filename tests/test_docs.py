"""Every command and every Python snippet of the documentation runs, or says why it does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import codespell_lib
import pytest
from safetensors.torch import load_file, save_file

from bertology_serve.examples import path
from tests.snippets import ROOT, RUN, Forks, blocks, script
from tools.docs_site import CODE, links

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "web/README.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
RUN_PAGES = [page for page in PAGES[1:] if any(block.runs for block in blocks(page))]  # test_readme runs the README
REASONS = ("needs a GPU", "needs the hub", "needs network", "takes minutes", "needs another program", "is a sketch")
WORLD = """
train="bertology-serve train --backbone minilm --epochs 1"
$train --task classification --train train.jsonl --method lora --rank 4 --out deltas/mood --version 1
cp -r deltas/mood/1 deltas/mood/2
$train --task classification --train train.jsonl --method bitfit --start probe --out deltas/tone
$train --task classification --train train.jsonl --method lora --head hf --pooling cls --out made
mkdir my-adapter && cp made/adapter_* my-adapter
$train --task token-classification --train entities.jsonl --method lora --out deltas/names
$train --task classification --train train.jsonl --method adapter --head linear --pooling cls --out deltas/pfeiffer
"""
"""The deltas that are there on every page, beside ``DATA``; those that a page trains itself are taken away first."""
DATA = {
    "train.jsonl": ("sentiment", "train"), "dev.jsonl": ("sentiment", "dev"), "entities.jsonl": ("entities", "train"),
    "intents.jsonl": ("intent", "train"), "intents.dev.jsonl": ("intent", "dev"),
    "judged.jsonl": ("similarity", "train"), "judged.dev.jsonl": ("similarity", "dev"),
    "pairs.jsonl": ("similarity", "train"), "pairs.dev.jsonl": ("similarity", "dev"),
}  # fmt: skip
MOST_ROWS = 10


LAYERS = 2


def lowest_layers(minilm: Path, package: Path) -> None:
    """MiniLM's package with its lowest layers alone, so that a page's commands take seconds."""
    folder = package / "model"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    (package / "__init__.py").touch()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}), encoding="utf-8")
    tensors = load_file(minilm / "model.safetensors")
    layers = {name: re.search(r"\blayer\.(\d+)\.", name) for name in tensors}
    kept = {name: tensors[name] for name, found in layers.items() if found is None or int(found[1]) < LAYERS}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


def environment(world: Path) -> dict[str, str]:
    """Of a page: the small encoder, timings kept from page to page, and servers that build no graphs as they start."""
    places = {"BERTOLOGY_CACHE": str(world.with_name("cache")), "PYTHONPATH": str(world.with_name("packages"))}
    return {**places, "BERTOLOGY_ENGINE": "torch"}


def records(file: str) -> str:
    """Some of the packaged examples; pairs are those that mean the same, without their score."""
    rows = [json.loads(line) for line in path(*DATA[file]).read_text(encoding="utf-8").splitlines()]
    if file.startswith("pairs"):
        rows = [{"text": row["text"], "positive": row["text_pair"]} for row in rows if row["score"] > 3.5]
    if file.startswith("intents"):
        rows = [row for row in rows if row["label"] in ("play_music", "set_alarm", "weather")]
    return "".join(json.dumps(row) + "\n" for row in rows[:MOST_ROWS])


@pytest.fixture(scope="module")
def world(forks: Forks, minilm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    lowest_layers(minilm_path, folder.with_name("packages") / minilm_path.parent.name)
    for file in DATA:
        (folder / file).write_text(records(file), encoding="utf-8")
    done = forks.run("set -e\n" + WORLD, folder, **environment(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_from_top_to_bottom(page: Path, forks: Forks, world: Path, tmp_path: Path):
    folder = shutil.copytree(world, tmp_path / "here", ignore=shutil.ignore_patterns(".*"), copy_function=os.link)
    port, text = free_port(), script(page)
    for made in re.findall(r"--out (deltas/\w+)", text):
        shutil.rmtree(folder / made, ignore_errors=True)
    for printed, own in {"8000": port, "8001": free_port(), "8002": free_port()}.items():
        text = text.replace(printed, str(own))
    if f"localhost:{port}" in text and f"--port {port}" not in text:
        start = f"bertology-serve serve --backbone minilm --deltas deltas --port {port} &\n"
        text = f"{start}curl --retry 60 --retry-delay 1 --retry-connrefused localhost:{port}/health\n{text}"
    done = forks.run(text, folder, **environment(world))
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{done.stdout[-1000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_in_a_block_that_is_not_run(page: Path):
    for block in blocks(page):
        if block.language not in RUN:
            commands = re.findall(r"^(?:\$ )?(?:bertology-serve|curl|python|docker) .*", block.text, re.MULTILINE)
            assert commands == [], f"mark this block as sh: {block.text[:80]}"
        assert block.skipped is None or block.skipped.startswith(REASONS), block.skipped


def test_how_many_blocks_run(capsys: pytest.CaptureFixture[str]):
    found = [(page, block) for page in PAGES for block in blocks(page) if block.language in RUN]
    run = sum(block.runs for _, block in found)
    why = Counter(block.skipped for _, block in found if block.skipped)
    commands = sum(len(re.findall(r"^(?:bertology-serve|curl) ", block.text, re.MULTILINE)) for _, block in found)
    with capsys.disabled():
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(why.items()))
        print(f"\n{len(PAGES)} pages: {run} blocks run ({commands} commands of ours), {len(found) - run} not ({told})")
    assert run > 2 * (len(found) - run)


def test_the_first_hour_of_somebody_who_has_the_readme(forks: Forks, tmp_path: Path):
    """Their own CSV, trained, asked, served and exported; the first of six commands, the installation, is done."""
    rows = [("I loved every minute", "good"), ("A waste of time", "bad"), ("Warm and wise", "good"),
            ("I nearly fell asleep", "bad"), ("A joy, go and see it", "good"), ("Far too long", "bad")]  # fmt: skip
    lines = ["text,label", *(f'"{text}",{label}' for text, label in rows)]
    (tmp_path / "films.csv").write_text("\n".join(lines), encoding="utf-8")
    done = forks.run(f"bash {ROOT}/tools/first_hour.sh films.csv 'Wonderful acting!'", tmp_path, INSTALLED="1",
                     PORT=str(free_port()))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^good \d+ % \(bad \d+ %\)$", done.stdout, re.MULTILINE), done.stdout
    assert '"label":"good"' in done.stdout
    assert re.search(r"^5 commands, \d+ s$", done.stdout, re.MULTILINE)
    assert (tmp_path / "first-hour" / "mine-onnx" / "onnx" / "model.onnx").is_file()


def headings(page: Path) -> list[str]:
    """GitHub's names for the headings of a page; those of the site are the same, but for repeated dashes."""
    titles = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path):
    text = page.read_text(encoding="utf-8")
    assert not re.search(
        r"\]\[|^\[[^]]+\]: |<a |https?://[^ )]*github\.com/[^ )]*/blob/", CODE.sub("", text), re.MULTILINE
    )
    for match in links(text):
        file, _, anchor = match[0].partition("#")
        to = (page.parent / file).resolve() if file else page
        assert to.is_file(), match[0]
        assert ROOT in to.parents, match[0]
        if anchor:
            assert headings(to).count(anchor) == 1, match[0]
            assert "--" not in anchor, match[0]


def test_a_link_inside_of_code_is_none_and_others_are_found():
    text = "[a](b.md#c) `[d](e.md)`\n\n```\n[f](g.md)\n```\n\n[![h](i.svg)](https://j.example)"
    assert [match[0] for match in links(text)] == ["b.md#c", "i.svg"]


def test_spelling(capsys: pytest.CaptureFixture[str]):
    """Common misspellings, by codespell's list."""
    found = codespell_lib.main("--ignore-words-list", "paria", *map(str, [*LINKED, ROOT / "CHANGELOG.md"]))
    assert found == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "howto").glob("*.md")), ids=lambda page: page.stem)
def test_a_how_to_page_is_short(page: Path):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 80
