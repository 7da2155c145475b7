"""Runs the shell and the Python of a page as a reader would: top to bottom, in one folder, each command a process.

Commands of this package, and ``python``, are forked from a process that has imported it (``Forks``), which saves each
of them seconds. A page marks what a block is in a comment before it: ``<!-- not run: REASON -->``, and
``<!-- file: NAME -->`` for what is written to a file that later blocks read.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RUN = ("sh", "python")
LONGEST = 300  # seconds; only ends what hangs
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|file): (?P<word>[^\n]+?) -->\s*\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One block of a page. ``skipped`` is the reason why it is not run, ``file`` where it is written."""

    language: str
    text: str
    skipped: str | None = None
    file: str | None = None

    @property
    def runs(self) -> bool:
        """Whether it is run."""
        return self.language in RUN and self.skipped is None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        mark, word = match["mark"], match["word"]
        skipped, file = word if mark == "not run" else None, word if mark == "file" else None
        found.append(Block(match["language"], match["text"], skipped, file))
    return found


def script(page: Path) -> str:
    """A page as one bash script."""
    lines = ["set -e"]
    for number, block in enumerate(blocks(page), 1):
        end = f"END_OF_{number}"
        if block.file:
            lines += [f"cat > {block.file} <<'{end}'", block.text.rstrip("\n"), end]
        elif block.runs:
            lines.append(f"echo '== block {number}' >&2")
            lines += [block.text] if block.language == "sh" else [f"python - <<'{end}'", block.text.rstrip("\n"), end]
    return "\n".join(lines) + "\n"


class Forks:
    """A process that has imported the library and forks commands; ``path`` is a folder whose commands ask it."""

    def __init__(self, folder: Path) -> None:
        self.path, self._address = folder / "bin", folder / "forks"
        self.path.mkdir()
        (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")  # an error is one for the shell too
        for name in ("bertology-serve", "python"):
            (self.path / name).write_text(f"#!{sys.executable} -IS\n{CLIENT.format(address=str(self._address))}")
            (self.path / name).chmod(0o755)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.snippets", str(self._address)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.communicate(timeout=60)

    def run(self, text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a bash script in a folder, and ends what it has left in the background."""
        path = f"{self.path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        known = {**os.environ, "PATH": path, "CURL_HOME": str(self.path.parent), **environment}
        with (folder / ".out").open("w") as out, (folder / ".err").open("w") as err:
            process = subprocess.Popen(
                ["bash", "-c", text], cwd=folder, env=known, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(LONGEST)
            finally:
                with suppress(ProcessLookupError):  # nothing was left
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(60)
        told = ((folder / name).read_text(encoding="utf-8") for name in (".out", ".err"))
        return subprocess.CompletedProcess(text, process.returncode, *told)


CLIENT = """import array, json, os, socket, sys
asked = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    files = array.array("i", [0, 1, 2])
    server.sendmsg([len(asked).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    server.sendall(asked)
    sys.exit(int(server.recv(8) or b"70"))
"""
"""The command that a page's shell starts: it sends its words and its files, and ends as the forked command does."""


IMPORTED = (
    *("bertology_serve." + name for name in (
        "analysis", "cli.main", "export.exporting", "serving.offline", "serving.server", "training.train",
    )),
    "matplotlib.backends.backend_agg", "rich.progress", "transformers.models.bert.modeling_bert",
)  # fmt: skip
"""What commands import: seconds, spent once."""


def serve_forks(address: str) -> None:
    """Imports what commands import, and forks one for each connection until SIGTERM."""
    for module in IMPORTED:
        importlib.import_module(module)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _handle(connection)
            connection.close()


def _handle(connection: socket.socket) -> None:
    """Forks the command of a connection and waits for it; where the asking process ends first, so does the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += connection.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        connection.close()
        os._exit(_command(*json.loads(asked), files))
    for file in files:
        os.close(file)
    done = status = 0
    while not done:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done and select.select([connection], [], [], 0.02)[0] and not connection.recv(1):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            os._exit(0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _command(name: str, words: list[str], folder: str, environment: dict[str, str], files: list[int]) -> int:
    """``bertology-serve WORDS`` or ``python -`` in this process, with another's files; its exit code."""
    for place, file in enumerate(files):
        os.dup2(file, place)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    try:
        if name == "python":
            exec(compile(sys.stdin.read(), "<block>", "exec"), {"__name__": "__main__"})
            return 0
        from bertology_serve.cli.main import main

        return main(words)
    except BaseException as problem:
        traceback.print_exc()
        return problem.code if isinstance(problem, SystemExit) and isinstance(problem.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve_forks(sys.argv[1])
