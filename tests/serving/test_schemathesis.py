"""schemathesis over the OpenAPI document: valid and invalid calls of every operation get documented answers.

What a valid call is the document says more loosely than the server holds it: any text may be the name of a delta.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from bertology_serve.serving.openapi import document

load_all_checks()
HELD = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_operation(server, label):
    operation = OPERATIONS[label]
    url = server.url.rstrip("/")

    @settings(max_examples=8, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in MODES]))
    def call(case: Any) -> None:
        response = case.call(base_url=url, timeout=20)
        case.validate_response(response, checks=CHECKS.get_by_names(HELD))

    call()
