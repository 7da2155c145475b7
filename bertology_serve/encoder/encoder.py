"""The shared backbone: one frozen BERT-like model, its tokenizer and its anatomy."""

from __future__ import annotations

import hashlib
import inspect
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import MANIFEST
from bertology_serve.deltas.delta import BaseRef, Delta, EncoderShape
from bertology_serve.deltas.pruning import Pruning, fitted, sliced_state
from bertology_serve.encoder import linear
from bertology_serve.encoder.anatomy import EXPECTED, attention_modules, find_anatomy
from bertology_serve.encoder.attention import HALVES, make_layout
from bertology_serve.encoder.bank import BARE, NEVER, PROMPT, BankEntry, DeltaBank, LiveBank
from bertology_serve.encoder.batch import BatchPlan, Fork, PackedBatch, make_plan, pack
from bertology_serve.encoder.forward_context import CurrentContext, DeltaRows, ForwardContext, HeadAttention, recomputed
from bertology_serve.encoder.linear import Prepacked, SlotLinear, pays, wrap
from bertology_serve.encoder.loading import (
    LoadProof,
    agree,
    check_vocabulary,
    keep_freed_memory,
    load_model,
    load_tokenizer,
    locate,
    read_pruning,
    read_sentence_task,
)
from bertology_serve.encoder.sharing import share
from bertology_serve.errors import BertologyError, LimitError, SpecError, Unsupported
from bertology_serve.families import compat, family_named
from bertology_serve.kernels.dispatch import BatchColumns
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.slots import KEY, QUERY, Anatomy
from bertology_serve.tasks.heads import Head, head_form
from bertology_serve.tasks.spec import EMBEDDING, Encoding, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bertology_serve.encoder.cuda_graphs import Graphs, Record
    from bertology_serve.families.compat import HiddenModel, HiddenOutput

log = logging.getLogger(__name__)


