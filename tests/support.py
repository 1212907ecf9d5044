"""What the tests share: a server as a process, calls over real sockets, a clock that is moved by hand."""

from __future__ import annotations

import contextlib
import http.client
import json as jsonlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LONG = os.environ.get("JOBQUEUE_LONG") == "1"
_UNSET = object()


def wait_until(predicate: Callable[[], Any], timeout: float = 10, what: str = "") -> Any:
    """Ask again and again until `predicate` answers with something true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        # The answer is asked for once more after the deadline: a slow machine may have kept us from asking.
        late = time.monotonic() >= deadline
        if answer := predicate():
            return answer
        if late:
            raise AssertionError(f"waited {timeout:g} s in vain for {what or predicate}")
        time.sleep(0.005)


# -- calls over HTTP


@dataclass(frozen=True)
class Answer:
    """An HTTP answer. Header names are in lower case; repeated ones are joined with ", "."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return jsonlib.loads(self.body)


def read_answer(response: http.client.HTTPResponse) -> Answer:
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Answer(response.status, headers, response.read())


def call(
    base_url: str,
    method: str,
    path: str,
    body: bytes | str = b"",
    headers: Mapping[str, str] = {},  # noqa: B006 (never changed)
    timeout: float = 30,
    json: Any = _UNSET,
    context: ssl.SSLContext | None = None,
) -> Answer:
    """One request on a connection of its own. `json` is a body to encode; `context` is for https."""
    headers = dict(headers)
    if json is not _UNSET:
        body = jsonlib.dumps(json)
        headers.setdefault("Content-Type", "application/json")
    url = urllib.parse.urlsplit(base_url)
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(url.hostname, url.port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, body.encode() if isinstance(body, str) else body or None, headers)
        return read_answer(connection.getresponse())


def connect(url: str, timeout: float = 10) -> socket.socket:
    """A plain connection to the server behind an http:// URL."""
    parts = urllib.parse.urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout)


def raw(url: str, data: bytes, timeout: float = 10, idle: float = 0.5) -> bytes:
    """Send bytes as they are and return all that comes back, until the server closes or falls silent.

    The first byte may take `timeout` seconds; after it, `idle` seconds of silence are the end. A request with
    "Connection: close" as the last one makes the end certain, and quick.
    """
    received = bytearray()
    with connect(url, timeout) as connection:
        # A server that refuses may close before it has read everything; what it said is still to be read.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while chunk := connection.recv(65536):
                received += chunk
                connection.settimeout(idle)
    return bytes(received)


# -- calls over gRPC

_channels: list[Any] = []


def grpc_stub(server: Any, credentials: Any = None) -> Any:
    """A WorkerServiceStub on a channel of its own, which is closed when the test ends.

    `server` is anything with a grpc_port; `credentials` are grpc channel credentials, for TLS.
    """
    import grpc

    from worker_pb2_gen.worker_pb2_grpc import WorkerServiceStub

    # A channel of its own: grpc shares connections between channels with the same arguments, also dead ones.
    options = [("grpc.use_local_subchannel_pool", 1)]
    target = f"localhost:{server.grpc_port}" if credentials else f"127.0.0.1:{server.grpc_port}"
    if credentials:
        channel = grpc.secure_channel(target, credentials, options)
    else:
        channel = grpc.insecure_channel(target, options)
    _channels.append(channel)
    return WorkerServiceStub(channel)


def close_channels() -> None:
    while _channels:
        _channels.pop().close()


# -- the server as a process

READY = re.compile(r"\bready http=(https?://(?:\[[^\]]*\]|[^:/\s]+):(\d+)) grpc=(\S+)")
_started: list[ServerProcess] = []


class DidNotStart(AssertionError):
    """The server ended, or did not say that it was ready. `code` is its exit code (None: still running)."""

    def __init__(self, code: int | None, log: str) -> None:
        super().__init__(f"the server did not become ready (exit code {code}); it said:\n{log}")
        self.code = code
        self.log = log


class ServerProcess:
    """A server in a process of its own. `process` is what was started; `pid` is the server itself."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at the tests' terminal is for the tests
        )
        _started.append(self)
        self.command = list(command)
        self.url = ""
        self.port = 0
        self.grpc_port: int | None = None
        self._lines: list[str] = []
        self._ready = threading.Event()  # set when it is ready, and when its stderr ends
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._server_pids()[-1]

    @property
    def data_dir(self) -> Path:
        return Path(self.command[self.command.index("--data-dir") + 1])

    def log(self) -> str:
        """All it wrote to stderr so far."""
        return "".join(self._lines)

    def wait_log(self, pattern: str, timeout: float = 10) -> re.Match[str]:
        """Wait until the log has a match of this regular expression."""
        try:
            return wait_until(lambda: re.search(pattern, self.log()), timeout, f"{pattern!r} in the log")
        except AssertionError as error:
            error.add_note(self.log())
            raise

    def wait_ready(self, timeout: float) -> None:
        if not self._ready.wait(timeout) or not self.url:
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):  # its stderr ends a moment before it does
                code = self.process.wait(5 if self._ready.is_set() else 0)
            self.kill()
            raise DidNotStart(code, self.log())

    def terminate(self) -> None:
        """Send SIGTERM, and do not wait."""
        self._signal(self._server_pids()[-1:], signal.SIGTERM)

    def stop(self, timeout: float = 30) -> int:
        """Send SIGTERM, wait for the end, and return the exit code."""
        self.terminate()
        return self.wait(timeout)

    def kill(self) -> int:
        """kill -9, at once and whatever it is doing; the exit code is -9 (137 from some wrappers)."""
        # The server alone: a tracer that is killed lets it run on, and a wrapper ends once it has seen the
        # server's end, so that a restart finds the data folder free.
        pids = self._server_pids()
        self._signal(pids[-1:], signal.SIGKILL)
        try:
            return self.wait(5)
        except subprocess.TimeoutExpired:  # a wrapper that stays
            self._signal(pids[:-1], signal.SIGKILL)
            return self.wait()

    def wait(self, timeout: float = 30) -> int:
        """Wait until it has ended and its log is complete; return the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def _read(self) -> None:
        with self.process.stderr as stream:
            for line in stream:
                text = line.decode(errors="replace")
                self._lines.append(text)
                if not self.url and (ready := READY.search(text)):
                    self.port = int(ready[2])
                    grpc_port = ready[3].rpartition(":")[2]
                    self.grpc_port = int(grpc_port) if grpc_port.isdigit() else None
                    self.url = ready[1]
                    self._ready.set()
        self._ready.set()

    def _server_pids(self) -> list[int]:
        """What was started, then the children that carry the same command on: a wrapper, then the server."""
        pids = [self.process.pid]
        while child := _child_that_serves(pids[-1]):
            pids.append(child)
        return pids

    def _signal(self, pids: Any, number: int) -> None:
        if self.process.poll() is None:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)


