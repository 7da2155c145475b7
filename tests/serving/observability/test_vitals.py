from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry

from bertology_serve.serving.observability.metrics import LoopLag


def test_what_holds_the_event_loop_is_seen():
    registry = CollectorRegistry()
    lag = LoopLag(registry)

    def count(bound: str) -> float:
        return registry.get_sample_value("bertology_event_loop_lag_seconds_bucket", {"le": bound}) or 0.0

    async def run() -> None:
        lag.start(asyncio.get_running_loop())
        time.sleep(0.3)  # as a call might
        await asyncio.sleep(0.01)
        lag.stop()

    asyncio.run(run())
    assert (count("0.1"), count("+Inf")) == (0.0, 1.0)
