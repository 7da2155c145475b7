"""``bertology-serve serve``: deltas over HTTP."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bertology_serve.cli.common import note
from bertology_serve.cli.options import options
from bertology_serve.export.spec import MultiPrecision
from bertology_serve.serving.config import HELPS, ServerConfig

if TYPE_CHECKING:
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.encoder.residents import Residents
    from bertology_serve.serving.background import Background
    from bertology_serve.serving.opening import Opened
    from bertology_serve.serving.process.forks import Nursery
    from bertology_serve.serving.registry import Registry

HUNG = 60.0  # seconds after which a batch is not waited for; the first ones, which compile, are

Backbone = Annotated[str, typer.Option(help="The encoder: a hub id, a directory, or minilm.")]
Deltas = Annotated[Path, typer.Option(help="Directory of deltas: NAME/VERSION/ or bare ones.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"], typer.Option(help="Type of the weights and activations of the encoder.")
]
Executor = Annotated[
    Literal["thread", "process"],
    typer.Option(help="Where batches run. process: in one of their own, whose end costs a restart, not the server."),
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
TimeAgain = Annotated[
    bool, typer.Option("--time-again", help="Time engines and batches, though it was done here within the last week.")
]
Models = Annotated[
    Path | None, typer.Option(help="An export of a single delta or a whole task model, or a directory of them.")
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
    executor: Executor = "thread",
    time_again: TimeAgain = False,
    models: Models = None,
) -> None:
    """Serve deltas over HTTP: /v2 (Open Inference Protocol), /models (HuggingFace's shape), /predict, /metrics.

    Calls for all deltas share their batches; /openapi.json describes every route. SIGTERM, SIGINT and SIGHUP drain:
    readiness answers 503 at once, every accepted call is answered.
    """
    started = time.monotonic()
    from bertology_serve.serving import logs
    from bertology_serve.serving.binding import bind, url_of
    from bertology_serve.serving.garbage import settle_memory
    from bertology_serve.serving.keyfile import read_keyring
    from bertology_serve.serving.process.forks import Nursery
    from bertology_serve.serving.process.plan import Plan

    logs.set_up(config.log_level, config.log_format)
    keyring = read_keyring(config.keys_file, os.environ)
    if not keyring and config.host not in ("127.0.0.1", "::1", "localhost"):
        note(f"anyone who reaches {config.host} may ask: there are no API keys (--keys-file)")
    with ExitStack() as stack:
        bound = stack.enter_context(bind(config.host, config.port))  # before anything is loaded: is the port free?
        nursery: Nursery | None = None
        if executor == "process":  # it loads the encoder while this process imports torch
            nursery = stack.enter_context(Nursery(Plan(backbone, dtype, config.log_level, config.log_format)))
        from bertology_serve.serving.background import Background
        from bertology_serve.serving.engines import check
        from bertology_serve.serving.findings import circumstances, find, recall
        from bertology_serve.serving.server import Server
        from bertology_serve.serving.settling import Setting

        check(engine, precision)
        background = Background()
        opened = _open(backbone, device, dtype, nursery, background)
        stack.callback(opened.close)
        registry = _load(opened.pipeline, deltas, skip_bad_deltas, config)
        wanted = Setting(engine, precision, cuda_graphs)
        where = circumstances(opened.pipeline, wanted, config, opened.device)
        if models is not None:
            registry.load_models(models)
        found, url = registry.all(), url_of(bound)

        def announce() -> None:
            seconds = time.monotonic() - started
            how = f"{runs}, {opened.pipeline.encoder.packing}"
            note(f"{len(found) - 1} deltas on {backbone} ({how}), ready after {seconds:.1f} s: {url}")
            note(f"try: {example(url, found[-1])}")

        server = Server(registry.pipeline, registry, config, announce, keyring, background)
        runs = find(opened, server.engine, wanted, where, None if time_again else recall(where))
        opened.warmed(max(HUNG, config.max_call_seconds))
        settle_memory()
        server.run(sockets=[bound])


def example(url: str, delta: Delta) -> str:
    """A curl command that asks a delta something."""
    fields = {
        "token-classification": '"text": "Ada Lovelace lived in London."',
        "question-answering": '"question": "Who lived in London?", "context": "Ada Lovelace lived in London."',
        "multiple-choice": '"premise": "It rained.", "choices": ["The street is wet.", "The street is dry."]',
    }.get(delta.task.kind, '"text": "What a lovely day."')
    if delta.task.pairs:
        fields += ', "text_pair": "The sun is shining."'
    return f'curl {url}/predict -d \'{{"delta": "{delta.name}", {fields}}}\''


def _open(backbone: str, device: str, dtype: str, nursery: Nursery | None, background: Background) -> Opened:
    import torch

    from bertology_serve.serving.opening import open_backbone
    from bertology_serve.training.device import find_device

    return open_backbone(backbone, str(find_device(device)), getattr(torch, dtype), nursery, background)


def _load(pipeline: Residents, deltas: Path, skip_bad: bool, config: ServerConfig) -> Registry:
    from bertology_serve.serving.registry import Registry

    room = math.inf if config.device_mb is None else config.device_mb * 2**20
    registry = Registry(pipeline, device_bytes=room, host_bytes=config.host_mb * 2**20)
    registry.load(deltas, skip_bad)
    return registry
