from __future__ import annotations

import pytest

from bertology_serve.errors import Forbidden, RateLimited, SpecError, Unauthorized
from bertology_serve.serving.keys import Access, Key, Keyring, digest_of

ONE, OTHER = "one-very-long-key-1", "another-long-key-22"


def key(name: str = "ada", plain: str = ONE, **fields) -> Key:
    return Key(name, digest_of(plain, name), **fields)


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer " + ONE.encode()),
        (b"authorization", b"bearer  " + ONE.encode()),
        (b"x-api-key", ONE.encode()),
    ],
)
def test_a_key_is_found_in_either_header(header):
    ring = Keyring([key(), key("bob", OTHER)])
    assert ring.find([(b"host", b"x"), header]).name == "ada"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Basic " + ONE.encode())],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"x-api-key", b"")],
        [(b"x-api-key", ONE.encode()[:-1])],
        [(b"x-api-key", ONE.upper().encode())],
        [(b"x-api-key", b"\xff\xfe")],
        [(b"cookie", ONE.encode())],
    ],
)
def test_without_a_known_key_nobody_is_found(headers):
    with pytest.raises(Unauthorized, match="no valid API key; send one as"):
        Keyring([key()]).find(headers)


def test_without_keys_everyone_asks_and_nobody_manages():
    ring = Keyring()
    assert len(ring) == 0
    access = ring.find([])
    access.check("anything")
    assert not access.restricted
    with pytest.raises(Forbidden, match="admin rights"):
        access.check_admin()


def test_every_look_up_compares_in_constant_time(monkeypatch):
    """No shortcut beside hmac.compare_digest, known key or not."""
    compared = []
    import hmac

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    ring = Keyring([key()])
    ring.find([(b"x-api-key", ONE.encode())])
    with pytest.raises(Unauthorized):
        ring.find([(b"x-api-key", OTHER.encode())])
    assert len(compared) == 2


def test_what_is_kept_and_shown_holds_no_key():
    ring, one = Keyring([key()]), key()
    shown = repr(one) + repr(vars(ring)) + str(one)
    assert ONE not in shown
    assert one.sha256 not in shown


def test_names_and_patterns_of_deltas():
    access = Access(key(deltas=("mood", "team-*")))
    assert [access.allows(name) for name in ("mood", "team-a", "base", "moods")] == [True, True, False, False]
    access.check("team-b")
    with pytest.raises(Forbidden, match="does not open delta 'base'"):
        access.check("base")


def test_admins():
    Access(key(admin=True)).check_admin()


def test_calls_and_tokens_have_rates_of_their_own():
    now = 0.0
    access = Access(key(calls_per_second=2, tokens_per_second=10, burst_seconds=2), lambda: now)
    for _ in range(4):
        access.call()
    with pytest.raises(RateLimited, match=r"2 calls a second; try again in 0.5 s") as refused:
        access.call()
    assert refused.value.retry_after == 0.5
    access.charge(20)
    with pytest.raises(RateLimited, match="10 tokens a second"):
        access.charge(1)
    now = 0.5
    access.call()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "a key's name is ''"),
        ({"name": "a\nb"}, "printable"),
        ({"sha256": "xyz"}, "sha256 is no digest"),
        ({"calls_per_second": 0}, "calls_per_second is 0"),
        ({"tokens_per_second": float("nan")}, "tokens_per_second is nan"),
        ({"burst_seconds": -1}, "burst_seconds is -1"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        Key(**{"name": "ada", "sha256": "0" * 64, **fields})


@pytest.mark.parametrize("plain", ["", "short", "with a space in it", "émile-émile-émile"])
def test_keys_that_cannot_be_keys(plain):
    with pytest.raises(SpecError, match="at least 16 ASCII characters") as problem:
        digest_of(plain, "ada")
    assert not plain or plain not in str(problem.value)


@pytest.mark.parametrize("pair", [(key(), key("bob")), (key(), key(plain=OTHER))])
def test_every_key_and_name_once(pair):
    with pytest.raises(SpecError, match="is there twice"):
        Keyring(pair)
