from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertology_serve import errors
from bertology_serve.errors import BertologyError, Crashed, FormatError, NotFound, Overloaded
from bertology_serve.serving.execution.channel import HEAD, LARGEST, Channel, Lost, Op, fault, problem_of

SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
BODIES = st.dictionaries(
    st.text(), st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
)


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BertologyError)]


@contextmanager
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    one, other = socket.socketpair()
    channel = Channel(one)
    with other:
        try:
            yield channel, other
        finally:
            channel.close()


@settings(max_examples=40)
@given(st.sampled_from(Op), BODIES)
def test_what_is_sent_is_received(op, body):
    one, other = socket.socketpair()
    sender, receiver = Channel(one), Channel(other)
    sender.send(op, body)
    assert receiver.receive() == (op, body)
    sender.close()
    with pytest.raises(Lost, match="has gone"):
        receiver.receive()
    receiver.close()


@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_lost(sent):
    with pair() as (channel, other):
        other.sendall(sent)
        other.close()
        try:
            op, body = channel.receive()
        except Lost:
            return
        assert isinstance(op, Op)
        assert isinstance(body, dict)


@settings(max_examples=60)
@given(st.sampled_from(Op), BODIES, st.integers(0, 40), st.binary(min_size=1, max_size=3))
def test_a_frame_with_bytes_changed_is_a_frame_or_lost(op, body, at, change):
    with pair() as (channel, other), pair() as (writer, wire):
        writer.send(op, body)
        frame = bytearray(wire.recv(2**16))
        frame[at % len(frame) : at % len(frame) + len(change)] = change
        other.sendall(frame)
        other.close()
        try:
            channel.receive()
        except Lost:
            return


def test_a_frame_that_is_too_large_is_not_read():
    with pair() as (channel, other):
        other.sendall(HEAD.pack(Op.DONE, LARGEST + 1))
        with pytest.raises(Lost, match="at most"):
            channel.receive()


def test_one_who_does_not_answer_in_time_is_lost():
    with pair() as (channel, _):
        channel.patience = 0.05
        with pytest.raises(Lost, match="timed out"):
            channel.ask(Op.RUN, {})


def test_nobody_reads():
    with pair() as (channel, other):
        other.close()
        with pytest.raises(Lost, match="cannot send"):
            channel.ask(Op.RUN, {})


def test_questions_are_no_answers():
    with pair() as (channel, other):
        other.sendall(HEAD.pack(Op.RUN, 2) + b"{}")
        with pytest.raises(Lost, match="got RUN"):
            channel.ask(Op.RUN, {})


def test_a_closed_channel_keeps_its_number_while_somebody_holds_it():
    """Else one who is about to wait on it would wait on the next socket that is made."""
    with pair() as (channel, _):
        number = channel._socket.fileno()
        channel.close()
        one, other = socket.socketpair()
        with one, other:
            assert number not in (one.fileno(), other.fileno())
        with pytest.raises(Lost):
            channel.ask(Op.RUN, {})


def test_closing_ends_a_thread_that_waits():
    with pair() as (channel, _):
        found: list[Lost] = []

        def wait() -> None:
            try:
                channel.receive()
            except Lost as problem:
                found.append(problem)

        thread = threading.Thread(target=wait)
        thread.start()
        channel.close()
        thread.join(120)
        assert len(found) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_comes_back_as_itself(kind):
    back = problem_of(fault(kind("what was given")))
    assert (type(back), str(back)) == (kind, "what was given")


def test_errors_that_say_when_to_come_back():
    back = problem_of(fault(Crashed("twice", 7.0)))
    assert isinstance(back, Overloaded)
    assert back.retry_after == 7.0


@pytest.mark.parametrize("kind", ["", "nearest", "MOST_NAMED", "Exception", "difflib", None])
def test_no_other_class_is_ever_made(kind):
    assert type(problem_of({"kind": kind, "message": "m"})) is RuntimeError
    assert type(problem_of({"kind": "NotFound"})) is NotFound
    assert type(problem_of({"kind": "FormatError", "retry_after": "x"})) is FormatError
