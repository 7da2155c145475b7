"""Builders and makers of what else runs an encoder, for ``worker.py`` in the environment of each; see there.

Nothing of this package is imported here, and no tool outside its function. ``pool`` says what becomes of hidden states
[B, L, H]: ``mean`` is pooled over the tokens and of unit length, ``cls`` the first row, "" stays as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Batch = dict[str, Any]
Call = Callable[[], Array]
Bind = Callable[[Batch], Call]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SIXTEEN, POOLED = 16, "sentence_embedding"


def pooled(hidden: Array, mask: Array, pool: str) -> Array:
    """Rows [B, H] of hidden states [B, L, H]."""
    if pool == "mean":
        rows: Array = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows
    return hidden[:, 0] if pool == "cls" else hidden


def answer(outputs: Sequence[str]) -> str:
    """The output that is meant: the pooled one where there is one, else the first."""
    return POOLED if POOLED in outputs else outputs[0]


def part(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, padded to the longest of them."""
    columns = int(batch["attention_mask"][rows].sum(1).max())
    found: Batch = {name: np.ascontiguousarray(batch[name][rows, :columns]) for name in INPUTS}
    return found | {name: [batch[name][row] for row in rows] for name in ("texts", "owners")}


def in_parts(bind: Bind, batch: Batch, parts: Sequence[Sequence[int]]) -> Call:
    """The rows of a batch that is run in parts, in its own order."""
    calls = [bind(part(batch, rows)) for rows in parts]
    back = np.argsort([row for rows in parts for row in rows])
    return lambda: np.concatenate([call() for call in calls])[back]


def sixteens(bind: Bind) -> Bind:
    """Runs each batch in 16s sorted by length."""

    def sorted_bind(batch: Batch) -> Call:
        ranked = [int(row) for row in np.argsort(batch["attention_mask"].sum(1), kind="stable")]
        return in_parts(bind, batch, [ranked[at : at + SIXTEEN] for at in range(0, len(ranked), SIXTEEN)])

    return sorted_bind


def by_owner(binds: Mapping[str, Bind]) -> Bind:
    """Runs the rows of each owner by what is bound to it, one owner after the other."""

    def bind(batch: Batch) -> Call:
        owners = list(dict.fromkeys(batch["owners"]))
        parts = [[row for row, owner in enumerate(batch["owners"]) if owner == one] for one in owners]
        calls = [binds[owner](part(batch, rows)) for owner, rows in zip(owners, parts, strict=True)]
        back = np.argsort([row for rows in parts for row in rows])
        return lambda: np.concatenate([call() for call in calls])[back]

    return bind


def feeds(calibration: str) -> Iterator[dict[str, Array]]:
    """Batches of real texts by which ranges are set."""
    with np.load(calibration) as arrays:
        count = len({name.partition(".")[0] for name in arrays.files})
        for number in range(count):
            yield {name: arrays[f"{number}.{name}"] for name in INPUTS}


def onnxruntime(model: str, threads: int, pool: str = "") -> Bind:
    """An ONNX file in ONNX Runtime."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    taken, given = [one.name for one in session.get_inputs()], [answer([one.name for one in session.get_outputs()])]

    def bind(batch: Batch) -> Call:
        feed = {name: batch[name] for name in taken}
        return lambda: pooled(session.run(given, feed)[0], batch["attention_mask"], pool)

    return bind


def sessions_in_turn(models: str, threads: int) -> Bind:
    """A session for each owner: ``models`` is the path of its file, NAME in it the owner's."""
    paths = sorted(Path(models).parent.glob(Path(models).name.replace("NAME", "*")))
    before, after = Path(models).name.split("NAME")
    return by_owner({path.name[len(before) : -len(after)]: onnxruntime(str(path), threads) for path in paths})


def make_optimum(checkpoint: str, target: str, level: str, task: str) -> None:
    """A checkpoint exported by optimum; ``level`` is that of its optimisation, O0 none."""
    export = import_module("optimum.exporters.onnx").main_export
    export(checkpoint, target, task=task, optimize=None if level == "O0" else level, do_validation=False)


