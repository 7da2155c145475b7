"""Many deltas as one directory: every family, every kind and task, and deltas that join later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import prune
from bertology_serve.errors import BaseMismatch, FormatError, SpecError, Unsupported, VerificationError
from bertology_serve.export import delta_library, exporting
from bertology_serve.export.delta_library import Library, library_of
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_many, join
from bertology_serve.kinds.ia3 import Ia3
from tests import tiny
from tests.export.cases import small
from tests.export.emitter.mixed import EVERY, FAMILIES


def made(encoder: Encoder, *names: str) -> list[Delta]:
    return [
        tiny.delta(encoder, name, *EVERY[name], seed=seed)
        for seed, name in enumerate(EVERY)
        if name in (names or EVERY)
    ]


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """Half of the built-in shapes: the graph is the same for all."""
    monkeypatch.setattr(
        exporting,
        "built_in",
        lambda tokenizer, longest, real=exporting.built_in: list(real(tokenizer, longest))[::2],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_and_task_in_one_graph(family, tmp_path, monkeypatch):
    encoder = small(family, tmp_path / "encoder", monkeypatch)
    done = export_many(encoder, made(encoder), tmp_path / "out")
    assert done.report.passed
    assert done.report.largest <= 1e-5
    assert done.report.sequences >= 2 * len(EVERY)
    assert [card.name for card in Library.load(tmp_path / "out" / delta_library.FILE).cards] == ["base", *EVERY]


def test_a_pruned_encoder(tmp_path, monkeypatch):
    whole = small("roberta", tmp_path / "whole", monkeypatch)
    prune(whole, ((0, 2, 3), (1,)), ((1, 5), tuple(range(0, 48, 3))), tmp_path / "pruned")
    pruned = Encoder.load(str(tmp_path / "pruned"))
    assert export_many(pruned, made(whole, "folds", "houlsby", "prefix"), tmp_path / "out").report.largest <= 1e-5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Encoder:
    return tiny.encoder("bert", tmp_path_factory.mktemp("bert"))


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def test_new_deltas_join_and_the_graph_stays_the_same_file(encoder, tmp_path):
    export_many(encoder, made(encoder, "folds", "prompt"), tmp_path / "out", name="mine")
    before = files(tmp_path / "out")
    done = join(encoder, made(encoder, "everything", "lora", "probe"), tmp_path / "out")
    after = files(tmp_path / "out")
    assert done.report.passed
    assert after["onnx/model.onnx"] == before["onnx/model.onnx"]
    assert after["tokenizer.json"] == before["tokenizer.json"]
    cards = Library.load(tmp_path / "out" / delta_library.FILE).cards
    assert [card.name for card in cards] == ["base", "folds", "prompt", "lora", "everything", "probe"]
    assert "| 4 | everything | 1 | classification | logits[..., :3] | bad, good, none |" in after["README.md"].decode()
    with pytest.raises(SpecError, match="delta 'lora' is there already"):
        join(encoder, made(encoder, "lora"), tmp_path / "out")
    assert files(tmp_path / "out") == after


def test_joined_one_by_one_is_all_at_once(encoder):
    deltas = made(encoder)
    whole = library_of(encoder, deltas)
    half = library_of(encoder, deltas[:7]).join(library_of(encoder, deltas[7:]).without_base())
    assert half.cards == whole.cards
    for name, array in whole.arrays.items():
        assert np.array_equal(half.arrays[name], array), name


def test_the_same_bytes_twice_no_path_of_the_machine_and_lines_that_run(encoder, tmp_path, capsys):
    for place in ("one", "other"):
        done = export_many(encoder, made(encoder, "folds", "pfeiffer"), tmp_path / place, name="same")
    assert files(tmp_path / "one") == files(tmp_path / "other")
    for name, content in files(tmp_path / "one").items():
        assert str(tmp_path).encode() not in content, name
        assert encoder.name.encode() not in content, name
    exec(done.example, {})
    assert capsys.readouterr().out.startswith("[[[")  # pfeiffer answers for every token
    model = onnx.load(tmp_path / "one/onnx/model.onnx")
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert facts["base_sha256"] == encoder.ref.sha256
    assert facts["task"] == "many"
    assert "folds" not in json.dumps(facts)
    assert [output.name for output in model.graph.output] == ["logits", "token_logits", "embedding"]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"merge": True}, "--merge"),
        ({"back_end": "torch"}, "--back-end torch"),
        ({"layout": "triton"}, "--layout triton"),
        ({"unpad": False}, "--no-unpad"),
        ({"target": "portable"}, "--target portable"),
        ({"precision": "fp16"}, "--precision fp16"),
    ],
)
def test_options_that_do_not_fit(options, flag, encoder, tmp_path):
    with pytest.raises(SpecError, match=f"{flag} does not go with --multi"):
        export_many(encoder, made(encoder, "folds"), tmp_path / "out", ExportSpec(**options))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_or_joined(encoder, tmp_path, monkeypatch):
    deberta = tiny.encoder("deberta-v3", tmp_path / "deberta")
    with pytest.raises(Unsupported, match=r"the relative positions of deberta-v2 go .*; export each delta by itself"):
        export_many(deberta, made(deberta, "folds"), tmp_path / "out")
    whole = replace(made(encoder, "probe")[0], weights=encoder.model.state_dict())
    with pytest.raises(Unsupported, match="whole checkpoint"):
        library_of(encoder, [whole])
    factors = tiny.delta(encoder, "factors", [Ia3(("value",), ("down", "up"))], EVERY["norms"][1])
    with pytest.raises(Unsupported, match="'factors' scales the inputs of up, which the graph has for output"):
        library_of(encoder, [factors])
    with monkeypatch.context() as patched:
        real = exporting.library_of
        patched.setattr(exporting, "library_of", lambda *given: broken(real(*given)))
        with pytest.raises(VerificationError, match="nothing was published"):
            export_many(encoder, made(encoder, "folds"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError, match="no file of stacks"):
        join(encoder, made(encoder, "lora"), tmp_path / "out")
    export_many(encoder, made(encoder, "folds"), tmp_path / "out")
    other = tiny.encoder("bert", tmp_path / "other", seed=3)
    with pytest.raises(BaseMismatch, match="other weights"):
        join(other, made(other, "lora"), tmp_path / "out")
    graph = tmp_path / "out/onnx/model.onnx"
    graph.write_bytes(b"no protobuf")
    with pytest.raises(FormatError, match="no ONNX file"):
        join(encoder, made(encoder, "lora"), tmp_path / "out")


def broken(made: Library) -> Library:
    return Library(made.arrays | {"query.b": made.arrays["query.b"] + 0.1}, made.cards)


def test_8_bits(encoder, tmp_path):
    layers = encoder.anatomy.layers
    done = export_many(
        encoder, made(encoder, "lora", "prefix-shifted"), tmp_path / "out", ExportSpec(precision="int8-row")
    )
    assert 0 < done.report.drift <= done.report.max_drift
    assert done.report.neighbours_allowed == pytest.approx(done.report.max_drift * done.report.scale)
    joined = join(encoder, made(encoder, "houlsby"), tmp_path / "out")
    assert joined.report.max_drift == done.report.max_drift == ExportSpec(precision="int8-row").drift(layers)
