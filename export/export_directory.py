"""What an export directory holds: the file and what it says of itself, tokenizer, config.json, card, config.pbtxt.

No time and no path: the same delta gives the same bytes.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import bertology_serve
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.interop.sentence_transformers import SETTINGS
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.encoder.loading import drop_types
from bertology_serve.errors import SpecError
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import IR, MODEL, ExportSpec
from bertology_serve.export.session import ROWS
from bertology_serve.families.compat import ATTENTION_SETTINGS, task_classes
from bertology_serve.files import JsonObject, write_json
from bertology_serve.tasks import spec as tasks

if TYPE_CHECKING:
    import onnx_ir

    from bertology_serve.export.emitter.emit import BackEnd
    from bertology_serve.export.verify import Verification

TASK_OPTIONS = (
    "head", "stride", "max_answer_length", "normalize", "token_types", "pairs", "thresholds", "abstain", "long",
    "aggregate", "width", "max_terms", "skip_punctuation", "prompts", "dimensions", "ranges",
)  # fmt: skip
"""Fields of the task that say how texts are cut and answers read."""
ZERO_SHOT_OPTIONS = ("label_texts", "template", "scale", "bias")
"""Those that only zero-shot has."""
SEMANTICS = (
    "int64 [batch, sequence]; attention_mask is 1 for tokens and 0 for padding, which may stand on either side; "
    "a sequence is at most max_length tokens; a row of padding alone has no meaning"
)


def metadata(
    encoder: Encoder, delta: Delta, export_inputs: ExportInputs, spec: ExportSpec, back_end: BackEnd, name: str
) -> dict[str, str]:
    """Facts by name, all texts; lists and objects are JSON."""
    task = delta.task
    facts: dict[str, object] = {
        "name": name,
        "task": task.kind,
        "labels": list(task.labels),
        "pooling": task.pooling,
        "max_length": longest(encoder, delta),
        "task_options": {
            name: getattr(task, name) for name in TASK_OPTIONS + ZERO_SHOT_OPTIONS * (task.kind == tasks.ZERO_SHOT)
        },
        "base_name": base_name(delta),
        "base_sha256": delta.base.sha256,
        "base_family": delta.base.family,
        "delta_name": delta.name,
        "delta_version": delta.version,
        "delta_sha256": delta_hash(delta),
        "kinds": list(delta.kinds),
        "merged": spec.merge,
        "inputs": f"{', '.join(export_inputs.inputs)}: {SEMANTICS}",
        "outputs": f"{', '.join(export_inputs.outputs)}: {_output(delta)}",
        "precision": spec.precision,
        "target": spec.target,
        "verification": f"answers {_bound(spec, encoder.anatomy.layers)} the unmerged float32 torch engine "
        "in its runtime, or this file would not have been published; the figures are in verification.json",
        "opset": back_end.opset,
        "back_end": back_end.name,
        "unpadded": back_end.unpad,
        "tool": f"bertology-serve {bertology_serve.__version__}",
    }
    return as_texts(facts)


def as_texts(facts: Mapping[str, object]) -> dict[str, str]:
    """Texts as they are, all else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in facts.items()
    }


def _bound(spec: ExportSpec, layers: int) -> str:
    drift = spec.drift(layers)
    if drift:
        return f"with ‖Δ‖/‖·‖ at most {drift:.2g} against"
    return f"within {f'{spec.atol:g}' if spec.atol else f'what float32 rounds in {layers} layers'} of"


def longest(encoder: Encoder, delta: Delta) -> int:
    """The longest sequence in tokens that the task reads and the encoder has positions for."""
    effects = delta.effects(encoder.anatomy)
    shifted = 0
    if effects.prompt is not None and effects.prompt.positions == "shifted":
        shifted += int(effects.prompt.vectors.shape[0])
    if effects.prefix is not None and effects.prefix.positions == "shifted":
        shifted += int(effects.prefix.keys.shape[1])
    return min(delta.task.max_length, encoder.max_tokens, encoder.anatomy.max_tokens - shifted)


def base_name(delta: Delta) -> str:
    """The base as the delta calls it; of a directory, its last part."""
    path = PurePath(delta.base.name)
    return path.name if path.is_absolute() or delta.base.name.startswith((".", "~")) else delta.base.name


def delta_hash(delta: Delta) -> str:
    """SHA-256 over a delta's specs, task and tensors, however it is stored."""
    digest = hashlib.sha256(f"{delta.specs!r}\n{delta.task!r}\n".encode())
    for tensors in (delta.tensors, delta.head, delta.weights):
        digest.update(weights_hash(tensors).encode())
    return digest.hexdigest()


