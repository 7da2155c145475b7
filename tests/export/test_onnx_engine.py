"""The ONNX engine behind the pipeline: the answers of the torch engine, from the same bank."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import prune
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import FormatError, NotFound, SpecError, Unsupported
from bertology_serve.export import exporting, onnx_engine
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.onnx_engine import OnnxEngine, OnnxModel, buckets, exports
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import POOLED_KINDS, TaskSpec
from tests import tiny
from tests.encoder.test_mixed import DELTAS, FACTORS, logits, pipeline, record, requests
from tests.encoder.test_sharing import TEXTS, ZOO, zoo
from tests.export.cases import small


@pytest.mark.parametrize("price", [0, 60])
def test_the_same_answers_as_torch(price, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_engine.buckets, "__defaults__", (price,))  # 0: every length by itself
    made = pipeline(tiny.encoder("bert", tmp_path))
    jobs = [made.prepare(request) for request in requests()]
    expected = made.run(jobs)
    made.engine = OnnxEngine(made.encoder)
    found = made.run(jobs)
    for one, other in zip(found, expected, strict=True):
        assert (logits(one.as_dict()) - logits(other.as_dict())).abs().max() <= 1e-5
        assert {key: one.answer.get(key) for key in ("label", "choice")} == {
            key: other.answer.get(key) for key in ("label", "choice")
        }


def test_deltas_come_and_go_under_one_session(tmp_path):
    made = Pipeline(tiny.encoder("bert", tmp_path))
    made.engine = engine = OnnxEngine(made.encoder)

    def differences() -> list[float]:
        jobs = [made.prepare(request) for request in requests() if request.delta in made.deltas]
        made.engine = engine
        found = made.run(jobs)
        made.engine = made.encoder
        pairs = zip(found, made.run(jobs), strict=True)
        return [(logits(a.as_dict()) - logits(b.as_dict())).abs().max().item() for a, b in pairs]

    session = engine._session
    for seed, (name, (specs, task)) in enumerate(DELTAS.items()):
        if name != "base":
            made.add(tiny.delta(made.encoder, name, specs, task, seed))
    assert max(differences()) <= 1e-5
    for number in range(20):  # the pools grow
        made.add(tiny.delta(made.encoder, f"more-{number}", *DELTAS["all"], seed=number))
    made.remove("lora-4")
    made.add(tiny.delta(made.encoder, "all", *DELTAS["all"], seed=77))
    assert len(differences()) == 3 * (len(DELTAS) - 1)
    assert max(differences()) <= 1e-5
    assert engine._session is session


def test_what_it_cannot_run_is_said(tmp_path, monkeypatch):
    encoder = tiny.encoder("deberta-v3", tmp_path / "deberta")
    with pytest.raises(Unsupported, match=r"the relative positions of deberta-v2 go .*; take --engine torch"):
        OnnxEngine(encoder)
    encoder = tiny.encoder("bert", tmp_path / "bert")
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "packs", False)
        with pytest.raises(Unsupported, match="bert is padded; take --engine torch"):
            OnnxEngine(encoder)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[cpu\]'"):
            OnnxEngine(encoder)
    encoder.model.to(torch.bfloat16)
    with pytest.raises(Unsupported, match=r"this one is torch.bfloat16 on cpu; take --engine torch"):
        OnnxEngine(encoder)


def test_packaged_minilm(minilm_path):
    made = pipeline_of_minilm()
    jobs = [made.prepare(request) for request in requests()]
    expected = made.run(jobs)
    made.engine = OnnxEngine(made.encoder)
    assert made.engine.name.endswith(", fp32")
    found = made.run(jobs)
    pairs = [(logits(one.as_dict()), logits(other.as_dict())) for one, other in zip(found, expected, strict=True)]
    assert max((a - b).abs().max().item() for a, b in pairs) <= 1e-5
    one = made.run([made.prepare(Request("lora-4", requests()[1].record, logits=True))])[0]
    alone = logits(one.as_dict())
    assert (alone - logits(found[1].as_dict())).abs().max() <= 1e-5


def test_batches_that_the_graph_has_no_place_for_are_run_by_torch(tmp_path, monkeypatch):
    made = pipeline(tiny.encoder("bert", tmp_path))
    task = FACTORS["ia3"][1]
    for seed, name in enumerate(("query", "up")):
        made.add(tiny.delta(made.encoder, name, [Ia3(("value",), (name,))], task, seed))
    asked = [Request(name, record(task, 0), logits=True) for name in ("query", "up")]
    jobs = [made.prepare(request) for request in (*requests()[:15], *asked)]
    expected = made.run(jobs)
    made.engine = engine = OnnxEngine(made.encoder)
    for found in (made.run(jobs), [*made.run(jobs[:15]), *made.run(jobs[15:])]):
        pairs = zip(found, expected, strict=True)
        assert max((logits(a.as_dict()) - logits(b.as_dict())).abs().max().item() for a, b in pairs) <= 1e-5
    assert [engine.takes(job.ready.entry) for job in jobs] == [True] * 15 + [False] * 2
    monkeypatch.setattr(made.encoder, "run", None)  # what the graph takes does not touch it
    made.run(jobs[:15])


def test_factors_are_in_the_graph(tmp_path, monkeypatch):
    made = pipeline(tiny.encoder("bert", tmp_path))
    for seed, (name, (specs, task)) in enumerate(FACTORS.items()):
        made.add(tiny.delta(made.encoder, name, specs, task, seed))
    asked = [Request(name, record(task, i), logits=True) for i in range(2) for name, (_, task) in FACTORS.items()]
    jobs = [made.prepare(request) for request in (*requests()[:15], *asked)]
    expected = made.run(jobs)
    made.engine = OnnxEngine(made.encoder)
    monkeypatch.setattr(made.encoder, "run", None)
    pairs = zip(made.run(jobs), expected, strict=True)
    assert max((logits(a.as_dict()) - logits(b.as_dict())).abs().max().item() for a, b in pairs) <= 1e-5


def test_a_pruned_encoder(tmp_path, monkeypatch):
    whole = small("bert", tmp_path / "whole", monkeypatch)
    prune(whole, ((0, 2, 3), (1,)), ((1, 5), tuple(range(0, 48, 3))), tmp_path / "pruned")
    made = pipeline_of(Encoder.load(str(tmp_path / "pruned")), whole)
    jobs = [made.prepare(request) for request in requests() if request.delta in made.deltas]
    expected = made.run(jobs)
    made.engine = OnnxEngine(made.encoder)
    pairs = zip(made.run(jobs), expected, strict=True)
    assert max((logits(a.as_dict()) - logits(b.as_dict())).abs().max().item() for a, b in pairs) <= 1e-5


def pipeline_of(encoder: Encoder, whole: Encoder) -> Pipeline:
    """The parent's deltas on a pruned encoder."""
    made = Pipeline(encoder)
    for seed, (name, (specs, task)) in enumerate(DELTAS.items()):
        if name not in ("base", "bitfit-upper", "ia3-upper"):  # the parent has two layers
            made.add(tiny.delta(whole, name, specs, task, seed))
    return made