class Encoder:
    """A frozen encoder that takes packed batches with the deltas of their sequences applied.

    ``model`` is the headless HuggingFace model, its linears and norms wrapped; ``base_head`` holds what the base
    checkpoint has of a head (BERT's pooler), by its name there; ``packs`` says whether rows travel unpadded, and
    ``packing`` in words: "packed" or "padded", and why; ``pruning`` what it was pruned from, if it was;
    ``sentence`` is what a sentence encoder answers by itself, as its checkpoint says; None for others, and, with a
    ``refusal`` that says why, where that is not computed here.
    """

    sentence: TaskSpec | None = None
    refusal = ""

    def __init__(
        self, name: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, light: bool = False
    ) -> None:
        """The encoder of a hub id, a local directory or ``minilm`` (the packaged all-MiniLM-L6-v2).

        ``light`` makes BERT and RoBERTa of modules of our own with the same names, so that transformers' modelling
        code, two seconds of imports and 100 MB, stays out; ``model`` is then none of HuggingFace's. Raises NotFound
        where there is nothing of that name, Unsupported for models that are no BERT-like encoder.
        """
        path = locate(str(name))
        model, base_head = load_model(path, light)
        self._set_up(model, load_tokenizer(path), str(name), base_head, read_pruning(path))
        self._read_sentence_task(path)
        model.to(device=torch.device(device), dtype=dtype)

    @classmethod
    def load(
        cls, name: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, light: bool = False
    ) -> Encoder:
        """The same as ``Encoder(name)``."""
        return cls(name, device=device, dtype=dtype, light=light)

    @classmethod
    def of_model(
        cls, model: HiddenModel, tokenizer: PreTrainedTokenizerBase, name: str,
        base_head: dict[str, Tensor] | None = None, pruning: Pruning | None = None,
    ) -> Encoder:  # fmt: skip
        """The encoder of a headless model that is in memory already; it is changed, and must not be used elsewhere.
        ``base_head`` holds what the checkpoint has of a head ([H, H] and [H] of a pooler), by its names there. Raises
        Unsupported for what is no BERT-like encoder.
        """
        encoder = cls.__new__(cls)
        encoder._set_up(model, tokenizer, name, base_head, pruning)
        return encoder

    def _set_up(
        self, model: HiddenModel, tokenizer: PreTrainedTokenizerBase, name: str, base_head: dict[str, Tensor] | None,
        pruning: Pruning | None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.base_head = base_head or {}
        self.config, self.pruning = model.config, pruning
        with _encoder_like(name, self.config.model_type):
            self.anatomy: Anatomy = find_anatomy(model)
            probe = LoadProof.of(model, self.anatomy)
        check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], name)
        self.ref = BaseRef(name, weights_hash(model.state_dict()), self.anatomy.family)
        self.lock = threading.RLock()
        self.graphs: Graphs | None = None
        self._rounded = list[Prepacked]()
        self._current = CurrentContext()
        self._inputs = set(inspect.signature(model.forward).parameters)
        wrap(model, self.anatomy, self._current)
        self.family = family_named(self.anatomy.family)
        self.packs = compat.connect(model, attention_modules(model, self.anatomy), self._current, self.family)
        self.packing = self._settle(probe)
        log.log(logging.INFO if self.packs else logging.WARNING, "%s (%s) is %s", name, self.ref.family, self.packing)

    def _read_sentence_task(self, path: str) -> None:
        try:
            self.sentence = read_sentence_task(path, self.max_tokens)
        except Unsupported as problem:
            self.refusal = str(problem)
            log.warning("the base answers no embeddings, deltas do: %s", problem)

    @property
    def base_task(self) -> TaskSpec:
        """What the bare encoder answers: a sentence encoder's own embeddings; else the mean of a text's rows, of
        length 1.
        """
        longest = min(256, self.max_tokens)
        return self.sentence or TaskSpec(EMBEDDING, max_length=longest, pooling="mean", head="none")

    def fresh(self) -> Encoder:
        """The same encoder loaded again from where it came, untouched by training. Raises Unsupported where its
        weights are others than lie there.
        """
        found = Encoder(self.name, device=str(self.device), dtype=self.dtype)
        if found.ref.sha256 != self.ref.sha256:
            raise Unsupported(
                f"{self.name} holds other weights than this encoder, which was tuned, or changed there since; save its "
                "model and tokenizer with save_pretrained, and load that"
            )
        return found

    @classmethod
    def for_delta(cls, delta: Delta, name: str | None = None, *, device: str = "cpu") -> Encoder:
        """The encoder that a delta runs on: its base, or for full fine-tuning the base with the delta's weights."""
        path = locate(name or delta.base.name)
        (model, head), pruning = load_model(path), read_pruning(path)
        if delta.weights:
            whole = pruning is not None and delta.base.sha256 == pruning.parent.sha256
            model.load_state_dict(sliced_state(delta.weights, pruning) if pruning and whole else delta.weights)
        own = name or delta.base.name
        encoder = cls.of_model(model, load_tokenizer(path), own, head, pruning)
        encoder._read_sentence_task(path)
        model.to(torch.device(device))
        return encoder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def hidden(self) -> int:
        """H: the width of its rows."""
        return self.anatomy.hidden

    @property
    def depth(self) -> int:
        """L: its layers."""
        return self.anatomy.layers

    @property
    def is_pruned(self) -> bool:
        """Whether it was made from a larger one by leaving out heads."""
        return self.pruning is not None

    @property
    def max_tokens(self) -> int:
        """The longest sequence, special tokens included."""
        limit = int(getattr(self.tokenizer, "model_max_length", self.anatomy.max_tokens) or self.anatomy.max_tokens)
        return min(limit, self.anatomy.max_tokens)

    def fitted(self, delta: Delta) -> Delta:
        """The delta as this encoder takes it: itself, or sliced where it was made for what this was pruned from."""
        return fitted(delta, self.anatomy, self.ref, self.pruning)

    def read_delta(self, path: Path, name: str | None = None) -> Delta:
        """A delta from its directory, fitted; raises what ``store.load`` raises."""
        anatomy: Anatomy | None = self.anatomy
        base: BaseRef | None = self.ref
        if self.pruning is not None:  # what it was pruned from is what peft's deltas were made for
            own = (path / MANIFEST).exists()
            anatomy, base = (None, None) if own else (self.pruning.anatomy, self.pruning.parent)
        if anatomy is not None:  # no text may be longer than the tokenizer's limit either
            anatomy = replace(anatomy, max_tokens=min(anatomy.max_tokens, self.max_tokens))
        found = store.load(path, anatomy, base=base, name=name, options=self.config.to_dict(), base_head=self.base_head)
        return self.fitted(found if self.pruning else replace(found, made_for=self.shape))

    @cached_property
    def shape(self) -> EncoderShape:
        """What deltas that were made for it remember of it."""
        return EncoderShape(self.anatomy, self.config.to_dict())

    def head(
        self, task: TaskSpec, generator: torch.Generator | None = None, dropout: float = 0.0, adopt: bool = False
    ) -> Head:
        """A fresh head for a task, in the form of the encoder's family; see ``Head.build``. Raises FormatError."""
        form = head_form(self.anatomy.family, self.anatomy.prefix, task, self.anatomy.hidden, self.config.to_dict())
        words = self.model.get_input_embeddings().weight
        return Head.build(form, self.base_head, generator, dropout, adopt, words)

    def pack(self, encodings: Sequence[Encoding], entries: Sequence[BankEntry]) -> PackedBatch:
        """One batch of all sequences, each with its delta's place in the bank; raises LimitError for too long ones."""
        return pack(encodings, entries, self.anatomy, self.device, padded=not self.packs)

    def check_length(self, tokens: int) -> None:
        """Raises LimitError where sequences of that many tokens do not fit."""
        if tokens > self.max_tokens:
            raise LimitError(f"max_length is {tokens}; {self.name} reads at most {self.max_tokens} tokens")

    def allowed(self, effects: Effects) -> Effects:
        """The effects, where this encoder can apply them; raises Unsupported for those that it cannot. Their stacks
        are [L, ...]; see ``kinds.effects``.
        """
        if effects.prefix is not None and not self.packs:
            raise Unsupported(f"{self.anatomy.family} is run with its own attention, which takes no prefix")
        if effects.prefix is not None:
            self.check_layers("a prefix")
        if {QUERY, KEY} & effects.scale.keys() and self.family.positions == "disentangled":
            raise Unsupported(
                f"{self.family.name} projects positions with query and key too, which no factors reach; target others"
            )
        return effects

    def check_layers(self, what: str) -> None:
        """Raises Unsupported where layers share their weights, and ``what`` cannot tell them apart."""
        runs = int(getattr(self.config, "num_hidden_layers", self.anatomy.layers))
        if runs != self.anatomy.layers:
            raise Unsupported(
                f"{self.anatomy.family} runs {self.anatomy.layers} layer(s) of weights {runs} times; {what} would need "
                "layers with weights of their own"
            )

    def round(self) -> None:
        """From now on the encoder computes in bfloat16, all of it; there is no way back. Raises SpecError where its
        weights are trained."""
        if self._trains:
            raise SpecError("an encoder that is being trained cannot be rounded to bfloat16")
        self.unpack_weights()
        self.model.to(dtype=torch.bfloat16)

    def prepack(self, wanted: bool | None = None) -> bool:
        """Lays the frozen linears out for where they are, as long as their weights no longer change.

        On CPU in float32 or bfloat16 for oneDNN where that is faster (``None``: a short timing decides). On a GPU
        query, key and value as one, for a single launch. Says whether it was done.
        """
        if self._trains:
            return False
        if self.device.type == "cuda":
            return wanted is not False and linear.join(self.model, self.anatomy)
        if self.device.type != "cpu" or self.dtype not in (torch.float32, torch.bfloat16):
            return False
        if not (pays(self.dtype) if wanted is None else wanted):
            return False
        keep_freed_memory()
        for module in self._linears():
            if module.prepacked is None:
                module.prepacked = Prepacked(module.weight, module.bias, self.dtype)
        return True

    @property
    def prepacked(self) -> bool:
        """Whether the linears are laid out for oneDNN."""
        return any(module.prepacked is not None for module in self._linears())

    @property
    def can_round(self) -> bool:
        """Whether ``rounded`` can be: on a CPU that has bfloat16, in float32, with frozen weights."""
        plain = self.device.type == "cpu" and self.dtype == torch.float32
        return plain and not self._trains and linear.available(torch.bfloat16)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """While it holds, frozen linears multiply in bfloat16, forward and backward; see ``prepack``.

        What they are laid out as for it is kept. Where it cannot be, raises what oneDNN does.
        """
        modules = list(self._linears())
        if not self._rounded:
            self._rounded = [Prepacked(module.weight, module.bias, torch.bfloat16) for module in modules]
        before = [module.prepacked for module in modules]
        for module, own in zip(modules, self._rounded, strict=True):
            module.prepacked = own
        try:
            yield
        finally:
            for module, prepacked in zip(modules, before, strict=True):
                module.prepacked = prepacked

    def unpack_weights(self) -> None:
        """Back to plain linears: for weights that are about to change, or that something else runs now."""
        linear.part(self.model, self.anatomy)
        self._rounded = []
        for module in self._linears():
            module.prepacked = None

    def run(
        self, batch: PackedBatch, pools: DeltaRows, plan: BatchPlan | None = None, heads: HeadAttention | None = None
    ) -> Tensor:
        """The hidden states [T, H] of every row of a batch (with forks: of ``batch.last``), each row's delta applied.

        Differentiable in the rows of ``pools`` and, where they require gradients, the encoder's weights. ``heads``
        takes the place of torch's attention; raises Unsupported where the family keeps its own.
        """
        if heads is not None and not self.packs:
            raise Unsupported(f"{self.anatomy.family} is run with its own attention, whose heads cannot be watched")
        if heads is not None:
            self.check_layers("watching heads")
        plan = plan or make_plan(batch)
        if batch.forks:
            with self.lock, self._forking(batch, pools):
                return self._last_hidden(self._pass(batch, pools, plan)).reshape(batch.last.rows, -1)
        if self.graphs is not None and heads is None and isinstance(pools, DeltaBank) and not torch.is_grad_enabled():
            with self.lock:
                replayed = self.graphs.run(batch, plan, pools)
            if replayed is not None:
                return replayed
        return self._last_hidden(self._pass(batch, pools, plan, heads)).reshape(batch.rows, -1)

    def layers(self, batch: PackedBatch, pools: DeltaRows) -> tuple[Tensor, ...]:
        """The hidden states [T, H] after the embeddings and after each layer, L + 1 of them, from one pass.

        Raises Unsupported where layers share their weights.
        """
        self.check_layers("the layers' hidden states")
        found = self._output(self._pass(batch, pools, make_plan(batch)), output_hidden_states=True).hidden_states
        return tuple(hidden.reshape(batch.rows, -1) for hidden in found)

    def layer_rows(
        self, pools: DeltaRows, entry: BankEntry, encodings: Sequence[Encoding], groups: Iterable[Sequence[int]],
        layers: Sequence[int],
    ) -> Iterator[tuple[Sequence[int], PackedBatch, dict[int, Tensor]]]:  # fmt: skip
        """For each group of sequences (numbers of ``encodings``) its batch, and by layer the hidden rows [T, H].

        Layer 0 is what the embeddings put out, the last what the encoder does; ``entry`` is the delta of all sequences.
        ``batch.order[i]`` is the place in the group of packed sequence i. Raises Unsupported for other layers than the
        last where layers share their weights.
        """
        depth = self.anatomy.layers
        for members in groups:
            own = [encodings[i] for i in members]
            batch = self.pack(own, [entry] * len(own))
            if set(layers) == {depth}:
                yield members, batch, {depth: self.run(batch, pools)}
            else:
                found = self.layers(batch, pools)
                yield members, batch, {layer: found[layer] for layer in layers}

    def recomputing(self, paths: Sequence[str]) -> AbstractContextManager[None]:
        """While it holds, the modules at ``paths`` keep but their inputs for the backward pass; see ``recompute``."""
        return recomputed([self.model.get_submodule(path) for path in paths], self._current)

    def use_graphs(self, record: Record | None = None) -> bool:
        """Replays the pass as CUDA graphs from now on, where that can be; says whether it can.

        For packed encoders on a GPU in 16 bits. ``record`` takes the place of CUDA's own recording.
        """
        if not self.packs or (record is None and (self.device.type != "cuda" or self.dtype not in HALVES)):
            return False
        from bertology_serve.encoder.cuda_graphs import Graphs

        self.graphs = Graphs(self._last_hidden, record)
        return True

    def _pass(
        self, batch: PackedBatch, pools: DeltaRows, plan: BatchPlan, heads: HeadAttention | None = None
    ) -> ForwardContext:
        layout = make_layout(batch) if self.packs else None
        return ForwardContext(batch, plan, pools, layout, BatchColumns(batch.rows, batch.ids.device), heads)

    @contextmanager
    def _forking(self, batch: PackedBatch, pools: DeltaRows) -> Iterator[None]:
        """While it holds, a pass of the batch goes on with another where that one forks from it."""

        def enter(fork: Fork, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            self._current.value = self._pass(fork.batch, pools, make_plan(fork.batch))
            own = {name: fork.copied(value) for name, value in named.items() if name == "hidden_states"}
            return tuple(fork.copied(one) if at == 0 else one for at, one in enumerate(inputs)), named | own

        def turn(forks: Sequence[Fork], _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if "position_embeddings" not in named:
                return inputs, named
            cosine, sine = named["position_embeddings"]  # the model made them once, for the first batch
            for fork in forks:
                cosine, sine = fork.copied(cosine), fork.copied(sine)
            return inputs, named | {"position_embeddings": (cosine, sine)}

        with ExitStack() as stack:
            for number, path in enumerate(self.anatomy.layer_paths):
                layer, past = self.model.get_submodule(path), [fork for fork in batch.forks if fork.layer <= number]
                hooks = [partial(turn, past)] if past else []
                hooks += [partial(enter, fork) for fork in past if fork.layer == number]
                for hook in hooks:
                    stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def lowest_changed(self, effects: Effects) -> int:
        """The lowest layer that effects (stacks [L, ...]) change, before which sequences of one text are one.

        ``NEVER`` for none; 0 where they cannot fork between the layers of this encoder.
        """
        depth = self.anatomy.layers
        lowest = effects.lowest(depth)
        if lowest >= depth:
            return NEVER
        return lowest if lowest == 0 or self.forks else 0

    @cached_property
    def forks(self) -> bool:
        """Whether sequences of one text can part between layers; tried once, on a few rows."""
        depth = self.anatomy.layers
        if not self.packs or depth < 2 or depth != getattr(self.config, "num_hidden_layers", depth):
            return False
        low = min(5, self.model.get_input_embeddings().num_embeddings - 7)
        long, short = (Encoding(tuple(range(low, low + count)), (0,) * count) for count in (7, 4))
        entries = [BankEntry("a", lowest=depth // 2), BARE, BankEntry("b", lowest=depth // 2)]
        batch, _ = share([long, short, long], entries, depth, self.pack)
        try:
            with torch.inference_mode():
                forked, whole = self.run(batch, LiveBank([])), self.run(batch.last, LiveBank([]))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            log.info("%s: rows cannot fork between layers (%s)", self.name, type(error).__name__)
            return False
        return agree(forked, whole)

    def _last_hidden(self, now: ForwardContext) -> Tensor:
        """The last hidden states of a pass: [1, T, H], or padded [S, Lmax, H]."""
        return self._output(now).last_hidden_state

    def _output(self, now: ForwardContext, **more: bool) -> HiddenOutput:
        """The model's own output for a pass; ``more`` goes to the model."""
        batch = now.batch
        with self._running(now):
            embeddings = self._embed(batch, now.pools)
            shape = (1, -1) if self.packs else (batch.sequences, batch.stride)
            inputs = {
                "inputs_embeds": embeddings.view(*shape, embeddings.shape[-1]),
                "position_ids": batch.positions.view(shape),
                "token_type_ids": batch.types.view(shape),
            }
            if not self.packs:
                inputs["attention_mask"] = _padding_mask(batch)
            used = {name: value for name, value in inputs.items() if name in self._inputs}
            return self.model(**used, **more)

    def _embed(self, batch: PackedBatch, pools: DeltaRows) -> Tensor:
        """Word vectors [T, E], prompt rows replaced by their deltas' vectors."""
        words: Tensor = self.model.get_input_embeddings()(batch.ids)
        if not batch.prompt_rows.numel():
            return words
        vectors = pools.layer(PROMPT, "v", 0)[batch.prompt_vectors]
        return words.index_copy(0, batch.prompt_rows, vectors.to(words.dtype))

    def _settle(self, probe: LoadProof) -> str:
        """Packs if packed rows give the model's own answers; pads if only padded ones do; else refuses the model.

        Says in words what it did.
        """
        why = "its attention does not go through the interface of transformers"
        if self.packs:
            why = probe.gap(self)
            if not why:
                if compat.is_own(self.model):
                    return "packed through modules of our own"
                own = self.family.connect is not None
                return "packed through " + ("an attention of our own" if own else "transformers' attention interface")
            self.packs = compat.disconnect(self.model)
        gap = probe.gap(self)
        if gap:
            raise Unsupported(
                f"{self.name}: neither packed nor padded rows give the model's own output ({self.anatomy.family}: "
                f"{gap}); {EXPECTED}"
            )
        return f"padded: {why}"

    def _linears(self) -> Iterator[SlotLinear]:
        return (module for module in self.model.modules() if isinstance(module, SlotLinear))

    @property
    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.parameters())

    @contextmanager
    def _running(self, now: ForwardContext) -> Iterator[None]:
        with self.lock, self._current.during(now):
            yield


@contextmanager
def _encoder_like(name: str, family: str) -> Iterator[None]:
    """Turns whatever a model raises that is not built like a BERT into Unsupported, which names the family."""
    try:
        yield
    except BertologyError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise Unsupported(
            f"{name} ({family}) does not run on token ids alone ({type(error).__name__}: {said}); {EXPECTED}"
        ) from None


def _padding_mask(batch: PackedBatch) -> Tensor:
    """[S, Lmax], 1 for real rows."""
    lengths = torch.tensor(batch.lengths, device=batch.ids.device)
    return (torch.arange(batch.stride, device=lengths.device)[None, :] < lengths[:, None]).long()


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over an encoder's weights: names sorted, each with dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
