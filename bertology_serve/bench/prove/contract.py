"""Figure 11: whatever the OpenAPI document allows or forbids is answered as it says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import HEADERS, Stage
from bertology_serve.serving.http.openapi import document

LATE = (503, 504)  # documented: no room now, and not within the time that the caller allows
CHECKS = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
Call = Callable[[str, int], None]


def measure(stage: Stage) -> Measured:
    """Valid and invalid calls of every operation."""
    if importlib.util.find_spec("schemathesis") is None:
        return Measured("not installed: schemathesis; pip install 'schemathesis>=4'", False)
    examples, failed, answered = stage.count(10, 100), dict[str, str](), 0
    with stage.server(stage.zoo, "--max-body-seconds", "5") as served:

        def count(_: Any) -> None:
            nonlocal answered
            answered += 1

        for label, operation in operations().items():
            try:
                check(operation, served.url, examples, count)
            except (AssertionError, BaseExceptionGroup) as problem:
                failed[label] = " ".join(str(problem).split())[:300]
    words = f"{answered:,} answers of {len(operations())} operations: {len(failed)} operations failed"
    words += f" ({', '.join(failed)})" if failed else ""
    return Measured(words, not failed and answered > 0, {"answered": answered, "failed": failed})


def operations() -> dict[str, Any]:
    """schemathesis's operations by their labels."""
    import schemathesis

    schema: Any = schemathesis.openapi.from_dict(document())
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def check(operation: Any, url: str, examples: int, seen: Callable[[Any], None] = lambda _: None) -> None:
    """Calls one operation with valid and invalid input; AssertionError where an answer is not as documented.

    What a valid call is the document says more loosely than the server holds it: any text may be a delta's name.
    """
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS as KNOWN
    from schemathesis.checks import load_all_checks

    load_all_checks()
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
    def call(case: Any) -> None:
        response = case.call(base_url=url.rstrip("/"), timeout=20, headers=HEADERS)
        seen(response)
        own = CHECKS if response.status_code in LATE else ("not_a_server_error", *CHECKS)
        case.validate_response(response, checks=KNOWN.get_by_names(own))

    call()
