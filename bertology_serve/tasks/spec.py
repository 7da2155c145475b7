"""The nouns of the tasks floor: what a delta is asked to answer, and one tokenised sequence."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from bertology_serve.config_fields import check_known, named_fields
from bertology_serve.errors import SpecError

CLASSIFICATION = "classification"
MULTI_LABEL = "multi-label"
REGRESSION = "regression"
TOKEN_CLASSIFICATION = "token-classification"
QUESTION_ANSWERING = "question-answering"
MULTIPLE_CHOICE = "multiple-choice"
EMBEDDING = "embedding"
ZERO_SHOT = "zero-shot"
SPARSE = "sparse"
MULTI_VECTOR = "multi-vector"
TASK_KINDS = (
    CLASSIFICATION,
    MULTI_LABEL,
    REGRESSION,
    TOKEN_CLASSIFICATION,
    QUESTION_ANSWERING,
    MULTIPLE_CHOICE,
    EMBEDDING,
    ZERO_SHOT,
    SPARSE,
    MULTI_VECTOR,
)
TEXT_KINDS = (CLASSIFICATION, MULTI_LABEL, REGRESSION)
"""Tasks that read one text or a pair, and answer once for it."""
LABEL_KINDS = (CLASSIFICATION, MULTI_LABEL)
"""Those whose answer is among labels, with a probability each."""
NAMED_KINDS = (*LABEL_KINDS, TOKEN_CLASSIFICATION, ZERO_SHOT)
"""Those that have labels, with names."""
POOLED_KINDS = (EMBEDDING, ZERO_SHOT)
"""Those without a head: a sequence's output is its pooled row [H]."""
VECTOR_KINDS = (EMBEDDING, SPARSE, MULTI_VECTOR)
"""Those whose answer is what texts are compared by."""
WHOLE_BATCH = (*VECTOR_KINDS, ZERO_SHOT)
"""Those whose loss compares all examples of a batch."""
IGNORED = -100
"""What torch and HuggingFace write where there is no label: no class, no term of the loss, counted by no metric."""
EVEN = 0.5
"""The threshold of a label for which none was found."""
POOLINGS = ("cls", "mean", "max")
HEADS = ("hf", "linear", "mlp", "none")
LONG = ("cut", "windows")
AGGREGATES = ("mean", "max")
LEAST_WINDOW = 8
MOST_PROMPTS, LONGEST_PROMPT = 64, 2000


