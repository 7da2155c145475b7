"""Query, key and value by one launch: frozen linears of one input, their weights laid out as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bertology_serve.deltas.slots import KEY, QUERY, VALUE, Anatomy
from bertology_serve.encoder.passing import Pass, Place

if TYPE_CHECKING:
    from bertology_serve.encoder.wrapped import SlotLinear

ATTENTION = (QUERY, KEY, VALUE)


class Joined:
    """Linears x [T, K] -> [T, N] as the slices of one, x -> [T, n N].

    The members' weights become views of one tensor: nothing is stored twice, names and values stay. The first member
    that is called computes for all; the others, called with the very same x, take their slices.
    """

    def __init__(self, members: Sequence[SlotLinear]) -> None:
        width = members[0].out_features
        self.places = [
            Place(place.slot, place.layer, (at * width, (at + 1) * width))
            for at, member in enumerate(members)
            for place in member.places
        ]
        self.weight = torch.cat([member.weight.detach() for member in members])
        self.bias = None
        if members[0].bias is not None:
            self.bias = torch.cat([member.bias.detach() for member in members])
        for at, member in enumerate(members):
            mine = slice(at * width, (at + 1) * width)
            member.weight = nn.Parameter(self.weight[mine], requires_grad=False)
            if self.bias is not None:
                member.bias = nn.Parameter(self.bias[mine], requires_grad=False)
        self._members = list(members)
        self._input: Tensor | None = None
        self._slices: list[Tensor] = []

    def slice(self, now: Pass, member: SlotLinear, x: Tensor) -> Tensor | None:
        """The member's y [T, N] for x [..., K]; ``None`` where the members before it were not given this x."""
        at = self._members.index(member)
        if at == 0:
            flat = x.reshape(-1, x.shape[-1])
            self._slices = list(now.linear(self.places, flat, self.weight, self.bias).chunk(len(self._members), 1))
            self._input = x
        if x is not self._input:
            return None
        found = self._slices[at]
        if at == len(self._members) - 1:
            self._input, self._slices = None, []
        return found


def join(model: nn.Module, anatomy: Anatomy) -> bool:
    """Joins the query, key and value of every layer, where they are frozen linears of one shape; says whether any."""
    found = [_joined(members) for members in _attention_linears(model, anatomy)]
    return any(found)


def part(model: nn.Module, anatomy: Anatomy) -> None:
    """Every linear by itself again, on weights of its own."""
    for members in _attention_linears(model, anatomy):
        for member in members:
            if member.joined is not None:
                member.joined = None
                member.weight = nn.Parameter(member.weight.detach().clone(), requires_grad=False)
                if member.bias is not None:
                    member.bias = nn.Parameter(member.bias.detach().clone(), requires_grad=False)


def _joined(members: Sequence[SlotLinear]) -> bool:
    shapes = {(member.in_features, member.out_features, member.bias is None) for member in members}
    places = [member.places[0].part for member in members if len(member.places) == 1]
    trained = any(parameter.requires_grad for member in members for parameter in member.parameters())
    if trained or len(shapes) != 1 or places != [None] * len(ATTENTION):
        return False
    joined = Joined(members)
    for member in members:
        member.joined = joined
    return True


def _attention_linears(model: nn.Module, anatomy: Anatomy) -> Iterable[list[SlotLinear]]:
    """The distinct modules of query, key and value, layer by layer."""
    for paths in zip(*(anatomy.slot(name).paths for name in ATTENTION), strict=True):
        if None not in paths:
            yield [model.get_submodule(str(path)) for path, _ in groupby(paths)]  # type: ignore[misc]