def _output(delta: Delta) -> str:
    task = delta.task
    if task.kind in tasks.POOLED_KINDS:
        unit = "of unit length" if task.normalize else "not normalised"
        return f"float32 [batch, sequence, hidden], zero at padding, and pooled [batch, hidden], {unit}"
    if task.kind == tasks.SPARSE:
        return f"float32 [batch, {task.width}], the weight of each word of the vocabulary, log(1 + max(0, score))"
    if task.kind == tasks.MULTI_VECTOR:
        unit = "of unit length" if task.normalize else "not normalised"
        return f"float32 [batch, sequence, {task.width}], {unit}, zero at padding; punctuation has vectors too"
    if task.kind == tasks.MULTIPLE_CHOICE:
        return "float32 [batch, 1], one row a choice: the caller groups a question's rows and takes the largest"
    if task.kind == tasks.QUESTION_ANSWERING:
        return "float32 [batch, sequence] each, before any softmax, zero at padding"
    shape = f"[batch, sequence, {task.outputs}], zero at padding" if task.per_token else f"[batch, {task.outputs}]"
    return f"float32 {shape}, before any {'sigmoid' if task.kind == tasks.MULTI_LABEL else 'softmax'}"


EXTERNAL_OVER = 1_800_000_000
"""Bytes of weights from which they get a file of their own; a protobuf ends at 2 GiB."""
DATA_SUFFIX = "_data"


def annotate(model: onnx_ir.Model, metadata: Mapping[str, str]) -> onnx_ir.Model:
    """The same model, metadata, sorted, in place of what the exporter left."""
    model.metadata_props.clear()
    model.metadata_props.update(sorted(metadata.items()))
    model.graph.name = "main"
    return model


def save(model: onnx_ir.Model, path: Path, external_over: int | None = None) -> int:
    """Writes the file, and ``model.onnx_data`` beside it for large weights; returns the bytes of both."""
    import onnx_ir  # half a second, and not for who runs a graph that was kept

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = path.with_name(path.name + DATA_SUFFIX)
    path.parent.mkdir(exist_ok=True)
    if weights > (EXTERNAL_OVER if external_over is None else external_over):
        onnx_ir.save(model, path, external_data=data.name)
    else:
        onnx_ir.save(model, path)
    return sum(file.stat().st_size for file in (path, data) if file.exists())


REPORT = "verification.json"
CLASSES = {
    tasks.CLASSIFICATION: "SEQUENCE_CLASSIFICATION",
    tasks.MULTI_LABEL: "SEQUENCE_CLASSIFICATION",
    tasks.REGRESSION: "SEQUENCE_CLASSIFICATION",
    tasks.TOKEN_CLASSIFICATION: "TOKEN_CLASSIFICATION",
    tasks.QUESTION_ANSWERING: "QUESTION_ANSWERING",
    tasks.MULTIPLE_CHOICE: "MULTIPLE_CHOICE",
}
PROBLEMS = {
    tasks.CLASSIFICATION: "single_label_classification",
    tasks.MULTI_LABEL: "multi_label_classification",
    tasks.REGRESSION: "regression",
}
OF_THIS_MACHINE = ("_name_or_path", *ATTENTION_SETTINGS)


def write_directory(
    directory: Path,
    model: str,
    encoder: Encoder,
    delta: Delta,
    facts: Mapping[str, str],
    report: Verification,
    cautions: Sequence[str] = (),
) -> None:
    """Writes everything but the model, which lies at ``model``, into ``directory``."""
    _write_tokenizer(directory, encoder, int(facts["max_length"]), delta.task.token_types)
    write_json(directory / "config.json", config(encoder, delta, facts))
    write_json(directory / REPORT, report.as_dict())
    if delta.task.kind in tasks.POOLED_KINDS and model != MODEL["triton"]:
        _write_modules(directory, delta, encoder.anatomy.hidden, int(facts["max_length"]))
    (directory / "README.md").write_text(card(model, facts, report, cautions), encoding="utf-8")


def config(encoder: Encoder, delta: Delta, facts: Mapping[str, str]) -> JsonObject:
    """The encoder's configuration with the task's labels, class and, under ``bertology_serve``, the metadata."""
    values = {key: value for key, value in encoder.config.to_dict().items() if key not in OF_THIS_MACHINE}
    count = 0 if delta.task.kind in tasks.WHOLE_BATCH else delta.task.outputs
    labels = delta.task.labels or tuple(f"LABEL_{i}" for i in range(count))
    values |= {"bertology_serve": dict(facts), "dtype": "float16" if facts["precision"] == "fp16" else "float32"}
    if labels:
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        values["label2id"] = {label: i for i, label in enumerate(labels)}
    if delta.task.kind in CLASSES:
        values["architectures"] = architectures(delta)
    if delta.task.kind in PROBLEMS:
        values["problem_type"] = PROBLEMS[delta.task.kind]
    return values


def architectures(delta: Delta) -> list[str]:
    """The name of HuggingFace's task model; what serves the file tells the task by it."""
    found = task_classes(CLASSES[delta.task.kind]).get(delta.base.family)
    return [found] if isinstance(found, str) else []


