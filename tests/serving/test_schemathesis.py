"""schemathesis over the OpenAPI document: valid and invalid calls of every operation get documented answers."""

from __future__ import annotations

import pytest

from bertology_serve.bench.prove.contract import check, operations

OPERATIONS = operations()


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_operation(server, label):
    check(OPERATIONS[label], server.url, examples=8)