def make_olive(checkpoint: str, target: str, family: str) -> None:
    """A checkpoint exported and optimised by Olive."""
    here = {"type": "LocalSystem",
            "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}  # fmt: skip
    import_module("olive.workflows").run({
        "input_model": {"type": "HfModel", "model_path": checkpoint, "task": "text-classification"},
        "systems": {"here": here},
        "passes": {"convert": {"type": "OnnxConversion"},
                   "optimise": {"type": "OrtTransformersOptimization", "model_type": family}},
        "host": "here", "target": "here", "output_dir": target, "cache_dir": target + "/cache",
    })  # fmt: skip


def make_int8(model: str, target: str, calibration: str = "") -> None:
    """An ONNX file in 8 bits by ONNX Runtime's own tools: with scales for each batch, or static ones."""
    quantization = import_module("onnxruntime.quantization")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if not calibration:
        quantization.quantize_dynamic(model, target, weight_type=quantization.QuantType.QInt8)
        return
    session = import_module("onnxruntime").InferenceSession(model, providers=["CPUExecutionProvider"])
    taken = [one.name for one in session.get_inputs()]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self.left = ({name: feed[name] for name in taken} for feed in feeds(calibration))

        def get_next(self) -> dict[str, Array] | None:
            return next(self.left, None)

    quantization.quantize_static(model, target, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                                 op_types_to_quantize=["MatMul", "Gemm"])  # fmt: skip


def make_openvino(model: str, target: str, calibration: str = "") -> None:
    """An ONNX file as IR in 8 bits by NNCF: ranges set by ``calibration``, or the weights alone."""
    nncf, openvino = import_module("nncf"), import_module("openvino")
    read = openvino.Core().read_model(model)
    taken = [one.get_any_name() for one in read.inputs]
    if calibration:
        data = nncf.Dataset([{name: feed[name] for name in taken} for feed in feeds(calibration)])
        read = nncf.quantize(read, data, model_type=nncf.ModelType.TRANSFORMER)
    else:
        read = nncf.compress_weights(read, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(read, target, compress_to_fp16=False)


def openvino(model: str, threads: int, hint: str = "f32", group: int = 0, pool: str = "") -> Bind:
    """A model in OpenVINO; ``hint`` is the type of its products, ``group`` that of its dynamic quantisation."""
    core = import_module("openvino").Core()
    settings = {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY",
                "ENABLE_CPU_PINNING": "NO", "INFERENCE_PRECISION_HINT": hint,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}  # fmt: skip
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    taken = [one.get_any_name() for one in compiled.inputs]
    given = next((one for one in compiled.outputs if POOLED in one.names), compiled.outputs[0])

    def bind(batch: Batch) -> Call:
        feed = {name: batch[name] for name in taken}
        return lambda: pooled(np.array(request.infer(feed)[given]), batch["attention_mask"], pool)

    return bind


def make_ctranslate2(checkpoint: str, target: str) -> None:
    """A checkpoint in CTranslate2's format."""
    convert = import_module("ctranslate2.converters").TransformersConverter(checkpoint)
    convert.convert(target, force=True)


def ctranslate2(model: str, checkpoint: str, threads: int, compute: str, pool: str = "") -> Bind:
    """CTranslate2's encoder, and BERT's classifier in numpy on its pooler where nothing else is pooled."""
    tool = import_module("ctranslate2")
    encoder = tool.Encoder(model, device="cpu", compute_type=compute, intra_threads=threads, inter_threads=1)
    tensors = import_module("safetensors.numpy").load_file(Path(checkpoint) / "model.safetensors")
    weight, bias = (tensors.get(f"classifier.{name}") for name in ("weight", "bias"))

    def bind(batch: Batch) -> Call:
        mask = batch["attention_mask"]
        lengths = mask.sum(1).tolist()
        ids, types = (
            [row[:length].tolist() for row, length in zip(batch[name], lengths, strict=True)]
            for name in ("input_ids", "token_type_ids")
        )

        def call() -> Array:
            out = encoder.forward_batch(ids, token_type_ids=types)
            if not pool:
                logits: Array = np.array(out.pooler_output) @ weight.T + bias
                return logits
            return pooled(np.array(out.last_hidden_state), mask, pool)

        return call

    return bind


def transformers(checkpoint: str, threads: int, pool: str = "", dtype: str = "float32", compiled: bool = False) -> Bind:
    """HuggingFace's own model in torch; compiled for any shape."""
    torch, tool = import_module("torch"), import_module("transformers")
    torch.set_num_threads(threads)
    kind = tool.AutoModel if pool else tool.AutoModelForSequenceClassification
    model = kind.from_pretrained(checkpoint, trust_remote_code=False)
    return torch_bind(model.to(getattr(torch, dtype)), pool, compiled)


def torch_bind(model: Any, pool: str, compiled: bool = False) -> Bind:
    """A model of transformers' form."""
    torch, inspect = import_module("torch"), import_module("inspect")
    taken = [name for name in INPUTS if name in inspect.signature(model.forward).parameters]
    model = model.eval().requires_grad_(False)
    model = torch.compile(model, dynamic=True) if compiled else model

    def bind(batch: Batch) -> Call:
        tensors = {name: torch.from_numpy(batch[name]) for name in taken}

        def call() -> Array:
            with torch.no_grad():
                out = model(**tensors)
            rows: Array = (out.last_hidden_state if pool else out.logits).float().numpy()
            return pooled(rows, batch["attention_mask"], pool)

        return call

    return bind


def sentence_transformers(checkpoint: str, threads: int, back_end: str, work: str) -> Bind:
    """sentence-transformers from texts: mean pooling, unit length, its own batches of 32 sorted by length."""
    if back_end != "torch":  # it writes its export beside the model
        checkpoint = str(
            shutil.copytree(checkpoint, Path(work) / f"sentence-transformers-{back_end}", dirs_exist_ok=True)
        )
    import_module("torch").set_num_threads(threads)
    tool, options = import_module("sentence_transformers"), dict[str, Any]()
    if back_end == "onnx":
        session = import_module("onnxruntime").SessionOptions()
        session.intra_op_num_threads = threads
        options = {"provider": "CPUExecutionProvider", "session_options": session}
    if back_end == "openvino":
        options = {"ov_config": {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1", "ENABLE_CPU_PINNING": "NO",
                                 "INFERENCE_PRECISION_HINT": "f32"}}  # fmt: skip
    model = tool.SentenceTransformer(checkpoint, device="cpu", backend=back_end, model_kwargs=options)

    def bind(batch: Batch) -> Call:
        model.max_seq_length = max(model.max_seq_length or 0, batch["attention_mask"].shape[1])
        return lambda: model.encode(batch["texts"], normalize_embeddings=True, show_progress_bar=False)

    return bind


def fastembed(model: str, threads: int, width: int) -> Bind:
    """fastembed from texts, with a model of one's own: mean pooling, unit length, batches as they come."""
    tool, told = import_module("fastembed"), import_module("fastembed.common.model_description")
    tool.TextEmbedding.add_custom_model(
        model="bench/model", pooling=told.PoolingType.MEAN, normalization=True,
        sources=told.ModelSource(hf="bench/model"), dim=width, model_file="model.onnx",
    )  # fmt: skip
    embed = tool.TextEmbedding("bench/model", specific_model_path=model, threads=threads)
    embed.model.tokenizer.no_truncation()  # it takes the checkpoint's shortest limit; texts fit the model
    return lambda batch: lambda: np.stack(list(embed.embed(batch["texts"], batch_size=len(batch["texts"]))))


def peft(base: str, deltas: str, threads: int, arranged: bool) -> Bind:
    """peft's ``adapter_names`` over all adapters of a folder; [CLS] rows; ``arranged`` in 16s sorted by length."""
    torch, tool = import_module("torch"), import_module("peft")
    torch.set_num_threads(threads)
    model = import_module("transformers").AutoModel.from_pretrained(base, trust_remote_code=False)
    first, *others = sorted(path.name for path in Path(deltas).iterdir())
    model = tool.PeftModel.from_pretrained(model, f"{deltas}/{first}", adapter_name=first)
    for name in others:
        model.load_adapter(f"{deltas}/{name}", adapter_name=name)
    model.eval()

    def bind(batch: Batch) -> Call:
        tensors = {name: torch.from_numpy(batch[name]) for name in INPUTS}

        def call() -> Array:
            with torch.inference_mode():
                rows = model(**tensors, adapter_names=batch["owners"]).last_hidden_state[:, 0]
            return rows.numpy()  # type: ignore[no-any-return]

        return call

    return sixteens(bind) if arranged else bind


def adapters(base: str, deltas: str, threads: int) -> Bind:
    """AdapterHub's ``BatchSplit`` over LoRA adapters that are read from peft's files; [CLS] rows, owners together."""
    torch, tool = import_module("torch"), import_module("adapters")
    torch.set_num_threads(threads)
    model = import_module("transformers").AutoModel.from_pretrained(base, trust_remote_code=False)
    tool.init(model)
    for path in sorted(Path(deltas).iterdir()):
        told = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        config = tool.LoRAConfig(r=told["r"], alpha=told["lora_alpha"], attn_matrices=["q", "v"])
        model.add_adapter(path.name, config=config)
        tensors = import_module("safetensors.torch").load_file(path / "adapter_model.safetensors")
        for layer, block in enumerate(model.encoder.layer):
            for target in ("query", "value"):
                lora = getattr(block.attention.self, target).loras[path.name]
                for name, own in (("lora_A", lora.lora_A), ("lora_B", lora.lora_B)):
                    end = f"layer.{layer}.attention.self.{target}.{name}.weight"
                    own.data.copy_(next(tensor for key, tensor in tensors.items() if key.endswith(end)))
    model.eval()

    def bind(batch: Batch) -> Call:
        owners = sorted(dict.fromkeys(batch["owners"]))
        parts = [[row for row, owner in enumerate(batch["owners"]) if owner == one] for one in owners]
        order = [row for rows in parts for row in rows]
        tensors = {name: torch.from_numpy(batch[name][order]) for name in INPUTS}
        split = tool.composition.BatchSplit(*owners, batch_sizes=[len(rows) for rows in parts])
        back = np.argsort(order)

        def call() -> Array:
            model.active_adapters = split
            with torch.inference_mode():
                return model(**tensors).last_hidden_state[:, 0].numpy()[back]  # type: ignore[no-any-return]

        return call

    return bind
