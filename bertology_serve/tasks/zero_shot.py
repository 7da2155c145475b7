"""Classification among labels that each call brings: the encoder embeds the labels' texts as it does the text.

A label's logit is the cosine of both rows times ``TaskSpec.scale``. The row of a label is the same whatever the text,
so whoever answers may keep it (``RowCache``), and a call with known labels costs its text alone.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.base import Answer
from bertology_serve.tasks.classification import Classification, ClassificationExample, Target
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.fields import Record, Records, kind_of, optional_text, read_texts
from bertology_serve.tasks.spec import EVEN, ZERO_SHOT, Encoding, TaskSpec

MOST_LABELS, LONGEST_LABEL = 1000, 500
NEGATIVES = 2
"""Labels that are drawn for each row of training, beside those that its batch has anyway."""
_CAPITALISED = re.compile(r"([A-Z][a-z]+){2,}")


@dataclass(frozen=True)
class ZeroShotExample(ClassificationExample):
    """``labels`` are those to choose from, ``label_texts`` what is embedded of each; ``several`` may apply."""

    labels: tuple[str, ...] = ()
    label_texts: tuple[str, ...] = ()
    several: bool = False


class Drawn(int):
    """The gold label's index as a training target; ``others`` are those of labels that it is compared with."""

    others: tuple[int, ...]

    def __new__(cls, gold: int, others: Sequence[int]) -> Drawn:
        made = super().__new__(cls, gold)
        made.others = tuple(others)
        return made