@named_fields
@dataclass(frozen=True)
class TaskSpec:
    """What one delta answers.

    ``labels`` are the class names in logit order (BIO tags for token classification; empty where the task
    has none). ``max_length`` is the longest tokenised sequence in tokens, special tokens included. ``pooling``
    says which rows a sequence-level head reads: the first text row, or the mean or maximum over text rows.
    ``head`` is ``hf`` (the form that HuggingFace gives the family), ``linear`` (one linear layer on the pooled
    row), ``mlp`` (EH-FT's: a hidden layer of 2,048 between) or ``none`` (embeddings). ``max_answer_length`` is the
    longest answer in tokens, ``normalize`` scales embeddings to unit length. Without ``token_types`` question and
    context are of one type, as deltas from peft's question answering have it. With ``pairs`` a classification or
    regression was trained on pairs of texts alone, and refuses a single one; without it takes both. ``dimensions``
    are widths that embeddings were trained to be cut to (Matryoshka, Kusupati et al. 2022, arXiv 2205.13147). ``width``
    is the length of the vectors of multi-vector, and how many words of the vocabulary sparse weighs; ``max_terms`` how
    many weights it keeps (0: all); with ``skip_punctuation`` multi-vector has none for punctuation in documents.
    ``prompts`` are what an embedding of any kind reads before a text, by name (``query: `` before a ``query``,
    ``passage: `` before a ``document``); that of the empty name stands before texts whose call names none. ``ranges``
    are the least and the greatest value of each dimension of an embedding's vectors, by which they are made bytes.

    Zero-shot answers among the ``labels`` where a call brings none. ``label_texts``, one a label or none at all, are
    what is embedded of them, and ``template`` is put around those and a call's own, in place of ``{}``. ``scale`` times
    a cosine is a logit; ``bias`` is added to it where each label is judged for itself.

    Texts beyond ``max_length`` are cut at their end or, where ``long`` is ``windows``, read in windows of that length
    with ``stride`` tokens of overlap, as question answering always reads its context. ``aggregate`` says what becomes
    of the windows' outputs, before softmax or sigmoid: their mean, in which each window weighs as many tokens as are
    its own (``tasks.encoding``), or the largest of each; words are tagged by the window that they belong to.

    Raises SpecError for values that make no sense.
    """

    kind: str
    labels: tuple[str, ...] = ()
    max_length: int = 128
    pooling: str = "cls"
    head: str = "hf"
    stride: int = 64
    max_answer_length: int = 30
    normalize: bool = True
    token_types: bool = True
    pairs: bool = False
    thresholds: tuple[float, ...] = ()
    abstain: float = 0.0
    long: str = "cut"
    aggregate: str = "mean"
    dimensions: tuple[int, ...] = ()
    label_texts: tuple[str, ...] = ()
    template: str = "{}"
    scale: float = 20.0
    bias: float = -10.0
    width: int = 0
    max_terms: int = 0
    skip_punctuation: bool = True
    prompts: tuple[tuple[str, str], ...] = ()
    ranges: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        check_known("task", self.kind, TASK_KINDS)
        for name, known in _CHOICES.items():
            check_known(name, getattr(self, name), known)
        if self.max_length < 3:
            raise SpecError(f"max_length is {self.max_length}; at least 3 tokens are needed")
        if len(set(self.labels)) != len(self.labels):
            raise SpecError("labels repeat; each label must be named once")
        if self.kind in (*LABEL_KINDS, TOKEN_CLASSIFICATION) and not self.labels:
            raise SpecError(f"{self.kind} needs labels")
        if (self.head == "none") != (self.kind in POOLED_KINDS):
            raise SpecError(f"head {self.head!r} does not fit {self.kind}: {' and '.join(POOLED_KINDS)} have none")
        if self.pairs and self.kind not in TEXT_KINDS:
            raise SpecError(f"pairs does not fit {self.kind}; {', '.join(TEXT_KINDS)} read one text or two")
        if self.thresholds and (self.kind != MULTI_LABEL or len(self.thresholds) != len(self.labels)):
            raise SpecError(f"{len(self.thresholds)} thresholds do not fit {self.kind} of {len(self.labels)} labels")
        if not all(0 <= least <= 1 for least in (*self.thresholds, self.abstain)):
            raise SpecError("thresholds and abstain are probabilities; expected numbers from 0 to 1")
        if self.abstain and self.kind != CLASSIFICATION:
            raise SpecError(f"abstain does not fit {self.kind}; only classification may name no label")
        if self.kind in (SPARSE, MULTI_VECTOR) and self.head != "hf":
            raise SpecError(f"head {self.head!r} does not fit {self.kind}, whose head has its own form; leave it out")
        if self.width < (self.kind == MULTI_VECTOR) or (self.width and self.kind not in (SPARSE, MULTI_VECTOR)):
            raise SpecError(f"width {self.width} does not fit {self.kind}; multi-vector has 1 number or more")
        if self.max_terms < 0 or (self.max_terms and self.kind != SPARSE):
            raise SpecError(f"max_terms {self.max_terms} does not fit {self.kind}; {SPARSE} keeps so many weights")
        if self.long != "cut" and self.kind == MULTI_VECTOR:
            raise SpecError("multi-vector has a vector a token, and reads no text in windows; leave long out")
        if self.long != "cut" and self.kind == QUESTION_ANSWERING:
            raise SpecError("question answering reads windows anyway; leave long out")
        if self.reads_windows and self.max_length < LEAST_WINDOW:
            raise SpecError(f"max_length is {self.max_length}; windows need at least {LEAST_WINDOW} tokens")
        if self.aggregate != "mean" and (self.long == "cut" or self.per_token):
            raise SpecError(f"aggregate {self.aggregate!r} is for windows of a text that has one answer; leave it out")
        if self.dimensions and self.kind != EMBEDDING:
            raise SpecError(f"dimensions do not fit {self.kind}; only embeddings can be cut")
        if self.label_texts and (self.kind != ZERO_SHOT or len(self.label_texts) != len(self.labels)):
            raise SpecError(f"{len(self.label_texts)} label_texts do not fit {self.kind} of {len(self.labels)} labels")
        if "{}" not in self.template:
            raise SpecError(f"template is {self.template!r}; expected {{}} where a label's name goes")
        if not (0 < self.scale < math.inf and math.isfinite(self.bias)):
            raise SpecError(f"scale is {self.scale} and bias {self.bias}; expected finite numbers, scale above 0")
        if len(set(self.dimensions)) != len(self.dimensions) or min(self.dimensions, default=1) < 1:
            raise SpecError(f"dimensions are {self.dimensions}; expected widths from 1 up, each once")
        if self.prompts and self.kind not in VECTOR_KINDS:
            raise SpecError(f"prompts do not fit {self.kind}; only embeddings have them")
        sizes = {len(side) for side in self.ranges}
        fine = len(self.ranges) == 2 and len(sizes) == 1 and 0 not in sizes and not any(map(operator.gt, *self.ranges))
        if self.ranges and (self.kind != EMBEDDING or not fine):
            raise SpecError(f"ranges do not fit {self.kind}; expected the least and the greatest of each dimension")
        longest = max((len(part) for prompt in self.prompts for part in prompt), default=0)
        if len(dict(self.prompts)) < len(self.prompts) or len(self.prompts) > MOST_PROMPTS or longest > LONGEST_PROMPT:
            raise SpecError(
                f"there are {len(self.prompts)} prompts of at most {longest} characters; expected up to {MOST_PROMPTS} "
                f"of up to {LONGEST_PROMPT}, each name once"
            )

    @property
    def reads_windows(self) -> bool:
        """Whether a long text is read in windows."""
        return self.long == "windows" or self.kind == QUESTION_ANSWERING

    @property
    def outputs(self) -> int:
        """C: the width of the head's output (0 for those that have none)."""
        return {
            CLASSIFICATION: len(self.labels),
            MULTI_LABEL: len(self.labels),
            TOKEN_CLASSIFICATION: len(self.labels),
            REGRESSION: 1,
            MULTIPLE_CHOICE: 1,
            QUESTION_ANSWERING: 2,
            EMBEDDING: 0,
            ZERO_SHOT: 0,
            SPARSE: self.width,
            MULTI_VECTOR: self.width,
        }[self.kind]

    @property
    def per_token(self) -> bool:
        """Whether the head answers for every text row rather than once a sequence."""
        return self.kind in (TOKEN_CLASSIFICATION, QUESTION_ANSWERING, MULTI_VECTOR)

    @property
    def reads_rows(self) -> bool:
        """Whether the head reads every text row rather than a pooled one."""
        return self.per_token or self.kind == SPARSE

    @property
    def unit(self) -> bool:
        """Whether its vectors are brought to length 1."""
        return self.normalize and self.kind in (*POOLED_KINDS, MULTI_VECTOR)


_CHOICES = {"pooling": POOLINGS, "head": HEADS, "long": LONG, "aggregate": AGGREGATES}


@dataclass(frozen=True, slots=True)
class Encoding:
    """One tokenised sequence, special tokens included, not padded.

    ``offsets`` are character spans in the text that each token came from, ``parts`` says which text that was
    (0 first, 1 pair, -1 special token), ``words`` the word index for pre-split input (-1 special token, or a word that
    another window answers for; for multi-vector a token that has no vector). ``cut`` is how many tokens of the text
    were left out, to fit the maximum length. A window of a text that is no first one ``continues`` the sequence before
    it; ``own`` tokens belong to it.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...] = ()
    parts: tuple[int, ...] = ()
    words: tuple[int, ...] = ()
    cut: int = 0
    continues: bool = False
    own: int = 0

    def __len__(self) -> int:
        return len(self.ids)
