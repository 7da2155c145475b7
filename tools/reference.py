"""Writes the reference from the code: ``python tools/reference.py FOLDER`` (``make docs`` does, for the site).

Commands come from typer, Python from the docstrings of what ``bertology_serve`` exports, HTTP from the OpenAPI
document, metrics from the registries of a server and a router, errors from their tree.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import typer
from prometheus_client import CollectorRegistry

import bertology_serve
import bertology_serve.analysis
from bertology_serve import errors
from bertology_serve.cli.common import complain
from bertology_serve.cli.main import COMMANDS, PROGRAM, application
from bertology_serve.export.exporting import export
from bertology_serve.scale.placement import Placement
from bertology_serve.scale.router_metrics import RouterMetrics
from bertology_serve.serving.http.errors import status_of
from bertology_serve.serving.http.openapi import document
from bertology_serve.serving.observability.metrics import Health, LoopLag, Metrics
from bertology_serve.serving.versions.delta_cache import TierGauges

FROM_CODE = "*Made from the code by `make docs`.*"
WIDE = 100  # a longer signature has a line for each parameter


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "<" if "`" in text else "&lt;")


def cli() -> str:
    """Every command with every option."""
    parts = [
        "# Commands and options",
        FROM_CODE + " `bertology-serve COMMAND --help` shows what most people use, `--help-all` the rest.",
        table(("command", ""), ([f"[`{name}`](#{name})", line] for name, line in COMMANDS.items())),
    ]
    for name in COMMANDS:
        command: Any = typer.main.get_command(application(name)).commands[name]  # type: ignore[attr-defined]
        parts.append(f"## {name}")
        for words, one in [(name, command)] if not hasattr(command, "commands") else command.commands.items():
            if one is not command:
                parts.append(f"### {name} {words}")
            parts += _command(one, name if one is command else f"{name} {words}")
    return "\n\n".join(parts)


def _command(command: Any, words: str) -> Iterator[str]:
    layout = getattr(command.callback, "layout", None)
    context = command.make_context(words, [], resilient_parsing=True)
    given = [param for param in command.get_params(context) if param.param_type_name == "argument"]
    usage = [param.get_help_record(context)[0].partition(" ")[0] for param in given]
    yield f"```text\n{PROGRAM} {' '.join((words, *usage))} [OPTIONS]\n```"
    yield inspect.cleandoc(command.help or "")
    panels: dict[str, list[list[str]]] = {}
    panel_of = {name: panel for panel, names in (layout.panels if layout else {}).items() for name in names}
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is None or param.name == "help":
            continue
        panel = getattr(param, "rich_help_panel", None) or panel_of.get(str(param.name), "")
        text = re.sub(r"\[env var: (\w+)(?:; |(?=\]))", "[", record[1]).replace("[]", "")
        row = ["`{}`".format(record[0].replace("|", ", ")), text]
        if layout and layout.prefix:
            variable = param.allow_from_autoenv if hasattr(param, "allow_from_autoenv") else False
            row.append(f"`{layout.prefix}_{str(param.name).upper()}`" if variable else "")
        panels.setdefault(panel, []).append(row)
    for panel, rows in sorted(panels.items(), key=lambda item: not item[0]):
        if panel:
            yield f"**{panel}**"
        yield table(("option", "is", "variable")[: len(rows[0])], rows)


def python() -> str:
    """What ``bertology_serve`` and its ``analysis`` export."""
    parts = [
        "# Python",
        FROM_CODE
        + " `import bertology_serve as bs`. Shapes have one alphabet: T token rows, S sequences, K in, N out, "
        "R rank, P pool rows, H hidden, L layers, D head width, C labels, M bottleneck width, V virtual tokens.",
    ]
    for module in (bertology_serve, bertology_serve.analysis):
        short = module.__name__.replace("bertology_serve", "bs")
        parts += [f"## {short}", _text(module)]
        for name in module.__all__:
            thing = export if name == "export" else getattr(module, name)
            if name.startswith("_") or isinstance(thing, ModuleType):
                continue
            parts += [f"### {short}.{name}", _signature(name, thing), _text(thing)]
            for method, value in vars(thing).items() if inspect.isclass(thing) else ():
                code = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
                if inspect.isfunction(code) and not method.startswith("_") and inspect.getdoc(code):
                    call = f"{name}.{method}"
                    told = (
                        f"`{call}`" if code is not value and not hasattr(value, "__func__") else _signature(call, code)
                    )
                    parts += [told, _text(code)]
    return "\n\n".join(part for part in parts if part)


def _text(thing: object) -> str:
    return inspect.getdoc(thing) or ""


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    found = inspect.signature(thing)
    given = [
        _parameter(one) for one in found.parameters.values() if one.name != "self" and not one.name.startswith("_")
    ]
    keyed = [one.kind is one.KEYWORD_ONLY for one in found.parameters.values() if one.name != "self"]
    if True in keyed and found.parameters and not any("*" in one for one in given[: keyed.index(True)]):
        given.insert(keyed.index(True), "*")
    line = f"{name}({', '.join(given)})"
    if len(line) > WIDE:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in given) + ")"
    end = "" if found.return_annotation in (inspect.Signature.empty, None, "None") or inspect.isclass(thing) else (
        " -> " + str(found.return_annotation).replace("'", "")
    )  # fmt: skip
    return f"```python\n{line}{end}\n```"


def _parameter(one: inspect.Parameter) -> str:
    stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    default = "..." if re.match("<", repr(one.default)) else repr(one.default)
    return f"{stars}{one.name}: {one.annotation}" + (f" = {default}" if one.default is not one.empty else "")


def http() -> str:
    """Every route and every body."""
    whole = document()
    parts = [
        "# HTTP",
        FROM_CODE + " A running server has it as `/openapi.json`; here it is [a file](openapi.json).",
        "## Routes",
    ]
    meanings: dict[str, str] = {}
    for path, operations in whole["paths"].items():
        for verb in ("get", "post"):
            if verb not in operations:
                continue
            one = operations[verb]
            parts += [f"### {verb.upper()} {path}", one["summary"] + "."]
            body = one.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                parts.append(f"Body: {_type(body)}")
            good = one["responses"]["200"].get("content", {}).get("application/json", {}).get("schema")
            problems = sorted(code for code in one["responses"] if code != "200")
            meanings |= {code: one["responses"][code]["description"] for code in problems}
            parts.append(f"Answers: {_type(good) if good else 'text'}. Problems: {', '.join(problems) or 'none'}.")
    parts += ["## Problems", table(("status", "is"), sorted(meanings.items())), "## Bodies"]
    for name, schema in whole["components"]["schemas"].items():
        parts += [f"### {name}", " ".join(schema.get("description", "").split())]
        fields, needed = schema.get("properties", {}), schema.get("required", [])
        rows = [
            [f"`{field}`", _type(one), one.get("description", "") + (" Required." if field in needed else "")]
            for field, one in fields.items()
        ]
        if rows:
            parts.append(table(("field", "type", "is"), rows))
    return "\n\n".join(part for part in parts if part)


def _type(schema: dict[str, Any]) -> str:
    """A schema in words, with links to those that have a name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    return str(schema.get("type", "any"))


