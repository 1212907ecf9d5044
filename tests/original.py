"""The worker service as clients of the original server know it, in a descriptor pool of its own.

Nothing here comes from proto/worker.proto, so that a change there which breaks such clients is seen.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto

# message -> its fields: name, number, kind
MESSAGES = {
    "JobRequest": (),
    "Job": (("id", 1, "string"), ("payload", 2, "string"), ("headers", 3, "map")),
    "JobResult": (("job_id", 1, "string"), ("payload", 2, "string")),
    "CompleteResponse": (("success", 1, "bool"),),
}
METHODS = {"RequestJob": ("JobRequest", "Job"), "CompleteJob": ("JobResult", "CompleteResponse")}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="original.proto", package="worker", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            if kind == "map":
                entry = message.nested_type.add(name="HeadersEntry", options={"map_entry": True})
                for part, place in (("key", 1), ("value", 2)):
                    string = _FIELD.TYPE_STRING
                    entry.field.add(name=part, number=place, type=string, label=_FIELD.LABEL_OPTIONAL)
                message.field.add(
                    name=field,
                    number=number,
                    type=_FIELD.TYPE_MESSAGE,
                    type_name=f".worker.{name}.HeadersEntry",
                    label=_FIELD.LABEL_REPEATED,
                )
            else:
                type_ = getattr(_FIELD, f"TYPE_{kind.upper()}")
                message.field.add(name=field, number=number, type=type_, label=_FIELD.LABEL_OPTIONAL)
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def message(name: str) -> Any:
    """The class of one of the original's messages."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"worker.{name}"))


class Stub:
    """The original's client, on any channel: stub.RequestJob(message("JobRequest")())."""

    def __init__(self, channel: Any) -> None:
        for method, (request, answer) in METHODS.items():
            call = channel.unary_unary(
                f"/worker.WorkerService/{method}",
                request_serializer=message(request).SerializeToString,
                response_deserializer=message(answer).FromString,
            )
            setattr(self, method, call)
