"""Task heads: rows of the encoder's last hidden state -> logits, in the form that HuggingFace gives each family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bertology_serve.errors import FormatError, SpecError, Unsupported, nearest
from bertology_serve.families import FAMILIES, family_named
from bertology_serve.families.bert_layers import UndrawnLinear
from bertology_serve.families.compat import activation
from bertology_serve.families.family import Dense, Family, HeadForm, HeadShape, Options, classifier, token_vectors
from bertology_serve.tasks import spec as tasks
from bertology_serve.tasks.spec import Encoding, TaskSpec

__all__ = ["Dense", "Head", "head_form", "pool"]


class WordScores(nn.Module):
    """Rows [n, E] times the encoder's word embeddings [V, E], which stay the encoder's, plus a bias [V] -> [n, V]."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.words = list[Tensor]()  # the embeddings; in a list: no parameter of the head

    @property
    def weight(self) -> Tensor:
        return self.words[0]

    def forward(self, rows: Tensor) -> Tensor:
        kind = self.weight.dtype
        return F.linear(rows.to(kind), self.weight, self.bias.to(kind)).to(rows.dtype)

    def peaks(self, rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """The largest score [V] of each word in each part of the rows, of these sizes.

        Words come in blocks whose scores stay in a processor's cache: half the time of all at once.
        """
        kind, found = self.weight.dtype, []
        for weight, bias in zip(torch.split(self.weight, BLOCK), torch.split(self.bias.to(kind), BLOCK), strict=True):
            scores = F.linear(rows.to(kind), weight, bias).to(rows.dtype)
            found.append([part.amax(0) for part in torch.split(scores, list(sizes))])
        return tuple(torch.cat(own) for own in zip(*found, strict=True))


class Layer(nn.Module):
    """One ``Dense`` with parameters: dropout, linear (zero until drawn), activation, LayerNorm (weight 1, bias 0).

    ``forward``: rows [n, inputs] -> [n, outputs].
    """

    def __init__(self, form: Dense, dropout: float) -> None:
        super().__init__()
        self.form = form
        self.dropout = nn.Dropout(dropout if form.dropout else 0.0)
        self.linear: nn.Linear | WordScores = (
            WordScores(form.outputs) if form.tied else UndrawnLinear(form.inputs, form.outputs, bias=form.bias)
        )
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)
        self.activation = nn.Identity() if form.activation is None else activation(form.activation)
        self.norm = nn.LayerNorm(form.outputs, form.norm_eps, bias=form.norm_bias) if form.norm else None

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.activation(self.linear(self.dropout(rows)))
        return rows if self.norm is None else self.norm(rows)

    def named(self) -> Iterator[tuple[str, str | None, nn.Parameter]]:
        """(name in HuggingFace's task model, name in the base or None, parameter) of everything trained here."""
        for part, path, base in self.parts():
            for name, parameter in part.named_parameters():
                yield f"{path}.{name}", f"{base}.{name}" if base else None, parameter

    def parts(self) -> Iterator[tuple[nn.Module, str, str | None]]:
        """Linear and norm, each with its name in HuggingFace's task model and in the base, or None."""
        yield self.linear, self.form.path, self.form.base_name
        if self.norm is not None:
            yield self.norm, str(self.form.norm), self.form.base_norm


