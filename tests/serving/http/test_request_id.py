from __future__ import annotations

import re

import pytest

from bertology_serve.serving.http.request_id import id_in, id_of


@pytest.mark.parametrize("told", [b"a", b"call-7", b"A.z_9:/+=@-", b"x" * 128])
def test_an_id_that_is_sane_is_kept(told):
    assert id_of(told) == told


@pytest.mark.parametrize("told", [b"", b"a b<", b"a\n", b"x" * 129, "é".encode()])
def test_ids_that_are_not_sane_are_replaced(told):
    made = id_of(told)
    assert re.fullmatch(b"[0-9a-f]{32}", made)
    assert made != id_of(told)


def test_the_last_id_counts():
    assert id_in([(b"x-request-id", b"a"), (b"host", b"x"), (b"x-request-id", b"b")]) == b"b"
    assert len(id_in([(b"host", b"x")])) == 32