def freeze(pid: int) -> None:
    """Stop a process (SIGCONT lets it go on), and wait until each of its threads stands still. Needs /proc."""
    os.kill(pid, signal.SIGSTOP)

    def stands_still() -> bool:
        try:
            threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        except OSError:  # one that has just ended
            return False
        return {thread.rpartition(")")[2].split()[0] for thread in threads} == {"T"}

    wait_until(stands_still, what=f"process {pid} to stand still")


def _child_that_serves(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                if b"jobqueue" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
    return None


def start_server(
    tmp_path: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
    wrapper: Sequence[str] = (),
    timeout: float = 30,
) -> ServerProcess:
    """Start `python -m jobqueue` on free ports, its data in tmp_path/data, and wait until it serves.

    It is `python jobqueue.py` without compiling that file once more, which takes longer than many a test.

    Flags that are given here win. A second start with the same tmp_path is a restart on the same data. `env`
    is added to the environment; `wrapper` stands before the command, as in ("strace", "-f", "-o", "trace").
    """
    standard = ("--data-dir", str(tmp_path / "data"), "--port", "0", "--grpc-port", "0")
    # Settings of whoever runs the tests are not this server's.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("JOBQUEUE_") and name not in ("PORT", "GRPC_PORT")
    }
    command = [*wrapper, python, "-m", "jobqueue", *standard, *flags]
    given = {**inherited, **(env or {})}
    given["PYTHONPATH"] = os.pathsep.join(filter(None, (given.get("PYTHONPATH"), str(ROOT))))
    deadline = time.monotonic() + timeout
    while True:
        server = ServerProcess(command, given, tmp_path)
        try:
            server.wait_ready(timeout)
            return server
        except DidNotStart as error:
            # The port of one that comes back was free meanwhile: a test beside this one may have been given it.
            if "--port" not in flags or "Address already in use" not in error.log or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def started() -> list[ServerProcess]:
    """Every process that start_server began and end_servers has not yet ended."""
    return list(_started)


def end_servers(keep: Sequence[ServerProcess] = ()) -> None:
    """Kill those that still run, each by its pid."""
    for server in started():
        if server not in keep:
            server.kill()
            _started.remove(server)


# -- time


class FakeClock:
    """A clock that stands still until a test moves it; threads that wait on it wake when their time comes."""

    def __init__(self, monotonic: float = 1_000.0, wall: float = 1_700_000_000.0) -> None:
        self._lock = threading.Lock()
        self._now = monotonic
        self._wall_ahead = wall - monotonic
        self._sleeping: dict[object, threading.Condition] = {}  # one entry for each thread in wait
        self._seen = threading.local()

    def monotonic(self) -> float:
        with self._lock:
            self._seen.now = self._now
            return self._now

    def time(self) -> float:
        with self._lock:
            return self._now + self._wall_ahead

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Wait on `condition`, which is held, until it is notified or `seconds` of this clock are over.

        Wakes without a reason now and then, as conditions may: wait in a loop.
        """
        ticket = object()
        with self._lock:
            # `seconds` was worked out from the time that this thread last read. If the clock was moved since,
            # they began before the move; counted from now, the thread would sleep through its moment.
            since = getattr(self._seen, "now", self._now)
            if seconds is not None and since + seconds <= self._now:
                self._seen.now = self._now
                return
            self._sleeping[ticket] = condition
        try:
            condition.wait()
        finally:
            with self._lock:
                self._sleeping.pop(ticket, None)
                self._seen.now = self._now

    def advance(self, seconds: float) -> None:
        """Move both clocks on, and wake every thread that waits, to see whether its time has come."""
        with self._lock:
            self._now += seconds
            asleep = list(self._sleeping.values())
            # Woken ones no longer count as sleepers, so that a test can wait for them to sleep again.
            self._sleeping.clear()
        for condition in set(asleep):
            with condition:
                condition.notify_all()

    def jump(self, seconds: float) -> None:
        """Set the wall clock on, or back. The monotonic clock does not notice."""
        with self._lock:
            self._wall_ahead += seconds

    def sleepers(self) -> int:
        """How many threads are asleep in `wait`, an idle server's timer and committing thread among them."""
        with self._lock:
            return len(self._sleeping)
