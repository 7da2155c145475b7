"""``bertology-serve route``: one address for several servers."""

from __future__ import annotations

import os

from bertology_serve.cli.common import note
from bertology_serve.cli.options import File, laid_out, options
from bertology_serve.errors import Unsupported
from bertology_serve.scale.config import KEY, OMITTED, RouterConfig

COMMON = ("replicas", "replicas_file", "state_file", "host", "port", "ext_proc_port", "log_level")


@laid_out(COMMON, {}, prefix="BERTOLOGY")
@options(RouterConfig, skip=OMITTED)
def route(config: RouterConfig, file: File = None) -> None:
    """Send calls of every protocol to the replica where their delta lives; publish to all of them.

    A delta lives on one replica, a hot one on more; calls of a replica that is gone, full or draining go to the next.
    /v2/repository loads and unloads on every replica, and those that join later get the same. With API keys on the
    replicas, BERTOLOGY_ROUTER_KEY holds one with admin rights. Needs the extra route. With --ext-proc-port it is
    Envoy's endpoint picker too: Envoy carries the calls and asks where each should go.
    """
    try:
        from bertology_serve.scale.router import route as run
    except ImportError as problem:
        if problem.name not in ("aiohttp", "multidict", "yarl"):
            raise
        raise Unsupported("route needs aiohttp: pip install 'bertology-serve[route]'") from None
    run(config, os.environ.get(KEY, ""), note)
