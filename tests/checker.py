"""A load that records what it was told, and a check that holds the server to it.

`Load` runs clients that submit unique payloads and workers that answer them, some of them badly: they crash,
hang up, repeat a completion, come late, fail, give back. `History` keeps each call with its outcome. `check`
then asks the server what it holds and compares. A call whose answer was never read, or was 503, may have been
carried out or not; everything else is a promise.

    history = History()
    load = Load(history, seed=1)
    load.start(port); ...; load.stop()
    load.drain(port)
    check(history, port)
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import random
import socket
import threading
import time
import urllib.parse

FINAL = {"completed", "failed", "expired", "cancelled"}
NUMBERS = itertools.count(1)


# == Wire ====================================================================================================
# A raw client, because a library that quietly sends a request again would make one submit into two.


class Cut(Exception):
    """No whole answer came; `sent` is False where the request cannot have reached the server."""

    def __init__(self, why, sent=True):
        super().__init__(why)
        self.sent = sent


class Wire:
    """One keep-alive connection. A request is sent once, never again."""

    def __init__(self, port, timeout=30):
        self.port, self.timeout = port, timeout
        self.sock = None
        self.unread = b""

    def send(self, method, path, body=b"", headers=None):
        """Send one request; raise Cut."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        sock = self.sock  # stop() may close it from another thread at any moment
        try:
            if sock is None:
                self.sock = sock = socket.create_connection(("127.0.0.1", self.port), self.timeout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise Cut(repr(error), sent=False) from None
        try:
            sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        except OSError as error:
            self.close()
            raise Cut(repr(error)) from None

    def receive(self):
        """Read one answer: (status, headers with lower-case names, body); raise Cut."""
        try:
            head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            headers = {}
            for line in head[1:]:
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            assert "transfer-encoding" not in headers, "the answers are expected to have a Content-Length"
            body = self._exactly(int(headers.get("content-length", 0)))
        except OSError as error:
            self.close()
            raise Cut(repr(error)) from None
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(head[0].split(" ")[1]), headers, body

    def request(self, method, path, body=b"", headers=None):
        """Send one request and return (status, the answer's JSON or None)."""
        self.send(method, path, body, headers)
        status, _, body = self.receive()
        return status, json.loads(body) if body else None

    def close(self):
        """Hang up; the next request connects anew."""
        sock, self.sock, self.unread = self.sock, None, b""
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _more(self):
        sock = self.sock
        data = sock.recv(65536) if sock is not None else b""
        if not data:
            raise ConnectionError("the connection ended before the answer did")
        self.unread += data

    def _until(self, end):
        while end not in self.unread:
            self._more()
        found, _, self.unread = self.unread.partition(end)
        return found

    def _exactly(self, count):
        while len(self.unread) < count:
            self._more()
        found, self.unread = self.unread[:count], self.unread[count:]
        return found


class GrpcWire(Wire):
    """The same for a worker, over gRPC: its routes become calls, and what is answered looks as over HTTP."""

    HTTP = {"NOT_FOUND": 404, "FAILED_PRECONDITION": 409, "INVALID_ARGUMENT": 400}  # statuses

    def __init__(self, port, grpc_port, timeout=30):
        super().__init__(port, timeout)
        from worker_pb2_gen import worker_pb2

        self.grpc_port, self.channel, self.pb = grpc_port, None, worker_pb2

    def request(self, method, path, body=b"", headers=None):
        path, _, query = path.partition("?")
        if not path.startswith("/api/worker/"):
            return super().request(method, path, body, headers)
        given = dict(urllib.parse.parse_qsl(query))
        verb, _, job_id = path.removeprefix("/api/worker/").partition("/")
        return getattr(self, f"_{verb}")(job_id, given, body)

    def send(self, method, path, body=b"", headers=None):
        """A poll is sent over gRPC; close() hangs up on it."""
        path, _, query = path.partition("?")
        if path != "/api/worker/poll":
            return super().send(method, f"{path}?{query}", body, headers)
        try:
            self._stub().RequestJob.future(self._asks(dict(urllib.parse.parse_qsl(query))), timeout=self.timeout)
        except ValueError as error:  # stop() closed the channel
            raise Cut(repr(error)) from None

    def close(self):
        super().close()
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.close()

    def _stub(self):
        import grpc

        from worker_pb2_gen.worker_pb2_grpc import WorkerServiceStub

        channel = self.channel
        if channel is None:
            # Connections would be shared, also dead ones; and nothing is sent a second time.
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
            self.channel = channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}", options)
        return WorkerServiceStub(channel)

    def _call(self, name, message):
        """(200, the answer), (another status, {"code": ...}); raise Cut where nobody knows."""
        import grpc

        try:
            return 200, getattr(self._stub(), name)(message, timeout=self.timeout)
        except grpc.RpcError as error:
            said = {item.key: item.value for item in error.trailing_metadata() or ()}
            if error.code().name in ("UNAVAILABLE", "CANCELLED", "UNKNOWN", "INTERNAL") and "code" not in said:
                self.close()
                raise Cut(repr(error)) from None
            code = said.get("code")
            status = 503 if code in ("draining", "outcome_unknown") else 507 if code == "disk_full" else None
            return status or self.HTTP[error.code().name], {"code": code, "error": error.details()}
        except ValueError as error:  # stop() closed the channel
            raise Cut(repr(error)) from None

    def _poll(self, _, given, body):
        one = "max" not in given
        status, answer = self._call("RequestJob" if one else "RequestJobs", self._asks(given))
        if status == 404:
            return 204, None
        if status != 200:
            return status, answer
        return 200, self._seen(answer) if one else {"jobs": [self._seen(job) for job in answer.jobs]}

    def _complete(self, job_id, given, body):
        if not job_id:
            return self._complete_many(json.loads(body)["results"])
        message = self.pb.JobResult(job_id=job_id, payload=body.decode(), lease_token=given["lease_token"])
        if "next" in given:
            message.next = True
            message.next_request.CopyFrom(self._asks(given))
        status, answer = self._call("CompleteJob", message)
        if status != 200:
            return status, answer
        assert answer.success
        seen = {"duplicate": True} if answer.duplicate else {}
        return 200, seen | {"next": self._seen(answer.next) if answer.HasField("next") else None}

    def _complete_many(self, results):
        rows = [row | {"payload": json.dumps(row["payload"])} for row in results]
        message = self.pb.JobResults(results=[self.pb.JobResult(**row) for row in rows])
        status, answer = self._call("CompleteJobs", message)
        if status != 200:
            return status, answer
        fields = ("job_id", "status", "code", "duplicate")
        return 200, {"results": [{name: getattr(row, name) for name in fields} for row in answer.results]}

    def _fail(self, job_id, given, body):
        message = self.pb.JobFailure(job_id=job_id, lease_token=given["lease_token"], error=body.decode())
        if "delay" in given:
            message.delay_seconds = float(given["delay"])
        if "retry" in given:
            message.retry = given["retry"] == "true"
        status, answer = self._call("FailJob", message)
        return status, {"status": answer.status} if status == 200 else answer

    def _release(self, job_id, given, body):
        status, answer = self._call("ReleaseJob", self.pb.JobLease(job_id=job_id, lease_token=given["lease_token"]))
        return status, {} if status == 200 else answer

    def _asks(self, given):
        seconds = {f"{name}_seconds": float(given.get(name, 0)) for name in ("wait", "lease")}
        return self.pb.JobRequest(max=int(given.get("max", 0)), **seconds)

    @staticmethod
    def _seen(job):
        binary = {"payload": base64.b64encode(job.payload_bytes).decode(), "payload_encoding": "base64"}
        seen = {"job_id": job.id, "lease_token": job.lease_token, "attempt": job.attempt, "payload": job.payload}
        return seen | (binary if job.payload_bytes else {})