def pipeline_of_minilm() -> Pipeline:
    return pipeline(Encoder.load("minilm"))


def cost(groups, lengths, price):
    return sum(len(group) * max(lengths[i] for i in group) ** 2 + price for group in groups)


def cheapest(lengths, price):
    """The cost of the best cut of the sorted lengths, all tried."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found = []
    for count in range(len(order)):
        for cuts in combinations(range(1, len(order)), count):
            edges = [0, *cuts, len(order)]
            groups = [order[a:b] for a, b in pairwise(edges)]
            found.append(cost(groups, lengths, price))
    return min(found)


@pytest.mark.parametrize("seed", range(8))
def test_no_cut_is_cheaper(seed):
    draw = np.random.default_rng(seed)
    lengths, price = draw.integers(1, 40, 9).tolist(), int(draw.integers(1, 800))
    groups = buckets(lengths, 1, price)
    assert sorted(i for group in groups for i in group) == list(range(9))
    assert all(group == sorted(group) for group in groups)
    assert cost(groups, lengths, price) == cheapest(lengths, price)


def test_like_lengths_and_few_sequences_stay_together():
    assert buckets([24] * 64, 384) == [list(range(64))]
    assert buckets([3, 100], 384) == [[0, 1]]
    assert buckets([10, 128] * 32, 384) == [list(range(0, 64, 2)), list(range(1, 64, 2))]


NAMES = {
    "lora-1": "hf", "pfeiffer": "flat", "prefix": "hf", "prefix-shifted": "hf", "flags": "hf", "bitfit-qkv": "flat"
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Encoder, Path]:
    """An encoder, and exports of deltas of six tasks."""
    root = tmp_path_factory.mktemp("served")
    encoder = tiny.encoder("roberta", root / "encoder")
    with pytest.MonkeyPatch.context() as patched:
        real = exporting.built_in
        patched.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::9])
        for name, layout in NAMES.items():
            spec = ExportSpec(merge=True, bake=True, layout=layout)
            export_delta(encoder, tiny.delta(encoder, name, *DELTAS[name]), root / "exports" / name, spec)
    return encoder, root / "exports"


def asked(pipeline: Pipeline, names) -> list:
    return [
        pipeline.prepare(Request(name, record(DELTAS[name][1], i), logits=True)) for i in range(3) for name in names
    ]


def test_the_answers_of_the_deltas_that_were_exported(pair, tmp_path):
    encoder, root = pair
    own = Pipeline(encoder)
    for name in NAMES:
        own.add(tiny.delta(encoder, name, *DELTAS[name]))
    expected = own.run(asked(own, NAMES))
    other = Pipeline(tiny.encoder("bert", tmp_path))  # the exports bring their own encoder and tokenizer
    other.add(tiny.delta(other.encoder, "houlsby", *DELTAS["houlsby"]))
    for path in exports(root):
        model = OnnxModel.open(path)
        other.add_model(model.delta, model)
    found = other.run(asked(other, [*NAMES, "houlsby"]))
    alone = other.run(asked(other, ["houlsby"]))
    mine = [answer for answer in found if answer.delta != "houlsby"]
    for one, two in zip([*mine, *alone], [*expected, *(a for a in found if a.delta == "houlsby")], strict=True):
        assert (one.delta, one.version, one.task) == (two.delta, two.version, two.task)
        assert one.answer.keys() == two.answer.keys()
        if one.task == "embedding":  # of unit length already as it leaves the graph
            assert one.answer["embedding"] == pytest.approx(two.answer["embedding"], abs=1e-5)
        else:
            assert (logits(one.as_dict()) - logits(two.as_dict())).abs().max() <= 1e-5
    with pytest.raises(SpecError, match="'prefix-shifted' answers already; export the model under another --name"):
        other.add_model(model.delta, model)


@pytest.mark.parametrize("kind", ["classification", "token-classification", "embedding", "zero-shot"])
def test_an_export_reads_long_texts_in_windows_too(kind, tmp_path, monkeypatch):
    """The graph knows nothing of it: the export says how, and windows are put together outside."""
    labels, form = ("O", "B-LOC"), {"head": "none", "pooling": "mean"} if kind in POOLED_KINDS else {}
    if kind == "zero-shot":
        form |= {"label_texts": ("a dog", "Paris"), "template": "in {}", "scale": 8.0, "bias": -3.5}
    task = TaskSpec(kind, () if kind == "embedding" else labels, max_length=14, stride=4, long="windows", **form)
    encoder = tiny.encoder("bert", tmp_path / "encoder")
    delta = tiny.delta(encoder, "it", [Lora(rank=2)], task)
    real = exporting.built_in
    monkeypatch.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::9])
    export_delta(encoder, delta, tmp_path / "it", ExportSpec(merge=True, bake=True))
    own, other = Pipeline(encoder, [delta]), Pipeline(encoder)
    model = OnnxModel.open(tmp_path / "it")
    other.add_model(model.delta, model)
    assert model.delta.task == task
    text = "the cat was good . Ada met the dog in London . the cat was in the house on the river bank"
    (expected,), (found,) = (made.answer([Request("it", {"text": text}, logits=True)]) for made in (own, other))
    assert found.windows == expected.windows == 3
    if kind == "embedding":
        assert found.answer["embedding"] == pytest.approx(expected.answer["embedding"], abs=1e-6)
    else:
        assert (logits(found.as_dict()) - logits(expected.as_dict())).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json cannot be read"),
        (lambda path: (path / "config.json").write_text("{}"), "was not exported by bertology-serve"),
        (lambda path: spoiled(path, task="many"), "no export of a single delta"),
        (lambda path: spoiled(path, labels="["), "no export of a single delta"),
        (lambda path: spoiled(path, task_options="{}"), "no export of a single delta"),
        (lambda path: spoiled(path, max_length="2"), "at least 3 tokens are needed"),
    ],
)
def test_what_is_no_export(spoil, message, pair, tmp_path):
    shutil.copytree(pair[1] / "lora-1", tmp_path / "export")
    spoil(tmp_path / "export")
    with pytest.raises(FormatError, match=message):
        OnnxModel.open(tmp_path / "export")
    with pytest.raises(NotFound, match="no export in"):
        exports(tmp_path / "none")


def spoiled(path: Path, **facts: str) -> None:
    config = json.loads((path / "config.json").read_text())
    config["bertology_serve"] |= facts
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["lora-1", "pfeiffer"])
def test_an_export_is_one_whatever_its_layout(name, pair):
    """The file of the layout hf lies in a directory of its own, which is no second export."""
    assert exports(pair[1] / name) == [pair[1] / name]
    assert exports(pair[1]) == [pair[1] / name for name in sorted(NAMES)]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert", "mpnet"])
@pytest.mark.parametrize("price", [0, 60])
def test_forked_batches_agree_with_torch_before_and_after_their_graphs_are_there(family, price, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_engine.buckets, "__defaults__", (price,))
    encoder = tiny.encoder(family, tmp_path)
    made = Pipeline(encoder, zoo(encoder, tuple(name for name, (_, _, lowest) in ZOO.items() if lowest != 1)))
    jobs = [made.prepare(Request(name, {"text": text})) for text in TEXTS for name in made.deltas]

    def outputs() -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([out.flatten() for out in made._forward(jobs)])

    expected, made.engine = outputs(), OnnxEngine(encoder)
    made.engine._ask_fork = lambda layer: None
    torch.testing.assert_close(outputs(), expected, atol=1e-5, rtol=1e-5)
    made.engine.prepare_fork(2)
    _, upper = made.engine._forks[2]
    torch.testing.assert_close(outputs(), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(upper, "run", None)
    with pytest.raises(TypeError):  # they are what runs
        outputs()


def test_the_graphs_of_a_fork_are_made_beside_and_of_few_layers(tmp_path, monkeypatch):
    encoder = tiny.encoder("bert", tmp_path)
    made = Pipeline(encoder, zoo(encoder, ("probe", "top")))
    made.engine = engine = OnnxEngine(encoder)
    made.ask_many(("probe", "top"), TEXTS[0])
    for thread in threading.enumerate():
        if thread.name == "onnx-graphs":
            assert not thread.daemon, "Python would end in the middle of its C++, which aborts the process"
            thread.join(60)
    assert list(engine._forks) == [2]
    engine._asked |= {0}
    engine._ask_fork(1)
    assert engine._asked == {0, 2}
    monkeypatch.setattr(engine, "_made", lambda *_: 1 / 0)
    engine._asked -= {0}
    engine._ask_fork(1)
    for thread in threading.enumerate():
        if thread.name == "onnx-graphs":
            thread.join(60)
    assert made.ask_many(("probe", "top"), TEXTS[0])["top"].task == "classification"


def test_the_kinds_that_come_most_have_graphs_that_know_them(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_engine, "OFTEN", 3)
    made = pipeline(tiny.encoder("bert", tmp_path))
    asked = {
        name: made.prepare(Request(name, record(DELTAS[name][1], 0), logits=True))
        for name in ("lora-4", "prefix", "houlsby")
    }
    expected = {name: logits(made.run([job])[0].as_dict()) for name, job in asked.items()}
    made.engine = engine = OnnxEngine(made.encoder)
    kinds = {name: engine._feed.kind([job.ready.entry]) for name, job in asked.items()}

    def come(name: str, times: int) -> None:
        for _ in range(times):
            found = logits(made.run([asked[name]])[0].as_dict())
            assert (found - expected[name]).abs().max() <= 1e-5
            for thread in threading.enumerate():
                if thread.name == "onnx-graphs":
                    thread.join(60)

    come("lora-4", 2)
    assert not engine._kinds
    come("lora-4", 1)
    come("prefix", 3)
    assert [*engine._kinds] == [kinds["lora-4"], kinds["prefix"]]
    with monkeypatch.context() as patched:  # they are what runs
        patched.setattr(engine._session, "run", None)
        come("lora-4", 4)
        come("prefix", 5)
    come("houlsby", 8)  # as often as twice the one that came least, but no more
    assert kinds["houlsby"] not in engine._kinds
    come("houlsby", 1)  # more, but the last graph is not a minute old
    assert kinds["houlsby"] not in engine._kinds
    monkeypatch.setattr(onnx_engine, "PAUSE", 0.0)
    come("houlsby", 1)
    assert {*engine._kinds} == {kinds["prefix"], kinds["houlsby"]}
    come("lora-4", 2)
    engine.prepare_for([asked[name].ready.entry for name in ("prefix", "lora-4", "lora-4")])
    assert kinds["lora-4"] in engine._kinds
    engine.prepare_for([asked["houlsby"].ready.entry], wait=False)
    come("lora-4", 1)
    assert kinds["houlsby"] in engine._kinds
