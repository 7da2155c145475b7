"""The public API on a small random encoder: every public function, every form that data may have."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bertology_serve as bs
from bertology_serve.errors import BaseMismatch, DataError, FormatError, NotFound, SpecError, Unsupported
from bertology_serve.training.trainer import NoCallback
from tests import tiny
from tests.training import sets

ROWS = sets.classification()
QUICK = {"epochs": 2, "max_length": 32, "batch_size": 8}


@pytest.fixture
def bert(tmp_path_factory: pytest.TempPathFactory) -> bs.Encoder:
    """A small random BERT."""
    return bs.Encoder.load(tiny.save("bert", tmp_path_factory.mktemp("bert")))


def frame(rows: list[dict[str, Any]]) -> Any:
    """A pandas DataFrame, or where pandas is not installed something that answers alike."""
    if importlib.util.find_spec("pandas") is not None:
        return importlib.import_module("pandas").DataFrame(rows)

    class Frame:
        columns = tuple(rows[0])

        def to_dict(self, orient: str) -> list[dict[str, Any]]:
            assert orient == "records"
            return rows

    return Frame()


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys, bertology_serve as bs; dir(bs); assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_is_there():
    for name in bs.__all__:
        assert getattr(bs, name) is not None
        assert name in dir(bs)
    with pytest.raises(AttributeError, match="no attribute 'Decoder'"):
        _ = bs.Decoder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bs.Probe(x=1), "Probe has no field 'x'; it has none"),
        (lambda: bs.Full(1), "Full: takes 1 positional argument but 2 were given"),
        (lambda: bs.TopK(layer=1), "TopK has no field 'layer'; did you mean 'layers'"),
        (lambda: bs.Mixout(q=1), "Mixout has no field 'q'; known: p"),
        (lambda: bs.ChildTuning(shar=1), "did you mean 'share'"),
        (lambda: bs.Lora(rnk=2), "Lora has no field 'rnk'; did you mean 'rank'"),
        (lambda: bs.Lora(targets="query"), "targets is 'query'; expected names in a list"),
        (lambda: bs.Bitfit(bias="all"), "did you mean 'biases'"),
        (lambda: bs.Adapter(widht=3), "did you mean 'width'"),
        (lambda: bs.Adapter(drop_lowest="x"), "Adapter: '<' not supported"),
        (lambda: bs.Prompt(lenght=3), "did you mean 'length'"),
        (lambda: bs.Prefix(lenght=3), "did you mean 'length'"),
        (lambda: bs.Ia3(target=()), "did you mean 'targets'"),
        (lambda: bs.Norms(bias=True), "did you mean 'biases'"),
        (lambda: bs.Vera(rang=1), "did you mean 'rank'"),
        (lambda: bs.TaskSpec("classification", lables=("a",)), "did you mean 'labels'"),
        (lambda: bs.Pipeline(5), "a pipeline runs on an encoder, not on 5"),
        (lambda: bs.train("minilm", []), "a delta is trained on an encoder, not on 'minilm'"),
    ],
)
def test_what_is_filled_in_wrongly_is_a_spec_error(make: Any, message: str):
    with pytest.raises(SpecError, match=message):
        make()


def test_what_is_asked_wrongly_is_a_spec_error(bert: bs.Encoder):
    pipeline = bs.Pipeline(bert)
    for asked in (5, [5], None, b"x"):
        with pytest.raises(SpecError, match="expected a"):
            pipeline(asked)  # type: ignore[call-overload]
    with pytest.raises(SpecError, match="a request was made of 5 and"):
        pipeline("a", delta=5)  # type: ignore[call-overload]
    with pytest.raises(SpecError, match=r"expected a delta, got 'mine'; load_delta\(path\) reads one"):
        pipeline.add("mine")  # type: ignore[arg-type]
    for call in (bs.load_delta, lambda given: bs.evaluate(given, [])):
        with pytest.raises(SpecError, match="a delta is read from its directory, not from 5"):
            call(5)


def test_a_delta_of_the_upper_layers(bert: bs.Encoder):
    delta = bs.train(bert, ROWS, method=bs.Bitfit(layers=(1, 2)), **QUICK)
    assert delta.specs == (bs.Bitfit(layers=(1, 2)),)
    assert not any("embedding" in name for name in delta.tensors)
    both = bs.train(bert, ROWS, method=[bs.Ia3(), "norms"], layers="top:1", **QUICK)
    assert [spec.layers for spec in both.specs] == [(2,), (2,)]


def test_the_common_job_from_end_to_end(bert: bs.Encoder, tmp_path: Path):
    delta = bs.train(bert, ROWS, eval=ROWS, method=bs.Lora(rank=2), start="random", out=tmp_path / "mood", **QUICK)
    assert (delta.name, delta.kinds, delta.specs[0].rank) == ("mood", ("lora",), 2)
    loaded = bs.load_delta(str(tmp_path / "mood"))
    assert loaded.version == delta.version
    pipeline = bs.Pipeline(bert, [loaded])
    one = pipeline("the film was good", delta="mood")
    assert one.answer["label"] in ("up", "down")
    first, _ = pipeline(["the film was good", {"text": "the river was bad"}], delta="mood")
    with pytest.raises(SpecError, match="a int; expected a text, a record, or a list of them"):
        pipeline(5)  # type: ignore[call-overload]
    assert first.answer["scores"] == pytest.approx(one.answer["scores"], abs=1e-6)
    assert isinstance(pipeline.answer([bs.Request("mood", {"text": "the film was good"})]), list)
    found = bs.evaluate(tmp_path / "mood", ROWS, bert)
    assert found.metrics["accuracy"] == pytest.approx(delta.metrics["accuracy"])
    assert len(found.answers) == len(ROWS)
    exported = bs.export(loaded, tmp_path / "onnx", bert, merge=True)
    assert (exported.directory / "onnx" / "model.onnx").exists()


def test_data_may_be_a_file_a_list_a_frame_or_a_data_set(bert: bs.Encoder, tmp_path: Path):
    path = sets.write(tmp_path / "rows.jsonl", ROWS)
    forms = [path, Path(path), ROWS, iter(ROWS)]
    forms.append(frame(ROWS))
    made = [bs.train(bert, data, method="probe", **QUICK) for data in forms]
    assert len({delta.provenance["train"]["sha256"] for delta in made}) == 1
    assert all(delta.provenance["train"]["rows"] == len(ROWS) for delta in made)


class NAType:
    """As ``pandas.NA`` is: a comparison has no truth."""

    def __eq__(self, other: object) -> Any:
        return self

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize("missing", [float("nan"), None, NAType()], ids=["NaN", "None", "NA"])
def test_missing_cells_of_a_frame_are_no_text(bert: bs.Encoder, missing: Any):
    rows = [{"text": "good", "label": "up"}, {"text": missing, "label": "down"}]
    with pytest.raises(DataError, match="row 2: field 'text' is missing"):
        bs.train(bert, frame(rows), **QUICK)


def test_several_kinds_and_the_regularised_forms_are_methods(bert: bs.Encoder):
    both = bs.train(bert, ROWS, method=[bs.Lora(rank=2), "bitfit"], start="random", **QUICK)
    assert both.kinds == ("lora", "bitfit")
    before = bert.ref.sha256
    full = bs.train(bert, ROWS, method="full", **QUICK)
    assert full.kinds == ("full",)
    assert bert.fresh().ref.sha256 == before


def test_a_head_alone_and_all_weights_are_specs_too(bert: bs.Encoder):
    probe, named = (bs.train(bert, ROWS, method=method, **QUICK) for method in (bs.Probe(), "probe"))
    assert probe.kinds == ("probe",)
    assert all(torch.equal(probe.head[name], tensor) for name, tensor in named.head.items())
    assert bs.train(bert, ROWS, method=bs.Full(), **QUICK).kinds == ("full",)
    upper = bs.train(bert, ROWS, method=bs.TopK(layers=1), **QUICK)
    moved = {name for name, tensor in bert.model.state_dict().items() if not torch.equal(tensor, upper.weights[name])}
    assert moved
    assert all(".layer.2." in name for name in moved), "the highest of three"


@pytest.mark.parametrize("method", [bs.Lora(rank=2), bs.Full()], ids=["lora", "full"])
def test_a_delta_saves_itself(bert: bs.Encoder, tmp_path: Path, method: Any):
    trained = bs.train(bert, ROWS, method=method, start="random", out=tmp_path / "mood", **QUICK)
    files = {path.name: path.read_bytes() for path in (tmp_path / "mood").iterdir() if path.suffix != ".jsonl"}
    encoders = [None, bert] if isinstance(method, bs.Lora) else [None]
    for number, delta in enumerate([trained, *(bs.load_delta(tmp_path / "mood", own) for own in encoders)]):
        copy = delta.save(tmp_path / f"copy{number}")
        again = {path.name: path.read_bytes() for path in copy.iterdir()}
        assert again == {name: data for name, data in files.items() if name in again}
        assert {"delta.json", "adapter_model.safetensors"} <= again.keys()
        assert ("adapter_config.json" in again) == (method == bs.Lora(rank=2))
    assert bs.load_delta(tmp_path / "copy1").version == trained.version


def test_what_a_delta_cannot_save(bert: bs.Encoder, tmp_path: Path):
    delta = bs.train(bert, ROWS, method="probe", **QUICK)
    with pytest.raises(SpecError, match=r"give it: delta.save\(path, encoder\)"):
        replace(delta, made_for=None).save(tmp_path / "a")
    replace(delta, made_for=None).save(tmp_path / "a", bert)
    with pytest.raises(FormatError, match="holds another delta already"):
        replace(delta, name="b").save(tmp_path / "a")
    replace(delta, name="b").save(tmp_path / "a", overwrite=True)
    assert bs.load_delta(tmp_path / "a").name == "b"
    with pytest.raises(BaseMismatch):
        delta.save(tmp_path / "c", tiny.encoder("bert", tmp_path / "other", seed=1))


def test_what_is_wrong_is_said(bert: bs.Encoder, tmp_path: Path):
    with pytest.raises(SpecError, match="training has no field 'epoch'; did you mean 'epochs'"):
        bs.train(bert, ROWS, epoch=3)
    with pytest.raises(DataError, match="record 1 is a str; expected a mapping"):
        bs.train(bert, ["the film was good"])
    with pytest.raises(NotFound):
        bs.load_delta(tmp_path / "nothing")


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError])
def test_the_encoder_has_no_dropout_after_a_run_that_was_broken_off(problem: type[BaseException], bert: bs.Encoder):
    class Stop(NoCallback):
        def stepped(self, line: object) -> None:
            raise problem

    rows = [{"text": "a good film", "label": "up"}, {"text": "a bad film", "label": "down"}]
    with pytest.raises(problem):
        bs.train(bert, rows, trunk_dropout=True, callbacks=[Stop()])
    assert not any(module.training for module in bert.model.modules())


def test_an_encoder_that_was_tuned_is_not_loaded_again_as_it_was(bert: bs.Encoder):
    rows = [{"text": "a good film", "label": "up"}, {"text": "a bad film", "label": "down"}]
    full = bs.train(bert, rows, method="full", max_steps=1)
    tuned = bs.Encoder.for_delta(full, bert.name)
    with pytest.raises(Unsupported, match="holds other weights than this encoder"):
        bs.train(tuned, rows, method="full", max_steps=1)