# == Payloads ================================================================================================
# Each is sent once in the whole run, so that whatever turns up later can be traced to the call that sent it.


def new_payload(rng, seed, kind=None, pad=None):
    """Return a payload never used before, mostly small: json (which fits an ndjson line), text or binary."""
    name = f"{seed}-{next(NUMBERS)}"
    pad = "x" * (rng.choice((0, 0, 10, 200, 5000)) if pad is None else pad)
    kind = kind or rng.choice(("json", "json", "text", "binary"))
    if kind == "json":
        return json.dumps({"name": name, "one": 1.0, "big": 12345678901234567890, "pad": pad}).encode()
    if kind == "text":
        return f"text é {name}\n{pad}".encode()
    return b"\xff\x00\n" + name.encode() + pad.encode()


def payload_bytes(answer):
    """Return the payload of a job the server showed, as it was submitted."""
    if answer.get("payload_encoding") == "base64":
        return base64.b64decode(answer["payload"])
    payload = answer["payload"]
    return payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()


def new_result(payload):
    """Return a result that is a function of the payload, with a number that tells completions apart."""
    return {"sha": hashlib.sha256(payload).hexdigest(), "number": next(NUMBERS)}


# == History =================================================================================================


@dataclasses.dataclass
class Call:
    """One call and what came of it. `status` None: no whole answer was read, so it may be done or not."""

    kind: str
    started: float
    ended: float = 0.0
    status: int | None = None
    answer: dict | None = None
    sent: bool = True
    payloads: list = dataclasses.field(default_factory=list)
    key: str | None = None
    batch: bool = False
    lease: float = 0.0
    ttl: float | None = None
    jobs: list = dataclasses.field(default_factory=list)
    job_id: str | None = None
    token: str | None = None
    result: dict | None = None

    @property
    def ok(self):
        """True where the server said that it did it."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def unknown(self):
        """True where it may have been done or not."""
        return self.sent and (self.status is None or self.status == 503)

    @property
    def job_ids(self):
        """The ids a submit was told."""
        answer = self.answer or {}
        if self.kind != "submit" or self.status not in (200, 202, 410, 502, 504):
            return []
        return answer.get("job_ids") or ([answer["job_id"]] if "job_id" in answer else [])

    @property
    def refused(self):
        """True for a submit that must never run: 4xx (but for the end of a job) and 507."""
        return self.kind == "submit" and self.status is not None and not self.job_ids and self.status != 503


class History:
    """Every call of a run, in the order in which they ended."""

    def __init__(self, calls=()):
        self.calls = list(calls)

    def of(self, kind):
        """Return the calls of one kind."""
        return [call for call in self.calls if call.kind == kind]

    def cut(self, moment):
        """Forget every answer that was read after `moment`: for power cuts."""
        for call in self.calls:
            if call.ended > moment:
                call.status, call.answer, call.jobs = None, None, []

    def summary(self):
        """Return {(kind, status): count}."""
        return collections.Counter((call.kind, call.status) for call in self.calls)


# == Load ====================================================================================================


class Load:
    """Clients and workers that may outlive the server: start() again on the next one's port.

    Every lease is short (1 or 2 s), so that what a crashed worker held comes back while the test runs.
    """

    CLIENT_ACTS = {
        "sync": 5,
        "async": 5,
        "key": 3,
        "key_twice": 2,
        "batch": 2,
        "cancel": 1,
        "hang_up": 1,
        "delayed": 1,
    }
    WORKER_ACTS = {
        "one": 4,
        "chain": 3,
        "batch": 4,
        "repeat": 2,
        "crash": 0.4,
        "hang_up": 0.3,
        "late": 0.4,
        "fail": 0.6,
        "fail_for_good": 0.3,
        "release": 0.6,
    }

    def __init__(self, history, seed, clients=4, workers=4, client_acts=None, worker_acts=None):
        self.history, self.seed = history, seed
        self.clients, self.workers = clients, workers
        self.client_acts = client_acts or self.CLIENT_ACTS
        self.worker_acts = worker_acts or self.WORKER_ACTS
        self.rng = random.Random(seed)
        self.late = collections.deque()  # (job, when to hand it in): completed once the lease is over
        self.unsure = collections.deque()  # (job, result) whose completion got no answer: sent again later
        self.unsure_keys = collections.deque()  # (payload, key) whose submit got no answer: sent again later
        self.stopping = threading.Event()
        self.threads, self.wires, self.errors = [], [], []
        self.port = self.grpc_port = None

    def start(self, port, grpc_port=None):
        """Let all clients and workers loose on the server; with a `grpc_port`, every other worker over gRPC."""
        self.port, self.grpc_port = port, grpc_port
        self.stopping.clear()
        for number in range(self.clients + self.workers):
            run = self._client if number < self.clients else self._worker
            rng = random.Random(self.rng.random())
            over_grpc = grpc_port is not None and run == self._worker and number % 2 == 0
            thread = threading.Thread(target=self._guard, args=(run, rng, over_grpc), daemon=True)
            self.threads.append(thread)
            thread.start()

    def stop(self):
        """End the threads, hang up on what clients still wait for, raise what one of the threads raised."""
        self.stopping.set()
        for thread in self.threads[self.clients :]:
            thread.join(2)  # a worker that was cut off would leave its job leased to nobody
        while any(thread.is_alive() for thread in self.threads):
            for wire in list(self.wires):
                wire.close()
            for thread in self.threads:
                thread.join(0.05)
        self.threads.clear()
        self.wires.clear()
        if self.errors:
            raise self.errors[0]

    def drain(self, port, seconds=30):
        """Answer every job until nothing is left to do; raise AssertionError after `seconds`."""
        self.port = port
        wire = self._wire()
        deadline = time.monotonic() + seconds
        while True:
            self._settle(wire)
            while jobs := self.poll(wire, "max=32&wait=0", lease=30):
                self.complete_batch(wire, jobs)
            stats = wire.request("GET", "/api/admin/stats")[1]
            if not stats["pending"] + stats["running"] + stats["delayed"] + len(self.late) + len(self.unsure):
                break
            assert time.monotonic() < deadline, f"not drained after {seconds} s: {stats}"
            jobs = self.poll(wire, "max=32&wait=0.2", lease=30)
            self.complete_batch(wire, jobs)
        wire.close()

    def act(self, name, wire, rng, **options):
        """Do one act, such as "client_batch", in the caller's thread; raise Cut where the server goes."""
        getattr(self, f"_{name}")(wire, rng, **options)

    # -- what one thread does

    def _guard(self, run, rng, over_grpc):
        wire = self._wire(over_grpc)
        try:
            while not self.stopping.is_set():
                run(wire, rng)
        except Cut:
            pass  # the server is gone; whoever runs the load knows
        except BaseException as error:  # a broken answer is a finding, shown by stop()
            self.errors.append(error)
        finally:
            wire.close()

    def _wire(self, over_grpc=False):
        wire = GrpcWire(self.port, self.grpc_port) if over_grpc else Wire(self.port)
        self.wires.append(wire)
        return wire

    def _client(self, wire, rng):
        act = _choose(rng, self.client_acts)
        self.act(f"client_{act}", wire, rng)

    def _worker(self, wire, rng):
        self._settle(wire)
        act = _choose(rng, self.worker_acts)
        lease = 1 if act in ("crash", "hang_up", "late") else 2
        self.act(f"worker_{act}", wire, rng, lease=lease)

    # -- one recorded call; each raises Cut where no answer comes, after recording it

    def _call(self, wire, call, method, path, body=b"", headers=None):
        """Make a call and record it, whatever comes of it; raise Cut after recording."""
        try:
            call.status, call.answer = wire.request(method, path, body, headers)
        except Cut as cut:
            call.sent = cut.sent
            raise
        finally:
            call.ended = time.monotonic()
            self.history.calls.append(call)
        return call

    def submit(self, wire, query, payload, key=None, ttl=None):
        headers = {"Content-Type": "application/octet-stream"}
        if key:
            headers["Idempotency-Key"] = key
        call = Call("submit", time.monotonic(), payloads=[payload], key=key, ttl=ttl)
        query += "" if ttl is None else f"&ttl={ttl}"
        try:
            return self._call(wire, call, "POST", f"/api/submit?attempts=20{query}", payload, headers)
        finally:
            if key and (call.status in (None, 503)):
                self.unsure_keys.append((payload, key))

    def poll(self, wire, query="wait=0.2", lease=2):
        return list(self.poll_call(wire, query, lease).jobs)

    def poll_call(self, wire, query, lease):
        call = Call("poll", time.monotonic(), lease=lease)
        self._call(wire, call, "GET", f"/api/worker/poll?lease={lease}&{query}")
        if call.ok and call.answer:
            call.jobs = call.answer.get("jobs", [call.answer]) if "jobs" in call.answer else [call.answer]
        return call

    def complete(self, wire, job, result=None, query=""):
        """Hand in a result; where no answer comes, remember to hand in the same again."""
        result = result or new_result(payload_bytes(job))
        call = Call(
            "complete", time.monotonic(), job_id=job["job_id"], token=job["lease_token"], result=result
        )
        path = f"/api/worker/complete/{job['job_id']}?lease_token={job['lease_token']}{query}"
        try:
            self._call(wire, call, "POST", path, json.dumps(result).encode())
        except Cut:
            self.unsure.append((job, result))
            raise
        if call.status in (503, 507):
            self.unsure.append((job, result))
        return call

    def complete_batch(self, wire, jobs):
        if not jobs:
            return
        calls = [
            Call(
                "complete",
                time.monotonic(),
                job_id=job["job_id"],
                token=job["lease_token"],
                result=new_result(payload_bytes(job)),
            )
            for job in jobs
        ]
        results = [
            {"job_id": call.job_id, "lease_token": call.token, "payload": call.result} for call in calls
        ]
        status, answers = None, None
        try:
            status, answer = wire.request(
                "POST", "/api/worker/complete", json.dumps({"results": results}).encode()
            )
            if status == 200:
                answers = answer["results"]
                assert [a["job_id"] for a in answers] == [call.job_id for call in calls], (
                    "answers out of order"
                )
        finally:
            for call, job, number in zip(calls, jobs, itertools.count()):
                call.ended = time.monotonic()
                call.answer = answers[number] if answers else None
                call.status = call.answer["status"] if answers else status
                self.history.calls.append(call)
                if call.unknown or call.status == 507:
                    self.unsure.append((job, call.result))

    def verb(self, wire, kind, job, query="", body=b""):
        call = Call(kind, time.monotonic(), job_id=job["job_id"], token=job["lease_token"])
        path = f"/api/worker/{kind}/{job['job_id']}?lease_token={job['lease_token']}{query}"
        return self._call(wire, call, "POST", path, body)

    def cancel(self, wire, job_id):
        """Cancel a job; return the call."""
        call = Call("cancel", time.monotonic(), job_id=job_id)
        return self._call(wire, call, "DELETE", f"/api/jobs/{job_id}")

    def _settle(self, wire):
        """Hand in what got no answer before, and the late ones whose lease is over by now."""
        with contextlib.suppress(IndexError):
            while True:
                job, result = self.unsure.popleft()
                self.complete(wire, job, result)
        for _ in range(len(self.late)):
            with contextlib.suppress(IndexError):
                job, due = self.late.popleft()
                if due <= time.monotonic():
                    self.complete(wire, job)
                else:
                    self.late.append((job, due))

    # -- clients

    def _client_sync(self, wire, rng):
        self.submit(wire, "", new_payload(rng, self.seed))

    def _client_async(self, wire, rng):
        self.submit(wire, f"&wait=0&priority={rng.randrange(10)}", new_payload(rng, self.seed))

    def _client_key(self, wire, rng):
        with contextlib.suppress(IndexError):
            while True:  # the same key, also after a crash, is the same job
                payload, key = self.unsure_keys.popleft()
                self.submit(wire, "&wait=0", payload, key)
        query = rng.choice(("", "&wait=0", "&wait=0.2"))
        self.submit(wire, query, new_payload(rng, self.seed), key=f"key-{self.seed}-{next(NUMBERS)}")

    def _client_key_twice(self, wire, rng):
        payload, key = new_payload(rng, self.seed), f"key-{self.seed}-{next(NUMBERS)}"
        self.submit(wire, "&wait=0", payload, key=key)
        self.submit(wire, rng.choice(("", "&wait=0")), payload, key=key)

    def _client_key_async(self, wire, rng):
        self.submit(wire, "&wait=0", new_payload(rng, self.seed), key=f"key-{self.seed}-{next(NUMBERS)}")

    def _client_batch(self, wire, rng):
        payloads = [new_payload(rng, self.seed, "json") for _ in range(rng.randint(2, 9))]
        call = Call("submit", time.monotonic(), payloads=payloads, batch=True)
        headers = {"Content-Type": "application/x-ndjson"}
        self._call(wire, call, "POST", "/api/jobs?attempts=20", b"\n".join(payloads) + b"\n", headers)

    def _client_cancel(self, wire, rng):
        call = self.submit(wire, "&wait=0&delay=0.1", new_payload(rng, self.seed))
        for job_id in call.job_ids:
            self.cancel(wire, job_id)

    def _client_delayed(self, wire, rng):
        self.submit(wire, f"&wait=0&delay={rng.uniform(0.05, 0.5):.2f}", new_payload(rng, self.seed))

    def _client_ttl(self, wire, rng):
        delay, ttl = (round(rng.uniform(0.01, 0.5), 3) for _ in range(2))  # which is over first decides
        self.submit(wire, f"&wait=0&delay={delay}", new_payload(rng, self.seed), ttl=ttl)

    def _client_hang_up(self, wire, rng):
        call = Call("submit", time.monotonic(), payloads=[new_payload(rng, self.seed)])
        self._send_and_hang_up(wire, call, "POST", "/api/submit?attempts=20", call.payloads[0])

    def _send_and_hang_up(self, wire, call, *request):
        try:
            wire.send(*request)
        finally:
            call.ended = time.monotonic()
            self.history.calls.append(call)
            wire.close()

    # -- workers

    def _worker_one(self, wire, rng, lease):
        for job in self.poll(wire, lease=lease):
            self.complete(wire, job)

    def _worker_batch(self, wire, rng, lease):
        self.complete_batch(wire, self.poll(wire, f"max={rng.randint(2, 16)}&wait=0.2", lease))

    def _worker_chain(self, wire, rng, lease):
        """One round trip a job: complete and take the next."""
        jobs = self.poll(wire, lease=lease)
        for left in range(20, -1, -1):
            if not jobs:
                return
            call = self.complete(wire, jobs[0], query=f"&next=true&lease={lease}&wait=0.1" if left else "")
            if not call.ok:
                return
            jobs = [call.answer["next"]] if call.answer.get("next") else []
            self.history.calls.append(
                Call("poll", call.started, call.ended, call.status, jobs=jobs, lease=lease)
            )

    def _worker_repeat(self, wire, rng, lease):
        """The same token again, with another result: the first one stands."""
        for job in self.poll(wire, lease=lease):
            self.complete(wire, job)
            self.complete(wire, job)

    def _worker_crash(self, wire, rng, lease):
        self.poll(wire, lease=lease)
        wire.close()

    def _worker_hang_up(self, wire, rng, lease):
        call = Call("poll", time.monotonic(), lease=lease)
        self._send_and_hang_up(wire, call, "GET", f"/api/worker/poll?lease={lease}&wait=5")

    def _worker_late(self, wire, rng, lease):
        for job in self.poll(wire, lease=lease):
            self.late.append((job, time.monotonic() + lease + 0.05))

    def _worker_fail(self, wire, rng, lease):
        for job in self.poll(wire, lease=lease):
            self.verb(wire, "fail", job, f"&delay={rng.choice((0, 0.1))}", b"not today")

    def _worker_fail_at_length(self, wire, rng, lease):
        for job in self.poll(wire, "max=1", lease):
            self.verb(wire, "fail", job, "&delay=0", b"e" * 4000)

    def _worker_fail_for_good(self, wire, rng, lease):
        for job in self.poll(wire, lease=lease):
            self.verb(wire, "fail", job, "&retry=false", b"never")

    def _worker_release(self, wire, rng, lease):
        for job in self.poll(wire, f"max={rng.randint(1, 3)}&wait=0.2", lease):
            self.verb(wire, "release", job)


