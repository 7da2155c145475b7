"""The direct back end in ONNX Runtime against the engine: every family, every kind, every form of the graph."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from transformers import CONFIG_MAPPING

from bertology_serve.errors import Unsupported
from bertology_serve.export.emitter import attention_nodes, row_nodes
from bertology_serve.export.emitter.emit import choose, emit, obstacle
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec, Precision
from bertology_serve.export.samples import Reference
from bertology_serve.export.torch_exporter import Graph
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.export.cases import ALONE, CLASSES, DELTAS, EVERYTHING, FACTORS, encodings, padded, ran, small

LENGTHS = (1, 2, 5, 17, 32)


class Run:
    """An emitted graph, checked by ONNX and loaded into ONNX Runtime."""

    def __init__(
        self,
        parts: ExportInputs,
        opset: int = 20,
        unpad: bool = True,
        precision: Precision = "fp32",
        fused: bool = False,
    ) -> None:
        self.parts = parts
        self.model = model = onnx_ir.to_proto(emit(parts, opset, unpad, precision, fused))
        own = any(node.domain for node in model.graph.node)  # ONNX's checker does not know ONNX Runtime's operators
        onnx.checker.check_model(model, full_check=opset < 23 and not own)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> np.ndarray:
        arrays = zip(self.parts.inputs, (ids, mask, types), strict=False)
        return ran(self.session, {name: array.numpy() for name, array in arrays})


def difference(run: Run, reference: Reference) -> float:
    """The largest |Δ| over both sides of padding; NaN where anything is."""
    sequences = encodings(LENGTHS, typed=len(run.parts.inputs) == 3)
    expected, found = [out.numpy() for out in reference.outputs(sequences)], []
    for left, extra in ((False, 0), (True, 3)):
        ids, mask, types = padded(sequences, left, extra)
        out = run(ids, mask, types)
        if reference.task.per_token:
            out = [row[keep] for row, keep in zip(out, mask.bool().numpy(), strict=True)]
        found += [np.abs(a - b).max() for a, b in zip(out, expected, strict=True)]
    return float(np.max(found))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_kind_equals_the_engine(family, tmp_path, monkeypatch):
    encoder = small(family, tmp_path, monkeypatch)
    for seed, (name, (specs, task)) in enumerate((DELTAS | ALONE).items()):
        delta = tiny.delta(encoder, name, specs, task, seed)
        reference = Reference(encoder, delta)
        for unpad in (False, True):
            merge, opset = (seed + unpad) % 2 == 0, (18, 20, 23)[seed % 3]
            monkeypatch.setattr(row_nodes, "SPARED", (0, 2**40)[seed // 2 % 2])  # in groups of like length, or in one
            long = (seed + unpad) // 2 % 3 == 0  # every grid in blocks of 4 rows
            monkeypatch.setattr(attention_nodes, "LONG", 0 if long else 256)
            monkeypatch.setattr(attention_nodes, "BLOCK", 4)
            run = Run(ExportInputs.of(encoder, delta, merge), opset, unpad)
            assert difference(run, reference) <= 1e-5, f"{name}, {merge=}, {opset=}, {unpad=}, {long=}"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_scales_rows_merged_and_apart(family, tmp_path, monkeypatch):
    encoder = small(family, tmp_path, monkeypatch)
    inputs = ("down",) if family == "modernbert" else ("down", "up")  # its up is a part of a packed projection
    mixed = [Ia3(("value",), inputs), Norms(), Lora(("value", "down"), rank=2)], CLASSES
    for name, (specs, task) in {"mixed": mixed, **FACTORS}.items():
        if family.startswith("deberta") and {"query", "key"} & {*getattr(specs[0], "targets", ())}:
            continue  # it projects positions with it too, and is refused
        delta = tiny.delta(encoder, name, specs, task)
        for merge in (True, False):
            run = Run(ExportInputs.of(encoder, delta, merge))
            assert difference(run, Reference(encoder, delta)) <= 1e-5, f"{name}, merge={merge}"


def test_factors_on_the_inputs_of_a_part_of_a_packed_projection_must_be_merged(tmp_path):
    encoder = tiny.encoder("modernbert", tmp_path)
    delta = tiny.delta(encoder, "x", [Ia3(("value",), ("up",))], CLASSES)
    assert obstacle(ExportInputs.of(encoder, delta, True)) is None
    apart = ExportInputs.of(encoder, delta, False)
    assert str(obstacle(apart)).startswith("the inputs of up are scaled, which are a part of a packed projection's")
    with pytest.raises(Unsupported, match="scales rows, which torch's exporter does not; give --merge"):
        Graph(apart)


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet", "deberta-v3"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_form_for_cuda_on_a_cpu(family, precision, tmp_path, monkeypatch):
    """Its operators and types, and its answers: ONNX Runtime has the fused attention for CPUs too, in float32."""
    encoder = small(family, tmp_path, monkeypatch)
    if family == "deberta-v3" and precision == "fp16":
        parts = ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["folds"]), True)
        with pytest.raises(Unsupported, match="crashes as it loads deberta-v2 in float16"):
            choose(parts, ExportSpec(target="cuda", precision="fp16"))
        return
    for seed, name in enumerate(("folds", "everything", "prefix-shifted", "prompt-tags")):
        delta = tiny.delta(encoder, name, *DELTAS[name], seed)
        run = Run(ExportInputs.of(encoder, delta, True), unpad=False, precision=precision, fused=True)
        assert difference(run, Reference(encoder, delta)) <= (1e-5 if precision == "fp32" else 5e-3), name
        operators = Counter(node.op_type for node in run.model.graph.node)
        assert operators["MultiHeadAttention"] == encoder.anatomy.layers
        assert operators["Softmax"] + operators["Sum"] + operators["NonZero"] == 0
        weights = {one.name: one.data_type for one in run.model.graph.initializer}
        half = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT
        own = [name for name in weights if not name.startswith(("constant_", "delta."))]
        assert {weights[name] for name in own if "classifier" not in name and "pooler" not in name} == {half}
        assert run.model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_have_the_names_and_shapes_of_the_other_back_end(family, tmp_path, monkeypatch):
    encoder = small(family, tmp_path, monkeypatch)
    interface = family != "mpnet" and not family.startswith("deberta")
    specs = EVERYTHING if interface else [spec for spec in EVERYTHING if not isinstance(spec, Prefix)]
    parts = ExportInputs.of(encoder, tiny.delta(encoder, "mine", specs, CLASSES), merge=False)
    graph = Graph(parts)
    theirs = {graph.names[path]: tuple(tensor.shape) for path, tensor in graph.named_parameters()}
    made = emit(parts, 20, unpad=True).graph.initializers
    ours = {name: tuple(value.const_value.shape) for name, value in made.items() if not name.startswith("constant_")}
    assert ours == theirs


@pytest.mark.parametrize("unpad", [False, True])
def test_a_row_of_padding_alone_is_finite_and_changes_nothing(unpad, tmp_path):
    for family in ("bert", "modernbert", "mpnet"):
        encoder = tiny.encoder(family, tmp_path / family)
        for name in ("prefix-shifted", "prompt", "prompt-tags", "folds"):
            run = Run(ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS[name]), True), unpad=unpad)
            ids, mask, types = padded(encodings((20, 9), typed=False), left=True)
            before = run(ids, mask, types)
            mask[1] = 0
            after = run(ids, mask, types)
            assert np.isfinite(after).all()
            assert np.abs(before[0] - after[0]).max() <= 1e-5  # unpadded, another number of rows is multiplied
            mask[0] = 0
            assert np.isfinite(run(ids, mask, types)).all()


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_pooling(pooling, normalize, tmp_path):
    encoder = tiny.encoder("distilbert", tmp_path)
    task = TaskSpec("embedding", max_length=32, head="none", pooling=pooling, normalize=normalize)
    delta = tiny.delta(encoder, "x", DELTAS["prompt"][0], task)
    for unpad in (False, True):
        assert difference(Run(ExportInputs.of(encoder, delta, True), unpad=unpad), Reference(encoder, delta)) <= 1e-5


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("opset", [18, 20])
def test_every_activation(activation, opset, tmp_path, monkeypatch):
    config = tiny.CONFIGS["bert"]()
    config.hidden_act = activation
    monkeypatch.setitem(tiny.CONFIGS, "bert", lambda: config)
    encoder = tiny.encoder("bert", tmp_path)
    delta = tiny.delta(encoder, "x", *DELTAS["folds"])
    assert difference(Run(ExportInputs.of(encoder, delta, True), opset), Reference(encoder, delta)) <= 1e-5


def test_what_it_cannot_write_is_said(tmp_path, monkeypatch):
    def found(family: str) -> str | None:
        encoder = tiny.encoder(family, tmp_path / family)
        return obstacle(ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["folds"]), True))

    assert found("roberta") is None
    assert found("deberta-v3") is None
    assert str(found("ernie")).startswith("ernie is not among bert, roberta, ")
    config, rotary = tiny.CONFIGS["bert"](), tiny.CONFIGS["modernbert"]()
    config.hidden_act = "mish"
    monkeypatch.setitem(tiny.CONFIGS, "bert", lambda: config)
    assert str(found("bert")).startswith("the activation mish is not among gelu, ")
    rotary.rope_parameters["full_attention"] |= {"rope_type": "dynamic", "factor": 2.0}
    monkeypatch.setitem(tiny.CONFIGS, "modernbert", lambda: rotary)
    assert found("modernbert") == "the rotary positions of full_attention depend on a sequence's length"


@pytest.mark.skipif("eurobert" not in CONFIG_MAPPING, reason="transformers 5.1 cannot read such a configuration")
def test_rotary_positions_that_are_scaled(tmp_path, monkeypatch):
    rotary = tiny.CONFIGS["modernbert"]()
    rotary.rope_parameters["full_attention"] |= {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64
    }  # fmt: skip
    monkeypatch.setitem(tiny.CONFIGS, "modernbert", lambda: rotary)
    encoder = tiny.encoder("modernbert", tmp_path)
    delta = tiny.delta(encoder, "x", *DELTAS["folds"])
    assert difference(Run(ExportInputs.of(encoder, delta, True)), Reference(encoder, delta)) <= 1e-5


def test_unpadded_work_follows_the_tokens(tmp_path):
    """The first linear sees as many rows as there are tokens, not as many as the caller sent."""
    encoder = tiny.encoder("bert", tmp_path)
    parts = ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["folds"]), True)
    seen = {}
    for unpad in (False, True):
        model = emit(parts, 20, unpad)
        product = next(node for node in model.graph if node.op_type == "MatMul")
        product.outputs[0].dtype = onnx_ir.DataType.FLOAT
        model.graph.outputs.append(product.outputs[0])
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
        ids, mask, types = padded(encodings((3, 9, 1), typed=True), left=False, extra=7)
        arrays = dict(zip(parts.inputs, (ids.numpy(), mask.numpy(), types.numpy()), strict=True))
        seen[unpad] = session.run(None, arrays)[1].shape[0]
    assert seen == {False: 3 * 16, True: 3 + 9 + 1}


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_no_value_outside_the_blocks_grows_with_the_square_of_the_length(family, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_nodes, "LONG", 16)
    monkeypatch.setattr(attention_nodes, "BLOCK", 8)
    encoder = small(family, tmp_path, monkeypatch)
    parts = ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["lora"]), False)
    graph = emit(parts, 20, unpad=True).graph
    assert "Scan" in {node.op_type for node in graph.all_nodes()}
    padded_graph = emit(parts, 20, unpad=False).graph  # for runtimes without branches
    assert not {"Scan", "If", "Loop"} & {node.op_type for node in padded_graph.all_nodes()}
    made = onnx_ir.to_proto(emit(parts, 20, unpad=True))
    squares = [node.output[0] for node in made.graph.node if node.op_type in ("Softmax", "Sub", "Abs", "Expand")]
    made.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in squares)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    ids, mask, types = padded(encodings((32,), typed=len(parts.inputs) == 3), False, 0)
    arrays = dict(zip(parts.inputs, (ids.numpy(), mask.numpy(), types.numpy()), strict=False))
    for name, value in zip([one.name for one in session.get_outputs()], session.run(None, arrays), strict=True):
        assert value.size < 32 * 32 or value.shape[-1] == encoder.anatomy.hidden, name


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_masked_scores_are_no_subnormal_numbers(family, tmp_path, monkeypatch):
    encoder = small(family, tmp_path, monkeypatch)
    parts = ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["folds"]), True)
    made = onnx_ir.to_proto(emit(parts, 20, unpad=True))
    weights = [onnx.numpy_helper.to_array(one) for one in made.graph.initializer]
    assert not any((one == np.finfo(np.float32).min).any() for one in weights if one.dtype == np.float32)
    lowest = [onnx.numpy_helper.to_array(one) for one in onnx_ir.to_proto(emit(parts, 20, False)).graph.initializer]
    assert any((one == np.finfo(np.float32).min).any() for one in lowest if one.dtype == np.float32)
