"""The promises of the tree: floors, links, names, and imports that cost nothing."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bertology_serve
from bertology_serve.cli.main import COMMANDS, ELSEWHERE
from tools import house

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bertology_serve"
LINKED = ("kernels", "export", "cli")

# Lower floors first. The sets of one floor may not import each other where ``SIBLINGS`` says so.
FLOORS = (
    {"errors", "config_fields", "files", "kernels", "examples"},
    {"families"},
    {"data", "tasks"},
    {"kinds", "client"},
    {"deltas"},
    {"encoder"},
    {"export"},
    {"training", "analysis", "serving"},
    {"api", "scale"},
    {"cli"},
    {"bench"},  # the command line knows its commands by name only
    {"", "__main__"},  # the public names of the package, imported on first use
)
SIBLINGS = ({"training", "analysis", "serving"},)
HEAVY = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "rich", "starlette", "uvicorn")


def sources() -> list[Path]:
    """Every module of the library once: its real path below the root."""
    folders = [PACKAGE, *(ROOT / name for name in LINKED)]
    return sorted(path for folder in folders for path in folder.rglob("*.py") if LINKED_DIRS.isdisjoint(path.parents))


LINKED_DIRS = {PACKAGE / name for name in LINKED}


def floor_of(module: str) -> int:
    part = module.removeprefix("bertology_serve").lstrip(".").split(".")[0]
    matches = [height for height, names in enumerate(FLOORS) if part in names]
    assert matches, f"{module} has no floor: import a name from its module, or add the new folder to FLOORS"
    return matches[0]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "bertology_serve" else ["bertology_serve", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of each import; ``from package import module`` counts as the module it may name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in at_import(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source == "bertology_serve":
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, source


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: none inside functions or ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from at_import(node)


def wrong_turns(path: Path) -> list[str]:
    """Imports of that module that do not point down."""
    here, wrong = module_name(path), []
    mine = here.split(".")[1] if "." in here else ""
    for line, target in imports(path):
        if target.split(".")[0] != "bertology_serve" or target in ("bertology_serve", "bertology_serve.__version__"):
            continue
        theirs = target.split(".")[1]
        if theirs == mine or mine == "":
            continue
        siblings = any({mine, theirs} <= group for group in SIBLINGS)
        if floor_of(target) > floor_of(here) or siblings:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}, which is not below it")
    return wrong


def test_imports_point_down_the_floors_only():
    assert [line for path in sources() for line in wrong_turns(path)] == []


def test_the_floors_test_sees_a_wrong_import(tmp_path, monkeypatch):
    module = tmp_path / "bertology_serve" / "encoder" / "bad.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    module.write_text("from bertology_serve import export\nfrom ..serving.app import x\nfrom ..tasks import spec\n")
    assert [line.split(" imports ")[1].split(",")[0] for line in wrong_turns(module)] == [
        "bertology_serve.export",
        "bertology_serve.serving.app",
    ]


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "bertology_serve", *sys.stdlib_module_names}
    kernels = [path for path in sources() if path.relative_to(ROOT).parts[0] == "kernels"]
    wrong = [(path.name, name) for path in kernels for _, name in imports(path) if name.split(".")[0] not in allowed]
    assert kernels
    assert wrong == []


@pytest.mark.parametrize("name", LINKED)
def test_root_folders_are_reached_through_relative_links(name):
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the HuggingFace package named kernels"


def test_root_folders_are_never_imported_directly():
    files = [*sources(), *(ROOT / "tests").rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if name.split(".")[0] in LINKED
    ]
    assert wrong == []


def test_every_command_is_in_the_table():
    modules = {path.stem for path in (ROOT / "cli").glob("*.py")} - {
        "__init__",
        "main",
        "common",
        "options",
    }
    places = {ELSEWHERE.get(command, f"cli.{command.replace('-', '_')}") for command in COMMANDS}
    assert modules == {place.removeprefix("cli.") for place in places if place.startswith("cli.")}


def test_commands_import_what_is_heavy_inside_functions():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in [*(ROOT / "cli").glob("*.py"), *(PACKAGE / "bench").rglob("*command*.py")]
        for line, name in imports(path, top_level_only=True)
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    """What keeps ``--help`` under 0.35 s, said in a way that a busy machine cannot break."""
    code = (
        "import sys; from bertology_serve.cli.main import main; code = main(sys.argv[1:]); "
        f"heavy = sorted(set({HEAVY!r}) & set(sys.modules)); assert code == 0 and not heavy, (code, heavy)"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Usage: bertology-serve")


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, bertology_serve; assert not set({HEAVY!r}) & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_transformers_imports_from_the_root():
    """The folder kernels stands in the root: transformers, which probes a package of that name, must not mind."""
    run = subprocess.run(
        [sys.executable, "-c", "from transformers import BertModel"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", bertology_serve.__all__)
def test_public_names_exist(name):
    assert getattr(bertology_serve, name) is not None
    assert name in dir(bertology_serve)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bertology_serve.nothing  # noqa: B018


def test_no_place_but_families_compares_a_familys_name():
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        if PACKAGE / "families" not in path.parents
        for line in house.family_comparisons(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert places == []


def test_the_house_grows_no_larger_than_it_should():
    found = house.figures()
    bars = {
        "library files": 260,
        "file names used twice or more": 8,
        "class names used twice or more": 5,
        "Any": 350,
        "places that compare a family's name": 0,
    }
    assert {name: found[name] for name in bars if found[name] > bars[name]} == {}


def test_the_docstrings_of_the_api_give_shapes_and_errors():
    assert house.silent_docstrings() == []


def test_a_docstring_without_shapes_or_errors_is_seen(monkeypatch):
    def doubled(x: Tensor) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        """Twice x."""

    def checked(name: str) -> None:
        """The name, checked."""
        raise ValueError(name)

    for thing in (doubled, checked):
        types = str(thing.__annotations__)
        monkeypatch.setattr(house, "public_api", lambda: [("f", thing, inspect.getsource(thing), types)])  # noqa: B023
        assert house.silent_docstrings() == ["f"]


def test_a_comparison_with_a_familys_name_is_seen():
    tree = ast.parse("a = x.family == 'mpnet'\nb = y in ('bert', z)\nc = {'mpnet': 1}.get(x)\nd = 'mpnet'")
    assert house.family_comparisons(tree) == [1, 2, 3]


def test_what_transformers_does_not_promise_stands_behind_one_door():
    """Its modelling code, its attention interface and its private names: ``families/compat.py`` alone has them."""
    door = PACKAGE / "families" / "compat.py"
    inside = re.compile(r"transformers\.(models|masking_utils|modeling_\w+|integrations)(\.|$)")
    private = {"_attn_implementation", "_supports_attention_backend"}
    paths = [path for path in sources() if path != door and PACKAGE / "bench" not in path.parents]
    wrong = [f"{path.name}:{line} {name}" for path in paths for line, name in imports(path) if inside.match(name)]
    wrong += [
        f"{path.name}:{node.lineno} {node.attr}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in private
    ]
    assert wrong == []


def loaders(path: Path) -> Iterator[tuple[int, bool]]:
    """(line, whether it forbids code that a checkpoint brings) of each call that loads a model or builds one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        peft = ast.unparse(node.func.value).endswith("PeftModel")  # adapters bring none
        if node.func.attr in ("from_pretrained", "from_config") and not peft:
            given = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
            yield node.lineno, isinstance(given, ast.Constant) and given.value is False


def test_nothing_that_is_loaded_brings_code() -> None:
    paths = [*sources(), *(ROOT / "benchmarks").rglob("*.py")]
    found = {f"{path.relative_to(ROOT)}:{line}": safe for path in paths for line, safe in loaders(path)}
    assert len(found) > 5
    assert [place for place, safe in found.items() if not safe] == []
