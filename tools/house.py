"""Prints how large the house is and how often it says the same word: files, lines, names used twice, ``Any``.

``python tools/house.py`` from the root. ``tests/test_tree.py`` keeps the figures that are cheap from growing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "export", "cli")
HARNESS = ROOT / "bertology_serve" / "bench"
FAMILY_FILES = ROOT / "bertology_serve" / "families"
FAMILIES = {
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "mpnet",
    "modernbert",
    "deberta-v2",
    "albert",
    "ernie",
    "rembert",
}


def library() -> list[Path]:
    """Every file of the library but the harness, each once."""
    links = {ROOT / "bertology_serve" / name for name in LINKED}
    folders = [ROOT / "bertology_serve", *(ROOT / name for name in LINKED)]
    found = (path for folder in folders for path in folder.rglob("*.py") if links.isdisjoint(path.parents))
    return sorted(path for path in found if HARNESS not in path.parents)


def repeated(names: list[str]) -> list[str]:
    """The names that stand there twice or more."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def figures() -> dict[str, int]:
    """Each figure by its name."""
    files = library()
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    names = [path.name for path in files if not path.name.startswith("__")]
    classes = [node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    words = [node.id for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return {
        "library files": len(files),
        "lines": sum(text.count("\n") for text in texts.values()),
        "file names used twice or more": len(repeated(names)),
        "class names used twice or more": len(repeated(classes)),
        "Any": words.count("Any"),
        "places that compare a family's name": sum(
            len(family_comparisons(tree)) for path, tree in trees.items() if FAMILY_FILES not in path.parents
        ),
    }


def family_comparisons(tree: ast.AST) -> list[int]:
    """The lines that compare something with a family's name, or look it up in a table of them."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Compare) and FAMILIES & constants(node))
        or (isinstance(node, ast.Dict) and FAMILIES & {key for part in node.keys if part for key in constants(part)})
    ]


def constants(node: ast.AST) -> set[object]:
    """The constants that stand in an expression."""
    return {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)}


SHAPES = re.compile(r"\[[\w, .*+-]+\]|float|dtype|scalar")
TENSORS = re.compile(r"\b(Tensor|Tensors|ndarray|NDArray|Effects)\b")
ERRORS = re.compile(r"[Rr]aises|\w+Error\b|NotFound|Unsupported|BaseMismatch")
RAISING = re.compile(r"^\s+(raise [A-Z]|(\w+\.)?_?check_\w+\()", re.MULTILINE)


def silent_docstrings() -> list[str]:
    """The public functions, classes and methods of the API whose docstring gives no shape or dtype where tensors pass,
    or no error where one is raised. Imports the library."""
    return [
        name
        for name, thing, code, types in public_api()
        if (TENSORS.search(types) and not SHAPES.search(inspect.getdoc(thing) or ""))
        or (RAISING.search(code) and not ERRORS.search(inspect.getdoc(thing) or ""))
    ]


def public_api() -> Iterator[tuple[str, object, str, str]]:
    """(name, object, its source, its annotations) of all that ``bertology_serve`` and its ``analysis`` export."""
    for package in ("bertology_serve", "bertology_serve.analysis"):
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield name, thing, inspect.getsource(thing), str(thing.__annotations__)
            if not inspect.isclass(thing):
                continue
            made = [vars(thing).get(way) for way in ("__init__", "__post_init__")]
            own = [
                one
                for one in made
                if inspect.isfunction(one) and inspect.unwrap(one).__code__.co_filename != "<string>"
            ]
            given = [inspect.get_annotations(thing), *(one.__annotations__ for one in own)]
            yield name, thing, "".join(map(inspect.getsource, own)), str(given)
            for method, value in vars(thing).items():
                code = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
                if inspect.isfunction(code) and not method.startswith("_"):
                    yield f"{name}.{method}", code, inspect.getsource(code), str(code.__annotations__)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    silent = {"docstrings of the API without shapes or errors": len(silent_docstrings())} if find_spec("torch") else {}
    print(json.dumps(figures() | silent, indent=2))
