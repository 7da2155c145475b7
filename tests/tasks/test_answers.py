"""The typed answers hold everything that a task's answer has."""

from __future__ import annotations

import msgspec
import pytest

from bertology_serve.tasks.answers import Answer
from tests.serving.conftest import RECORDS, deltas, encoder, pipeline, registry  # noqa: F401


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_an_answer_is_typed(name, pipeline):  # noqa: F811
    from bertology_serve.encoder.pipeline import Request

    (job,) = [pipeline.prepare(Request(name, RECORDS[name], "7", logits=True))]
    found = msgspec.json.decode(msgspec.json.encode(pipeline.run([job])[0].as_dict()))
    typed = msgspec.convert(found, Answer, strict=True)
    assert found.keys() <= set(Answer.__struct_fields__)
    assert msgspec.json.decode(msgspec.json.encode(typed)) == found
