"""What is exported: token ids in, logits or embeddings out, the delta, pooling and head inside."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.effects import Effects, Prefix
from bertology_serve.deltas.slots import Anatomy
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.families import attention_modules
from bertology_serve.encoder.reading import form_for
from bertology_serve.errors import Unsupported
from bertology_serve.export.attention import PrefixRows, Scene, register
from bertology_serve.export.beside import attach
from bertology_serve.export.families import prepare
from bertology_serve.export.fold import fold
from bertology_serve.export.plain import plain_model
from bertology_serve.export.products import as_products
from bertology_serve.export.rows import Gathered, Weave, gather
from bertology_serve.tasks.heads import Head
from bertology_serve.tasks.spec import EMBEDDING

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Graph(nn.Module):
    """An encoder with one delta, its pooling and head.

    ``forward``: ``inputs``, int64 [B, L] each. Returns ``output``, float32: logits [B, C]; for tasks that answer for
    every token [B, L, C], zero at padding; embeddings [B, H]. ``names`` maps parameters to their names in the exported
    file: HuggingFace's for the encoder; ``delta.NAME.query.0.a``, ``delta.NAME.head.classifier.weight`` for the delta.
    With ``merge`` low ranks and biases are folded into the weights; whatever else the delta has stands beside them.
    """

    def __init__(self, encoder: Encoder, delta: Delta, merge: bool) -> None:
        super().__init__()
        self.task, anatomy, effects = delta.task, encoder.anatomy, delta.effects(encoder.anatomy)
        state = fold(encoder.model.state_dict(), effects if merge else Effects(), anatomy)
        if merge:
            effects = Effects(bottleneck=effects.bottleneck, prompt=effects.prompt, prefix=effects.prefix)
        interface = getattr(encoder.model, "_supports_attention_backend", False)
        self.model = plain_model(type(encoder.model), encoder.config, state, register() if interface else "eager")
        self._accepted = set(inspect.signature(self.model.forward).parameters)
        added = attach(self.model, effects, anatomy)
        self._connect(effects, anatomy, interface)
        self.head = Head.build(form_for(encoder, delta.task), encoder.base_head)
        self.head.load(delta.head)
        self.inputs = INPUTS if _typed(encoder) else INPUTS[:2]
        self.output = "embedding" if delta.task.kind == EMBEDDING else "logits"
        self.names = self._named(added, delta)
        as_products(self)
        self.eval().requires_grad_(False)

    def _connect(self, effects: Effects, anatomy: Anatomy, interface: bool) -> None:
        """The soft prompt, and what the attention modules need: the scene, their layer's prefix, a family's forward."""
        prefix = effects.prefix
        shift = int(prefix.keys.shape[1]) if prefix is not None and prefix.positions == "shifted" else 0
        self.weave, self.scene = Weave(effects.prompt, anatomy.position_offset + shift), Scene()
        own = prepare(self.model, anatomy, anatomy.max_tokens + self.weave.length)
        if prefix is not None and not (interface or own):
            raise Unsupported(f"a prefix cannot be put into a graph of {anatomy.family}; train another kind for it")
        self._attentions = attention_modules(self.model, anatomy)
        for layer, module in enumerate(self._attentions):
            module.scene, module.prefix_rows = self.scene, _prefix_rows(prefix, layer, anatomy.heads)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows = gather(input_ids, attention_mask, types)
        hidden = self._encode(rows)
        if self.task.per_token:
            return self._per_token(self.weave.text(hidden), rows)
        out: Tensor = self.head(self._pool(hidden, rows))
        return F.normalize(out, dim=-1) if self.task.kind == EMBEDDING and self.task.normalize else out

    def _encode(self, rows: Gathered) -> Tensor:
        """The last hidden states [B, R, H]: prompt rows among the text's, padding behind."""
        seen = self.weave.fill(rows.seen, 1)
        self.scene.enter(seen)
        inputs = {
            "inputs_embeds": self.weave.embed(self.model.get_input_embeddings()(rows.ids)),
            "attention_mask": seen.long(),
            "token_type_ids": self.weave.fill(rows.types, 0),
            "position_ids": self.weave.positions(rows.ids.shape[1]),
        }
        inputs = {name: value for name, value in inputs.items() if name in self._accepted}
        hidden: Tensor = self.model(**inputs).last_hidden_state
        return hidden

    def _pool(self, hidden: Tensor, rows: Gathered) -> Tensor:
        """[B, R, H] -> [B, H]."""
        if self.task.pooling == "cls":
            return hidden[:, self.weave.first]
        text, seen = self.weave.text(hidden), rows.seen[..., None]
        if self.task.pooling == "max":
            return text.masked_fill(~seen, torch.finfo(torch.float32).min).amax(1)
        return text.masked_fill(~seen, 0.0).sum(1) / rows.count.clamp(min=1)

    def _per_token(self, hidden: Tensor, rows: Gathered) -> Tensor:
        """[B, L, H] -> [B, L, C], every row back where the caller has it."""
        out: Tensor = self.head(hidden)
        out = out.masked_fill(~rows.seen[..., None], 0.0)
        return out.gather(1, rows.home[..., None].expand(-1, -1, out.shape[-1]))

    def _named(self, added: dict[str, str], delta: Delta) -> dict[str, str]:
        names = {path: path.removeprefix("model.").replace(".own.", ".") for path, _ in self.named_parameters()}
        own = {f"model.{path}": name for path, name in added.items()} | {"weave.vectors": "prompt.vectors"}
        paths = {id(module): path for path, module in self.named_modules()}
        for layer, module in enumerate(self._attentions):
            path = paths[id(module)]
            own |= {f"{path}.prefix_rows.{part}": f"prefix.{layer}.{part}" for part in ("keys", "values")}
        heads = {id(parameter): name for name, _, parameter in self.head.named()}
        for path, parameter in self.head.named_parameters(prefix="head"):
            names[path] = heads[id(parameter)]
            own |= {path: f"head.{names[path]}"} if names[path] in delta.head else {}
        return names | {path: f"delta.{delta.name}.{name}" for path, name in own.items() if path in names}


def _typed(encoder: Encoder) -> bool:
    """Whether token types change anything: the model has more than one and the tokenizer tells them apart."""
    types = int(getattr(encoder.config, "type_vocab_size", 0) or 0)
    return types > 1 and "token_type_ids" in encoder.tokenizer.model_input_names


def _prefix_rows(prefix: Prefix | None, layer: int, heads: int) -> PrefixRows | None:
    return None if prefix is None else PrefixRows(prefix.keys[layer], prefix.values[layer], heads)
