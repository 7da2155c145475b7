"""Opens a delta that lies on disk, of this package's, peft's or transformers', with the encoder that it runs on.

HuggingFace's own task models are read as deltas (fine-tuned, or merged by peft), and what is imported from peft is
verified against them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, VERSION_DIGITS, check_name, newest
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.safe_io import Limits, read_json
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.encoder.loading import locate
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import BaseMismatch, BertologyError, FormatError, InputError, VerificationError
from bertology_serve.families import compat
from bertology_serve.tasks import spec as tasks
from bertology_serve.tasks.heads import Head, head_form, head_pooling, pool
from bertology_serve.tasks.spec import Encoding, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_delta(
    directory: Path, backbone: str | None, device: str = "cpu", name: str | None = None
) -> tuple[Delta, Encoder]:
    """A delta and the encoder that it runs on: ``backbone``, or the base that it names.

    ``directory`` may also hold the versions of one delta; the newest is taken. Or it is a whole task model of
    HuggingFace's, which is its own base where none is given. ``name`` is what its place says that it is called. What
    peft or transformers can run is compared with what they answer. Raises NotFound, FormatError, BaseMismatch,
    VerificationError, and InputError where there are several deltas.
    """
    path = newest(directory)
    if is_task_model(path):
        delta = read_task_model(path, Encoder.load(backbone or str(path)))
        return delta, Encoder.for_delta(delta, backbone, device=device)
    if not (path / MANIFEST).exists() and backbone is not None:  # peft's: only the encoder can say what fits
        encoder = Encoder.load(backbone, device=device)
        delta = load_delta(path, encoder, name)
        verify_peft(path, delta, encoder)
        return delta, encoder
    delta = store.load(path, name=name)
    encoder = Encoder.for_delta(delta, backbone, device=device)
    return encoder.read_delta(path, name), encoder


def load_delta(path: Path, encoder: Encoder | None = None, name: str | None = None) -> Delta:
    """A delta, every byte of it checked; with an encoder also that it was made for it, and runs on it.

    ``name`` is what its place says that it is called.
    """
    if encoder is None:
        return store.load(path, name=name)
    delta = encoder.read_delta(path, name)
    if not delta.weights:
        Pipeline(encoder).add(delta)
    return delta


_AUTO = {
    tasks.CLASSIFICATION: "AutoModelForSequenceClassification",
    tasks.MULTI_LABEL: "AutoModelForSequenceClassification",
    tasks.REGRESSION: "AutoModelForSequenceClassification",
    tasks.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
    tasks.QUESTION_ANSWERING: "AutoModelForQuestionAnswering",
    tasks.MULTIPLE_CHOICE: "AutoModelForMultipleChoice",
    tasks.EMBEDDING: "AutoModel",
    tasks.ZERO_SHOT: "AutoModel",
}
_KINDS = {
    auto.removeprefix("AutoModel"): kind for kind, auto in reversed(_AUTO.items()) if kind not in tasks.POOLED_KINDS
}
_LONGEST = 512
_LENGTHS = (3, 9, 24)
_TOLERANCE = 1e-4


def is_task_model(directory: Path) -> bool:
    """Whether a directory holds a whole HuggingFace task model, and no delta."""
    if not (directory / "config.json").is_file() or any((directory / n).exists() for n in (MANIFEST, ADAPTER_CONFIG)):
        return False
    return any(directory.glob("*.safetensors")) and _kind(directory) is not None


def read_task_model(directory: Path, encoder: Encoder, name: str | None = None) -> Delta:
    """The whole checkpoint in ``directory`` as a delta of kind ``full`` of ``encoder``, verified against transformers.

    Raises FormatError and InputError for what cannot be read, Unsupported for a task or head that is not known here,
    BaseMismatch for a model of other dimensions, VerificationError where it would be answered differently.
    """
    kind = _kind(directory)
    if kind is None:
        raise FormatError(f"{directory} is no task model; expected config.json that names one of {', '.join(_KINDS)}")
    model = load_task_model(str(directory), kind)
    family, config = encoder.anatomy.family, model.config
    if config.model_type != family:
        raise BaseMismatch(f"{directory} is a {config.model_type}, but {encoder.name} is a {family}; give its own base")
    task = _task(kind, config, encoder)
    own, wanted = model.base_model.state_dict(), encoder.model.state_dict()
    for part, tensor in wanted.items():
        if part not in own or own[part].shape != tensor.shape:
            got = list(own[part].shape) if part in own else "missing"
            raise BaseMismatch(
                f"{directory} was not tuned from {encoder.name}: {part} is {got}, not {list(tensor.shape)}"
            )
    form = head_form(family, encoder.anatomy.prefix, task, encoder.anatomy.hidden, config.to_dict())
    state = model.state_dict()
    delta = Delta(
        check_name(name or directory.resolve().name, "delta name"),
        encoder.ref,
        task,
        head={part: state[part].clone() for part, _, _ in Head(form).named()},
        weights={part: own[part].clone() for part in wanted},
        provenance={"imported_from": "transformers", "architecture": type(model).__name__},
    )
    verified = verify(model, delta, Encoder.for_delta(delta, encoder.name), f"transformers {transformers.__version__}")
    version = weights_hash({**delta.weights, **delta.head})[:VERSION_DIGITS]
    return replace(delta, version=version, provenance={**delta.provenance, "verified": verified})


class WholeModel:
    """A whole checkpoint that answers by itself beside an encoder's deltas; ``delta`` holds no tensors."""

    def __init__(self, delta: Delta, encoder: Encoder) -> None:
        self.tokenizer, self._pipeline = encoder.tokenizer, Pipeline(encoder)
        self._ready = self._pipeline.admit(delta.name, delta)
        self.delta = replace(delta, weights={}, head={})

    @classmethod
    def open(cls, directory: Path) -> WholeModel:
        """Reads a task model's directory; raises what ``read_task_model`` does."""
        encoder = Encoder.load(str(directory))
        return cls(read_task_model(directory, encoder), encoder)

    def outputs(self, encodings: Sequence[Encoding]) -> list[Tensor]:
        """[C], or [len, C] where the task answers for every token, of every sequence, float32 on CPU."""
        with self._pipeline.encoder.lock, torch.inference_mode():
            return self._pipeline.outputs([(self._ready, encoding) for encoding in encodings])


