from __future__ import annotations

import pytest

from bertology_serve import errors
from bertology_serve.serving.http.errors import UNEXPECTED, headers_of, message_of, status_of


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (errors.DataError("x"), 400),
        (errors.SpecError("x"), 400),
        (errors.FormatError("x"), 400),
        (errors.Unsupported("x"), 400),
        (errors.LimitError("x"), 413),
        (errors.NotFound("x"), 404),
        (errors.Overloaded("x"), 503),
        (errors.RateLimited("x"), 429),
        (errors.Unauthorized("x"), 401),
        (errors.Forbidden("x"), 403),
        (errors.Expired("x"), 504),
        (errors.VerificationError("x"), 500),
        (errors.BertologyError("x"), 500),
        (ValueError("x"), 500),
    ],
)
def test_status(problem, status):
    assert status_of(problem) == status


def test_only_messages_written_for_the_caller_reach_it():
    assert message_of(errors.DataError("line one\n  line two")) == "line one line two"
    assert message_of(ValueError("a secret")) == UNEXPECTED


def test_retry_after_is_in_whole_seconds_rounded_up():
    assert headers_of(errors.Overloaded("x", retry_after=1.2)) == {"Retry-After": "2"}
    assert headers_of(errors.RateLimited("x", retry_after=0.2)) == {"Retry-After": "1"}
    assert headers_of(errors.DataError("x")) == {}


def test_who_shows_no_key_is_told_how_to():
    assert headers_of(errors.Unauthorized("x")) == {"WWW-Authenticate": "Bearer"}
