from __future__ import annotations

import asyncio

import pytest

from bertology_serve.bench.serving.wire import Broken, Wire, request_bytes

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def called(answer: bytes, calls: int) -> tuple[list[bytes], int]:
    """Bodies of calls to a server that hangs up after each answer without a word, and how many connections it saw."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def run() -> list[bytes]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, Wire(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as wire:
            bodies = []
            for _ in range(calls):
                bodies.append((await wire.send(request_bytes("GET", "/"))).body)
                while wire._reader is not None and not wire._reader.at_eof():
                    await asyncio.sleep(0.001)
            return bodies

    return asyncio.run(asyncio.wait_for(run(), 20)), connections


def test_a_connection_that_the_server_closed_at_rest_is_made_again():
    assert called(ANSWER, 3) == ([b"ok"] * 3, 3)


def test_an_answer_that_is_cut_off_is_told():
    with pytest.raises(Broken):
        called(ANSWER[:-1], 1)
