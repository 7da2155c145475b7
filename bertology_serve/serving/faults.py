"""Where an unexpected error happened, in words that are safe to log."""

from __future__ import annotations


def place_of(problem: BaseException) -> str:
    """Type, file and line of an error; never its message, which may hold somebody's text."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "an unknown place"
    return f"{type(problem).__name__} at {where}"