def _choose(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]


def clear(history, port):
    """Clear the whole queue, recorded."""
    call = Call("clear", time.monotonic())
    try:
        call.status, call.answer = Wire(port).request("DELETE", "/api/admin/clear")
    except Cut as cut:
        call.sent = cut.sent
    call.ended = time.monotonic()
    history.calls.append(call)
    return call


# == Check ===================================================================================================


def server_jobs(port):
    """Return {job_id: the whole job} of everything the server holds; raise Cut where it stops meanwhile."""
    wire, jobs, after = Wire(port), {}, ""
    while after is not None:
        status, page = wire.request("GET", f"/api/jobs?limit=100{after}")
        if status == 503:
            raise Cut(page["detail"])
        assert status == 200, page
        for item in page["jobs"]:
            status, job = wire.request("GET", f"/api/jobs/{item['job_id']}")
            if status == 503:  # not lost, only not told any more
                raise Cut(job["detail"])
            assert status in (200, 404), job  # 404: forgotten in between
            if status == 200:
                jobs[job["job_id"]] = job
        after = page["next"] and f"&after={page['next']}"
    wire.close()
    return jobs


def check(history, port, drained=True, leases_survive=True, may=(), jobs=None, kept=None):
    """Hold the server at `port` to all that `history` was promised; raise AssertionError with what is broken.

    drained: every job must be final.
    leases_survive: False after a power cut, which may forget the newest leases.
    may: further (kind, status) that are in order, such as ("complete", 507) where no write can succeed.
    kept: the most finished jobs that the server keeps; what has ended may be forgotten (None: nothing may).
    Returns how much there was to check, so that a test can see that it checked something.
    """
    state = _State(history, server_jobs(port) if jobs is None else jobs, leases_survive, kept)
    found = [
        f"{call.kind} was answered {call.status}: {call.answer}"
        for call in history.calls
        if call.status is not None
        and call.status not in EXPECTED[call.kind]
        and (call.kind, call.status) not in may
    ]
    for rule in (_submits, _batches, _strangers, _hand_outs, _results, _ends, _clears, _ttls, _kept):
        found += rule(state)
    if state.leases_survive:
        found += [*_leases(state), *_attempts(state)]
    if drained:
        found += [
            f"{job_id} is {job['status']}, not final"
            for job_id, job in state.jobs.items()
            if job["status"] not in FINAL
        ]
    if found:
        raise AssertionError(f"{len(found)} promises broken:\n" + "\n".join(found[:20]))
    return collections.Counter(
        accepted=len(state.accepted),
        completed=len(state.completed),
        held=len(state.jobs),
        unknown=sum(call.unknown for call in history.calls),
        calls=len(history.calls),
    )