def example(model: str, facts: Mapping[str, str], directory: str) -> str:
    """Three lines of Python that run the file ``directory/model``."""
    inputs = facts["inputs"].split(":")[0].split(", ")
    outputs = [name for name in facts["outputs"].split(":")[0].split(", ") if name != ROWS]
    path, given = directory + "/" + model, f"{{name: texts[name] for name in {inputs!r}}}"
    package, session, ran = (
        ("openvino", f"openvino.compile_model({path!r}, 'CPU', {{'INFERENCE_PRECISION_HINT': 'f32'}})",
         f"found = session({given}); print([found[name] for name in {outputs!r}])")
        if model == IR else
        ("onnxruntime", f"onnxruntime.InferenceSession({path!r}, providers=['CPUExecutionProvider'])",
         f"print(session.run({outputs!r}, {given}))")
    )  # fmt: skip
    return (
        f"import {package}, transformers; tokenizer = transformers.AutoTokenizer.from_pretrained({directory!r})\n"
        f"session = {session}\n"
        f"texts = tokenizer(['A text.', 'Another one.'], padding=True, truncation=True, return_tensors='np'); {ran}"
    )


def card(model: str, facts: Mapping[str, str], report: Verification, cautions: Sequence[str] = ()) -> str:
    """The model card."""
    what = f"{facts['delta_name']} ({facts['task']}) on {facts['base_name']}"
    rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in facts.items())
    beware = "".join(f"**Beware:** {caution}.\n\n" for caution in cautions)
    return (
        f"# {facts['name']}\n\n`{model}` is {what}, exported by {facts['tool']}.\n\n{report.line()}.\n\n{beware}"
        f"```python\n{example(model, facts, '.')}\n```\n\n| | |\n|---|---|\n{rows}"
    )


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _write_tokenizer(directory: Path, encoder: Encoder, max_length: int, types: bool) -> None:
    """The tokenizer as it was loaded, its limit the task's; without ``types`` it gives pairs none."""
    tokenizer = copy.deepcopy(encoder.tokenizer)
    if not types:
        drop_types(tokenizer)
    tokenizer.model_max_length = max_length
    for of_this_machine in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(of_this_machine, None)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if (
        values.get("tokenizer_class") == "TokenizersBackend"
    ):  # its name since transformers 5; optimum has transformers 4
        write_json(path, values | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_modules(directory: Path, delta: Delta, hidden: int, max_length: int) -> None:
    """What sentence-transformers does with the rows: the task's pooling, and unit length where the task has it."""
    steps = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if delta.task.normalize else {})
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(steps.items())
    ]
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    pooling = {f"pooling_mode_{mode}": name == delta.task.pooling for name, mode in modes.items()}
    for path in filter(None, steps.values()):
        (directory / path).mkdir()
    write_json(directory / "modules.json", modules)
    write_json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden} | pooling)
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    prompts = dict(delta.task.prompts)
    default = prompts.pop("", None)
    name = next((name for name, text in prompts.items() if text == default), None if default is None else "default")
    prompts |= {} if name is None or default is None else {name: default}
    write_json(directory / SETTINGS, {"prompts": prompts, "default_prompt_name": name, "similarity_fn_name": "cosine"})


CONFIG, LABELS = "config.pbtxt", "labels.txt"
MOST_ROWS, THREADS = 64, 1


def write_config(directory: Path, export_inputs: ExportInputs, gpu: bool = False) -> None:
    """Writes both files; labels where a row of the output is one decision. ``gpu``: it is to run on one."""
    labels = export_inputs.task.labels if export_inputs.task.kind == tasks.CLASSIFICATION else ()
    if labels:
        text = "".join(" ".join(label.split()) + "\n" for label in labels)
        (directory / LABELS).write_text(text, encoding="utf-8")
    (directory / CONFIG).write_text(triton_config(export_inputs, labelled=bool(labels), gpu=gpu), encoding="utf-8")


def triton_config(export_inputs: ExportInputs, labelled: bool, gpu: bool = False) -> str:
    """The model configuration, in protobuf's text format (``model_config.proto``); batch is its first dimension."""
    inputs = ",\n".join(_tensor(name, "TYPE_INT64", [-1]) for name in export_inputs.inputs)
    outputs = ",\n".join(
        _tensor(name, "TYPE_FP32", [-1 if isinstance(n, str) else n for n in shape[1:]], LABELS if labelled else None)
        for name, shape in export_inputs.outputs.items()
    )
    return (
        f'backend: "onnxruntime"\nmax_batch_size: {MOST_ROWS}\n'
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n"
        "dynamic_batching { }\n"
        f"instance_group [ {{ kind: {'KIND_GPU' if gpu else 'KIND_CPU'}, count: 1 }} ]\n"
        f'parameters {{ key: "intra_op_thread_count", value: {{ string_value: "{THREADS}" }} }}\n'
    )


def _tensor(name: str, kind: str, dims: Sequence[int], labels: str | None = None) -> str:
    more = f', label_filename: "{labels}"' if labels else ""
    return f'  {{ name: "{name}", data_type: {kind}, dims: [ {", ".join(map(str, dims))} ]{more} }}'


def check_target(target: Path, overwrite: bool) -> None:
    """Raises SpecError where ``target`` may not be written: only an earlier export is ever replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / REPORT).is_file() or not any((target / path).is_file() for path in (*MODEL.values(), IR)):
        raise SpecError(f"{target} exists and is no export; give --out a new directory")
    if not overwrite:
        raise SpecError(f"{target} holds an export already; give --overwrite to replace it, or another --out")
