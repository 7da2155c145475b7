"""How the server logs: lines for people, or JSON objects for machines; faults by their place. Texts are in neither."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

import msgspec

from bertology_serve.errors import printable

CHATTY = ("uvicorn.error", "httpx", "transformers", "grpc")
CALL = "call"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339), level, logger, message, and what a record of a call says of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
        }
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__
        return msgspec.json.encode(line | getattr(record, CALL, {})).decode()


def set_up(level: str, kind: str, stream: TextIO | None = None) -> None:
    """Logs of that level and above go to ``stream`` (stderr), as ``text`` or ``json``."""
    handler = logging.StreamHandler(stream or sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if kind == "json" else plain)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def call(log: logging.Logger, method: str, path: str, status: int, seconds: float, key: str, request: str) -> None:
    """Notes one call, without its body and its query."""
    facts = {"method": method, "path": path, "status": status, "ms": round(1e3 * seconds, 3), "key": key,
             "request_id": request}  # fmt: skip
    log.info("%s %s %d %.1f ms %s %s", method, path, status, 1e3 * seconds, key, request, extra={CALL: facts})


def place_of(problem: BaseException) -> str:
    """Type, file and line of an error; never its message, which may hold somebody's text."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "an unknown place"
    return f"{type(problem).__name__} at {where}"