class Head(nn.Module):
    """Layers in HuggingFace's form, in float32 unless moved. ``forward``: rows [n, H] -> [n, C].

    A head without layers (embeddings) hands the rows through. What the base checkpoint brings is frozen and is not
    among ``own_tensors``; everything else belongs to the delta.
    """

    def __init__(self, form: Sequence[Dense], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dense, dropout) for dense in form)
        self._base: set[str] = set()

    @classmethod
    def build(
        cls,
        form: Sequence[Dense],
        base_tensors: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        dropout: float = 0.0,
        adopt: bool = False,
        words: Tensor | None = None,
    ) -> Head:
        """A fresh head: linear weights from N(0, std²) of their form, biases 0, LayerNorms 1 and 0.

        Without a ``generator`` the weights stay zero, for ``load`` to fill. Parts whose base name is in
        ``base_tensors`` are copied from there and frozen; with ``adopt`` (full fine-tuning) they are copied, trained,
        and belong to the delta. ``words`` are the encoder's word embeddings [V, E], for layers that are tied to them.
        Raises FormatError where those are for another vocabulary.
        """
        for dense in form:
            if dense.tied and (words is None or words.shape != (dense.outputs, dense.inputs)):
                found = None if words is None else list(words.shape)
                raise FormatError(f"the head weighs {dense.outputs} words, but the encoder's are {found}; train again")
        head = cls(form, dropout)
        if words is not None:
            head.tie(words)
        with torch.no_grad():
            for std, (name, base, parameter) in head._drawn():
                if base is not None and base in base_tensors:
                    _copy(name, parameter, base_tensors[base])
                    parameter.requires_grad_(adopt)
                    if not adopt:
                        head._base.add(name)
                elif parameter.dim() == 2 and generator is not None:
                    parameter.normal_(0.0, std, generator=generator)
        return head

    def tie(self, words: Tensor) -> None:
        """Takes the encoder's word embeddings [V, E] for layers that are tied to them."""
        for layer in self.layers:
            if isinstance(layer.linear, WordScores):
                layer.linear.words = [words]

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = layer(rows)
        return rows

    def read(self, rows: Tensor, lengths: Sequence[int], task: TaskSpec) -> Tensor:
        """What the head gives for the rows that it reads (``batch.read_rows``): [n, H] -> [n, C].

        Of ``sparse``, for all rows of texts of these lengths, [S, V]: ``log(1 + max(0, s))`` of each word's largest
        score s in any row of a text (Formal et al. 2021, arXiv 2109.10086). The scores [n, V] are made, and in training
        made again, in chunks of 64 rows.
        """
        if task.kind != tasks.SPARSE:
            return self(rows)  # type: ignore[no-any-return]
        *before, last = self.layers
        for layer in before:
            rows = layer(rows)
        words = last.linear
        assert isinstance(words, WordScores)
        found: list[Tensor | None] = [None] * len(lengths)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        at = 0
        for parts in _chunks(lengths, CHUNK):
            sizes = [size for _, size in parts]
            own = rows[at : at + sum(sizes)], sizes
            peaks = again(words.peaks, *own) if torch.is_grad_enabled() else words.peaks(*own)
            at += sum(sizes)
            for (text, _), peak in zip(parts, peaks, strict=True):
                known = found[text]
                found[text] = peak if known is None else torch.maximum(known, peak)
        return torch.stack([one for one in found if one is not None]).relu().log1p()

    def named(self) -> Iterator[tuple[str, str | None, nn.Parameter]]:
        """(name in HuggingFace's task model, name in the base or None, parameter) of every parameter."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield from layer.named()

    def _drawn(self) -> Iterator[tuple[float, tuple[str, str | None, nn.Parameter]]]:
        """What ``named`` gives, each with the deviation that it is drawn from."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield from ((layer.form.std, entry) for entry in layer.named())

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors that belong to the delta, by their HuggingFace names: detached float32 CPU copies."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, _, parameter in self.named()
            if name not in self._base
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies a delta's head tensors in; FormatError when one is missing, unknown or of another shape.

        A tensor for a part that the base brought replaces it (full fine-tuning) and is the delta's from then on.
        """
        parameters = {name: parameter for name, _, parameter in self.named()}
        for name in tensors:
            if name not in parameters:
                raise FormatError(f"this head has no tensor {name!r}; {nearest(name, parameters)}")
        missing = sorted(parameters.keys() - self._base - tensors.keys())
        if missing:
            raise FormatError(f"the head lacks {', '.join(missing)}; save every parameter that the base lacks")
        with torch.no_grad():
            for name, tensor in tensors.items():
                _copy(name, parameters[name], tensor)
        self._base -= tensors.keys()

    def share(self, base_tensors: Mapping[str, Tensor]) -> None:
        """Reads what the base brought from the base's own tensors, not from a copy; for heads that are not trained."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            for part, path, base in layer.parts():
                for name in [name for name, _ in part.named_parameters() if f"{path}.{name}" in self._base]:
                    setattr(part, name, nn.Parameter(base_tensors[f"{base}.{name}"], requires_grad=False))

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Starts from another head's own tensors; what they lack stays as it is."""
        with torch.no_grad():
            for name, _, parameter in self.named():
                if name in tensors:
                    _copy(name, parameter, tensors[name])


CHUNK, BLOCK = 64, 2048
"""Rows whose scores of all words are held at once, for the backward pass; and words that are scored at once."""


