"""One step of a fleet: the gradients of many members' batches from shared passes over the frozen encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bertology_serve.encoder.together import Share, run_together
from bertology_serve.training.fleet.member import Member
from bertology_serve.training.items import WHOLE_BATCH, Item, micro_batches
from bertology_serve.training.loop import autocast


@dataclass(frozen=True)
class Piece:
    """Some items of one member's batch, which share a pass; ``weight`` is that of the whole batch."""

    member: Member
    items: tuple[Item, ...]
    weight: int

    @property
    def sequences(self) -> int:
        """How many sequences it has."""
        return sum(len(item.encodings) for item in self.items)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(item.longest for item in self.items)

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(item.tokens for item in self.items)


def gradients(members: Sequence[Member], batches: Sequence[Sequence[Item]], max_tokens: int) -> list[float]:
    """Adds to each member's gradients that of its batch's mean loss; returns those losses.

    A pass has up to ``max_tokens`` rows. Members share passes only with those whose lowest layer is theirs, so that
    no graph is built where none would be without the others.
    """
    losses = dict.fromkeys(map(id, members), 0.0)
    cut = [piece for member, batch in zip(members, batches, strict=True) for piece in pieces(member, batch, max_tokens)]
    for group in joined(cut, max_tokens, padded=not members[0].live.encoder.packs):
        with autocast(members[0].config.precision, members[0].live.encoder.device):
            shares = run_together([(p.member.live, [e for item in p.items for e in item.encodings]) for p in group])
        parts = [_loss(piece, share) for piece, share in zip(group, shares, strict=True)]
        torch.autograd.backward(parts)
        for piece, part in zip(group, parts, strict=True):
            losses[id(piece.member)] += part.item()
    return list(losses.values())


def pieces(member: Member, batch: Sequence[Item], max_tokens: int) -> Iterator[Piece]:
    """A batch as a run of the member by itself would cut it, or smaller."""
    weight = max(1, member.task.weight([item.target for item in batch]))
    whole, padded = member.task.kind in WHOLE_BATCH, not member.live.encoder.packs
    for group in micro_batches(batch, min(max_tokens, member.config.max_tokens), padded, whole):
        yield Piece(member, tuple(group), weight)


def joined(found: Sequence[Piece], max_tokens: int, padded: bool) -> list[list[Piece]]:
    """Pieces that share a pass: of one lowest layer, at most ``max_tokens`` rows, in a fixed order."""
    groups: list[list[Piece]] = []
    rows = 0
    for piece in sorted(found, key=lambda piece: (piece.member.lowest, piece.longest if padded else 0)):
        own = groups[-1] if groups and groups[-1][-1].member.lowest == piece.member.lowest else []
        rows = _rows([*own, piece], padded)
        if not own or rows > max_tokens:
            groups.append([])
        groups[-1].append(piece)
    return groups


def _rows(group: Sequence[Piece], padded: bool) -> int:
    if padded:
        return sum(piece.sequences for piece in group) * max(piece.longest for piece in group)
    return sum(piece.tokens for piece in group)


def _loss(piece: Piece, share: Share) -> torch.Tensor:
    """The piece's share of its batch's mean loss, the head's dropout drawn by the member."""
    lengths = [len(encoding) for item in piece.items for encoding in item.encodings]
    with piece.member.drawing():
        out = share.output()
    return piece.member.task.loss(out, lengths, [item.target for item in piece.items]) / piece.weight
