from __future__ import annotations

import pytest

from bertology_serve.serving.protocol import oip_model
from tests.serving.conftest import RECORDS


def test_metadata(registry):
    found = oip_model.metadata(registry.find("mood"))
    assert (found["name"], found["versions"], found["platform"]) == ("mood", ["1"], "bertology_packed")
    assert found["inputs"] == [
        {"name": "text", "datatype": "BYTES", "shape": [-1]},
        {"name": "text_pair", "datatype": "BYTES", "shape": [-1]},
    ]
    assert {output["name"]: output["shape"] for output in found["outputs"]} == {
        "label": [-1], "score": [-1], "scores": [-1, 3], "logits": [-1, 3],
        "delta": [-1], "version": [-1], "result_json": [-1],
    }  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_the_inputs_of_the_metadata_make_a_record_that_the_task_reads(registry, name):
    delta = registry.find(name)
    rows = {key: value if isinstance(value, list) else [value] for key, value in RECORDS[name].items()}
    assert rows.keys() <= {tensor["name"] for tensor in oip_model.metadata(delta)["inputs"]}
    assert oip_model.record_of(delta, rows, "row 0") == RECORDS[name]


def test_the_general_pair_of_texts_serves_every_task(registry):
    def record(name, *pair):
        return oip_model.record_of(registry.find(name), {"text": ["a"], "text_pair": pair}, "row 0")

    assert record("finder", "b") == {"question": "a", "context": "b"}
    assert record("chooser", "b", "c") == {"premise": "a", "choices": ["b", "c"]}
    assert record("mood") == {"text": "a"}


def test_server_metadata():
    assert oip_model.server_metadata()["extensions"] == [
        "binary_tensor_data", "model_repository", "model_configuration", "statistics",
    ]  # fmt: skip