def _chunks(lengths: Sequence[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """Texts of these lengths in groups of at most so many rows: (text, how many of its rows come next)."""
    group, room = list[tuple[int, int]](), most
    for text, length in enumerate(lengths):
        while length:
            size = min(length, room)
            group.append((text, size))
            length, room = length - size, room - size
            if not room:
                yield group
                group, room = [], most
    if group:
        yield group


def pool(hidden: Tensor, text_rows: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """One row a sequence: hidden [T, H] -> [S, H], differentiable.

    ``text_rows`` [N] (int64) are the packed rows that are text, sequence after sequence, special tokens included and
    prompts not; ``lengths`` [S] (int64, each at least 1) how many each sequence has. ``cls`` takes the first text
    row, ``mean`` and ``max`` go over all of them.
    """
    if pooling == "cls":
        return hidden[text_rows[lengths.cumsum(0) - lengths]]
    rows = hidden[text_rows]
    owner = torch.repeat_interleave(torch.arange(lengths.numel(), device=rows.device), lengths)
    pooled = rows.new_zeros(lengths.numel(), rows.shape[1])
    if pooling == "mean":
        return pooled.index_add(0, owner, rows) / lengths.unsqueeze(1)
    if pooling == "max":
        return pooled.scatter_reduce(0, owner.unsqueeze(1).expand_as(rows), rows, "amax", include_self=False)
    raise SpecError(f"unknown pooling {pooling!r}; {nearest(pooling, ('cls', 'mean', 'max'))}")


def aggregate(out: Tensor, encodings: Sequence[Encoding], task: TaskSpec) -> Tensor:
    """One row a text: the head's output [S, C] of all sequences -> [N, C], differentiable; as it is without windows.

    Windows of a text are put together as ``task.aggregate`` says (Sun et al. 2019, arXiv 1905.05583, do it one layer
    before: the mean comes to the same under a linear head); of embeddings that are normalised, as they would be
    answered; of words the largest weight counts. Tasks that answer for every token have no such rows.
    """
    if task.per_token or not any(encoding.continues for encoding in encodings):
        return out
    firsts = [row for row, encoding in enumerate(encodings) if not encoding.continues]
    found = []
    for first, last in pairwise([*firsts, len(encodings)]):
        rows = F.normalize(out[first:last]) if task.unit and last > first + 1 else out[first:last]
        if task.aggregate == "max" or task.kind == tasks.SPARSE:
            found.append(rows.amax(0))
        else:
            own = rows.new_tensor([encoding.own for encoding in encodings[first:last]])
            found.append((own / own.sum()) @ rows)
    return torch.stack(found)


def outputs_of(out: Tensor, encodings: Sequence[Sequence[Encoding]], task: TaskSpec) -> list[list[Tensor]]:
    """For each example the outputs that ``Task.decode`` takes; ``out`` is as ``Task.loss`` takes it."""
    lengths = [len(one) for own in encodings for one in own]
    parts = iter(torch.split(out, lengths) if task.per_token else out.unbind(0))
    return [[next(parts) for one in own if task.per_token or not one.continues] for own in encodings]


def _copy(name: str, parameter: Tensor, tensor: Tensor) -> None:
    if parameter.shape != tensor.shape:
        raise FormatError(f"head tensor {name!r} has shape {list(tensor.shape)}; expected {list(parameter.shape)}")
    parameter.copy_(tensor)


MLP_WIDTH, MLP_STD = 2048, 0.005


def head_form(family: str, prefix: str, spec: TaskSpec, hidden: int, options: Options) -> tuple[Dense, ...]:
    """The layers of a head, first to last; empty for embeddings.

    ``family`` is the model type of the configuration ("bert", "deberta-v2"), ``prefix`` the name of the encoder in
    HuggingFace's task models ("bert", "roberta", "model"), ``hidden`` is H, ``options`` are values of the model's
    configuration (``classifier_activation``, ``norm_eps`` ...; what is missing takes its default there). Multiple
    choice and regression read the pooled row as classification does, with C = 1. Raises Unsupported where the form
    that HuggingFace gives the family is not known.
    """
    if spec.head == "none":
        return ()
    if spec.head == "mlp":
        return _mlp(spec, hidden)
    form = classifier if spec.head == "linear" else _form(family_named(family), spec.kind)
    if form is None:
        known = [name for name, other in FAMILIES.items() if _form(other, spec.kind) is not None]
        raise Unsupported(
            f"transformers' head of {family} for {spec.kind} is not known here, so that answers could differ; "
            f"train with --head linear, or take another encoder; {nearest(family, known)}"
        )
    if spec.kind == tasks.SPARSE and options.get("tie_word_embeddings") is False:
        raise Unsupported(
            f"the scores of words of this {family} are not made by its word embeddings (tie_word_embeddings is false), "
            "and a delta would have to hold a matrix of that size; take another encoder"
        )
    return form(HeadShape(prefix, hidden, spec.outputs, options))


def _form(family: Family, kind: str) -> HeadForm | None:
    forms = {
        tasks.TOKEN_CLASSIFICATION: family.tokens,
        tasks.QUESTION_ANSWERING: family.answers,
        tasks.MULTIPLE_CHOICE: family.choice,
        tasks.SPARSE: family.words,
        tasks.MULTI_VECTOR: token_vectors,
    }
    return forms.get(kind, family.sequence)


def head_pooling(family: str, kind: str, options: Options) -> str:
    """Which rows the head of HuggingFace's task model reads: ``cls``, ``mean``, or what the configuration says."""
    own = family_named(family)
    setting = {
        tasks.TOKEN_CLASSIFICATION: "",
        tasks.QUESTION_ANSWERING: "",
        tasks.MULTIPLE_CHOICE: own.choice_reads,
    }.get(kind, own.reads)
    read = str(options.get(setting, "cls"))
    return "cls" if read == "first" else read


def _mlp(spec: TaskSpec, hidden: int) -> tuple[Dense, ...]:
    """The head of EH-FT's authors (Yang et al. 2022, arXiv 2210.16771): H -> 2048 -> C, weights from N(0, 0.005²)."""
    first = Dense("classifier.dense", hidden, MLP_WIDTH, "relu", std=MLP_STD)
    return first, Dense("classifier.out_proj", MLP_WIDTH, spec.outputs, std=MLP_STD)
