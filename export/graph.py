"""What is exported: token ids in, logits or embeddings out, the delta, pooling and head inside."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.deltas.effects import Prefix
from bertology_serve.deltas.slots import Anatomy
from bertology_serve.encoder.families import attention_modules
from bertology_serve.errors import Unsupported
from bertology_serve.export.attention import PrefixRows, Scene, register
from bertology_serve.export.beside import attach
from bertology_serve.export.families import prepare
from bertology_serve.export.parts import Parts
from bertology_serve.export.plain import plain_model
from bertology_serve.export.products import as_products
from bertology_serve.export.rows import Gathered, Weave, gather
from bertology_serve.tasks.spec import EMBEDDING, QUESTION_ANSWERING


class Graph(nn.Module):
    """An encoder with one delta, its pooling and head.

    ``forward``: ``inputs``, int64 [B, L] each. Returns ``outputs`` (``Parts.outputs``), float32: logits [B, C]; for
    tasks that answer for every token [B, L, C], zero at padding; start and end [B, L] each; rows [B, L, H] and
    embeddings [B, H]. ``names`` maps parameters to their names in the exported
    file: HuggingFace's for the encoder; ``delta.NAME.query.0.a``, ``delta.NAME.head.classifier.weight`` for the delta.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.task, self.inputs, self.outputs = parts.task, parts.inputs, tuple(parts.outputs)
        interface = getattr(parts.kind, "_supports_attention_backend", False)
        self.model = plain_model(parts.kind, parts.config, parts.state, register() if interface else "eager")
        self._accepted = set(inspect.signature(self.model.forward).parameters)
        added = attach(self.model, parts.effects, parts.anatomy)
        self._connect(parts, interface)
        self.head = copy.deepcopy(parts.head)
        self.names = self._named(added, parts)
        as_products(self)
        self.eval().requires_grad_(False)

    def _connect(self, parts: Parts, interface: bool) -> None:
        """The soft prompt, and what the attention modules need: the scene, their layer's prefix, a family's forward."""
        prefix, anatomy = parts.effects.prefix, parts.anatomy
        self.weave, self.scene = Weave(parts.effects.prompt, parts.first_position), Scene()
        own = prepare(self.model, anatomy, anatomy.max_tokens + self.weave.length)
        if prefix is not None and not (interface or own):
            raise Unsupported(f"a prefix cannot be put into a graph of {anatomy.family}; train another kind for it")
        self._attentions = attention_modules(self.model, anatomy)
        for layer, module in enumerate(self._attentions):
            module.scene, module.prefix_rows = self.scene, _prefix_rows(prefix, layer, anatomy)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows = gather(input_ids, attention_mask, types)
        hidden = self._encode(rows)
        if self.task.per_token:
            out = _home(self.head(self.weave.text(hidden)), rows)
            return out.unbind(-1) if self.task.kind == QUESTION_ANSWERING else (out,)
        out = self.head(self._pool(hidden, rows))
        if self.task.kind != EMBEDDING:
            return (out,)
        return _home(self.weave.text(hidden), rows), F.normalize(out, dim=-1) if self.task.normalize else out

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

    def _named(self, added: dict[str, str], parts: Parts) -> dict[str, str]:
        names = {path: path.removeprefix("model.").replace(".own.", ".") for path, _ in self.named_parameters()}
        own = {f"model.{path}": name for path, name in added.items()} | {"weave.vectors": "prompt.vectors"}
        paths = {id(module): path for path, module in self.named_modules()}
        for layer, module in enumerate(self._attentions):
            path = paths[id(module)]
            own |= {f"{path}.prefix_rows.{part}": f"prefix.{layer}.{part}" for part in ("keys", "values")}
        heads = {id(parameter): name for name, _, parameter in self.head.named()}
        for path, parameter in self.head.named_parameters(prefix="head"):
            names[path] = parts.named_in_head(heads[id(parameter)])
        return names | {path: parts.named(name) for path, name in own.items() if path in names}


def _home(out: Tensor, rows: Gathered) -> Tensor:
    """[B, L, C], every row back where the caller has it, zero at padding."""
    out = out.masked_fill(~rows.seen[..., None], 0.0)
    return out.gather(1, rows.home[..., None].expand(-1, -1, out.shape[-1]))


def _prefix_rows(prefix: Prefix | None, layer: int, anatomy: Anatomy) -> PrefixRows | None:
    if prefix is None:
        return None
    heads = anatomy.heads_of(layer)
    keys, values = (rows[layer, :, : heads * anatomy.head_width] for rows in (prefix.keys, prefix.values))
    return PrefixRows(keys, values, heads)