class _State:
    """The history turned round: by job, by payload."""

    def __init__(self, history, jobs, leases_survive, kept):
        self.history, self.jobs, self.leases_survive, self.kept = history, jobs, leases_survive, kept
        self.clears = [call for call in history.of("clear") if call.ok or call.unknown]
        self.senders = collections.defaultdict(list)  # payload -> submits; several only where they have a key
        for call in history.of("submit"):
            for payload in call.payloads:
                self.senders[payload].append(call)
        self.accepted = {}  # job_id -> (payload, the submit that was told)
        for call in history.of("submit"):
            for job_id, payload in zip(call.job_ids, call.payloads, strict=False):
                self.accepted.setdefault(job_id, (payload, call))
        self.completions = collections.defaultdict(list)
        for call in history.of("complete"):
            self.completions[call.job_id].append(call)
        self.completed = {
            job_id: [c for c in calls if c.ok and not c.answer.get("duplicate")]
            for job_id, calls in self.completions.items()
            if any(c.ok for c in calls)
        }
        self.hand_outs = collections.defaultdict(list)  # job_id -> [(poll, job)]
        for poll in history.of("poll"):
            for job in poll.jobs:
                self.hand_outs[job["job_id"]].append((poll, job))
        for pairs in self.hand_outs.values():
            pairs.sort(key=lambda pair: pair[0].ended)

    def seen(self):
        """Every job that a worker was shown or the server holds, as (id, job)."""
        for job_id, pairs in self.hand_outs.items():
            yield from ((job_id, job) for _, job in pairs)
        yield from self.jobs.items()

    def maybe_cleared(self, since):
        """True where a clear may have taken what was accepted by a call that began at `since`."""
        return any(clear.ended >= since for clear in self.clears)

    def maybe_forgotten(self, job_id):
        """True where the job may have ended and not have been kept."""
        if self.kept is None:
            return False
        payload, submit = self.accepted[job_id]
        ends = ("complete", "cancel", "fail")
        ended = any(c.job_id == job_id and (c.ok or c.unknown) for kind in ends for c in self.history.of(kind))
        return ended or submit.ttl is not None