def task_models(root: Path) -> list[Path]:
    """The task models in a directory, or itself."""
    below = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [root] if is_task_model(root) else [path for path in below if is_task_model(path)]


def verify_peft(directory: Path, delta: Delta, encoder: Encoder) -> str:
    """Compares a delta that was read from peft's ``directory`` with what peft answers; says how far apart they are.

    Where peft is not installed, or cannot run it, it says so. Raises VerificationError.
    """
    try:
        import peft
    except ImportError:
        return "not compared: peft is not installed"
    if encoder.is_pruned or not (directory / ADAPTER_WEIGHTS).exists():
        return "not compared: peft would have to open a pickle, or cannot load the encoder"
    outputs = (
        {}
        if delta.task.kind in (*tasks.POOLED_KINDS, tasks.QUESTION_ANSWERING, tasks.MULTIPLE_CHOICE)
        else {"num_labels": delta.task.outputs}
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_task_model(locate(encoder.name), delta.task.kind, whole=False, **outputs)
            wrapped = peft.PeftModel.from_pretrained(model, str(directory)).eval()
            return verify(wrapped, delta, encoder, f"peft {peft.__version__}")
    except BertologyError:
        raise
    except Exception as error:  # peft's and transformers' own: their errors have no common base
        return f"not compared: peft cannot run it ({type(error).__name__})"


def verify(model: torch.nn.Module, delta: Delta, encoder: Encoder, against: str) -> str:
    """Compares the raw outputs of a delta with those of HuggingFace's or peft's ``model`` for a few sequences.

    Raises VerificationError where they differ by more than a ten-thousandth of the outputs' size.
    """
    pipeline, task = Pipeline(encoder), delta.task
    ready = pipeline.admit(delta.name, delta)
    worst = 0.0
    for encoding in _sequences(encoder, task):
        with encoder.lock, torch.inference_mode():
            (ours,) = pipeline.outputs([(ready, encoding)])
        theirs = _answer(model, encoding, task).to(ours)
        off = float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))
        worst = max(worst, off if off == off else float("inf"))
    if worst > _TOLERANCE:
        raise VerificationError(
            f"{delta.name} would answer otherwise here than in {against}: outputs differ by {worst:.1e} of their size; "
            "nothing was written"
        )
    return f"against {against}: outputs differ by at most {worst:.1e} of their size"


