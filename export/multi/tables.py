"""Stacks and tables as inputs of the graph, and what the modules ask of them."""

from __future__ import annotations

import onnx_ir as ir

from bertology_serve.deltas.slots import Anatomy
from bertology_serve.export.direct.nodes import Nodes, Value
from bertology_serve.export.multi.stacks import stacks


class Tables:
    """The inputs, by the names that ``stacks`` gives them."""

    def __init__(self, nodes: Nodes, anatomy: Anatomy) -> None:
        self.nodes, self.places = nodes, stacks(anatomy)
        self.inputs: dict[str, Value] = {}
        self._flat: dict[str, Value] = {}
        self._heights: dict[str, Value] = {}
        for place in self.places.values():
            for column, width in place.columns.items():
                stack = self._add(place.input(column), (place.depth, f"{place.name}.height", width), ir.DataType.FLOAT)
                self._flat[place.input(column)] = stack.reshape(-1, width)
                self._heights.setdefault(place.name, stack.size(1))
            for table in place.tables:
                columns = place.fixed.get(table, f"{place.input(table)}.width")
                self._add(place.input(table), ("deltas", columns), ir.DataType.INT64)

    def _add(self, name: str, shape: tuple[str | int, ...], kind: ir.DataType) -> Value:
        self.inputs[name] = self.nodes.input(name, shape, kind)
        return self.inputs[name]

    def table(self, place: str, table: str) -> Value:
        """[D, n], int64."""
        return self.inputs[self.places[place].input(table)]

    def used(self, place: str, table: str) -> Value:
        """Whether a table has columns: then a delta of the batch has something there."""
        return self.nodes("Greater", self.table(place, table).size(1).squeeze(0), 0)

    def rows(self, place: str, column: str, layer: int, numbers: Value) -> Value:
        """Rows of one layer's stack: numbers [...] -> [..., width]."""
        found, width = self.places[place], self.width(place, column, layer)
        if layer:
            numbers = numbers + self._heights[place] * layer
        rows = self._flat[found.input(column)].gather(numbers)
        return rows if width == found.columns[column] else self.nodes("Slice", rows, [0], [width], [-1])

    def width(self, place: str, column: str, layer: int) -> int:
        """Of a stack in one layer."""
        return self.places[place].width(column, layer)
