"""One vocabulary for building ONNX graphs: values that are added, multiplied and gathered as arrays are.

Equal nodes and equal constants are made once; weights keep a name of their own each. Names count up, so the same
calls give the same graph to the byte.
"""

from __future__ import annotations

import functools
import math
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.generic]
Attribute = int | float | str | Sequence[int]
CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
Shape = Sequence[str | int]


@dataclass(frozen=True)
class Output:
    """A float32 output of a graph."""

    name: str
    value: Value
    shape: Shape


class Nodes:
    """A graph in the making. Calling it adds a node: ``nodes("MatMul", x, w)``.

    Operands are values, numbers (int64, or reals where they have a point), lists of whole numbers; ``None`` leaves an
    optional one out. Reals are float32, inside ``halves`` float16. ``fused`` graphs are for providers with kernels of
    their own for what is fused: operators of ONNX Runtime's, and sums that it recognises.
    """

    def __init__(self, opset: int, fused: bool = False) -> None:
        self.opset, self.fused = opset, fused
        self.dtype = ir.DataType.FLOAT
        self._nodes: list[ir.Node] = []
        self._weights: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._made: ChainMap[tuple[object, ...], tuple[Value, ...]] = ChainMap()
        self._count: Counter[str] = Counter()
        self._domains: set[str] = set()

    @contextmanager
    def halves(self, yes: bool = True) -> Iterator[None]:
        """Constants, weights and ``Value.real`` made inside are float16, if ``yes``."""
        before, self.dtype = self.dtype, ir.DataType.FLOAT16 if yes else self.dtype
        try:
            yield
        finally:
            self.dtype = before

    @property
    def lowest(self) -> float:
        """The lowest real."""
        return float(np.finfo(self.dtype.numpy()).min)

    def __call__(self, op: str, *operands: Operand, **attributes: Attribute) -> Value:
        """The only output of a node."""
        return self.several(op, 1, *operands, **attributes)[0]

    def several(self, op: str, outputs: int, *operands: Operand, **attributes: Attribute) -> tuple[Value, ...]:
        """All outputs of a node; the same ones again where the same was asked before."""
        inputs = [None if operand is None else self.value(operand).ir for operand in operands]
        while inputs and inputs[-1] is None:
            inputs.pop()
        key = (op, outputs, tuple(map(id, inputs)), repr(sorted(attributes.items())))
        if key not in self._made:
            domain = str(attributes.pop("domain", ""))
            node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs)
            self._domains.add(domain)
            self._nodes.append(node)
            self._made[key] = tuple(Value(self, self._called(found, op)) for found in node.outputs)
        return self._made[key]

    def _called(self, value: ir.Value, op: str) -> ir.Value:
        value.name = f"{op}_{self._count[op]}"
        self._count[op] += 1
        return value

    def choose(self, condition: Condition, then: Callable[[], Value], otherwise: Callable[[], Value]) -> Value:
        """A real value: what ``then`` builds where the condition, one boolean, is true, else what the other does.

        Only one of the two is computed. Both may use every value made before; what they make is theirs alone. Where the
        condition is known already the other one is not even built.
        """
        return self.choose_all(condition, [self.dtype], lambda: [then()], lambda: [otherwise()])[0]

    def choose_all(
        self,
        condition: Condition,
        kinds: Sequence[ir.DataType],
        then: Callable[[], Sequence[Value]],
        otherwise: Callable[[], Sequence[Value]],
    ) -> tuple[Value, ...]:
        """The same for several values, of these ``kinds``."""
        if isinstance(condition, bool):
            return tuple(then() if condition else otherwise())
        branches = {"then_branch": self._branch(then, kinds), "else_branch": self._branch(otherwise, kinds)}
        node = ir.node("If", [condition.ir], branches, num_outputs=len(kinds))
        self._nodes.append(node)
        return tuple(Value(self, self._called(found, "If")) for found in node.outputs)

    def each(self, items: Value, body: Callable[[Value], Value]) -> Value:
        """items [n], int64 -> [n, ...], reals: what ``body`` makes of each item [], one after the other."""
        item = self._called(ir.val(None, ir.DataType.INT64, []), "Item")
        graph = self._branch(lambda: [body(Value(self, item))], [self.dtype], [item])
        node = ir.node("Scan", [items.ir], {"body": graph, "num_scan_inputs": 1})
        self._nodes.append(node)
        return Value(self, self._called(node.outputs[0], "Scan"))

    def _branch(
        self, build: Callable[[], Sequence[Value]], kinds: Sequence[ir.DataType], inputs: Sequence[ir.Value] = ()
    ) -> ir.Graph:
        outside, self._nodes, self._made = self._nodes, [], self._made.new_child()
        outputs = []
        for value, kind in zip(build(), kinds, strict=True):
            node = ir.node("Identity", [value.ir])
            node.outputs[0].type = ir.TensorType(kind)
            self._nodes.append(node)
            outputs.append(self._called(node.outputs[0], "Identity"))
        graph = ir.Graph(inputs, outputs, nodes=self._nodes, name=f"{outputs[0].name}_branch")
        self._nodes, self._made = outside, self._made.parents
        return graph

    def input(self, name: str, shape: Shape = ("batch", "sequence"), kind: ir.DataType = ir.DataType.INT64) -> Value:
        """An input, int64 [batch, sequence] unless said otherwise."""
        return Value(self, ir.val(name, kind, list(shape)))

    def value(self, operand: Value | float | Sequence[int]) -> Value:
        """A value as it is, a number or list of whole numbers as a constant."""
        if isinstance(operand, Value):
            return operand
        return self.constant(np.array(operand, dtype=self.dtype.numpy() if isinstance(operand, float) else np.int64))

    def constant(self, array: Array) -> Value:
        """A constant, which has no name that means anything."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(f"constant_{len(self._constants)}", array)
        return self._constants[key]

    def weight(self, name: str, tensor: Tensor) -> Value:
        """A tensor under its own name, as reals; asked for again it is the same."""
        return self.array(name, tensor.detach().float().contiguous().numpy().astype(self.dtype.numpy(), copy=False))

    def array(self, name: str, array: Array) -> Value:
        """The same for an array of any type."""
        return Value(self, self._weights[name]) if name in self._weights else self._initializer(name, array)

    def _initializer(self, name: str, array: Array) -> Value:
        self._weights[name] = ir.val(name, const_value=ir.tensor(array, name=name))
        return Value(self, self._weights[name])

    def total(self, *terms: Value) -> Value:
        """The sum as one node.

        ONNX Runtime fuses ``Add`` before a LayerNorm into a kernel that is slower than the two on a CPU; a ``Sum`` it
        leaves. ``fused`` graphs have ``Add``.
        """
        if self.fused:
            return functools.reduce(lambda sum_, term: sum_ + term, terms)
        return terms[0] if len(terms) == 1 else self("Sum", *terms)

    def model(self, inputs: Sequence[Value], *outputs: Output) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            [one.ir for one in inputs],
            [self._result(one) for one in outputs],
            nodes=self._nodes,
            initializers=list(self._weights.values()),
            opset_imports={"": self.opset} | {domain: 1 for domain in sorted(self._domains) if domain},
            name="main",
        )
        return ir.Model(graph, ir_version=9 if self.opset <= 20 else 10, producer_name="bertology-serve")

    def _result(self, output: Output) -> ir.Value:
        result = self("Identity", output.value).ir
        result.name, result.shape = output.name, ir.Shape(output.shape)
        result.type = ir.TensorType(ir.DataType.FLOAT)
        return result


class Value:
    """One value of a graph. Operators build nodes; shapes are NumPy's."""

    def __init__(self, nodes: Nodes, value: ir.Value) -> None:
        self.nodes, self.ir = nodes, value

    def __add__(self, other: Operand) -> Value:
        return self.nodes("Add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self.nodes("Sub", self, other)

    def __mul__(self, other: Operand) -> Value:
        return self.nodes("Mul", self, other)

    def __truediv__(self, other: Operand) -> Value:
        return self.nodes("Div", self, other)

    def __mod__(self, other: Operand) -> Value:
        return self.nodes("Mod", self, other)

    def __matmul__(self, other: Operand) -> Value:
        return self.nodes("MatMul", self, other)

    def __lt__(self, other: Operand) -> Value:
        return self.nodes("Less", self, other)

    def __le__(self, other: Operand) -> Value:
        return self.nodes("LessOrEqual", self, other)

    def __and__(self, other: Operand) -> Value:
        return self.nodes("And", self, other)

    def __or__(self, other: Operand) -> Value:
        return self.nodes("Or", self, other)

    def __invert__(self) -> Value:
        return self.nodes("Not", self)

    def integer(self) -> Value:
        """As int64."""
        return self.nodes("Cast", self, to=ir.DataType.INT64.value)

    def real(self) -> Value:
        """As float32, inside ``Nodes.halves`` as float16."""
        return self.nodes("Cast", self, to=self.nodes.dtype.value)

    def size(self, axis: int) -> Value:
        """[1]: the length of an axis."""
        return self.nodes("Shape", self, start=axis, end=axis + 1)

    def reshape(self, *shape: int | Value) -> Value:
        """Lengths are numbers or values [1]; -1 is what is left."""
        if all(isinstance(length, int) for length in shape):
            return self.nodes("Reshape", self, [length for length in shape if isinstance(length, int)])
        parts = [length if isinstance(length, Value) else [length] for length in shape]
        return self.nodes("Reshape", self, self.nodes("Concat", *parts, axis=0))

    def transpose(self, *order: int) -> Value:
        """Axes in that order."""
        return self.nodes("Transpose", self, perm=list(order))

    def unsqueeze(self, *axes: int) -> Value:
        """New axes of length 1."""
        return self.nodes("Unsqueeze", self, list(axes))

    def squeeze(self, axis: int) -> Value:
        """Without an axis of length 1."""
        return self.nodes("Squeeze", self, [axis])

    def gather(self, index: Operand, axis: int = 0) -> Value:
        """The entries at ``index`` of an axis."""
        return self.nodes("Gather", self, index, axis=axis)

    def split(self, count: int, axis: int) -> tuple[Value, ...]:
        """Equal parts."""
        return self.nodes.several("Split", count, self, axis=axis, num_outputs=count)

    def where(self, yes: Operand, no: Operand) -> Value:
        """``yes`` where this is true, ``no`` elsewhere."""
        return self.nodes("Where", self, yes, no)

    def clip(self, low: int, high: int) -> Value:
        """Bounded on both sides."""
        return self.nodes("Clip", self, low, high)

    def reduce(self, how: str, axis: int, keep: bool = False) -> Value:
        """``how``: Sum, Max, Min."""
        return self.nodes(f"Reduce{how}", self, [axis], keepdims=int(keep))


Operand = Value | float | Sequence[int] | None


Condition = Value | bool
"""One boolean: computed by the graph, or known while it is built."""


def either(*conditions: Condition) -> Condition:
    """Whether one of them is true."""
    unknown = [one for one in conditions if isinstance(one, Value)]
    return True in (one for one in conditions if isinstance(one, bool)) or (
        functools.reduce(Value.__or__, unknown) if unknown else False
    )


def joined(axis: int, *parts: Value) -> Value:
    """Values one after the other along an axis."""
    return parts[0].nodes("Concat", *parts, axis=axis)


def counted(nodes: Nodes, length: Value) -> Value:
    """[n]: 0, 1, ... below ``length`` [1]."""
    return nodes("Range", 0, length.squeeze(0), 1)


GELU_SINCE = 20
"""The opset from which ONNX has GELU."""


def _gelu(x: Value) -> Value:
    """``x Φ(x)`` (Hendrycks & Gimpel, 2016)."""
    if x.nodes.opset >= GELU_SINCE:
        return x.nodes("Gelu", x)
    return x * (x.nodes("Erf", x * math.sqrt(0.5)) + 1.0) * 0.5


def _gelu_tanh(x: Value) -> Value:
    """``x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))``, that paper's approximation."""
    cube = x * x * x
    return x * (x.nodes("Tanh", (x + cube * 0.044715) * math.sqrt(2 / math.pi)) + 1.0) * 0.5


ACTIVATION_NODES: dict[str | None, Callable[[Value], Value]] = {
    None: lambda x: x,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: x.nodes("Relu", x),
    "silu": lambda x: x * x.nodes("Sigmoid", x),
    "tanh": lambda x: x.nodes("Tanh", x),
}
