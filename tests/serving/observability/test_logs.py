from __future__ import annotations

import io
import json
import logging

import pytest

from bertology_serve.serving.observability import logs


@pytest.fixture(autouse=True)
def _as_before():
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    chatty = {name: logging.getLogger(name).level for name in logs.CHATTY}
    yield
    root.handlers[:] = before
    root.setLevel(level)
    for name, old in chatty.items():
        logging.getLogger(name).setLevel(old)


def test_json_lines():
    stream = io.StringIO()
    logs.set_up("info", "json", stream)
    logs.call(logging.getLogger("x"), "POST", "/predict", 200, 0.0125, "team", "id-7")
    try:
        raise RuntimeError("SECRET")
    except RuntimeError:
        logging.getLogger("y").exception("it failed")
    logging.getLogger("z").debug("not shown")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["time"].endswith("+00:00")
    assert (first["level"], first["logger"], first["status"], first["ms"]) == ("info", "x", 200, 12.5)
    assert (second["level"], second["error"]) == ("error", "RuntimeError")
    assert "SECRET" not in stream.getvalue()


def test_lines_for_people():
    stream = io.StringIO()
    logs.set_up("warning", "text", stream)
    logging.getLogger("x").warning("mind the %s", "gap")
    logging.getLogger("x").info("not shown")
    assert stream.getvalue().endswith("WARNING x: mind the gap\n")


def test_names_that_utf_8_has_not_are_written_out():
    stream = io.StringIO()
    logs.set_up("info", "json", stream)
    logging.getLogger("here").warning("%s cannot be read", "deltas/\udcff")
    assert json.loads(stream.getvalue())["message"] == "deltas/\\udcff cannot be read"