# On a full disk, polls and completions go on; the rest may be told so.
_VERB = {200, 404, 409, 410, 503, 507}
EXPECTED = {
    "submit": {200, 202, 410, 502, 503, 504, 507},
    "poll": {200, 204, 503},
    "complete": _VERB - {507},
    "fail": _VERB,
    "release": _VERB,
    "cancel": _VERB,
    "clear": {200, 503, 507},
}


def _submits(state):
    """Every acknowledged submit is known, under its id, with its payload; a key names one job."""
    for call in state.history.of("submit"):
        if call.ok and len(call.job_ids) != len(call.payloads):
            yield f"a submit of {len(call.payloads)} was told {call.answer}"
    for job_id, (payload, call) in state.accepted.items():
        job = state.jobs.get(job_id)
        if job is None and not state.maybe_cleared(call.started) and not state.maybe_forgotten(job_id):
            yield f"{job_id} is lost: {call}"
        if job is not None and payload_bytes(job) != payload:
            yield f"{job_id} has another payload than was sent: {job} {call}"
    keys = collections.defaultdict(set)
    for call in state.history.of("submit"):
        if call.key and not state.maybe_cleared(call.started):
            keys[call.key].update(call.job_ids)
    yield from (f"key {key} names several jobs: {ids}" for key, ids in keys.items() if len(ids) > 1)


