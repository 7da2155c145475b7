"""``bertology-serve serve``: deltas over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bertology_serve.cli.common import check_inputs, note
from bertology_serve.cli.options import File, laid_out, options
from bertology_serve.errors import Unsupported
from bertology_serve.serving.config import EnginePrecision, ServerConfig

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
Executors = Annotated[
    int, typer.Option(min=1, help="How many run batches, each a process: one a GPU, or on its share of the cores.")
]
CudaGraphs = Annotated[
    bool, typer.Option("--cuda-graphs", help="Replay recorded passes: fewer launches. On a GPU, in 16 bits.")
]
Engine = Annotated[
    Literal["auto", "torch", "onnx"],
    typer.Option(help="What runs the batches. auto: on a CPU ONNX Runtime where it is there and, timed once, faster."),
]
Precision = Annotated[
    EnginePrecision,
    typer.Option(
        help="On a CPU. int8-row: products by the encoder's weights in 8 bits, row by row, by the ONNX engine. "
        "bf16: the encoder and its deltas, by torch, where the processor is faster in it (doctor says)."
    ),
]
TimeAgain = Annotated[
    bool,
    typer.Option(
        "--time-again",
        help="Time engines and batches, though it was done here within the last week, and make graphs anew.",
    ),
]
Models = Annotated[
    Path | None, typer.Option(help="An export of a single delta or a whole task model, or a directory of them.")
]
RayReplicas = Annotated[
    str,
    typer.Option(help="So many servers behind Ray Serve: 2, or 2-8 for as many as work asks for. Needs the extra ray."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad-deltas", help="Leave out deltas that cannot be loaded.")]


COMMON = (
    "backbone", "deltas", "models", "device", "executor", "executors", "host", "port", "grpc_port", "keys_file",
    "device_mb", "state_file", "watch_seconds", "max_batch_ms", "max_queue_tokens", "max_items", "log_level",
)  # fmt: skip
PANELS = {
    "What is served": ("backbone", "deltas", "models", "skip_bad_deltas"),
    "How batches run": ("device", "dtype", "engine", "precision", "cuda_graphs", "executor", "executors", "time_again"),
    "Several servers": ("ray_replicas",),
}


@laid_out(COMMON, PANELS, prefix="BERTOLOGY")
@options(ServerConfig)
def serve(
    backbone: Backbone,
    deltas: Deltas,
    config: ServerConfig,
    skip_bad_deltas: SkipBad = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    cuda_graphs: CudaGraphs = False,
    executor: Executor = "thread",
    executors: Executors = 1,
    time_again: TimeAgain = False,
    models: Models = None,
    ray_replicas: RayReplicas = "",
    file: File = None,
) -> None:
    """Serve deltas over HTTP: /v2 (Open Inference Protocol), /models (HuggingFace's shape), /predict, /metrics.

    Calls for all deltas share their batches; /openapi.json describes every route. SIGTERM, SIGINT and SIGHUP drain:
    readiness answers 503 at once, every accepted call is answered.
    """
    check_inputs(root=deltas, backbone=backbone, device=device)
    options: dict[str, Any] = {
        "skip_bad_deltas": skip_bad_deltas,
        "device": device,
        "dtype": dtype,
        "engine": engine,
        "precision": precision,
        "cuda_graphs": cuda_graphs,
        "executor": executor,
        "executors": executors,
        "time_again": time_again,
        "models": models,
    }
    note(f"loading {backbone}")
    if ray_replicas:
        try:
            from bertology_serve.scale.ray_serve import application, serve_on_ray
        except ImportError as problem:
            if (problem.name or "").partition(".")[0] != "ray":
                raise
            raise Unsupported("--ray-replicas needs Ray: pip install 'bertology-serve[ray]'") from None
        serve_on_ray(application(backbone, str(deltas.resolve()), config, ray_replicas, **options), config, note)
        return
    from bertology_serve.serving.serve import serve as run

    run(backbone, deltas, config, **options, say=note)