class ZeroShot(Classification):
    """Records ``{"text", "text_pair"?, "labels"?, "multi_label"?, "template"?}``, to train ``{"text", "label"}``.

    A call without ``labels`` is answered among the spec's own. ``template`` makes a label's text of its name, ``{}``.
    Answers ``label``, its ``score`` and the ``scores`` of all labels (softmax), best first; with ``multi_label``, or
    of a single label, ``labels`` that reach 0.5, each for itself (sigmoid with the spec's bias).
    """

    kind = ZERO_SHOT

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self._texts = dict(zip(spec.labels, spec.label_texts, strict=False))

    def among(self, records: Records) -> TaskSpec:
        """The spec with the labels of labelled records in the place of its own; known ones keep their texts."""
        labels = self.labels_in(records)
        return replace(self.spec, labels=labels, label_texts=tuple(map(self._text, labels)))

    def example(self, record: Record, where: str, labelled: bool) -> ZeroShotExample:
        found = super().example(record, where, labelled)
        names = self.spec.labels if labelled else _asked(record, where) or self.spec.labels
        if not names:
            raise DataError(f"{where}: field 'labels' is missing; expected the labels to choose from")
        several = False if labelled else record.get("multi_label", False)
        if not isinstance(several, bool):
            raise DataError(f"{where}: field 'multi_label' is {kind_of(several)}; expected true or false")
        template = (None if labelled else optional_text(record, where, "template")) or self.spec.template
        if "{}" not in template or len(template) > LONGEST_LABEL:
            raise DataError(
                f"{where}: field 'template' is {kind_of(template)}; expected a text of up to {LONGEST_LABEL} "
                "characters with {} where a label's name goes"
            )
        texts = tuple(template.replace("{}", self._text(name)) for name in names)
        own = (found.where, found.text, found.text_pair, found.label, found.shares)
        return ZeroShotExample(*own, names, texts, several or len(names) == 1)

    def _text(self, name: str) -> str:
        return self._texts.get(name) or readable(name)

    def beside(self, example: ClassificationExample) -> Sequence[str]:
        assert isinstance(example, ZeroShotExample)
        return example.label_texts

    def encode_beside(self, text: str, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        """The sequence of one label. Raises DataError where it is longer than the delta reads."""
        found = encode_text(tokenizer, text, None, self.spec.max_length)
        if found.cut:
            raise DataError(
                f"the label {text[:40]!r} has {found.cut} tokens too many: this delta reads {self.spec.max_length}; "
                "expected a shorter one"
            )
        return replace(found, own=len(found))  # as a text that is read in windows has it

    def compared(self, rows: Tensor, beside: Tensor) -> Tensor:
        """The logits [N, K] of texts' rows [N, H] and labels' rows [K, H]."""
        return self.spec.scale * F.normalize(rows.float()) @ F.normalize(beside.float()).T

    def target(self, example: ClassificationExample, encodings: Sequence[Encoding]) -> Target:
        return self.index[str(example.label)]

    def drawn(self, targets: Sequence[int], seed: int) -> list[Drawn]:
        """Training targets, each with a few other labels of the set, drawn evenly."""
        generator, known = random.Random(seed), sorted(set(targets))
        found = []
        for target in targets:
            others = generator.sample(known, min(NEGATIVES + 1, len(known)))
            found.append(Drawn(target, [label for label in others if label != target][:NEGATIVES]))
        return found

    def loss(self, out: Tensor, lengths: Sequence[int], targets: Sequence[Target]) -> Tensor:
        """Cross-entropy of logits [S, K]. In training ``out`` are rows: for each ``Drawn`` target that of its text, of
        its label and of the others drawn; a text is then compared with all labels of the batch, each taken once.
        """
        drawn = [target for target in targets if isinstance(target, Drawn)]
        if len(out) == len(targets):
            return super().loss(out, lengths, targets)
        texts, firsts, at = list[int](), dict[int, int](), 0
        for target in drawn:
            texts.append(at)
            for place, label in enumerate((int(target), *target.others), at + 1):
                firsts.setdefault(label, place)
            at += 2 + len(target.others)
        columns = {label: column for column, label in enumerate(firsts)}
        logits = self.compared(out[texts], out[list(firsts.values())])
        gold = torch.tensor([columns[int(target)] for target in drawn], device=out.device)
        return F.cross_entropy(logits, gold, reduction="sum")

    def bias(self, logits: Tensor, targets: Sequence[Target]) -> float:
        """The bias b with which sigmoid(logits [n, K] + b) names as many labels as there are: the likeliest one."""
        high = float(logits.abs().max()) + 30.0
        low = -high
        for _ in range(60):
            middle = (low + high) / 2
            more = float((logits.double() + middle).sigmoid().sum()) < len(targets)
            low, high = (middle, high) if more else (low, middle)
        return (low + high) / 2

    def decode(
        self, example: ClassificationExample, encodings: Sequence[Encoding], outputs: Sequence[Tensor]
    ) -> Answer:
        """``outputs`` are the logits [K] of the example's labels."""
        assert isinstance(example, ZeroShotExample)
        logits = outputs[0].double()
        numbers = (logits + self.spec.bias).sigmoid() if example.several else logits.softmax(-1)
        ranked = sorted(zip(example.labels, numbers.tolist(), strict=True), key=lambda pair: -pair[1])
        if example.several:
            return {"labels": [label for label, score in ranked if score >= EVEN], "scores": dict(ranked)}
        return {"label": ranked[0][0], "score": ranked[0][1], "scores": dict(ranked)}


def readable(name: str) -> str:
    """A label's name as words: ``card_arrival`` -> ``card arrival``, ``PlayMusic`` -> ``Play Music``."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) if _CAPITALISED.fullmatch(name) else name
    return " ".join(spaced.replace("_", " ").split()) or name


def read_label_texts(path: str, labels: Sequence[str]) -> tuple[str, ...]:
    """The text of each label from a JSON file ``{"name": "what is embedded"}``; of those that it lacks the name.

    Raises SpecError for a file that is none, or that names no label.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise SpecError(f"label_texts {path}: {problem}; expected a JSON file of texts by label") from None
    if not isinstance(found, dict) or not all(isinstance(text, str) and text.strip() for text in found.values()):
        raise SpecError(f"label_texts {path}: it is no object of texts; expected {{'label': 'its text'}}")
    if not found.keys() & set(labels):
        raise SpecError(f"label_texts {path}: it names none of the labels ({', '.join(labels[:5])} ...)")
    return tuple(found.get(label) or readable(label) for label in labels)


def _asked(record: Record, where: str) -> tuple[str, ...]:
    """The labels that a call brings; empty where it brings none."""
    if record.get("labels") is None:
        return ()
    names = tuple(name.strip() for name in read_texts(record, where, "labels", 1, MOST_LABELS))
    longest = max(names, key=len)
    if len(longest) > LONGEST_LABEL:
        raise DataError(
            f"{where}: field 'labels' has one of {len(longest)} characters; at most {LONGEST_LABEL} are taken"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{where}: field 'labels' has a label twice; expected each once")
    return names
