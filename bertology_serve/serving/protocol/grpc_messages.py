"""The messages of the Open Inference Protocol's gRPC form, and of NVIDIA's repository and statistics extensions.

Written out from the public definitions, as a table. ``messages`` makes its classes, in a descriptor pool of their own:
clients in the same process, which bring generated ones of the same names, do not meet them. Fields are numbered from 1
in the order given, unless a number follows "=".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

PACKAGE, SERVICE = "inference", "inference.GRPCInferenceService"
# message: fields; "*" repeats, "name{}" is a map from strings, "|" stands between the members of a oneof
TABLE = """
ServerLiveRequest:
ServerLiveResponse: bool live
ServerReadyRequest:
ServerReadyResponse: bool ready
ModelReadyRequest: string name, string version
ModelReadyResponse: bool ready
ServerMetadataRequest:
ServerMetadataResponse: string name, string version, string* extensions
ModelMetadataRequest: string name, string version
TensorMetadata: string name, string datatype, int64* shape
ModelMetadataResponse: string name, string* versions, string platform, TensorMetadata* inputs, TensorMetadata* outputs
InferParameter: bool bool_param | int64 int64_param | string string_param | double double_param | uint64 uint64_param
InferTensorContents: bool* bool_contents, int32* int_contents, int64* int64_contents, uint32* uint_contents, \
uint64* uint64_contents, float* fp32_contents, double* fp64_contents, bytes* bytes_contents
InferInputTensor: string name, string datatype, int64* shape, InferParameter{} parameters, InferTensorContents contents
InferRequestedOutputTensor: string name, InferParameter{} parameters
ModelInferRequest: string model_name, string model_version, string id, InferParameter{} parameters, \
InferInputTensor* inputs, InferRequestedOutputTensor* outputs, bytes* raw_input_contents
InferOutputTensor: string name, string datatype, int64* shape, InferParameter{} parameters, InferTensorContents contents
ModelInferResponse: string model_name, string model_version, string id, InferParameter{} parameters, \
InferOutputTensor* outputs, bytes* raw_output_contents
ModelStatisticsRequest: string name, string version
StatisticDuration: uint64 count, uint64 ns
InferStatistics: StatisticDuration success, StatisticDuration fail, StatisticDuration queue, \
StatisticDuration compute_input, StatisticDuration compute_infer, StatisticDuration compute_output, \
StatisticDuration cache_hit, StatisticDuration cache_miss
ModelStatistics: string name, string version, uint64 last_inference, uint64 inference_count, uint64 execution_count, \
InferStatistics inference_stats
ModelStatisticsResponse: ModelStatistics* model_stats
ModelConfigRequest: string name, string version
ModelInput: string name, int32 data_type, int64* dims=4, bool optional=8
ModelOutput: string name, int32 data_type, int64* dims
ModelParameter: string string_value
ModelConfig: string name, string platform, int32 max_batch_size=4, ModelInput* input=5, ModelOutput* output=6, \
ModelParameter{} parameters=14, string backend=17
ModelConfigResponse: ModelConfig config
ModelRepositoryParameter: bool bool_param | int64 int64_param | string string_param | bytes bytes_param
RepositoryIndexRequest: string repository_name, bool ready
ModelIndex: string name, string version, string state, string reason
RepositoryIndexResponse: ModelIndex* models
RepositoryModelLoadRequest: string repository_name, string model_name, ModelRepositoryParameter{} parameters
RepositoryModelLoadResponse:
RepositoryModelUnloadRequest: string repository_name, string model_name, ModelRepositoryParameter{} parameters
RepositoryModelUnloadResponse:
"""
_SCALARS = {
    name: getattr(FieldDescriptorProto, f"TYPE_{name.upper()}")
    for name in ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")
}


def _file(package: str, table: str) -> FileDescriptorProto:
    found = FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for line in filter(None, table.splitlines()):
        name, _, fields = line.partition(":")
        message = found.message_type.add(name=name)
        union = "|" in fields
        if union:
            message.oneof_decl.add(name="parameter_choice")
        for place, (kind, label) in enumerate(_parts(fields.replace("|", ",")), 1):
            label, _, number = label.partition("=")
            field = _field(message, f".{package}.", kind, label, int(number or place))
            if union:
                field.oneof_index = 0
    return found


def _parts(fields: str) -> Iterator[tuple[str, str]]:
    for part in filter(None, (part.strip() for part in fields.split(","))):
        kind, _, label = part.partition(" ")
        yield kind, label


def _field(message: DescriptorProto, scope: str, kind: str, label: str, number: int) -> FieldDescriptorProto:
    """One field of a message; a map is a repeated message of keys and values, as protobuf has it."""
    many = kind.endswith(("*", "{}"))
    field = message.field.add(
        name=label,
        number=number,
        label=FieldDescriptorProto.LABEL_REPEATED if many else FieldDescriptorProto.LABEL_OPTIONAL,
    )
    bare = kind.removesuffix("*").removesuffix("{}")
    if kind.endswith("{}"):
        entry = message.nested_type.add(name=f"{label.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _field(entry, scope, "string", "key", 1)
        _field(entry, scope, bare, "value", 2)
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f"{scope}{message.name}.{entry.name}"
    elif bare in _SCALARS:
        field.type = _SCALARS[bare]
    else:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, scope + bare
    return field


class Message(Protocol):
    """A message; its fields are attributes, as the table says."""

    def ByteSize(self) -> int:
        """Bytes as it is sent."""
        ...

    def ListFields(self) -> list[tuple[FieldDescriptor, Any]]:
        """The fields that are set, and their values, by number."""
        ...

    def SerializeToString(self) -> bytes:
        """It as it is sent."""
        ...

    def HasField(self, name: str) -> bool:
        """Whether a field that is a message was set."""
        ...

    def __getattr__(self, name: str) -> Any: ...


class MessageType(Protocol):
    """The class of a message: called with its fields, and what reads and writes it."""

    FromString: Callable[[bytes], Message]
    SerializeToString: Callable[[Message], bytes]

    def __call__(self, **fields: object) -> Message: ...


def messages(package: str, table: str) -> Callable[[str], MessageType]:
    """What gives the class of a message of that table by its name."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file(package, table))
    return lambda name: cast(
        MessageType, message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
    )


message = messages(PACKAGE, TABLE)
