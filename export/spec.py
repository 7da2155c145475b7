"""How a delta is exported. Imports nothing heavy: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass, field

from bertology_serve.errors import SpecError

OPSETS = (18, 23)


@dataclass(frozen=True)
class ExportSpec:
    """``atol`` bounds |Δ| of every output between ONNX Runtime and torch; ``opset`` is the ONNX operator set."""

    merge: bool = field(default=False, metadata={"help": "Fold LoRA, BitFit and head into the weights."})
    bake: bool = field(
        default=False, metadata={"help": "With --merge: adapters, prompts and prefixes become nodes of the graph."}
    )
    atol: float = field(default=1e-5, metadata={"help": "Largest difference from torch that is accepted."})
    opset: int = field(default=20, metadata={"help": "ONNX operator set, 18 to 23."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier export."})

    def __post_init__(self) -> None:
        if not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise SpecError(f"opset is {self.opset}; expected {OPSETS[0]} to {OPSETS[1]}")
        if not self.atol > 0:
            raise SpecError(f"atol is {self.atol}; expected a number above 0, such as 1e-5")
