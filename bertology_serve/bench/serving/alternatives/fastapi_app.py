"""One of the alternatives behind FastAPI; run as a module: MODEL DIRECTORY BASE COUNT."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from bertology_serve.bench.serving.alternatives.bench_tasks import Made
from bertology_serve.bench.serving.alternatives.collector import Collector
from bertology_serve.bench.serving.alternatives.models import MODELS
from bertology_serve.serving.http.listening import bind, url_of


class Item(BaseModel):
    """One text for one task."""

    delta: str
    text: str


def make(model: Any) -> FastAPI:
    """``POST /predict`` with a list of items, as this server's."""
    collectors: list[Collector] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        collectors.append(Collector(model, model.mixed))
        running = asyncio.create_task(collectors[0].run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/predict")
    async def predict(items: list[Item]) -> list[dict[str, Any]]:
        return await asyncio.gather(*(collectors[0].ask(item.delta, item.text) for item in items))

    return app


def main(model: str, directory: str, base: str, count: str) -> None:
    """Serves until SIGTERM; says its address on stderr as ``serve`` does."""
    app = make(MODELS[model](Made(Path(directory), Path(base), int(count))))
    with bind("127.0.0.1", 0) as bound:
        bound.listen()  # calls that come before the server is there wait
        print(f"ready: {url_of(bound)}", file=sys.stderr, flush=True)
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[bound])


if __name__ == "__main__":
    main(*sys.argv[1:])
