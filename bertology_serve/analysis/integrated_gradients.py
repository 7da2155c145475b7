"""What each token adds to an answer: integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365), by captum.

The path runs from [PAD] in the place of every token to the text; [CLS] and [SEP] stand on it from the start. Captum is
the extra ``attribution``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from bertology_serve.analysis.figures import Figure, HeatMap
from bertology_serve.analysis.report import AnalysisReport, origin
from bertology_serve.analysis.subject_model import Advance, DeltaLike, EncoderLike, Subject, TaskEvaluation, silent
from bertology_serve.data.records import DataLike
from bertology_serve.encoder.batch import read
from bertology_serve.errors import Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION, Encoding

LONGEST_NAME = 14


def attribution(
    encoder: EncoderLike,
    data: DataLike,
    *,
    delta: DeltaLike = None,
    most: int = 8,
    steps: int = 32,
    advance: Advance = silent,
) -> AnalysisReport:
    """What each token of the first ``most`` records adds to the answer of ``delta``, a classification or regression
    (where it reads windows, to that of the first).

    Integrated gradients of the chosen class's logit, or of the value, in ``steps`` steps from a text of [PAD]s.
    Table ``tokens``: a row a token, with its attribution in logits (float) and ``missed``, what the sum of all misses.

    Raises SpecError without a delta, Unsupported for other tasks and without captum, DataError naming a record that
    is wrong.
    """
    check_available()
    subject = Subject.of(encoder, delta)
    trial = TaskEvaluation(subject, data, most, 4096, labelled=False)
    spec = trial.task.spec
    if spec.kind not in (CLASSIFICATION, REGRESSION):
        raise Unsupported(f"attribution is to one answer a text, not to those of {spec.kind}")
    rows: list[JsonObject] = []
    figures = {}
    for number, item in enumerate(trial.items):
        encoding = item.encodings[0]
        with torch.inference_mode():
            best = int(trial.output(trial.pack([item]))[0].argmax())

        def chosen(out: Tensor, best: int = best) -> Tensor:
            return out[:, best]

        answer, names = (spec.labels or ("value",))[best], token_names(subject, encoding)
        found, missed = attributions(subject, encoding, chosen, steps)
        rows += [
            {"record": number, "answer": answer, "token": token, "place": place, "attribution": own, "missed": missed}
            for place, (token, own) in enumerate(zip(names, found, strict=True))
        ]
        end = max(map(abs, found)) or 1.0
        panel = HeatMap("", [found], "", "token", "logits", (-end, end), [answer], names, True)
        figures[f"record{number}"] = Figure(f"What each token adds: record {number}, {subject.name}", [panel])
        advance(number + 1, len(trial.items))
    facts = {**subject.facts(), "input": trial.name, **origin()}
    return AnalysisReport("attribution", facts, {"tokens": rows}, figures)


def token_names(subject: Subject, encoding: Encoding) -> list[str]:
    """The tokens of a sequence, cut to what fits beside a figure."""
    pieces = subject.encoder.tokenizer.convert_ids_to_tokens(list(encoding.ids))
    return [str(piece)[:LONGEST_NAME] for piece in pieces]


def check_available() -> None:
    """Raises Unsupported where captum is not installed."""
    if importlib.util.find_spec("captum") is None:
        raise Unsupported(
            "token attributions need captum, which is not installed; pip install 'bertology-serve[attribution]', "
            "or leave them out (--no-attributions)"
        )


def attributions(
    subject: Subject, encoding: Encoding, scalar: Callable[[Tensor], Tensor], steps: int
) -> tuple[list[float], float]:
    """What each token adds to ``scalar`` of the head's output [n, C] -> [n], and what the sum of all misses.

    The second is F(text) - F(baseline) - Σ, by which the number of ``steps`` is judged.
    """
    check_available()
    from captum.attr import IntegratedGradients

    def answer(vectors: Tensor) -> Tensor:
        return scalar(run_vectors(subject, encoding, vectors))

    vectors, baseline = _ends(subject, encoding)
    found, missed = IntegratedGradients(answer, multiply_by_inputs=True).attribute(
        vectors, baseline, n_steps=steps, internal_batch_size=16, return_convergence_delta=True
    )
    return found.sum(-1)[0].double().tolist(), float(missed.abs().max())


def _ends(subject: Subject, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """The word vectors [1, n, E] of a text, and of the baseline."""
    encoder = subject.encoder
    tokenizer = encoder.tokenizer
    pad = tokenizer.pad_token_id or 0
    kept = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    ids = torch.tensor([encoding.ids], device=encoder.device)
    bare = torch.tensor([[id if id in kept else pad for id in encoding.ids]], device=encoder.device)
    table = encoder.model.get_input_embeddings()
    with torch.no_grad():
        return table(ids).clone(), table(bare).clone()


def run_vectors(subject: Subject, encoding: Encoding, vectors: Tensor) -> Tensor:
    """The head's output [n, C] for one text, its word vectors [n, length, E] taken from the caller."""
    batch = subject.pack([encoding] * len(vectors))
    rows = torch.cat([vectors[original] for original in batch.order])

    def replaced(_: torch.nn.Module, __: object, words: Tensor) -> Tensor:
        return words.index_copy(0, batch.text_rows, rows.to(words.dtype))

    handle = subject.encoder.model.get_input_embeddings().register_forward_hook(replaced)
    try:
        hidden = subject.run(batch)
    finally:
        handle.remove()
    assert subject.delta is not None
    return read(hidden, batch, batch.places, subject.delta.task, subject.head)
