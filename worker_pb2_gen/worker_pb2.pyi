from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CompleteResponse(_message.Message):
    __slots__ = ["duplicate", "next", "success"]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    duplicate: bool
    next: Job
    success: bool
    def __init__(self, success: bool = ..., duplicate: bool = ..., next: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class CompleteResult(_message.Message):
    __slots__ = ["code", "duplicate", "job_id", "status"]
    CODE_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    code: str
    duplicate: bool
    job_id: str
    status: int
    def __init__(self, job_id: _Optional[str] = ..., status: _Optional[int] = ..., code: _Optional[str] = ..., duplicate: bool = ...) -> None: ...

class CompleteResults(_message.Message):
    __slots__ = ["results"]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[CompleteResult]
    def __init__(self, results: _Optional[_Iterable[_Union[CompleteResult, _Mapping]]] = ...) -> None: ...

class ExtendResponse(_message.Message):
    __slots__ = ["cancelled", "lease_seconds", "status"]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    cancelled: bool
    lease_seconds: float
    status: str
    def __init__(self, lease_seconds: _Optional[float] = ..., cancelled: bool = ..., status: _Optional[str] = ...) -> None: ...

class FailResponse(_message.Message):
    __slots__ = ["duplicate", "retry_in_seconds", "status"]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    RETRY_IN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    duplicate: bool
    retry_in_seconds: float
    status: str
    def __init__(self, status: _Optional[str] = ..., retry_in_seconds: _Optional[float] = ..., duplicate: bool = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ["attempt", "created_at", "expires_at", "headers", "id", "lease_seconds", "lease_token", "payload", "payload_bytes", "priority", "queue"]
    class HeadersEntry(_message.Message):
        __slots__ = ["key", "value"]
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    created_at: str
    expires_at: str
    headers: _containers.ScalarMap[str, str]
    id: str
    lease_seconds: float
    lease_token: str
    payload: str
    payload_bytes: bytes
    priority: int
    queue: str
    def __init__(self, id: _Optional[str] = ..., payload: _Optional[str] = ..., headers: _Optional[_Mapping[str, str]] = ..., payload_bytes: _Optional[bytes] = ..., queue: _Optional[str] = ..., priority: _Optional[int] = ..., attempt: _Optional[int] = ..., lease_token: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., created_at: _Optional[str] = ..., expires_at: _Optional[str] = ...) -> None: ...

class JobFailure(_message.Message):
    __slots__ = ["delay_seconds", "error", "job_id", "lease_token", "retry"]
    DELAY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    delay_seconds: float
    error: str
    job_id: str
    lease_token: str
    retry: bool
    def __init__(self, job_id: _Optional[str] = ..., lease_token: _Optional[str] = ..., error: _Optional[str] = ..., retry: bool = ..., delay_seconds: _Optional[float] = ...) -> None: ...

class JobLease(_message.Message):
    __slots__ = ["job_id", "lease_seconds", "lease_token"]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    lease_seconds: float
    lease_token: str
    def __init__(self, job_id: _Optional[str] = ..., lease_token: _Optional[str] = ..., lease_seconds: _Optional[float] = ...) -> None: ...

class JobRequest(_message.Message):
    __slots__ = ["lease_seconds", "max", "queues", "wait_seconds", "worker"]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    lease_seconds: float
    max: int
    queues: _containers.RepeatedScalarFieldContainer[str]
    wait_seconds: float
    worker: str
    def __init__(self, queues: _Optional[_Iterable[str]] = ..., wait_seconds: _Optional[float] = ..., lease_seconds: _Optional[float] = ..., worker: _Optional[str] = ..., max: _Optional[int] = ...) -> None: ...

class JobResult(_message.Message):
    __slots__ = ["content_type", "job_id", "lease_token", "next", "next_request", "payload", "payload_bytes"]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    NEXT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    content_type: str
    job_id: str
    lease_token: str
    next: bool
    next_request: JobRequest
    payload: str
    payload_bytes: bytes
    def __init__(self, job_id: _Optional[str] = ..., payload: _Optional[str] = ..., payload_bytes: _Optional[bytes] = ..., lease_token: _Optional[str] = ..., content_type: _Optional[str] = ..., next: bool = ..., next_request: _Optional[_Union[JobRequest, _Mapping]] = ...) -> None: ...

class JobResults(_message.Message):
    __slots__ = ["results"]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[JobResult]
    def __init__(self, results: _Optional[_Iterable[_Union[JobResult, _Mapping]]] = ...) -> None: ...

class Jobs(_message.Message):
    __slots__ = ["jobs"]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ["duplicate"]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    duplicate: bool
    def __init__(self, duplicate: bool = ...) -> None: ...