def load_task_model(path: str, kind: str, whole: bool = True, **more: object) -> PreTrainedModel:
    """HuggingFace's model for a task in float32; with ``whole`` every weight must be in its files (safetensors)."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with compat.BUILDING:
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            model, info = getattr(transformers, _AUTO[kind]).from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                **more,
            )  # fmt: skip
        except Exception as error:  # transformers' and safetensors' errors have no common base
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            raise InputError(f"cannot read {path}: {said}") from None
        finally:
            transformers.logging.set_verbosity(level)
    missing = sorted(info["missing_keys"])
    if whole and missing:
        raise FormatError(f"{path} lacks {missing[0]} and so is no whole {type(model).__name__}; save it again")
    loaded: PreTrainedModel = model.eval()
    return loaded


def _kind(directory: Path) -> str | None:
    """The task of the class that ``config.json`` names first; regression is classification there."""
    try:
        named, _ = read_json(directory / "config.json", Limits(), directory)
    except FormatError:
        return None
    architectures = named.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return next((kind for end, kind in _KINDS.items() if first.endswith(end)), None)


def _task(kind: str, config: Any, encoder: Encoder) -> TaskSpec:
    longest = min(_LONGEST, encoder.max_tokens)
    if kind == tasks.QUESTION_ANSWERING:
        return TaskSpec(kind, max_length=longest, stride=min(128, longest // 4))
    if kind == tasks.CLASSIFICATION and config.problem_type == "multi_label_classification":
        kind = tasks.MULTI_LABEL
    elif kind == tasks.CLASSIFICATION and config.num_labels == 1:
        kind = tasks.REGRESSION
    if sorted(config.id2label) != list(range(config.num_labels)):
        got = ", ".join(map(str, sorted(config.id2label)[:8]))
        raise FormatError(f"id2label of config.json names outputs {got}; expected 0 to {config.num_labels - 1}")
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    pooling = head_pooling(config.model_type, kind, config.to_dict())
    named = labels if kind in (*tasks.LABEL_KINDS, tasks.TOKEN_CLASSIFICATION) else ()
    return TaskSpec(kind, named, max_length=longest, pooling=pooling)


def _sequences(encoder: Encoder, task: TaskSpec) -> list[Encoding]:
    """A few random sequences; the second half of each is of type 1 where the encoder tells types apart."""
    generator = torch.Generator().manual_seed(0)
    rows = encoder.model.get_input_embeddings().weight.shape[0]
    typed = int(getattr(encoder.config, "type_vocab_size", 0) or 0) > 1 and task.token_types
    found = []
    for length in (min(length, task.max_length) for length in _LENGTHS):
        ids = torch.randint(min(5, rows - 1), rows, (length,), generator=generator).tolist()
        types = tuple(int(typed and i >= length // 2) for i in range(length))
        found.append(Encoding(tuple(ids), types))
    return found


@torch.inference_mode()
def _answer(model: torch.nn.Module, encoding: Encoding, task: TaskSpec) -> Tensor:
    """The model's output for one sequence, shaped as a head's here: [C], [len, C] or [H]."""
    inner = getattr(model, "get_base_model", lambda: model)()
    inputs = {"input_ids": encoding.ids, "attention_mask": (1,) * len(encoding)}
    if any(encoding.types) and "token_type_ids" in inspect.signature(inner.forward).parameters:
        inputs["token_type_ids"] = encoding.types
    batch = {name: torch.tensor([values]) for name, values in inputs.items()}
    if task.kind == tasks.MULTIPLE_CHOICE:
        batch = {name: values[None] for name, values in batch.items()}
    out = model(**batch)
    if task.kind in tasks.POOLED_KINDS:
        rows = out.last_hidden_state[0][-len(encoding) :]
        return pool(rows, torch.arange(len(rows)), torch.tensor([len(rows)]), task.pooling)[0]
    if task.kind == tasks.QUESTION_ANSWERING:
        return torch.stack([out.start_logits[0], out.end_logits[0]], -1)[-len(encoding) :]
    logits: Tensor = out.logits[0]
    return logits[-len(encoding) :] if task.per_token else logits
