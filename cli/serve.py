"""``bertology-serve serve``: deltas over HTTP."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bertology_serve.cli.common import note
from bertology_serve.cli.options import options
from bertology_serve.errors import Unsupported
from bertology_serve.export.spec import MultiPrecision
from bertology_serve.serving.config import HELPS, ServerConfig

if TYPE_CHECKING:
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.serving.registry import Registry

Backbone = Annotated[str, typer.Option(help="The encoder: a hub id, a directory, or minilm.")]
Deltas = Annotated[Path, typer.Option(help="Directory of deltas: NAME/VERSION/ or bare ones.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"], typer.Option(help="Type of the weights and activations of the encoder.")
]
CudaGraphs = Annotated[
    bool, typer.Option("--cuda-graphs", help="Replay recorded passes: fewer launches. On a GPU, in 16 bits.")
]
Engine = Annotated[
    Literal["auto", "torch", "onnx"],
    typer.Option(help="What runs the batches. auto: on a CPU ONNX Runtime where it is there and, timed once, faster."),
]
EnginePrecision = Annotated[
    MultiPrecision, typer.Option(help="Of the ONNX engine. int8-row: the encoder's products in 8 bits, row by row.")
]
Models = Annotated[
    Path | None, typer.Option(help="An export of a single delta, or a directory of them, to answer beside the deltas.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad-deltas", help="Leave out deltas that cannot be loaded.")]


@options(ServerConfig, helps=HELPS)
def serve(
    backbone: Backbone,
    deltas: Deltas,
    config: ServerConfig,
    skip_bad_deltas: SkipBad = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    engine: Engine = "auto",
    precision: EnginePrecision = "fp32",
    cuda_graphs: CudaGraphs = False,
    models: Models = None,
) -> None:
    """Serve deltas over HTTP: /v2 (Open Inference Protocol), /models (HuggingFace's shape), /predict, /metrics.

    Calls for all deltas share their batches; /openapi.json describes every route. SIGTERM drains: readiness answers
    503 at once, every accepted call is answered.
    """
    started = time.monotonic()
    from bertology_serve.serving import logs
    from bertology_serve.serving.engines import check, settle
    from bertology_serve.serving.keyfile import read_keyring
    from bertology_serve.serving.server import Server, bind, settle_memory, url_of

    check(engine, precision)
    logs.set_up(config.log_level, config.log_format)
    keyring = read_keyring(config.keys_file, os.environ)
    if not keyring and config.host not in ("127.0.0.1", "::1", "localhost"):
        note(f"anyone who reaches {config.host} may ask: there are no API keys (--keys-file)")
    with bind(config.host, config.port) as bound:  # before anything is loaded: a port that is taken is said at once
        registry = _load(backbone, device, dtype, deltas, skip_bad_deltas, config)
        if cuda_graphs and not registry.pipeline.encoder.use_graphs():
            where = registry.pipeline.encoder.device
            raise Unsupported(f"--cuda-graphs: got {dtype} on {where}, expected float16 or bfloat16 on cuda")
        runs = settle(registry.pipeline, engine, precision)
        if models is not None:
            registry.load_models(models)
        found, url = registry.all(), url_of(bound)

        def announce() -> None:
            note(
                f"{len(found) - 1} deltas on {backbone} ({runs}), ready after {time.monotonic() - started:.1f} s: {url}"
            )
            note(f"try: {example(url, found[-1])}")

        server = Server(registry.pipeline, registry, config, announce, keyring)
        server.engine.warm_up()
        settle_memory()
        server.run(sockets=[bound])


def example(url: str, delta: Delta) -> str:
    """A curl command that asks a delta something."""
    fields = {
        "token-classification": '"text": "Ada Lovelace lived in London."',
        "question-answering": '"question": "Who lived in London?", "context": "Ada Lovelace lived in London."',
        "multiple-choice": '"premise": "It rained.", "choices": ["The street is wet.", "The street is dry."]',
    }.get(delta.task.kind, '"text": "What a lovely day."')
    return f'curl {url}/predict -d \'{{"delta": "{delta.name}", {fields}}}\''


def _load(backbone: str, device: str, dtype: str, deltas: Path, skip_bad: bool, config: ServerConfig) -> Registry:
    import torch

    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.pipeline import Pipeline
    from bertology_serve.serving.registry import Registry
    from bertology_serve.training.device import find_device

    encoder = Encoder.load(backbone, device=find_device(device), dtype=getattr(torch, dtype))
    room = math.inf if config.device_mb is None else config.device_mb * 2**20
    registry = Registry(Pipeline(encoder), device_bytes=room, host_bytes=config.host_mb * 2**20)
    registry.load(deltas, skip_bad)
    encoder.prepack()
    return registry
