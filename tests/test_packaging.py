"""The wheel: real files where the tree has links, data beside the code, the version of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bertology_serve

ROOT = Path(__file__).parents[1]
TREE = ("pyproject.toml", "README.md", "LICENSE", "bertology_serve", "kernels", "export", "cli")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    work = tmp_path_factory.mktemp("wheel")
    for name in TREE:
        source, target = ROOT / name, work / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target)
    run = subprocess.run([sys.executable, "-c", BUILD, "dist"], cwd=work, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return work / "dist" / run.stdout.splitlines()[-1]


def test_wheel_carries_every_file_once_and_no_link(wheel):
    folders = ("bertology_serve", "kernels", "export", "cli")
    found = {path.relative_to(ROOT) for name in folders for path in (ROOT / name).rglob("*") if path.is_file()}
    real = {path for path in found if "__pycache__" not in path.parts}
    expected = {str(path if path.parts[0] == "bertology_serve" else Path("bertology_serve") / path) for path in real}
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if ".dist-info/" not in entry.filename]
        links = [entry.filename for entry in entries if (entry.external_attr >> 16) & 0o170000 == 0o120000]
    names = [entry.filename for entry in entries]
    assert sorted(names) == sorted(expected)
    assert links == []


def test_wheel_imports_without_the_tree(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    modules = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    code = (
        "import bertology_serve, bertology_serve.cli.main, bertology_serve.export\n"
        f"import bertology_serve.kernels.{modules[0]}\n"
        "from bertology_serve.examples import path\n"
        "assert path('sentiment', 'train').is_file()\n"
        "print(bertology_serve.__version__, bertology_serve.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    version, origin = run.stdout.split()
    assert version == bertology_serve.__version__
    assert wheel.name == f"bertology_serve-{version}-py3-none-any.whl"
    assert Path(origin).is_relative_to(tmp_path)
