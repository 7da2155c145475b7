from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.errors import DataError, NotFound, SpecError
from bertology_serve.training.fleet.fleet_spec import fleet_from_dict, read_fleet
from bertology_serve.training.method_options import read_layers

FILE = """
backbone = "minilm"
max_tokens = 2048
save_every = 7

[all]
task = "classification"
train = "train.jsonl"
eval = "hub:some/set"
rank = 4
biases = "attention"
labels = ["up", "down"]

[delta.mood]
epochs = 5
columns = { text = "sentence" }

[delta.tone]
method = "bitfit"
train = "/data/other.csv"
grid.seed = [0, 1]
grid.learning_rate = [1e-3, 0.5]
"""


def read(tmp_path: Path, text: str) -> object:
    (tmp_path / "fleet.toml").write_text(text)
    return read_fleet(tmp_path / "fleet.toml")


def test_a_file_becomes_members(tmp_path):
    spec = read(tmp_path, FILE)
    assert (spec.backbone, spec.max_tokens, spec.save_every) == ("minilm", 2048, 7)
    mood, *tones = spec.members
    assert (mood.name, mood.config.optim.epochs, mood.config.options) == ("mood", 5, {"lora": {"rank": 4}})
    assert (mood.train, mood.eval, mood.ood) == (str(tmp_path / "train.jsonl"), "hub:some/set", None)
    assert mood.columns == {"text": "sentence"}
    assert mood.config.form.labels == ("up", "down")
    assert [one.name for one in tones] == ["tone-0-0.001", "tone-0-0.5", "tone-1-0.001", "tone-1-0.5"]
    assert [(one.config.optim.seed, one.config.optim.learning_rate) for one in tones[1:3]] == [(0, 0.5), (1, 1e-3)]
    assert {one.train for one in tones} == {"/data/other.csv"}
    assert tones[0].config.options == {"bitfit": {"biases": "attention"}}


def test_labels_of_a_toml_file_and_places_of_data(tmp_path):
    head = '[all]\ntask="classification"\ntrain="set:glue/mrpc:train"\neval="t"\n[delta.a]\n'
    (one,) = read(tmp_path, f"{head}labels = [0, 1.0, true]").members
    assert one.config.form.labels == ("0", "1", "true"), "as the data's own labels are read"
    assert (one.train, one.eval) == ("set:glue/mrpc:train", str(tmp_path / "t"))


def test_grid_of_lists_and_words(tmp_path):
    text = '[all]\ntask="classification"\ntrain="t"\n[delta.a]\ngrid.targets = [["query"], ["key", "value"]]'
    assert [one.name for one in read(tmp_path, text).members] == ["a-query", "a-key-value"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a = = 1", DataError, "is no TOML"),
        ("", SpecError, "the fleet has no delta"),
        ("fleet = 1", SpecError, "the fleet has no field 'fleet'"),
        ("all = 3", SpecError, "all is 3; expected a table"),
        ("max_tokens = 0\n[delta.a]\ntask='regression'\ntrain='t'", SpecError, "max_tokens is 0"),
        ("backbone = 1\n[delta.a]\ntask='regression'\ntrain='t'", SpecError, "backbone is 1; expected text"),
        ("[delta.a]\ntrain = 't'", SpecError, "delta.a: field 'task' is missing"),
        ("[delta.a]\ntask='regression'", SpecError, "delta.a: it has no train"),
        ("[delta.a]\ntask='regression'\ntrain='t'\nepocs=1", SpecError, "no field 'epocs'; did you mean 'epochs'"),
        ("[delta.a]\ntask='regression'\ntrain='t'\nepochs=0", SpecError, "delta.a: epochs is 0"),
        ("[delta.a]\ntask='regression'\ntrain='t'\nbiases='all'", SpecError, "options of 'bitfit' were given"),
        ("[delta.a]\ntask='regression'\ntrain='t'\ngrid.seed=1", SpecError, "a.grid.seed is 1; expected a list"),
        ("[delta.base]\ntask='regression'\ntrain='t'", SpecError, "delta.base: .*taken by the encoder"),
        ("[delta.a]\ntask='regression'\ntrain=1", SpecError, "delta.a: train is 1; expected text"),
        (
            "[all]\ntask='regression'\ntrain='t'\n[delta.a-1]\n[delta.a]\ngrid.seed=[1]",
            SpecError,
            "two deltas are called 'a-1'",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        read(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(NotFound, match="expected a fleet in TOML"):
        read_fleet(tmp_path / "no.toml")


def test_tables_may_come_from_python():
    spec = fleet_from_dict({"delta": {"a": {"task": "regression", "train": "t.csv"}}}, Path("/data"))
    assert spec.members[0].train == "/data/t.csv"


@pytest.mark.parametrize("given", ["1-2", [1, 2], "top:2"])
def test_layers_are_for_any_kind(given: object) -> None:
    values = {"task": "regression", "train": "t.csv", "method": "bitfit", "layers": given}
    (member,) = fleet_from_dict({"delta": {"a": values}}).members
    assert read_layers(member.config.layers, 3) == (1, 2)