def _batches(state):
    """A batch is stored whole or not at all."""
    held = {payload_bytes(job) for job in state.jobs.values()}
    for call in state.history.of("submit"):
        if call.batch and not state.maybe_cleared(call.started) and state.kept is None:
            stored = sum(payload in held for payload in call.payloads)
            if stored not in (0, len(call.payloads)):
                yield f"{stored} of a batch of {len(call.payloads)} are stored: {call}"


def _strangers(state):
    """Nothing runs or is held that was not sent, or was refused; and one payload is one job."""
    owners = collections.defaultdict(set)
    for job_id, job in state.seen():
        payload = payload_bytes(job)
        senders = state.senders.get(payload)
        if senders is None:
            yield f"{job_id} holds a payload that nobody sent: {job}"
        elif all(call.refused or not call.sent for call in senders):
            yield f"{job_id} was refused and is there all the same: {senders} {job}"
        # A job that a power cut took after a worker had seen it may have been sent again, under its key.
        elif state.leases_survive or job_id in state.jobs:
            owners[payload].add(job_id)
    for payload, ids in owners.items():
        if len(ids) > 1 and not state.maybe_cleared(min(call.started for call in state.senders[payload])):
            yield f"one payload became {len(ids)} jobs: {ids} {payload[:80]}"