def metrics() -> str:
    """Name, type, labels and meaning of every metric, from registries that nothing was counted in yet."""
    server = Metrics()
    queue = SimpleNamespace(items=0, tokens=0, running=0, max_tokens=1, times=SimpleNamespace(budget=0))
    server.watch(queue)  # type: ignore[arg-type]
    server.affinity(lambda: (), lambda: (), 0)
    lag = LoopLag(server.registry)
    background = SimpleNamespace(works={})
    idle = SimpleNamespace(is_up=True, restarts=0)
    server.registry.register(Health(lambda: True, idle, background))  # type: ignore[arg-type]
    tiers = SimpleNamespace(counts=dict, device_bytes=0, loads=0, failures=0, evictions=0, thrashed=0)
    server.registry.register(TierGauges(tiers))  # type: ignore[arg-type]
    router = RouterMetrics(Placement())
    labels = {
        getattr(one, "_name", ""): getattr(one, "_labelnames", ())
        for holder in (server, lag, router)
        for one in vars(holder).values()
    }
    return "\n\n".join(
        (
            "# Metrics",
            FROM_CODE + " `GET /metrics` gives them in Prometheus' text format.",
            "## A server",
            _metrics(server.registry, labels),
            "## The router",
            _metrics(router.registry, labels),
        )
    )


def _metrics(registry: CollectorRegistry, labels: dict[str, Sequence[str]]) -> str:
    rows = []
    for family in sorted(registry.collect(), key=lambda one: one.name):
        known = getattr(family, "_labelnames", None) or labels.get(family.name, ())
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.append([f"`{name}`", family.type, ", ".join(f"`{label}`" for label in known), family.documentation])
    return table(("name", "type", "labels", "is"), rows)


def errors_page() -> str:
    """Every error that is raised on purpose, with its exit code and status."""
    tree = (inspect.getdoc(errors) or "").partition("\n\n")[2].rpartition("\n\n")[0]
    rows = []
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.BertologyError):
            with contextlib.redirect_stderr(io.StringIO()):
                code = complain(kind("..."))
            rows.append([f"`{name}`", str(code), str(int(status_of(kind("...")))), _text(kind)])
    return "\n\n".join(
        (
            "# Errors",
            f"{FROM_CODE} A command ends with an exit code: 0 done; 1 a result differs from its reference; 2 the input "
            "cannot be used; 70 a fault of the program; 130 interrupted. A server answers a status, and "
            '`{"error": MESSAGE}`. From Python all are in `bertology_serve.errors`.',
            f"```text\n{tree}\n```",
            table(("error", "exit code", "HTTP", "is"), rows),
        )
    )


PAGES = {"cli": cli, "python": python, "http": http, "metrics": metrics, "errors": errors_page}


def write(folder: Path) -> None:
    """Writes all pages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (folder / f"{name}.md").write_text(make() + "\n", encoding="utf-8")
    (folder / "openapi.json").write_text(json.dumps(document(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
