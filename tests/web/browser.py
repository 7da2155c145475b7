"""Chromium without a window, on a folder that a server of ours hands out."""

from __future__ import annotations

import http.server
import json
import queue
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

LONGEST = 300  # seconds; only ends what hangs


def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium: apt-get install chromium")
    return found


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files, and what a page posts."""

    def __init__(self, *given: Any, told: queue.Queue[Any], **named: Any) -> None:
        self.told = told
        super().__init__(*given, **named)

    def do_POST(self) -> None:
        self.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def told_by(folder: Path, page: str, profile: Path) -> Any:
    """What a page of a folder posts first."""
    told: queue.Queue[Any] = queue.Queue()
    handler = partial(Handler, directory=str(folder), told=told)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{page}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            [chromium(), *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return told.get(timeout=LONGEST)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
