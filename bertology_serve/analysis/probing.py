"""``analyze probe``: what a linear probe can read from each layer, and how much of that is the probe's own doing."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.analysis.figures import Figure, LineChart
from bertology_serve.analysis.probe_tasks import (
    OF_WORDS,
    Control,
    ProbeItem,
    ProbeText,
    chosen,
    content_words,
    items,
    length_edges,
    make_text,
    sampled,
)
from bertology_serve.analysis.report import AnalysisReport, origin
from bertology_serve.analysis.settings import ProbeSettings
from bertology_serve.analysis.subject_model import (
    Advance,
    DeltaLike,
    EncoderLike,
    Subject,
    data_name,
    silent,
    text_rows,
)
from bertology_serve.data.records import DataLike, read_records
from bertology_serve.errors import DataError
from bertology_serve.files import JsonObject
from bertology_serve.tasks.heads import pool
from bertology_serve.tasks.logistic import LOOSE, Logistic, Solution
from bertology_serve.tasks.spec import Encoding


@dataclass(frozen=True)
class Side:
    """Texts to train or to judge probes on: the items of each task, and the features of all that they name."""

    texts: Sequence[ProbeText]
    items: dict[str, list[ProbeItem]]
    features: Features
    places: dict[tuple[int, int], int]

    def rows(self, task: str) -> Tensor:
        """[L + 1, items, H]."""
        own = self.items[task]
        if task not in OF_WORDS:
            return self.features.texts[:, [item.text for item in own]]
        return self.features.words[:, [self.places[item.text, item.row] for item in own]]


def probe(
    encoder: EncoderLike,
    data: DataLike,
    settings: ProbeSettings | None = None,
    *,
    eval: DataLike | None = None,
    delta: DeltaLike = None,
    advance: Advance = silent,
) -> AnalysisReport:
    """What a linear probe reads from each layer, beside control tasks (Hewitt and Liang 2019, arXiv 1909.03368).

    A probe a task and layer is trained on the records ``data`` (``text`` or ``tokens``; ``label``, ``tags`` or
    ``heads`` where those are probed) and judged on ``eval``; without it on a quarter of the records, drawn from the
    seed. All layers' features, [L + 1, items, H] float32, come from one pass; layer 0 is the embeddings.

    Table ``layers``: a row a task and layer, with accuracy, macro F1, cross-entropy in bits, selectivity (the accuracy
    minus that on the control task) and the online code (Voita and Titov 2020, arXiv 2003.12298). With ``settings.mix``
    also ``mix``, the layers' weights in a probe on all of them. Raises SpecError for tasks that the records cannot
    answer, DataError for records that are no single texts.
    """
    settings = settings or ProbeSettings()
    subject = Subject.of(encoder, delta)
    texts, judged = _texts(subject, data, eval, settings)
    tasks = chosen(settings.tasks or None, [*texts, *judged])
    edges, words = length_edges(texts), content_words(texts)
    started = time.perf_counter()
    train, held = (_side(subject, own, tasks, (edges, words), settings, advance) for own in (texts, judged))
    passed = time.perf_counter() - started
    table: list[JsonObject] = []
    mixes: list[JsonObject] = []
    layers = subject.encoder.anatomy.layers + 1
    for task in tasks:
        table += _probe_task(task, train, held, settings)
        mixes += _mixed(task, train, held, settings) if settings.mix else []
        advance(len(table), layers * len(tasks))
    facts = {
        **subject.facts(), "input": data_name(data), "eval": None if eval is None else data_name(eval),
        "texts": [len(texts), len(judged)],
        "items": {task: [len(side.items[task]) for side in (train, held)] for task in tasks},
        "length_edges_words": edges, "content_words": words,
        "best_layer": {task: _best_layer(table, task) for task in tasks},
        "mix": {row["task"]: {"accuracy": row["accuracy"], "centre": row["centre"]} for row in mixes},
        "pass_seconds": round(passed, 3), "seconds": round(time.perf_counter() - started, 3), **origin(),
    }  # fmt: skip
    return _report(subject, table, mixes, tasks, facts)


def _best_layer(table: Sequence[JsonObject], task: str) -> int:
    """The layer, 0 for the embeddings, that the task is read from best; the lowest of equals."""
    rows = [row for row in table if row["task"] == task]
    return int(max(rows, key=lambda row: row["accuracy"])["layer"])


def _texts(
    subject: Subject, data: DataLike, eval: DataLike | None, settings: ProbeSettings
) -> tuple[list[ProbeText], list[ProbeText]]:
    tokenizer, length = subject.encoder.tokenizer, subject.longest(settings.max_length)
    read = [
        [make_text(record, tokenizer, length) for record in read_records(source)[: settings.most]]
        for source in (data, eval)
        if source is not None
    ]
    if eval is not None:
        return read[0], read[1]
    order = random.Random(settings.seed).sample(range(len(read[0])), len(read[0]))
    held = sorted(order[: max(1, len(order) // 4)])
    if len(order) < 2:
        raise DataError(f"{data_name(data)}: holds one record; expected more, or records to judge on (--eval FILE)")
    return [text for i, text in enumerate(read[0]) if i not in set(held)], [read[0][i] for i in held]


def _side(
    subject: Subject, texts: list[ProbeText], tasks: Sequence[str], classes: tuple[Sequence[float], Sequence[str]],
    settings: ProbeSettings, advance: Advance,
) -> Side:  # fmt: skip
    found = {task: sampled(items(task, texts, *classes), settings.rows, settings.seed) for task in tasks}
    wanted: list[set[int]] = [set() for _ in texts]
    for task in set(OF_WORDS) & set(tasks):
        for item in found[task]:
            wanted[item.text].add(item.row)
    rows = [sorted(own) for own in wanted]
    named = [(number, row) for number, own in enumerate(rows) for row in own]
    places = {key: place for place, key in enumerate(named)}
    encodings = [text.encoding for text in texts]
    features = gather(subject, encodings, rows, settings.pooling, settings.max_tokens, advance)
    return Side(texts, found, features, places)


def _probe_task(task: str, train: Side, judged: Side, settings: ProbeSettings) -> list[JsonObject]:
    """One row a layer."""
    control = Control(train.items[task], settings.seed)
    real, index = _answers(task, train, judged)
    random_ones = [torch.tensor([index[control.answer(item)] for item in side.items[task]]) for side in (train, judged)]
    common = Counter(real[0].tolist()).most_common(1)[0][0]
    majority = (real[1] == common).double().mean().item()
    rows = []
    for layer, (x, held) in enumerate(zip(train.rows(task), judged.rows(task), strict=True)):
        own = score(fit(x, real[0], len(index), settings.penalty), held, real[1])
        other = score(fit(x, random_ones[0], len(index), settings.penalty), held, random_ones[1])
        code = online_code(x, real[0], len(index), settings.penalty, settings.seed) if settings.code else None
        flat = len(real[0]) * math.log2(len(index))
        rows.append({
            "task": task, "layer": layer, "accuracy": own.accuracy, "macro_f1": own.macro_f1, "bits": own.bits,
            "control_accuracy": other.accuracy, "selectivity": own.accuracy - other.accuracy, "majority": majority,
            "code_kbits": None if code is None else code / 1000, "compression": flat / code if code else None,
        })  # fmt: skip
    return rows


def _answers(task: str, train: Side, judged: Side) -> tuple[list[Tensor], dict[str, int]]:
    """The right answers of both sides as numbers, and the number of each."""
    names = sorted({item.answer for side in (train, judged) for item in side.items[task]})
    index = {name: number for number, name in enumerate(names)}
    return [torch.tensor([index[item.answer] for item in side.items[task]]) for side in (train, judged)], index


def _mixed(task: str, train: Side, judged: Side, settings: ProbeSettings) -> list[JsonObject]:
    """One row a layer, of the probe on a mix of all of them."""
    real, index = _answers(task, train, judged)
    found = fit_mix(train.rows(task), real[0], judged.rows(task), real[1], len(index), settings.penalty)
    return [
        {"task": task, "layer": layer, "weight": weight, "accuracy": found.accuracy, "centre": found.centre}
        for layer, weight in enumerate(found.weights.tolist())
    ]


def _report(
    subject: Subject, table: list[JsonObject], mixes: list[JsonObject], tasks: Sequence[str],
    facts: JsonObject,
) -> AnalysisReport:  # fmt: skip
    layers = sorted({row["layer"] for row in table})

    def lines(rows: Sequence[JsonObject], column: str, title: str, unit: str) -> LineChart:
        curves = {task: [row[column] for row in rows if row["task"] == task] for task in tasks}
        return LineChart(title, layers, curves, "layer (0: embeddings)", unit)

    shown = [
        ("accuracy", "what a linear probe reads", "accuracy (fraction)"),
        ("macro_f1", "every class counting the same", "macro F1 (fraction)"),
        ("selectivity", "less what it learns by heart", "selectivity (fraction)"),
        ("bits", "what it leaves open", "cross-entropy (bits)"),
        ("compression", "online code against a uniform one", "compression (times shorter)"),
    ]
    panels = [lines(table, *one) for one in shown if any(row[one[0]] is not None for row in table)]
    if mixes:
        panels.append(lines(mixes, "weight", "where a mix of all layers reads", "weight of the layer (fraction)"))
    tables = {"layers": table} | ({"mix": mixes} if mixes else {})
    return AnalysisReport("probe", facts, tables, {"layers": Figure(f"Linear probes: {subject.name}", panels, 2)})


@dataclass(frozen=True)
class Features:
    """``texts`` [L + 1, sequences, H] pooled, ``words`` [L + 1, wanted rows, H]; float32 on the CPU, layer 0 embeds."""

    texts: Tensor
    words: Tensor


@torch.inference_mode()
def gather(
    subject: Subject,
    encodings: Sequence[Encoding],
    wanted: Sequence[Sequence[int]],
    pooling: str = "mean",
    max_tokens: int = 4096,
    advance: Advance = silent,
) -> Features:
    """Features of each sequence, and of its ``wanted`` rows (numbers within the text), in the order given."""
    anatomy = subject.encoder.anatomy
    firsts = [0]
    for rows in wanted:
        firsts.append(firsts[-1] + len(rows))
    texts = torch.empty(anatomy.layers + 1, len(encodings), anatomy.hidden)
    words = torch.empty(anatomy.layers + 1, firsts[-1], anatomy.hidden)
    done = 0
    for members, batch, layers in subject.passes(encodings, max_tokens):
        owners = [members[original] for original in batch.order]
        lengths = torch.tensor(batch.text_lengths, device=batch.ids.device)
        chosen = [own[list(wanted[i])] for i, own in zip(owners, text_rows(batch), strict=True)]
        places = torch.cat([torch.arange(firsts[i], firsts[i + 1]) for i in owners])
        for layer, hidden in layers.items():
            texts[layer, owners] = pool(hidden, batch.text_rows, lengths, pooling).float().cpu()
            words[layer, places] = hidden[torch.cat(chosen)].float().cpu()
        done += len(members)
        advance(done, len(encodings))
    return Features(texts, words)


CLOSE = 1e-5  # of each probe's gradient: what is left to gain is below what a probe's scores show


def fit(x: Tensor, y: Tensor, classes: int, penalty: float, tolerance: float = CLOSE) -> Solution:
    """Minimises mean cross-entropy + penalty / 2 ‖W‖² over standardised features: no seed, the same answer every time.

    x [n, H], y [n] int64 below ``classes``. Features without variance get a standard deviation of 1.
    """
    rows_of_w = 2.0 if classes == 2 else 1.0  # the solver penalises the one vector w, of which W holds two halves
    return Logistic(x, F.one_hot(y, classes).double(), by_feature=True).solve(
        rows_of_w / (penalty * len(x)), tolerance=tolerance
    )


@dataclass(frozen=True)
class ProbeScore:
    """``accuracy`` and ``macro_f1`` as fractions, ``bits``: mean cross-entropy."""

    accuracy: float
    macro_f1: float
    bits: float


def score(probe: Solution, x: Tensor, y: Tensor) -> ProbeScore:
    """How a probe does on x [n, H] with the right classes y [n]; F1 over the classes that occur or are answered."""
    logits = probe.logits(x)
    found = logits.argmax(1)
    classes = torch.unique(torch.cat([y, found])).tolist()
    scores = []
    for label in classes:
        hits = ((y == label) & (found == label)).sum().item()
        scores.append(2 * hits / ((y == label).sum().item() + (found == label).sum().item()))
    return ProbeScore(
        accuracy=(found == y).double().mean().item(),
        macro_f1=sum(scores) / len(scores),
        bits=F.cross_entropy(logits, y).item() / math.log(2),
    )


@dataclass(frozen=True)
class Mix:
    """``weights`` [L + 1] of the layers, of sum 1; ``accuracy`` of the probe on held-out rows."""

    weights: Tensor
    accuracy: float

    @property
    def centre(self) -> float:
        """The mean layer, weighted."""
        return float((self.weights * torch.arange(len(self.weights))).sum())


def fit_mix(x: Tensor, y: Tensor, held: Tensor, gold: Tensor, classes: int, penalty: float, steps: int = 40) -> Mix:
    """Learns softmax weights over layers and one linear probe together, by L-BFGS from equal weights.

    x [L + 1, n, H] and ``held`` alike, standardised layer by layer with x's statistics; y [n], ``gold`` alike, int64.
    The objective is that of ``fit``; not convex in the weights, but without any random start.
    """
    mean, std = x.mean(1, keepdim=True), x.std(1, unbiased=False, keepdim=True)
    std = torch.where(std > 1e-7, std, torch.ones_like(std))
    features, others = (x - mean) / std, (held - mean) / std
    mix = torch.zeros(len(x), dtype=x.dtype, requires_grad=True)
    weight = torch.zeros(classes, x.shape[2], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([mix, weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def logits(rows: Tensor) -> Tensor:
        return F.linear(torch.einsum("l,lnh->nh", mix.softmax(0), rows), weight, bias)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(logits(features), y) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        accuracy = (logits(others).argmax(1) == gold).double().mean().item()
    return Mix(mix.detach().softmax(0), accuracy)


SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
FEWEST = 16  # examples of the first block


def online_code(x: Tensor, y: Tensor, classes: int, penalty: float, seed: int) -> float:
    """Bits for all labels y [n] given x [n, H]; the order is drawn from the seed."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    ends = block_ends(len(y))
    bits = ends[0] * math.log2(classes)
    for start, end in pairwise(ends):
        logits = fit(x[:start], y[:start], classes, penalty, LOOSE).logits(x[start:end])
        bits += F.cross_entropy(logits, y[start:end], reduction="sum").item() / math.log(2)
    return bits


def block_ends(count: int) -> list[int]:
    """Where the blocks of so many examples end, the last at their end."""
    ends = [round(share * count) for share in SHARES]
    return sorted({end for end in ends if end >= min(FEWEST, count)})
