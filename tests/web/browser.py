"""Chromium without a window, on a folder that a server of ours hands out."""

from __future__ import annotations

import http.server
import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Files, for pages that may use several threads; and what a page posts."""

    def __init__(self, *given: Any, told: queue.Queue[Any], **named: Any) -> None:
        self.told = told
        super().__init__(*given, **named)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_POST(self) -> None:
        self.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def browsing(
    folder: Path, page: str, profile: Path, *options: str
) -> Iterator[tuple[queue.Queue[Any], subprocess.Popen[str]]]:
    """Chromium on a page of a folder: what it posts, and the process."""
    told: queue.Queue[Any] = queue.Queue()
    handler = partial(Handler, directory=str(folder), told=told)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{page}"
        common = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        browser = subprocess.Popen([*common, *options, address], **out)
        try:
            yield told, browser
        finally:
            browser.terminate()
            browser.communicate()
            server.shutdown()


def told_by(folder: Path, page: str, profile: Path) -> Any:
    """What a page posts first."""
    with browsing(folder, page, profile) as (told, _):
        return told.get(timeout=LONGEST)


def seen_on(folder: Path, page: str, profile: Path) -> str:
    """A page's HTML once nothing on it moves any more."""
    with browsing(folder, page, profile, "--virtual-time-budget=60000", "--dump-dom") as (_, browser):
        return browser.communicate(timeout=LONGEST)[0]
