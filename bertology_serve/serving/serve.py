"""Serves deltas over HTTP: from an empty process to the signal that ends it."""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Literal

from bertology_serve.serving.config import EnginePrecision, ServerConfig

if TYPE_CHECKING:
    from bertology_serve.deltas.delta import Delta
    from bertology_serve.encoder.delta_set import DeltaSet
    from bertology_serve.serving.execution.executor_handle import ForkServer
    from bertology_serve.serving.execution.startup import Startup
    from bertology_serve.serving.observability.background import Background
    from bertology_serve.serving.server import Server
    from bertology_serve.serving.versions.delta_registry import Registry

MOST_LISTED = 20
HUNG = 60.0  # seconds after which a batch is not waited for; the first ones, which compile, are


def serve(
    backbone: str,
    deltas: str | Path,
    config: ServerConfig | None = None,
    *,
    skip_bad_deltas: bool = False,
    device: str = "auto",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    engine: Literal["auto", "torch", "onnx"] = "auto",
    precision: EnginePrecision = "fp32",
    cuda_graphs: bool = False,
    executor: Literal["thread", "process"] = "thread",
    executors: int = 1,
    time_again: bool = False,
    models: str | Path | None = None,
    say: Callable[[str], None] = print,
    run: Callable[[Server], None] | None = None,
) -> None:
    """Answers for the deltas of a directory until SIGTERM or SIGINT; what was accepted is answered first.

    ``backbone`` is a hub id, a directory or ``minilm``; ``config`` holds the port, the limits and the rest. ``say`` is
    told the address. ``executors`` above 1 are processes, each on a GPU of its own or its share of the cores. Logs and
    signal handlers of the process are set, so call it from the main thread. With ``run`` nothing listens: that gets the
    server, and returns when it should end. Raises NotFound and FormatError for a directory or a delta that cannot be
    served, InputError where the port is taken.
    """
    config = config or ServerConfig()
    started = time.monotonic()
    with _importing():
        from bertology_serve.serving.execution.executor_handle import ForkServer, WorkerOptions
        from bertology_serve.serving.execution.startup import settle_memory
        from bertology_serve.serving.http.listening import bind, url_of
        from bertology_serve.serving.keys import read_keyring
        from bertology_serve.serving.observability import logs

    logs.set_up(config.logging.log_level, config.logging.log_format)
    keyring = read_keyring(config.listen.keys_file, os.environ)
    if not keyring and config.listen.host not in ("127.0.0.1", "::1", "localhost"):
        say(f"anyone who reaches {config.listen.host} may ask: there are no API keys (--keys-file)")
    with ExitStack() as stack:
        # before anything is loaded: are the ports free?
        bound = None if run else stack.enter_context(bind(config.listen.host, config.listen.port))
        if config.listen.grpc_port and not run:
            bind(config.listen.host, config.listen.grpc_port, "--grpc-port").close()  # gRPC takes no open socket
        fork_server: ForkServer | None = None
        if executor == "process" or executors > 1:  # it loads the encoder while this process imports torch
            fork_server = stack.enter_context(
                ForkServer(WorkerOptions(backbone, dtype, config.logging.log_level, config.logging.log_format))
            )
        with _importing():
            from bertology_serve.export.session import drop_kept
            from bertology_serve.serving.batching.warmup import circumstances, find, find_again, recall
            from bertology_serve.serving.execution.engine_choice import EngineConfig, check
            from bertology_serve.serving.observability.background import Background
            from bertology_serve.serving.server import Server

        check(engine, precision)
        background = Background()
        opened = _open(backbone, device, dtype, fork_server, background, executors)
        stack.callback(opened.close)
        registry = _load(opened.pipeline, Path(deltas), skip_bad_deltas, config)
        wanted = EngineConfig(engine, precision, cuda_graphs)
        where = circumstances(opened.pipeline, wanted, config, opened.device)
        if models is not None:
            registry.load_models(Path(models))
        found, url = registry.all(), url_of(bound) if bound else ""

        def announce() -> None:
            seconds = time.monotonic() - started
            how = f"{runs}, {opened.pipeline.encoder.packing}"
            for line in listing(found[1:]):
                say(line)
            count = f"{len(found) - 1} delta{'s' * (len(found) != 2)}"
            say(f"{count} on {backbone} ({how}), ready after {seconds:.1f} s: {url}")
            say(f"docs: {url}/ in a browser, {url}/openapi.json, docs/howto/ask-a-server.md")
            say(f"try: {example(url, found[min(1, len(found) - 1)], keyed=bool(keyring))}")

        server = Server(registry, config, announce, keyring, background)
        if time_again:
            drop_kept()
        queue, known = server.service.queue, None if time_again else recall(where)
        runs, sure = find(opened, queue.times, wanted, where, known)
        if not sure:
            ended = threading.Event()
            again = partial(find_again, opened, queue.times, wanted, where, lambda: queue.items, ended)
            # left in the middle of a timing, the process would abort as it ends
            stack.callback(background.thread("second timing", again).join, HUNG)
            stack.callback(ended.set)
        opened.warmed(max(HUNG, config.batching.max_call_seconds))
        settle_memory()
        run(server) if run else server.run(sockets=[bound] if bound else None)


@contextmanager
def _importing() -> Iterator[None]:
    """What modules make as they are imported stays: the garbage collector need not look at it, now or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def listing(deltas: Sequence[Delta]) -> Iterator[str]:
    """A table of deltas, of the first ``MOST_LISTED``, a line each."""
    head = ("delta", "version", "task", "labels")
    rows = [head, *((one.name, one.version, one.task.kind, shorten(", ".join(one.task.labels), 60)) for one in deltas)]
    rows = rows[: MOST_LISTED + 1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if deltas else ():
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if len(deltas) > MOST_LISTED:
        yield f"and {len(deltas) - MOST_LISTED:,} more: GET /models"


def example(url: str, delta: Delta, keyed: bool = False) -> str:
    """A curl command that asks a delta something; where ``keyed``, with an API key."""
    fields = {
        "token-classification": '"text": "Ada Lovelace lived in London."',
        "question-answering": '"question": "Who lived in London?", "context": "Ada Lovelace lived in London."',
        "multiple-choice": '"premise": "It rained.", "choices": ["The street is wet.", "The street is dry."]',
        "zero-shot": '"text": "What a lovely day.", "labels": ["weather", "money"]',
    }.get(delta.task.kind, '"text": "What a lovely day."')
    if delta.task.pairs:
        fields += ', "text_pair": "The sun is shining."'
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    return f'curl {url}/predict{key} -d \'{{"delta": "{delta.name}", {fields}}}\''


def _open(
    backbone: str, device: str, dtype: str, fork_server: ForkServer | None, background: Background, executors: int
) -> Startup:
    import torch

    from bertology_serve.encoder.loading import find_device
    from bertology_serve.serving.execution.startup import open_backbone

    return open_backbone(backbone, str(find_device(device)), getattr(torch, dtype), fork_server, background, executors)


def _load(pipeline: DeltaSet, deltas: Path, skip_bad: bool, config: ServerConfig) -> Registry:
    from bertology_serve.serving.versions.delta_registry import Registry
    from bertology_serve.tasks.redaction import Redactor

    if config.deltas.redaction_file is not None:
        pipeline.redactor = Redactor.read(config.deltas.redaction_file)
    room = math.inf if config.deltas.device_mb is None else config.deltas.device_mb * 2**20
    registry = Registry(pipeline, device_bytes=room, host_bytes=config.deltas.host_mb * 2**20)
    registry.load(deltas, skip_bad)
    return registry
