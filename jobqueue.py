#!/usr/bin/env python3
"""jobqueue: a synchronous job queue in one file.

A client POSTs a job and is held until a worker, which pulls jobs over HTTP or gRPC, hands in the result.

    python jobqueue.py                                   # HTTP on 3000, gRPC on 50051, data in ./data
    curl -d '{"x": 1}' localhost:3000/api/submit         # waits for the result
    curl 'localhost:3000/api/worker/poll?wait=20'        # a worker takes the job ...
    curl -d '{"y": 2}' localhost:3000/api/worker/complete/JOB_ID     # ... and hands in the result

The life of a job:

    submit --> delayed --(delay over)--> pending --(poll)--> processing --(complete)--> completed
                  ^                          ^                 |  |  |
                  |                          +-----------------+  |  |
                  |                       lease over, release     |  |
                  +---------------------------(fail, retry)-------+  +--(no attempts left)--> failed
    delayed, pending, processing --(cancel)--> cancelled        failed, expired, cancelled,
    delayed, pending --(ttl over)--> expired                    delayed --(requeue)--> pending

The laws of this file:

1. A job changes only through TRANSITIONS; what is not in the table raises.
2. A verb of the engine takes its lock once. The order of the journal is the order of the lock. Waiting for the
   disk is done outside the lock.
3. A record is written before its job is handed out, and synced before anybody is told that it was accepted.
4. A verb that may wait returns a Future. Nobody parks a thread to wait for an answer over HTTP.
5. One waiter is woken for one event.
6. Only the journal writes files; only Clock reads the time.

The file reads top to bottom; `grep '^# ==' jobqueue.py` is its table of contents.
"""

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - whoever has only the file learns it here
    raise SystemExit(f"jobqueue needs Python 3.11 or newer; this is {sys.version.split()[0]}")

# While Python runs a script it keeps the script's syntax tree: 19 MB of this one. So the process begins anew from the
# compiled code, in a file without a name, where there are such (Linux) and no debugger or profiler runs the script.
if __name__ == "__main__" and hasattr(os, "memfd_create") and sys._getframe().f_back is None:
    loader = type(__loader__).__name__
    if loader == "SourcelessFileLoader" and sys.argv[0].startswith("/proc/self/fd/") and len(sys.argv) > 1:
        # It has begun anew. Until the path is right nothing may be imported: Python made it the root folder.
        os.close(int(sys.argv.pop(0).rpartition("/")[2]))
        __file__ = os.path.abspath(sys.argv[0])
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(__file__))
    elif loader == "SourceFileLoader":
        import fcntl
        import importlib.util
        import marshal

        flags, given = sys.orig_argv[: -len(sys.argv)], sys.orig_argv[-len(sys.argv) :]
        skips = any(flag[:1] == "-" and "x" in flag for flag in flags)  # -x would skip a line of the compiled code
        try:
            if os.path.samefile(sys.executable or "", "/proc/self/exe") and not skips:  # argv[0] may name another one
                with open(os.memfd_create("jobqueue"), "wb") as file:
                    file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(sys._getframe().f_code))
                    file.flush()
                    inherited = fcntl.fcntl(file, fcntl.F_DUPFD, 3)  # a standard stream that is closed stays so
                    path = f"/proc/self/fd/{inherited}"
                    try:
                        open(path, "rb").close()  # may it be opened? Afterwards there is no way back
                        os.execv(sys.executable, [*flags, path, *given])
                    finally:
                        os.close(inherited)
        except OSError:
            pass  # then it goes on as it is

import abc
import argparse
import array
import base64
import bisect
import collections
import concurrent.futures as concurrent_futures
import contextlib
import email.utils
import errno
import functools
import gc
import hashlib
import heapq
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import random
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
import types
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__version__ = "1.0.0"
__all__ = [
    *("Server", "LeasedJob", "JobQueueError", "DataError", "DiskError", "Clock", "main"),
    *("Engine", "LocalEngine", "Settings", "Terms", "Job", "Claim", "Outcome"),  # for an engine of your own
]

log = logging.getLogger("jobqueue")
log.addHandler(logging.NullHandler())

# == Settings ==========================================================================================================
# One table makes the flags, the environment variables, the help text and the arguments of Server.


_PLAIN_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?", re.ASCII)  # 1e-05, as programs write it


def _number(kind: type, low: float, high: float) -> Callable[[str, Any], Any]:
    def parse(name: str, given: Any) -> Any:
        value = math.nan
        if not isinstance(given, str) or _PLAIN_NUMBER.fullmatch(given):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                value = kind(given)
                value = int(value) if value == value // 1 else value  # 60, not 60.0, when it is shown
                if not isinstance(given, str) and value != given:  # 2.7 attempts
                    value = math.nan
        if not low <= value <= high:
            whole = "a whole number, " if kind is int and value != value else ""
            limits = " to ".join(str(limit) if isinstance(limit, int) else f"{limit:.15g}" for limit in (low, high))
            raise ValueError(f"{name} must be {whole}{limits}, got {given!s}")
        return value

    parse.schema = {"type": "integer" if kind is int else "number", "minimum": low, "maximum": high}
    return parse


def _choice(*allowed: str) -> Callable[[str, Any], str]:
    def parse(name: str, given: Any) -> str:
        if given not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
        return given

    parse.schema = {"type": "string", "enum": list(allowed)}
    return parse


_port = _number(int, 0, 65535)


def _port_or_off(name: str, given: Any) -> int | None:
    try:
        return None if given in (None, "off") else _port(name, given)
    except ValueError as error:
        raise ValueError(f"{error}; 'off' runs without") from None


def _text(name: str, given: Any) -> str:
    if given == "":  # what "$UNSET" comes to: without its file of tokens, a server would be open to all
        raise ValueError(f"{name} is empty; leave it out to run without")
    text = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {given!r}")
    return text


def _text_or_none(name: str, given: Any) -> str | None:
    return None if given is None else _text(name, given)


def _names(name: str, given: Any) -> tuple[str, ...]:
    with contextlib.suppress(TypeError, AttributeError):
        words = given.split(",") if isinstance(given, str) else given or ()
        return tuple(word.strip().lower() for word in words if word.strip())
    raise ValueError(f"{name} must be names, got {given!r}")


def _switch(name: str, given: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(given, bool):
        return given
    if str(given).lower() not in words:
        raise ValueError(f"{name} must be true or false, got {given!r}")
    return words[str(given).lower()]


KIB, MIB = 1 << 10, 1 << 20
DAY, DECADE = 86400, 3650 * 86400


class Setting(NamedTuple):
    """A row of SETTINGS."""

    name: str
    parse: Callable[[str, Any], Any]
    default: Any
    help: str
    env: str | None = None  # a name of the original's, beside JOBQUEUE_<NAME>

    @property
    def flag(self) -> str:
        """--data-dir for data_dir."""
        return "--" + self.name.replace("_", "-")

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that set it, the one that wins first."""
        own = "JOBQUEUE_" + self.name.upper()
        return (own, self.env) if self.env else (own,)

    def told(self, given: str) -> str:
        """Its flag, and the variable that `given` stands in or might stand in."""
        variable = next((name for name in self.variables if os.environ.get(name) == given), self.variables[0])
        return f"{self.flag} ({variable})"


SECONDS = _number(float, 0, DECADE)
COUNT, COUNT_OR_NONE = _number(int, 1, 1 << 40), _number(int, 0, 1 << 40)
_LEASE = _number(float, 1, 43200)
_ATTEMPTS = _number(int, 1, 100)

SETTINGS = (
    Setting("host", _text, "127.0.0.1", "address to listen on; a wider one wants --tokens (or --insecure)"),
    Setting("port", _port, 3000, "HTTP port; 0 takes a free one", "PORT"),
    Setting("grpc_port", _port_or_off, 50051, "gRPC port; 0 takes a free one, 'off' runs without gRPC", "GRPC_PORT"),
    Setting("data_dir", _text, "data", "folder of the journal; made when it is not there"),
    Setting("fsync", _choice("always", "interval", "never"), "always", "when an answer waits for the disk"),
    Setting("fsync_interval", SECONDS, 0.05, "seconds between two syncs with --fsync interval"),
    Setting("lease", _LEASE, 300, "seconds a worker has for a job unless it or the job says otherwise"),
    Setting("attempts", _ATTEMPTS, 3, "how often a job is tried unless it says otherwise"),
    Setting("drain", SECONDS, 30, "seconds a stop waits for the jobs in progress"),
    # 4 MiB less 64 KiB: a job with its headers fits the 4 MiB that a gRPC client takes by default.
    Setting("max_payload", _number(int, 0, 1 << 30), 4128768, "bytes of a payload or a result"),
    Setting("max_batch", COUNT, 16 * MIB, "bytes of a body that holds many payloads"),
    Setting("max_request_line", COUNT, 8 * KIB, "bytes of an HTTP request line"),
    Setting("max_headers", COUNT, 32 * KIB, "bytes of the headers of a request"),
    Setting("max_connections", COUNT, 4096, "connections at the same time; fewer where ulimit -n is too low for them"),
    Setting("max_held", COUNT, 3072, "clients held at the same time; fewer where workers would have no room"),
    Setting("max_jobs", COUNT, 2_000_000, "unfinished jobs in all queues"),
    Setting("max_bytes", COUNT, 1024 * MIB, "bytes of all unfinished jobs"),
    Setting("header_timeout", SECONDS, 10, "seconds within which a request's headers must be there"),
    Setting("body_timeout", SECONDS, 10, "seconds for a body, and one more for each 16 KiB of it"),
    Setting("idle_timeout", _number(float, 1, DECADE), 120, "seconds a connection may lie idle between two requests"),
    Setting("keep_completed", SECONDS, 3600, "seconds a completed, cancelled or expired job is kept"),
    Setting("keep_failed", SECONDS, 7 * DAY, "seconds a failed job is kept"),
    Setting("keep_jobs", COUNT_OR_NONE, 10_000, "finished jobs that are kept"),
    Setting("keep_bytes", _number(int, 0, 1 << 50), 256 * MIB, "bytes of finished jobs that are kept"),
    Setting("reserve", COUNT_OR_NONE, MIB, "bytes of disk held back so that completions land on a full disk"),
    Setting("compact_bytes", COUNT, 64 * MIB, "size from which the journal is compacted, when half of it is dead"),
    Setting("grpc_threads", _number(int, 4, 10_000), 128, "threads of gRPC; with an unknown grpcio, each call has one"),
    Setting("tokens", _text_or_none, None, "file of access tokens, a line each: SCOPE[,SCOPE] TOKEN [NAME]"),
    Setting("tls_cert", _text_or_none, None, "certificate file (PEM): serve both sides over TLS"),
    Setting("tls_key", _text_or_none, None, "key file (PEM) of --tls-cert"),
    Setting("tls_client_ca", _text_or_none, None, "CA file (PEM): ask each caller for a certificate of this CA"),
    Setting("allow_host", _names, (), "host names, comma-separated, that a Host header may carry beside IP addresses"),
    Setting("insecure", _switch, False, "listen on a wider --host without tokens"),
    Setting("access_log", _switch, False, "log a line for each request"),
    Setting("log_format", _choice("text", "json"), "text", "a log line is text or a JSON object"),
    Setting("log_level", _choice("debug", "info", "warning", "error"), "info", "what is logged"),
)


class Settings:
    """All settings as attributes; an unknown name or a bad value is a ValueError that says what would do."""

    def __init__(self, **given: Any) -> None:
        known = {setting.name: setting for setting in SETTINGS}
        for name in given.keys() - known.keys():
            raise ValueError(f"unknown setting {name!r}; there are {', '.join(known)}")
        for name, setting in known.items():
            setattr(self, name, setting.parse(name, given[name]) if name in given else setting.default)


def readable(flag: str, path: str, *kinds: str) -> str:
    """The path of a file; ValueError, with its flag, unless it can be read and holds PEM blocks of these kinds."""
    try:
        with open(path, "rb") as file:
            text = file.read() if kinds else b""
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from None
    for kind in kinds:
        if f"{kind}-----".encode() not in text:
            raise ValueError(f"{flag} {path} holds no {kind.lower()} in PEM")
    return path


# == Clock =============================================================================================================
# Leases, delays and waits run on the monotonic clock; the wall clock only stamps what people read and what must
# survive a restart. Tests put their own clock here.


class Clock:
    """The only place where time is read."""

    monotonic = staticmethod(time.monotonic)  # seconds, from no moment in particular; never set
    time = staticmethod(time.time)  # seconds since 1970

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Wait on `condition`, which is held, until it is notified or `seconds` are over (None: no limit)."""
        condition.wait(seconds)


def microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


@functools.lru_cache(64)  # most moments of an answer lie in the same few seconds
def _iso_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S.")


def iso_time(moment: int) -> str:
    """Microseconds since 1970 as RFC 3339 with six digits, as in 2023-06-01T12:34:56.123456Z."""
    second, rest = divmod(moment, 1_000_000)
    return f"{_iso_second(second)}{rest:06d}Z"


# == Errors ============================================================================================================
# One table serves both wires: code -> HTTP status, gRPC status, title.

ERRORS = {
    "bad_http": (400, "INVALID_ARGUMENT", "The request is not valid HTTP"),
    "invalid_parameter": (400, "INVALID_ARGUMENT", "A parameter is unknown or malformed"),
    "invalid_request": (400, "INVALID_ARGUMENT", "The body is not what this route takes"),
    "unauthorized": (401, "UNAUTHENTICATED", "A valid token is needed"),
    "forbidden": (403, "PERMISSION_DENIED", "The token's scope does not cover this"),
    "host_refused": (403, "PERMISSION_DENIED", "The Host header names a host that is not allowed"),
    "cross_site": (403, "PERMISSION_DENIED", "A page of another site may not call this"),
    "not_found": (404, "UNIMPLEMENTED", "There is no such path"),
    "job_not_found": (404, "NOT_FOUND", "There is no such job"),
    "no_jobs": (404, "NOT_FOUND", "No job is waiting"),
    "method_not_allowed": (405, "UNIMPLEMENTED", "The path does not take this method"),
    "request_timeout": (408, "DEADLINE_EXCEEDED", "The request took too long to arrive"),
    "lease_lost": (409, "FAILED_PRECONDITION", "The lease is no longer this worker's"),
    "job_finished": (409, "FAILED_PRECONDITION", "The job has come to its end"),
    "job_not_leased": (409, "FAILED_PRECONDITION", "The job is not in a worker's hands"),
    "job_not_finished": (409, "FAILED_PRECONDITION", "The job has not come to its end"),
    "job_cancelled": (410, "CANCELLED", "The job was cancelled"),
    "job_cleared": (410, "CANCELLED", "The queue was cleared"),
    "payload_too_large": (413, "RESOURCE_EXHAUSTED", "The body is too large"),
    "uri_too_long": (414, "INVALID_ARGUMENT", "The request line is too long"),
    "unsupported_media_type": (415, "INVALID_ARGUMENT", "The Content-Type is not what this route takes"),
    "expectation_failed": (417, "INVALID_ARGUMENT", "The expectation cannot be met"),
    "key_reused": (422, "FAILED_PRECONDITION", "The Idempotency-Key stands for another job"),
    "headers_too_large": (431, "INVALID_ARGUMENT", "The headers are too large"),
    "internal": (500, "INTERNAL", "The server made a mistake"),
    "not_implemented": (501, "UNIMPLEMENTED", "This is not supported"),
    "job_failed": (502, "ABORTED", "The job failed"),
    "draining": (503, "UNAVAILABLE", "The server is stopping"),
    "queue_full": (503, "UNAVAILABLE", "The queue is full"),
    "too_many_clients": (503, "UNAVAILABLE", "Too many clients are waiting"),
    "outcome_unknown": (503, "UNAVAILABLE", "The disk failed; whether this took effect is unknown"),
    "job_expired": (504, "DEADLINE_EXCEEDED", "The job's time to live ran out"),
    "http_version": (505, "UNIMPLEMENTED", "This HTTP version is not supported"),
    "disk_full": (507, "RESOURCE_EXHAUSTED", "The disk did not take it"),
}
RETRY_AFTER = {"draining": 5, "queue_full": 1, "too_many_clients": 1}  # seconds


class JobQueueError(Exception):
    """What went wrong: `code` (a key of ERRORS), `detail` for a person, `job_id` where there is one; `status`,
    `grpc_status` and `title` are those of ERRORS."""

    def __init__(self, code: str, detail: str, job_id: str | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.job_id = code, detail, job_id
        self.status, self.grpc_status, self.title = ERRORS[code]
        self.allow = ""  # of method_not_allowed: the methods there are


class DataError(Exception):
    """The data folder cannot be used: damaged, of a newer format, or in use. The text says where and what to do."""


class DiskError(Exception):
    """The disk fails at the start. Nothing was lost; the text says what to do."""


# == Jobs ==============================================================================================================
# Pure rules: no disk, no lock, no clock. A job is a value; whoever holds one holds what was true at that moment.

_make = tuple.__new__  # _make(Job, fields): as Job(*fields), in a fifth of the time, so all of them have to be there

OVERHEAD = 256  # bytes that a job takes beside its payload and headers, roughly

FINAL = frozenset(("completed", "failed", "expired", "cancelled"))
STATES = ("delayed", "pending", "processing", "completed", "failed", "expired", "cancelled")

# (state, verb) -> state. Time brings three of the verbs: ripen (the delay is over), lapse (the lease ran out), expire.
# give_back: the answer of the poll did not reach its worker. retry_now: a retry without a delay.
TRANSITIONS = {
    ("delayed", "ripen"): "pending",
    ("delayed", "expire"): "expired",
    ("delayed", "cancel"): "cancelled",
    ("delayed", "requeue"): "pending",
    ("pending", "lease"): "processing",
    ("pending", "expire"): "expired",
    ("pending", "cancel"): "cancelled",
    # A worker whose lease ran out, and whose job nobody else has taken since, may still end it.
    ("pending", "complete"): "completed",
    ("pending", "fail"): "failed",
    ("pending", "retry"): "delayed",
    ("pending", "retry_now"): "pending",
    ("pending", "release"): "pending",
    ("pending", "extend"): "processing",
    ("processing", "complete"): "completed",
    ("processing", "fail"): "failed",
    ("processing", "retry"): "delayed",
    ("processing", "retry_now"): "pending",
    ("processing", "release"): "pending",
    ("processing", "give_back"): "pending",
    ("processing", "lapse"): "pending",
    ("processing", "extend"): "processing",
    ("processing", "cancel"): "cancelled",
    ("failed", "requeue"): "pending",
    ("expired", "requeue"): "pending",
    ("cancelled", "requeue"): "pending",
}


class Terms(NamedTuple):
    """What a submission says beside its payload. Spans are seconds; None: the server's figure, or no limit."""

    queue: str = "default"
    priority: int = 0
    headers: str = "{}"  # the submitter's, as JSON text
    attempts: int = 3  # how often it may be tried
    lease: float | None = None
    ttl: float | None = None
    delay: float = 0.0
    key: str | None = None  # the Idempotency-Key


class Job(NamedTuple):
    """One job, frozen. Times are microseconds since 1970, spans are seconds; None means: not set."""

    number: int  # its place in the line, and in listings
    id: str
    queue: str
    priority: int
    created: int
    payload: bytes
    kind: str  # of the payload: json, text or binary
    headers: str
    attempts: int
    lease: float | None = None
    ttl: float | None = None
    key: str | None = None
    # what a lease sets; `leased` relies on their order
    state: str = "pending"
    token: str | None = None  # of the lease in force, or of the last one
    lease_seconds: float | None = None
    settled: str | None = None  # the verb by which that lease ended; None while in force, "lapse" when it ran out
    worker: str | None = None
    started: int | None = None
    deliveries: int = 0
    # what else happens to it
    failures: int = 0
    delay: float = 0.0  # the one that runs or ran last
    available: int | None = None  # when that delay is over
    expires: int | None = None
    extended: int | None = None  # when the lease in force was extended last
    # its end; `completed` relies on their order
    finished: int | None = None
    result: bytes | None = None
    result_kind: str | None = None
    content_type: str | None = None  # of the result
    error: str | None = None
    seq: int = 0  # of its last record in the journal: what an answer about this state has to wait for

    def changed(self, **changes: Any) -> Job:
        """As _replace does it, in a third of the time."""
        values = list(self)
        for name, value in changes.items():
            values[_FIELD_INDEX[name]] = value
        return _make(Job, values)

    def recorded(self, seq: int) -> Job:
        """The same, with the number of its record."""
        return _make(Job, (*self[:_AT_SEQ], seq))

    def leased(self, token: str, seconds: float, worker: str, started: int, seq: int) -> Job:
        """As moved by `lease`; spelled out, since every job goes this way, as the next one."""
        fresh = (state_after(self, "lease"), token, seconds, None, worker, started, self.deliveries + 1)
        return _make(Job, (*self[:_AT_STATE], *fresh, *self[_AT_FAILURES:_AT_SEQ], seq))

    def completed(
        self, token: str | None, finished: int, result: bytes, kind: str, content_type: str | None, seq: int
    ) -> Job:
        """As moved by `complete`; `token` is the lease's, or None where it is void from now on."""
        fresh = (state_after(self, "complete"), token, self.lease_seconds, "complete")
        end = (finished, result, kind, content_type, self.error, seq)
        return _make(Job, (*self[:_AT_STATE], *fresh, *self[_AT_WORKER:_AT_FINISHED], *end))

    def shifted(self, shift: int) -> Job:
        """The same, by a wall clock that was set on by so many microseconds."""
        values = list(self)
        for index in _MOMENTS:
            if values[index] is not None:
                values[index] += shift
        return _make(Job, values)

    def size(self) -> int:
        """Bytes of what the client sent, and of keeping it."""
        return len(self.payload) + len(self.headers) + OVERHEAD

    def final_size(self) -> int:
        """The same once it has ended."""
        return self.size() + len(self.result or b"") + len(self.error or "")


_NEW = tuple(Job._field_defaults.values())[3:]  # from its state on
_FIELD_INDEX = {name: index for index, name in enumerate(Job._fields)}
_AT_STATE, _AT_WORKER, _AT_FAILURES, _AT_FINISHED, _AT_SEQ = map(
    _FIELD_INDEX.get, ("state", "worker", "failures", "finished", "seq")
)
_MOMENTS = [_FIELD_INDEX[name] for name in ("created", "started", "available", "expires", "extended", "finished")]


def state_after(job: Job, verb: str) -> str:
    """The state that `verb` leads to; raises JobQueueError when the job's state does not allow it."""
    state = TRANSITIONS.get((job.state, verb))
    if state is None:
        too_early = "job_not_finished" if verb == "requeue" else "job_not_leased"
        code = "job_finished" if job.state in FINAL else too_early
        raise JobQueueError(code, f"job {job.id} is {job.state}: {verb} is not possible", job.id)
    return state


def moved(job: Job, verb: str, **changes: Any) -> Job:
    """The job after `verb`; raises JobQueueError when its state does not allow that."""
    return job.changed(state=state_after(job, verb), **changes)


def retry_delay(failures: int) -> float:
    """Seconds until the next attempt after that many failures: doubling from 1 to 300, give or take 20 %."""
    return min(300.0, 2.0 ** (failures - 1)) * random.uniform(0.8, 1.2)


def check_lease(job: Job, token: str | None, verb: str) -> bool:
    """May the holder of `token` settle this job by `verb`? True: yes. False: it did so before. Else it raises.

    Without a token (the original's workers have none) whoever knows the id may, while the job is in a worker's
    hands or its lease has run out and nobody else has taken it.
    """
    if token is not None and token == job.token:
        if job.settled == verb:
            return False
        if job.state not in FINAL and job.settled in (None, "lapse"):
            return True
    if job.state in FINAL:
        raise JobQueueError("job_finished", f"job {job.id} is {job.state}", job.id)
    if token is not None:
        raise JobQueueError("lease_lost", f"this lease of job {job.id} has ended; the job is {job.state}", job.id)
    if job.state == "processing" or (job.state == "pending" and job.settled == "lapse"):
        return True
    raise JobQueueError("job_not_leased", f"job {job.id} is {job.state}, in no worker's hands", job.id)


def _last_error(job: Job) -> str:
    """What the worker said before the job ended in another way."""
    return f"; its last error: {job.error}" if job.error else ""


# -- payloads ----------------------------------------------------------------------------------------------------------
# A payload is bytes and a kind. It is looked at once, when it comes in, and never parsed and printed again.


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# `len` as the number parser: nothing is converted, so no digit is lost and no huge number costs anything.
_strict = json.JSONDecoder(parse_constant=_no_constant, parse_int=len, parse_float=len)
_strict_json, _scan_once = _strict.decode, _strict.scan_once


def kind_of(data: bytes) -> str:
    """`json` (strictly: no NaN, no Infinity), `text` (other UTF-8) or `binary`."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "binary"
    return "json" if _is_json(text) else "text"


def _is_json(text: str) -> bool:
    try:
        if _scan_once(text, 0)[1] < len(text):
            _strict_json(text)  # white space around it is fine
        return True
    except StopIteration:  # it begins with white space, or is not JSON
        bare = text.lstrip(" \t\n\r")
        return len(bare) < len(text) and _is_json(bare)
    except ValueError:
        return False
    except RecursionError:
        return _is_deep_json(text)


# What follows is for JSON nested deeper than Python's parser can follow. A loop over its tokens would stop everybody
# else for seconds; so each step below runs over all of it at C's speed.
_NOT_IN_JSON = bytes({*range(32)} - {*b"\t\n\r"})  # \0, \1 and \2 are free to stand for something, then
_ESCAPES = (rb"\\", rb"\"", rb"\/", rb"\b", rb"\f", rb"\n", rb"\r", rb"\t")  # \\ first: its second half begins none
_ESCAPED_CODE = re.compile(rb"\\u[0-9A-Fa-f]{4}")
_LONG_NUMBER = re.compile(rb"[0-9](?=[0-9.eE])(?:(?<!0)[0-9]*)?(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
# In two steps, each mark becomes one of: o opens a nesting, c closes one, a comma, 0 (a value), ! (misplaced).
_SHAPES = bytes.maketrans(b"[(,;0]}{k:", b"oo,,0cc!!!")
_MISPLACED = (b"!", b"oc", b"o,", b",c", b",,", b"0o", b"00", b"co", b"c0")
_CLOSING = bytes.maketrans(b"[{", b"]}")
_NESTING = re.compile(rb"([\[{]*)([\]}]*)")


def _is_deep_json(text: str) -> bool:
    """Is it a JSON array or object, however deep?"""
    data = text.encode()
    if len(data.translate(None, _NOT_IN_JSON)) < len(data):
        return False
    if b"\\" in data:
        for escape in _ESCAPES:
            data = data.replace(escape, b"\0")
        data = _ESCAPED_CODE.sub(b"\0", data)
    parts = data.split(b'"')  # every other one is a string
    if len(parts) % 2 == 0 or len((strings := b"".join(parts[1::2])).translate(None, b"\\\t\n\r")) < len(strings):
        return False
    data = b"\1".join(parts[::2])  # a string is \1 now; next, true, false and null are \2, numbers and digits 0
    data = data.replace(b"true", b"\2").replace(b"false", b"\2").replace(b"null", b"\2")
    data = _LONG_NUMBER.sub(b"0", data).translate(_DIGITS).replace(b"-0", b"0")
    data = data.translate(None, b" \t\n\r")
    return not data.translate(None, b"[]{},:0\1\2") and _is_ordered(data)


def _is_ordered(marks: bytes) -> bool:
    """Does each mark of a JSON text stand where it may? An opening brace with a key is ( here, a comma with one ;."""
    marks = marks.replace(b"\1:", b"k").replace(b"\1", b"0").replace(b"\2", b"0")
    marks = marks.replace(b"{k", b"(").replace(b",k", b";").replace(b"[]", b"0").replace(b"{}", b"0")
    shape = marks.translate(_SHAPES)
    if any(pair in shape for pair in _MISPLACED):
        return False
    # A comma ends one member of what it stands in and begins the next: so a comma that stands in the wrong kind of
    # nesting shows as a bracket that does.
    marks = marks.translate(None, b"0").replace(b",", b"][").replace(b";", b"}{").replace(b"(", b"{")
    return _is_nested(marks)


def _is_nested(brackets: bytes) -> bool:
    size = 0
    while len(brackets) != size:
        size = len(brackets)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(brackets) > 0.9 * size:  # few are left that stand beside each other
            break
    opened = bytearray()
    for opening, closing in (run.groups() for run in _NESTING.finditer(brackets)):
        opened += opening
        if closing:
            if opened[-len(closing) :].translate(_CLOSING)[::-1] != closing:
                return False
            del opened[-len(closing) :]
    return not opened


# Where one ends among others is found by depth: most stretches are only counted, the last is gone through.
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_SOME_PARTS = re.compile(rf'(?:[^"]{{1,256}}|{_STRING}){{1,32}}', re.DOTALL)
_QUOTED = re.compile(_STRING, re.DOTALL)
_BRACKETS = re.compile(rf"{_STRING}|[\[\]{{}}]", re.DOTALL)
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
_STEPS = bytes(_STEP.get(chr(byte), 0) % 256 for byte in range(256))


def _deep_end(text: str, at: int) -> int:
    """Where the JSON array or object at `at` ends; -1: it is none."""
    depth, start = 0, at
    while some := _SOME_PARTS.match(text, start):
        brackets = _QUOTED.sub("", some[0])
        up = brackets.count("[") + brackets.count("{")
        down = brackets.count("]") + brackets.count("}")
        if down >= depth and _lowest(brackets) <= -depth:
            end = _closed_at(text, start, depth)
            return end if _is_deep_json(text[at:end]) else -1
        depth, start = depth + up - down, some.end()
    return -1


def _lowest(brackets: str) -> int:
    """How far these brackets lead down from where they begin, as a number below 0."""
    steps = array.array("b", brackets.encode("ascii", "replace").translate(_STEPS))
    return min(itertools.accumulate(steps), default=1)


def _closed_at(text: str, start: int, depth: int) -> int:
    """Where a nesting that is `depth` deep at `start` is closed."""
    for mark in _BRACKETS.finditer(text, start):
        depth += _STEP.get(mark[0], 0)
        if depth == 0 and mark[0] in "]}":
            return mark.end()
    return start


_quote = json.encoder.encode_basestring  # a text as a JSON string, in Unicode
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)
if json.encoder.c_make_encoder:
    # What JSONEncoder.encode makes anew at each call, made once: two thirds of the time of a small object.
    _encode = json.encoder.c_make_encoder(None, _encoder.default, _quote, None, ":", ",", False, False, True)

    def json_text(value: Any) -> str:
        """Compact JSON, in Unicode."""
        return "".join(_encode(value, 0))
else:
    json_text = _encoder.encode


def as_text(kind: str, data: bytes) -> str:
    """A payload as text: base64 where it is binary."""
    return data.decode() if kind != "binary" else base64.b64encode(data).decode()


def as_json(kind: str, data: bytes) -> str:
    """A payload as a JSON value: verbatim where it is JSON, else a string."""
    return data.decode() if kind == "json" else _quote(as_text(kind, data))


# -- records -----------------------------------------------------------------------------------------------------------
# A job in the journal: its fields by name, those at their default left out.

_DEFAULTS = Job._field_defaults
_BODIES = (("payload", "kind"), ("result", "result_kind"))  # bytes, and the field that says how they are written


def unpack(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a record as those of a job: bodies are text there, or base64 where they are binary."""
    for name, kind in _BODIES:
        text = fields.get(name)
        if text is not None:
            fields[name] = text.encode() if fields[kind] != "binary" else base64.b64decode(text)
    return fields


@functools.lru_cache(512)
def _terms_text(terms: Terms) -> str:
    """Terms as members of a record. Clients submit under the same ones again and again."""
    known = {"queue": terms.queue, "priority": terms.priority, "headers": terms.headers, "attempts": terms.attempts}
    pairs = zip(terms._fields, terms, strict=True)
    return json_text(known | {name: value for name, value in pairs if value != _DEFAULTS.get(name)})[1:-1]


def _new_text(job: Job, terms: Terms) -> str:
    """A job as it was when it was new, as the beginning of a JSON object."""
    shared = _terms_text if len(terms.headers) <= 2048 else _terms_text.__wrapped__  # what is kept stays small
    return (
        f'{{"number":{job.number},"id":"{job.id}","created":{job.created},"kind":"{job.kind}",'
        f'"payload":{_quote(as_text(job.kind, job.payload))},{shared(terms)}'
    )


def submit_text(job: Job, terms: Terms) -> str:
    """A new job as the text of a JSON object; the three records of every job are written without a dictionary."""
    times = "" if job.state == "pending" else f',"state":"{job.state}","available":{job.available}'
    times += "" if job.expires is None else f',"expires":{job.expires}'
    return f"{_new_text(job, terms)}{times}}}"


# What may have happened to a job since, in groups: most jobs have all or nothing of a group.
_LATER = [
    (part, Job._fields[part], tuple(map(_DEFAULTS.get, Job._fields[part])))
    for part in (slice(_AT_STATE, _AT_FAILURES), slice(_AT_FAILURES, _AT_FINISHED), slice(_AT_FINISHED, _AT_SEQ))
]


def job_text(job: Job) -> str:
    """A job as it stands, as the text of a JSON object."""
    terms = Terms(job.queue, job.priority, job.headers, job.attempts, job.lease, job.ttl, key=job.key)
    text = _new_text(job, terms)
    if job.result is not None:
        job = job.changed(result=as_text(job.result_kind, job.result))
    for part, names, unset in _LATER:
        values = job[part]
        if values != unset:
            text += f",{json_text(dict(zip(names, values, strict=True)))[1:-1]}"
    return text + "}"


def lease_record(job: Job, token: str, seconds: float, worker: str, started: int) -> str:
    """What `Job.leased` makes of a job."""
    return (
        f'{{"op":"lease","id":"{job.id}","settled":null,"token":"{token}","lease_seconds":{seconds},'
        f'"worker":{_quote(worker)},"deliveries":{job.deliveries + 1},"started":{started}}}'
    )


def complete_record(
    job: Job, token: str | None, finished: int, result: bytes, kind: str, content_type: str | None
) -> str:
    """What `Job.completed` makes of a job."""
    extra = ',"token":null' if token is None and job.token is not None else ""
    extra += "" if content_type is None else f',"content_type":{_quote(content_type)}'
    return (
        f'{{"op":"complete","id":"{job.id}","settled":"complete","finished":{finished},'
        f'"result":{_quote(as_text(kind, result))},"result_kind":"{kind}"{extra}}}'
    )


# == Futures, timers, threads ==========================================================================================
# What journal, engine and servers are built of: an answer to come, deadlines to come, how long things took, and threads
# for calls that take their time. In the standard library a Future has a condition of its own, and sched looks through
# all deadlines to cancel one. A Future is safe between threads; Timers and Histogram are changed by one at a time,
# under a lock or in the thread that serves.

_PENDING, _DONE, _CANCELLED = range(3)


class Future:
    """An answer to come, with the methods of concurrent.futures.Future in a tenth of its memory and time.

    Beside them, `claim`: whoever wants to answer takes the right to do so first, so that an answer, the end of a
    wait and a caller who hangs up never settle it twice. There is no lock: the right is the one entry of a list, which
    only one thread can pop, and so are the callbacks.
    """

    __slots__ = ("_state", "outcome", "_right", "_callbacks", "job_id", "left")

    def __init__(self) -> None:
        self._state = _PENDING
        self.outcome: Any = None  # the answer once it is there, an exception as a value
        self._right, self._callbacks = [None], []
        self.job_id: str | None = None  # of the job that this is about, where it is one
        self.left: list[None] | None = None  # gets an entry when the caller leaves

    @classmethod
    def of(cls, value: Any) -> Future:
        """One that is answered already."""
        future = cls()
        future.claim()
        future._state, future.outcome = _DONE, value
        return future

    def claim(self) -> bool:
        """Take the right to answer; False when it is claimed, answered or cancelled."""
        try:
            self._right.pop()
        except IndexError:
            return False
        return True

    def unclaim(self) -> None:
        """Give that right back."""
        self._right.append(None)

    def cancel(self) -> bool:
        """The caller no longer waits; False when the answer is on its way or there."""
        if not self.claim():
            return False
        self._state = _CANCELLED  # before the mark: whoever sweeps by it looks at the state
        if self.left is not None:
            self.left.append(None)
        self._call_back()
        return True

    def set_result(self, value: Any) -> None:
        """Answer, having claimed it; an exception as the value is raised to the caller. The first answer counts."""
        if self._state == _PENDING:
            self.outcome = value
            self._state = _DONE
            if self._callbacks:
                self._call_back()

    def answer_by(self, call: Callable[[], Any]) -> None:
        """Answer with what `call()` returns or raises."""
        try:
            self.set_result(call())
        except BaseException as error:
            self.set_result(error)

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.pop()
            except IndexError:  # another thread was faster: each is called once
                return
            try:
                callback(self)
            except Exception:  # the thread that answers has others to answer
                log.exception("callback_failed")

    def done(self) -> bool:
        """Has it ended: answered or cancelled?"""
        return self._state != _PENDING

    def cancelled(self) -> bool:
        """Has the caller stopped waiting?"""
        return self._state == _CANCELLED

    def add_done_callback(self, callback: Callable[[Future], None]) -> None:
        """Call `callback(self)` once it has ended: now, or from the thread that ends it, in no order."""
        self._callbacks.append(callback)
        if self._state != _PENDING:
            self._call_back()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise, or None; raises TimeoutError after `timeout` seconds (None: no limit)."""
        if self._state == _PENDING:
            ended = threading.Lock()  # to park on: a lock in C, where an Event is three objects in Python
            ended.acquire()
            self.add_done_callback(lambda _: ended.release())
            if not ended.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
                raise TimeoutError(f"no answer within {timeout} s")
        if self._state == _CANCELLED:
            return JobQueueError("job_cancelled", "nobody waits for this any more")
        return self.outcome if isinstance(self.outcome, BaseException) else None

    def result(self, timeout: float | None = None) -> Any:
        """The answer; raises what went wrong, and TimeoutError after `timeout` seconds (None: no limit)."""
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.outcome


class Timers:
    """Deadlines by key. A heap; one that was moved or cancelled stays in it and is skipped when it comes up."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Any]] = []
        self._when: dict[Any, float] = {}
        self._tie = itertools.count()

    def set(self, key: Any, when: float) -> None:
        """The deadline of `key`; an earlier one of its own no longer counts."""
        self._when[key] = when
        heapq.heappush(self._heap, (when, next(self._tie), key))
        if len(self._heap) > 2 * len(self._when) + 1000:  # more dead than alive: what is dead stays bounded
            self._heap = [(when, next(self._tie), key) for key, when in self._when.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: Any) -> None:
        self._when.pop(key, None)

    def clear(self) -> None:
        self._heap.clear()
        self._when.clear()

    def __iter__(self) -> Iterator[Any]:
        """The keys whose deadline is to come."""
        return iter(self._when)

    def __len__(self) -> int:
        return len(self._when)

    def first(self) -> float:
        """The next deadline, or infinity."""
        heap, when = self._heap, self._when
        while heap and when.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else math.inf

    def pop_due(self, now: float) -> Any:
        """The next key whose deadline is over, taken out; None where there is none."""
        if self.first() > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._when[key]
        return key


class Histogram:
    """Counts of durations by upper bound, as Prometheus wants them."""

    BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(self.BOUNDS) + 1), 0.0

    def copy(self) -> Histogram:
        copy = Histogram()
        copy.counts, copy.sum = self.counts.copy(), self.sum
        return copy

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.sum += seconds


class _Crew:
    """Threads that make the calls they are given, in order; another one, up to `most`, where none is free.

    Unlike a ThreadPoolExecutor's they work while a program ends (atexit), nothing that Ctrl-C cuts short leaves them
    locked, and each call is made: where no thread is to be had, or after the end, by whoever brings it.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: a thread's end
        self._lock = threading.RLock()  # a signal's handler may bring a call while one is brought
        self._threads, self._free = 0, 0  # free: those that wait for a call, less the calls that wait for a thread
        self._ended = False

    def do(self, call: Callable[[], None]) -> None:
        """Have it called, by a thread."""
        with self._lock:
            self._free -= 1
            if self._free < 0 and self._threads < self._most:
                with contextlib.suppress(RuntimeError):  # none is to be had
                    self.add()
            here = self._ended or not self._threads
            if here:
                self._free += 1
            else:
                self._calls.put(call)
        if here:
            call()

    def add(self) -> None:
        """One more thread; RuntimeError when none is to be had."""
        threading.Thread(target=self._work, name=self._name, daemon=True).start()
        with self._lock:
            self._threads += 1
            self._free += 1

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException:  # such as the SystemExit of a program's callback: others wait to be told
                log.exception("callback_failed")
            del call  # and what it holds, while the next is waited for
            with self._lock:
                self._free += 1

    def end(self) -> None:
        """The threads end when what they were given is done; nobody waits for them."""
        with self._lock:
            self._ended = True
            for _ in range(self._threads):
                self._calls.put(None)


# == Journal ===========================================================================================================
# The only disk I/O. A file of JSON lines to which records are appended; jobs mean nothing here.
#
#     {"crc":"5f1d3a90","seq":12,"synced":10,"op":"submit", ...}
#
# `crc` is the CRC-32 of all that follows it in its line. `seq` rises by one from line to line. `synced` is the
# watermark: the record up to which the file was known to be on the disk when the line was written. So a bad line
# (cut short, zeroed, flipped, missing, doubled, out of order) can be judged: if a good line says that this record
# was synced, something damaged the file, and the start is refused; if none says so, it was being written when the
# machine stopped: the tail from there on is torn, was acknowledged to nobody, and is copied aside and cut off, even
# where good lines follow, since a disk may keep the pages of an unsynced stretch in any order.
#
# The first line is the header, with the format's version. The file is never made in place: it is written beside,
# synced and renamed, so what the header covers is always whole. A compacted file numbers its K lines N-K+1 to N,
# where N is the last record it stands for (so the first may be negative); what was appended meanwhile follows without
# being renumbered. What must be there whole or not at all is one record.
#
# The sync that answers wait for is not one of the journal: with a file that grows, the file system writes the new size
# through a journal of its own, and with it what others changed. What is not on the disk yet is written once more, to a
# file of fixed size that is written over from its start (_Recent), and that one is synced; the journal itself when that
# one is full. After a power cut the lines that the journal lacks are there. While the server runs, or after it was
# stopped or killed, the journal has them all, so a copy of it alone is whole.
#
# Rule of change: a reader takes every version up to its own. A change that an older reader would misread raises
# VERSION, and adds to tests a journal as the older version wrote it.

if hasattr(os, "fdatasync"):
    _sync_data, _sync_file = os.fdatasync, os.fsync
elif hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync there does not reach the medium

    def _sync_data(fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)

    _sync_file = _sync_data
else:
    _sync_data = _sync_file = os.fsync


_RECENT = ".recent"  # behind the journal's name


def _open_folder(path: str) -> int:
    """For _sync_folder; -1 on Windows, which has no such call. OSError."""
    return os.open(path, os.O_RDONLY) if fcntl else -1


def _sync_folder(fd: int) -> None:
    """Make what was renamed and removed in the folder last."""
    if fd >= 0:
        os.fsync(fd)


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would write CR LF for a line end, and offsets would be wrong


def _private(path: str, flags: int) -> int:
    """An opener: payloads are nobody else's business."""
    return os.open(path, flags, 0o600)


def _write_all(fd: int, data: bytes) -> None:
    """Write all of it; the first sign of a full disk is a short write, not an error."""
    written = os.write(fd, data)
    while written < len(data):
        more = os.write(fd, data[written:])
        if more == 0:
            raise OSError(errno.ENOSPC, "the disk takes nothing more")
        written += more


def _last_lines(fd: int, end: int, count: int) -> int:
    """Where the last `count` lines before `end` begin."""
    while end > 0:
        start = max(0, end - MIB)
        os.lseek(fd, start, os.SEEK_SET)
        chunk = os.read(fd, end - start)
        lines = chunk.count(b"\n")
        if lines > count:
            place = len(chunk)
            for _ in range(count + 1):
                place = chunk.rindex(b"\n", 0, place)
            return start + place + 1
        count, end = count - lines, start
    return 0


def _lock_file(path: str) -> int:
    """Lock a file that is never deleted, until the descriptor that is returned is closed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):  # a file system without locks
            raise OSError(error.errno, error.strerror, path) from None
        raise DataError(
            f"{os.path.dirname(path)} is in use by another jobqueue; give each its own --data-dir"
        ) from None
    return fd


def journal_line(seq: int, synced: int, body: str) -> bytes:
    """One line of the journal; `body` is the record as the text of a JSON object."""
    data = f'"seq":{seq},"synced":{synced},{body[1:]}\n'.encode()
    return b'{"crc":"%08x",%b' % (zlib.crc32(data), data)


_scan_plain = json.JSONDecoder().scan_once  # without the search for white space: our lines have none around them


def _read_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where the line is not whole."""
    if line[:8] != b'{"crc":"' or line[-1:] != b"\n":
        return None
    try:
        if line[8:18] != b'%08x",' % zlib.crc32(line[18:]):
            return None
        record = _scan_plain(line.decode(), 0)[0]
        return record if type(record["seq"]) is type(record["synced"]) is int else None
    except (ValueError, LookupError, TypeError, StopIteration):
        return None


class JournalReader:
    """Iterate over the records of a journal, then ask what its end is like. Raises DataError for damage, newer formats.

    After the iteration: `seq` is the number of the last good record, `end` the offset behind the last one in the file
    itself, `unsure` how many of the last ones there may not be on the disk, `lacking` the lines that only its recent
    file has, `torn` the bytes of a torn tail; `clean`: was it closed, with nothing behind?
    """

    def __init__(self, path: str) -> None:
        self.path, self._recent, self.version = path, path + _RECENT, 0
        self.seq = self.synced = self.end = self.torn = 0
        self.lacking: list[bytes] = []
        self._recent_end = 0  # the offset there behind the last record of use; 0: it has none
        self.unsure, self.clean = 0, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        recent = self._recent_lines()  # first: a journal in use has them all by now
        with open(self.path, "rb", buffering=MIB) as file:
            size = os.fstat(file.fileno()).st_size  # what is written from now on, to a file in use, is not judged
            self._read_header(file.readline())
            snapshot = self.synced  # up to this record, older ones had the same numbers
            recent = recent if self.version > 1 else []
            twins = {record["seq"]: line for line, record in recent if record and record["seq"] > snapshot}
            op, seq, synced, end, bad = "journal", self.seq, self.synced, self.end, b""
            for line in file:
                record = _read_line(line)
                if record is None or record["seq"] != seq + 1:
                    bad = line
                    break
                seq += 1
                end += len(line)
                synced = max(synced, record["synced"])
                op = record.get("op")
                if seq in twins and twins[seq] != line:
                    raise self._stranger(seq)
                yield record
            self.seq, self.synced, self.end, self.unsure = seq, synced, end, seq - synced
            if seq >= snapshot and (bad or op != "close"):
                yield from self._read_recent(bad, recent)
            if bad:
                yield from self._judge(file, bad, size)
            if self.synced > self.seq:
                raise self._damaged(f"it ends before record {self.synced}, which had been synced")
            self.clean = op == "close" and not bad

    def _recent_lines(self) -> list[tuple[bytes, dict[str, Any] | None]]:
        """Those of the recent file, and their records, None for a bad one."""
        try:
            with open(self._recent, "rb", buffering=0) as file:
                return [(line, _read_line(line)) for line in io.BytesIO(file.read())]
        except FileNotFoundError:
            return []

    def _read_recent(self, bad: bytes, recent: list[tuple[bytes, dict[str, Any] | None]]) -> Iterator[dict[str, Any]]:
        """What follows in the recent file, which holds older records too. Where its first record is a later one, the
        journal was copied before it was, perhaps amid a line; else one of the two is damaged."""
        first = next((record["seq"] for _, record in recent if record), math.inf)
        whole = not recent or recent[0][0] == b"\n" or recent[0][1] is not None
        cut_short = b"\n" not in bad and b"\0" not in bad and _read_line(bad[:-1] + b"\n") is None
        if first > self.seq + 1 and whole and cut_short:
            return
        self.unsure = max(self.unsure, self.seq + 1 - first)
        at = 0
        for line, record in recent:
            at += len(line)
            if record is None:
                continue
            self.synced = max(self.synced, record["synced"])
            if first <= self.seq + 1 and record["seq"] in (self.seq, self.seq + 1):
                self._recent_end = at
            if record["seq"] == self.seq + 1:
                self.seq += 1
                self.lacking.append(line)
                yield record

    def _read_header(self, line: bytes) -> None:
        header = _read_line(line)
        if header is None or header.get("op") != "journal" or type(header.get("version")) is not int:
            raise self._damaged("its first line is not a jobqueue header")
        self.version = header["version"]
        if self.version > Journal.VERSION:
            raise DataError(
                f"{self.path} has format {self.version}; this is jobqueue {__version__}, which reads up to "
                f"format {Journal.VERSION}: a newer jobqueue is needed ({header.get('writer', '?')} wrote it)"
            )
        self.seq, self.synced, self.end = header["seq"], header["synced"], len(line)

    def _judge(self, file: io.BufferedReader, line: bytes, size: int) -> Iterator[dict[str, Any]]:
        """A bad line at `end`: damage if this or any later line tells that a record was synced which is nowhere. Where
        the recent file has what is missing, the good lines behind it are read on."""
        while line and self.end + self.torn < size:
            self.torn += len(line)
            record = _read_line(line)
            if record is not None:
                self.synced = max(self.synced, record["synced"])
                if self.lacking and record["seq"] == self.seq + 1:
                    self.seq += 1
                    self.lacking.append(line)
                    yield record
            line = file.readline()
        if self.synced > self.seq:
            raise self._damaged(f"record {self.seq + 1} is not readable there, although it had been synced")

    def _damaged(self, what: str) -> DataError:
        path, offset = (self._recent, self._recent_end) if self._recent_end else (self.path, self.end)
        return DataError(
            f"{path} is damaged at byte {offset}: {what}. Nothing was changed. Restore {self.path} from a backup "
            f"(without {os.path.basename(self._recent)}), or look at it with: "
            f"python jobqueue.py check --dump {shlex.quote(self.path)}"
        )

    def _stranger(self, seq: int) -> DataError:
        return DataError(
            f"{self._recent} is not of this journal: record {seq} differs. Nothing was changed. Where {self.path} was "
            f"put back from a backup, remove {os.path.basename(self._recent)}, and start again"
        )


class Journal:
    """The file of a data folder: read it, append to it, wait for the disk, compact it, close it.

    `fsync` is `always`, `interval` or `never`. `failed` is called once, under whatever lock, when the disk cannot be
    trusted any more; `full`, under the engine's, whenever it refuses a write. Append and after_sync are called
    under `lock`, the engine's, so their order is its order.
    """

    VERSION = 2  # 1: what is not in the file itself is nowhere
    QUICK = 0.005  # a sync that takes longer (seconds) is left to the committing thread: the leading one serves others
    STALL, WARY = 0.1, 60.0  # after one that took so long, all are for a while: a card that hangs once hangs again
    IDLE = 0.2  # seconds without work after which the watermark itself is written, so that a later flip is found

    def __init__(
        self,
        folder: str,
        settings: Settings,
        clock: Clock,
        lock: contextlib.AbstractContextManager,
        failed: Callable[[], None],
        full: Callable[[], None],
    ) -> None:
        folder = os.path.abspath(folder)  # a program may change its directory
        self.folder, self.path = folder, os.path.join(folder, "journal.jsonl")
        self._settings, self._clock, self._on_failure, self._on_full = settings, clock, failed, full
        self.durable = settings.fsync == "always"
        self.seq = self.synced = self.size = 0
        self.failure: OSError | None = None
        self._commits, self._syncs = Histogram(), Histogram()
        self._since = 0.0  # when the first of those that wait began to
        self._file = -1
        self._tail = lock  # the end of the file: held by an append, and by the switch to a compacted file
        self._waiting: collections.deque[tuple[Future, Any, str | None]] = collections.deque()
        self._wake = threading.Condition()  # notified when the committing thread has something to do
        self._asleep = False  # does the committing thread wait for an append?
        self._committing = threading.Lock()  # held while syncing and answering, and for whatever else closes the file
        self._leader = 0  # the thread that commits after its own verbs
        self._quick = True  # is the disk quick enough for that?
        self._wary_until = 0.0  # since it was not, once
        self._switch: _NewFile | None = None
        self._refusing = False  # did the disk refuse the last append?
        self._spent_at = 0  # the size when the reserve was given back
        self._look_again = 0.0  # when it is time to see whether there is room for the reserve
        self.lent = False  # is the room of the reserve a compaction's for now?
        self._closing = False
        self._marked = 0  # the record up to which no watermark needs to be written
        self._committer = threading.Thread(target=self._commit_forever, name="jobqueue-commit", daemon=True)
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._lock_fd = _lock_file(os.path.join(folder, ".lock"))
            try:
                self._folder_fd = _open_folder(folder)  # kept: later there may be no descriptor to be had for it
            except OSError:
                os.close(self._lock_fd)
                raise
        except OSError as error:
            raise DataError(f"{folder} cannot be used as the data folder: {error.strerror}") from None
        self._reserve = _Reserve(os.path.join(folder, "reserve"), settings.reserve)
        self._recent = _Recent(self.path + _RECENT, self._folder_fd)
        self._covered = 0  # bytes of the file that are on the disk, in itself or as recent ones

    # -- start and stop

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that the folder holds; a torn tail is copied aside. Call `start` afterwards."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + ".new")  # a compaction that did not come to its end
            self._reader = None
            if os.path.exists(self.path):
                self._reader = JournalReader(self.path)
                yield from self._reader
                if self._reader.torn:
                    self._set_torn_aside()
        except PermissionError as error:
            raise DataError(f"{error.filename or self.path} cannot be used: {error.strerror}") from None
        except OSError as error:
            raise self._disk_error("read", error) from None

    def _disk_error(self, what: str, error: Exception) -> DiskError:
        reason = getattr(error, "strerror", None) or error
        return DiskError(
            f"{self.path} could not be {what}: {reason}. What it holds is safe. Check the disk and its space, then "
            "start again"
        )

    def _set_torn_aside(self) -> None:
        reader = self._reader
        names = (f"{self.path}.torn-{n}" for n in itertools.count(1))
        aside = next(name for name in names if not os.path.exists(name))
        try:
            self._copy_tail(aside, reader.end)
        except OSError:
            if not self._reserve.spend():
                raise
            self._copy_tail(aside, reader.end)
        _sync_folder(self._folder_fd)
        log.warning("torn_tail file=%s offset=%d bytes=%d copied_to=%s", self.path, reader.end, reader.torn, aside)

    def _copy_tail(self, aside: str, offset: int) -> None:
        try:
            with open(self.path, "rb") as source, open(aside, "xb", opener=_private) as copy:
                source.seek(offset)
                while chunk := source.read(MIB):
                    copy.write(chunk)
                copy.flush()
                _sync_file(copy.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise

    def start(self, snapshot: Callable[[], tuple[int, Iterable[str]]]) -> None:
        """Open for appending; a new journal begins with `snapshot`. After an unclean stop what is not known to be on
        the disk is written once more and synced first: after a failed sync the system may show pages that never got
        there."""
        try:
            self._start(self._reader, snapshot)
        except (OSError, JobQueueError) as error:
            raise self._disk_error("written and synced", error) from None
        self._committer.start()

    def _start(self, reader: JournalReader | None, snapshot: Callable[[], tuple[int, Iterable[str]]]) -> None:
        if reader is None:
            self._recent.remove()  # of another journal
            self.seq = 1  # so that the header is 0 and the snapshot's one line is 1
            new = _NewFile(self, snapshot(), self.seq)
            new.replace()
            _sync_folder(self._folder_fd)
            self._file, self.size = new.file, new.size
        else:
            if not reader.clean:
                what = "no closing record; reading, rewriting, syncing"
                lacking = len(reader.lacking)
                log.warning("unclean_stop file=%s records=%d recent=%d: %s", self.path, reader.seq, lacking, what)
                try:
                    self._rewrite(reader)
                except OSError:
                    if not self._reserve.spend():
                        raise
                    self._rewrite(reader)
            self.seq = self.synced = reader.seq
            self.size = reader.end + sum(map(len, reader.lacking))
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | _BINARY)
        # Before the first record: what was torn there had its number, and what stands behind that would seem to follow.
        if self.durable and (reader is None or reader.version == self.VERSION):
            self._recent.open()
        else:
            self._recent.remove()
        self.append('{"op":"open"}', urgent=True)
        _sync_data(self._file)
        self.synced, self._covered = self.seq, self.size
        self._reserve.fill()
        self._spent_at = self.size

    def _rewrite(self, reader: JournalReader) -> None:
        """Write what is not known to be on the disk once more, where it stands, with the same bytes: so it takes no
        room, and a crash amid it harms nothing. Then what it lacks."""
        fd = os.open(self.path, os.O_RDWR | _BINARY)
        try:
            at = _last_lines(fd, reader.end, reader.unsure)
            while at < reader.end:
                os.lseek(fd, at, os.SEEK_SET)
                chunk = os.read(fd, min(MIB, reader.end - at))
                os.lseek(fd, at, os.SEEK_SET)
                _write_all(fd, chunk)
                at += len(chunk)
            os.lseek(fd, at, os.SEEK_SET)
            _write_all(fd, b"".join(reader.lacking))
            os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))  # at last: some of what is lacking may have stood behind
            _sync_file(fd)
        finally:
            os.close(fd)
        _sync_folder(self._folder_fd)  # a compaction may have been cut short between its rename and this

    def close(self) -> None:
        """Sync what there is and leave a closing record; without it the next start knows that this one crashed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._committer.is_alive():
            self._committer.join()
        with self._committing:
            if not self.failure and self._file >= 0:
                try:
                    with self._tail, contextlib.suppress(JobQueueError):  # no room for it: then without
                        self._append_closing()
                except OSError as error:
                    self._fail(error)
            self.abandon()

    def _append_closing(self) -> None:
        _sync_data(self._file)
        self.synced, end = self.seq, self.size
        self.append('{"op":"close"}', urgent=True)
        try:
            _sync_data(self._file)
        except OSError:
            os.ftruncate(self._file, end)  # not sure to be on the disk: no closing record, then
        with contextlib.suppress(OSError):
            self._recent.remove()

    def abandon(self) -> None:
        """Let go of the folder and leave the file as it is."""
        with self._tail:
            file, lock, self._file, self._lock_fd = self._file, self._lock_fd, -1, -1
            self.failure = self.failure or OSError(errno.EBADF, "the journal is closed")
        self._rouse()  # the committing thread, if it runs: it ends
        if file >= 0:
            os.close(file)
        self._recent.close()
        if lock >= 0:
            if fcntl:
                os.close(self._folder_fd)
                fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was forked meanwhile has it too
            os.close(lock)

    # -- appending; the engine's lock is held

    def append(self, *bodies: str, urgent: bool = False, lease: bool = False) -> int:
        """Write records with one write and return the last one's number; JobQueueError disk_full: nothing of them is
        in the file. (After a crash the first ones may be there without the others.)

        `urgent` ones (of workers, and of the clock) may use the reserve, those with a lease half of it: the rest is for
        the results of what is in progress.
        """
        if self.failure:
            raise self.unknown(None)
        if self._reserve.spent and not self._refilled(urgent) and not (urgent and self._has_room(lease)):
            raise JobQueueError("disk_full", "the disk is full; jobs in progress can still be completed")
        seq = self.seq
        if len(bodies) == 1:
            data = journal_line(seq + 1, self.synced, bodies[0])
        else:
            data = b"".join([journal_line(number, self.synced, body) for number, body in enumerate(bodies, seq + 1)])
        try:
            _write_all(self._file, data)
        except OSError as error:
            self._write_again(error, data, urgent)
        except BaseException:  # a program's Ctrl-C
            self._cut()
            raise
        self._refusing = False
        self.size += len(data)
        self.seq = seq = seq + len(bodies)
        if self._asleep:
            self._rouse()
        return seq

    def _refilled(self, urgent: bool) -> bool:
        """Was there room for the reserve again? Looked at by each submit, and once a second by what is urgent."""
        now = self._clock.monotonic()
        if urgent and now < self._look_again:
            return False
        self._look_again = now + 1
        if self.lent and self._is_tight():
            return False  # it would take the room that the compaction is writing into
        return self._reserve.fill()

    def _is_tight(self) -> bool:
        try:
            return shutil.disk_usage(self.folder).free < 2 * self._settings.reserve
        except OSError:
            return True

    def _has_room(self, lease: bool) -> bool:
        return not lease or self.size - self._spent_at < self._settings.reserve // 2

    def _write_again(self, error: OSError, data: bytes, urgent: bool) -> None:
        """A write failed: nothing of it stays. Once more, where the reserve makes room for it; else raise."""
        self._cut()
        if not self._refusing:
            log.error("write_failed file=%s error=%s", self.path, error)
        self._on_full()
        if urgent and error.errno in (errno.ENOSPC, errno.EDQUOT) and self.spend():
            try:
                return _write_all(self._file, data)
            except OSError as again:
                self._cut()
                error = again
        self._refusing = True
        raise JobQueueError("disk_full", f"the disk did not take it: {error.strerror}")

    def spend(self) -> bool:
        """Give the reserve back to the disk; False when it was given before."""
        if not self._reserve.spend():
            return False
        self._spent_at = self.size
        return True

    @property
    def full(self) -> bool:
        """Did the disk refuse something, or give no room for the reserve?"""
        return self._refusing or self._reserve.spent

    def _cut(self) -> None:
        """Cut a half-written record off, or stop: what stands behind it would be unreadable."""
        try:
            os.ftruncate(self._file, self.size)
        except OSError as error:
            self._fail(error)
            raise self.unknown(None) from None

    def after_sync(self, future: Future, value: Any, seq: int, job_id: str | None = None) -> bool:
        """Have `future` answered with `value` once record `seq` is on the disk; True: it is, and the caller answers.

        `job_id` is told to the caller when the disk fails instead.
        """
        if not self.durable or seq <= self.synced:
            return True
        waiting = self._waiting
        waiting.append((future, value, job_id))
        if len(waiting) == 1:
            self._since = self._clock.monotonic()
            if not (self._quick and self._leader == threading.get_ident()):
                self._rouse()
        if self.failure:  # it failed in between: the committing thread may be gone
            threading.Thread(target=self._refuse_waiting, daemon=True).start()
        return False

    # -- one sync for all that wait for it: by the thread that leads, after its verbs; else by the committing thread

    def lead(self) -> None:
        """This thread will call `commit` after each group of its verbs, so that nobody has to be woken for them."""
        self._leader = threading.get_ident()

    def uncommitted(self) -> bool:
        """Does somebody wait for a sync, of a disk that is quick?"""
        return self._quick and bool(self._waiting)

    def commit(self) -> None:
        """Sync for all that wait, and answer them; leave it to the committing thread where the disk is slow, or where
        that one is at it."""
        if self._waiting and self._quick and self._committing.acquire(blocking=False):
            try:
                self._commit()
            finally:
                self._committing.release()
        if self._waiting:
            self._rouse()

    def _commit(self, idle: bool = False) -> None:
        """`_committing` is held. `idle`: nothing happened for a while."""
        count, since, self._since = len(self._waiting), self._since, self._clock.monotonic()
        if not self.failure:
            try:
                self._sync(idle)
            except OSError as error:
                self._fail(error)
        if count:
            self._commits.observe(self._clock.monotonic() - since)
        for _ in range(count):
            future, value, job_id = self._waiting.popleft()
            future.set_result(self.unknown(job_id) if self.failure else value)

    def _rouse(self) -> None:
        with self._wake:
            self._wake.notify()

    def _commit_forever(self) -> None:
        try:
            while not self.failure and self._commit_next():
                pass
        except Exception as error:  # without this thread nobody would be answered any more
            log.exception("committing_failed")
            self._fail(OSError(errno.EIO, repr(error)))
        if self.failure:
            self._refuse_waiting()

    def _commit_next(self) -> bool:
        """False: that was the last time, the journal is closing."""
        unmarked = 0
        with self._wake:
            if not (self._waiting or self._closing or self._switch):
                unmarked = self._sleep()
            closing = self._closing
        # Nobody waits: it is synced, and the watermark written, when nothing was for a while; with `interval`, synced.
        due = unmarked and (unmarked == self.seq or not self.durable)
        with self._committing:
            if self._waiting or due:
                self._commit(idle=not self._waiting and self.durable)
            with self._wake:
                switch = None
                if not self.failure:  # else the old file may be what has all that anybody was told of
                    switch, self._switch = self._switch, None
            if switch:
                self._switch_to(switch)
        return bool(self._waiting) or not closing

    def _sleep(self) -> int:
        """Until somebody waits, or it is time to look again: the last record then, where the watermark does not cover
        it yet. `_wake` is held."""
        syncs = self._settings.fsync != "never"
        self._asleep = syncs  # first, so that an append comes after it or is seen
        unmarked = self.seq if syncs and self.seq > self._marked else 0
        if unmarked:
            self._asleep = False
        patience = self.IDLE if self.durable else self._settings.fsync_interval
        self._clock.wait(self._wake, patience if unmarked else None)
        self._asleep = False
        return unmarked

    def _sync(self, idle: bool) -> None:
        seq, end = self.seq, self.size  # in this order: an append meanwhile raises the size first
        if seq > self.synced:
            before = self._clock.monotonic()
            if not self._recent.keep(self._file, self._covered, end):
                _sync_data(self._file)
                self._recent.restart()
            self._covered = end
            now = self._clock.monotonic()
            took = now - before
            self._syncs.observe(took)
            if took > self.STALL:
                self._wary_until = now + self.WARY
            self.synced, self._quick = seq, took < self.QUICK and now >= self._wary_until
        if not self.durable:
            self._marked = seq
        elif idle:
            with self._tail, contextlib.suppress(JobQueueError):
                self._marked = self.append('{"op":"synced"}', urgent=True)

    def _fail(self, error: OSError) -> None:
        """A sync that failed may have dropped pages that a later sync would report as written: stop for good."""
        if self.failure is None:
            self.failure = error
            log.critical(
                "disk_failed file=%s error=%s: stopping. What was acknowledged is on the disk. Check the disk "
                "and its space, then start again: the journal is read, rewritten and synced first",
                self.path,
                error,
            )
            self._rouse()
            self._on_failure()

    def _refuse_waiting(self) -> None:
        """After a failure: whoever waits for a sync, or for the switch to a compacted file, is told."""
        with self._wake:
            switch, self._switch = self._switch, None
        with self._committing:
            while self._waiting:
                future, _, job_id = self._waiting.popleft()
                future.set_result(self.unknown(job_id))
        if switch:
            switch.error = self.failure
            switch.discard()
            switch.done.set()

    def figures(self) -> dict[str, Any]:
        """For METRICS."""
        return {
            "journal_bytes": self.size,
            "disk_full": int(self.full),
            "commit_seconds": self._commits.copy(),
            "fsync_seconds": self._syncs.copy(),
        }

    def unknown(self, job_id: str | None) -> JobQueueError:
        """What whoever waits is told once the disk has failed."""
        return JobQueueError(
            "outcome_unknown", f"the disk failed ({self.failure}); look the job up after a restart", job_id
        )

    # -- compaction: a thread of the caller's writes the new file, the committing thread switches to it

    def compact(self, count: int, bodies: Iterable[str], seq: int, offset: int) -> int:
        """Replace the records up to `seq`, which end at byte `offset`, by `count` new ones; their size in bytes.

        Takes as long as it takes; the file goes on being appended to. OSError: the old file stays.
        """
        new = _NewFile(self, (count, bodies), seq, offset)
        with self._wake:
            stopping = self._closing or self.failure
            if not stopping:
                self._switch = new
                self._wake.notify()
        if stopping:
            new.discard()
            raise OSError(errno.ECANCELED, "the journal is closing")
        new.done.wait()
        if new.error:
            raise new.error
        return new.snapshot_size

    def _switch_to(self, new: _NewFile) -> None:
        """`_committing` is held, so what is synced in both files is all that anybody was told of."""
        try:
            new.follow()
            _sync_file(new.file)
            with self._tail:
                new.follow()
                new.replace()
                old, self._file, self.size = self._file, new.file, new.size
        except Exception as error:  # be it that memory has run out
            new.error = error
            new.discard()
            return
        finally:
            new.done.set()
        os.close(old)
        try:
            seq, end = self.seq, self.size
            _sync_data(self._file)
            _sync_folder(self._folder_fd)
            self.synced, self._covered = seq, end
            if self.durable:
                self._recent.open()
        except OSError as error:
            self._fail(error)


class _NewFile:
    """A journal in the making, beside the old one: a header, a snapshot (so many bodies) that stands for the old one's
    first `offset` bytes and its records up to `last`, and what was appended since."""

    def __init__(self, journal: Journal, snapshot: tuple[int, Iterable[str]], last: int, offset: int = 0) -> None:
        self.path, self._old = journal.path + ".new", journal.path
        self._journal = journal
        self.size, self._offset = 0, offset
        self.done, self.error = threading.Event(), None
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | _BINARY, 0o600)
        count, bodies = snapshot
        try:
            self._write_snapshot(last - count, last, bodies)
            self.snapshot_size = self.size
            self.follow()
            _sync_file(self.file)
        except BaseException:
            self.discard()
            raise

    def _write_snapshot(self, seq: int, last: int, bodies: Iterable[str]) -> None:
        writer = f"jobqueue {__version__}"
        header = json_text({"op": "journal", "version": Journal.VERSION, "writer": writer})
        lines = [journal_line(seq, last, header)]
        pending = 0
        for body in bodies:
            seq += 1
            lines.append(journal_line(seq, last, body))
            pending += len(lines[-1])
            if pending > 32 * KIB:  # a write lets go of the interpreter lock: others do not wait for long
                self._write(b"".join(lines))
                lines, pending = [], 0
        self._write(b"".join(lines))

    def _write(self, data: bytes) -> None:
        _write_all(self.file, data)
        self.size += len(data)

    def follow(self) -> None:
        """Copy what the old file holds beyond the offset, up to what is whole by now."""
        end = self._journal.size
        if self._offset == end:
            return
        with open(self._old, "rb") as old:
            old.seek(self._offset)
            while self._offset < end:
                chunk = old.read(min(MIB, end - self._offset))
                if not chunk:
                    raise OSError(errno.EIO, "the journal is shorter than what was written to it")
                self._write(chunk)
                self._offset += len(chunk)

    def replace(self) -> None:
        """Take the old file's place."""
        try:
            os.replace(self.path, self._old)
        except OSError:
            if not os.path.samestat(os.stat(self._old), os.fstat(self.file)):
                raise
            # It was done: over NFS, the answer of the first try may get lost, and the second finds no such file.

    def discard(self) -> None:
        os.close(self.file)
        with contextlib.suppress(OSError):
            os.unlink(self.path)


class _Recent:
    """A journal's last records once more, in a file that keeps its size: so its sync writes these bytes and no more."""

    SIZE = 256 * KIB

    def __init__(self, path: str, folder: int) -> None:
        self._path, self._folder_fd = path, folder
        self._file, self._at = -1, 0

    def open(self) -> None:
        """Begin anew, when the journal is on the disk. Where there is no room, the journal itself is synced; OSError
        where there is no room and it cannot be removed either."""
        if not hasattr(os, "fdatasync"):  # macOS and Windows: a sync writes everything there
            return
        self.close()
        self._at = 0
        try:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            _write_all(self._file, b"\n" * self.SIZE)
            _sync_file(self._file)
            _sync_folder(self._folder_fd)
        except OSError:
            self.remove()

    def keep(self, journal: int, start: int, end: int) -> bool:
        """Copy these bytes of the journal and sync; False where they do not fit: then the journal is to be synced."""
        if self._file < 0 or self._at + end - start > self.SIZE:
            return False
        try:
            if not os.fstat(self._file).st_nlink:  # somebody removed it
                return False
            data = os.pread(journal, end - start, start)
            if os.pwrite(self._file, data, self._at) < end - start:
                return False
        except OSError:  # on a file system that copies on write, the disk may be full
            return False
        _sync_data(self._file)
        self._at += len(data)
        return True

    def restart(self) -> None:
        """All of it is on the disk in the journal: it is written over from now on."""
        self._at = 0

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def remove(self) -> None:
        """Give the room back: the journal has it all. OSError: it may stay, and its records seem to follow those that
        the journal ends with."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
            _sync_folder(self._folder_fd)


class _Reserve:
    """Disk space held back, so that workers can hand in their results when the disk is full."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size = path, size
        self.spent = False

    def fill(self) -> bool:
        """Take the space; False when the disk has not got it."""
        if not self._size:
            with contextlib.suppress(OSError):
                os.unlink(self._path)  # of another setting
            return True
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                self._allocate(fd)
                os.ftruncate(fd, self._size)  # by another setting, it was larger
                self.spent = False
            except OSError:
                os.ftruncate(fd, 0)
                self.spent = True
            finally:
                os.close(fd)
        except OSError:
            self.spent = True
        return not self.spent

    def _allocate(self, fd: int) -> None:
        try:
            os.posix_fallocate(fd, 0, self._size)
            return
        except AttributeError:  # macOS and Windows have no such call
            pass
        except OSError as error:  # with musl, some file systems have none (NFS); glibc writes there, as below
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        missing = self._size - os.lseek(fd, 0, os.SEEK_END)
        if missing > 0:
            _write_all(fd, bytes(missing))

    def spend(self) -> bool:
        """Give the space back to the disk; False when it was given before."""
        if self.spent or not self._size:
            return False
        self.spent = True
        with contextlib.suppress(OSError):
            os.truncate(self._path, 0)
        return True


# == Engine ============================================================================================================
# The seam. Callers see values and durations; no lock, socket or live object crosses it, so that another engine (on a
# database, say) can take the place of LocalEngine.


class Claim(NamedTuple):
    """What a worker asks for: up to `max` jobs of `queues`, in that order; it waits `wait` seconds for the first."""

    queues: tuple[str, ...] = ("default",)
    max: int = 1
    lease: float | None = None  # seconds; None: as the job or the server says
    wait: float = 0.0
    worker: str = ""


class Outcome(NamedTuple):
    """What became of a worker's call: the job as it is now, whether that is a repetition, and the next job."""

    job: Job
    duplicate: bool = False
    next: Job | None = None


class Engine(abc.ABC):
    """The verbs of a queue. Those that may wait return a Future; JobQueueError says why something cannot be."""

    @abc.abstractmethod
    def submit(self, terms: Terms, payload: bytes, kind: str, wait: float | None, tied: bool = False) -> Future:
        """Accept a job. Future of (Job, replayed): final within `wait` seconds (None: no limit), else as it stands
        once it is on the disk. `replayed`: the key stood for a job that was there before. `tied`: cancelling the
        future cancels the job, unless others wait for it."""

    @abc.abstractmethod
    def replayed(self, terms: Terms, payload: bytes) -> Job | None:
        """The job that the key of these terms stands for, if any; raises as `submit` does."""

    @abc.abstractmethod
    def submit_many(self, terms: Terms, batch: list[tuple[bytes, str]]) -> Future:
        """Accept all of the jobs (payload and kind) or none. Future of their ids, once they are on the disk."""

    @abc.abstractmethod
    def view(self, job_id: str, wait: float) -> Future:
        """Future of the Job: final within `wait` seconds, else as it stands."""

    @abc.abstractmethod
    def jobs(self, queue: str | None, state: str | None, limit: int, after: int | None) -> tuple[list[Job], int | None]:
        """Up to `limit` jobs, newest first, below number `after`; and the number to go on from, None at the end."""

    @abc.abstractmethod
    def cancel(self, job_id: str) -> Future:
        """Future of the cancelled Job."""

    @abc.abstractmethod
    def poll(self, claim: Claim) -> Future:
        """Future of a list of Jobs, leased; empty when the wait is over. Cancel it to leave the line."""

    @abc.abstractmethod
    def give_back(self, jobs: list[Job]) -> None:
        """These leased jobs did not reach their worker: back in line, uncounted."""

    @abc.abstractmethod
    def complete(
        self, job_id: str, token: str | None, result: bytes, kind: str, content_type: str | None, claim: Claim | None
    ) -> Future:
        """Future of an Outcome. With a `claim`, the next job comes with it."""

    @abc.abstractmethod
    def complete_many(self, results: list[tuple[str, str | None, bytes, str, str | None]]) -> Future:
        """Future of a list: an Outcome or a JobQueueError for each (job_id, token, result, kind, content_type)."""

    @abc.abstractmethod
    def fail(self, job_id: str, token: str | None, error: str, retry: bool, delay: float | None) -> Future:
        """Future of an Outcome: the job is tried again after `delay` seconds (None: backoff) or has failed."""

    @abc.abstractmethod
    def release(self, job_id: str, token: str | None) -> Outcome:
        """Put the job back in its place, uncounted."""

    @abc.abstractmethod
    def extend(self, job_id: str, token: str | None, lease: float | None) -> Outcome:
        """The lease ends `lease` seconds from now (None: as long as it was)."""

    @abc.abstractmethod
    def peek(self, queues: tuple[str, ...]) -> Job | None:
        """The job that a poll would get."""

    @abc.abstractmethod
    def requeue(self, job_id: str) -> Future:
        """Future of the Job, back in line with all its attempts."""

    @abc.abstractmethod
    def requeue_some(self, state: str, queue: str | None, after: int | None) -> tuple[int, int | None]:
        """Requeue a page of the final jobs in `state`, all or none of them; how many, and the number to go on from
        (None at the end)."""

    @abc.abstractmethod
    def pause(self, queue: str | None, paused: bool) -> Future:
        """Stop or resume handing out jobs of a queue (None: of all, which ends each queue's own pause too). Future of
        the sorted names of the paused queues, or "all"."""

    @abc.abstractmethod
    def clear(self) -> Future:
        """Forget everything. Future of how many jobs there were."""

    @abc.abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counts by queue and state, ages, waiters."""

    @abc.abstractmethod
    def figures(self) -> dict[str, Any]:
        """Counters and histograms since the start, named as in METRICS without the prefix."""

    @abc.abstractmethod
    def workers_seen(self) -> list[dict[str, Any]]:
        """The workers that polled lately, the latest last."""

    @abc.abstractmethod
    def draining(self) -> bool:
        """Is nothing accepted and nothing handed out any more?"""

    @abc.abstractmethod
    def drain(self) -> Future:
        """Hand out nothing more and accept nothing. Future that ends when no job is in progress."""

    @abc.abstractmethod
    def close(self) -> None:
        """Answer all who wait with the jobs as they stand, and close."""

    @abc.abstractmethod
    def lead(self) -> None:
        """This thread will call `commit` after each group of its verbs: nobody else has to be woken for them."""

    @abc.abstractmethod
    def uncommitted(self) -> bool:
        """Is there something for that thread to commit?"""

    @abc.abstractmethod
    def commit(self) -> None:
        """Do now what is left to be done, such as a sync, before the calling thread's verbs are answered."""


class _Lane:
    """One queue: a heap of (number, id) for each priority, the polls that wait for it, its counts."""

    __slots__ = ("name", "heaps", "priorities", "waiters", "counts", "paused")

    def __init__(self, name: str) -> None:
        self.name, self.paused = name, False
        self.heaps: dict[int, list[tuple[int, str]]] = {}
        self.priorities: list[int] = []  # of the heaps, the highest first
        self.waiters: collections.OrderedDict[_Waiter, None] = collections.OrderedDict()  # the longest first
        self.counts = dict.fromkeys(STATES, 0)


class _Waiter:
    """A worker's long poll (in the lines of its lanes; it ends by `_polls`, and is counted in `_pollers`), or a client
    that waits for a job's end (in `_watchers`; it ends by `_holds`, and is counted in `_clients`)."""

    __slots__ = ("future", "answer", "claim", "job_id", "number")
    _count = itertools.count()

    def __init__(self, future: Future, answer: Callable, claim: Claim | None = None, job_id: str | None = None) -> None:
        self.future, self.answer, self.claim, self.job_id = future, answer, claim, job_id
        self.number = next(self._count)  # its age, among those of other queues


class _Crowd:
    """Those who wait. One that hangs up takes no lock, since all may leave at once: it leaves a mark in `gone`."""

    __slots__ = ("count", "gone", "sweep")

    def __init__(self, sweep: Callable[[], None]) -> None:
        self.count, self.gone, self.sweep = 0, [], sweep

    def add(self, future: Future) -> None:
        """Count this one. Once most of those that were counted have left, they are swept out."""
        self.count += 1
        future.left = self.gone
        if self.gone and len(self.gone) > 1000 + self.count // 2:
            self.tidy()

    def tidy(self) -> None:
        """Sweep out those that have left."""
        gone = len(self.gone)
        if gone:
            del self.gone[:gone]  # not more: others may leave meanwhile
            self.count -= gone
            self.sweep()

    def __len__(self) -> int:
        return max(0, self.count - len(self.gone))


class _Order:
    """Job ids by number, for listings: two flat arrays, 16 bytes a job. Tidied when half of them are forgotten."""

    def __init__(self) -> None:
        self.numbers, self.ids = array.array("q"), []

    def add(self, number: int, job_id: str) -> None:
        self.numbers.append(number)
        self.ids.append(job_id)

    def below(self, number: int | None, count: int) -> tuple[list[str], int | None]:
        """Up to `count` ids with smaller numbers, newest first, and the number to go on from (None: that was all)."""
        end = len(self.ids) if number is None else bisect.bisect_left(self.numbers, number)
        start = max(0, end - count)
        return self.ids[start:end][::-1], self.numbers[start] if start else None

    def tidy(self, alive: dict[str, Job]) -> None:
        kept = [job for job in map(alive.get, self.ids) if job is not None]
        self.numbers = array.array("q", [job.number for job in kept])
        self.ids = [job.id for job in kept]


def _verb(method: Callable) -> Callable:
    """A verb takes the lock once, and happens at one moment. Before it, what the clock has brought happens; after
    it, what it made pending is handed to the polls that wait, and when the lock is free, who gets an answer gets it."""

    @functools.wraps(method)
    def call(self: LocalEngine, *args: Any) -> Any:
        try:
            with self._lock:
                self._now = now = self._clock.monotonic()
                self._wall = wall = int(self._clock.time() * 1_000_000)
                if not -_SET < wall - now * 1e6 - self._ahead < _SET:
                    self._clock_was_set()
                if now >= self._alarm:
                    self._ring()
                if self._closed:
                    raise JobQueueError("draining", "the server has stopped")
                try:
                    return method(self, *args)
                finally:
                    if self._filled or self._drained is not None or self.journal.size > self._compact_size:
                        self._round_off()
        finally:
            if self._ready:
                self._give_answers()

    return call


_SET = 10_000_000  # microseconds: a clock that is off by less was not set, it drifts
_ENDED = {state: f"jobs_{state}_total" for state in STATES if state in FINAL}
_COUNTED = (
    "jobs_submitted_total",
    *_ENDED.values(),
    "retries_total",
    "leases_lapsed_total",
    "late_completions_total",
    "duplicate_completions_total",
    "compactions_total",
)


class LocalEngine(Engine):
    """The queue in memory, kept by a Journal.

    In __init__, what stands above `memory only` comes back with a restart; the rest is made anew.
    """

    # Slots: the methods of an object with more than 30 attributes are looked up anew at each call, in Python 3.11.
    # fmt: off
    __slots__ = (
        "_settings", "_clock", "_failed", "_lock", "journal", "_last_number", "_all_paused", "_jobs", "_order",
        "_lanes", "_keys", "_ttl_ends", "_unfinished", "_unfinished_bytes", "_finished_bytes", "_random", "_delays",
        "_leases", "_ttls", "_polls", "_holds", "_unties", "_kept", "_forget_at", "_watchers", "_clients", "_pollers",
        "_filled", "_ready", "_drained", "_closed", "_compacting", "_compact_size", "_compact_again", "_full_again",
        "_alive_then", "_inflation", "_workers", "_totals", "_waits", "_ahead", "_now", "_wall", "_alarm", "_timer",
        "_timer_thread", "_alarms",
    )
    # fmt: on

    SCAN = 5_000  # jobs looked at for one page of a listing: a page may be short, the lock is not held for long
    LAST_WAIT = 1.0  # seconds of a long poll in a drain: with an answer at once, most workers would ask again at once
    SWEEP = 1_000  # timers settled, or jobs requeued, for one taking of the lock

    def __init__(self, settings: Settings, clock: Clock, failed: Callable[[], None] = lambda: None) -> None:
        self._settings, self._clock = settings, clock
        self._lock = threading.Lock()
        self._failed = failed
        self.journal = Journal(settings.data_dir, settings, clock, self._lock, self._disk_failed, self._disk_full)
        self._last_number = 0
        self._all_paused = False
        self._jobs: dict[str, Job] = {}
        # -- memory only
        self._order = _Order()
        self._lanes: dict[str, _Lane] = {}  # (which of them are paused, a restart brings back)
        self._keys: dict[str, str] = {}
        self._ttl_ends: dict[str, float] = {}  # of the unfinished jobs that have a ttl
        self._unfinished = self._unfinished_bytes = self._finished_bytes = 0
        self._random = _random_digits()
        self._delays, self._leases, self._ttls, self._polls, self._holds, self._unties = (Timers() for _ in range(6))
        self._kept = {False: collections.OrderedDict(), True: collections.OrderedDict()}  # failed? -> id -> deadline
        self._forget_at = math.inf  # when the next of them has been kept for long enough
        self._watchers: dict[str, list[_Waiter]] = {}
        self._clients, self._pollers = _Crowd(self._sweep_clients), _Crowd(self._sweep_pollers)
        self._filled: list[_Lane] = []  # lanes with something new for the polls that wait
        self._ready: collections.deque[tuple[Future, Any]] = collections.deque()  # answers to give without the lock
        self._drained: Future | None = None
        self._closed = False
        self._compacting: threading.Thread | None = None
        self._compact_size = settings.compact_bytes
        self._compact_again = self._full_again = 0.0  # not before, after a failed one; on a full disk
        self._alive_then = 0  # bytes of live data when the last compaction began
        self._inflation = 1.0  # bytes in the journal for a byte of live data: text is escaped there, binary is base64
        self._workers: collections.OrderedDict[str, dict[str, Any]] = collections.OrderedDict()
        self._totals = collections.Counter(dict.fromkeys(_COUNTED, 0))
        self._waits = Histogram()  # from submit to the first hand-over
        self._ahead = 0.0  # microseconds that the wall clock is ahead of the monotonic one
        self._now, self._wall = 0.0, 0  # the moment of the verb: monotonic, and microseconds since 1970
        self._alarm = math.inf  # when the timer thread wakes
        self._timer = threading.Condition(self._lock)  # notified when an earlier deadline comes up, and at the end
        self._timer_thread = threading.Thread(target=self._time_forever, name="jobqueue-timer", daemon=True)
        self._alarms = (  # timers, and what to do when the deadline of a key is over
            (self._ttls, self._ttl_over),
            (self._delays, self._delay_over),
            (self._leases, self._lease_over),
            (self._polls, self._poll_over),
            (self._holds, self._hold_over),
            (self._unties, self._untied),  # jobs to cancel, as `tied`, once the disk takes it
        )
        try:
            with self._lock:
                self._restore()
            self._timer_thread.start()
        except BaseException:
            self.journal.abandon()
            raise

    # -- the lock is held: restart

    def _restore(self) -> None:
        collecting = gc.isenabled()
        gc.disable()  # a million new objects, none of them garbage
        try:
            for record in self.journal.read():
                seq = record["seq"]
                try:
                    self._replay(record)
                except (KeyError, TypeError, ValueError, JobQueueError) as error:
                    raise DataError(
                        f"{self.journal.path}: record {seq} does not follow from those before it: {error!r}. "
                        "Nothing was changed."
                    ) from None
            self.journal.start(self._snapshot)
            self._rebuild()
        finally:
            if collecting:
                gc.enable()

    def _replay(self, record: dict[str, Any]) -> None:
        verb = record["op"]
        del record["op"], record["crc"], record["seq"], record["synced"]
        if verb in ("submit", "job"):
            self._replay_job(record)
        elif verb == "batch":
            for fields in record["jobs"]:
                self._replay_job(fields)
        elif verb == "meta":
            self._last_number = max(self._last_number, record["last_number"])
            self._all_paused = record["all_paused"]
            for queue in record["paused"]:
                self._lane(queue).paused = True
        elif verb == "clear":
            self._jobs.clear()
        elif verb == "pause":
            self._set_paused(record["queue"], record["paused"])
        elif verb == "clock":
            self._shift(record["shift"])
        elif "id" in record:  # the rest (open, synced, close) is the journal's own
            job = self._jobs[record.pop("id")]
            self._jobs[job.id] = moved(job, verb, **unpack(record))

    def _replay_job(self, fields: dict[str, Any]) -> None:
        # Clients send the same headers again and again: one copy serves all their jobs.
        fields["headers"], fields["queue"] = sys.intern(fields["headers"]), sys.intern(fields["queue"])
        job = Job(**unpack(fields))
        self._jobs[job.id] = job
        if job.number > self._last_number:
            self._last_number = job.number

    def _rebuild(self) -> None:
        """Lines, timers and counts from the jobs, oldest first. The clock may have been set while nobody looked."""
        self._now, self._wall = self._clock.monotonic(), int(self._clock.time() * 1_000_000)
        self._ahead = self._wall - self._now * 1e6
        finished = []
        lines: dict[tuple[str, int], list[Job]] = collections.defaultdict(list)
        jobs, self._jobs = sorted(self._jobs.values()), {}
        for job in jobs:
            if job.key is not None:
                self._keys[job.key] = job.id
            if job.state in FINAL:
                finished.append(job)
            elif job.state == "pending" and job.ttl is None:
                lines[job.queue, job.priority].append(job)
            else:
                if job.state == "processing":
                    job = job.changed(extended=self._wall)  # its lease runs anew
                self._weigh(job)
                self._enter(job, self._wall)
        self._order.numbers.extend(job.number for job in jobs)
        self._order.ids.extend(job.id for job in jobs)
        for (queue, priority), line in lines.items():
            self._enter_line(self._lane(queue), priority, line)
        for job in sorted(finished, key=lambda job: job.finished):
            self._weigh(job)
            self._enter(job, self._wall)
        for lane in list(self._lanes.values()):  # those that were paused once, and of which nothing is left
            self._drop_if_empty(lane)
        self._forget_old()
        self._set_alarm()

    def _enter_line(self, lane: _Lane, priority: int, line: list[Job]) -> None:
        """What _enter does for each, for very many pending jobs at once. They are in order, and so a heap."""
        lane.counts["pending"] += len(line)
        self._unfinished += len(line)
        self._unfinished_bytes += sum(job.size() for job in line)
        self._jobs.update((job.id, job) for job in line)
        lane.heaps.setdefault(priority, []).extend((job.number, job.id) for job in line)
        heapq.heapify(lane.heaps[priority])  # others may have been entered one by one
        lane.priorities = sorted(lane.heaps, reverse=True)

    def _snapshot(self) -> tuple[int, Iterator[str]]:
        """All that is alive as records, for a new journal: how many, and their bodies."""
        jobs = list(self._jobs.values())
        paused = [lane.name for lane in self._lanes.values() if lane.paused]
        meta = {"op": "meta", "last_number": self._last_number, "all_paused": self._all_paused, "paused": paused}
        bodies = ('{"op":"job",' + job_text(job)[1:] for job in jobs)
        return 1 + len(jobs), itertools.chain([json_text(meta)], bodies)

    # -- clients

    @_verb
    def submit(self, terms: Terms, payload: bytes, kind: str, wait: float | None, tied: bool = False) -> Future:
        if terms.key is not None and (job := self._replayed(terms, payload)):
            return self._watch(job, wait, lambda job: (job, True), tied)
        self._check_room(terms, 1, len(payload))
        job = self._new_job(terms, payload, kind, self._last_number + 1)
        record = '{"op":"submit",' + submit_text(job, terms)[1:]
        poll = self._poll_for(job)
        try:
            if poll is None:
                job = self._accept(job.recorded(self.journal.append(record)))
            else:
                job = self._hand_over(job, record, poll)
        except JobQueueError as error:
            if error.code == "outcome_unknown":  # it may be there after the restart, for whoever knows its id
                error.job_id = job.id
            raise
        return self._watch(job, wait, lambda job: (job, False), tied)

    @_verb
    def replayed(self, terms: Terms, payload: bytes) -> Job | None:
        return self._replayed(terms, payload)

    @_verb
    def submit_many(self, terms: Terms, batch: list[tuple[bytes, str]]) -> Future:
        self._check_room(terms, len(batch), sum(len(payload) for payload, _ in batch))
        numbered = enumerate(batch, self._last_number + 1)
        jobs = [self._new_job(terms, payload, kind, number) for number, (payload, kind) in numbered]
        bodies = ",".join([submit_text(job, terms) for job in jobs])
        seq = self.journal.append(f'{{"op":"batch","jobs":[{bodies}]}}')
        for job in jobs:
            self._accept(job.recorded(seq))
        return self._promise([job.id for job in jobs], seq)

    @_verb
    def view(self, job_id: str, wait: float) -> Future:
        return self._watch(self._find(job_id), wait, lambda job: job)

    @_verb
    def jobs(self, queue: str | None, state: str | None, limit: int, after: int | None) -> tuple[list[Job], int | None]:
        ids, rest = self._order.below(after, self.SCAN)
        found: list[Job] = []
        for job in filter(None, map(self._jobs.get, ids)):
            if (state is None or job.state == state) and (queue is None or job.queue == queue):
                if len(found) == limit:
                    return found, found[-1].number
                found.append(job)
        return found, rest

    @_verb
    def cancel(self, job_id: str) -> Future:
        job = self._find(job_id)
        if job.state == "cancelled":  # which is told once it is on the disk
            refusal = JobQueueError("job_finished", f"job {job_id} is cancelled already", job_id)
            return self._promise(refusal, job.seq, job_id)
        job = self._change(job, "cancel", finished=self._wall)
        return self._promise(job, job.seq, job_id)

    @_verb
    def _untie(self, job_id: str) -> None:
        """A client that asked for it has hung up."""
        try:
            self._untied(job_id)
        except JobQueueError:  # the disk did not take it: once more in a second
            self._arm(self._unties, job_id, self._now + 1)

    # -- workers

    @_verb
    def poll(self, claim: Claim) -> Future:
        self._see_worker(claim)
        jobs, _ = self._take(claim)
        if jobs or not claim.wait:
            return Future.of(jobs)
        if self._drained is not None:
            claim = claim._replace(wait=min(claim.wait, self.LAST_WAIT))
        return self._stand_in_line(claim, lambda jobs, error: (error or jobs, 0))

    @_verb
    def give_back(self, jobs: list[Job]) -> None:
        for given in jobs:
            job = self._jobs.get(given.id)
            if job and job.state == "processing" and job.token == given.token:
                with contextlib.suppress(JobQueueError):  # the disk did not take it: the lease runs out, then
                    self._change(job, "give_back", settled="give_back", deliveries=job.deliveries - 1)

    @_verb
    def complete(
        self, job_id: str, token: str | None, result: bytes, kind: str, content_type: str | None, claim: Claim | None
    ) -> Future:
        job = self._find(job_id)
        if claim is not None:
            self._see_worker(claim)
        duplicate = not self._may_complete(job, token)
        if duplicate:
            jobs, seq = self._take_if_possible(claim), job.seq
        else:
            end = (token and job.token, self._wall, result, kind, content_type)
            late = job.state == "pending"  # it stands in line itself until that is written
            jobs, seq = self._take(None if late else claim, complete_record(job, *end))
            job = self._completed(job, end, seq)
            if late:
                jobs = self._take_if_possible(claim)
        # What is still in line then, the disk refused to lease.
        if claim is None or jobs or not claim.wait or self._drained is not None or self._in_line(claim.queues):
            return self._promise(_make(Outcome, (job, duplicate, jobs[0] if jobs else None)), seq, job_id)
        return self._stand_in_line(
            claim, lambda jobs, _: (_make(Outcome, (job, duplicate, jobs[0] if jobs else None)), seq), job_id
        )

    @_verb
    def complete_many(self, results: list[tuple[str, str | None, bytes, str, str | None]]) -> Future:
        outcomes: list[Outcome | JobQueueError | None] = []
        batch: dict[str, tuple] = {}  # what is written with one write: place in `outcomes`, job, its end
        wall = self._wall
        for job_id, token, result, kind, content_type in results:
            if job_id in batch:  # once more the same: it must see what became of the first
                self._complete_batch(batch, outcomes)
            try:
                job = self._find(job_id)
                if self._may_complete(job, token):
                    batch[job_id] = len(outcomes), job, (token and job.token, wall, result, kind, content_type)
                    outcomes.append(None)
                else:
                    outcomes.append(Outcome(job, duplicate=True))
            except JobQueueError as error:
                outcomes.append(error)
        self._complete_batch(batch, outcomes)
        done = [outcome.job.seq for outcome in outcomes if isinstance(outcome, Outcome)]
        return self._promise(outcomes, max(done, default=0))

    @_verb
    def fail(self, job_id: str, token: str | None, error: str, retry: bool, delay: float | None) -> Future:
        job = self._find(job_id)
        if not check_lease(job, token, "fail"):
            return self._promise(Outcome(job, duplicate=True), job.seq, job_id)
        # A lease that ran out was counted as a failed attempt then; its late error is not a second one.
        failures = job.failures + (job.settled != "lapse")
        changes = {"settled": "fail", "failures": failures, "error": error, **_voided(job, token)}
        if retry and failures < job.attempts:
            delay = retry_delay(failures) if delay is None else delay
            if delay:
                changes |= {"delay": delay, "available": self._wall + microseconds(delay)}
            job = self._unless_over(self._change(job, "retry" if delay else "retry_now", **changes))
            self._totals["retries_total"] += job.state != "expired"
        else:
            job = self._change(job, "fail", **changes, finished=self._wall)
        self._count_worker(job.worker, "failed")
        return self._promise(Outcome(job), job.seq, job_id)

    @_verb
    def release(self, job_id: str, token: str | None) -> Outcome:
        job = self._find(job_id)
        if not check_lease(job, token, "release"):
            return Outcome(job, duplicate=True)
        return Outcome(self._change(job, "release", settled="release", **_voided(job, token)))

    @_verb
    def extend(self, job_id: str, token: str | None, lease: float | None) -> Outcome:
        job = self._find(job_id)
        if job.state == "cancelled" and job.token is not None and token in (None, job.token):
            return Outcome(job)
        check_lease(job, token, "extend")
        # Extending a lease that has run out takes that back: it was no failed attempt.
        changes = {"failures": job.failures - 1} if job.settled == "lapse" else {}
        changes |= {"settled": None, "lease_seconds": lease or job.lease_seconds, "extended": self._wall}
        return Outcome(self._change(job, "extend", **changes))

    # -- administration

    @_verb
    def peek(self, queues: tuple[str, ...]) -> Job | None:
        return self._in_line(queues)

    @_verb
    def requeue(self, job_id: str) -> Future:
        seq = self._requeue([self._find(job_id)])
        return self._promise(self._jobs[job_id], seq, job_id)

    @_verb
    def requeue_some(self, state: str, queue: str | None, after: int | None) -> tuple[int, int | None]:
        ids, rest = self._order.below(after, self.SWEEP)
        jobs = [job for job in map(self._jobs.get, ids) if job and job.state == state and queue in (None, job.queue)]
        if jobs:
            self._requeue(jobs)
        return len(jobs), rest

    @_verb
    def pause(self, queue: str | None, paused: bool) -> Future:
        seq = self.journal.append(json_text({"op": "pause", "queue": queue, "paused": paused}), urgent=True)
        self._set_paused(queue, paused)
        self._filled.extend(self._lanes.values())
        for lane in list(self._lanes.values()):
            self._drop_if_empty(lane)
        names: Any = "all" if self._all_paused else sorted(lane.name for lane in self._lanes.values() if lane.paused)
        return self._promise(names, seq)

    @_verb
    def clear(self) -> Future:
        seq = self.journal.append('{"op":"clear"}', urgent=True)
        jobs, watchers, self._watchers = self._jobs, self._watchers, {}
        self._jobs, self._order, self._keys = {}, _Order(), {}
        self._unfinished = self._unfinished_bytes = self._finished_bytes = 0
        for lane in list(self._lanes.values()):
            lane.heaps, lane.priorities, lane.counts = {}, [], dict.fromkeys(STATES, 0)
            self._drop_if_empty(lane)
        for timers in (self._delays, self._leases, self._ttls):
            timers.clear()
        self._ttl_ends.clear()
        for kept in self._kept.values():
            kept.clear()
        for job_id, waiting in watchers.items():
            error = JobQueueError("job_cleared", "the queue was cleared" + _last_error(jobs[job_id]), job_id)
            for watcher in waiting:
                self._answer_watcher(watcher, error, seq)
        return self._promise(len(jobs), seq)

    @_verb
    def stats(self) -> dict[str, Any]:
        queues = {}
        self._pollers.tidy()  # or the queues that they waited for would be shown on
        for lane in self._lanes.values():
            oldest = self._oldest(lane)
            age = None if oldest is None else max(0.0, (self._wall - oldest.created) / 1e6)
            queues[lane.name] = {**_as_counts(lane.counts), "paused": lane.paused, "oldest_pending_seconds": age}
        return {
            "total": len(self._jobs),
            **_as_counts({state: sum(lane.counts[state] for lane in self._lanes.values()) for state in STATES}),
            "bytes": self._unfinished_bytes,
            "finished_bytes": self._finished_bytes,
            "waiting_clients": len(self._clients),
            "waiting_workers": len(self._pollers),
            "paused": self._all_paused,
            "draining": self.draining(),
            "queues": queues,
        }

    @_verb
    def figures(self) -> dict[str, Any]:
        return {**self._totals, **self.journal.figures(), "job_wait_seconds": self._waits.copy()}

    @_verb
    def workers_seen(self) -> list[dict[str, Any]]:
        running = collections.Counter(self._jobs[job_id].worker for job_id in self._leases)
        waiting = collections.Counter(waiter.claim.worker for waiter in self._polls if not waiter.future.done())
        return [
            {
                "worker": name,
                "queues": list(seen["queues"]),
                "last_seen": iso_time(seen["last_seen"]),
                "jobs_running": running[name],
                "completed": seen["completed"],
                "failed": seen["failed"],
                "waiting": waiting[name],
            }
            for name, seen in self._workers.items()
        ]

    # -- the end

    def draining(self) -> bool:
        return self._drained is not None

    @_verb
    def drain(self) -> Future:
        if self._drained is None:
            self._drained = Future()
            self._end_polls()
        return self._drained

    def close(self) -> None:
        with contextlib.suppress(JobQueueError):
            self._finish()
        compacting = self._compacting
        if compacting:
            compacting.join()
        if threading.current_thread() is not self._timer_thread:
            self._timer_thread.join()
        self.journal.close()

    @_verb
    def _finish(self) -> None:
        """The last verb: those that come later raise."""
        self._send_away()
        self._closed = True
        self._timer.notify()

    # -- the disk

    def lead(self) -> None:
        self.journal.lead()

    def uncommitted(self) -> bool:
        return self.journal.uncommitted()

    def commit(self) -> None:
        self.journal.commit()

    def _disk_full(self) -> None:
        """Called by the journal, under the lock."""
        self._compact_size = 0  # the journal itself may be what fills it

    def _disk_failed(self) -> None:
        """Called by the journal, under whatever lock: so a thread takes this one."""
        self._failed()
        with contextlib.suppress(RuntimeError):  # no thread is to be had: the end tells them
            threading.Thread(target=self._give_up, name="jobqueue-failed", daemon=True).start()

    def _give_up(self) -> None:
        with contextlib.suppress(JobQueueError):  # closed in between
            self._dismiss()

    @_verb
    def _dismiss(self) -> None:
        """The disk has failed: whoever waits is told, nothing more is handed out or taken."""
        self._send_away()

    # -- the lock is held: changing a job

    def _find(self, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise JobQueueError("job_not_found", f"there is no job {job_id}", job_id)
        return job

    def _replayed(self, terms: Terms, payload: bytes) -> Job | None:
        job = self._jobs[self._keys[terms.key]] if terms.key in self._keys else None
        if job and (job.payload, job.queue) != (payload, terms.queue):
            raise JobQueueError("key_reused", "this Idempotency-Key was used for another payload or queue", job.id)
        return job

    def _check_room(self, terms: Terms, count: int, size: int) -> None:
        """For so many new jobs, whose payloads have so many bytes together."""
        if self.journal.failure:
            raise self.journal.unknown(None)
        if self._drained is not None:
            raise JobQueueError("draining", "the server is stopping; try again in a few seconds")
        if count > 1:  # of one, the headers may go beyond the limit
            size += (count - 1) * (len(terms.headers) + OVERHEAD)
        jobs, held, settings = self._unfinished, self._unfinished_bytes, self._settings
        if jobs + count > settings.max_jobs or held + size > settings.max_bytes:
            raise JobQueueError(
                "queue_full",
                f"{jobs} jobs with {held} bytes are unfinished, and at most {settings.max_jobs} with "
                f"{settings.max_bytes} may be; this brings {count} with {size}",
            )

    def _new_job(self, terms: Terms, payload: bytes, kind: str, number: int) -> Job:
        wall = self._wall
        queue, priority, headers, attempts, lease, ttl, delay, key = terms
        job_id = _uuid(next(self._random) + next(self._random))
        said = (number, job_id, queue, priority, wall, payload, kind, headers, attempts, lease, ttl, key)
        job = _make(Job, said + _NEW)
        if delay:
            job = job.changed(state="delayed", delay=delay, available=wall + microseconds(delay))
        return job if ttl is None else job.changed(expires=wall + microseconds(ttl))

    def _accept(self, job: Job) -> Job:
        """Its record is written."""
        self._last_number = job.number
        self._totals["jobs_submitted_total"] += 1
        self._order.add(job.number, job.id)
        if job.key is not None:
            self._keys[job.key] = job.id
        self._weigh(job)
        self._enter(job, job.created)
        return job

    def _poll_for(self, job: Job) -> _Waiter | None:
        """The poll that gets a new job at once, since it waits for just this; its future is claimed."""
        lane = self._lanes.get(job.queue)
        if lane is None or not lane.waiters or lane.counts["pending"]:
            return None
        if job.state != "pending" or not self._is_open(lane):
            return None
        while lane.waiters:
            waiter = next(iter(lane.waiters))
            if waiter.future.claim():
                return waiter
            self._drop_poll(waiter)  # it has hung up
        return None

    def _hand_over(self, job: Job, record: str, poll: _Waiter) -> Job:
        """Accept a new job and lease it to this poll, with one write."""
        lease = self._new_lease(job, poll.claim)
        try:
            seq = self.journal.append(record, lease_record(job, *lease))
        except BaseException:
            poll.future.unclaim()
            raise
        job = self._accept(job.leased(*lease, seq))
        self._waits.observe(0.0)
        self._answer_poll(poll, [job])
        return job

    def _new_lease(self, job: Job, claim: Claim) -> tuple[str, float, str, int]:
        """Token, seconds, worker, moment."""
        return next(self._random), claim.lease or job.lease or self._settings.lease, claim.worker, self._wall

    def _change(self, job: Job, verb: str, **changes: Any) -> Job:
        """Write the record, then move the job: what the disk refused did not happen."""
        state = state_after(job, verb)
        seq = self.journal.append(json_text({"op": verb, "id": job.id, **changes}), urgent=True)
        return self._move(job, job.changed(state=state, seq=seq, **changes))

    def _unless_over(self, job: Job) -> Job:
        """A job that comes back when its ttl is over expires at once, so that whoever gives it back is told so."""
        if self._ttl_ends.get(job.id, math.inf) > self._now:
            return job
        try:
            return self._change(job, "expire", finished=self._wall)
        except JobQueueError:  # the disk did not take it: its timer is due
            return job

    def _requeue(self, jobs: list[Job]) -> int:
        """Put them back in line with one write; the number of its last record."""
        fresh = [(job, state_after(job, "requeue"), self._afresh(job)) for job in jobs]
        last = self.journal.append(*[json_text({"op": "requeue", "id": job.id, **new}) for job, _, new in fresh])
        for seq, (job, state, new) in enumerate(fresh, last - len(jobs) + 1):
            self._move(job, job.changed(state=state, seq=seq, **new), self._wall)
        return last

    def _move(self, job: Job, new: Job, wall: int | None = None) -> Job:
        """Take the job from where its old state had it, and put it where the new one belongs."""
        self._leave(job)
        if new.state in FINAL:
            self._unfinished -= 1
            self._unfinished_bytes -= job.size()
            self._finished_bytes += new.final_size()
        elif job.state in FINAL:
            self._finished_bytes -= job.final_size()
            self._unfinished += 1
            self._unfinished_bytes += new.size()
        self._enter(new, wall)
        return new

    def _round_off(self) -> None:
        """After a verb: hand out what it made pending, and see to the journal's size and to a drain."""
        while self._filled:
            lanes, self._filled = list(dict.fromkeys(self._filled)), []
            while lanes := [lane for lane in lanes if lane.waiters and self._first(lane)]:
                # Of several queues that filled at once, the poll that waits longest is served first.
                self._offer(min(lanes, key=lambda lane: next(iter(lane.waiters)).number))
        if self.journal.size > self._compact_size:
            self._watch_size()
        if self._drained is not None and not self._leases:
            self._ready.append((self._drained, True))

    def _leave(self, job: Job) -> None:
        state = job.state
        self._lanes[job.queue].counts[state] -= 1
        if state == "processing":
            self._leases.cancel(job.id)
        elif state == "delayed":
            self._delays.cancel(job.id)
        elif state in FINAL:
            self._kept[state == "failed"].pop(job.id, None)

    def _weigh(self, job: Job) -> None:
        """Count a job that comes, and its bytes."""
        if job.state in FINAL:
            self._finished_bytes += job.final_size()
        else:
            self._unfinished += 1
            self._unfinished_bytes += job.size()

    def _enter(self, job: Job, wall: int | None) -> None:
        """Put the job where its state belongs. `wall`: the moment from which the job's own times count, since they are
        new or restored; None: they run on."""
        job_id, state = job.id, job.state
        self._jobs[job_id] = job
        lane = self._lanes.get(job.queue) or self._lane(job.queue)
        lane.counts[state] += 1
        if state in FINAL:
            self._finish_job(job, wall)
            return
        if job.ttl is not None:
            if wall:
                self._ttl_ends[job_id] = self._now + _remaining(job.expires, job.ttl, wall)
            if state != "processing":
                self._arm(self._ttls, job_id, self._ttl_ends[job_id])
        if state == "pending":
            self._line_up(lane, job)
            if lane.waiters:
                self._filled.append(lane)
        elif state == "delayed":
            left = _remaining(job.available, job.delay, wall) if wall else job.delay
            self._arm(self._delays, job_id, self._now + left)
        else:
            self._arm(self._leases, job_id, self._now + job.lease_seconds)

    def _finish_job(self, job: Job, wall: int | None) -> None:
        if job.ttl is not None:
            self._ttls.cancel(job.id)
            self._ttl_ends.pop(job.id, None)
        failed = job.state == "failed"
        keep = self._settings.keep_failed if failed else self._settings.keep_completed
        left = _remaining(job.finished + microseconds(keep), keep, wall) if wall else keep
        self._kept[failed][job.id] = when = self._now + left
        if when < self._forget_at:
            self._forget_at = when
            self._wake_by(when)
        if wall:
            return
        self._totals[_ENDED[job.state]] += 1
        for watcher in self._watchers.pop(job.id, ()):
            self._answer_watcher(watcher, watcher.answer(job), job.seq)
        self._forget_old()

    def _afresh(self, job: Job) -> dict[str, Any]:
        """What a requeue changes."""
        fresh = {"failures": 0, "settled": "requeue", "error": None, "finished": None}
        if job.ttl is not None:
            fresh["expires"] = self._wall + microseconds(job.ttl)
        return fresh

    def _may_complete(self, job: Job, token: str | None) -> bool:
        """As check_lease has it; a duplicate is counted."""
        if check_lease(job, token, "complete"):
            return True
        self._totals["duplicate_completions_total"] += 1
        return False

    def _completed(self, job: Job, end: tuple, seq: int) -> Job:
        """Record `seq` says that the job is completed, by `end`: so it is."""
        self._totals["late_completions_total"] += job.settled == "lapse"
        self._count_worker(job.worker, "completed")
        return self._move(job, job.completed(*end, seq))

    def _complete_batch(self, batch: dict[str, tuple], outcomes: list[Outcome | JobQueueError]) -> None:
        """Complete these with one write, or one by one where the disk has no room for all; each outcome goes to its
        place in `outcomes`."""
        ends = list(batch.values())
        batch.clear()
        if not ends:
            return
        try:
            last = self.journal.append(*[complete_record(job, *end) for _, job, end in ends], urgent=True)
        except JobQueueError as error:
            if len(ends) == 1:
                outcomes[ends[0][0]] = error
            else:
                for one in ends:
                    self._complete_batch({one[1].id: one}, outcomes)
            return
        for seq, (place, job, end) in enumerate(ends, last - len(ends) + 1):
            outcomes[place] = Outcome(self._completed(job, end, seq))

    def _forget_old(self) -> None:
        """Drop finished jobs that are past their time, or too many, or too large together; the oldest first."""
        kept, settings, now = self._kept, self._settings, self._now
        if now >= self._forget_at:
            for jobs in kept.values():
                while jobs and next(iter(jobs.values())) <= now:
                    self._forget(next(iter(jobs)))
            self._forget_at = min((next(iter(jobs.values())) for jobs in kept.values() if jobs), default=math.inf)
        while len(kept[False]) + len(kept[True]) > settings.keep_jobs or self._finished_bytes > settings.keep_bytes:
            self._forget(self._oldest_ended())

    def _oldest_ended(self) -> str:
        others, failed = self._kept[False], self._kept[True]
        if not (others and failed):
            return next(iter(others or failed))
        ended = next(iter(others.values())) - self._settings.keep_completed
        return next(iter(others if ended <= next(iter(failed.values())) - self._settings.keep_failed else failed))

    def _forget(self, job_id: str) -> None:
        job = self._jobs.pop(job_id)
        self._leave(job)
        self._finished_bytes -= job.final_size()
        if job.key is not None and self._keys.get(job.key) == job_id:
            del self._keys[job.key]
        if len(self._order.ids) > 2 * len(self._jobs) + 1000:
            self._order.tidy(self._jobs)
        self._drop_if_empty(self._lanes[job.queue])

    # -- the lock is held: the line

    def _lane(self, queue: str) -> _Lane:
        lane = self._lanes.get(queue)
        if lane is None:
            lane = self._lanes[queue] = _Lane(queue)
        return lane

    def _drop_if_empty(self, lane: _Lane) -> None:
        """Names of queues are free; those that nobody uses take no memory."""
        if not (lane.waiters or lane.paused or any(lane.counts.values())):
            self._lanes.pop(lane.name, None)

    def _set_paused(self, queue: str | None, paused: bool) -> None:
        if queue is not None:
            self._lane(queue).paused = paused
            return
        self._all_paused = paused
        if not paused:
            for lane in self._lanes.values():
                lane.paused = False

    def _line_up(self, lane: _Lane, job: Job) -> None:
        heap = lane.heaps.get(job.priority)
        if heap is None:
            heap = lane.heaps[job.priority] = []
            lane.priorities = sorted(lane.heaps, reverse=True)
        heapq.heappush(heap, (job.number, job.id))
        if len(heap) > 2 * lane.counts["pending"] + 1000:
            # Jobs that left the line by another way stay in the heap (twice, if they came back) until they are half.
            heap[:] = sorted({entry for entry in heap if self._is_pending(entry[1])})

    def _is_pending(self, job_id: str) -> bool:
        job = self._jobs.get(job_id)
        return job is not None and job.state == "pending"

    def _top(self, heap: list[tuple[int, str]]) -> Job | None:
        """The oldest job of a heap that is still pending, and may still be handed out."""
        while heap:
            job = self._jobs.get(heap[0][1])
            alive = job is not None and job.state == "pending"
            if alive and (job.ttl is None or self._ttl_ends[job.id] > self._now):
                return job
            heapq.heappop(heap)
        return None

    def _oldest(self, lane: _Lane) -> Job | None:
        return min(filter(None, map(self._top, lane.heaps.values())), default=None)

    def _is_open(self, lane: _Lane) -> bool:
        """May jobs be handed out?"""
        return not (lane.paused or self._all_paused or self._drained is not None)

    def _first(self, lane: _Lane | None) -> Job | None:
        """The job that is handed out next; None also while nothing may be handed out."""
        if lane is None or not lane.counts["pending"] or not self._is_open(lane):
            return None
        for priority in lane.priorities:
            job = self._top(lane.heaps[priority])
            if job is not None:
                return job
        return None

    def _in_line(self, queues: tuple[str, ...]) -> Job | None:
        """The job that a poll of these queues would get."""
        for queue in queues:
            job = self._first(self._lanes.get(queue))
            if job is not None:
                return job
        return None

    def _choose(self, claim: Claim | None) -> list[Job]:
        """Take the jobs that a claim gets out of their lines."""
        chosen: list[Job] = []
        if claim is None:
            return chosen
        room = self._settings.max_batch
        for queue in claim.queues:
            lane = self._lanes.get(queue)
            while len(chosen) < claim.max and (job := self._first(lane)) is not None:
                if claim.max > 1:  # a batch: its answer has to be built and sent in one piece
                    room -= job.size() + (len(job.payload) // 3 if job.kind == "binary" else 0)  # as base64
                    if room < 0 and chosen:
                        return chosen
                heap = lane.heaps[job.priority]
                while heap and heap[0][1] == job.id:  # twice, where it left the line by another way and came back
                    heapq.heappop(heap)
                chosen.append(job)
        return chosen

    def _take(self, claim: Claim | None, *before: str) -> tuple[list[Job], int]:
        """Lease up to `claim.max` jobs with one write, behind the records `before`; the jobs, and the number of the
        last record of `before`."""
        chosen = self._choose(claim)
        if not chosen:
            return chosen, self.journal.append(*before, urgent=True) if before else 0
        try:
            leases = [self._new_lease(job, claim) for job in chosen]
            records = [lease_record(job, *lease) for job, lease in zip(chosen, leases, strict=True)]
            last = self.journal.append(*before, *records, urgent=True, lease=True)
        except BaseException as error:
            for job in chosen:
                self._line_up(self._lanes[job.queue], job)
            if not isinstance(error, JobQueueError) or len(chosen) + len(before) == 1:
                raise
            # Perhaps the disk takes fewer.
            return self._take(claim._replace(max=1) if len(chosen) > 1 else None, *before)
        first = last - len(chosen)
        for place, job in enumerate(chosen):
            if not job.deliveries:
                self._waits.observe(max(0.0, (self._wall - job.created) / 1e6))  # clocks are set back
            chosen[place] = self._move(job, job.leased(*leases[place], first + 1 + place))
        return chosen, first

    def _take_if_possible(self, claim: Claim | None) -> list[Job]:
        try:
            return self._take(claim)[0]
        except JobQueueError:
            return []

    def _stand_in_line(self, claim: Claim, answer: Callable, job_id: str | None = None) -> Future:
        """A future of what `answer` makes of the jobs, or of the disk's refusal (and the record it has to wait for)."""
        future = Future()
        waiter = _Waiter(future, answer, claim, job_id)
        self._pollers.add(future)
        for queue in claim.queues:
            self._lane(queue).waiters[waiter] = None
        self._arm(self._polls, waiter, self._now + claim.wait)
        return future

    def _offer(self, lane: _Lane) -> None:
        """Hand the lane's next jobs to the poll that waits longest for it."""
        waiter = next(iter(lane.waiters))
        if not waiter.future.claim():
            self._drop_poll(waiter)
            return
        try:
            jobs, error = self._take(waiter.claim)[0], None
        except Exception as refusal:  # whatever it is: it is claimed, so nobody else answers it
            jobs, error = [], refusal
        self._answer_poll(waiter, jobs, error)

    def _answer_poll(self, waiter: _Waiter, jobs: list[Job], error: Exception | None = None) -> None:
        """Its future is claimed."""
        self._pollers.count -= 1
        self._answer(waiter.future, *waiter.answer(jobs, error), waiter.job_id)
        self._drop_poll(waiter)

    def _drop_poll(self, waiter: _Waiter) -> None:
        self._polls.cancel(waiter)
        for queue in waiter.claim.queues:
            lane = self._lanes.get(queue)
            if lane:
                lane.waiters.pop(waiter, None)
                self._drop_if_empty(lane)
        waiter.future = waiter.answer = None  # a heap of timers may still hold the waiter, but not its answer

    def _end_polls(self) -> None:
        for waiter in {waiter for lane in self._lanes.values() for waiter in lane.waiters}:
            self._poll_over(waiter)

    # -- who waits

    def _give_answers(self) -> None:
        """The lock is not held: whoever gets an answer may call verbs."""
        while self._ready:
            try:
                future, value = self._ready.popleft()
            except IndexError:  # another thread was faster: each answer is taken once
                return
            future.set_result(value)

    # -- the lock is held: who waits

    def _answer(self, future: Future, value: Any, seq: int, job_id: str | None = None) -> None:
        """Answer a claimed future: after the sync where it has to wait for one, else when the lock is free."""
        if self.journal.after_sync(future, value, seq, job_id):
            self._ready.append((future, value))

    def _promise(self, value: Any, seq: int, job_id: str | None = None) -> Future:
        """A future that is answered now, or after the sync where it has to wait for one."""
        future = Future()
        future.job_id = job_id
        future.claim()
        if self.journal.after_sync(future, value, seq, job_id):
            future.set_result(value)  # nobody has it yet, so this calls nobody
        return future

    def _watch(self, job: Job, wait: float | None, answer: Callable[[Job], Any], tied: bool = False) -> Future:
        """A future of the job: final, or as it stands when the wait is over."""
        if job.state in FINAL or wait == 0:
            return self._promise(answer(job), job.seq, job.id)
        future = Future()
        future.job_id = job.id
        watcher = _Waiter(future, answer, job_id=job.id)
        self._watchers.setdefault(job.id, []).append(watcher)
        self._clients.add(future)
        if tied:
            future.add_done_callback(lambda future: future.cancelled() and self._untie(job.id))
        if wait is not None:
            self._arm(self._holds, watcher, self._now + wait)
        return future

    def _answer_watcher(self, watcher: _Waiter, value: Any, seq: int) -> None:
        if watcher.future and watcher.future.claim():
            self._clients.count -= 1
            self._answer(watcher.future, value, seq, watcher.job_id)
        self._holds.cancel(watcher)
        watcher.future = watcher.answer = None

    def _send_away(self) -> None:
        """Polls end; clients that still wait learn that their job is accepted, and where to ask for it."""
        self._drained = self._drained or Future()
        self._end_polls()
        watching, self._watchers = self._watchers, {}
        for job_id, watchers in watching.items():
            for watcher in watchers:
                job = self._jobs[job_id]
                # After a disk failure nothing more is acknowledged, not even what is on the disk.
                value = self.journal.unknown(job_id) if self.journal.failure else watcher.answer(job)
                self._answer_watcher(watcher, value, job.seq)

    def _sweep_pollers(self) -> None:
        for waiter in [waiter for waiter in self._polls if waiter.future.cancelled()]:
            self._drop_poll(waiter)

    def _sweep_clients(self) -> None:
        for job_id, watchers in list(self._watchers.items()):
            for watcher in [watcher for watcher in watchers if watcher.future.cancelled()]:
                self._holds.cancel(watcher)
                watchers.remove(watcher)
            if not watchers:
                del self._watchers[job_id]

    def _see_worker(self, claim: Claim) -> None:
        if not claim.worker:
            return
        seen = self._workers.get(claim.worker)
        if seen is None:
            seen = self._workers[claim.worker] = {"completed": 0, "failed": 0}
        seen["queues"], seen["last_seen"] = claim.queues, self._wall
        self._workers.move_to_end(claim.worker)
        if len(self._workers) > 1000:
            self._workers.popitem(last=False)

    def _count_worker(self, worker: str | None, what: str) -> None:
        seen = self._workers.get(worker or "")
        if seen:
            seen[what] += 1

    # -- the lock is held: time

    def _clock_was_set(self) -> None:
        """Spans run on, by the monotonic clock. So that a restart finds them as they are, moments move along."""
        shift = round(self._wall - self._now * 1e6 - self._ahead)
        with contextlib.suppress(JobQueueError):  # the disk did not take it: at the next verb, then
            self.journal.append(json_text({"op": "clock", "shift": shift}), urgent=True)
            self._ahead += shift
            self._shift(shift)
            log.warning("clock_set seconds=%+.0f: the moments of %d jobs moved along", shift / 1e6, len(self._jobs))

    def _shift(self, shift: int) -> None:
        self._jobs.update([(job.id, job.shifted(shift)) for job in self._jobs.values()])
        for seen in self._workers.values():
            seen["last_seen"] += shift

    def _arm(self, timers: Timers, key: Any, when: float) -> None:
        timers.set(key, when)
        self._wake_by(when)

    def _wake_by(self, when: float) -> None:
        if when < self._alarm:
            self._alarm = when
            self._timer.notify()

    def _set_alarm(self) -> None:
        self._alarm = min(self._forget_at, *(timers.first() for timers, _ in self._alarms))

    def _ring(self) -> None:
        """What the clock has brought, kind by kind; what fails, as on a full disk, is tried again a second later."""
        now, again = self._now, 0.0
        for timers, verb in self._alarms:
            for _ in range(self.SWEEP):
                key = timers.pop_due(now)
                if key is None:
                    break
                try:
                    verb(key)
                except Exception as error:
                    if not isinstance(error, JobQueueError):
                        log.exception("not_done_in_time")
                    elif error.code == "disk_full":  # a disk that failed has been told of, once
                        log.error("not_done_in_time reason=%s", error)
                    timers.set(key, now + 1)
                    again = now + 1
                    break
        self._forget_old()
        self._set_alarm()
        self._alarm = max(self._alarm, again)
        self._round_off()

    def _delay_over(self, job_id: str) -> None:
        self._change(self._jobs[job_id], "ripen")

    def _lease_over(self, job_id: str) -> None:
        job = self._jobs[job_id]
        lost = {"failures": job.failures + 1, "settled": "lapse"}
        if job.failures + 1 >= job.attempts:
            error = f"the lease of {job.lease_seconds:g} s ran out on attempt {job.failures + 1}"
            self._change(job, "fail", **lost, error=error, finished=self._wall)
        else:
            self._change(job, "lapse", **lost)
        self._totals["leases_lapsed_total"] += 1

    def _ttl_over(self, job_id: str) -> None:
        job = self._jobs[job_id]
        if job.state != "processing":  # a worker that has it may still complete it
            self._change(job, "expire", finished=self._wall)

    def _untied(self, job_id: str) -> None:
        job = self._jobs.get(job_id)
        watched = any(watcher.future and not watcher.future.done() for watcher in self._watchers.get(job_id, ()))
        if job and job.state not in FINAL and not watched:
            self._change(job, "cancel", finished=self._wall)

    def _poll_over(self, waiter: _Waiter) -> None:
        if waiter.future.claim():
            self._answer_poll(waiter, [])
        else:
            self._drop_poll(waiter)

    def _hold_over(self, watcher: _Waiter) -> None:
        job = self._jobs[watcher.job_id]
        watchers = self._watchers[job.id]
        watchers.remove(watcher)
        if not watchers:
            del self._watchers[job.id]
        self._answer_watcher(watcher, watcher.answer(job), job.seq)

    # -- the timer's thread

    def _time_forever(self) -> None:
        while True:
            with self._lock:
                now = self._clock.monotonic()
                if not self._closed and self._alarm > now:
                    self._clock.wait(self._timer, None if self._alarm == math.inf else self._alarm - now)
                if self._closed:
                    return
            try:
                self._tick()
            except JobQueueError:  # closed in between
                pass
            except Exception:  # without this thread nothing would come by the clock any more
                log.exception("timer_failed")
                with self._lock:
                    self._clock.wait(self._timer, 1.0)

    @_verb
    def _tick(self) -> None:
        """Nothing of its own: a verb settles what the clock has brought."""

    # -- the lock is held: compaction

    def _watch_size(self) -> None:
        """Start a compaction when the journal is large and more than half of it is dead; on a full disk, when it gives
        anything. There it is written into the room of the reserve."""
        size, full = self.journal.size, self.journal.full
        if not full:
            self._compact_size = self._settings.compact_bytes
        if self._compacting or self._closed or size <= self._compact_size:
            return
        alive = self._inflation * (self._unfinished_bytes + self._finished_bytes)
        if size < (1.1 if full else 2) * alive or self._now < max(self._compact_again, full and self._full_again):
            return
        if full:
            self._full_again = self._now + 10
            self.journal.spend()
        self.journal.lent = full
        count, bodies = self._snapshot()
        self._alive_then = self._unfinished_bytes + self._finished_bytes
        arguments = (count, self._until_closed(bodies), self.journal.seq, size)
        self._compacting = threading.Thread(target=self._compact, args=arguments, name="jobqueue-compact", daemon=True)
        try:
            self._compacting.start()
        except RuntimeError as error:  # no thread is to be had now
            self._compacting, self._compact_again, self.journal.lent = None, self._now + 10, False
            log.warning("compaction_failed error=%s: the journal stays as it is; next try in 10 s", error)

    # -- the compacting thread

    def _until_closed(self, bodies: Iterable[str]) -> Iterator[str]:
        for body in bodies:
            if self._closed:
                raise OSError(errno.ECANCELED, "the queue is closing")
            yield body

    def _compact(self, *arguments: Any) -> None:
        before = self.journal.size
        try:
            size = self.journal.compact(*arguments)
            self._totals["compactions_total"] += 1
            # A character may be written as six (\u0001), and a small job is mostly names; where nearly nothing was
            # alive, the file's own lines say nothing about jobs.
            self._inflation = min(8.0, max(1.0, size / max(1, self._alive_then)))
            log.info("compacted bytes_before=%d bytes_after=%d", before, self.journal.size)
        except Exception as error:  # be it that memory has run out
            if not self._closed:
                known = isinstance(error, OSError)
                reason = "compaction_failed error=%s: the journal stays as it is; next try in 10 s"
                log.warning(reason, error if known else repr(error), exc_info=not known)
            self._compact_again = self._clock.monotonic() + 10
        finally:
            self.journal.lent, self._compacting = False, None


def _random_digits() -> Iterator[str]:
    """16 random hexadecimal digits each time, 256 times for one call of the system."""
    while True:
        digits = os.urandom(2048).hex()
        for at in range(0, 4096, 16):
            yield digits[at : at + 16]


_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def _uuid(digits: str) -> str:
    """32 random digits as a UUID (RFC 9562, version 4)."""
    variant = _VARIANT[digits[16]]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def _voided(job: Job, token: str | None) -> dict[str, Any]:
    """Who ends a lease without its token ends it for its holder too, who must not take that for its own doing."""
    return {"token": None} if token is None and job.token is not None else {}


def _remaining(moment: int | None, span: float, wall: int) -> float:
    """Seconds until `moment` by the wall clock, but never more than the whole span, whatever the clock was set to."""
    return min(span, max(0.0, ((moment or 0) - wall) / 1e6))


def _as_counts(counts: dict[str, int]) -> dict[str, int]:
    """`processing` is called running, as in the original's stats."""
    return {"running" if state == "processing" else state: count for state, count in counts.items()}


# == Service ===========================================================================================================
# What both wires call: who may, what is allowed, what is meant where nothing was said.

SCOPES = ("client", "worker", "admin")
# In one batch; more would hold up everybody else for more than a second (results for half of one).
MAX_LINES = 50_000
MAX_RESULTS = 10_000
MAX_QUEUES = 100  # of one poll: each has a line to stand in
MAX_FORWARDED = 63 * KIB  # bytes of a job's headers: with the largest payload they fit a gRPC client's 4 MiB
MAX_ERROR = 65536  # characters of a worker's error
_QUEUE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+([ \t]*;[\x20-\x7e]*)?")


@functools.lru_cache(64)
def _media_type(given: str) -> str:
    """A malformed one is no reason to refuse a result."""
    return given if _MEDIA_TYPE.fullmatch(given) else "application/octet-stream"


def _queue(name: str, given: str) -> str:
    if not _QUEUE.fullmatch(given):
        raise ValueError(f"{name} must be 1 to 64 of A-Z a-z 0-9 . _ -, got {given!r}")
    return given


_queue.schema = {"type": "string", "pattern": f"^{_QUEUE.pattern}$"}


def _distinct_queues(name: str, given: Iterable[str]) -> tuple[str, ...]:
    queues = tuple(dict.fromkeys(_queue(name, queue) for queue in given))
    if len(queues) > MAX_QUEUES:
        raise ValueError(f"{name} must be at most {MAX_QUEUES} names, got {len(queues)}")
    return queues


def _queues(name: str, given: str) -> tuple[str, ...]:
    return _distinct_queues(name, given.split(","))


_queues.schema = {"type": "string", "pattern": f"^{_QUEUE.pattern}(,{_QUEUE.pattern})*$"}


def _label(name: str, given: str) -> str:
    if len(given) > 200 or not given.isprintable():
        raise ValueError(f"{name} must be up to 200 printable characters")
    return given


# No pattern that every reader knows says what is printable in Unicode: this much is promised, and more is taken.
_label.schema = {"type": "string", "maxLength": 200, "pattern": "^[ -~\u00a1-\u00ac\u00ae-\u0377]*$"}


def checked(parse: Callable[[str, Any], Any], name: str, given: Any) -> Any:
    """The parsed value of a parameter; raises JobQueueError."""
    try:
        return parse(name, given)
    except ValueError as error:
        raise JobQueueError("invalid_parameter", str(error)) from None


def _true(name: str, given: str) -> bool:
    return _choice("true", "false")(name, given) == "true"


_true.schema = {"type": "boolean"}

_WAIT = _number(float, 0, 300)
_DELAY = _number(float, 0, 30 * DAY)
_MAX = _number(int, 1, 1000)  # jobs for one poll, or one page

# What a query may carry, by kind of call: name -> (parser, what it is).
SUBMIT_PARAMETERS = {
    "queue": (_queue, "the queue; default: default"),
    "priority": (_number(int, 0, 9), "0 to 9, higher first; default 0"),
    "delay": (_DELAY, "seconds before it may be handed out; at most 30 days"),
    "ttl": (_number(float, 0.001, 365 * DAY), "seconds after which it is not handed out any more"),
    "lease": (_LEASE, "seconds a worker has for it"),
    "attempts": (_ATTEMPTS, "how often it is tried"),
    "wait": (_number(float, 0, DAY), "seconds to wait for the result; 0: answer 202 at once"),
    "on_disconnect": (_choice("cancel", "continue"), "what a client that hangs up means for its job"),
}
# Those that are about the job itself, and not about a client that waits for it.
JOB_PARAMETERS = {name: row for name, row in SUBMIT_PARAMETERS.items() if name not in ("wait", "on_disconnect")}
CLAIM_PARAMETERS = {
    "queue": (_queues, "queues, comma-separated, in order; default: default"),
    "wait": (_WAIT, "seconds to wait for a job"),
    "lease": (_LEASE, "seconds for the job"),
    "worker": (_label, "the worker's name"),
}
TOKEN_PARAMETER = {"lease_token": (_label, "of the lease, as the poll's answer gave it")}
QUEUE_PARAMETER = {"queue": (_queue, "one queue; without it: all")}


_COMMENT = re.compile(r"(^|\s)#.*")


class Access:
    """Who may do what: the tokens of a file, by scope; no file: everybody may everything."""

    def __init__(self, path: str | None) -> None:
        self._tokens: list[tuple[bytes, frozenset[str]]] = []
        self.open = path is None
        if path is not None:
            self._read(path)

    def _read(self, path: str) -> None:
        with open(readable("--tokens", path), encoding="utf-8") as file:
            if fcntl and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ValueError(f"{path} can be read by others; run: chmod 600 {path}")
            try:
                lines = list(file)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} must be UTF-8 text: {error}") from None
            for number, line in enumerate(lines, 1):
                words = _COMMENT.sub("", line).split(None, 2)
                if words:
                    self._add(path, number, words)
        if not self._tokens:
            raise ValueError(f"{path} holds no token; a line is: SCOPE[,SCOPE] TOKEN [NAME]")

    def _add(self, path: str, number: int, words: list[str]) -> None:
        scopes = set(words[0].split(","))
        if len(words) < 2 or scopes - set(SCOPES) or words[1][0] == ",":
            raise ValueError(f"{path}, line {number}: must be SCOPE[,SCOPE] TOKEN [NAME], scopes {', '.join(SCOPES)}")
        token = words[1].encode()
        if token in dict(self._tokens):
            raise ValueError(f"{path}, line {number}: this token stands on a line before; give it all its scopes there")
        self._tokens.append((token, frozenset(SCOPES if "admin" in scopes else scopes)))

    def check(self, authorization: str | None, scope: str | None) -> None:
        """Raise unless the bearer token covers `scope`. Every token is compared, each in constant time."""
        if self.open or scope is None:
            return
        kind, _, token = (authorization or "").partition(" ")
        given = token.strip().encode() if kind.lower() == "bearer" else b""
        granted: frozenset[str] = frozenset()
        for known, scopes in self._tokens:
            if hmac.compare_digest(known, given):
                granted = scopes
        if not granted:
            raise JobQueueError("unauthorized", "send 'Authorization: Bearer TOKEN' with a token of the server's file")
        if scope not in granted:
            raise JobQueueError("forbidden", f"this needs a token of scope {scope}")


class JobService:
    """The queue as both wires see it."""

    def __init__(self, engine: Engine, settings: Settings, clock: Clock) -> None:
        self.engine, self.settings, self._clock = engine, settings, clock
        self.access = Access(settings.tokens)
        self.started = clock.monotonic()

    def check_size(self, data: bytes, what: str = "body", job_id: str | None = None) -> None:
        if len(data) > self.settings.max_payload:
            detail = f"the {what} has {len(data)} bytes; at most {self.settings.max_payload} are taken"
            raise JobQueueError("payload_too_large", detail, job_id)

    def terms(self, headers: str, options: dict[str, Any], key: str | None = None) -> Terms:
        """The terms of a submission. `options` as SUBMIT_PARAMETERS."""
        if key is not None and not 1 <= len(key) <= 255:
            raise JobQueueError("invalid_parameter", f"Idempotency-Key must have 1 to 255 characters, got {len(key)}")
        size, most = len(headers.encode()) - headers.count("\\"), max(MAX_FORWARDED, self.settings.max_headers)
        if size > most:  # bytes that are no UTF-8 take two
            raise JobQueueError("headers_too_large", f"the headers take {size} bytes as UTF-8; at most {most} may")
        given = {name: value for name, value in options.items() if name in Terms._fields}
        return Terms(**{"attempts": self.settings.attempts, "headers": headers, "key": key, **given})

    def submit(self, payload: bytes, terms: Terms, wait: float | None, tied: bool = False) -> Future:
        """Future of (Job, replayed); an empty payload is the JSON value ""."""
        self.check_size(payload)
        payload = payload or b'""'
        return self.engine.submit(terms, payload, kind_of(payload), wait, tied)

    def is_over(self, payload: bytes, terms: Terms) -> bool:
        """Do payload and key stand for a job that has ended already?"""
        job = self.engine.replayed(terms, payload or b'""')
        return job is not None and job.state in FINAL

    def submit_many(self, payloads: list[bytes], terms: Terms) -> Future:
        """Future of the ids, in order."""
        if not 1 <= len(payloads) <= MAX_LINES:
            raise JobQueueError("invalid_request", f"a batch has 1 to {MAX_LINES} payloads, got {len(payloads)}")
        for number, payload in enumerate(payloads, 1):
            self.check_size(payload, f"batch's payload {number}")
        return self.engine.submit_many(terms, [(payload, kind_of(payload)) for payload in payloads])

    def complete(
        self, job_id: str, token: str | None, result: bytes, content_type: str | None = None, claim: Claim | None = None
    ) -> Future:
        """Future of an Outcome; an empty result is {}."""
        self.check_size(result)
        return self.engine.complete(job_id, token, *self._result(result, content_type), claim)

    @staticmethod
    def _result(data: bytes, content_type: str | None) -> tuple[bytes, str, str | None]:
        if content_type is not None:
            content_type = _media_type(content_type)
        data = data or b"{}"
        return data, kind_of(data), content_type

    def complete_many(self, results: list[tuple[str, str | None, bytes, str | None]]) -> Future:
        """Future of a list of Outcome or JobQueueError, in order of (job_id, token, result, content_type)."""
        if len(results) > MAX_RESULTS:
            raise JobQueueError("invalid_request", f"a batch has at most {MAX_RESULTS} results, got {len(results)}")
        for job_id, _, data, _ in results:
            self.check_size(data, f"result of job {job_id:.100}", job_id)
        return self.engine.complete_many(
            [(job_id, token, *self._result(data, kind)) for job_id, token, data, kind in results]
        )

    def give_back(self, jobs: list[Job]) -> None:
        """These leased jobs did not reach their worker: back in line, uncounted; when the lease is over, if the queue
        is closed by now."""
        with contextlib.suppress(JobQueueError):
            self.engine.give_back(jobs)

    def fail(self, job_id: str, token: str | None, error: str, retry: bool | None, delay: float | None) -> Future:
        """Future of an Outcome; of a long error the end is kept, where a traceback says what happened."""
        # A program's error may name a file whose name is no text: halves of a surrogate pair, which are escaped.
        error = error[-MAX_ERROR:].encode(errors="backslashreplace").decode()[-MAX_ERROR:]
        return self.engine.fail(job_id, token, error, retry is not False, delay)

    def requeue_all(self, state: str, queue: str | None) -> tuple[int, str | None]:
        """Requeue all jobs in that final state, a page at a time, so that the queue goes on meanwhile. How many, and
        what stopped it before the end (where nothing was done at all, that is raised)."""
        total, after = self.engine.requeue_some(state, queue, None)
        while after is not None:
            try:
                count, after = self.engine.requeue_some(state, queue, after)
            except JobQueueError as error:
                if not total:
                    raise
                return total, error.detail
            total += count
        return total, None

    def stats(self) -> dict[str, Any]:
        return {**self.engine.stats(), "uptime_seconds": self._clock.monotonic() - self.started, "version": __version__}


def refusal_of(error: Exception) -> JobQueueError:
    """`error` as the caller is told of it: what is no JobQueueError is logged, and told as `internal`."""
    if isinstance(error, JobQueueError):
        return error
    log.error("handler_failed", exc_info=error)
    return JobQueueError("internal", "the server made a mistake; its log says more")


def final_error(job: Job) -> JobQueueError | None:
    """What a client that waits for the result is told when the job ended without one."""
    if job.state == "failed":
        return JobQueueError("job_failed", job.error or "the worker gave no reason", job.id)
    if job.state == "expired":
        missing = "finished" if job.deliveries else "took"
        detail = f"no worker {missing} the job within its {job.ttl:g} s"
        return JobQueueError("job_expired", detail + _last_error(job), job.id)
    if job.state == "cancelled":
        return JobQueueError("job_cancelled", "the job was cancelled" + _last_error(job), job.id)
    return None


# == HTTP API ==========================================================================================================
# Request -> verb -> response; no socket. ROUTES is the router, the documentation and the list of permissions.


class Response(NamedTuple):
    """What a handler answers. `type` is its Content-Type; `close`: the connection is closed after it."""

    status: int
    body: bytes = b""
    type: str | None = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    close: bool = False


class Later(NamedTuple):
    """An answer to come: `shape` makes the Response of the future's value. `lost` is called with the value when the
    answer could not be written. `long`: it may take until something happens, and an end of the stream means that the
    caller has left; otherwise only the disk is waited for, and the answer is written all the same."""

    future: Future
    shape: Callable[[Any], Response]
    lost: Callable[[Any], None] | None = None
    long: bool = False

    def response(self, value: Any) -> Response:
        """The answer, of the future's value; an exception is a refusal."""
        try:
            if isinstance(value, BaseException):
                raise value
            return self.shape(value)
        except Exception as error:
            return error_response(refusal_of(error))


class Route(NamedTuple):
    """A row of ROUTES."""

    method: str
    path: str
    handler: str  # a method of HttpApi
    scope: str | None  # None: open to all
    summary: str
    parameters: dict[str, tuple[Callable, str]] = {}
    body: str | None = None  # payload or batch: which limit holds; None: it takes no body
    slow: bool = False  # may take a while: gets a thread of its own


class Asked:
    """What the head of a request says. Callers send the same one again and again: it is kept, and must not change."""

    __slots__ = ("parameters", "headers", "forwarded", "peer", "prepared")

    def __init__(self, parameters: dict[str, Any], headers: dict[str, str], forwarded: str, peer: str) -> None:
        self.parameters = parameters
        self.headers = headers  # by lower-case names
        self.forwarded = forwarded  # what a worker gets of them, as JSON text
        self.peer = peer
        self.prepared: Any = None  # by HttpApi.prepare_<handler>


class Request(NamedTuple):
    """One request: what its head says, and what it has of its own."""

    asked: Asked
    job_id: str | None
    token: str | None  # of the lease
    body: bytes
    crowded: bool  # do as many clients wait as may?

    @property
    def parameters(self) -> dict[str, Any]:
        return self.asked.parameters


def json_response(value: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    return Response(status, json_text(value).encode(), headers=headers)


def error_response(error: JobQueueError, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """A problem of RFC 9457."""
    problem = {
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "error": error.detail,
    }
    if error.job_id is not None:
        problem["job_id"] = error.job_id
    if error.code in RETRY_AFTER:
        headers += (("Retry-After", str(RETRY_AFTER[error.code])),)
    if error.code == "unauthorized":
        headers += (("WWW-Authenticate", "Bearer"),)
    if error.allow:
        headers += (("Allow", error.allow),)
    close = error.code == "too_many_clients"
    body = json_text(problem).encode(errors="replace")  # half a surrogate pair, as the caller sent it, is no character
    return Response(error.status, body, "application/problem+json", headers, close)


def payload_members(name: str, kind: str, data: bytes) -> str:
    """`"payload":...` and, where it is base64, its encoding."""
    extra = f',"{name}_encoding":"base64"' if kind == "binary" else ""
    return f'"{name}":{as_json(kind, data)}{extra}'


def polled_job(job: Job) -> str:
    """A leased job as its worker gets it."""
    expires = f',"expires_at":"{iso_time(job.expires)}"' if job.expires is not None else ""
    text = ',"payload_kind":"text"' if job.kind == "text" else ""  # a string that is JSON looks the same
    return (
        f'{{"job_id":"{job.id}",{payload_members("payload", job.kind, job.payload)},"headers":{job.headers},'
        f'"queue":"{job.queue}","priority":{job.priority},"attempt":{job.failures + 1},'
        f'"lease_token":"{job.token}","lease_seconds":{job.lease_seconds},'
        f'"created_at":"{iso_time(job.created)}"{expires}{text}}}'
    )


def job_view(job: Job) -> dict[str, Any]:
    """A job as listings show it."""
    view = {
        "job_id": job.id,
        "queue": job.queue,
        "status": job.state,
        "priority": job.priority,
        "attempt": min(max(1, job.failures + (job.state != "failed")), job.attempts),
        "attempts": job.attempts,
        "deliveries": job.deliveries,
    }
    times = {
        "created_at": job.created,
        "started_at": job.started,
        "finished_at": job.finished,
        "available_at": job.available if job.state == "delayed" else None,
        "expires_at": job.expires,
    }
    if job.state == "processing":
        view["lease_seconds"] = job.lease_seconds
        begin = max(job.started, job.extended or 0)  # an earlier lease may have been extended
        times["lease_expires_at"] = begin + microseconds(job.lease_seconds)
    view.update((name, iso_time(moment)) for name, moment in times.items() if moment is not None)
    view.update((name, value) for name, value in (("worker", job.worker), ("error", job.error)) if value)
    return view


_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')  # of a list: a comma within quotes does not end it


class HttpApi:
    """The handlers of ROUTES."""

    def __init__(self, service: JobService, pages: dict[str, Callable[[Request], Response]]) -> None:
        self._service, self._engine = service, service.engine
        vars(self).update(pages)  # handlers too, of what needs the whole server

    # -- clients

    def submit(self, request: Request) -> Later:
        terms, wait, tied, shape = request.asked.prepared
        if request.crowded and wait != 0:
            if not self._service.is_over(request.body, terms):
                raise JobQueueError("too_many_clients", "too many clients are waiting; try again, or use wait=0")
            wait = 0.0
        return _make(Later, (self._service.submit(request.body, terms, wait, tied), shape, None, wait != 0))

    def prepare_submit(self, asked: Asked) -> tuple[Terms, float | None, bool, Callable[[tuple[Job, bool]], Response]]:
        wait, applied = self._waiting_time(asked)
        key = asked.headers.get("idempotency-key")
        tied = asked.parameters.get("on_disconnect") == "cancel"
        terms = self._service.terms(asked.forwarded, asked.parameters, key)
        return terms, wait, tied, functools.partial(self._submitted, applied)

    @staticmethod
    def _waiting_time(asked: Asked) -> tuple[float | None, str | None]:
        """How long the client waits, and which preference (RFC 7240) says so. The query wins over the header."""
        if "wait" in asked.parameters:
            return asked.parameters["wait"], None
        if "prefer" not in asked.headers:
            return None, None
        preferences = _PREFERENCE.findall(asked.headers["prefer"])
        parts = [part.partition(";")[0].strip().lower() for part in preferences]
        for part in parts:
            if match := re.fullmatch(r'wait\s*=\s*"?([0-9]{1,18}(?:\.[0-9]{1,6})?)"?', part):
                return min(float(match[1]), DAY), f"wait={match[1]}"
        if any(re.fullmatch(r'respond-async(\s*=\s*"")?', part) for part in parts):
            return 0.0, "respond-async"
        return None, None

    @staticmethod
    def _submitted(applied: str | None, answer: tuple[Job, bool]) -> Response:
        job, replayed = answer
        headers: tuple[tuple[str, str], ...] = (("Idempotent-Replayed", "true"),) if replayed else ()
        if applied:
            headers += (("Preference-Applied", applied),)
        if job.state not in FINAL:
            return json_response(
                {"job_id": job.id, "status": job.state}, 202, (*headers, ("Location", f"/api/jobs/{job.id}"))
            )
        if job.state != "completed":
            return error_response(final_error(job), headers)
        body = (
            f'{{"job_id":"{job.id}",{payload_members("payload", job.result_kind, job.result)},'
            f'"created_at":"{iso_time(job.created)}","completed_at":"{iso_time(job.finished)}"}}'
        )
        return _make(Response, (200, body.encode(), "application/json", headers, False))

    def submit_many(self, request: Request) -> Later:
        kind = request.asked.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("application/x-ndjson", "application/ndjson", "application/jsonl"):
            raise JobQueueError(
                "unsupported_media_type", f"Content-Type must be application/x-ndjson, got {kind or 'none'}"
            )
        if "idempotency-key" in request.asked.headers:
            raise JobQueueError("invalid_parameter", "an Idempotency-Key stands for one job: use POST /api/submit")
        payloads = [line for line in (line.rstrip(b"\r") for line in request.body.split(b"\n")) if line]
        terms = self._service.terms(request.asked.forwarded, request.parameters)
        future = self._service.submit_many(payloads, terms)
        return Later(future, lambda ids: json_response({"job_ids": ids}, 202))

    def view(self, request: Request) -> Later:
        return self._when_over(request, self._viewed)

    @staticmethod
    def _viewed(job: Job) -> Response:
        parts = [
            json_text(job_view(job))[1:-1],
            payload_members("payload", job.kind, job.payload),
            f'"headers":{job.headers}',
        ]
        if job.result is not None:
            parts.append(payload_members("result", job.result_kind, job.result))
        return Response(200, f"{{{','.join(parts)}}}".encode())

    def result(self, request: Request) -> Later:
        return self._when_over(request, self._result)

    def _when_over(self, request: Request, shape: Callable[[Job], Response]) -> Later:
        wait = request.parameters.get("wait", 0.0)
        if request.crowded and wait:
            return Later(self._engine.view(request.job_id, 0.0), functools.partial(self._unless_running, shape))
        return Later(self._engine.view(request.job_id, wait), shape, long=wait > 0)

    @staticmethod
    def _unless_running(shape: Callable[[Job], Response], job: Job) -> Response:
        if job.state not in FINAL:
            raise JobQueueError("too_many_clients", "too many clients are waiting; try again without wait")
        return shape(job)

    @staticmethod
    def _result(job: Job) -> Response:
        """The worker's own bytes; whatever they are, a browser must not run them with the dashboard's rights."""
        error = final_error(job)
        if error:
            raise error
        if job.state != "completed":
            raise JobQueueError("job_not_finished", f"job {job.id} is {job.state}", job.id)
        kinds = {"json": "application/json", "text": "text/plain; charset=utf-8", "binary": "application/octet-stream"}
        headers = (("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", "sandbox; default-src 'none'"))
        return Response(200, job.result, job.content_type or kinds[job.result_kind], headers)

    def jobs(self, request: Request) -> Response:
        get = request.parameters.get
        jobs, after = self._engine.jobs(get("queue"), get("status"), get("limit", 100), get("after"))
        return json_response({"jobs": [job_view(job) for job in jobs], "next": after})

    def cancel(self, request: Request) -> Later:
        done = self._engine.cancel(request.job_id)
        return Later(done, lambda job: json_response({"message": "Job cancelled", "job_id": job.id}))

    # -- workers

    def prepare_poll(self, asked: Asked) -> tuple[Claim, Callable[[list[Job]], Response]]:
        return self._claim(asked), self._polled_many if "max" in asked.parameters else self._polled

    @staticmethod
    def _claim(asked: Asked) -> Claim:
        get = asked.parameters.get
        return Claim(
            get("queue", ("default",)), get("max", 1), get("lease"), get("wait", 0.0), get("worker") or asked.peer
        )

    def poll(self, request: Request) -> Later:
        claim, shape = request.asked.prepared
        return _make(Later, (self._engine.poll(claim), shape, self._service.give_back, True))

    @staticmethod
    def _polled(jobs: list[Job]) -> Response:
        return Response(200, polled_job(jobs[0]).encode()) if jobs else Response(204, type=None)

    @staticmethod
    def _polled_many(jobs: list[Job]) -> Response:
        return Response(200, f'{{"jobs":[{",".join(map(polled_job, jobs))}]}}'.encode())

    def complete(self, request: Request) -> Later:
        claim, content_type, shape = request.asked.prepared
        future = self._service.complete(request.job_id, request.token, request.body, content_type, claim)
        if claim is None:
            return Later(future, shape)
        return _make(Later, (future, shape, self._lose_next, True))

    def prepare_complete(self, asked: Asked) -> tuple[Claim | None, str | None, Callable[[Outcome], Response]]:
        claim = self._claim(asked) if asked.parameters.get("next") else None
        shape = functools.partial(self._completed, claim is not None)
        return claim, asked.headers.get("content-type"), shape

    @staticmethod
    def _completed(wants_next: bool, outcome: Outcome) -> Response:
        extra = ',"duplicate":true' if outcome.duplicate else ""
        if wants_next:
            extra += f',"next":{polled_job(outcome.next) if outcome.next else "null"}'
        body = f'{{"message":"Job completed","job_id":"{outcome.job.id}"{extra}}}'
        return _make(Response, (200, body.encode(), "application/json", (), False))

    def _lose_next(self, outcome: Outcome) -> None:
        if outcome.next:
            self._service.give_back([outcome.next])

    def complete_many(self, request: Request) -> Later:
        results = [self._one_result(members) for members in batch_members(request.body)]
        shape = functools.partial(self._completed_many, [job_id for job_id, *_ in results])
        return Later(self._service.complete_many(results), shape)

    @staticmethod
    def _one_result(members: dict[str, str]) -> tuple[str, str | None, bytes, str | None]:
        get = members.get
        job_id, token, encoding = _string(get("job_id")), _string(get("lease_token")), _string(get("payload_encoding"))
        content_type = _string(members["content_type"]) if "content_type" in members else None
        unknown = members.keys() - _RESULT_MEMBERS
        if unknown or not job_id:
            named = ", ".join(sorted(unknown))[:200] or "job_id"
            raise JobQueueError("invalid_request", f"{_RESULT}; wrong: {named}")
        data = get("payload", "").encode()
        return job_id, token or None, data if encoding is None else _from_base64(encoding, data), content_type

    @staticmethod
    def _completed_many(ids: list[str], outcomes: list[Outcome | JobQueueError]) -> Response:
        rows = []
        for job_id, outcome in zip(ids, outcomes, strict=True):
            if isinstance(outcome, JobQueueError):
                rows.append({"job_id": job_id, "status": outcome.status, "code": outcome.code})
            else:
                rows.append({"job_id": job_id, "status": 200, **({"duplicate": True} if outcome.duplicate else {})})
        return json_response({"results": rows})

    def fail(self, request: Request) -> Later:
        get = request.parameters.get
        error = request.body[-4 * MAX_ERROR :].decode(errors="replace")  # no character has more bytes
        future = self._service.fail(request.job_id, request.token, error, get("retry"), get("delay"))
        return Later(future, self._failed)

    @staticmethod
    def _failed(outcome: Outcome) -> Response:
        job = outcome.job
        answer = {
            "message": f"Job {job.state}" if job.state in FINAL else "Job will be tried again",
            "job_id": job.id,
            "status": job.state,
        }
        if job.state == "delayed":
            answer["retry_in"] = round(job.delay, 3)
        if outcome.duplicate:
            answer["duplicate"] = True
        return json_response(answer)

    def release(self, request: Request) -> Response:
        outcome = self._engine.release(request.job_id, request.token)
        extra = {"duplicate": True} if outcome.duplicate else {}
        return json_response({"message": "Job released", "job_id": outcome.job.id, **extra})

    def extend(self, request: Request) -> Response:
        job = self._engine.extend(request.job_id, request.token, request.parameters.get("lease")).job
        cancelled = job.state == "cancelled"
        seconds = 0 if cancelled else job.lease_seconds
        return json_response({"job_id": job.id, "lease_seconds": seconds, "cancelled": cancelled, "status": job.state})

    # -- administration

    def stats(self, request: Request) -> Response:
        return json_response(self._service.stats())

    def clear(self, request: Request) -> Later:
        return Later(self._engine.clear(), functools.partial(self._cleared, request.asked.peer))

    @staticmethod
    def _cleared(peer: str, count: int) -> Response:
        log.warning("cleared jobs=%d peer=%s", count, peer)
        return json_response({"message": "Queue cleared successfully", "cleared": count})

    def peek(self, request: Request) -> Response:
        job = self._engine.peek(request.parameters.get("queue", ("default",)))
        return self._viewed(job) if job else Response(204, type=None)

    def pause(self, request: Request) -> Later:
        return self._set_paused(request, True)

    def resume(self, request: Request) -> Later:
        return self._set_paused(request, False)

    def _set_paused(self, request: Request, paused: bool) -> Later:
        queue = request.parameters.get("queue")
        done = self._engine.pause(queue, paused)
        return Later(
            done, functools.partial(self._paused, request.asked.peer, queue, "Paused" if paused else "Resumed")
        )

    @staticmethod
    def _paused(peer: str, queue: str | None, message: str, names: Any) -> Response:
        log.info("%s queue=%s peer=%s", message.lower(), queue or "(all)", peer)
        return json_response({"message": message, "paused": names})

    def requeue(self, request: Request) -> Later:
        done = self._engine.requeue(request.job_id)
        return Later(done, lambda job: json_response({"message": "Job requeued", "job_id": job.id}))

    def requeue_all(self, request: Request) -> Response:
        get = request.parameters.get
        status = get("status", "failed")
        count, stopped = self._service.requeue_all(status, get("queue"))
        log.info("requeued jobs=%d status=%s peer=%s", count, status, request.asked.peer)
        if stopped:
            return json_response({"message": "Not all jobs requeued", "requeued": count, "stopped": stopped})
        return json_response({"message": "Jobs requeued", "requeued": count})

    def workers(self, request: Request) -> Response:
        return json_response({"workers": self._engine.workers_seen()})

    # -- the server itself

    def health(self, request: Request) -> Response:
        return Response(200, b'{"status":"ok"}')

    def ready(self, request: Request) -> Response:
        if self._engine.draining():
            raise JobQueueError("draining", "the server is stopping")
        return Response(200, b'{"status":"ready"}')


def _from_base64(encoding: str, data: bytes) -> bytes:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        if encoding == "base64":
            return base64.b64decode(json.loads(data), validate=True)
    raise JobQueueError("invalid_request", "with payload_encoding base64 the payload is a string of base64")


_BASE64 = {"type": "string", "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"}
_RESULT_SCHEMA = {
    "type": "object",
    "required": ["job_id"],
    "properties": {
        "job_id": {"type": "string", "minLength": 1},
        "lease_token": {"type": ["string", "null"]},
        "payload": {},
        "payload_encoding": {"enum": ["base64", None]},
        "content_type": {"type": ["string", "null"]},
    },
    "additionalProperties": False,
    "if": {"required": ["payload_encoding"], "properties": {"payload_encoding": {"const": "base64"}}},
    "then": {"required": ["payload"], "properties": {"payload": _BASE64}},
}
_BATCH_SCHEMA = {
    "type": "object",
    "required": ["results"],
    "properties": {"results": {"type": "array", "items": _RESULT_SCHEMA, "maxItems": MAX_RESULTS}},
    "additionalProperties": False,
}
_RESULT_MEMBERS = frozenset(_RESULT_SCHEMA["properties"])
_RESULT = f"a result is an object of {', '.join(sorted(_RESULT_MEMBERS))}, all but the payload strings"
_BLANK = re.compile(r"[ \t\n\r]*")
# A member's name and, where it is a string without escapes, its value and what follows it.
_MEMBER = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*(?:("[^"\\\x00-\x1f]*")[ \t\n\r]*([,}]))?')
_scan = _strict.raw_decode


def _string(text: str | None) -> str | None:
    """The value of a member that is a string or null, or is not there."""
    if text is None or text == "null":
        return None
    if text[0] != '"':
        raise JobQueueError("invalid_request", f"{_RESULT}; wrong: {text[:100]}")
    if "\\" not in text:
        return text[1:-1]
    value = json.loads(text)
    if not value.isascii():
        with contextlib.suppress(UnicodeEncodeError):
            value.encode()
            return value
        raise JobQueueError("invalid_request", f"{_RESULT}; wrong: half a surrogate pair")
    return value


def _value_end(text: str, at: int) -> int:
    """Where the JSON value at `at` ends."""
    try:
        return _scan(text, at)[1]
    except RecursionError:
        end = _deep_end(text, at)
        if end < 0:
            raise ValueError(f"no JSON at character {at}") from None
        return end


def _members(text: str, at: int) -> tuple[dict[str, str], int]:
    """The members of the JSON object at `at`, each value as the text it is; and where the object ends."""
    members: dict[str, str] = {}
    if text[at : at + 1] != "{":
        raise ValueError("an object is needed")
    at = _BLANK.match(text, at + 1).end()
    if text[at : at + 1] == "}":
        return members, at + 1
    mark = ","
    while mark == ",":
        match = _MEMBER.match(text, at)
        if match is not None:
            (name, value, mark), at = match.groups(), match.end()
        else:  # escapes in the name, or no name at all
            (name, at), value = _scan(text, _BLANK.match(text, at).end()), None
            if not isinstance(name, str):
                raise ValueError("a member's name must be a string")
            at = _past(text, at, ":")
        if value is None:
            end = _value_end(text, at)
            value = text[at:end]
            at = _BLANK.match(text, end).end()
            mark, at = text[at : at + 1], at + 1
        if name in members or len(members) == 50:  # so many has nobody, save to keep us busy
            raise ValueError(f"{name!r:.100} is a member too many")
        members[name] = value
    if mark != "}":
        raise ValueError(", or } is missing")
    return members, at


def _past(text: str, at: int, mark: str) -> int:
    """Where it goes on behind `mark`, which has to come next, and the white space around it."""
    at = _BLANK.match(text, at).end()
    if text[at : at + 1] != mark:
        raise ValueError(f"{mark} is missing")
    return _BLANK.match(text, at + 1).end()


def batch_members(body: bytes) -> list[dict[str, str]]:
    """The objects in `{"results": [...]}`: name -> the value's JSON text, since payloads stay as they were sent."""
    try:
        text = body.decode()
        at = _past(text, 0, "{")
        name, at = _scan(text, at)
        if name != "results":
            raise ValueError("one member, results, is needed")
        at = _past(text, _past(text, at, ":"), "[")
        rows: list[dict[str, str]] = []
        while text[at : at + 1] != "]":
            if len(rows) == MAX_RESULTS:
                raise ValueError(f"a batch has at most {MAX_RESULTS} results")
            if rows:
                at = _past(text, at, ",")
            row, at = _members(text, at)
            rows.append(row)
            at = _BLANK.match(text, at).end()
        if text[_past(text, at + 1, "}") :]:
            raise ValueError("something follows the object")
        return rows
    except (ValueError, RecursionError) as error:
        raise JobQueueError(
            "invalid_request",
            f'the body must be {{"results": [{{"job_id": ..., "lease_token": ..., "payload": ...}}, ...]}}: {error}',
        ) from None


_POLL = {**CLAIM_PARAMETERS, "max": (_MAX, "take up to so many; the answer is a list then")}
_NEXT = {"queue": CLAIM_PARAMETERS["queue"]}
_WAIT_PARAMETER = {"wait": (_WAIT, "seconds to wait for the end")}
_LISTING = {
    **QUEUE_PARAMETER,
    "status": (_choice(*STATES), "one of " + ", ".join(STATES)),
    "limit": (_MAX, "jobs at most; default 100"),
    "after": (_number(int, 0, 1 << 62), "the cursor `next` of the page before"),
}
_COMPLETE = {**TOKEN_PARAMETER, **CLAIM_PARAMETERS, "next": (_true, "true: the answer brings the next job along")}
_FAIL = {
    **TOKEN_PARAMETER,
    "retry": (_true, "false: it has failed for good"),
    "delay": (_DELAY, "seconds until the next try"),
}
_EXTEND = {**TOKEN_PARAMETER, "lease": (_LEASE, "seconds from now")}
_REQUEUABLE = ("failed", "expired", "cancelled")  # not all the delayed ones: each of them by its id
_REQUEUE = {**QUEUE_PARAMETER, "status": (_choice(*_REQUEUABLE), "which jobs; default failed")}

ROUTES = (
    Route(
        "POST", "/api/submit", "submit", "client", "Submit a job and wait for its result", SUBMIT_PARAMETERS, "payload"
    ),
    Route(
        "POST",
        "/api/jobs",
        "submit_many",
        "client",
        "Submit a payload a line (ndjson), all or none",
        JOB_PARAMETERS,
        "batch",
        True,
    ),
    Route("GET", "/api/jobs", "jobs", "client", "List jobs, newest first", _LISTING, slow=True),
    Route("GET", "/api/jobs/{job_id}", "view", "client", "Look at a job, or wait for its end", _WAIT_PARAMETER),
    Route("DELETE", "/api/jobs/{job_id}", "cancel", "client", "Cancel a job"),
    Route("GET", "/api/jobs/{job_id}/result", "result", "client", "The result's own bytes", _WAIT_PARAMETER),
    Route("GET", "/api/worker/poll", "poll", "worker", "Take a job", _POLL),
    Route("POST", "/api/worker/complete", "complete_many", "worker", "Hand in many results", {}, "batch"),
    Route("POST", "/api/worker/complete/{job_id}", "complete", "worker", "Hand in a result", _COMPLETE, "payload"),
    Route("POST", "/api/worker/fail/{job_id}", "fail", "worker", "Say that an attempt failed", _FAIL, "payload"),
    Route("POST", "/api/worker/release/{job_id}", "release", "worker", "Give a job back, uncounted", TOKEN_PARAMETER),
    Route("POST", "/api/worker/extend/{job_id}", "extend", "worker", "Keep a job for longer", _EXTEND),
    Route("GET", "/api/admin/stats", "stats", "admin", "Counts by state and queue", slow=True),
    Route("DELETE", "/api/admin/clear", "clear", "admin", "Forget all jobs", slow=True),
    Route("GET", "/api/admin/next", "peek", "admin", "The job that is handed out next", _NEXT),
    Route("POST", "/api/admin/pause", "pause", "admin", "Hand nothing out", QUEUE_PARAMETER),
    Route("POST", "/api/admin/resume", "resume", "admin", "Hand out again", QUEUE_PARAMETER),
    Route("POST", "/api/admin/requeue/{job_id}", "requeue", "admin", "Put a job back in line"),
    Route(
        "POST", "/api/admin/requeue", "requeue_all", "admin", "Put all failed jobs back in line", _REQUEUE, slow=True
    ),
    Route("GET", "/api/admin/workers", "workers", "admin", "Workers seen", slow=True),
    Route("GET", "/metrics", "metrics", "admin", "Figures for Prometheus", slow=True),
    Route("GET", "/health", "health", None, "Is it alive?"),
    Route("GET", "/ready", "ready", None, "Does it take jobs?"),
    Route("GET", "/openapi.json", "openapi", None, "This interface as an OpenAPI 3.1 document", slow=True),
    Route("GET", "/", "dashboard", None, "The dashboard's page; it holds no data", slow=True),
)


class Router:
    """Finds a route by its literal path: no decoding, no dot segments, so that no spelling reaches another route."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._paths: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = self._paths.setdefault(route.path, {})
            methods[route.method] = route
            if route.method == "GET" and route.handler != "poll":  # a HEAD would lose the job that it takes
                methods["HEAD"] = route

    def find(self, method: str, path: str) -> tuple[Route, str | None]:
        """The route and the job_id in the path; HEAD finds GET where that changes nothing. Raises not_found and
        method_not_allowed (with `allow`, the methods there are)."""
        methods, job_id = self._match(path)
        if methods is None and path[-1:] == "/" and path != "//":
            methods, job_id = self._match(path[:-1])
        if methods is None:
            raise JobQueueError("not_found", f"there is no {path[:200]!r}")
        route = methods.get(method)
        if route is None:
            error = JobQueueError("method_not_allowed", f"{path[:200]} does not take {method[:20]}")
            error.allow = ", ".join(sorted(methods))
            raise error
        return route, job_id

    def _match(self, path: str) -> tuple[dict[str, Route] | None, str | None]:
        methods = self._paths.get(path)
        if methods is not None:
            return (None, None) if "{" in path else (methods, None)
        head, _, tail = path.rpartition("/")
        suffix = ""
        if tail == "result":
            suffix = "/result"
            head, _, tail = head.rpartition("/")
        if not tail or "%" in tail:
            return None, None
        return self._paths.get(f"{head}/{{job_id}}{suffix}"), tail


def parse_query(query: str, known: dict[str, tuple[Callable, str]]) -> dict[str, Any]:
    """The parameters of a query, each by its own parser; what is unknown, doubled or malformed is named."""
    values: dict[str, Any] = {}
    for pair in query.split("&"):
        if not pair:
            continue
        name, _, text = pair.partition("=")
        if "%" in pair or "+" in pair:
            name, text = urllib.parse.unquote_plus(name), urllib.parse.unquote_plus(text)
        if name not in known:
            raise JobQueueError(
                "invalid_parameter", f"unknown parameter {name[:100]!r}; this takes {', '.join(known) or 'none'}"
            )
        if name in values:
            raise JobQueueError("invalid_parameter", f"{name} is given twice")
        values[name] = checked(known[name][0], name, text)
    return values


# == Metrics ===========================================================================================================
# What /metrics tells, in the text format of Prometheus. A row a metric; the README's table is held against this one.

METRICS = {
    "jobqueue_info": ("gauge", "Version of the server; always 1"),
    "jobqueue_uptime_seconds": ("gauge", "Seconds since the start"),
    "jobqueue_jobs": ("gauge", "Jobs by queue and state"),
    "jobqueue_oldest_pending_seconds": ("gauge", "Age of the oldest pending job of a queue"),
    "jobqueue_queue_paused": ("gauge", "1 while nothing is handed out of the queue"),
    "jobqueue_held_clients": ("gauge", "Clients waiting for a result"),
    "jobqueue_waiting_workers": ("gauge", "Long polls waiting for a job"),
    "jobqueue_connections": ("gauge", "Open HTTP connections"),
    "jobqueue_jobs_submitted_total": ("counter", "Jobs accepted"),
    "jobqueue_jobs_completed_total": ("counter", "Jobs completed"),
    "jobqueue_jobs_failed_total": ("counter", "Jobs that failed for good"),
    "jobqueue_jobs_expired_total": ("counter", "Jobs whose time to live ran out"),
    "jobqueue_jobs_cancelled_total": ("counter", "Jobs cancelled"),
    "jobqueue_retries_total": ("counter", "Failed attempts that are tried again"),
    "jobqueue_leases_lapsed_total": ("counter", "Leases that ran out"),
    "jobqueue_late_completions_total": ("counter", "Completions that came after their lease had run out"),
    "jobqueue_duplicate_completions_total": ("counter", "Completions that were repetitions"),
    "jobqueue_compactions_total": ("counter", "Compactions of the journal"),
    "jobqueue_journal_bytes": ("gauge", "Size of the journal"),
    "jobqueue_disk_full": ("gauge", "1 while the disk's reserve is in use and submits are refused"),
    "jobqueue_job_wait_seconds": ("histogram", "Time from submit to the first hand-over"),
    "jobqueue_commit_seconds": ("histogram", "Time the first answer of a group waited for the disk"),
    "jobqueue_fsync_seconds": ("histogram", "Time of a sync, of the journal or its recent file"),
    "jobqueue_http_request_duration_seconds": (
        "histogram",
        "HTTP requests by method, route and status, held ones included",
    ),
    "jobqueue_grpc_request_duration_seconds": ("histogram", "gRPC calls by method and code, held ones included"),
}


def metrics_text(figures: dict[str, list[tuple[dict[str, Any], Any]]]) -> str:
    """`figures`: name -> rows of labels and a number or a Histogram."""
    lines = []
    for name, (kind, text) in METRICS.items():
        rows = figures.get(name, ())
        if rows:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for labels, value in rows:
            lines += (
                _histogram_lines(name, labels, value) if kind == "histogram" else [f"{name}{_labels(labels)} {value}"]
            )
    return "\n".join(lines) + "\n"


def _labels(labels: dict[str, Any]) -> str:
    """The values are route paths, queue names and codes: none holds a quote, a backslash or a line end."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""


def _histogram_lines(name: str, labels: dict[str, Any], histogram: Histogram) -> Iterator[str]:
    total = 0
    for bound, count in zip((*Histogram.BOUNDS, "+Inf"), tuple(histogram.counts), strict=True):
        total += count
        yield f"{name}_bucket{_labels({**labels, 'le': bound})} {total}"
    yield f"{name}_sum{_labels(labels)} {histogram.sum}"
    yield f"{name}_count{_labels(labels)} {total}"


def queue_figures(stats: dict[str, Any], figures: dict[str, Any]) -> dict[str, list[tuple[dict[str, Any], Any]]]:
    """The rows of METRICS that the engine's `stats` and `figures` answer."""
    queues = stats["queues"].items()
    states = _as_counts(dict.fromkeys(STATES, 0))
    return {
        "jobqueue_info": [({"version": __version__}, 1)],
        "jobqueue_uptime_seconds": [({}, stats["uptime_seconds"])],
        "jobqueue_jobs": [({"queue": queue, "state": state}, row[state]) for queue, row in queues for state in states],
        "jobqueue_oldest_pending_seconds": [
            ({"queue": queue}, row["oldest_pending_seconds"] or 0) for queue, row in queues
        ],
        "jobqueue_queue_paused": [({"queue": queue}, int(row["paused"] or stats["paused"])) for queue, row in queues],
        "jobqueue_held_clients": [({}, stats["waiting_clients"])],
        "jobqueue_waiting_workers": [({}, stats["waiting_workers"])],
        **{f"jobqueue_{name}": [({}, value)] for name, value in figures.items()},
    }


# == OpenAPI and dashboard =============================================================================================
# What a server tells of itself: the interface as a document, for programs, and the queue as a page, for people.

_PROBLEM = {
    "type": "object",
    "required": ["title", "status", "detail", "code", "error"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "enum": sorted(ERRORS)},
        "error": {"type": "string"},
        "job_id": {"type": "string"},
    },
}
# What a route answers beside 200 with JSON; what is not here is a problem (RFC 9457).
_ANSWERS = {
    "submit": {"200": "The result", "202": "Accepted; the job goes on"},
    "submit_many": {"202": "Accepted, all of them"},
    "poll": {"200": "A job, or a list of jobs with `max`", "204": "No job"},
    "peek": {"200": "The job", "204": "No job"},
}
_HEADERS = {  # of requests, beside the query
    "submit": {
        "Idempotency-Key": ("1 to 255 characters: the same key attaches to the same job", {"type": "string"}),
        "Prefer": ("respond-async, or wait=S (RFC 7240)", {"type": "string"}),
    },
}
_OTHER_TYPES = {"metrics": "text/plain", "dashboard": "text/html", "result": "*/*"}
_BODY_CONTENT = {
    "submit_many": {"application/x-ndjson": {}},
    "complete_many": {"application/json": {"schema": _BATCH_SCHEMA}},
}


def openapi(routes: Iterable[Route]) -> dict[str, Any]:
    """An OpenAPI 3.1 document of the routes."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "jobqueue", "version": __version__, "description": "A synchronous job queue."},
        "paths": paths,
        "components": {
            "schemas": {"Problem": _PROBLEM},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    answers = _ANSWERS.get(route.handler, {"200": route.summary})
    kind = _OTHER_TYPES.get(route.handler, "application/json")
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    job_id = {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "operationId": route.handler,
        "summary": route.summary,
        "parameters": [
            *([job_id] if "{job_id}" in route.path else []),
            *(
                {"name": name, "in": "query", "description": text, "schema": parse.schema}
                for name, (parse, text) in route.parameters.items()
            ),
            *(
                {"name": name, "in": "header", "description": text, "schema": schema}
                for name, (text, schema) in _HEADERS.get(route.handler, {}).items()
            ),
        ],
        "responses": {
            **{
                status: {"description": text, **({} if status == "204" else {"content": {kind: {}}})}
                for status, text in answers.items()
            },
            "default": {"description": "What went wrong", "content": problem},
        },
    }
    if route.body:
        operation["requestBody"] = {"content": _BODY_CONTENT.get(route.handler, {"*/*": {}})}
    if route.scope:
        operation["security"] = [{}, {"token": []}]
        operation["description"] = f"Scope: {route.scope}"
    return operation


def _page_headers(page: str) -> tuple[tuple[str, str], ...]:
    """Nothing but the page's own script and style may run, and it may talk to this server alone."""

    def digest(tag: str) -> str:
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return (
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-cache"),
    )


DASHBOARD = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>jobqueue</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cg
 fill='%234263eb'%3E%3Crect width='16' height='4' rx='1.5'/%3E%3Crect y='6' width='11' height='4' rx='1.5'/%3E
%3Crect y='12' width='6' height='4' rx='1.5'/%3E%3C/g%3E%3C/svg%3E">
<style>
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --line: #e0e3e8; --edge: #868e99; --text: #1b1f26; --soft: #5a6370;
  --accent: #3b5bdb; --fill: #3b5bdb1f; --well: #f1f3f6; --bad: #c92a2a; --badfill: #fff0f0;
  --pending: #b35c00; --running: #1971c2; --completed: #2b8a3e; --delayed: #7048e8; --none: #868e99;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #13161b; --card: #1b1f26; --line: #2d333d; --edge: #69727f; --text: #e4e7ec; --soft: #a0a9b6;
    --accent: #8da2fb; --fill: #8da2fb26; --well: #14181e; --bad: #ff8f8f; --badfill: #3a1f23;
    --pending: #f2b15c; --running: #6cb6ff; --completed: #6fcf84; --delayed: #b8a1ff; --none: #8a939f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; padding-block: 18px 14px; }
main { display: flex; flex-direction: column; gap: 16px; padding-bottom: 40px; }
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1 { font-size: 20px; letter-spacing: -.01em; }
h2 { font-size: 15px; }
h3 { font-size: 13px; color: var(--soft); margin-top: 16px; }
.soft { color: var(--soft); font-size: 13px; }
.push { margin-left: auto; }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
[hidden] { display: none !important; }
button, input, select { font: inherit; font-size: 14px; color: inherit; background: var(--card);
  border: 1px solid var(--edge); border-radius: 7px; padding: 5px 11px; min-height: 34px; max-width: 100%; }
button { cursor: pointer; }
button:hover:enabled { border-color: var(--accent); color: var(--accent); }
button:disabled, button[aria-disabled=true] { opacity: .45; cursor: default; }
button.small { min-height: 28px; padding: 2px 9px; font-size: 13px; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--card); }
button.danger { color: var(--bad); border-color: var(--bad); }
button.main:hover:enabled { color: var(--card); filter: brightness(1.08); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
a { color: var(--accent); }
.dot::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%;
  margin-right: 7px; background: var(--none); }
.pending::before { background: var(--pending); } .processing::before { background: var(--running); }
.completed::before { background: var(--completed); } .delayed::before { background: var(--delayed); }
.failed::before { background: var(--bad); }
.bad { color: var(--bad); } .held { color: var(--pending); font-size: 13px; }
#banner, .note { background: var(--card); border: 1px solid; border-radius: 8px; padding: 8px 12px; }
#banner, .note.bad { background: var(--badfill); color: var(--bad); }
#banner { position: sticky; top: 8px; z-index: 1; }
#note { position: fixed; inset: auto 16px 16px; margin: 0 auto; width: fit-content; max-width: 90vw;
  box-shadow: 0 4px 18px #0003; z-index: 1; }
.note:empty { display: none; }
.stale .card { opacity: .5; }
#counts:empty { display: none; }
#counts { padding: 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(104px, 1fr));
  overflow: hidden; }
#counts button { border: 0; border-radius: 0; background: none; text-align: left; padding: 12px 16px; }
#counts button:focus-visible { outline-offset: -3px; }
#counts button:hover { background: var(--well); color: inherit; }
#counts button[aria-pressed=true] { background: var(--fill); }
#counts b { display: block; font-size: 24px; line-height: 1.25; font-weight: 600; letter-spacing: -.02em; }
#counts span { font-size: 13px; color: var(--soft); }
figure svg { display: block; width: 100%; height: 132px; margin-top: 8px; touch-action: pan-y; }
figure strong { font-size: 18px; font-weight: 600; }
svg text { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); } svg .cursor { stroke: var(--soft); stroke-dasharray: 2 3; }
svg .area { fill: var(--fill); }
svg .line, svg .high { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linecap: round; }
svg .high { stroke: var(--pending); }
.key { display: inline-block; width: 12px; height: 3px; margin: 3px 5px; background: var(--accent); }
.key.high { background: var(--pending); }
.scroll { overflow-x: auto; margin-top: 10px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { font-weight: inherit; text-align: left; }
th, td { padding: 6px 10px 6px 0; border-top: 1px solid var(--line); vertical-align: middle; }
thead th { border-top: 0; padding-top: 0; white-space: nowrap; font-size: 12px; color: var(--soft); }
th:last-child, td:last-child { padding-right: 3px; }
.num { text-align: right; white-space: nowrap; }
#queues th { min-width: 5em; }
#jobs td, #jobs a { max-width: 300px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#jobs a { display: inline-block; vertical-align: bottom; }
#queue { width: 11em; }
.mono, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
pre { margin: 6px 0 0; padding: 10px 12px; background: var(--well); border: 1px solid var(--line);
  border-radius: 8px; white-space: pre-wrap; max-height: 320px; overflow: auto; }
dialog { background: var(--card); color: inherit; border: 1px solid var(--line); border-radius: 12px;
  padding: 20px; width: min(720px, calc(100vw - 24px)); max-height: calc(100dvh - 24px); }
dialog .last { position: sticky; bottom: -20px; margin: 0 -4px -20px; padding: 12px 4px 20px;
  background: inherit; }
dialog.ask { width: min(440px, calc(100vw - 24px)); }
dialog::backdrop { background: #0007; }
dialog form, dialog > div { display: grid; gap: 12px; background: inherit; }
dialog h3:first-child { margin-top: 0; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 3px 16px; margin-top: 6px; font-size: 14px; }
dt { color: var(--soft); }
@media (max-width: 640px) {
  header, main { padding-left: 12px; padding-right: 12px; }
  main { gap: 12px; } .card { padding: 12px; }
  .wide { display: none; }
  #counts { grid-template-columns: repeat(3, 1fr); }
  #counts button { padding: 9px 12px; }
  #jobs a { max-width: 10ch; } #jobs td { max-width: 28vw; }
  #find label, #find input, #find select { flex: 1 1 40%; width: 100%; }
  #find h2 { width: 100%; } #find label:last-of-type { flex-basis: 100%; }
  figure strong { font-size: 15px; }
  table { font-size: 13px; } th, td { padding-right: 6px; }
  #queues th { min-width: 6.2em; } #queues button { padding: 2px 6px; }
}
</style>
</head>
<body>
<header>
  <h1>jobqueue</h1>
  <span class="soft" id="about"></span>
  <span class="row push">
    <button type="button" data-do="pauseAll" id="pauseall">Pause all</button>
    <button type="button" data-do="askToken">Token</button>
    <button type="button" data-do="clear" class="danger">Clear…</button>
  </span>
</header>
<main>
  <noscript><p class="card">This page needs JavaScript. Its figures are at /api/admin/stats.</p></noscript>
  <div id="banner" class="row" role="status" hidden>
    <span id="trouble"></span> <button type="button" class="small push" id="again" data-do="again"></button>
  </div>
  <p class="unseen" role="status" id="spoken"></p>
  <section aria-label="Jobs by state"><div class="card" id="counts"></div></section>
  <p class="soft" id="waiting"></p>
  <div class="pair">
    <figure class="card">
      <figcaption class="row"><h2>Completed</h2><strong class="push" id="rate">–</strong></figcaption>
      <svg id="rateplot" role="img" aria-label="Jobs completed a second, last five minutes"></svg>
    </figure>
    <figure class="card">
      <figcaption class="row"><h2 id="latencyname">Latency</h2>
        <span class="soft"><i class="key"></i>p50 <i class="key high"></i>p95</span>
        <strong class="push" id="latency">–</strong></figcaption>
      <svg id="latencyplot" role="img" aria-label="Latency, last five minutes"></svg>
    </figure>
  </div>
  <div class="pair">
    <section class="card" aria-labelledby="queuesname">
      <h2 id="queuesname">Queues</h2>
      <div class="scroll"><table>
        <thead><tr><th scope="col">Queue</th><th scope="col" class="num">Pending</th>
          <th scope="col" class="num">Running</th><th scope="col" class="num wide">Delayed</th>
          <th scope="col" class="num wide">Failed</th><th scope="col" class="num">Oldest</th>
          <th scope="col"><span class="unseen">Action</span></th></tr></thead>
        <tbody id="queues"></tbody></table></div>
      <p class="soft" id="noqueues" hidden>No queue yet: the first job makes one.</p>
    </section>
    <section class="card" aria-labelledby="workersname">
      <h2 id="workersname">Workers</h2>
      <div class="scroll"><table>
        <thead><tr><th scope="col">Worker</th><th scope="col" class="wide">Queues</th>
          <th scope="col" class="num">Running</th><th scope="col" class="num">Done</th>
          <th scope="col" class="num">Failed</th><th scope="col" class="num">Seen</th></tr></thead>
        <tbody id="workers"></tbody></table></div>
      <p class="soft" id="noworkers" hidden>No worker seen yet.</p>
    </section>
  </div>
  <section class="card" aria-labelledby="jobsname">
    <form class="row" id="find" role="search">
      <h2 id="jobsname">Jobs</h2>
      <label><span class="unseen">State</span><select id="status"></select></label>
      <label><span class="unseen">Queue</span>
        <select id="queue"><option value="">Every queue</option></select></label>
      <label><span class="unseen">Find by id, or text on this page</span>
        <input type="search" id="search" placeholder="Id, or text on this page" autocomplete="off">
      </label>
      <button type="button" class="push" data-do="requeueFailed" id="requeueall" hidden></button>
    </form>
    <div class="scroll"><table>
      <thead><tr><th scope="col">Job</th><th scope="col">State</th><th scope="col">Queue</th>
        <th scope="col" class="num wide">Priority</th><th scope="col" class="num wide">Attempt</th>
        <th scope="col" class="wide">Worker</th><th scope="col" class="wide">Error</th>
        <th scope="col" class="num">Age</th></tr></thead>
      <tbody id="jobs"></tbody></table></div>
    <p class="soft" id="nojobs" hidden></p>
    <p class="row soft"><span id="pagesays" role="status"></span>
      <button type="button" class="small push" data-do="newer" id="newer" disabled>Newer</button>
      <button type="button" class="small" data-do="older" id="older" disabled>Older</button></p>
  </section>
</main>
<p class="note" id="note" role="status"></p>

<dialog id="detail" aria-labelledby="jobname" closedby="any"><div>
  <div class="row">
    <h2>Job</h2><span class="mono" id="jobname"></span><span class="dot push" id="jobstate"></span></div>
  <p class="note" role="status"></p>
  <dl id="facts"></dl>
  <section id="body"></section>
  <div class="row last">
    <button type="button" data-do="cancelJob" id="cancel" class="danger">Cancel job</button>
    <button type="button" data-do="requeueJob" id="requeue">Requeue</button>
    <a id="result" target="_blank" rel="noopener noreferrer">Open result</a>
    <button type="button" class="push" data-do="shut" id="shut">Close</button>
  </div>
</div></dialog>

<dialog id="ask" class="ask" aria-labelledby="asktitle" aria-describedby="asktext"><form method="dialog">
  <h2 id="asktitle"></h2>
  <p id="asktext"></p>
  <div class="row"><button value="no" class="push" id="askno" autofocus></button>
    <button value="yes" class="danger" id="askyes"></button></div>
</form></dialog>

<dialog id="login" class="ask" aria-labelledby="logintitle"><form method="dialog">
  <h2 id="logintitle">Access token</h2>
  <p class="note" role="status"></p>
  <label for="token" class="soft">A token with the scope admin. It is kept in this tab only.</label>
  <input type="password" id="token" autocomplete="off" spellcheck="false">
  <div class="row"><button type="button" data-do="forget" id="forget">Forget</button>
    <button value="no" formnovalidate class="push" type="button" data-do="shut">Not now</button>
    <button value="yes" class="main">Use token</button></div>
</form></dialog>

<script>
"use strict";
// What the server says goes on the page as text (textContent), never as markup: a payload is a stranger's.
const EVERY = 2000, SPAN = 300000, PAGE = 25, SHOWN = 65536, GAP = 12000;
// Jobs are shown by these states; the API's "processing" is "running" in the stats and on the page.
const STATES = ["pending", "processing", "delayed", "completed", "failed", "expired", "cancelled"];
const FINAL = ["completed", "failed", "expired", "cancelled"];
const AGAIN = ["delayed", "failed", "expired", "cancelled"];
const TIMES = [["Created", "created_at"], ["Available", "available_at"], ["Started", "started_at"],
  ["Lease until", "lease_expires_at"], ["Expires", "expires_at"], ["Finished", "finished_at"]];
const HISTOGRAMS = [  // the first one that /metrics has is plotted
  ["jobqueue_job_wait_seconds", "", "Wait in line"],
  ["jobqueue_http_request_duration_seconds", "/api/submit", "Submit to answer"],
];
const live = { timer: 0, busy: false, locked: false, failures: 0, since: null, skew: 0,
  stats: null, last: null, samples: [], spokenAt: 0 };
// The list's page is told by its cursors; wanted: those of the page that is loading; end: none is older than this.
const view = { queue: "", status: "", cursors: [""], wanted: null, next: null, end: null, jobs: [], asked: 0,
  turn: 0, job: null, jobText: "" };

// -- small tools
const $ = id => document.getElementById(id);
const plain = state => state === "processing" ? "running" : state;
const number = n => (n || 0).toLocaleString("en");
const many = (n, noun) => number(n) + " " + noun + (n === 1 ? "" : "s");
const date = text => new Date(text).toLocaleString("sv-SE");  // 2023-06-01 12:34:56, in local time
const ago = text => span(Math.round((Date.now() + live.skew - Date.parse(text)) / 1000));
const jobPath = (id, rest = "") => "api/jobs/" + encodeURIComponent(id) + rest;
const secret = () => sessionStorage.getItem("jobqueue-token") || "";
// Marks that turn a line around are shown instead of obeyed: an error could pass for another.
const straight = text => String(text).replace(/[\u202a-\u202e\u2066-\u2069]/g,
  mark => "\\u" + mark.charCodeAt().toString(16));
function put(node, text) {
  const shown = straight(text);
  if (node.textContent !== shown) node.textContent = shown;
  return node;
}
function make(tag, name = "", text = "", parent = null) {
  const node = put(document.createElement(tag), text);
  if (name) node.className = name;
  if (parent) parent.append(node);
  return node;
}
function span(s) {
  if (s === null || s === undefined || Number.isNaN(s)) return "–";
  if (s < 0.9995) return s <= 0 ? "0 s" : (s * 1000).toPrecision(2) * 1 + " ms";
  if (s < 60) return (s < 9.95 ? s.toFixed(1) * 1 : Math.round(s)) + " s";
  if (s < 3600) return Math.floor(s / 60) + " min";
  if (s < 86400) return Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " min";
  return Math.floor(s / 86400) + " d " + Math.floor(s % 86400 / 3600) + " h";
}
function size(n) {
  const power = n < 1024 ? 0 : Math.min(3, Math.floor(Math.log2(n) / 10)), shown = n / 1024 ** power;
  return shown.toFixed(power && shown < 10 ? 1 : 0) + " " + ["bytes", "KiB", "MiB", "GiB"][power];
}
function say(text, bad = false) {  // a modal dialog covers the page: then it is the dialog that says it
  const open = [...document.querySelectorAll("dialog[open] .note")].pop();
  for (const note of document.querySelectorAll(".note")) put(note, note === (open || $("note")) ? text : "");
  (open || $("note")).classList.toggle("bad", bad);
  clearTimeout(say.timer);
  if (text) say.timer = setTimeout(say, bad ? 20000 : 6000, "");
}
// One row for each item, kept while the item is there: what has the focus keeps it.
function rows(body, items, key, start, fill) {
  const wanted = new Set(items.map(key)), kept = new Map();
  for (const row of [...body.children]) {
    if (wanted.has(row.dataset.key)) kept.set(row.dataset.key, row); else row.remove();
  }
  items.forEach((item, at) => {
    const row = kept.get(key(item)) || start(item);
    row.dataset.key = key(item);
    fill(row, item);
    if (body.children[at] !== row) body.insertBefore(row, body.children[at] || null);
  });
}
function tableRow(names, head) {
  const row = make("tr");
  names.forEach((name, at) => make(at || !head ? "td" : "th", name, "", row));
  return row;
}

// -- talking to the server
class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.error || "the server answered " + status);
    Object.assign(this, { status, code: problem.code || "" });
  }
}
class Unanswered extends Error {}
const unanswered = problem => { throw new Unanswered("The server did not answer: " + problem.message); };
async function text(method, path) {
  const headers = secret() ? { Authorization: "Bearer " + secret() } : {};
  const signal = AbortSignal.timeout(15000);
  const answer = await fetch(path, { method, headers, signal, cache: "no-store" }).catch(unanswered);
  const body = await answer.text().catch(unanswered);
  const skew = Date.parse(answer.headers.get("Date")) - Date.now();
  live.skew = Math.abs(skew) > 2000 ? skew : 0;  // ages are by the server's clock
  if (answer.ok) return body;
  let problem = {};
  try { problem = JSON.parse(body); } catch { /* a proxy's page, perhaps */ }
  throw new Refused(answer.status, problem);
}
const call = async (method, path) => JSON.parse(await text(method, path));
const wantsToken = problem => ["unauthorized", "forbidden"].includes(problem.code) || problem.status === 401;
async function act(method, path, told) {
  try { say(told(await call(method, path))); } catch (problem) { failed(problem); }
  await refresh();
}
const why = problem => problem instanceof Refused || problem instanceof Unanswered ? problem.message
  : "This page cannot show the answer: " + problem.message;
function failed(problem) {
  if (wantsToken(problem)) lock(problem); else say(why(problem), true);
}

// -- the token: asked for when the server wants one, gone with the tab
function lock(problem) {
  live.locked = true;
  trouble("This server wants an access token.", "Enter token");
  askToken();
  if (problem.status === 403) say("This token lacks the scope admin.", true);
  else if (secret()) say("That token was refused.", true);
}
function askToken() {
  $("forget").hidden = !secret();
  if ($("login").open) return;
  $("token").value = "";
  $("login").showModal();
  $("token").focus();
}
function useToken(event) {
  const given = $("token").value.trim();
  if (!/^[!-~]+$/.test(given)) {
    event.preventDefault();
    say(given ? "A token has no blanks and no letters beyond ASCII." : "Paste a token first.", true);
    return;
  }
  sessionStorage.setItem("jobqueue-token", given);
  unlock();
}
function forget() { sessionStorage.removeItem("jobqueue-token"); $("login").close(); unlock(); }
function unlock() { live.locked = false; say(""); refresh(); openJob(location.hash.slice(1)); }

// -- the beat: every 2 s while the tab is seen; slower and slower while the server is gone
async function refresh() {
  clearTimeout(live.timer);
  if (document.hidden || live.locked) return;
  if (live.busy) { live.busy = "again"; return; }
  live.busy = true;
  let wait = EVERY;
  try {
    const optional = promise => promise.catch(() => null);
    const [stats, workers, metrics] = await Promise.all([call("GET", "api/admin/stats"),
      optional(call("GET", "api/admin/workers")), optional(text("GET", "metrics")),
      loadJobs(true), loadJob()]);
    Object.assign(live, { failures: 0, since: null, stats });
    trouble("");
    sample(stats, metrics);
    showStats(stats);
    showWorkers(workers ? workers.workers : []);
  } catch (problem) {
    if (wantsToken(problem)) lock(problem); else wait = gone(problem);
  }
  const again = live.busy === "again";
  live.busy = false;
  clearTimeout(live.timer);
  if (again) refresh(); else live.timer = setTimeout(refresh, wait);
}
function gone(problem) {
  live.since ||= new Date();
  const wait = Math.min(30, 2 ** ++live.failures) * 1000;
  const what = problem instanceof Unanswered ? "the server does not answer" : why(problem);
  const since = live.since.toTimeString().slice(0, 8);
  trouble("Since " + since + ": " + what + ". The next try is in " + span(wait / 1000) + ".");
  return wait;
}
function trouble(what, button = "Try now") {
  $("banner").hidden = !what;
  document.body.classList.toggle("stale", Boolean(what));
  put($("trouble"), what);
  put($("again"), button);
}

// -- throughput and latency: differences between two looks at the counters
function readMetrics(text) {
  const seen = { completed: null, families: new Map() };
  for (const line of (text || "").split("\n")) {
    const [, name, labels = "", value] = /^([a-zA-Z_:]+)(?:{(.*)})? ([^ ]+)/.exec(line) || [];
    if (!name) continue;
    if (name === "jobqueue_jobs_completed_total") seen.completed += Number(value);
    for (const [family, route] of HISTOGRAMS) {
      if (name !== family + "_bucket" || !labels.includes('"' + route)) continue;
      const buckets = seen.families.get(family) || new Map(), [, le] = /le="([^"]+)"/.exec(labels);
      const bound = le === "+Inf" ? Infinity : Number(le);
      seen.families.set(family, buckets.set(bound, (buckets.get(bound) || 0) + Number(value)));
    }
  }
  return seen;
}
function quantile(buckets, before, q) {
  const bounds = [...buckets.keys()].sort((a, b) => a - b);
  const counts = bounds.map(bound => buckets.get(bound) - (before.get(bound) || 0));
  const rank = counts.at(-1) * q;
  if (!(rank > 0)) return null;
  const at = counts.findIndex(count => count >= rank), low = bounds[at - 1] || 0, under = counts[at - 1] || 0;
  return bounds[at] === Infinity ? low : low + (bounds[at] - low) * (rank - under) / (counts[at] - under);
}
function sample(stats, metrics) {
  const at = Date.now(), now = readMetrics(metrics), before = live.last;
  const histogram = HISTOGRAMS.find(([family]) => now.families.has(family));
  const done = now.completed ?? stats.completed;  // the kept ones, where there is no counter
  const buckets = histogram && now.families.get(histogram[0]);
  live.last = { at, done, buckets, counted: now.completed !== null, uptime: stats.uptime_seconds };
  put($("latencyname"), histogram ? histogram[2] : "Latency: not in /metrics");
  if (!before || before.counted !== live.last.counted || stats.uptime_seconds < before.uptime) return;
  const point = { at, rate: Math.max(0, done - before.done) / Math.max(.5, (at - before.at) / 1000),
    half: null, high: null };
  if (buckets && before.buckets) {
    point.half = quantile(buckets, before.buckets, .5);
    point.high = quantile(buckets, before.buckets, .95);
  }
  live.samples = live.samples.filter(old => at - old.at < SPAN + GAP).concat(point);
  draw();
}
// The plots begin with a minute and grow to five.
const reach = () => Math.min(SPAN, Math.max(60000, Date.now() - (live.samples[0]?.at || Infinity)));
const perSecond = v => (v < 10 ? v.toFixed(1) : number(Math.round(v))) + "/s";
function draw(pointed = null) {
  const shown = pointed || live.samples.at(-1) || {};
  put($("rate"), shown.rate === undefined ? "–" : perSecond(shown.rate));
  put($("latency"), shown.half ? span(shown.half) + " / " + span(shown.high) : "–");
  plot($("rateplot"), ["rate"], perSecond, pointed);
  plot($("latencyplot"), ["high", "half"], span, pointed);
}
function plot(svg, keys, label, pointed) {
  const right = svg.clientWidth - 1, high = svg.clientHeight, top = 8, low = high - 20;
  const now = Date.now(), wide = reach();
  const most = Math.max(0, ...live.samples.flatMap(s => keys.map(key => s[key] || 0))) || 1;
  const unit = 10 ** Math.floor(Math.log10(most)), steps = [1, 1.5, 2, 3, 4, 6, 8, 10];
  const limit = steps.find(n => n * unit >= most * .999) * unit;
  const x = at => (right * (1 - (now - at) / wide)).toFixed(1);
  const y = v => (low - (low - top) * v / limit).toFixed(1);
  const parts = [];
  const draw = (tag, name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries({ class: name, ...attributes })) node.setAttribute(key, value);
    if (text) node.textContent = text;
    parts.push(node);
  };
  for (const v of [0, limit / 2, limit]) draw("line", "grid", { x1: 0, x2: right, y1: y(v), y2: y(v) });
  for (const key of keys) {
    let line = "", area = "", last = null, from = null;
    const close = () => { if (last) area += `L${x(last.at)} ${low}L${from} ${low}Z`; last = null; };
    for (const s of live.samples.filter(s => now - s.at <= wide)) {
      if (last && (s[key] === null || s.at - last.at > GAP)) close();  // no job, or the tab was hidden
      if (s[key] === null) continue;
      const spot = `${x(s.at)} ${y(s[key])}`;
      if (!last) from = x(s.at);
      line += last ? "L" + spot : `M${spot}L${spot}`;  // a lone sample is a dot
      area += (last ? "L" : "M") + spot;
      last = s;
    }
    close();
    if (key === "rate") draw("path", "area", { d: area });
    draw("path", key === "high" ? "high" : "line", { d: line });
  }
  draw("text", "", { x: 0, y: top + 13 }, label(limit));
  draw("text", "", { x: 0, y: high - 4 }, span(wide / 1000) + " ago");
  const when = pointed ? span(Math.round((now - pointed.at) / 1000)) + " ago" : "now";
  draw("text", "", { x: right, y: high - 4, "text-anchor": "end" }, when);
  if (pointed) draw("line", "cursor", { x1: x(pointed.at), x2: x(pointed.at), y1: top, y2: low });
  svg.replaceChildren(...parts);
}
function point(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const off = s => Math.abs(Date.now() - reach() * (1 - (event.clientX - box.left) / box.width) - s.at);
  draw(live.samples.reduce((a, b) => a && off(a) < off(b) ? a : b, null));
}

// -- counts, queues, workers
function showStats(stats) {
  const count = state => stats[plain(state)] || 0;
  rows($("counts"), STATES, state => state, state => {
    const tile = make("button");
    tile.type = "button";
    tile.dataset.do = "pick";
    tile.append(make("b"), make("span", "dot " + state, plain(state)));
    return tile;
  }, (tile, state) => {
    put(tile.firstChild, number(count(state)));
    tile.setAttribute("aria-pressed", String(view.status === state));
  });
  const [clients, workers] = [many(stats.waiting_clients, "client"), many(stats.waiting_workers, "worker")];
  const kept = `${many(stats.total, "job")} with ${size(stats.bytes || 0)} kept`;
  put($("waiting"), `${clients} and ${workers} waiting, ${kept}`);
  put($("about"), `version ${stats.version}, up ${span(Math.floor(stats.uptime_seconds))}`);
  const [verb, action] = stats.paused ? ["Resume", "resumeAll"] : ["Pause", "pauseAll"];
  put($("pauseall"), verb + " all").dataset.do = action;
  document.title = number(stats.pending) + " pending – jobqueue";
  if (Date.now() - live.spokenAt > 20000) {  // a screen reader that is told every 2 s says nothing else
    put($("spoken"), STATES.map(state => number(count(state)) + " " + plain(state)).join(", "));
    live.spokenAt = Date.now();
  }
  const queues = Object.entries(stats.queues || {}).sort(([a], [b]) => a < b ? -1 : 1);
  rows($("queues"), queues, ([name]) => name, () => {
    const row = tableRow(["", "num", "num", "num wide", "num wide", "num", "num"], true);
    make("button", "small", "", row.lastChild).type = "button";
    row.firstChild.append(make("span"), make("span", "held"));
    return row;
  }, (row, [name, queue]) => {
    const [title, ...cells] = row.children, button = cells[5].firstChild;
    put(title.firstChild, name);
    put(title.lastChild, queue.paused || stats.paused ? " paused" : "");
    [queue.pending, queue.running, queue.delayed, queue.failed].forEach((n, at) => put(cells[at], number(n)));
    put(cells[4], span(queue.oldest_pending_seconds));
    put(button, queue.paused ? "Resume" : "Pause").dataset.do = queue.paused ? "resume" : "pause";
    button.setAttribute("aria-label", button.textContent + " queue " + name);
    button.disabled = Boolean(stats.paused);  // a queue's own pause would be a second one
  });
  $("noqueues").hidden = queues.length > 0;
  rows($("queue"), ["", ...new Set(queues.map(([name]) => name).concat(view.queue || []))], name => name,
    name => Object.assign(make("option", "", name || "Every queue"), { value: name }), () => {});
  $("requeueall").hidden = !failures();
  put($("requeueall"), "Requeue all " + number(failures()) + " failed");
}
const failures = () => (view.queue ? live.stats.queues[view.queue]?.failed : live.stats.failed) || 0;
function showWorkers(workers) {
  const start = () => tableRow(["", "wide", "num", "num", "num", "num"], true);
  rows($("workers"), workers, worker => String(worker.worker), start, (row, worker) => {
    const cells = row.children;
    put(cells[0], worker.worker || "(no name)").className = worker.waiting ? "dot completed" : "dot";
    put(cells[1], [].concat(worker.queues || []).join(", "));
    [worker.jobs_running, worker.completed, worker.failed].forEach((n, at) => put(cells[at + 2], number(n)));
    put(cells[5], worker.waiting ? "waiting" : ago(worker.last_seen)).title = date(worker.last_seen);
  });
  $("noworkers").hidden = workers.length > 0;
}

// -- the list of jobs
async function loadJobs(again = false) {
  // A rare state in a long list is not looked for every 2 s.
  if (again && view.asked > 10 && !view.wanted) return;
  const turn = ++view.turn, cursors = view.wanted || view.cursors, jobs = [];
  let next = cursors.at(-1), asked = 0;
  while (asked++ < 200 && jobs.length < PAGE && next !== null) {  // the server's page may be short
    if (view.wanted && asked > 1) put($("pagesays"), `Looking through older jobs, request ${asked}…`);
    const query = new URLSearchParams({ limit: PAGE - jobs.length });
    for (const [name, value] of [["queue", view.queue], ["status", view.status], ["after", next]]) {
      if (value) query.set(name, value);
    }
    const page = await call("GET", "api/jobs?" + query);
    if (turn !== view.turn) return;  // another page was asked for meanwhile
    jobs.push(...page.jobs);
    next = page.next;
  }
  if (!jobs.length && next === null && cursors.length > view.cursors.length) {  // stay on the last page
    Object.assign(view, { wanted: null, end: view.next });
    say("No older ones.");
  } else if (!jobs.length && next === null && cursors.length > 1) {  // what this page showed is gone
    view.wanted = [""];
    return loadJobs();
  } else Object.assign(view, { cursors, jobs, next, asked, wanted: null });
  showJobs();
}
function showJobs() {
  const words = $("search").value.trim().toLowerCase();
  const said = job => [job.job_id, job.queue, plain(job.status), job.worker, errorText(job.error)].join(" ");
  const jobs = view.jobs.filter(job => said(job).toLowerCase().includes(words));
  rows($("jobs"), jobs, job => job.job_id, job => {
    const row = tableRow(["", "", "", "num wide", "num wide", "wide", "wide soft", "num"]);
    make("a", "mono", job.job_id, row.firstChild).href = "#" + job.job_id;
    make("span", "", "", row.children[1]);
    return row;
  }, (row, job) => {
    const [, state, ...cells] = row.children, error = errorText(job.error);
    put(state.firstChild, plain(job.status)).className = "dot " + job.status;
    const tries = job.attempt + " of " + job.attempts, age = ago(job.created_at);
    [job.queue, job.priority, tries, job.worker || "", error, age].forEach((it, at) => put(cells[at], it));
    cells[0].title = job.queue;
    cells[4].title = straight(error);
    cells[5].title = date(job.created_at);
  });
  $("nojobs").hidden = jobs.length > 0;
  const token = secret() && '-H "Authorization: Bearer TOKEN" ';
  const first = `No job yet. Send one: curl ${token}-d hello "${new URL("api/submit?wait=0", location)}"`;
  put($("nojobs"), words ? "Nothing on this page fits. A whole id and Enter finds any job."
    : view.next ? "None up to here. Older looks on." : view.queue || view.status ? "No such job." : first);
  const some = (words ? number(jobs.length) + " of " : "") + many(view.jobs.length, "job");
  put($("pagesays"), `Page ${view.cursors.length}, ${some}, newest first`);
  $("newer").disabled = view.cursors.length < 2;
  $("older").disabled = !view.next || view.next === view.end;
}
function turnTo(cursors) {
  Object.assign(view, { wanted: cursors, end: null });
  return loadJobs().catch(failed);
}
function pick(status, queue) {
  Object.assign(view, { status, queue });
  $("status").value = status;
  $("queue").value = queue;
  turnTo([""]);
  if (live.stats) showStats(live.stats);
}

// -- one job
const errorText = error => typeof error === "string" ? error : error ? JSON.stringify(error) : "";
// JSON.parse would round 12345678901234567890 and drop doubled keys: shown are the tokens as they were sent.
const tokens = json => json.match(/"(?:[^"\\]+|\\.)*"|[{}[\]:,]|[^{}[\]:,"\s]+/g) || [];
const opens = token => token === "{" || token === "[", closes = token => token === "}" || token === "]";
function members(json) {
  const found = {};
  let depth = 0, key = null, parts = [];
  for (const token of tokens(json)) {
    if (closes(token)) depth--;
    if (depth === 1 && key === null && token === ":") { key = JSON.parse(parts.pop()); parts = []; continue; }
    if (depth === 0 || depth === 1 && token === ",") {
      if (key !== null) found[key] = parts.join("");
      key = null;
      parts = [];
    } else parts.push(token);
    if (opens(token)) depth++;
  }
  return found;
}
function indented(json) {  // or as it came, where that would be blanks for the most part
  let depth = 0, before = "", out = "";
  for (const token of tokens(json)) {
    if (closes(token)) depth--;
    if (before === "," || opens(before) !== closes(token)) out += "\n" + "  ".repeat(Math.min(depth, 40));
    out += token === ":" ? ": " : token;
    if (out.length > 4 * SHOWN) return json;
    if (opens(token)) depth++;
    before = token;
  }
  return out;
}
function block(title, raw, encoding) {
  const words = raw.startsWith('"'), whole = words ? JSON.parse(raw) : raw;
  const cut = whole.length > SHOWN, kind = encoding ? JSON.parse(encoding) : words ? "text" : "JSON";
  const note = cut ? ", the first " + size(SHOWN) + " of " + size(whole.length) : "";
  make("h3", "", title + " (" + kind + note + ")", $("body"));
  const body = make("pre", "", cut ? whole.slice(0, SHOWN) : words ? whole : indented(whole), $("body"));
  body.tabIndex = 0;  // so that the arrow keys scroll it
  body.setAttribute("aria-label", title);
  return body;
}
function showJob(json) {
  if (json === view.jobText) return;
  const job = JSON.parse(json), raw = members(json), final = FINAL.includes(job.status);
  Object.assign(view, { job, jobText: json });
  put($("jobname"), job.job_id);
  put($("jobstate"), plain(job.status)).className = "dot push " + job.status;
  $("facts").replaceChildren();
  const facts = [["Queue", job.queue], ["Priority", job.priority], ["Worker", job.worker],
    ["Attempt", `${job.attempt} of ${job.attempts}`], ["Deliveries", job.deliveries],
    ...TIMES.map(([title, name]) => [title, job[name] && date(job[name])])];
  for (const [name, value] of facts) {
    if (value || value === 0) $("facts").append(make("dt", "", name), make("dd", "", value));
  }
  $("body").replaceChildren();
  if (job.error) block("Error", raw.error).classList.add("bad");
  block("Payload", raw.payload || '""', raw.payload_encoding);
  if (raw.result !== undefined) block("Result", raw.result, raw.result_encoding);
  const headers = Object.entries(job.headers || {});
  if (headers.length) make("h3", "", "Headers", $("body"));
  for (const [name, value] of headers) {
    const list = $("body").querySelector("dl") || make("dl", "", "", $("body"));
    list.append(make("dt", "", name), make("dd", "mono", value));
  }
  const had = document.activeElement;
  $("cancel").hidden = final;
  $("requeue").hidden = !AGAIN.includes(job.status);
  $("result").hidden = job.status !== "completed";
  $("result").href = jobPath(job.job_id, "/result");
  if (had.closest("#detail") && !had.checkVisibility()) $("shut").focus();
}
async function openJob(id) {
  if (!id) return;
  try {
    const json = await text("GET", jobPath(id));
    if (location.hash.slice(1) !== id) return;  // changed their mind meanwhile
    showJob(json);
    if ($("detail").open) return;
    say("");
    $("detail").showModal();
    $("detail").scrollTop = 0;
  } catch (problem) {
    failed(problem);
    if (!live.locked) forgetJob();
  }
}
function forgetJob() {  // the address names the open job, so that it can be sent to a colleague
  Object.assign(view, { job: null, jobText: "" });
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
}
async function loadJob(always = false) {  // a job that moves is looked at again, unless it is heavy
  if (!view.job || !always && (FINAL.includes(view.job.status) || view.jobText.length > 4 * SHOWN)) return;
  const id = view.job.job_id;
  try {
    const json = await text("GET", jobPath(id));
    if (view.job && view.job.job_id === id) showJob(json);
  } catch (problem) {
    if (![404, 410].includes(problem.status)) throw problem;
    $("detail").close();
    say("Job " + id + " is no longer there.");
  }
}
async function saveResult(event) {  // a link cannot carry the token; saved, never opened: it is a stranger's
  if (!secret()) return;
  event.preventDefault();
  try {
    const headers = { Authorization: "Bearer " + secret() };
    const answer = await fetch($("result").href, { headers }).catch(unanswered);
    if (!answer.ok) throw new Refused(answer.status, {});
    const link = make("a");
    const bytes = new Blob([await answer.arrayBuffer().catch(unanswered)], { type: "application/octet-stream" });
    link.href = URL.createObjectURL(bytes);
    link.download = view.job.job_id + ".result";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } catch (problem) { failed(problem); }
}

// -- what the buttons do
function ask(title, text, yes, no = "Not now") {
  const words = { asktitle: title, asktext: text, askyes: yes, askno: no };
  for (const id in words) put($(id), words[id]);
  $("ask").returnValue = "";
  $("ask").showModal();
  return new Promise(done => { $("ask").onclose = () => done($("ask").returnValue === "yes"); });
}
async function clear() {
  const jobs = live.stats ? many(live.stats.total, "job") : "every job";
  if (await ask("Forget every job?", `This forgets ${jobs}, waiting, running or finished. `
    + "Clients that wait are told so (410). Nothing brings them back.", "Clear everything", "Keep them")) {
    await act("DELETE", "api/admin/clear", answer => many(answer.cleared, "job") + " cleared.");
  }
}
async function pauseAll() {
  if (await ask("Pause every queue?", "No job is handed out until you resume. "
    + "What is running goes on, and new jobs wait in line.", "Pause every queue")) {
    await act("POST", "api/admin/pause", () => "Every queue is paused.");
  }
}
async function requeueFailed() {
  const queue = view.queue, n = failures(), of = queue ? "queue " + queue : "every queue";
  if (await ask("Requeue all failed jobs?",
    `${many(n, "failed job")} of ${of} ${n === 1 ? "goes" : "go"} back in line.`, "Requeue them")) {
    await act("POST", "api/admin/requeue?status=failed" + (queue && "&queue=" + queue),
      answer => many(answer.requeued, "job") + " requeued" + (answer.stopped ? ", then: " + answer.stopped : "."));
  }
}
async function cancelJob() {
  const { job_id, status } = view.job;
  if (status !== "processing" || await ask("Cancel a running job?", "A worker is working on it, and its result "
    + "will be refused. Clients that wait are told that it is cancelled (410).", "Cancel it", "Let it run")) {
    await jobAct("DELETE", jobPath(job_id), "Job cancelled.");
  }
}
function queueAct(verb, button) {
  const name = button.closest("tr").dataset.key;
  return act("POST", `api/admin/${verb}?queue=${encodeURIComponent(name)}`, () => `Queue ${name}: ${verb}d.`);
}
async function jobAct(method, path, told) {
  await act(method, path, () => told);
  await loadJob(true).catch(failed);
}
const ACTIONS = {
  again: () => { if (live.locked) askToken(); else refresh(); },
  askToken,
  forget,
  shut: button => button.closest("dialog").close(),
  pick: tile => pick(view.status === tile.dataset.key ? "" : tile.dataset.key, view.queue),
  newer: () => turnTo(view.cursors.slice(0, -1)),
  older: () => turnTo([...view.cursors, view.next]),
  clear,
  pauseAll,
  resumeAll: () => act("POST", "api/admin/resume",
    () => "Every queue is resumed, those paused one by one too."),
  pause: button => queueAct("pause", button),
  resume: button => queueAct("resume", button),
  cancelJob,
  requeueJob: () => jobAct("POST", "api/admin/requeue/" + view.job.job_id, "Job requeued."),
  requeueFailed,
};
document.addEventListener("click", async event => {
  const button = event.target.closest("button"), verb = button?.dataset.do;
  // The rest of a double click is dropped: what it would press has often changed under it.
  if (button && event.detail > 1 && !["older", "newer"].includes(verb)) event.preventDefault();
  else if (verb && button.ariaDisabled !== "true") {  // not disabled, which would take the focus away
    button.ariaDisabled = "true";
    try { await ACTIONS[verb](button); } finally { button.ariaDisabled = null; }
  }
});
document.addEventListener("visibilitychange", refresh);
addEventListener("online", refresh);
addEventListener("resize", () => draw());
addEventListener("hashchange", () => location.hash ? openJob(location.hash.slice(1)) : $("detail").close());
$("detail").addEventListener("close", forgetJob);
$("result").addEventListener("click", saveResult);
$("login").querySelector("form").addEventListener("submit", useToken);
$("find").addEventListener("submit", event => {
  event.preventDefault();
  const id = $("search").value.trim().toLowerCase();
  if (/^[0-9a-f-]{36}$/.test(id)) location.hash = id; else showJobs();
});
$("search").addEventListener("input", showJobs);
$("status").addEventListener("change", () => pick($("status").value, $("queue").value));
$("queue").addEventListener("change", () => pick($("status").value, $("queue").value));
for (const name of ["rateplot", "latencyplot"]) {
  $(name).addEventListener("pointermove", point);
  $(name).addEventListener("pointerleave", () => draw());
}
for (const state of ["", ...STATES]) {
  Object.assign(make("option", "", state ? plain(state) : "Every state", $("status")), { value: state });
}
refresh();
openJob(location.hash.slice(1));
</script>
</body>
</html>
"""


# == HTTP server =======================================================================================================
# One thread serves all connections: it waits in one selector, reads, parses, calls the verb and writes. Nothing it
# calls waits, since verbs return futures; what may take a while (Route.slow) gets a thread, as ThreadingMixIn gives
# one. A thread for each connection was measured against this, with the same parser: half the requests a second, three
# times the CPU of a request, and a crowd that hangs up at once wakes as many threads on one interpreter lock.
# When nobody has more to say, it syncs for all whose answers wait for the disk (Engine.commit), where the disk is
# quick: to wake a thread for that, and be woken by it, takes more CPU than the sync, a quarter of a job's.
# Sockets are touched by the serving thread alone; who has an answer in another thread posts it, with one wake-up for
# all that are posted together. Over TLS nothing else would be possible: two threads may not share a session.

# RFC 9110, 5.6.2 (token) and 5.5 (field values: visible, space, tab, obs-text); RFC 9112, 5 (no space before a colon).
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# Possessive, and stripped afterwards, so that many spaces take no more time than other bytes.
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([ \t\x21-\x7e\x80-\xff]*+)\r\n")
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21\x22\x24-\x7e\x80-\xff]+) HTTP/([0-9])\.([0-9])")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(:[0-9]{0,5})?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[ \t\x21-\x7e\x80-\xff]*)?\r\n")
_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")

# Never stored, logged or forwarded: credentials, and what concerns one connection only (RFC 9110, 7.6.1).
# fmt: off
_PRIVATE = frozenset((
    "authorization", "proxy-authorization", "cookie", "connection", "keep-alive", "proxy-authenticate",
    "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect",
))
# fmt: on


def _bad_http(detail: str) -> JobQueueError:
    return JobQueueError("bad_http", detail)


_SINGLE = ("host", "content-length", "transfer-encoding", "idempotency-key")


def _parse_fields(block: bytes) -> dict[str, str]:
    """Lines of headers by their lower-case names."""
    fields: dict[str, str] = {}
    at, end = 0, len(block)
    while at < end:
        match = _FIELD.match(block, at)
        if match is None:
            raise _bad_http(f"the header line at byte {at} is malformed (RFC 9112, section 5)")
        name, value = match[1].decode().lower(), _decode(match[2].strip(b" \t"))
        if name in fields:
            if name in _SINGLE:
                raise _bad_http(f"{name} is given twice")
            value = f"{fields[name]}, {value}"
        fields[name] = value
        at = match.end()
    return fields


def _connection_options(fields: dict[str, str]) -> frozenset[str]:
    return frozenset(word.strip(" \t").lower() for word in fields.get("connection", "").split(","))


def _forwarded(fields: dict[str, str]) -> str:
    """What a worker gets of a submitter's headers, as JSON text."""
    dropped = _PRIVATE | _connection_options(fields)
    return json_text({_canonical(name): value for name, value in fields.items() if name not in dropped})


def headers_of_program(headers: dict[str, str], limit: int) -> str:
    """What a worker gets of headers that a program gives, as JSON text; ValueError where HTTP would not take them."""
    block = b""
    for name, value in headers.items():
        line = f"{name}: {value}\r\n".encode()
        match = _FIELD.fullmatch(line)
        if match is None or match[1] != name.encode():
            raise ValueError(
                "a header's name must be of A-Z a-z 0-9 ! # $ % & ' * + - . ^ _ ` | ~, its value without control "
                f"characters, got {name[:100]!r}: {value[:100]!r}"
            )
        block += line
    if len(block) > limit:
        raise ValueError(f"the headers have {len(block)} bytes; at most {limit} are taken")
    try:
        return _forwarded(_parse_fields(block))
    except JobQueueError as error:
        raise ValueError(error.detail) from None


class Head:
    """The headers of a request. Clients and workers send the same ones again and again, so a block of header bytes
    is parsed once and kept by its bytes, with all that follows from it alone."""

    __slots__ = ("fields", "forwarded", "length", "chunked", "options", "expect", "host")

    def __init__(self, block: bytes) -> None:
        self.fields = _parse_fields(block)
        get = self.fields.get
        self.options = _connection_options(self.fields)
        self.forwarded = _forwarded(self.fields)
        self.length, self.chunked = self._framing()
        self.expect = get("expect", "").lower()
        self.host = get("host")
        if self.host and not _HOST.fullmatch(self.host):
            raise _bad_http("the Host header is malformed")

    def _framing(self) -> tuple[int | None, bool]:
        """RFC 9112, 6.1 to 6.3, strictly: what two readers could understand in two ways is refused."""
        length, coding = self.fields.get("content-length"), self.fields.get("transfer-encoding")
        if coding is not None:
            if length is not None:
                raise _bad_http("Content-Length and Transfer-Encoding exclude each other")
            if coding.lower() != "chunked":
                raise JobQueueError("not_implemented", "the only Transfer-Encoding is chunked")
            return None, True
        if length is not None and not re.fullmatch(r"[0-9]{1,10}", length, re.ASCII):
            raise _bad_http(f"Content-Length must be 1 to 10 digits, got {length[:40]!r}")
        return (None if length is None else int(length)), False


def _decode(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


@functools.lru_cache(1024)
def _canonical(name: str) -> str:
    """x-trace-id -> X-Trace-Id, as the original's workers get them."""
    return "-".join(part.capitalize() for part in name.split("-"))


class _Chunks:
    """Decodes a chunked body (RFC 9112, 7.1) as it comes."""

    __slots__ = ("body", "left", "limit", "trailers", "trailers_left", "looked_at")

    def __init__(self, limit: int, trailers_limit: int) -> None:
        self.body, self.left, self.limit = bytearray(), 0, limit
        self.trailers_left = trailers_limit  # bytes that they may still have
        self.trailers, self.looked_at = False, 0

    def feed(self, buffer: bytearray) -> bool:
        """Take what is there; True when the body is whole. What follows stays in `buffer`."""
        while True:
            if self.trailers:
                return self._skip_trailers(buffer)
            if self.left and not self._take(buffer):
                return False
            end = buffer.find(b"\r\n", 0, 1024) + 2
            if end < 2 and len(buffer) < 1024 and not _BARE.search(buffer):
                return False  # not whole yet
            match = _CHUNK_SIZE.fullmatch(buffer, 0, end)
            if match is None:
                raise _bad_http("a chunk's size line is malformed")
            size = int(match[1], 16)
            del buffer[:end]
            if size == 0:
                self.trailers = True
            elif len(self.body) + size > self.limit:
                raise JobQueueError("payload_too_large", f"at most {self.limit} bytes are taken")
            else:
                self.left = size + 2

    def _take(self, buffer: bytearray) -> bool:
        data = buffer[: self.left - 2]
        self.body += data
        self.left -= len(data)
        del buffer[: len(data)]
        if not b"\r\n".startswith(buffer[:2]):
            raise _bad_http("a chunk is longer than its size")
        if self.left > 2 or len(buffer) < 2:
            return False
        del buffer[:2]
        self.left = 0
        return True

    def _skip_trailers(self, buffer: bytearray) -> bool:
        """Trailer fields are read and dropped: none of them may change what the headers said (RFC 9110, 6.5.1)."""
        while (end := buffer.find(b"\r\n")) >= 0:
            if end == 0:
                del buffer[:2]
                return True
            if _FIELD.fullmatch(buffer, 0, end + 2) is None:
                raise _bad_http("a trailer is malformed")
            self.trailers_left -= end + 2
            self.looked_at = 0
            del buffer[: end + 2]
        if len(buffer) > self.trailers_left or self.trailers_left < 0 or _BARE.search(buffer, self.looked_at):
            raise _bad_http("the trailers are malformed or too long")
        self.looked_at = max(0, len(buffer) - 1)
        return False


_UNWANTED = 64 * KIB  # bytes of a body that no route takes, still read so that the connection can go on


class Plan:
    """What the head of a request asks for, as far as it was understood. Kept by the bytes of its head; of workers'
    calls, by those without the job's id and lease token (_OWN)."""

    # fmt: off
    __slots__ = (
        "head", "version", "is_head", "keep", "framed", "route", "handle", "holds", "job_id", "token", "asked",
        "limit", "plain", "seen",
    )
    # fmt: on

    def __init__(self, seen: dict[int, Histogram]) -> None:
        self.version, self.is_head, self.keep = 1, False, False
        self.seen = seen  # of the route, by status
        self.framed = False  # is it known where the body ends? Otherwise the stream cannot go on
        self.route: Route | None = None
        self.job_id: str | None = None
        self.token: str | None = None  # of the lease
        self.limit = _UNWANTED  # bytes of the body that are read, if only to answer with a refusal
        self.plain = -1  # length of a body that can be taken without more ado


class Planner:
    """Parses heads, strictly, and asks whether the caller may. A refusal carries the plan as far as it got."""

    def __init__(self, settings: Settings, access: Access, router: Router, api: HttpApi) -> None:
        self._settings, self._access, self._router, self._api = settings, access, router, api
        self.seen: dict[tuple[str, str], dict[int, Histogram]] = collections.defaultdict(dict)  # by method and path
        self._limits = {None: _UNWANTED, "payload": settings.max_payload, "batch": settings.max_batch}
        self._scheme = "https://" if settings.tls_cert else "http://"
        self._head_of = functools.lru_cache(1024)(Head)  # it keeps no exceptions, so no refused ones

    def blank(self) -> Plan:
        """The plan of what is refused before its head is whole."""
        return Plan(self.seen["-", "-"])

    def plan(self, block: bytes, peer: str) -> Plan:
        """The plan of a head, which ends in CR LF. Raises JobQueueError, with its `plan`."""
        plan = self.blank()
        try:
            self._parse(block, peer, plan)
        except JobQueueError as error:
            error.plan = plan
            raise
        return plan

    def _parse(self, block: bytes, peer: str, plan: Plan) -> None:
        line, _, fields = block.partition(b"\r\n")
        if len(line) > self._settings.max_request_line:
            limit = self._settings.max_request_line
            raise JobQueueError("uri_too_long", f"the request line has {len(line)} bytes; at most {limit} are taken")
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            raise _bad_http("the request line must be METHOD SP TARGET SP HTTP/1.1 (RFC 9112, section 3)")
        method, target, major, minor = match[1].decode(), match[2].decode("latin-1"), match[3], match[4]
        plan.is_head = method == "HEAD"
        if major != b"1":
            spoken = f"HTTP/{major.decode()}.{minor.decode()}"
            raise JobQueueError("http_version", f"{spoken} is not spoken here; use HTTP/1.1")
        plan.version = min(int(minor), 1)  # what comes after 1.1 is answered as 1.1 (RFC 9110, 2.5)
        head = plan.head = self._head_of(fields) if len(fields) <= 2048 else Head(fields)
        plan.keep = "close" not in head.options and (plan.version == 1 or "keep-alive" in head.options)
        if plan.version == 0 and head.chunked:
            raise _bad_http("HTTP/1.0 has no Transfer-Encoding")
        if head.host is None and plan.version == 1:
            raise _bad_http("HTTP/1.1 needs one Host header")
        if target[0] != "/":
            target = self._origin_form(target, head)
        plan.framed = True
        self._ask(method, target, head, peer, plan)
        if not (head.chunked or head.expect) and (head.length or 0) <= plan.limit:
            plan.plain = head.length or 0

    def _origin_form(self, target: str, head: Head) -> str:
        """The path and query of an absolute target, which must be of this host (RFC 9112, 3.2)."""
        if target[: len(self._scheme)].lower() == self._scheme:
            host, slash, rest = target[len(self._scheme) :].partition("/")
            if host.lower() == (head.host or "").lower():
                return "/" + rest if slash else "/"
        raise _bad_http("the target must be a path, or an absolute URL of this host")

    def _ask(self, method: str, target: str, head: Head, peer: str, plan: Plan) -> None:
        path, mark, query = target.partition("?")
        route, plan.job_id = self._router.find(method, path)
        plan.route = route
        plan.seen = self.seen[route.method, route.path]
        self._admit(route, head)
        if head.expect and head.expect != "100-continue" and plan.version == 1:
            raise JobQueueError("expectation_failed", "the only expectation is 100-continue")
        parameters = parse_query(query, route.parameters) if mark else {}
        plan.token = parameters.get("lease_token") or None  # an empty one is none, as over gRPC
        asked = plan.asked = Asked(parameters, head.fields, head.forwarded, peer)
        plan.handle = getattr(self._api, route.handler)
        plan.holds = route.scope != "worker"  # a worker that waits is no held client
        plan.limit = self._limits[route.body]
        prepare = getattr(self._api, f"prepare_{route.handler}", None)
        if prepare:
            asked.prepared = prepare(asked)

    def _admit(self, route: Route, head: Head) -> None:
        """Who may: by token; without tokens, whoever is not led here by a web page of another site."""
        if not self._access.open:
            self._access.check(head.fields.get("authorization"), route.scope)
            return
        host = "localhost" if head.host is None else head.host.lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host
        if not (name == "localhost" or name in self._settings.allow_host or _is_address(name.strip("[]"))):
            advice = f"start with --allow-host {name[:100]}"
            raise JobQueueError("host_refused", f"Host {name[:100]!r} is not allowed; {advice}")
        site, origin = head.fields.get("sec-fetch-site"), head.fields.get("origin")
        own = (None, "http://" + host, "https://" + host)  # a proxy may speak TLS for us
        foreign = site not in (None, "same-origin", "none") or origin not in own
        if foreign and route.scope is not None:
            raise JobQueueError("cross_site", "a page of another site may not call this")


# What each request of a worker has of its own: without its job's id and lease token, its head is one of a few.
_OWN = re.compile(rb"(POST /api/worker/[a-z]{4,8}/)([0-9a-f-]{36})\?lease_token=([0-9a-f]{16})(?=[& ])")
_CLOSED, _HANDSHAKE, _READING, _HELD, _LINGERING = range(5)
_ESTABLISHED, _LISTEN = 1, 10  # states of TCP sockets, of Linux (tcp_states.h)
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def _tcp_state(sock: socket.socket) -> int:
    """0 where the system does not tell."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except (AttributeError, OSError):
        return 0


def _close_socket(sock: socket.socket) -> None:
    """Also for a child that was forked meanwhile, and has it too: else whoever is at the other end would not see it."""
    with contextlib.suppress(OSError):  # the other end has left
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


class Connection:
    """One client's socket: what came in, what is to go out, and the answer it waits for. Serving thread only."""

    # fmt: off
    __slots__ = (
        "_server", "_sock", "peer", "state", "_buffer", "_out", "_plan", "_own", "_body", "_keep", "_later",
        "deadline", "_events", "_refusal", "_started", "_lingered", "_looked_at", "_advancing", "_unsent",
        "_counts",
    )
    # fmt: on

    LOOK = 1.0  # seconds after which a connection that is read no further is looked at again

    def __init__(self, sock: socket.socket, address: Any, server: HTTPServer) -> None:
        self._server, self._sock = server, sock
        self.peer = address[0]
        self._buffer, self._out = bytearray(), b""
        self._plan: Plan | None = None
        self._body: _Chunks | int | None = None  # what is being read: chunks, or so many bytes
        self._refusal: JobQueueError | None = None  # the answer, once the body has been read
        self._keep = True  # may another request come?
        self._advancing = False  # is _advance at work, further down the stack?
        self._counts = False  # is it counted in the server's `held`?
        self._later: Later | None = None
        self._unsent: tuple[Later, Any] | None = None  # what to give back when the answer cannot be written whole
        self._started = self._lingered = 0
        self._looked_at = 0  # bytes of a head that is not whole in which no bare line end was found
        self.state = _HANDSHAKE if server.tls else _READING
        self.deadline = server.now + (server.settings.header_timeout if server.tls else server.idle_timeout)
        self._events = _READ
        server.selector.register(sock, self._events, self.on_event)
        server.arm(self, self.deadline)

    # -- the selector says that something can be read or written

    def on_event(self, mask: int) -> None:
        try:
            if self.state == _HANDSHAKE:
                self._shake_hands()
            if mask & _WRITE and self.state > _HANDSHAKE:
                self._flush()
            if mask & _READ and self.state > _HANDSHAKE:
                self._read()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Whatever it was: the others are served."""
        if not isinstance(error, OSError):
            log.error("connection_failed peer=%s", self.peer, exc_info=error)
        self.close()

    def _shake_hands(self) -> None:
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            self._listen(_READ)
        except ssl.SSLWantWriteError:
            self._listen(_WRITE)
        except ssl.SSLError as error:
            if error.reason == "HTTP_REQUEST":
                self._answer_in_clear()
            raise
        else:
            self.state = _READING
            self._set_deadline(self._server.now + self._server.idle_timeout)
            self._listen(_READ)
            if self._refusal is not None:
                self.refuse_at_once(self._refusal)

    def _answer_in_clear(self) -> None:
        """Somebody speaks plain HTTP where TLS is spoken: a sentence says more than a reset."""
        error = _bad_http("this port speaks TLS: use https")
        with contextlib.suppress(OSError):
            socket.socket.send(self._sock, render(error_response(error), False, self._server.date))
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            socket.socket.recv(self._sock, 65536)  # what is left unread would reset the connection

    def _listen(self, events: int) -> None:
        """What the selector shall wait for; 0: nothing."""
        if events == self._events:
            return
        selector = self._server.selector
        if not events:
            selector.unregister(self._sock)
        elif not self._events:
            selector.register(self._sock, events, self.on_event)
        else:
            selector.modify(self._sock, events, self.on_event)
        self._events = events

    def _read(self) -> None:
        while True:
            try:
                data = self._sock.recv(65536)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            if not data:
                self._hung_up()
                return
            if self.state == _LINGERING:
                self._discard(len(data))
            elif not self._serve_whole(data):
                self._buffer += data
                if self.state == _READING and not self._out:
                    self._advance()
                elif len(self._buffer) > 65536:  # it sends on without waiting for its answers: not further than this
                    self._listen(self._events & ~_READ)
                    if self._is_deaf():
                        self._set_deadline(self._server.now + self.LOOK)
                    return
            if not self._server.tls or self.state == _CLOSED or not self._sock.pending():
                return

    def _hung_up(self) -> None:
        """The end of the stream: nothing more will be asked, and whoever waits for long has left."""
        answering = self.state == _HELD and not (self._later and self._later.long)
        begun = self._begun() and (self._body is not None or self._buffer.strip(b"\r\n"))  # empty lines are none
        if answering or (self._out and not self._unsent):
            self._keep = False
            self._listen(self._events & ~_READ)
        elif begun and not self._out:
            self._refuse(self._refusal or _bad_http("the request was cut short"))
        else:
            self.close()

    def _discard(self, size: int) -> None:
        self._lingered += size
        if not self._out:
            self.deadline = min(self._server.now + 2, self._body_deadline(self._lingered))
        if self._lingered > 64 * MIB:
            self.close()

    # -- reading a request

    def _serve_whole(self, data: bytes) -> bool:
        """Serve a request that came whole and alone, as nearly all do; False: it takes the long way, as below."""
        server, end = self._server, data.find(b"\r\n\r\n") + 2
        if self.state != _READING or self._buffer or self._out or self._body is not None:
            return False
        if not 1 < end <= server.usual_head:
            return False
        try:
            plan, job_id, token = server.plan_of(data[:end], self.peer)
        except JobQueueError:
            return False
        if len(data) != end + 2 + plan.plain:
            return False
        self._plan, self._keep, self._started = plan, plan.keep, server.now
        self._dispatch(plan, job_id, token, data[end + 2 :])
        return True

    def _advance(self) -> None:
        """Serve what the buffer holds, request by request, until one is incomplete or has to wait for its answer."""
        if self._advancing:  # an answer that was there at once: the loop below goes on by itself
            return
        self._advancing = True
        try:
            while self.state == _READING and self._buffer and not self._out:
                if (self._body is None and not self._read_head()) or not self._read_body():
                    break  # it is not whole yet
                self._body, body = None, self._body
                if self._refusal is None:
                    self._dispatch(self._plan, *self._own, body)
                else:
                    self._respond(error_response(self._refusal))
        except JobQueueError as error:
            self._refuse(error)
        finally:
            self._advancing = False

    def _read_head(self) -> bool:
        buffer = self._buffer
        if buffer.startswith(b"\r\n"):  # an empty line before a request is forgiven (RFC 9112, 2.2)
            del buffer[:2]
            self._looked_at = 0
        end = buffer.find(b"\r\n\r\n")
        settings = self._server.settings
        if end < 0 or end > settings.max_headers:
            self._check_sizes(buffer, end, settings)
        if end < 0:
            self._expect_within(settings.header_timeout)
            return False
        block = bytes(buffer[: end + 2])
        del buffer[: end + 4]
        self._started, self._refusal, self._looked_at = self._server.now, None, 0
        try:
            plan, *self._own = self._server.plan_of(block, self.peer)
        except JobQueueError as error:
            plan, self._refusal = error.plan, error
        self._plan, self._keep = plan, plan.keep
        self._frame(plan)
        return True

    def _check_sizes(self, buffer: bytearray, end: int, settings: Settings) -> None:
        """Of a head that is large, or not whole yet (`end` is -1): an end that comes is four bytes, not all there."""
        line = buffer.find(b"\r\n")
        if (line if line >= 0 else len(buffer)) > settings.max_request_line:
            raise JobQueueError("uri_too_long", f"the request line is longer than {settings.max_request_line} bytes")
        if line >= 0 and (end if end >= 0 else len(buffer) - 3) - line > settings.max_headers:
            raise JobQueueError("headers_too_large", f"the headers are larger than {settings.max_headers} bytes")
        if end < 0 and _BARE.search(buffer, self._looked_at):
            raise _bad_http("a line ends in something else than CR LF")
        self._looked_at = max(0, len(buffer) - 1)

    def _expect_within(self, seconds: float) -> None:
        """A deadline for what is being read: absolute, so that dripping does not move it."""
        if self._started == 0:
            self._started = self._server.now
            self._set_deadline(self._server.now + seconds)

    def _set_deadline(self, when: float) -> None:
        earlier = when < self.deadline
        self.deadline = when
        if earlier:
            self._server.arm(self, when)

    def _frame(self, plan: Plan) -> None:
        """Get ready to read the body, or refuse at once where reading on would be in vain."""
        if not plan.framed:
            raise self._refusal
        head, limit = plan.head, plan.limit
        length = head.length or 0
        if self._refusal is not None and (head.expect or head.chunked or length > limit):
            raise self._refusal
        if length > limit:
            raise JobQueueError("payload_too_large", f"the body has {length} bytes; at most {limit} are taken")
        self._body = _Chunks(limit, self._server.settings.max_headers) if head.chunked else length
        if head.expect and plan.version == 1 and (length or head.chunked) and not self._buffer:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_body(self) -> bool:
        """True when the body is whole: `_body` is its bytes then."""
        body = self._body
        if isinstance(body, int):
            if len(self._buffer) < body:
                self._expect_body(body)
                return False
            self._body = bytes(self._buffer[:body])
            del self._buffer[:body]
        elif isinstance(body, _Chunks):
            if not body.feed(self._buffer):
                self._expect_body(len(body.body))
                return False
            self._body = bytes(body.body)
        return True

    def _expect_body(self, size: int) -> None:
        """A deadline by size and a floor rate; that of a chunked body moves only as fast as it has to come."""
        self._set_deadline(self._body_deadline(size))

    def _body_deadline(self, size: int) -> float:
        return self._started + self._server.settings.body_timeout + size / (16 * KIB)

    # -- answering

    def _dispatch(self, plan: Plan, job_id: str | None, token: str | None, body: bytes) -> None:
        server = self._server
        request = _make(Request, (plan.asked, job_id, token, body, server.held >= server.max_held))
        if plan.route.slow:
            self.state = _HELD
            try:
                server.process_request((plan, request), self)
            except RuntimeError:
                self.take(error_response(JobQueueError("too_many_clients", "no thread is to be had; try again")))
            return
        try:
            answer = plan.handle(request)
        except Exception as error:
            answer = error_response(refusal_of(error))
        self.take(answer)

    def take(self, answer: Response | Later) -> None:
        """The handler's answer, or the promise of one."""
        if isinstance(answer, Later):
            if self.state == _CLOSED:
                answer.future.cancel()
                return
            self.state, self._later = _HELD, answer
            self._server.waiting += 1
            if answer.future.done():
                self._counts = False
                self._server.post(self._finish)
            else:
                self._counts = self._plan.holds
                self._server.held += self._counts
                answer.future.add_done_callback(self._ended)
        elif self.state != _CLOSED:
            self.state = _READING
            self._respond(answer)
            self._go_on()

    def _ended(self, future: Future) -> None:
        """Called in whatever thread has the answer."""
        if not future.cancelled():
            self._server.post(self._finish)

    def _finish(self) -> None:
        later, self._later = self._later, None
        if later is None:
            return
        value, lost = later.future.outcome, later.lost
        if self.state == _CLOSED:
            self._lose(later, value)
            return
        self._server.held -= self._counts
        self._server.waiting -= 1
        self.state = _READING
        try:
            if lost and self._peer_left():
                self.close()
            else:
                self._respond(later.response(value))
            if self.state == _CLOSED:
                self._lose(later, value)
            elif self._out:
                self._unsent = (later, value) if lost else None
            else:
                self._go_on()
        except Exception as error:
            self._failed(error)

    def _go_on(self) -> None:
        if self._buffer and not self._advancing:  # what was sent on without waiting for the answer
            self._server.soon(self._catch_up)

    def _catch_up(self) -> None:
        try:
            self._advance()
            if not self._out and (self.state == _READING or (self.state == _HELD and len(self._buffer) <= 65536)):
                self._listen(self._events | _READ)  # _read stopped where the buffer was full
        except Exception as error:
            self._failed(error)

    def _lose(self, later: Later, value: Any) -> None:
        """The answer did not reach whom it was for."""
        if later.lost and not isinstance(value, BaseException):
            self._server.soon(functools.partial(later.lost, value))

    def _peer_left(self) -> bool:
        """Has the other side hung up, unseen so far? A job must not go to a worker that is gone."""
        try:
            if self._server.knows_states:  # also behind what was not read yet, such as a farewell of TLS
                return _tcp_state(self._sock) != _ESTABLISHED
            return socket.socket.recv(self._sock, 1, socket.MSG_PEEK) == b""  # of the socket itself, over TLS too
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _respond(self, response: Response) -> None:
        server = self._server
        plan = self._plan or server.no_plan
        keep = self._keep and not (response.close or server.stopping)
        server.count(plan, response.status, self._started, self.peer)
        self._plan = self._refusal = None
        self._started = 0
        data = render(response, keep, server.date, plan.version)
        if plan.is_head:
            data = data[: data.index(b"\r\n\r\n") + 4]
        if self._write(data) and not keep:
            self._linger()
        elif not self._out:
            self._set_deadline(server.now + server.idle_timeout)

    def _write(self, data: bytes) -> bool:
        """Send, or keep what the socket does not take; False when the connection is gone."""
        if self._out:
            self._out = bytes(self._out) + data
            return True
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            sent = 0
        except OSError:
            self.close()
            return False
        if sent < len(data):
            self._out = memoryview(data)[sent:]  # not a copy for each send
            self._listen(self._events | _WRITE)
            self._set_deadline(self._server.now + self._server.settings.body_timeout + len(data) / (16 * KIB))
        return True

    def _flush(self) -> None:
        data, self._out = self._out, b""
        if not data:
            self._listen(_READ)
            return
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            sent = 0
        self._out = data[sent:]
        if not self._out:
            self._unsent = None
            self._listen(_READ)
            if self.state == _LINGERING:
                self._half_close()
            elif not self._keep:
                self._linger()
            elif self.state == _READING:
                self._set_deadline(self._server.now + self._server.idle_timeout)
                self._advance()

    def _refuse(self, error: JobQueueError) -> None:
        """What follows in the stream cannot be told apart any more, or is not wanted: answer and close."""
        self._body, self._keep = None, False
        self._respond(error_response(error))

    def _linger(self) -> None:
        """Close so that the answer arrives: what is still coming is read and dropped, as fast as a body has to be and
        until nothing has come for 2 s, since closing a socket with unread data resets it (RFC 9112, 9.6)."""
        self.state, self._started = _LINGERING, self._server.now
        self._buffer.clear()
        self._listen(self._events | _READ)
        if not self._out:  # of an answer that is still being written, the deadline stays
            self._half_close()

    def _half_close(self) -> None:
        """Over TLS too by the socket alone: the answer tells its length, and what still comes has to be read."""
        self._started = self._server.now
        self._set_deadline(self._server.now + 2)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def refuse_at_once(self, error: JobQueueError) -> None:
        """One connection too many; over TLS it is told after the handshake."""
        self._keep = False
        if self.state == _HANDSHAKE:
            self._refusal = error
        else:
            self._respond(error_response(error))

    # -- the end

    def expire(self, now: float) -> None:
        """The deadline is over, or was moved since its timer was set."""
        if self.state == _CLOSED:
            return
        if self.state == _HELD:
            if self._is_deaf() and self._peer_left():
                self.close()
                return
            self.deadline = now + (self.LOOK if self._is_deaf() else self._server.idle_timeout)
        if self.deadline > now:
            self._server.arm(self, self.deadline)
        elif self._begun() and not self._out:
            self._refuse(JobQueueError("request_timeout", "the request took too long to arrive"))
        else:
            self.close()

    def _is_deaf(self) -> bool:
        """Has it sent on so much that it is read no further, while it waits for what may take long? Then nothing tells
        that it has left."""
        return self.state == _HELD and not self._events and self._later is not None and self._later.long

    def busy(self) -> bool:
        return self.state == _HELD or bool(self._out)

    def _begun(self) -> bool:
        """Has a part of a request come?"""
        return self.state == _READING and (bool(self._buffer) or self._body is not None)

    def idle_for(self, now: float) -> float:
        """Seconds for which it has been waiting for a request; below 0: it is not."""
        if self.state != _READING or self._out or self._begun():
            return -1.0
        return now - (self.deadline - self._server.idle_timeout)

    def has_more(self) -> bool:
        """Has something come that was not read yet, be it the end?"""
        try:
            socket.socket.recv(self._sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def stop(self, seconds: float) -> None:
        """The server ends: what is being answered has this long, what is on its way is told, the idle is closed."""
        if self.state == _READING and not self._out:
            self.on_event(_READ)  # what has come, but was not read yet
        if self.busy():
            self._set_deadline(self._server.now + seconds)
        elif self._begun():
            self._refuse(JobQueueError("draining", "the server is stopping"))
        elif self.state != _LINGERING:  # which is over soon
            self.close()

    def close(self) -> None:
        """Gone: whoever works for it is told by the future, without any lock of the engine's."""
        if self.state == _CLOSED:
            return
        held, self.state = self.state == _HELD, _CLOSED
        if self._events:
            self._server.selector.unregister(self._sock)
            self._events = 0
        self._server.forget(self)
        _close_socket(self._sock)
        # The heap of deadlines may hold this object for a while yet, but not what it has read and was to send.
        self._buffer, self._out, self._body, self._plan, self._refusal = bytearray(), b"", None, None, None
        if self._unsent is not None:
            unsent, self._unsent = self._unsent, None
            self._lose(*unsent)
        if held and self._later is not None:
            self._server.held -= self._counts
            self._server.waiting -= 1
            if self._later.future.cancel():
                self._later = None


@functools.lru_cache(256)
def _status_line(status: int, kind: str | None, keep: bool, version: int, date: str) -> bytes:
    """Status line and first headers: alike for all answers of a kind within a second."""
    lines = f"HTTP/1.1 {status} {http.client.responses[status]}\r\nDate: {date}\r\n"
    if kind is not None:
        lines += f"Content-Type: {kind}\r\n"
    if not keep:
        lines += "Connection: close\r\n"
    elif version == 0:
        lines += "Connection: keep-alive\r\n"
    return lines.encode("latin-1", "replace")


def render(response: Response, keep: bool, date: str, version: int = 1) -> bytes:
    """The bytes of a response. 204 has no body, no Content-Length and no Content-Type (RFC 9110, 8.6 and 15.3.5)."""
    status, body, kind, headers, _ = response
    data = _status_line(status, kind, keep, version, date)
    if headers:
        data += "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1", "replace")
    if status == 204:
        return data + b"\r\n"
    return b"%bContent-Length: %d\r\n\r\n%b" % (data, len(body), body)


def _processors(own: str = "/proc/self/cgroup", groups: str = "/sys/fs/cgroup") -> int:
    """How many this process may use at a time; of a share (cpu.max of cgroup v2, as containers have it), what is
    whole."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open(own) as file:
            group = file.read().partition("0::/")[2].partition("\n")[0]
        with open(f"{groups}/{group}/cpu.max") as file:
            quota, period = map(int, file.read().split())  # a ValueError where there is no limit, which is "max"
        count = min(count, max(1, quota // period))
    return count


class HTTPServer(http.server.ThreadingHTTPServer):
    """The sockets. `serve_forever` is the one thread that reads and writes; other threads `post`."""

    # Slots: see LocalEngine. ThreadingHTTPServer has a dictionary for its own.
    # fmt: off
    __slots__ = (
        "settings", "_clock", "idle_timeout", "_access_log", "max_connections", "max_held", "_engine", "usual_head",
        "_planner", "no_plan", "requests", "_known_plan", "_known_kind", "selector", "timers", "_due", "connections",
        "_longest_idle", "held", "waiting", "stopping", "now", "_second", "date", "_posted", "_awake", "_together",
        "_wake_in", "_wake_out", "_serving", "_brisk", "_spins", "_paused", "_tell_again", "knows_states", "tls",
    )
    # fmt: on

    TURN = 64  # answers that may wait for the end of a turn of the loop, to be sent together
    GATHER = 0.002  # once answers wait for a sync, requests that go on coming for so many seconds share it
    SPINS, BRISK = 60, 0.0001  # times to ask before it sleeps, where the last wait was under so many seconds
    GRACE = 1.0  # seconds idle before a connection may be closed for another: its next request may be on its way
    request_queue_size = 1024
    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], api: HttpApi, service: JobService, settings: Settings, clock: Clock
    ) -> None:
        self.settings, self._clock = settings, clock
        self.idle_timeout, self._access_log = settings.idle_timeout, settings.access_log
        files = _file_limit()
        self.max_connections, self.max_held = _room(settings, files)
        self._engine = service.engine
        self.usual_head = min(2048, settings.max_headers)  # bytes of a head whose plan is kept
        self.tls = tls_context(settings)
        self._planner = Planner(settings, service.access, Router(ROUTES), api)
        self.no_plan, self.requests = self._planner.blank(), self._planner.seen
        self._known_plan = functools.lru_cache(1024)(self._planner.plan)
        self._known_kind = functools.lru_cache(1024)(self._plan_of_kind)
        self.selector, self.timers, self._due = selectors.DefaultSelector(), Timers(), math.inf
        self.connections: set[Connection] = set()
        self._longest_idle: list[Connection] | None = None  # the longest at the end; None: not looked for yet
        self.held, self.waiting, self.stopping = 0, 0, False  # clients held; connections whose answer is to come
        self.now = clock.monotonic()
        self._second, self.date = 0, ""  # the Date header of this second
        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._awake = False  # has it been woken for what is posted? Then nobody else needs to
        self._together = False  # amid a turn of many events: what is posted waits for the turn's end
        self._paused = False  # is nothing accepted for a while?
        self._tell_again = 0.0  # that accepting failed: not before
        self._wake_in, self._wake_out = socket.socketpair()
        self._brisk = False  # may the next event be near?
        self._spins = self.SPINS if _processors() > 1 else 0  # with one, those could not run who are waited for
        self._serving = 0  # the ident of the serving thread
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Connection)
        if (self.max_connections, self.max_held) != (settings.max_connections, settings.max_held):
            cut = self.max_connections < settings.max_connections
            reason = f"{files} files may be open (ulimit -n)" if cut else "workers need the other connections"
            log.warning("limits_cut max_connections=%d max_held=%d: %s", self.max_connections, self.max_held, reason)
        self.knows_states = _tcp_state(self.socket) == _LISTEN
        self.socket.setblocking(False)
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self.selector.register(self.socket, _READ, self._accept)
        self.selector.register(self._wake_in, _READ, self._woken)

    def server_bind(self) -> None:
        """Without the reverse look-up of the name that HTTPServer does."""
        if os.name != "nt":  # there it would let two servers share the port
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # connections inherit it
        for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15)):  # a machine that vanished is found out
            if hasattr(socket, name):
                self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_port = self.server_address[1]

    # -- the serving thread

    def serve_forever(self, poll_interval: float | None = None) -> None:
        self._serving = threading.get_ident()
        self._engine.lead()
        uncommitted, since = False, 0.0
        while not (self.stopping and not self.connections):
            # The clock of a test may run ahead of the selector's: look at the deadlines once a second at least.
            patience = None if self._due == math.inf else min(1.0, max(0.0, self._due - self.now))
            events = self.selector.select(0) if uncommitted or self._posted else self._wait(patience)
            self._look_at_the_clock()
            self._run_posted()  # of the last turn's end, before what comes next on these connections, be it their end
            self._together = len(events) > 1
            try:
                for key, mask in events:
                    key.data(mask)
                    if len(self._posted) > self.TURN:
                        self._run_posted()
            except Exception:  # whatever it was: the others are served; what was left over is seen again
                log.exception("serving_failed")
            self._together = False
            self._run_posted()
            if self.now >= self._due:
                while (timed := self.timers.pop_due(self.now)) is not None:
                    self._run(timed.expire, self.now)
                self._due = self.timers.first()
            if not uncommitted:
                uncommitted, since = self._engine.uncommitted(), self.now
            elif not events or self.now - since > self.GATHER:
                self._run(self._engine.commit)
                uncommitted = False  # what it left is the committing thread's, which posts
        self._serving = 0

    def _wait(self, patience: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """What happened, or nothing after `patience` seconds (None: no limit).

        While somebody waits for an answer, and one thing happens at a time and soon after the last, as with a single
        client and its worker, it asks on for a moment before it sleeps (busy polling): to be woken takes longer than
        what is waited for. (A client that only asks and is answered was served faster by a thread that had slept.)
        """
        began, events = self._clock.monotonic(), []
        spins = self._spins if self._brisk and self.waiting else 0
        for _ in range(spins):
            events = self.selector.select(0)
            if events or self._clock.monotonic() - began > self.BRISK:
                break
        caught = bool(events)
        if not caught:
            events = self.selector.select(patience)
        near = len(events) == 1 and self._clock.monotonic() - began < self.BRISK
        self._brisk = near and (caught or not spins)  # having asked in vain, it sleeps once without
        return events

    def _run_posted(self) -> None:
        posted = self._posted
        while posted:
            try:
                while posted:
                    posted.popleft()()
            except Exception:  # whatever it was: the others are served
                log.exception("serving_failed")

    @staticmethod
    def _run(call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception:  # whatever it was: the others are served
            log.exception("serving_failed")

    def plan_of(self, block: bytes, peer: str) -> tuple[Plan, str | None, str | None]:
        """The plan of a head, the job's id and lease token; of a large one it is not kept, so that little is kept."""
        if len(block) > self.usual_head:
            plan = self._planner.plan(block, peer)
            return plan, plan.job_id, plan.token
        own = _OWN.match(block)
        if own:
            try:
                return self._known_kind(own[1], block[own.end() :], peer), own[2].decode(), own[3].decode()
            except JobQueueError:
                pass  # it is raised below, about this very request
        plan = self._known_plan(block, peer)
        return plan, plan.job_id, plan.token

    def _plan_of_kind(self, start: bytes, end: bytes, peer: str) -> Plan:
        """The plan that all heads share which differ in job and lease token alone: any id and token stand for them."""
        return self._planner.plan(start + b"0?lease_token=0" + end, peer)

    def arm(self, timed: Connection | HTTPServer, when: float) -> None:
        """Have its `expire` called then, or earlier."""
        self.timers.set(timed, when)
        self._due = min(self._due, when)

    def post(self, call: Callable[[], None]) -> None:
        """Have the serving thread call this, after one wake-up for all that is posted. That thread itself calls it now
        or, amid a turn of many events, at the end of the turn: whoever has many connections is woken once for all of
        their answers, and comes back with as many requests."""
        here = threading.get_ident() == self._serving
        if here and not self._together:
            call()
            return
        self._posted.append(call)
        if not (here or self._awake):
            self._awake = True
            with contextlib.suppress(OSError):
                self._wake_out.send(b"x")

    def soon(self, call: Callable[[], None]) -> None:
        """The serving thread calls this at the end of its turn. It may answer another connection, which goes on with
        what answers a third: called at once, hundreds of them would stand on one stack."""
        self._posted.append(call)

    def _woken(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)
        self._awake = False

    def _accept(self, mask: int) -> None:
        self._longest_idle = None
        for _ in range(64):
            if self.tls and self._is_packed() and not self._make_room():  # to be refused they would have to shake hands
                self._pause()
                return
            try:
                sock, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    if self._make_room():
                        continue
                    self._back_off(error)
                    return
                continue  # the client was gone before it was accepted
            try:
                self._admit(sock, address)
            except (OSError, ValueError):  # gone before it was looked at
                sock.close()

    def _admit(self, sock: socket.socket, address: Any) -> None:
        sock.setblocking(False)
        full = len(self.connections) >= self.max_connections and not self._make_room()
        refusal = JobQueueError("too_many_clients", "too many connections; try again") if full else None
        if refusal and self._is_packed():
            self._turn_away(sock, refusal)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls:
            sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        connection = self.RequestHandlerClass(sock, address, self)
        self.connections.add(connection)
        if refusal:
            connection.refuse_at_once(refusal)

    def _is_packed(self) -> bool:
        """Are there so many too many that not even a refusal may take a place?"""
        return len(self.connections) >= self.max_connections + min(64, self.max_connections // 2)

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest. They are looked for once for all that come together."""
        if self._longest_idle is None:
            idle = [connection for connection in self.connections if connection.idle_for(self.now) >= self.GRACE]
            self._longest_idle = sorted(idle, key=lambda connection: connection.deadline, reverse=True)
        while self._longest_idle:
            connection = self._longest_idle.pop()
            if connection.idle_for(self.now) >= self.GRACE and not connection.has_more():
                connection.close()
                return True
        return False

    def _turn_away(self, sock: socket.socket, error: JobQueueError) -> None:
        """Refuse without waiting for what it asks."""
        with contextlib.suppress(OSError):
            sock.send(render(error_response(error), False, self.date))
            sock.shutdown(socket.SHUT_WR)
        sock.close()

    def _back_off(self, error: OSError) -> None:
        """Out of file descriptors: accepting again at once would only burn the processor."""
        if self.now >= self._tell_again:
            self._tell_again = self.now + 1
            log.error("accept_failed error=%s: pausing", error)
        self._pause()

    def _pause(self) -> None:
        """Accept nothing for a while, or until a connection closes."""
        self.selector.unregister(self.socket)
        self._paused = True
        self.arm(self, self.now + 0.25)

    def expire(self, now: float) -> None:
        self._paused = False
        if self.socket.fileno() >= 0 and not self.stopping:
            self.selector.register(self.socket, _READ, self._accept)

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.timers.cancel(connection)
        if self._paused:
            self.arm(self, self.now)

    # -- a request

    def process_request_thread(self, request: tuple[Plan, Request], connection: Connection) -> None:
        """A thread of its own for a slow handler; ThreadingMixIn.process_request starts it."""
        plan, request = request
        try:
            answer = plan.handle(request)
        except Exception as error:
            answer = error_response(refusal_of(error))
        self.post(functools.partial(connection.take, answer))

    def _look_at_the_clock(self) -> None:
        """Once for all the events of one turn of the loop."""
        self.now = self._clock.monotonic()
        second = int(self._clock.time())
        if second != self._second:
            self._second, self.date = second, email.utils.formatdate(second, usegmt=True)

    def count(self, plan: Plan, status: int, started: float, peer: str) -> None:
        """For /metrics and the access log."""
        seen = plan.seen.get(status)
        if seen is None:
            seen = plan.seen[status] = Histogram()
        seconds = self._clock.monotonic() - started if started else 0.0
        seen.observe(seconds)
        if self._access_log:
            method, path = (plan.route.method, plan.route.path) if plan.route else ("-", "-")
            line = "request peer=%s method=%s path=%s status=%d seconds=%.6f"
            log.info(line, peer, method, path, status, seconds)

    # -- the end

    def finish(self, seconds: float) -> None:
        """Accept nothing more, let answers that are on their way go out, close what is idle."""
        done = threading.Event()

        def stop() -> None:
            self.stopping = True
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(self.socket)
            _close_socket(self.socket)
            for connection in list(self.connections):
                self._run(connection.stop, seconds)
            done.set()

        self.post(stop)
        done.wait(seconds)

    def abort(self) -> None:
        """Close whatever is still open."""

        def close() -> None:
            for connection in list(self.connections):
                connection.close()

        self.post(close)

    def server_close(self) -> None:
        self.socket.close()
        self.selector.close()
        self._wake_in.close()
        self._wake_out.close()


def _file_limit() -> float:
    """How many files, sockets among them, this process may have open."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return math.inf if limit == resource.RLIM_INFINITY else limit
    return math.inf


def _room(settings: Settings, files: float) -> tuple[int, int]:
    """How many connections, and how many held clients among them, there can be.

    Files are kept for the journal, gRPC and the program around: 256, of few the half. Connections are kept for workers,
    since without them no held client ever gets its result: where fewer than 64 (of few, a quarter) would be left, held
    clients get three quarters.
    """
    connections = max(1, int(min(settings.max_connections, files - min(256, files / 2))))
    for_workers = min(64, -(-connections // 4))
    held = settings.max_held
    return connections, held if held <= connections - for_workers else connections * 3 // 4


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _naming(files: str) -> Iterator[None]:
    """What OpenSSL says about files does not name them."""
    try:
        yield
    except OSError as error:
        why = getattr(error, "reason", None) or error.strerror or str(error)
        raise ValueError(f"cannot use {files}: {why.replace('_', ' ').lower()}") from None


def load_certificate(context: ssl.SSLContext, flags: tuple[str, str], cert: str, key: str | None) -> None:
    """A certificate and its key into `context`; ValueError says by its flag which file is wrong."""
    cert_flag, key_flag = flags
    holder = f"{key_flag} {key}" if key else f"{cert_flag} {cert}"

    def ask_nobody() -> str:  # OpenSSL would ask at the terminal, which a service has not
        raise ValueError(f"{holder} is encrypted: give a key that has no pass phrase")

    readable(cert_flag, cert, "CERTIFICATE")
    if key:
        readable(key_flag, key, "PRIVATE KEY")
    else:
        try:
            readable(cert_flag, cert, "PRIVATE KEY")
        except ValueError:
            raise ValueError(f"{cert_flag} {cert} holds no key: give {key_flag}") from None
    with _naming(f"{cert_flag} {cert}" + (f" with {holder}" if key else "")):
        context.load_cert_chain(cert, key, ask_nobody)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """The server's TLS, or None; ValueError names the file that is missing or wrong."""
    if not settings.tls_cert:
        if settings.tls_key or settings.tls_client_ca:
            raise ValueError("--tls-key and --tls-client-ca need --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_certificate(context, ("--tls-cert", "--tls-key"), settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca:
        with _naming(f"--tls-client-ca {settings.tls_client_ca}"):
            context.load_verify_locations(readable("--tls-client-ca", settings.tls_client_ca, "CERTIFICATE"))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


# == gRPC ==============================================================================================================
# The worker service: message -> verb -> message. grpcio is imported when a server starts with gRPC, so that without
# it the rest runs. A call is answered by whoever has its answer, as over HTTP, and none has a thread of its own.


class GrpcUnavailable(Exception):
    """grpcio is not installed, or does not go with the generated code."""


def _import_grpc() -> tuple[Any, Any, Any]:
    quiet = "GRPC_VERBOSITY" not in os.environ
    if quiet:  # what peers do wrong is not for our stderr; it is read at the import, and is the program's again then
        os.environ["GRPC_VERBOSITY"] = "ERROR"
    try:
        import grpc

        if not hasattr(grpc, "server"):
            raise ImportError(f"what Python found as grpc is not grpcio: {list(grpc.__path__)}")
        from worker_pb2_gen import worker_pb2, worker_pb2_grpc
    except Exception as error:  # a version that does not fit raises more than ImportError
        advice = "run: pip install grpcio protobuf grpcio-reflection grpcio-health-checking"
        if getattr(error, "name", None) == "worker_pb2_gen":
            advice = "put the folder worker_pb2_gen beside jobqueue.py"
        raise GrpcUnavailable(f"{type(error).__name__}: {error}: for gRPC workers {advice}") from None
    finally:
        if quiet:
            del os.environ["GRPC_VERBOSITY"]
    return grpc, worker_pb2, worker_pb2_grpc


Begun = tuple[Future, Callable[[Any], Any]]  # what a call waits for, and what makes the answer's message of it


class WorkerServicer:
    """One method for each of worker.proto's, (request, context) -> Begun; each has the meaning of the HTTP route
    beside it."""

    BATCH_BYTES = 4 * MIB - 64 * KIB  # what a client takes by default, with some room for framing

    def __init__(self, service: JobService, messages: Any, most_polls: int) -> None:
        self._service, self._engine, self._messages = service, service.engine, messages
        self._polls = threading.BoundedSemaphore(most_polls)

    # -- the original's two

    def RequestJob(self, request: Any, context: Any) -> Begun:
        """GET /api/worker/poll"""
        return self._poll(self._claim(request, context)._replace(max=1), context, self._first)

    def CompleteJob(self, request: Any, context: Any) -> Begun:
        """POST /api/worker/complete/<id>"""
        claim = self._claim(request.next_request, context)._replace(max=1) if request.next else None
        begin = functools.partial(self._service.complete, *_handed_in(request))
        future = self._line_up(begin, claim, context) or begin(claim._replace(wait=0.0))  # the result counts anyway
        return future, functools.partial(self._completed, context)

    # -- what was added

    def RequestJobs(self, request: Any, context: Any) -> Begun:
        """GET /api/worker/poll?max=N; ends early where the answer would not fit a client's 4 MiB."""
        return self._poll(self._claim(request, context), context, self._jobs)

    def CompleteJobs(self, request: Any, context: Any) -> Begun:
        """POST /api/worker/complete"""
        results = [_handed_in(result) for result in request.results]
        return self._service.complete_many(results), functools.partial(self._all_completed, results)

    def FailJob(self, request: Any, context: Any) -> Begun:
        """POST /api/worker/fail/<id>"""
        retry = request.retry if request.HasField("retry") else None
        delay = checked(_DELAY, "delay_seconds", request.delay_seconds) if request.HasField("delay_seconds") else None
        self._service.check_size(request.error.encode(), job_id=request.job_id)
        future = self._service.fail(request.job_id, request.lease_token or None, request.error, retry, delay)
        return future, self._failed

    def ReleaseJob(self, request: Any, context: Any) -> Begun:
        """POST /api/worker/release/<id>"""
        outcome = self._engine.release(request.job_id, request.lease_token or None)
        return Future.of(outcome), lambda outcome: self._messages.ReleaseResponse(duplicate=outcome.duplicate)

    def ExtendLease(self, request: Any, context: Any) -> Begun:
        """POST /api/worker/extend/<id>"""
        lease = checked(_LEASE, "lease_seconds", request.lease_seconds) if request.lease_seconds else None
        return Future.of(self._engine.extend(request.job_id, request.lease_token or None, lease)), self._extended

    # -- asking

    def _claim(self, request: Any, context: Any) -> Claim:
        """A JobRequest; an empty one, as the original's clients send it, asks for one job of `default` at once."""
        queues = checked(_distinct_queues, "queues", request.queues) or ("default",)
        lease = checked(_LEASE, "lease_seconds", request.lease_seconds) if request.lease_seconds else None
        most = checked(_MAX, "max", request.max) if request.max else 1
        worker = checked(_label, "worker", request.worker) or _peer_of(context)
        wait = checked(_WAIT, "wait_seconds", request.wait_seconds) if request.wait_seconds else 0.0
        return Claim(queues, most, lease, wait, worker)

    def _poll(self, claim: Claim, context: Any, shape: Callable[[list[Job]], Any]) -> Begun:
        future = self._line_up(self._engine.poll, claim, context)
        full = future is None

        def answer(jobs: list[Job]) -> Any:
            if jobs:
                self._give_back_if_lost(jobs, context)
            elif full:
                raise JobQueueError("too_many_clients", "too many long polls over gRPC; poll without wait")
            return shape(jobs)

        return self._engine.poll(claim._replace(wait=0.0)) if full else future, answer

    def _line_up(self, begin: Callable[[Claim | None], Future], claim: Claim | None, context: Any) -> Future | None:
        """begin(claim); a caller that hangs up leaves the line. None, and nothing begun, where too many wait."""
        if claim is None or not claim.wait:
            return begin(claim)
        if not self._polls.acquire(blocking=False):
            return None
        try:
            future = begin(claim)
        except BaseException:
            self._polls.release()
            raise
        future.add_done_callback(lambda _: self._polls.release())
        if not (future.done() or context.add_callback(future.cancel)):
            future.cancel()
        return future

    def _give_back_if_lost(self, jobs: list[Job], context: Any) -> None:
        """When the call ends, see whether the caller had left before its answer could be written.

        grpcio tells that in no public place once the answer is on its way: hence the look inside.
        """

        def ended() -> None:
            if getattr(getattr(context, "_state", None), "client", None) == "cancelled":
                self._service.give_back(jobs)

        if not context.add_callback(ended):
            self._service.give_back(jobs)

    # -- answering

    def _first(self, jobs: list[Job]) -> Any:
        if not jobs:
            raise JobQueueError("no_jobs", "no jobs available")
        return self._job(jobs[0])

    def _jobs(self, jobs: list[Job]) -> Any:
        messages, size = [], 0
        for number, job in enumerate(jobs):
            message = self._job(job)
            size += message.ByteSize() + 16
            if messages and size > self.BATCH_BYTES:
                self._service.give_back(jobs[number:])
                break
            messages.append(message)
        return self._messages.Jobs(jobs=messages)

    def _completed(self, context: Any, outcome: Outcome) -> Any:
        answer = self._messages.CompleteResponse(success=True, duplicate=outcome.duplicate)
        if outcome.next:
            self._give_back_if_lost([outcome.next], context)
            answer.next.CopyFrom(self._job(outcome.next))
        return answer

    def _all_completed(self, results: list[tuple], outcomes: list[Outcome | JobQueueError]) -> Any:
        rows = []
        for (job_id, *_), outcome in zip(results, outcomes, strict=True):
            row = self._messages.CompleteResult(job_id=job_id, status=200)
            if isinstance(outcome, JobQueueError):
                row.status, row.code = outcome.status, outcome.code
            else:
                row.duplicate = outcome.duplicate
            rows.append(row)
        return self._messages.CompleteResults(results=rows)

    def _failed(self, outcome: Outcome) -> Any:
        retry_in = outcome.job.delay if outcome.job.state == "delayed" else 0.0
        return self._messages.FailResponse(
            status=outcome.job.state, retry_in_seconds=retry_in, duplicate=outcome.duplicate
        )

    def _extended(self, outcome: Outcome) -> Any:
        job = outcome.job
        cancelled = job.state == "cancelled"
        return self._messages.ExtendResponse(
            lease_seconds=0 if cancelled else job.lease_seconds, cancelled=cancelled, status=job.state
        )

    def _job(self, job: Job) -> Any:
        data = {"payload_bytes": job.payload} if job.kind == "binary" else {"payload": job.payload.decode()}
        expires = iso_time(job.expires) if job.expires is not None else ""
        return self._messages.Job(
            id=job.id,
            headers=_headers_of(job.headers),
            queue=job.queue,
            priority=job.priority,
            attempt=job.failures + 1,
            lease_token=job.token,
            lease_seconds=job.lease_seconds,
            created_at=iso_time(job.created),
            expires_at=expires,
            **data,
        )


_known_headers = functools.lru_cache(512)(json.loads)


def _headers_of(text: str) -> dict[str, str]:
    """A submitter's headers; those of many jobs are alike."""
    return (_known_headers if len(text) <= 2048 else json.loads)(text)


def _handed_in(result: Any) -> tuple[str, str | None, bytes, str | None]:
    """job_id, token, result, content_type; a string that is not set comes as an empty one."""
    if result.payload and result.payload_bytes:
        raise JobQueueError("invalid_request", "give the result as payload or as payload_bytes, not as both")
    payload = result.payload_bytes or result.payload.encode()
    return result.job_id, result.lease_token or None, payload, result.content_type or None


def _peer_of(context: Any) -> str:
    return _host_of(context.peer())


@functools.lru_cache(512)
def _host_of(peer: str) -> str:
    """ipv4:127.0.0.1:4711 -> 127.0.0.1"""
    return urllib.parse.unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")


def _address(host: str, port: int) -> str:
    """As in a URL, where an IPv6 address has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _try_port(host: str, port: int) -> None:
    """OSError when the port cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        if os.name != "nt":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1)


class _Method:
    """One method of the worker service: permission, verb, figures, errors.

    `begin` waits for nothing. Called as grpcio does, with a thread for each call, it waits for the answer.
    """

    DETAIL = 500  # characters of an error's detail: metadata, of which clients take 8 KiB, percent-encoded

    def __init__(
        self, verb: Callable[[Any, Any], Begun], access: Access, clock: Clock, count: Callable[..., None], codes: Any
    ) -> None:
        self._verb, self._access, self._clock, self._count, self._codes = verb, access, clock, count, codes

    def begin(self, request: Any, context: Any, reply: Callable[[Any, JobQueueError | None], None]) -> None:
        """Have `reply` called with the answer's message, or with what went wrong, by whoever has it."""
        began = self._clock.monotonic()

        def answer(future: Future) -> None:
            message, problem = None, None
            try:
                message = shape(future.result())
            except Exception as error:
                # Its traceback has the frames of this call, which has the error: no cycle, for each poll without a job.
                problem = refusal_of(error).with_traceback(None)
            try:
                status = problem.grpc_status if problem else "OK"
                self._count(self._verb.__name__, status, self._clock.monotonic() - began, context)
            finally:  # a program's log filter may raise
                reply(message, problem)

        try:
            if not self._access.open:
                given = [value for name, value in context.invocation_metadata() if name == "authorization"]
                self._access.check(", ".join(given) or None, "worker")  # two are none, as over HTTP
            future, shape = self._verb(request, context)
        except Exception as error:
            future, shape = Future.of(error), None
        future.add_done_callback(answer)

    def refusal(self, problem: JobQueueError, context: Any) -> tuple[Any, str]:
        """Status and details; the code goes into the trailing metadata."""
        context.set_trailing_metadata((("code", problem.code),))
        detail = problem.detail
        if len(detail) > self.DETAIL:
            detail = detail[: self.DETAIL] + "..."
        return getattr(self._codes, problem.grpc_status), detail

    def __call__(self, request: Any, context: Any) -> Any:
        replied = Future()
        self.begin(request, context, lambda *reply: replied.set_result(reply))
        message, problem = replied.result()
        if problem:
            context.abort(*self.refusal(problem, context))
        return message


def _inside_of_grpc() -> Any | None:
    """The module in which grpcio's server is; None where there is none of its name."""
    try:
        from grpc import _server
    except ImportError:
        return None
    return _server


class _Calls:
    """Has grpcio's calls made, in the place of the ThreadPoolExecutor that it asks for.

    grpcio gives each call a thread, which waits for the message and then for the answer. To go from thread to thread is
    a third of what a durable completion and the next poll cost, and no more can wait than there are threads. So a call
    of a _Method gets none: where grpcio tells that the message is there, the verb is called, and whoever has the answer
    sends it. For that one has to know how grpcio makes a call (`inside`, of 1.51 to 1.85). What else there is (health,
    reflection) gets its thread, and so does every call where grpcio is not as it is known here.
    """

    KNOWN = {
        "_receive_message": "state call request_deserializer",
        "_unary_response_in_pool": "rpc_event state behavior argument_thunk request_deserializer response_serializer",
        "_status": "rpc_event state serialized_response",
        "_Context.__init__": "self rpc_event state request_deserializer",
    }

    def __init__(self, inside: Any, threads: int) -> None:
        self._inside, self.direct = inside, self._is_known(inside)
        self._crew = _Crew(threads, "jobqueue-grpc")
        self._crew.add()  # without one, a call would be made by the thread that has to tell it of its message

    @classmethod
    def _is_known(cls, inside: Any) -> bool:
        """Do the functions that are used have the parameters that they had in all versions seen?"""
        try:
            codes = {name: operator.attrgetter(name)(inside).__code__ for name in cls.KNOWN}
        except AttributeError:
            return False
        return {name: " ".join(code.co_varnames[: code.co_argcount]) for name, code in codes.items()} == cls.KNOWN

    def submit(self, call: Callable, /, *args: Any, **named: Any) -> Future:
        how, *about = (call, *args)[-7:]  # in newer ones behind a context to run it in
        if self.direct and how is self._inside._unary_response_in_pool and isinstance(about[2], _Method):
            self._receive(*about)
            return Future.of(None)
        future = Future()
        self._crew.do(lambda: future.answer_by(functools.partial(call, *args, **named)))
        return future

    def _receive(self, event: Any, state: Any, method: _Method, _: Any, parse: Callable, serialize: Callable) -> None:
        """Ask for the message, and go on when it is there."""
        inside = self._inside
        context, parsed = inside._Context(event, state, parse), inside._receive_message(state, event.call, parse)

        def guarded(step: Callable, *arguments: Any) -> None:
            """Whichever thread it is has others to serve; a caller that can get no answer is told that."""
            try:
                step(*arguments)
            except BaseException:
                log.exception("grpc_call_failed")
                event.call.cancel()

        def send(message: Any, problem: JobQueueError | None) -> None:
            if problem:
                status, details = method.refusal(problem, context)
                context.set_code(status)
                context.set_details(details)
            inside._status(event, state, None if problem else serialize(message))

        def received(got: Any) -> Any:
            ended = parsed(got)
            request, state.request = state.request, None
            if request is not None:
                guarded(method.begin, request, context, functools.partial(guarded, send))
            elif not state.statused:  # where the message could not be parsed, that has been told
                guarded(send, None, JobQueueError("invalid_request", "the call ended without its message"))
            return ended

        with state.condition:
            event.call.start_server_batch((inside.cygrpc.ReceiveMessageOperation(0),), received)
            state.due.add(inside._RECEIVE_MESSAGE_TOKEN)

    def shutdown(self, wait: bool = True) -> None:
        """The threads end, each when it has nothing to do; nobody waits for them."""
        self._crew.end()


class GrpcServer:
    """The gRPC side of a server: worker service, health, reflection."""

    SERVICE = "worker.WorkerService"

    def __init__(self, service: JobService, settings: Settings, clock: Clock) -> None:
        self._grpc, messages, stubs = _import_grpc()
        self._service, self._clock, self._access_log = service, clock, settings.access_log
        self.requests: dict[tuple[str, str], Histogram] = {}
        self._counting = threading.Lock()
        self._calls = _Calls(_inside_of_grpc(), settings.grpc_threads)
        most_polls = settings.max_connections if self._calls.direct else settings.grpc_threads * 3 // 4
        servicer = WorkerServicer(service, messages, most_polls)
        limit = max(settings.max_batch, settings.max_payload) + 64 * KIB
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            # Those of a burst that Python has not come to yet: of more than 1,000 the core refuses some.
            ("grpc.server.max_pending_requests", 1_000_000),
            ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
        ]
        self._server = self._grpc.server(self._calls, options=options)
        self._add_service(servicer, messages, stubs)
        self._health = self._add_health()
        self._add_reflection()
        try:
            self.port = self._bind(settings)
        except BaseException:
            self.stop(0)
            raise
        self._server.start()

    def _bind(self, settings: Settings) -> int:
        address = _address(settings.host, settings.grpc_port)
        try:
            _try_port(settings.host, settings.grpc_port)  # gRPC's core would say it on stderr, in its own way
            if settings.tls_cert:
                port = self._server.add_secure_port(address, self._credentials(settings))
            else:
                port = self._server.add_insecure_port(address)
            reason = "" if port else "gRPC says no more"
        except (RuntimeError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if reason:
            advice = f"cannot listen on {address} for gRPC ({reason}); choose another --grpc-port, or off"
            raise OSError(errno.EADDRINUSE, advice)
        return port

    def _credentials(self, settings: Settings) -> Any:
        def content(path: str) -> bytes:
            with open(path, "rb") as file:
                return file.read()

        pair = content(settings.tls_key or settings.tls_cert), content(settings.tls_cert)
        ca = content(settings.tls_client_ca) if settings.tls_client_ca else None
        return self._grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)

    def _add_service(self, servicer: WorkerServicer, messages: Any, stubs: Any) -> None:
        """The generated registration, each method with permissions, errors and figures."""
        methods = messages.DESCRIPTOR.services_by_name["WorkerService"].methods_by_name
        shared = self._service.access, self._clock, self._count, self._grpc.StatusCode
        guarded = {name: _Method(getattr(servicer, name), *shared) for name in methods}
        stubs.add_WorkerServiceServicer_to_server(types.SimpleNamespace(**guarded), self._server)

    def _count(self, name: str, code: str, seconds: float, context: Any) -> None:
        with self._counting:
            seen = self.requests.get((name, code))
            if seen is None:
                seen = self.requests[name, code] = Histogram()
            seen.observe(seconds)
        if self._access_log:
            log.info("request peer=%s grpc=%s status=%s seconds=%.6f", _peer_of(context), name, code, seconds)

    def _add_health(self) -> Any:
        try:
            from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        except Exception:
            return None
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        for name in ("", self.SERVICE):
            servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        return servicer

    def _add_reflection(self) -> None:
        with contextlib.suppress(Exception):  # not installed: the service itself works without
            from grpc_reflection.v1alpha import reflection

            names = [self.SERVICE, reflection.SERVICE_NAME, *(["grpc.health.v1.Health"] if self._health else [])]
            reflection.enable_server_reflection(names, self._server)

    def drain(self) -> None:
        if self._health:
            self._health.enter_graceful_shutdown()

    def stop(self, seconds: float) -> None:
        self._server.stop(seconds).wait()
        self._calls.shutdown()


# == Server ============================================================================================================
# Wiring, and the interface for programs: start, drain, stop.


class Server:
    """A job queue in your program.

        with jobqueue.Server(data_dir="data", port=0, grpc_port=None) as server:
            result = server.submit(b'{"x": 1}').result(timeout=30)

    Settings are those of the command line, with underscores; `clock` is for tests. `engine` makes another Engine than
    LocalEngine, of the settings, the clock, and a function to call once nothing can be acknowledged any more.

    It installs no signal handlers, keeps no global state and prints nothing; it logs to the logger `jobqueue`. Raises
    ValueError for settings, DataError for the data folder, DiskError for a disk that fails at the start, OSError for a
    port that is taken.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        engine: Callable[[Settings, Clock, Callable[[], None]], Engine] = LocalEngine,
        **settings: Any,
    ) -> None:
        self.settings, self.clock, self._make_engine = Settings(**settings), clock or Clock(), engine
        self._check_exposure()
        self.failed = threading.Event()  # set when the disk failed and nothing more can be acknowledged
        self.stopped = threading.Event()
        self._drained = threading.Event()  # set when no job is in progress any more, or nobody wants to wait for it
        self._on_failure: list[Callable[[], None]] = []
        self._lock = threading.Lock()  # held while the stop begins
        self._stop: Future | None = None  # answered when it has come to its end
        self._tellers = _Crew(32, "jobqueue-tell")  # tell programs of results: a callback that hangs holds up no other
        self._deputy = _Crew(1, "jobqueue-deputy")  # does what the main thread must not be interrupted in
        self._grpc: GrpcServer | None = None
        self._started, self._process = False, 0  # the process that started it

    def __getattr__(self, name: str) -> Any:
        if name in ("engine", "service", "_http"):
            raise RuntimeError("the server was not started: call start(), or use it as in `with Server() as server:`")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check_exposure(self) -> None:
        host = self.settings.host
        local = host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
        if not (local or self.settings.tokens or self.settings.insecure):
            raise ValueError(f"--host {host} lets everybody in who can reach it: add --tokens FILE, or --insecure")

    # -- start

    def start(self) -> Server:
        """Read the journal, then listen. RuntimeError: it was started before; a Server is for one run.

        An interrupt (KeyboardInterrupt) while it reads ends the wait; what was started is stopped again."""
        if self._started:
            raise RuntimeError("a Server is started once; make another one")
        try:
            self._apart(self._start, undo=lambda _: self.stop(drain=0))
        except BaseException:
            self._deputy.end()
            raise
        return self

    def _start(self) -> None:
        settings = self.settings
        tls_context(settings)  # what is wrong with these files is told before the journal is read
        Access(settings.tokens)
        self.engine = self._make_engine(settings, self.clock, self._disk_failed)
        try:
            self._listen(settings)
        except BaseException:
            self.engine.close()
            raise
        self._started, self._process = True, os.getpid()
        grpc = _address(settings.host, self.grpc_port) if self._grpc else "off"
        log.info("ready http=%s grpc=%s data=%s fsync=%s", self.url, grpc, settings.data_dir, settings.fsync)

    def _listen(self, settings: Settings) -> None:
        self.service = JobService(self.engine, settings, self.clock)
        api = HttpApi(self.service, self._pages())
        try:
            self._http = HTTPServer((settings.host, settings.port), api, self.service, settings, self.clock)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot listen on {_address(settings.host, settings.port)}: {error.strerror}; choose another --port",
            ) from None
        self._thread = threading.Thread(target=self._http.serve_forever, name="jobqueue-http", daemon=True)
        try:
            if settings.grpc_port is not None:
                self._grpc = self._grpc_server()
            self._thread.start()
        except BaseException:
            self._http.server_close()
            if self._grpc:
                self._grpc.stop(0)
            raise

    def _grpc_server(self) -> GrpcServer | None:
        try:
            return GrpcServer(self.service, self.settings, self.clock)
        except GrpcUnavailable as error:
            log.warning("grpc_off reason=%s", error)
            return None

    def _pages(self) -> dict[str, Callable[[Request], Response]]:
        """Handlers of the routes that are not about jobs, by their names."""
        document = json_text(openapi(ROUTES)).encode()
        page = Response(200, DASHBOARD.encode(), "text/html; charset=utf-8", _page_headers(DASHBOARD))
        return {
            "openapi": lambda _: Response(200, document),
            "dashboard": lambda _: page,
            "metrics": lambda _: Response(200, self._metrics().encode(), "text/plain; version=0.0.4; charset=utf-8"),
        }

    def _metrics(self) -> str:
        figures = queue_figures(self.service.stats(), self.engine.figures())
        figures["jobqueue_connections"] = [({}, len(self._http.connections))]
        figures["jobqueue_http_request_duration_seconds"] = [
            ({"method": method, "route": path, "status": status}, histogram)
            for (method, path), seen in list(self._http.requests.items())
            for status, histogram in list(seen.items())
        ]
        if self._grpc:
            figures["jobqueue_grpc_request_duration_seconds"] = [
                ({"method": method, "code": code}, histogram)
                for (method, code), histogram in list(self._grpc.requests.items())
            ]
        return metrics_text(figures)

    @property
    def port(self) -> int:
        """The HTTP port, also where the system chose it."""
        return self._http.server_port

    @property
    def grpc_port(self) -> int | None:
        """The gRPC port; None where gRPC is off."""
        return self._grpc.port if self._grpc else None

    @property
    def url(self) -> str:
        """Where the HTTP side is, as in http://127.0.0.1:3000."""
        return f"{'https' if self.settings.tls_cert else 'http'}://{_address(self.settings.host, self.port)}"

    # -- in a program

    def submit(
        self,
        payload: bytes | str,
        *,
        queue: str = "default",
        key: str | None = None,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> concurrent_futures.Future:
        """Submit a job; a Future of the result's bytes.

        Options: priority, delay, ttl, lease, attempts, as over HTTP; so are the headers: what is private to a
        connection is left out, ValueError tells what is malformed. JobQueueError: it was not accepted, as its code says
        (queue_full, draining, disk_full, key_reused ...). The future's `result` raises JobQueueError when the job
        failed, expired or was cancelled, and TimeoutError (the job goes on). Cancelling it does not cancel the job;
        `server.cancel(future.job_id)` does.
        """
        options = {name: _checked_option(name, value) for name, value in {**options, "queue": queue}.items()}
        headers = headers or {}
        if not isinstance(headers, dict) or not all(isinstance(text, str) for pair in headers.items() for text in pair):
            raise TypeError(f"headers must be a dict of str to str, got {headers!r}")
        forwarded = headers_of_program(headers, self.settings.max_headers) if headers else "{}"
        terms = self.service.terms(forwarded, options, key)
        return _result_future(self._apart(self.service.submit, _as_bytes(payload), terms, None), self._tellers)

    def _apart(self, verb: Callable, *arguments: Any, undo: Callable[[Any], None] = lambda _: None) -> Any:
        """Do it where no KeyboardInterrupt arrives, nor what else a signal's handler raises: Python raises that in the
        main thread, also amid a write. `undo` gets what the verb returns where the caller is interrupted meanwhile."""
        if self._elsewhere():
            raise RuntimeError("the server runs in the process that started it, and this is a child of that")
        if threading.current_thread() is not threading.main_thread():
            return verb(*arguments)
        task = Future()
        try:
            self._deputy.do(functools.partial(task.answer_by, functools.partial(verb, *arguments)))
            return task.result()
        except BaseException:
            task.add_done_callback(lambda task: isinstance(task.outcome, BaseException) or undo(task.outcome))
            raise

    def _elsewhere(self) -> bool:
        """Is this another process, forked from the server's? Threads are not forked, and its files are not to be
        written to from there."""
        return self._process not in (0, os.getpid())

    def cancel(self, job_id: str) -> None:
        """Cancel a job; JobQueueError when there is none, or it has come to its end."""
        self._apart(self.engine.cancel, job_id).result()

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as GET /api/jobs shows it: status, attempts, times, error; JobQueueError when there is none."""
        return job_view(self._apart(self.engine.view, job_id, 0).result())

    def jobs(self, *queues: str, lease: float | None = None, worker: str = "in-process") -> Iterator[LeasedJob]:
        """Take the jobs of these queues (none: default) one by one, waiting for each, until the server stops.

        `lease`: seconds for each job (None: what the job or the server says). ValueError: a queue or a worker cannot
        have that name, or a lease that length.
        """
        queues = _distinct_queues("queues", queues) or ("default",)
        lease = None if lease is None else _LEASE("lease", lease)
        return self._leased(Claim(queues, 1, lease, 3600.0, _label("worker", worker)))

    def _leased(self, claim: Claim) -> Iterator[LeasedJob]:
        while True:
            try:
                future = self._apart(self.engine.poll, claim, undo=self._let_go)
                try:
                    jobs = [LeasedJob(self.service, job, self._apart) for job in future.result()]
                except BaseException:
                    self._apart(self._let_go, future)
                    raise
                if not jobs and self.engine.draining():
                    return
            except JobQueueError as error:
                if error.code == "draining":
                    return
                if error.code != "disk_full":
                    raise
                jobs = []
                self._drained.wait(1.0)  # until the disk takes leases again
            yield from jobs

    def _let_go(self, poll: Future) -> None:
        """Nobody takes its answer any more."""
        if not poll.cancel():  # its answer is there, or on its way
            poll.add_done_callback(self._give_back)

    def _give_back(self, poll: Future) -> None:
        if isinstance(poll.outcome, list):
            self.service.give_back(poll.outcome)

    # -- stop

    def stop(self, drain: float | None = None) -> None:
        """Take no more jobs, wait up to `drain` seconds (None: as set) for those in progress, answer all, close.

        An interrupt (KeyboardInterrupt) ends the wait for that, and not the stop; another call waits for its end."""
        if not self._started or self._elsewhere():
            return
        drain = min(self.settings.drain if drain is None else drain, threading.TIMEOUT_MAX)
        end = self._apart(self._begin_stop, drain)
        try:
            end.result(drain)
        except TimeoutError:
            self._apart(self.hurry)
            end.result()

    def _begin_stop(self, drain: float) -> Future:
        with self._lock:
            if self._stop is None:
                self._stop = Future()
                stop = functools.partial(self._stop.answer_by, functools.partial(self._close, drain))
                try:
                    threading.Thread(target=stop, name="jobqueue-stop", daemon=True).start()
                except RuntimeError:  # none is to be had
                    stop()
            return self._stop

    def _close(self, drain: float) -> None:
        if self._grpc:
            self._grpc.drain()
        self.engine.drain().add_done_callback(lambda _: self._drained.set())
        if not self.failed.is_set():
            self._drained.wait(drain)
        self.engine.close()
        self._http.finish(5.0)
        if self._grpc:
            self._grpc.stop(1.0)
        self._thread.join(6.0)
        self._http.abort()
        self._thread.join()
        self._http.server_close()
        self.stopped.set()
        self._tellers.end()
        self._deputy.end()
        log.info("stopped data=%s", self.settings.data_dir)

    def hurry(self) -> None:
        """From another thread: a `stop` that waits for jobs in progress waits no longer."""
        self._drained.set()

    def when_failed(self, call: Callable[[], None]) -> None:
        """Call this, from some thread, when the disk has failed."""
        self._on_failure.append(call)

    def _disk_failed(self) -> None:
        self.failed.set()

        def tell() -> None:
            for call in self._on_failure:
                call()

        with contextlib.suppress(RuntimeError):  # no thread is to be had: `failed` says it too
            threading.Thread(target=tell, daemon=True).start()

    def responds(self, seconds: float) -> bool:
        """Do the serving thread and the engine answer within that time? False: not yet."""
        answered = threading.Event()

        def ask() -> None:
            self.engine.peek(())
            answered.set()

        self._http.post(ask)
        return answered.wait(seconds)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.stop(drain=0 if kind else None)


class LeasedJob:
    """A job in the hands of a worker in this program: its fields, and complete, fail, release, extend.

    These four raise JobQueueError where it is no longer this worker's (lease_lost, job_finished, job_not_found), or
    where the disk is full; said again, the first three do nothing more. ValueError: a span is out of range.
    """

    def __init__(self, service: JobService, job: Job, apart: Callable) -> None:
        self._service, self._job, self._apart = service, job, apart
        self.id, self.queue, self.payload, self.attempt = job.id, job.queue, job.payload, job.failures + 1
        self.headers: dict[str, str] = json.loads(job.headers)

    def complete(self, result: bytes | str = b"") -> None:
        """Hand in the result; returns when it is on the disk."""
        self._apart(self._service.complete, self.id, self._job.token, _as_bytes(result)).result()

    def fail(self, error: str, *, retry: bool = True, delay: float | None = None) -> None:
        """The attempt failed, for `error`; the next one comes after `delay` seconds (None: 1, 2, 4 ... 300, about)."""
        if not isinstance(error, str):
            raise TypeError(f"the error must be a str, got {type(error).__name__}")
        delay = None if delay is None else _DELAY("delay", delay)
        self._apart(self._service.fail, self.id, self._job.token, error, retry, delay).result()

    def release(self) -> None:
        """Back in line, uncounted."""
        self._apart(self._service.engine.release, self.id, self._job.token)

    def extend(self, lease: float | None = None) -> bool:
        """Keep it for `lease` seconds from now (None: as long as before); False when it was cancelled."""
        lease = None if lease is None else _LEASE("lease", lease)
        outcome = self._apart(self._service.engine.extend, self.id, self._job.token, lease)
        return outcome.job.state != "cancelled"


def _as_bytes(data: bytes | bytearray | memoryview | str) -> bytes:
    """Bytes that nobody else can change."""
    if isinstance(data, str):
        return data.encode()
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"bytes or str are needed, got {type(data).__name__}; json.dumps makes a str of it")
    return bytes(data)


def _checked_option(name: str, value: Any) -> Any:
    if name not in JOB_PARAMETERS:
        raise ValueError(f"unknown option {name!r}; there are {', '.join(JOB_PARAMETERS)}")
    return JOB_PARAMETERS[name][0](name, value)


def _result_future(answer: Future, tellers: _Crew) -> concurrent_futures.Future:
    """A future of the standard library, which asyncio.wrap_future takes too; a thread of `tellers` ends it."""
    future: concurrent_futures.Future = concurrent_futures.Future()
    future.job_id = answer.job_id
    asked = [answer]  # until it is answered: what keeps the future must not keep the payload

    def tell() -> None:
        asked.clear()
        if not future.set_running_or_notify_cancel():
            return
        error = answer.exception()
        job = None if error else answer.result()[0]
        error = error or final_error(job)
        if error is None and job.state != "completed":
            error = JobQueueError(
                "draining", f"the server stopped; job {job.id} is {job.state} and goes on after a restart", job.id
            )
        if error:
            future.set_exception(error)
        else:
            future.set_result(job.result)

    def let_go(future: concurrent_futures.Future) -> None:
        if future.cancelled():
            for answer in asked:
                answer.cancel()

    answer.add_done_callback(lambda _: tellers.do(tell))
    future.add_done_callback(let_go)
    return future


# == Client ============================================================================================================
# What the command line speaks to a server with: http.client and nothing else. Exit codes: what a script wants to tell
# apart has its own.

EXIT_OK, EXIT_NO, EXIT_USAGE, EXIT_DATA = 0, 1, 2, 3
EXIT_UNREACHABLE, EXIT_DISK, EXIT_NOT_YET = 69, 74, 75  # EX_UNAVAILABLE, EX_IOERR, EX_TEMPFAIL of sysexits.h


class Refused(Exception):
    """What was asked for is not done: the exit code and why; where a server said no, the status and body of its
    answer."""

    def __init__(self, code: int, detail: str, status: int = 0, answer: bytes = b"") -> None:
        super().__init__(detail)
        self.code, self.status, self.answer = code, status, answer


class Unreachable(Exception):
    """The server cannot be reached, or hung up, or is none."""

    code = EXIT_UNREACHABLE


class Client:
    """One keep-alive connection to a server. Not for several threads."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        ca: str | None = None,
        certificate: tuple[str, str | None] | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a URL must be like http://127.0.0.1:3000, got {url!r}")
        if not re.fullmatch("[!-~]*", parts.path + parts.query):
            raise ValueError(f"a URL's path and query are ASCII, anything else is percent-encoded, got {url!r}")
        self._url, self._parts, self._path = url, parts, parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        kind, options = http.client.HTTPConnection, {}
        if parts.scheme == "https":
            kind, options = http.client.HTTPSConnection, {"context": self._tls(ca, certificate)}
        # Where none is given, http.client would look for one in the host, and find it in ::1.
        port = kind.default_port if parts.port is None else parts.port  # a ValueError where that is no port
        self._make_connection = functools.partial(kind, parts.hostname, port, **options)
        self._connection: http.client.HTTPConnection | None = None
        self._cut: int | None = None  # how it was shut from another thread, be it before it was there

    @staticmethod
    def _tls(ca: str | None, certificate: tuple[str, str | None] | None) -> ssl.SSLContext:
        with _naming(f"--ca {ca}"):
            context = ssl.create_default_context(cafile=ca and readable("--ca", ca, "CERTIFICATE"))
        if certificate:
            load_certificate(context, ("--cert", "--key-file"), *certificate)
        return context

    def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str | bytes] | None = None,
        *,
        timeout: float | None = 60,
        **query: Any,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of the answer. A query value of None is left out. Raises Unreachable."""
        given = {name: value for name, value in query.items() if value is not None}
        target = self._path + path + ("?" + urllib.parse.urlencode(given, errors="surrogateescape") if given else "")
        try:
            connection = self._connect(timeout)
            with contextlib.suppress(ConnectionError, ssl.SSLError):  # refused before it was sent to its end, perhaps
                connection.request(method, target, body or None, {**self._headers, **(headers or {})})
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unreachable(f"{self._parts.scheme}://{self._parts.netloc}: {error or type(error).__name__}") from None
        if answer.will_close:
            self.close()
        return answer.status, answer.headers, data

    def ask(self, read: Callable[[bytes], Any], method: str, path: str, *given: Any, **options: Any) -> Any:
        """What `read` makes of the body of a jobqueue server's answer; arguments as for `call`.

        Raises Refused where the server says no, and Unreachable where whoever answers is no such server: its error is
        no problem document, or `read` stumbles over what it says.
        """
        status, _, body = self.call(method, path, *given, **options)
        if status >= 300:
            raise self.problem(status, body)
        try:
            return read(body)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._strange(status) from None

    def problem(self, status: int, body: bytes) -> Refused | Unreachable:
        """What to raise for an answer that is an error."""
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            problem = json.loads(body)
            hint = " (--token or JOBQUEUE_TOKEN)" if status == 401 else ""
            if problem["code"]:  # others' errors may have a detail, too
                job_id = problem.get("job_id", "")
                job = f" (job {job_id})" if job_id not in problem["detail"] else ""
                code = EXIT_NOT_YET if status == 503 else EXIT_NO
                return Refused(code, problem["detail"] + job + hint, status, body)
        return self._strange(status)

    def _strange(self, status: int) -> Unreachable:
        return Unreachable(f"{self._url} answered {status}, and not as a jobqueue server does")

    def _connect(self, timeout: float | None) -> http.client.HTTPConnection:
        if self._connection is None:
            self._connection = self._make_connection()
        self._connection.timeout = timeout
        if self._connection.sock is None:
            self._connection.connect()
            if self._cut is not None:  # while it was being made
                self._shut(self._cut)
        self._connection.sock.settimeout(timeout)
        return self._connection

    def hang_up(self) -> None:
        """From another thread: say that nothing more will be asked; an answer on its way is still read."""
        self._shut(socket.SHUT_WR)

    def abort(self) -> None:
        """From another thread: a call that waits for its answer fails."""
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        self._cut = how
        sock = self._connection and self._connection.sock
        if sock:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, how)  # SSLSocket's own ends the session under whoever reads

    def reopen(self) -> None:
        """After hang_up or abort: the next call takes a new connection."""
        self.close()
        self._cut = None

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None


# == Worker ============================================================================================================
# `jobqueue.py work`: any command, or a local HTTP service, is a worker.

EXIT_RETRY = 75  # EX_TEMPFAIL of sysexits.h: the command asks to be tried again


class Worker:
    """Polls, runs, hands in; in one thread. Goes on by itself when the server was away."""

    WAIT = 20  # seconds of a long poll

    def __init__(
        self, client: Client, heart: Client, run: Callable[[PolledJob], Verdict], options: dict[str, Any]
    ) -> None:
        self._client, self._heart, self._run, self._options = client, heart, run, options
        self._stopping, self._giving_up = threading.Event(), threading.Event()
        self._polling = False
        self._job: PolledJob | None = None  # the one that runs

    def work(self) -> None:
        """Until `stop`; raises Refused where it cannot go on."""
        with contextlib.closing(self._client), contextlib.closing(self._heart):
            self._work()

    def _work(self) -> None:
        pause = 0.1
        while not self._stopping.is_set():
            try:
                job = self._poll()
                pause = 0.1
            except Unreachable as error:
                if not self._stopping.is_set():
                    log.warning("server_away reason=%s: trying again in %.1f s", error, pause)
                self._stopping.wait(pause)
                pause = min(5.0, pause * 2)
                continue
            if job:
                self._serve(job)

    def stop(self) -> None:
        """Take no more jobs; the one that runs is finished."""
        self._stopping.set()
        if self._polling:
            self._client.hang_up()

    def give_up(self) -> None:
        """After `stop`: end what runs, too; its job goes back in line."""
        self._giving_up.set()
        job = self._job
        if job:
            self._client.abort()
            self._heart.abort()
            job.lose("stopped")

    def _poll(self) -> PolledJob | None:
        self._polling = True
        try:
            if self._stopping.is_set():
                return None
            return self._client.ask(
                lambda body: PolledJob(body) if body else None,
                "GET",
                "/api/worker/poll",
                timeout=self.WAIT + 30,
                wait=self.WAIT,
                **self._options,
            )
        except Refused as error:
            if error.status >= 500:
                raise Unreachable(str(error)) from None
            raise Refused(error.code, f"the server refuses this worker: {error}") from None
        finally:
            self._polling = False
            if self._stopping.is_set():
                self._client.reopen()

    def _serve(self, job: PolledJob) -> None:
        beat = _Heartbeat(self._heart, job)
        beat.start()
        self._job = job
        if self._giving_up.is_set():  # since before the job was there to be lost
            job.lose("stopped")
        try:
            verdict = self._run(job)
        except Refused:  # it cannot be run at all: not this job's fault
            self._release(job)
            raise
        except Exception as error:
            log.exception("worker_failed job=%s", job.id)
            verdict = failure(f"{type(error).__name__}: {error}", retry=True)
        finally:
            beat.stop()
        if job.lost.is_set():
            log.warning("job_given_up job=%s reason=%s", job.id, job.why_lost)
            if self._giving_up.is_set():
                self._release(job)
        else:
            self._hand_in(job, verdict)
        self._job = None

    def _release(self, job: PolledJob) -> None:
        self._client.reopen()  # its connection was cut
        with contextlib.suppress(Unreachable):  # the lease runs out, then
            self._client.call("POST", f"/api/worker/release/{job.id}", lease_token=job.token, timeout=5)

    def _hand_in(self, job: PolledJob, verdict: Verdict) -> None:
        """Until the server has taken it or refused it: a completion is idempotent, so it is sent again and again."""
        pause = 0.0  # the first time at once: while the job ran, the server may have closed the idle connection
        while True:
            last = self._giving_up.is_set()
            try:
                status, body = self._send(job, verdict)
            except Unreachable as error:
                reason: Any = error
                self._client.reopen()  # a stop may have hung up on what was no poll any more
            else:
                if status < 500:
                    self._heard(job, verdict, status, body)
                    return
                reason = self._client.problem(status, body)
            if last:
                log.warning("not_handed_in job=%s reason=%s: given up", job.id, reason)
                return
            if pause:
                log.warning("not_handed_in job=%s reason=%s: trying again in %.1f s", job.id, reason, pause)
            self._giving_up.wait(pause)
            pause = min(5.0, pause * 2 or 0.1)

    def _send(self, job: PolledJob, verdict: Verdict) -> tuple[int, bytes]:
        path = f"/api/worker/{verdict.verb}/{job.id}"
        status, _, body = self._client.call(
            "POST", path, verdict.body, verdict.headers, lease_token=job.token, **verdict.query
        )
        return status, body

    def _heard(self, job: PolledJob, verdict: Verdict, status: int, body: bytes) -> None:
        """What the server said to it."""
        if status == 200:
            self._tell(job, verdict, body)
        elif status == 413 and verdict.verb == "complete":
            self._hand_in(job, failure(str(self._client.problem(status, body)), retry=False))
        else:
            log.warning("not_accepted job=%s reason=%s", job.id, self._client.problem(status, body))

    @staticmethod
    def _tell(job: PolledJob, verdict: Verdict, answer: bytes) -> None:
        if verdict.verb == "complete":
            log.info("job_completed job=%s", job.id)
            return
        what = "job_retried"
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            what = "job_failed" if json.loads(answer)["status"] == "failed" else what
        last = verdict.body.decode(errors="replace").strip().rpartition("\n")[2]
        log.warning("%s job=%s reason=%s", what, job.id, last[:300])


class Verdict(NamedTuple):
    """What came of a job: complete or fail, with the result or the error."""

    verb: str
    body: bytes
    headers: dict[str, str] = {}
    query: dict[str, str] = {}


def failure(why: bytes | str, retry: bool, **query: str) -> Verdict:
    """A failed attempt, for `why`; `retry`: may it be tried again?"""
    why = why.encode(errors="backslashreplace") if isinstance(why, str) else why  # a command's name may be no text
    return Verdict("fail", why, {}, {"retry": "true" if retry else "false", **query})


class PolledJob:
    """A job as the poll's answer tells it. `payload` is the bytes that were submitted."""

    def __init__(self, body: bytes) -> None:
        members = _members(body.decode(), 0)[0]
        fields = {name: json.loads(text) for name, text in members.items() if name != "payload"}
        self.id, self.queue, self.attempt = fields["job_id"], fields["queue"], fields["attempt"]
        self.token, self.lease, self.headers = fields["lease_token"], fields["lease_seconds"], fields["headers"]
        self.payload = self._payload(members["payload"], fields.get("payload_encoding") or fields.get("payload_kind"))
        self.lost, self.why_lost = threading.Event(), ""
        self.on_lost: Callable[[], None] = lambda: None

    @staticmethod
    def _payload(text: str, kind: str | None) -> bytes:
        if kind == "base64":
            return base64.b64decode(json.loads(text))
        if kind == "text":
            return json.loads(text).encode()
        return text.encode() if text != '""' else b""  # which is how an empty one arrives

    def lose(self, why: str) -> None:
        """It is no longer this worker's: whatever runs for it is ended."""
        self.why_lost = why
        self.lost.set()
        self.on_lost()


class _Heartbeat(threading.Thread):
    """Extends the lease at a third of it, and every 10 s at least, so that a job that was cancelled is soon stopped; so
    is one that was lost."""

    def __init__(self, client: Client, job: PolledJob) -> None:
        super().__init__(daemon=True)
        self._client, self._job, self._over = client, job, threading.Event()

    def run(self) -> None:
        try:
            self._beat(self._job)
        except Exception as error:  # whatever it is: without a heartbeat, the job is soon another worker's
            self._job.lose(f"its lease cannot be extended: {error!r}")

    def _beat(self, job: PolledJob) -> None:
        path = f"/api/worker/extend/{job.id}"
        while not self._over.wait(min(job.lease / 3, 10.0)):
            try:
                cancelled = self._client.ask(
                    lambda body: json.loads(body)["cancelled"], "POST", path, lease_token=job.token, timeout=10
                )
            except Unreachable:
                continue  # the server is away; the lease may outlive that
            except Refused as error:
                if error.status not in (404, 409):
                    continue
                cancelled = str(error)
            if cancelled:
                job.lose("cancelled" if cancelled is True else cancelled)
                return

    def stop(self) -> None:
        self._over.set()
        self.join()


def run_command(command: list[str], job: PolledJob) -> Verdict:
    """Payload on stdin, result from stdout. Exit 0 completes, 75 asks for a retry, anything else fails for good."""
    names = {}
    for name in sorted(job.headers, key=lambda name: not re.search("[^A-Za-z0-9-]", name)):  # X-A wins over X_A, X.A
        names["JOB_HEADER_" + re.sub(r"[^A-Z0-9]", "_", name.upper())] = job.headers[name].replace("\0", "")
    environment = {**os.environ, **names, "JOB_ID": job.id, "JOB_QUEUE": job.queue, "JOB_ATTEMPT": str(job.attempt)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
    except OSError as error:
        why = f"cannot run {command[0]}: {error.strerror}"
        if error.errno == errno.E2BIG:  # the job's headers do not fit the environment
            return failure(why, retry=False)
        raise Refused(EXIT_USAGE, why) from None
    job.on_lost = functools.partial(_kill, process)
    if job.lost.is_set():
        _kill(process)
    output, errors = _outputs(process, job.payload)
    if process.returncode == 0:
        return Verdict("complete", output)
    why = errors[-4096:].strip() or f"{command[0]} ended with {process.returncode}"
    return failure(why, retry=process.returncode == EXIT_RETRY)


def _outputs(process: subprocess.Popen, payload: bytes) -> tuple[bytes, bytes]:
    """What a command wrote to its two outputs, once it has ended.

    What it left running in the background may hold the pipes open: it has a second, then its process group is ended;
    of what has left the group, no more is waited for.
    """
    # Of its own thread: once communicate has been interrupted by its timeout, it writes no more.
    pipe, process.stdin = process.stdin, None
    try:
        threading.Thread(target=_feed, args=(pipe, payload), daemon=True).start()
    except RuntimeError:  # none is to be had: it must not run on with nothing
        _kill(process)
        raise
    chances = 2
    while True:
        ended = _ended(process)
        try:
            return process.communicate(timeout=1)
        except subprocess.TimeoutExpired as so_far:
            if not ended:
                continue
            _kill(process)
            chances -= 1
            if chances:
                continue
            for output in (process.stdout, process.stderr):
                output.close()
            process.wait()
            return so_far.output or b"", so_far.stderr or b""


def _feed(pipe: io.BufferedWriter, payload: bytes) -> None:
    with contextlib.suppress(OSError), pipe:  # it need not read all
        pipe.write(payload)


def _ended(process: subprocess.Popen) -> bool:
    """Whether it has; where the system can tell without waiting for it, the number of its group stays its own."""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # SIGCHLD is ignored here, and the system waits
        return True


def _kill(process: subprocess.Popen) -> None:
    """The command and what it has started; once it has been waited for, its number may be another's."""
    if process.returncode is not None:
        return
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()


# Of the submitter's headers, what would ask the service for something else than the whole result, as it is.
# fmt: off
_NOT_FORWARDED = frozenset((
    "host", "content-length", "accept-encoding", "range", "if-match", "if-none-match", "if-modified-since",
    "if-unmodified-since", "if-range",
))
# fmt: on


def forward(url: str, job: PolledJob) -> Verdict:
    """POST the payload to a local service. 2xx completes; 429, 502, 503, 504 and silence ask for a retry."""
    service = Client(url)
    job.on_lost = service.abort
    if job.lost.is_set():
        return failure(job.why_lost, retry=True)
    headers = {name: value.encode() for name, value in job.headers.items() if name.lower() not in _NOT_FORWARDED}
    headers |= {"Job-Id": job.id, "Job-Queue": job.queue, "Job-Attempt": str(job.attempt)}
    parts = urllib.parse.urlsplit(url)
    slash = "/" if parts.path[-1:] in ("", "/") else ""
    try:
        status, answer, body = service.call(
            "POST", slash + (f"?{parts.query}" if parts.query else ""), job.payload, headers, timeout=None
        )
    except Unreachable as error:
        return failure(str(error), retry=True)
    finally:
        service.close()
    if 200 <= status < 300:
        kind = answer.get("Content-Type")
        return Verdict("complete", body, {"Content-Type": _media_type(kind)} if kind else {})
    retry, after = status in (429, 502, 503, 504), answer.get("Retry-After", "")
    delay = {"delay": str(min(int(after[:20]), 30 * DAY))} if retry and after.isdecimal() else {}
    return failure(f"{url} answered {status}: ".encode() + body[:4096], retry, **delay)


# == Command line ======================================================================================================
# A row of COMMANDS for each command.


def serve(arguments: argparse.Namespace) -> int:
    """Run the server until SIGTERM or SIGINT; a second one ends the wait for jobs in progress, a third one all."""
    _fill_standard_streams()
    server = Server(**_given_settings(arguments))
    set_up_logging(server.settings.log_format, server.settings.log_level)
    _warn_of_unknown_variables()
    _raise_file_limit(server.settings.max_connections)
    bell = _Bell((signal.SIGTERM, signal.SIGINT))
    server.when_failed(bell.ring)
    server.start()
    gc.collect()
    gc.freeze()  # what was read from the journal is not garbage: no collection needs to look at it again
    _tell_systemd("READY=1")
    _run_until_told(server, bell)
    _tell_systemd("STOPPING=1")
    _stop(server, bell)
    bell.ignore()
    code = EXIT_DISK if server.failed.is_set() else EXIT_OK
    if not server.stopped.is_set():  # the third signal: Python itself would wait for each thread of gRPC's
        os._exit(code)
    return code


def _run_until_told(server: Server, bell: _Bell) -> None:
    """Until a signal comes or the disk fails; meanwhile systemd's watchdog, where there is one, hears that it lives."""
    patience = float(os.environ.get("WATCHDOG_USEC", "0")) / 2e6 or None
    while not bell.signals and not server.failed.is_set():
        bell.wait(patience)
        if patience and server.responds(patience):
            _tell_systemd("WATCHDOG=1")


def _stop(server: Server, bell: _Bell) -> None:
    """In another thread, so that this one hears the second signal and the third, which leaves it unfinished."""
    if not server.failed.is_set():
        running = server.engine.stats()["running"]
        log.info("stopping drain=%g running=%d: a second signal ends the wait", server.settings.drain, running)

    def stop() -> None:
        server.stop()
        bell.ring()

    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    while stopping.is_alive() and not server.stopped.is_set() and len(bell.signals) < 3:
        bell.wait(1)
        if len(bell.signals) > 1 or server.failed.is_set():
            server.hurry()


def _fill_standard_streams() -> None:
    """Where one is closed, a file of ours would get its number, and what some library tells the terminal."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)


def _given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings from flags and environment; what is wrong with one is told with the names of both."""
    given = {setting: getattr(arguments, setting.name) for setting in SETTINGS if hasattr(arguments, setting.name)}
    return {setting.name: setting.parse(setting.told(value), value) for setting, value in given.items()}


def _warn_of_unknown_variables() -> None:
    known = {name for setting in SETTINGS for name in setting.variables} | set(map(_variable, _CLIENT_FLAGS))
    for name in sorted(os.environ.keys() - known):
        if name.startswith("JOBQUEUE_") and os.environ[name]:
            log.warning("unknown_variable name=%s: there is no such setting, so it sets nothing", name)


class _Bell:
    """Wakes the main thread: rung by signals and by other threads.

    A signal writes to a socket (signal.set_wakeup_fd) that the main thread reads. To wait on a lock instead was seen
    to miss one: it may come between the interpreter's last look and the wait.
    """

    BURST = 0.5  # seconds: `timeout` signals its command and at once the command's group; that is one wish, not two

    def __init__(self, signals: Iterable[int]) -> None:
        self.signals: list[int] = []  # what has come so far; of a burst, the first
        self._deaf_until = -math.inf
        self._in, self._out = socket.socketpair()
        self._out.setblocking(False)
        signal.set_wakeup_fd(self._out.fileno(), warn_on_full_buffer=False)
        self._numbers = tuple(signals)
        for number in self._numbers:
            signal.signal(number, self._heard)

    def _heard(self, number: int, _: Any) -> None:
        now = Clock.monotonic()
        if now >= self._deaf_until:
            self._deaf_until = now + self.BURST
            self.signals.append(number)

    def ignore(self) -> None:
        """From now on, and nobody waits any more. In its last moments the interpreter puts the default back for all but
        what is ignored."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._in.close()
        self._out.close()

    def ring(self) -> None:
        with contextlib.suppress(OSError):
            self._out.send(b"\0")

    def wait(self, seconds: float | None) -> None:
        self._in.settimeout(seconds)
        with contextlib.suppress(OSError):
            self._in.recv(64)


def _tell_systemd(state: str) -> None:
    """The notification of sd_notify(3), where systemd asked for it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)


def _raise_file_limit(connections: int) -> None:
    """A descriptor for each connection, and some."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + 256
        if soft < wanted:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
            )


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _plain(text: str) -> str:
    """In one line; what a caller sent cannot start another, nor command a terminal."""
    return _CONTROL.sub(lambda match: json.dumps(match[0])[1:-1], text)


class _TextFormatter(logging.Formatter):
    """One line an event."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += " traceback=" + self.formatException(record.exc_info)
        return f"{iso_time(microseconds(record.created))} {record.levelname} {_plain(text)}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = iso_time(microseconds(record.created))
        event = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event)


def set_up_logging(kind: str, level: str) -> None:
    """To standard error, for the command line; a program that embeds a Server sets up its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if kind == "json" else _TextFormatter())
    log.addHandler(handler)
    log.setLevel(level.upper())
    log.propagate = False


# -- a worker


def work(arguments: argparse.Namespace) -> int:
    """Run a command, or a local HTTP service, as a worker."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if bool(command) == bool(arguments.forward):
        raise ValueError("give either -- COMMAND..., or --forward URL")
    if arguments.forward:
        Client(arguments.forward)  # a bad URL is told now
        run = functools.partial(forward, arguments.forward)
    elif shutil.which(command[0]):
        run = functools.partial(run_command, command)
    else:
        raise ValueError(f"cannot run {command[0]}: not {'executable' if os.path.exists(command[0]) else 'found'}")
    set_up_logging("text", "info")
    name = _label("--worker", arguments.worker or f"{socket.gethostname()}-{os.getpid()}")
    if arguments.queue:
        _queues("--queue", arguments.queue)
    options = {"queue": arguments.queue, "lease": arguments.lease, "worker": name}
    workers = [Worker(_client(arguments), _client(arguments), run, options) for _ in range(arguments.concurrency)]
    bell = _Bell((signal.SIGTERM, signal.SIGINT))
    threads = [_Working(worker, bell) for worker in workers]
    log.info("working url=%s queue=%s concurrency=%d", arguments.url, arguments.queue or "default", len(workers))
    for thread in threads:
        thread.start()
    _watch(threads, bell)
    bell.ignore()
    for thread in threads:
        if thread.error:
            raise thread.error
    return EXIT_OK


class _Working(threading.Thread):
    """A worker's thread; `error` says why it cannot go on."""

    def __init__(self, worker: Worker, bell: _Bell) -> None:
        super().__init__(daemon=True)
        self.worker, self._bell = worker, bell
        self.error: Refused | None = None
        self.over = False

    def run(self) -> None:
        try:
            self.worker.work()
        except Refused as error:
            self.error = error
        except BaseException as error:
            log.exception("worker_ended")
            self.error = Refused(EXIT_NO, f"a worker ended: {type(error).__name__}: {error}")
        finally:
            self.over = True
            self._bell.ring()


def _watch(threads: list[_Working], bell: _Bell) -> None:
    """Until all have ended. The first signal, or one that cannot go on, lets what runs finish; the second ends it."""
    stopping = giving_up = False
    while True:
        bell.wait(None)
        if all(thread.over for thread in threads):
            return
        error = next((thread.error for thread in threads if thread.error), None)
        if not stopping and (error or bell.signals):
            stopping = True
            why = f" since {error}" if error else ""
            log.info("stopping%s: what runs is finished, nothing more is taken; a second signal ends it", why)
            for thread in threads:
                thread.worker.stop()
        if not giving_up and len(bell.signals) > 1:
            giving_up = True
            log.info("stopping at once: what runs is ended, its jobs go back in line")
            for thread in threads:
                thread.worker.give_up()


# -- a client


def _client(arguments: argparse.Namespace) -> Client:
    if arguments.key_file and not arguments.cert:
        raise ValueError("--key-file needs --cert")
    token = _header("--token (JOBQUEUE_TOKEN)", arguments.token)
    return Client(arguments.url, token, arguments.ca, (arguments.cert, arguments.key_file) if arguments.cert else None)


def _header(name: str, value: str | None) -> str | None:
    """What can stand in a header."""
    if value and (_CONTROL.search(value) or max(value) > "\xff"):
        raise ValueError(f"{name} must be one line of Latin-1 characters")  # not shown: it may be a secret
    return value


def _print_answer(
    arguments: argparse.Namespace, tell: Callable[[bytes], list[str]], method: str, path: str, **query: Any
) -> int:
    """Ask, and print the answer: as it came with --json, else the lines that `tell` makes of it for people."""
    with contextlib.closing(_client(arguments)) as client:
        body, lines = client.ask(lambda body: (body, tell(body)), method, path, **query)
    if arguments.json:
        _write(body + b"\n")
    else:
        _say(lines)
    return EXIT_OK


class Unwritten(Exception):
    """Standard output takes nothing; `closed`: since whoever read it has seen enough."""

    def __init__(self, why: str, closed: bool) -> None:
        super().__init__(f"standard output {why}")
        self.closed = closed


def _write(data: bytes, flush: bool = True) -> None:
    """To standard output; raises Unwritten."""
    if sys.stdout is None:  # Python was started without one
        raise Unwritten("is closed", False)
    try:
        sys.stdout.buffer.write(data)
        if flush:
            sys.stdout.buffer.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # what is left in the buffer must not fail once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        closed = isinstance(error, BrokenPipeError)
        raise Unwritten("was closed" if closed else f"failed: {error.strerror}", closed) from None


def _say(lines: Iterable[str]) -> None:
    """Lines for people, who may have a terminal that cannot show all."""
    text = "".join(_plain(line) + "\n" for line in lines)
    if text:
        _write(text.encode(getattr(sys.stdout, "encoding", None) or "utf-8", "backslashreplace"))


def _complain(text: str, end: str = "\n") -> None:
    if sys.stderr is not None:
        print(text, end=end, file=sys.stderr, flush=True)


def _input() -> io.BufferedIOBase:
    if sys.stdin is None:  # Python was started without one
        raise ValueError("standard input is closed")
    return sys.stdin.buffer


def submit(arguments: argparse.Namespace) -> int:
    """Submit a job and print its result, or submit many with --file."""
    options = {name: getattr(arguments, name) for name in JOB_PARAMETERS}
    if arguments.file:
        if arguments.payload is not None:
            raise ValueError("give either PAYLOAD or --file, not both")
        if not (arguments.key is arguments.wait is arguments.content_type is None):
            raise ValueError("--key, --wait and --content-type are for a single PAYLOAD, not for --file")
        return _submit_file(arguments, options)
    if arguments.payload is None:
        raise ValueError("give a PAYLOAD, - for standard input, or --file FILE")
    headers = {
        "Content-Type": _header("--content-type", arguments.content_type),
        "Idempotency-Key": _header("--key", arguments.key),
    }
    payload = _input().read() if arguments.payload == "-" else os.fsencode(arguments.payload)
    headers = {name: value for name, value in headers.items() if value}
    options |= {"wait": arguments.wait, "timeout": None}
    with contextlib.closing(_client(arguments)) as client:
        body, job_id, result = client.ask(_submitted, "POST", "/api/submit", payload, headers, **options)
    try:
        _write(body + b"\n" if arguments.json else f"{job_id}\n".encode() if result is None else result)
    except Unwritten as error:
        raise Refused(EXIT_NO, f"{error}; job {job_id} was submitted") from None
    return EXIT_NOT_YET if result is None and arguments.wait != 0 else EXIT_OK


def _submitted(body: bytes) -> tuple[bytes, str, bytes | None]:
    """The answer, its job, and the result as the worker sent it, a string as its text (None: not yet)."""
    members = _members(body.decode(), 0)[0]
    job_id, text = json.loads(members["job_id"]), members.get("payload")
    if text is None:
        return body, job_id, None
    if "payload_encoding" in members:
        return body, job_id, base64.b64decode(json.loads(text))
    value = json.loads(text) if text[:1] == '"' else text
    return body, job_id, value.encode(errors="backslashreplace") + (b"" if value.endswith("\n") else b"\n")


def _submit_file(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    """Each line is a payload. Sent in batches, each of them whole or not at all; also where nobody reads the ids."""
    done = read = 0
    source = _input() if arguments.file == "-" else open(arguments.file, "rb")  # noqa: SIM115
    size = 0 if arguments.file == "-" else os.path.getsize(arguments.file)
    shown = sys.stderr is not None and sys.stderr.isatty()
    unwritten: Unwritten | None = None
    with source, contextlib.closing(_client(arguments)) as client:
        for lines in _batches(source, 5000, 8 * MIB):  # far less than it takes at once: others come in between
            try:
                body, ids = _submit_lines(client, lines, options)
            except (Refused, Unreachable) as error:
                raise Refused(error.code, f"{error} ({done} jobs were submitted before that)") from None
            done, read = done + len(ids), read + sum(map(len, lines))
            try:
                if unwritten is None:
                    _write((body if arguments.json else "\n".join(ids).encode()) + b"\n")
            except Unwritten as error:
                unwritten = error
            if shown:
                _complain(f"\r{done} jobs submitted" + (f" ({100 * read // size} %)" if size else ""), end="")
    if shown:
        _complain("")
    if unwritten:
        raise Refused(EXIT_NO, f"{unwritten}; all {done} jobs were submitted")
    return EXIT_OK


def _submit_lines(client: Client, lines: list[bytes], options: dict[str, Any]) -> tuple[bytes, list[str]]:
    """The answer to one batch, and the ids in it."""
    return client.ask(
        lambda body: (body, json.loads(body)["job_ids"]),
        "POST",
        "/api/jobs",
        b"".join(lines),
        {"Content-Type": "application/x-ndjson"},
        timeout=None,
        **options,
    )


def _batches(source: Iterable[bytes], count: int, size: int) -> Iterator[list[bytes]]:
    lines: list[bytes] = []
    held = 0
    for line in source:
        if not line.rstrip(b"\r\n"):  # as the server has it
            continue
        if lines and (len(lines) == count or held + len(line) > size):
            yield lines
            lines, held = [], 0
        lines.append(line if line.endswith(b"\n") else line + b"\n")
        held += len(line)
    if lines:
        yield lines


def list_jobs(arguments: argparse.Namespace) -> int:
    """List jobs, newest first, or show one."""
    if arguments.job_id:
        return _print_answer(arguments, _job_lines, "GET", f"/api/jobs/{_quoted(arguments.job_id)}")
    status = "processing" if arguments.status == "running" else arguments.status
    found: list[tuple[str, dict[str, Any]]] = []
    asked = {"queue": arguments.queue, "status": status, "after": None}
    with contextlib.closing(_client(arguments)) as client:
        while len(found) < arguments.limit:
            limit = min(1000, arguments.limit - len(found))
            page, asked["after"] = client.ask(_job_page, "GET", "/api/jobs", limit=limit, **asked)
            found += page
            if asked["after"] is None:
                break
    if arguments.json:
        _write(b"".join(json_text(job).encode() + b"\n" for _, job in found))
    else:
        _say(row for row, _ in found)
    return EXIT_OK


def _job_page(body: bytes) -> tuple[list[tuple[str, dict[str, Any]]], int | None]:
    """The jobs of a page, each with its row, and the cursor of the next."""
    page = json.loads(body)
    row = "{job_id}  {status:10}  {queue:16}  {attempt}/{attempts}  {created_at}"
    return [(row.format_map(job), job) for job in page["jobs"]], page["next"]


def _quoted(job_id: str) -> str:
    return urllib.parse.quote(job_id, safe="", errors="surrogateescape")


def _job_lines(body: bytes) -> list[str]:
    """The members of a job, a line each; JSON stays as it was sent."""
    members = _members(body.decode(), 0)[0]
    if "job_id" not in members:
        raise ValueError("no job")
    shown = {name: json.loads(text) if text[:1] == '"' else text for name, text in members.items()}
    width = max(map(len, shown))
    return [f"{name:{width}}  {text}" for name, text in shown.items()]


def show_stats(arguments: argparse.Namespace) -> int:
    """Show counts by state and queue."""
    return _print_answer(arguments, _stats_lines, "GET", "/api/admin/stats")


def _stats_lines(body: bytes) -> list[str]:
    stats = json.loads(body)
    states = ("pending", "running", "delayed", "completed", "failed", "expired", "cancelled")
    rows = [("queue", *states), ("(all)", *(stats[state] for state in states))]
    for name, queue in sorted(stats["queues"].items()):
        rows.append((name + " (paused)" * queue["paused"], *(queue[state] for state in states)))
    width = max(16, *(len(name) for name, *_ in rows))
    lines = [f"{name:{width}}" + "".join(f"  {cell:>10}" for cell in cells) for name, *cells in rows]
    lines.append(f"waiting: {stats['waiting_clients']} clients, {stats['waiting_workers']} workers")
    return [*lines, "paused: all"] if stats["paused"] else lines


def requeue(arguments: argparse.Namespace) -> int:
    """Put a job, or all that failed, expired or were cancelled, back in line."""
    if bool(arguments.job_id) == bool(arguments.status):
        raise ValueError(f"give either JOB_ID or --status {'|'.join(_REQUEUABLE)}")
    if arguments.job_id and arguments.queue:
        raise ValueError("--queue goes with --status; a JOB_ID says all")
    if arguments.job_id:
        return _print_answer(arguments, _message, "POST", f"/api/admin/requeue/{_quoted(arguments.job_id)}")
    return _print_answer(
        arguments, _requeued, "POST", "/api/admin/requeue", status=arguments.status, queue=arguments.queue
    )


def _requeued(body: bytes) -> list[str]:
    answer = json.loads(body)
    done = f"{answer['requeued']} jobs requeued"
    if "stopped" in answer:
        raise Refused(EXIT_NO, f"{done}, then: {answer['stopped']}", 200, body)
    return [done]


def _message(body: bytes) -> list[str]:
    return [json.loads(body)["message"]]


def cancel(arguments: argparse.Namespace) -> int:
    """Cancel a job."""
    return _print_answer(arguments, _message, "DELETE", f"/api/jobs/{_quoted(arguments.job_id)}")


def pause(arguments: argparse.Namespace) -> int:
    """Hand out no more jobs of a queue, or of all."""
    return _print_answer(arguments, _paused, "POST", "/api/admin/pause", queue=arguments.queue)


def resume(arguments: argparse.Namespace) -> int:
    """Hand out again."""
    return _print_answer(arguments, _paused, "POST", "/api/admin/resume", queue=arguments.queue)


def _paused(body: bytes) -> list[str]:
    names = json.loads(body)["paused"]
    return ["paused: " + (names if isinstance(names, str) else ", ".join(names) or "none")]


# -- files


def check(arguments: argparse.Namespace) -> int:
    """Verify the journal of a data folder, and say what it holds; it is only read."""
    path = arguments.folder
    path = os.path.join(path, "journal.jsonl") if os.path.isdir(path) else path
    reader = JournalReader(path)
    records, states = _read_through(reader, arguments.dump)
    if arguments.dump:
        return EXIT_OK
    counts = collections.Counter(states.values())
    answer = {
        "file": path,
        "format": reader.version,
        "bytes": reader.end,
        "records": records,
        "recent_records": len(reader.lacking),
        "clean_stop": reader.clean,
        "torn_bytes": reader.torn,
        "jobs": {state: counts[state] for state in STATES},
    }
    text = f"{path}: good, format {reader.version}, {records} records, {reader.end} bytes, "
    text += "closed cleanly" if reader.clean else "not closed"
    text += f"; {len(reader.lacking)} of them from {_RECENT[1:]}, the end that it lacks" if reader.lacking else ""
    told = "of which all that anybody was told of is kept" if reader.lacking else "which nobody was told of"
    text += f"; a torn tail of {reader.torn} bytes, {told}, will be cut off" if reader.torn else ""
    if arguments.json:
        _write(json_text(answer).encode() + b"\n")
    else:
        _say([text, ", ".join(f"{counts[state]} {state}" for state in STATES)])
    return EXIT_OK


def _read_through(reader: JournalReader, dump: bool) -> tuple[int, dict[str, str]]:
    """How many records a journal has, and the state of each job in the end; `dump`: print each."""
    count, states = 0, {}
    try:
        for record in reader:
            count += 1
            if dump:
                _write(json_text(record).encode() + b"\n", flush=False)
            try:
                _follow(states, record)
            except (LookupError, TypeError):
                raise DataError(f"record {record['seq']} does not follow from those before it: see --dump") from None
    except FileNotFoundError:
        raise DataError(f"there is no {reader.path}") from None
    finally:
        if dump:
            _write(b"")  # what was read before a damage, too
    return count, states


def _follow(states: dict[str, str], record: dict[str, Any]) -> None:
    """The state of each job after a record."""
    op = record["op"]
    if op in ("submit", "job", "batch"):
        for job in record.get("jobs", [record]):
            states[job["id"]] = job.get("state", "pending")
    elif op == "clear":
        states.clear()
    elif "id" in record:
        states[record["id"]] = TRANSITIONS[states[record["id"]], op]


def token(arguments: argparse.Namespace) -> int:
    """Print a line for the file of --tokens: SCOPE TOKEN NAME."""
    wrong = set(arguments.scope.split(",")) - set(SCOPES)
    if wrong:
        raise ValueError(f"--scope must be of {', '.join(SCOPES)}, comma-separated, got {arguments.scope!r}")
    _label("--name", arguments.name or "")
    secret = secrets.token_urlsafe(32)
    while secret[0] == "-":  # as an argument it would be taken for a flag
        secret = secrets.token_urlsafe(32)
    line = " ".join(filter(None, (arguments.scope, secret, arguments.name)))
    _write(line.encode() + b"\n")  # as --tokens reads it, whatever the terminal speaks
    return EXIT_OK


# -- flags


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each row of SETTINGS; the environment is the default."""
    for setting in SETTINGS:
        given = next((os.environ[name] for name in setting.variables if os.environ.get(name)), None)
        options: dict[str, Any] = {"default": argparse.SUPPRESS if given is None else given}
        if setting.parse is _switch:
            options.update(nargs="?", const="true", metavar="BOOL")
        else:
            options.update(metavar=setting.name.rpartition("_")[2].upper())
        shown = "" if setting.default in (None, (), False) else f" (default {setting.default})"
        parser.add_argument(setting.flag, help=setting.help.replace("%", "%%") + shown, **options)


# flag -> its value, default, what it is. Each has a variable of the environment.
_CLIENT_FLAGS = {
    "--url": ("URL", "http://127.0.0.1:3000", "the server"),
    "--token": ("TOKEN", None, "access token, which is better kept in the variable"),
    "--ca": ("FILE", None, "CA file to check an https server by"),
    "--cert": ("FILE", None, "client certificate"),
    "--key-file": ("FILE", None, "its key"),
}


def _variable(flag: str) -> str:
    return "JOBQUEUE_" + flag[2:].replace("-", "_").upper()


def _client_flags(parser: argparse.ArgumentParser) -> None:
    for flag, (value, default, text) in _CLIENT_FLAGS.items():
        shown = f"; default {default}" if default else ""
        given = os.environ.get(_variable(flag)) or default
        parser.add_argument(flag, default=given, metavar=value, help=f"{text} ({_variable(flag)}{shown})")


def _asking_flags(parser: argparse.ArgumentParser) -> None:
    _client_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def _work_flags(parser: argparse.ArgumentParser) -> None:
    _client_flags(parser)
    parser.add_argument("--queue", help="queues, comma-separated, in order (default: default)")
    parser.add_argument(
        "--concurrency", type=_flag(_MAX), default=1, metavar="N", help="jobs at the same time (default 1)"
    )
    parser.add_argument(
        "--lease", type=_flag(_LEASE), metavar="S", help="seconds of a lease; it is extended while the job runs"
    )
    parser.add_argument("--worker", metavar="NAME", help="the worker's name (default: host and process)")
    parser.add_argument(
        "--forward", metavar="URL", help="POST each payload to this service instead of running a command"
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND...", help="payload on stdin, result from stdout"
    )


def _submit_flags(parser: argparse.ArgumentParser) -> None:
    _asking_flags(parser)
    parser.add_argument("payload", nargs="?", metavar="PAYLOAD", help="the payload; - reads standard input")
    parser.add_argument(
        "--file", metavar="FILE", help="submit each line of this file (- for standard input) and print the ids"
    )
    for name, (parse, text) in SUBMIT_PARAMETERS.items():
        if name != "on_disconnect":
            parser.add_argument("--" + name, type=_flag(parse), metavar=name.upper(), help=text)
    parser.add_argument("--key", help="Idempotency-Key: the same key attaches to the same job")
    parser.add_argument("--content-type", metavar="TYPE", help="Content-Type of the payload")


def _jobs_flags(parser: argparse.ArgumentParser) -> None:
    _asking_flags(parser)
    parser.add_argument("job_id", nargs="?", metavar="JOB_ID", help="show this job")
    parser.add_argument("--queue", type=_flag(_queue), help="of this queue only")
    parser.add_argument("--status", choices=(*STATES, "running"), help="in this state only; running: processing")
    parser.add_argument(
        "--limit", type=_flag(_number(int, 1, 10**9)), default=100, metavar="N", help="at most so many (default 100)"
    )


def _requeue_flags(parser: argparse.ArgumentParser) -> None:
    _asking_flags(parser)
    parser.add_argument("job_id", nargs="?", metavar="JOB_ID")
    parser.add_argument("--status", choices=_REQUEUABLE, help="all that ended so")
    parser.add_argument("--queue", type=_flag(_queue), help="with --status: of this queue only")


def _cancel_flags(parser: argparse.ArgumentParser) -> None:
    _asking_flags(parser)
    parser.add_argument("job_id", metavar="JOB_ID")


def _queue_flags(parser: argparse.ArgumentParser) -> None:
    _asking_flags(parser)
    parser.add_argument("--queue", type=_flag(_queue), help="this queue (default: all)")


def _check_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DATA_DIR", help="the folder, or the journal itself")
    parser.add_argument("--dump", action="store_true", help="print each record as a line of JSON")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def _token_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scope", required=True, help="client, worker, admin; comma-separated")
    parser.add_argument("--name", help="whose it is, for people")


def _flag(parse: Callable[[str, Any], Any]) -> Callable[[str], Any]:
    """A parser of ours as an argparse type."""

    def convert(given: str) -> Any:
        try:
            return parse("it", given)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


class Command(NamedTuple):
    """A row of COMMANDS."""

    run: Callable[[argparse.Namespace], int]
    flags: Callable[[argparse.ArgumentParser], None]
    example: str


COMMANDS = {
    "serve": Command(serve, _serve_flags, "serve --data-dir /var/lib/jobqueue --fsync always"),
    "work": Command(work, _work_flags, "work --queue thumbnails --concurrency 4 -- convert - -resize 200x200 png:-"),
    "submit": Command(submit, _submit_flags, "submit '{\"x\": 1}' --queue sums --wait 30"),
    "jobs": Command(list_jobs, _jobs_flags, "jobs --status failed"),
    "stats": Command(show_stats, _asking_flags, "stats --json"),
    "requeue": Command(requeue, _requeue_flags, "requeue --status failed --queue sums"),
    "cancel": Command(cancel, _cancel_flags, "cancel 550e8400-e29b-41d4-a716-446655440000"),
    "pause": Command(pause, _queue_flags, "pause --queue sums"),
    "resume": Command(resume, _queue_flags, "resume"),
    "check": Command(check, _check_flags, "check data"),
    "token": Command(token, _token_flags, "token --scope worker --name gpu-host-1 >> tokens"),
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong and where more stands."""

    def error(self, message: str) -> None:
        _complain(f"{self.prog}: {_plain(message)}; see {self.prog} --help")
        raise SystemExit(EXIT_USAGE)

    def print_help(self, file: Any = None) -> None:
        """As argparse calls it, for --help: to standard output."""
        _say(self.format_help().splitlines())


_ARGUMENTS = {"job_id": "JOB_ID", "folder": "DATA_DIR"}  # those that are no flags
_MAY_BE_EMPTY = ("payload", "scope")  # a payload may be; of a scope, `token` says what would do


def _refuse_empty(arguments: argparse.Namespace) -> None:
    """A flag with '' is what "$UNSET" comes to: whoever wrote it did not mean to leave it out."""
    for name, value in vars(arguments).items():
        if value == "" and name in _ARGUMENTS:
            raise ValueError(f"{_ARGUMENTS[name]} is empty")
        if value == "" and name not in _MAY_BE_EMPTY:
            raise ValueError(f"--{name.replace('_', '-')} is empty; leave it out to run without")


def _parse(argv: list[str]) -> tuple[Command, argparse.Namespace]:
    if argv[:1] in (["-h"], ["--help"]):
        rows = [f"  {name:8} {(command.run.__doc__ or '').partition(chr(10))[0]}" for name, command in COMMANDS.items()]
        about = (__doc__ or "").partition("\nThe laws")[0]  # those are for who reads the file
        _say([*about.splitlines(), "", "Commands (each has --help; without one: serve):", *rows])
        raise SystemExit(EXIT_OK)
    if argv[:1] == ["--version"]:
        _say([f"jobqueue {__version__}"])
        raise SystemExit(EXIT_OK)
    if argv and argv[0][:1] != "-" and argv[0] not in COMMANDS:
        raise ValueError(f"unknown command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    name = argv[0] if argv and argv[0] in COMMANDS else "serve"
    command = COMMANDS[name]
    installed = os.path.basename(sys.argv[0]).removesuffix(".exe") == "jobqueue"
    program = "jobqueue" if installed else "jobqueue.py"
    example = f"example: {program} {command.example}"
    parser = _Parser(f"{program} {name}", description=command.run.__doc__, epilog=example, allow_abbrev=False)
    command.flags(parser)
    arguments = parser.parse_args(argv[1:] if argv and argv[0] == name else argv)
    _refuse_empty(arguments)
    return command, arguments


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code, which --help, --version and wrong flags raise as SystemExit."""
    sys.modules.setdefault("jobqueue", sys.modules[__name__])  # whoever imports jobqueue gets this very module
    codes = {ValueError: EXIT_USAGE, DataError: EXIT_DATA, DiskError: EXIT_DISK, OSError: EXIT_USAGE}
    arguments = None
    try:
        command, arguments = _parse(sys.argv[1:] if argv is None else argv)
        return command.run(arguments)
    except KeyboardInterrupt:
        return 130
    except Unwritten as error:
        if error.closed:
            return EXIT_OK
        code, reason = EXIT_NO, error
    except (Refused, Unreachable) as error:
        code, reason = error.code, error
        if isinstance(error, Refused) and error.answer and getattr(arguments, "json", False):
            with contextlib.suppress(Unwritten):
                _write(error.answer + b"\n")
    except tuple(codes) as error:
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        reason = error.strerror if isinstance(error, OSError) and error.filename is None and error.strerror else error
    _complain(f"jobqueue: {_plain(str(reason))}")
    return code


if __name__ == "__main__":
    sys.exit(main())
