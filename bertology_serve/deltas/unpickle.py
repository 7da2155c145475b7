"""The explicit conversion of a pickled checkpoint to safetensors: the only place where one is opened."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bertology_serve.deltas.checks import check_finite
from bertology_serve.deltas.kind import Tensors
from bertology_serve.deltas.names import ADAPTER_WEIGHTS, PICKLES
from bertology_serve.deltas.reading import Limits, read_tensors
from bertology_serve.errors import FormatError, NotFound
from bertology_serve.files import replacing

# The pickles of other libraries, by the safetensors files that they write today.
PICKLED = {
    ADAPTER_WEIGHTS: "adapter_model.bin",
    "adapter.safetensors": "pytorch_adapter.bin",
    "model_head.safetensors": "pytorch_model_head.bin",
}


def convert_pickle(directory: Path) -> Path:
    """Writes ``adapter_model.safetensors`` beside ``adapter_model.bin`` and returns its path.

    torch unpickles tensors and plain containers only (``weights_only=True``); anything else is a FormatError.
    """
    source = next((directory / name for name in PICKLES if (directory / name).is_file()), None)
    if source is None:
        raise NotFound(f"{directory} has no {', '.join(PICKLES)}; there is nothing to convert")
    values = read_pickle(source)
    target = directory / ADAPTER_WEIGHTS
    with replacing(target) as part:
        save_file({name: value.detach().clone().contiguous() for name, value in values.items()}, part, {"format": "pt"})
        part.chmod(source.stat().st_mode & 0o666)
    return target


def read_trusted(path: Path) -> Tensors:
    """The tensors of a safetensors file, or of the pickle that stands in its place in the directory, by ``PICKLED``.

    Raises FormatError for a malformed file, and where there is neither.
    """
    pickled = path.with_name(PICKLED[path.name])
    if path.exists() or not pickled.is_file():
        return read_tensors(path, Limits(), path.parent)[0]
    tensors = read_pickle(pickled)
    check_finite(tensors)
    return tensors


def read_pickle(source: Path) -> dict[str, Tensor]:
    """The table of tensors of a pickle; torch unpickles tensors and plain containers only (``weights_only=True``).

    The tensors are dense, on the CPU, and no larger than what the file holds of them. Raises NotFound, and FormatError
    for whatever else it holds and for what cannot be read.
    """
    if not source.is_file():
        raise NotFound(f"no file {source}; expected a pickled table of tensors")
    try:
        values = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle is a program: it ends in whatever error its author likes
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise FormatError(f"{source} is damaged or holds more than tensors ({reason}); do not use it") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) and _is_plain(values[key]) for key in values):
        raise FormatError(f"{source} holds no table of tensors; expected a checkpoint's")
    return values


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
