"""Our definitions of the messages against those that NVIDIA generates."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor
from tritonclient.grpc import model_config_pb2, service_pb2

from bertology_serve.serving.protocol.grpc_messages import TABLE, message

THEIRS = {
    **service_pb2.DESCRIPTOR.message_types_by_name,
    **model_config_pb2.DESCRIPTOR.message_types_by_name,
}
ENUM, INT32 = descriptor.FieldDescriptor.TYPE_ENUM, descriptor.FieldDescriptor.TYPE_INT32  # the same over the wire
# they nest these; a name is not part of what goes over the wire
NESTED = {
    "TensorMetadata": "ModelMetadataResponse",
    "InferInputTensor": "ModelInferRequest",
    "InferRequestedOutputTensor": "ModelInferRequest",
    "InferOutputTensor": "ModelInferResponse",
    "ModelIndex": "RepositoryIndexResponse",
}


def fields(found: descriptor.Descriptor) -> dict[str, tuple[int, int, bool]]:
    return {
        field.name: (field.number, INT32 if field.type == ENUM else field.type, field.is_repeated)
        for field in found.fields
    }


@pytest.mark.parametrize("name", [line.split(":")[0] for line in TABLE.splitlines() if line])
def test_fields_are_theirs(name):
    theirs = THEIRS[NESTED[name]].nested_types_by_name[name] if name in NESTED else THEIRS[name]
    ours = fields(message(name).DESCRIPTOR)
    known = fields(theirs)
    assert {field: known[field] for field in ours} == ours
    if name not in (
        "ModelConfig",
        "ModelInput",
        "ModelOutput",
    ):  # they configure much that is not there to be configured
        assert known.keys() - ours.keys() <= {"batch_stats", "memory_usage", "response_stats"}


def test_a_message_survives_the_wire_as_theirs():
    made = message("ModelInferRequest")(model_name="mood", raw_input_contents=[b"x"])
    made.parameters["deltas"].string_param = "a,b"
    made.inputs.add(name="text", datatype="BYTES", shape=[1, 2])
    theirs = service_pb2.ModelInferRequest.FromString(made.SerializeToString())
    assert theirs.parameters["deltas"].string_param == "a,b"
    assert list(theirs.inputs[0].shape) == [1, 2]
    assert list(theirs.raw_input_contents) == [b"x"]
