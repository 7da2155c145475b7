from __future__ import annotations

import gzip
import zlib

import pytest

from bertology_serve.errors import DataError, LimitError
from bertology_serve.serving.http import bodies
from bertology_serve.serving.http.bodies import _decompressed


@pytest.mark.parametrize("sizes", [(0,), (10,), (10, 20), (0, 0, 5), (5000, 9000, 3)])
@pytest.mark.parametrize("padding", [b"", b"\0" * 100])
def test_all_members_of_a_gzip_body_are_read(sizes, padding):
    parts = [bytes(byte % 251 for byte in range(size)) for size in sizes]
    body = b"".join(map(gzip.compress, parts)) + padding
    assert _decompressed(body, "gzip", sum(sizes)) == b"".join(parts)
    if sum(sizes):
        with pytest.raises(LimitError, match="larger than"):
            _decompressed(body, "gzip", sum(sizes) - 1)


@pytest.mark.parametrize(
    ("body", "encoding", "message"),
    [
        (b"", "gzip", "cut short"),
        (gzip.compress(b"a", mtime=0) + b"more", "gzip", "not valid gzip"),
        (gzip.compress(b"a", mtime=0) + gzip.compress(b"b", mtime=0)[:-5], "gzip", "cut short"),
        (zlib.compress(b"a") + zlib.compress(b"b"), "deflate", "goes on after its end"),
        (b"", "br", "not supported"),
    ],
)
def test_bodies_that_are_not_what_they_say(body, encoding, message):
    with pytest.raises(DataError, match=message):
        _decompressed(body, encoding, 1000)


def test_members_are_counted():
    member = gzip.compress(b"")
    assert _decompressed(member * bodies.MOST_MEMBERS, "gzip", 10) == b""
    with pytest.raises(LimitError, match="more than 1024 members"):
        _decompressed(member * (bodies.MOST_MEMBERS + 1), "gzip", 10)