def _hand_outs(state):
    """What is final is never handed out again."""
    ends = collections.defaultdict(lambda: float("inf"))
    for call in state.history.calls:
        final = (
            call.kind in ("complete", "cancel")
            and call.ok
            or call.kind == "fail"
            and call.ok
            and call.answer.get("status") == "failed"
        )
        if final:
            ends[call.job_id] = min(ends[call.job_id], call.ended)
    for job_id, pairs in state.hand_outs.items():
        for poll, job in pairs:
            if poll.started > ends[job_id]:
                yield f"{job_id} was final and handed out again: {job}"


def _results(state):
    """One visible result a job, for every onlooker: the acknowledged completion, of its own payload."""
    shown = collections.defaultdict(list)
    for call in state.history.of("submit"):
        if call.status == 200:
            shown[call.answer["job_id"]].append(call.answer["payload"])
    for job_id, job in state.jobs.items():
        if job["status"] == "completed":
            shown[job_id].append(job["result"])
    for job_id, results in shown.items():
        yield from _result(state, job_id, results)
    for job_id, calls in state.completed.items():
        if len(calls) > 1:
            yield f"{job_id} was completed twice: {calls}"
        job = state.jobs.get(job_id)
        if calls and job is not None and job["status"] != "completed":
            yield f"{job_id} was completed and is {job['status']}: {calls[0]}"


