from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bertology_serve.cli.options import listed, options
from bertology_serve.config_fields import join_list
from bertology_serve.errors import SpecError


@dataclass(frozen=True)
class Config:
    port: int = field(default=8000, metadata={"help": "Where to listen."})
    learning_rate: float = field(default=1e-3, metadata={"flag": "--lr"})
    warm: bool = True
    layers: tuple[int, ...] = (0, 1)
    names: tuple[str, ...] | None = None
    mode: Literal["fast", "exact"] = "fast"
    home: Path | None = None
    tags: tuple[str, ...] = field(default_factory=lambda: ("a",))
    hidden: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class More:
    depth: int = 3


def run(*arguments: str, spec: type = Config, skip: tuple[str, ...] = ("hidden",)) -> Any:
    seen = []

    @options(spec, skip=skip, helps={"warm": "Start at once."})
    def serve(model: Annotated[str, typer.Option(help="Which one.")] = "minilm", *, config: Any) -> None:
        """Serve."""
        seen.append((model, config))

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(serve)
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return seen[0] if seen else result


def test_defaults_are_those_of_the_dataclass():
    assert run() == ("minilm", Config())


def test_options_reach_the_dataclass():
    arguments = "--model m --port 1 --lr 0.5 --no-warm --layers 3,4 --names q,v --mode exact --home x --tags c"
    assert run(*arguments.split()) == (
        "m",
        Config(1, 0.5, False, (3, 4), ("q", "v"), "exact", Path("x"), ("c",)),
    )


def test_help_shows_type_default_and_text():
    text = run("--help").output
    for line in ("--port <int>", "Where to listen.", "[default: 8000]", "[default: 0,1]", "Start at once.", "--lr"):
        assert line in text
    assert "--hidden" not in text
    assert "--config" not in text


def test_field_without_default_is_required():
    @dataclass(frozen=True)
    class Needs:
        size: int

    result = run(spec=Needs, skip=())
    assert result.exit_code == 2
    assert "--size" in result.output


def test_flag_that_may_be_left_open():
    @dataclass(frozen=True)
    class Open:
        scaled: bool | None = None

    chosen = [run(*arguments, spec=Open, skip=())[1].scaled for arguments in ([], ["--scaled"], ["--no-scaled"])]
    assert chosen == [None, True, False]


def test_two_specs_of_one_command():
    seen = []

    @options(More, into="more")
    @options(Config, skip=["hidden"])
    def both(model: str, config: Config, more: More) -> None:
        seen.append((model, config, more))

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(both)
    assert CliRunner().invoke(app, ["m", "--port", "1", "--depth", "2"]).exit_code == 0
    assert seen == [("m", Config(port=1), More(2))]


def test_wrong_number_in_a_list_is_a_spec_error():
    with pytest.raises(SpecError, match="layers is '1,x'; expected ints with commas"):
        run("--layers", "1,x")


HINTS = [dict[str, Any], dict[str, Any] | None, list[int], int | str, int | str | None, bytes]


@pytest.mark.parametrize("hint", HINTS, ids=str)
def test_type_without_an_option_is_refused_where_it_is_declared(hint):
    spec = make_dataclass("Spec", [("port", int, 1), ("odd", hint, None)])
    declare = options(spec)
    with pytest.raises(TypeError) as caught:
        declare(lambda config: None)
    assert str(caught.value) == f"Spec.odd: a field of type {hint} has no command-line option; skip it"
    options(spec, skip=["odd"])(lambda config: None)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("query, value", ("query", "value")),
        ("a,,", ("a",)),
        ("", ()),
        (None, None),
        ('"Rome, GA", Paris', ("Rome, GA", "Paris")),
        ('5" disk,a"b', ('5" disk', 'a"b')),
    ],
)
def test_listed(text, names):
    assert listed(text) == names


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1).map(str.strip).filter(bool))
)
def test_a_list_comes_back_from_its_text(values):
    assert listed(join_list(values)) == tuple(values)


def test_a_list_with_half_a_quote_is_a_spec_error():
    with pytest.raises(SpecError, match=r"is no list .*; expected values with commas, quoted where they hold one"):
        listed('"a,b')
