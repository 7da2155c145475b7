"""Opens a delta that lies on disk, of this package's, peft's or transformers', with the encoder that it runs on."""

from __future__ import annotations

from pathlib import Path

from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import MANIFEST, newest
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.encoder.task_models import is_task_model, read_task_model, verify_peft


def open_delta(
    directory: Path, backbone: str | None, device: str = "cpu", name: str | None = None
) -> tuple[Delta, Encoder]:
    """A delta and the encoder that it runs on: ``backbone``, or the base that it names.

    ``directory`` may also hold the versions of one delta; the newest is taken. Or it is a whole task model of
    HuggingFace's, which is its own base where none is given. ``name`` is what its place says that it is called. What
    peft or transformers can run is compared with what they answer. Raises NotFound, FormatError, BaseMismatch,
    VerificationError, and InputError where there are several deltas.
    """
    path = newest(directory)
    if is_task_model(path):
        delta = read_task_model(path, Encoder.load(backbone or str(path)))
        return delta, Encoder.for_delta(delta, backbone, device=device)
    if not (path / MANIFEST).exists() and backbone is not None:  # peft's: only the encoder can say what fits
        encoder = Encoder.load(backbone, device=device)
        delta = load_delta(path, encoder, name)
        verify_peft(path, delta, encoder)
        return delta, encoder
    delta = store.load(path, name=name)
    encoder = Encoder.for_delta(delta, backbone, device=device)
    return encoder.read_delta(path, name), encoder


def load_delta(path: Path, encoder: Encoder | None = None, name: str | None = None) -> Delta:
    """A delta, every byte of it checked; with an encoder also that it was made for it, and runs on it.

    ``name`` is what its place says that it is called.
    """
    if encoder is None:
        return store.load(path, name=name)
    delta = encoder.read_delta(path, name)
    if not delta.weights:
        Pipeline(encoder).add(delta)
    return delta