def _result(state, job_id, results):
    if any(result != results[0] for result in results):
        yield f"{job_id} showed several results: {results}"
    payload = state.accepted[job_id][0] if job_id in state.accepted else None
    if payload is None and job_id in state.jobs:
        payload = payload_bytes(state.jobs[job_id])
    if payload is not None and results[0].get("sha") != hashlib.sha256(payload).hexdigest():
        yield f"{job_id} shows a result of another payload: {results[0]}"
    first = state.completed.get(job_id) or [c for c in state.completions[job_id] if c.unknown or c.ok]
    if not any(call.result == results[0] for call in first):
        yield f"{job_id} shows {results[0]}, which is not what was acknowledged: {first}"


def _ends(state):
    """An acknowledged cancel or last failure holds; a worker is not told that its job is unknown."""
    for call in state.history.calls:
        job = state.jobs.get(call.job_id)
        if job is not None and call.ok and call.kind == "cancel" and job["status"] != "cancelled":
            yield f"{call.job_id} was cancelled and is {job['status']}"
        if (
            job is not None
            and call.ok
            and call.kind == "fail"
            and call.answer.get("status") == "failed"
            and job["status"] != "failed"
        ):
            yield f"{call.job_id} failed for good and is {job['status']}"
        if call.status == 404 and not state.maybe_cleared(0) and state.kept is None:
            yield f"{call.kind} of {call.job_id}, which was handed out, was told 404: {call.answer}"


def _clears(state):
    """What was accepted before an acknowledged clear began is gone."""
    done = max((call.started for call in state.clears if call.ok), default=0)
    for job_id, (_, call) in state.accepted.items():
        if call.ended < done and job_id in state.jobs:
            yield f"{job_id} was cleared and is still there"


def _ttls(state):
    """Nothing is handed out after its time to live, which begins before its submit was answered."""
    for job_id, (_, submit) in state.accepted.items():
        for poll, job in state.hand_outs[job_id] if submit.ttl is not None else ():
            if poll.started > submit.ended + submit.ttl:
                yield f"{job_id} was handed out after its ttl of {submit.ttl} s: {submit} {job}"


def _kept(state):
    """Not more finished jobs are kept than shall be."""
    finished = sum(job["status"] in FINAL for job in state.jobs.values())
    if state.kept is not None and finished > state.kept:
        yield f"{finished} finished jobs are kept, not {state.kept}"


def _leases(state):
    """No job is with two workers at once, and a lease in force is not lost.

    A lease runs from the moment the server gave it, which is not before the poll was sent.
    """
    given_back = {
        (call.job_id, call.token)
        for kind in ("fail", "release")
        for call in state.history.of(kind)
        if call.ok or call.unknown
    }
    until = {}
    for job_id, pairs in state.hand_outs.items():
        for (first, job), (second, _) in itertools.pairwise(pairs):
            free = first.started + first.lease
            if (job_id, job["lease_token"]) not in given_back and second.ended < free:
                yield f"{job_id} was handed out again {free - second.ended:.2f} s before its lease was over"
        until.update({(job_id, job["lease_token"]): poll.started + poll.lease for poll, job in pairs})
    for call in state.history.of("complete"):
        lost = call.status == 409 and call.answer.get("code") == "lease_lost"
        if (
            lost
            and (call.job_id, call.token) not in given_back
            and call.ended < until.get((call.job_id, call.token), 0)
        ):
            yield f"{call.job_id} lost its lease while it was in force: {call}"


def _attempts(state):
    """The count of attempts never goes back."""
    for job_id, pairs in state.hand_outs.items():
        for (first, job), (second, again) in itertools.pairwise(pairs):
            if first.ended < second.started and again["attempt"] < job["attempt"]:
                yield f"{job_id} went from attempt {job['attempt']} back to {again['attempt']}"
