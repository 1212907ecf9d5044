"""The wire is strict: what RFC 9112 and RFC 9110 allow is served, the rest gets an answer and a close.

The tables are in http_cases.py. A real server process, real sockets, raw bytes; every stream is read
to its end.
"""

import base64
import contextlib
import functools
import http.client
import json
import os
import re
import selectors
import socket
import time
from dataclasses import dataclass, field, replace

import pytest

from http_cases import ALLOWED, CASES, CLOSES, EITHER, GET, SMUGGLED, line, parse_answers, submit, with_fields
from support import grpc_stub, start_server, wait_until
from wires import later

EVERY = 0.1  # seconds between two drops of a slow client
DEADLINE = 10  # seconds, for any one connection; a hang is a failure
SMALL = 2000  # bytes, up to which a case is also sent byte by byte
TOKEN = "client-token-0123456789abcdef"


class Wire:
    """A server, a way to talk bytes to it, and a second connection to see what it did."""

    def __init__(self, server, headers=None):
        self.server, self.port, self.headers = server, server.port, headers or {}
        self.smuggled = set()
        self.control = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def exchange(self, data, bytewise=False, ends=False):
        """Send `data`, then all that comes back until the server ends the stream; a reset is a failure."""
        with self.connect() as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for part in (data[at:at + 1] for at in range(len(data))) if bytewise else (data,):
                    connection.sendall(part)
                if ends:
                    connection.shutdown(socket.SHUT_WR)
            return read_to_end(connection)

    def answers(self, data, methods=(), **how):
        """The final answers to `data`."""
        answers = parse_answers(self.exchange(data, **how), methods)
        return [answer for answer in answers if answer.status >= 200]

    def call(self, method, path, body=None):
        self.control.close()  # it may have been idle for longer than the server lets it be: another one is opened
        self.control.request(method, path, body, self.headers)
        response = self.control.getresponse()
        content = response.read()
        return response.status, json.loads(content) if content else None

    def jobs(self, queue):
        """All jobs of a queue, in the order of their submits."""
        jobs, after = [], ""
        while True:
            status, page = self.call("GET", f"/api/jobs?queue={queue}{after}")
            assert status == 200, page
            jobs += page["jobs"]
            if page["next"] is None:
                return jobs[::-1]
            after = f"&after={page['next']}"

    def newly_smuggled(self):
        """What ran since the last look although it was hidden in a body: each is blamed on one test."""
        new = {job["job_id"] for job in self.jobs("smuggled")} - self.smuggled
        self.smuggled |= new
        return new

    def job(self, job_id):
        status, job = self.call("GET", f"/api/jobs/{job_id}")
        assert status == 200, job
        return job

    def poll(self, queue):
        status, job = self.call("GET", f"/api/worker/poll?queue={queue}&wait=10")
        assert status == 200, job
        return job

    def complete(self, job, body=b"", **headers):
        path = f"/api/worker/complete/{job['job_id']}?lease_token={job['lease_token']}"
        self.control.close()
        self.control.request("POST", path, body, {**self.headers, **headers})
        response = self.control.getresponse()
        assert response.status == 200, response.read()
        response.read()


def read_to_end(connection):
    stream = bytearray()
    try:
        while received := connection.recv(65536):
            stream += received
    except TimeoutError:
        pytest.fail(f"neither an answer nor an end within {DEADLINE} s; so far: {bytes(stream)!r}")
    except ConnectionResetError:
        pytest.fail(f"reset, so that an answer may be lost; so far: {bytes(stream)!r}")
    return bytes(stream)


def read_until(connection, enough):
    """Read until `enough(stream)` holds."""
    stream = bytearray()
    while not enough(stream):
        received = connection.recv(65536)
        assert received, f"ended too soon: {bytes(stream)!r}"
        stream += received
    return bytes(stream)


def canary(queue):
    """The request that shows whether the server knows where the message before it ended."""
    return (f"POST /api/submit?queue={queue}&wait=0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            "Content-Length: 6\r\n\r\ncanary").encode()


def start(tmp_path_factory, name, *flags):
    server = start_server(tmp_path_factory.mktemp(name), "--fsync", "never", "--drain", "0", *flags)
    return Wire(server)


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    running = start(tmp_path_factory, "wire", "--access-log")
    yield running
    running.server.stop()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A server whose limits are small."""
    limits = ("--max-payload", "1000", "--max-request-line", "256", "--max-headers", "1024")
    running = start(tmp_path_factory, "small", "--grpc-port", "off", *limits)
    yield running
    running.server.stop()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with tokens."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"client,worker,admin {TOKEN}\n")
    tokens.chmod(0o600)
    running = start(tmp_path_factory, "guarded", "--grpc-port", "off", "--tokens", str(tokens))
    running.headers = {"Authorization": f"Bearer {TOKEN}"}
    yield running
    running.server.stop()


# == The tables

WHOLE = [pytest.param(number, case, id=name) for number, (name, case) in enumerate(CASES)]
BYTEWISE = [param for param in WHOLE if len(param.values[1].sent) <= SMALL]


@pytest.mark.parametrize("number, case", WHOLE)
def test_in_one_write_the_message_is_answered_and_what_follows_it_is_not_mistaken(wire, number, case):
    check_case(wire, case, f"w{number:04}", bytewise=False)


@pytest.mark.parametrize("number, case", BYTEWISE)
def test_byte_by_byte_the_message_is_answered_and_what_follows_it_is_not_mistaken(wire, number, case):
    check_case(wire, case, f"b{number:04}", bytewise=True)


def check_case(wire, case, queue, bytewise):
    sent = case.sent.replace(b"QUEUE", queue.encode()) + canary("c" + queue)
    stream = wire.exchange(sent, bytewise, case.ends)
    print(f"{case.source}\nsent:     {sent[:1000]!r}\nanswered: {stream!r}")
    answers = parse_answers(stream, case.methods)
    finals = [answer for answer in answers if answer.status >= 200]
    assert len(finals) == len(answers) or b"expect:" in case.sent.lower(), "a 100 that nobody expects"
    check_statuses(case, finals)
    check_connection(wire, case, finals, "c" + queue)
    check_stored(wire, case, finals, queue)


def check_statuses(case, finals):
    wanted = len(case.answers)
    statuses = [answer.status for answer in finals]
    assert len(finals) >= wanted, f"answers missing: {statuses}"
    for answer, allowed in zip(finals, case.answers, strict=False):
        assert answer.status in allowed, f"{statuses}, wanted {case.answers}"
    if wanted and finals[wanted - 1].status >= 400 and finals[wanted - 1].body:
        problem = finals[wanted - 1].json()
        assert not case.codes or problem["code"] in case.codes, problem
        assert case.names in problem["detail"], problem


def check_connection(wire, case, finals, queue):
    """The canary runs exactly once where the connection goes on, and never where it had to end."""
    wanted = len(case.answers)
    statuses = [answer.status for answer in finals]
    if case.connection == CLOSES or case.connection == EITHER and finals[wanted - 1].closes:
        assert len(finals) == wanted, f"answered after the end: {statuses}"
        assert not finals or finals[-1].closes, f"closed without saying so: {finals[-1].headers}"
        assert not wire.jobs(queue), "the canary ran"
    else:
        assert len(finals) == wanted + 1, f"the canary was not answered once: {statuses}"
        assert finals[wanted].status == 202, f"the canary got {statuses}"
        ran = wire.jobs(queue)
        assert [job["job_id"] for job in ran] == [finals[wanted].json()["job_id"]]
    assert not wire.newly_smuggled(), "a request that was hidden in a body ran"


def check_stored(wire, case, finals, queue):
    """What was acknowledged is stored as it was sent, and nothing else is."""
    ids = [answer.json()["job_id"] for answer in finals[:len(case.answers)] if answer.status == 202]
    assert [job["job_id"] for job in wire.jobs(queue)] == ids
    if case.payload is not None:
        assert wire.job(ids[0])["payload"] == case.payload


# == Pieces and order


def cuts(wire, message, answered, methods=()):
    """Send `message` in two pieces on a connection for each place to cut it; check every answer."""
    connections = []
    try:
        for at in range(1, len(message)):
            connections.append(wire.connect())
            connections[-1].sendall(message[:at])
        # By the time that this is answered, the server has had its turn to read the first pieces.
        assert wire.call("GET", "/health")[0] == 200
        for at, connection in enumerate(connections, 1):
            connection.sendall(message[at:])
        for at, connection in enumerate(connections, 1):
            finals = [one for one in parse_answers(read_to_end(connection), methods) if one.status >= 200]
            assert [answer.status for answer in finals] == answered, f"cut at {at}: {message[:at]!r}"
    finally:
        for connection in connections:
            connection.close()


def test_a_submit_with_a_length_may_be_cut_at_every_byte(wire):
    message = submit(b"Content-Type: text/plain\r\nContent-Length: 5\r\n", b"hello", queue=b"cut-1")
    cuts(wire, message + canary("cut-1-canary"), [202, 202])
    assert {wire.job(job["job_id"])["payload"] for job in wire.jobs("cut-1")} == {"hello"}
    assert {wire.job(job["job_id"])["payload"] for job in wire.jobs("cut-1-canary")} == {"canary"}


def test_a_chunked_submit_may_be_cut_at_every_byte(wire):
    message = submit(b"Transfer-Encoding: chunked\r\n",
                     b'2;a="b"\r\nhe\r\n003\r\nllo\r\n00\r\nX-Sum: 1\r\n\r\n', queue=b"cut-2")
    cuts(wire, message + canary("cut-2-canary"), [202, 202])
    assert {wire.job(job["job_id"])["payload"] for job in wire.jobs("cut-2")} == {"hello"}


def test_a_refusal_is_the_same_wherever_the_message_is_cut(wire):
    message = submit(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED,
                     b"cut-3")
    cuts(wire, message, [400])
    assert not wire.jobs("cut-3")
    assert not wire.newly_smuggled()


def test_fifty_submits_in_one_write_are_answered_in_order(wire):
    message = b"".join(submit(b"Content-Length: 2\r\n", b"%02d" % number, b"fifty") for number in range(50))
    answers = wire.answers(message + canary("fifty-canary"))
    assert [answer.status for answer in answers] == [202] * 51
    assert [wire.job(answer.json()["job_id"])["payload"] for answer in answers[:-1]] == [
        number if number >= 10 else f"{number:02}" for number in range(50)]
    for answer in answers:
        assert answer.headers["location"] == f"/api/jobs/{answer.json()['job_id']}"


def test_a_request_behind_a_held_one_is_answered_after_it(wire):
    held = b"POST /api/submit?queue=held-1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nfirst"
    with wire.connect() as connection:
        connection.sendall(held + GET + held.replace(b"first", b"third") + canary("held-1-canary"))
        wire.complete(wire.poll("held-1"), b'"result of first"')
        first = read_until(connection, lambda stream: stream.count(b"HTTP/1.1 200 ") >= 2)
        assert not wire.jobs("held-1-canary"), "the canary overtook the held submit"
        wire.complete(wire.poll("held-1"), b'"result of third"')
        answers = parse_answers(first + read_to_end(connection))
    assert [answer.status for answer in answers] == [200, 200, 200, 202]
    assert answers[0].json()["payload"] == "result of first"
    assert answers[1].json() == {"status": "ok"}
    assert answers[2].json()["payload"] == "result of third"


def test_a_large_request_behind_a_held_one_is_read_on_and_answered_after_it(wire):
    held = b"POST /api/submit?queue=held-4 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nfirst"
    large = submit(b"Content-Length: 300000\r\n", b"x" * 300_000, queue=b"held-4-large")
    with wire.connect() as connection:
        sending = later(connection.sendall, held + large + canary("held-4-canary"))
        job = wire.poll("held-4")
        for _ in range(3):  # by then it has read as much as it takes before the first is answered
            assert wire.call("GET", "/health")[0] == 200
        wire.complete(job, b'"result of first"')
        answers = parse_answers(read_to_end(connection))
        sending.result(DEADLINE)
    assert [answer.status for answer in answers] == [200, 202, 202]
    assert answers[0].json()["payload"] == "result of first"
    assert wire.job(answers[1].json()["job_id"])["payload"] == "x" * 300_000


@contextlib.contextmanager
def two_held(wire, queue, query=""):
    """A held request and a large one behind it on the same connection; the first has its result."""
    held = b"POST /api/submit?queue=%b%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
    with wire.connect() as connection:
        connection.sendall(held % (queue, b"", 5, b"first") + held % (queue, query.encode(), 70_000, b"x" * 70_000))
        job = wire.poll(queue.decode())
        for _ in range(3):  # all that was sent has come
            assert wire.call("GET", "/health")[0] == 200
        wire.complete(job, b'"result of first"')
        yield connection, wire.poll(queue.decode())


def test_after_two_held_requests_of_which_the_second_is_large_the_third_is_answered(wire):
    with two_held(wire, b"held-5") as (connection, job):
        wire.complete(job, b'"result of second"')
        connection.sendall(canary("held-5-canary"))
        answers = parse_answers(read_to_end(connection))
    assert [answer.status for answer in answers] == [200, 200, 202]


def test_a_hang_up_behind_a_large_held_request_is_noticed(wire):
    with two_held(wire, b"held-6", "&on_disconnect=cancel") as (_, job):
        pass
    wait_until(lambda: wire.job(job["job_id"])["status"] == "cancelled")


def test_a_refusal_behind_a_held_request_comes_after_its_result(wire):
    held = b"POST /api/submit?queue=held-2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nfirst"
    with wire.connect() as connection:
        connection.sendall(held + with_fields(b"X : y\r\n") + canary("held-2-canary"))
        wire.complete(wire.poll("held-2"), b'"result"')
        answers = parse_answers(read_to_end(connection))
    assert [answer.status for answer in answers] == [200, 400]
    assert not wire.jobs("held-2-canary")


def test_a_request_behind_a_long_poll_is_answered_after_it(wire):
    with wire.connect() as connection:
        poll = b"GET /api/worker/poll?queue=held-3&wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(poll + GET + canary("held-3-canary"))
        wire.call("POST", "/api/submit?queue=held-3&wait=0", b'"job"')
        answers = parse_answers(read_to_end(connection))
    assert [answer.status for answer in answers] == [200, 200, 202]
    assert answers[0].json()["payload"] == "job"


NO_WAITING = [b"/health", b"/ready", b"/metrics", b"/openapi.json", b"/", b"/api/admin/stats", b"/api/jobs",
              b"/api/jobs/none", b"/api/admin/next?queue=none", b"/api/admin/workers", b"/nowhere"]


@pytest.mark.parametrize("path", NO_WAITING, ids=lambda path: path.decode())
def test_what_waits_for_nobody_is_answered_behind_a_half_close(wire, path):
    """RFC 9112 9.6: a client may say that it has sent its last request; the answers are still for it."""
    get = line(b"GET " + path + b" HTTP/1.1")
    for _ in range(20):
        answers = wire.answers(get + get, ends=True)
        assert len(answers) == 2 or len(answers) == 1 and answers[0].closes


@pytest.mark.parametrize("part", range(0, 100, 7))
def test_a_request_that_ends_too_soon_is_never_run(wire, part):
    queue = f"soon-{part}"
    message = submit(b"Content-Length: 50\r\n", b"x" * 50, queue=queue.encode())
    for answer in wire.answers(message[:len(message) * part // 100], ends=True):
        assert answer.status in (400, 408)
        assert answer.closes
    assert not wire.jobs(queue)


ON_ITS_WAY = {
    "a request line": b"POST /api/sub",
    "headers": b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nX-A: ",
    "a body": b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n12345",
    "a body of which nothing came": b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n",
    "chunks": b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n12",
    "a second request": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
}


def test_a_request_on_its_way_at_the_stop_is_told_so(tmp_path_factory):
    stopping = start(tmp_path_factory, "stopping", "--grpc-port", "off")
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(stopping.connect())
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_until(idle, lambda stream: b"ok" in stream)
        connections = {name: stack.enter_context(stopping.connect()) for name in ON_ITS_WAY}
        for name, connection in connections.items():
            connection.sendall(ON_ITS_WAY[name])
        assert stopping.call("GET", "/health")[0] == 200  # by now it has read the others
        stopping.server.terminate()
        for name, connection in connections.items():
            *before, told = parse_answers(read_to_end(connection))
            assert [answer.status for answer in before] == [200] * (name == "a second request"), name
            assert (told.status, told.json()["code"], told.closes) == (503, "draining", True), name
            assert int(told.headers["retry-after"]) >= 1
            connection.close()
        assert read_to_end(idle) == b""
    assert stopping.server.wait() == 0


def test_a_request_in_pieces_holds_nobody_else_up(wire):
    with wire.connect() as slow:
        slow.sendall(b"GET /health HTT")
        assert [answer.status for answer in wire.answers(GET + canary("piece"))] == [200, 202]
        slow.sendall(b"P/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert [answer.status for answer in parse_answers(read_to_end(slow))] == [200]


# == HEAD: RFC 9110 9.3.2


@pytest.fixture(scope="module")
def finished(wire):
    """The id of a completed job."""
    _, job = wire.call("POST", "/api/submit?queue=finished&wait=0", b"{}")
    wire.complete(wire.poll("finished"), b"<p>done</p>", **{"Content-Type": "text/html"})
    return job["job_id"]


STABLE = ["/health", "/ready", "/openapi.json", "/", "/api/jobs?queue=finished", "/api/jobs/JOB",
          "/api/jobs/JOB/result", "/api/admin/next?queue=none", "/api/jobs/none", "/nowhere",
          "/api/worker/poll"]


@pytest.mark.parametrize("path", [*STABLE, "/metrics", "/api/admin/stats", "/api/admin/workers"])
def test_head_is_get_without_the_body(wire, finished, path):
    target = path.replace("JOB", finished).encode()
    head = wire.answers(line(b"HEAD " + target + b" HTTP/1.1") + canary("head"), methods=(b"HEAD",))
    if path == "/api/worker/poll":  # which changes state
        assert [answer.status for answer in head][:1] == [405]
        return
    get = wire.answers(line(b"GET " + target + b" HTTP/1.1") + canary("head"))
    assert [answer.status for answer in head] == [answer.status for answer in get]
    assert head[0].headers.get("content-type") == get[0].headers.get("content-type")
    assert ("content-length" in head[0].headers) == ("content-length" in get[0].headers)
    if path in STABLE:
        assert head[0].headers.get("content-length") == get[0].headers.get("content-length")


def test_head_of_a_poll_eats_no_job(wire):
    _, job = wire.call("POST", "/api/submit?queue=head-poll&wait=0", b"{}")
    head = line(b"HEAD /api/worker/poll?queue=head-poll HTTP/1.1")
    answers = wire.answers(head + canary("head"), (b"HEAD",))
    assert answers[0].status == 405
    assert "GET" in answers[0].headers["allow"]
    polled = wire.poll("head-poll")
    assert (polled["job_id"], polled["attempt"]) == (job["job_id"], 1)


def test_head_of_a_submit_stores_nothing(wire):
    answers = wire.answers(line(b"HEAD /api/submit?queue=head-submit HTTP/1.1") + canary("head"), (b"HEAD",))
    assert answers[0].status == 405
    assert not wire.jobs("head-submit")


# == Methods and bodies


@pytest.mark.parametrize("path", ALLOWED, ids=lambda path: path.decode())
def test_a_wrong_method_is_told_the_right_ones(wire, path):
    answers = wire.answers(line(b"PATCH " + path + b" HTTP/1.1") + canary("patch"))
    assert answers[0].status == 405
    allowed = set(re.split(", ?", answers[0].headers["allow"])) - {"OPTIONS"}
    assert allowed == set(ALLOWED[path].split(", "))


def test_an_empty_poll_has_no_content_fields(wire):
    poll = line(b"GET /api/worker/poll?queue=none HTTP/1.1")
    answers = wire.answers(poll + poll + canary("empty"))
    assert [answer.status for answer in answers] == [204, 204, 202]
    for name in ("content-length", "content-type", "transfer-encoding"):
        assert name not in answers[0].headers


def sent_whole(wire, head, size):
    """Send head and `size` bytes of body to the last one, and only then read."""
    with wire.connect() as connection:
        connection.sendall(head)
        for _ in range(size >> 16):
            connection.sendall(b"x" * 65536)
        connection.sendall(canary("whole-canary"))
        return parse_answers(read_to_end(connection))


def test_a_client_that_sends_everything_first_can_read_its_413(wire):
    """RFC 9112 9.6: the server closes in stages, or the answer is lost to a reset."""
    answers = sent_whole(wire, submit(b"Content-Length: 8388608\r\n", queue=b"whole"), 8388608)
    assert [answer.status for answer in answers] == [413]
    assert answers[0].closes
    assert answers[0].json()["code"] == "payload_too_large"
    assert not wire.jobs("whole") + wire.jobs("whole-canary")


def test_a_refused_client_that_goes_on_sending_is_cut_off(impatient):
    """The stages of a close have an end too, or one client holds a connection for ever."""
    with impatient.connect() as connection:
        connection.sendall(submit(b"Content-Length: 999999999\r\n"))
        answers = parse_answers(read_to_end(connection))
        assert [answer.status for answer in answers] == [413]
        selector = selectors.DefaultSelector()  # only for its wait: the stream has ended, the drip goes on
        deadline = time.monotonic() + DEADLINE
        with selector, pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                connection.sendall(b"x")
                selector.select(EVERY)


def test_a_413_comes_before_the_body(wire):
    with wire.connect() as connection:
        connection.sendall(submit(b"Content-Length: 4128769\r\n"))
        answers = parse_answers(read_to_end(connection))
    assert [answer.status for answer in answers] == [413]


def test_the_largest_payload_is_accepted_in_both_framings(wire):
    body = b'"' + b"a" * 4128766 + b'"'
    sized = submit(b"Content-Length: 4128768\r\n", body, queue=b"large")
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part)
                      for part in (body[at:at + 100000] for at in range(0, len(body), 100000)))
    chunked = submit(b"Transfer-Encoding: chunked\r\n", chunks + b"0\r\n\r\n", queue=b"large")
    assert [answer.status for answer in wire.answers(sized + chunked + canary("large-canary"))] == [202] * 3


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size, status", [(0, 202), (999, 202), (1000, 202), (1001, 413), (1999, 413)])
def test_the_payload_limit_is_exact(small, framing, size, status):
    queue = f"exact-{framing}-{size}"
    if framing == "length":
        message = submit(b"Content-Length: %d\r\n" % size, b"x" * size)
    else:  # in two chunks, the limit being crossed in the second
        parts = [part for part in (b"x" * (size // 2), b"x" * (size - size // 2)) if part]
        message = submit(b"Transfer-Encoding: chunked\r\n",
                         b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n")
    answers = small.answers(message.replace(b"QUEUE", queue.encode()) + canary("exact-canary"))
    assert [answer.status for answer in answers] == ([202, 202] if status == 202 else [413])
    assert len(small.jobs(queue)) == (status == 202)


@pytest.mark.parametrize("length, status", [(250, 404), (270, 414), (100000, 414)])
def test_the_request_line_has_its_limit(small, length, status):
    padding = b"a" * (length - len(b"GET / HTTP/1.1\r\n"))
    answers = small.answers(line(b"GET /" + padding + b" HTTP/1.1") + canary("line-canary"))
    assert answers[0].status == status
    assert answers[0].closes or status == 404


@pytest.mark.parametrize("length, status", [(990, 200), (1100, 431), (100000, 431)])
def test_the_header_fields_have_their_limit(small, length, status):
    padding = b"a" * (length - len(b"Host: localhost\r\nX-A: \r\n\r\n"))
    answers = small.answers(with_fields(b"X-A: " + padding + b"\r\n") + canary("fields-canary"))
    assert answers[0].status == status
    assert len(answers) == (2 if status == 200 else 1)


# == What a head costs


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="no /proc to measure a process by")


def cpu(wire):
    """Nanoseconds that the threads of the server have run."""
    folder, total = f"/proc/{wire.server.pid}/task", 0
    for thread in os.listdir(folder):
        with contextlib.suppress(OSError), open(os.path.join(folder, thread, "schedstat")) as stat:
            total += int(stat.read().split()[0])
    return total


def cost(wire, act):
    """What it costs the server, at best: what else it does now and then is none of it."""
    costs = []
    for _ in range(3):
        before = cpu(wire)
        act()
        costs.append(cpu(wire) - before)
    return min(costs)


SPACES = {
    "header": lambda count: with_fields(b"X-A:" + b" " * count + b"\x01\r\n"),
    "trailer": lambda count: submit(b"Transfer-Encoding: chunked\r\n", b"0\r\nX-A:" + b" " * count + b"\x01\r\n\r\n"),
}


@needs_proc
@pytest.mark.parametrize("where", SPACES)
def test_eight_times_the_spaces_cost_by_far_not_64_times_the_time(wire, where):
    """What is tried anew from each space keeps everybody waiting for one small request."""

    def refuse(count):
        answers = wire.answers(SPACES[where](count))
        assert [answer.status for answer in answers] == [400]

    few, many = [cost(wire, functools.partial(refuse, count)) for count in (4_000, 32_000)]
    print(f"{few / 1e6:.2f} ms, {many / 1e6:.2f} ms")
    assert many < 20 * few


DRIPS = {
    "header": with_fields(b"X-A: ")[:-2],
    "trailer": submit(b"Transfer-Encoding: chunked\r\n", b"0\r\nX-A: ", queue=b"drips"),
}


@needs_proc
@pytest.mark.parametrize("where", DRIPS)
def test_a_byte_that_drips_in_behind_many_costs_hardly_more_than_one_behind_few(wire, where):
    """What has been looked at is not looked at again for each byte."""
    with wire.connect() as connection:
        connection.sendall(DRIPS[where])

        def drip():
            for _ in range(100):
                connection.sendall(b"x")
                assert wire.call("GET", "/health")[0] == 200  # the byte was read by then, and alone

        few = cost(wire, drip)
        connection.sendall(b"x" * 30_000)
        many = cost(wire, drip)
    print(f"{few / 1e6:.2f} ms, {many / 1e6:.2f} ms for 100 bytes")
    assert many < 4 * few


# == Expect: 100-continue (RFC 9110 10.1.1)

EXPECTS = b"Expect: 100-continue\r\n"


def expect(wire, head, body=b""):
    """Send a head, wait for what comes, and send the body only after a 100."""
    with wire.connect() as connection:
        connection.sendall(head)
        first = read_until(connection, lambda stream: b"\r\n\r\n" in stream)
        if not first.startswith(b"HTTP/1.1 100 "):
            return parse_answers(first + read_to_end(connection))
        connection.sendall(body)
        return parse_answers(first + read_to_end(connection))


def test_a_body_that_is_awaited_is_asked_for(wire):
    head = submit(EXPECTS + b"Content-Length: 5\r\n", queue=b"expect")
    answers = expect(wire, head, b"hello" + canary("expect-canary"))
    assert [answer.status for answer in answers] == [100, 202, 202]
    assert wire.job(answers[1].json()["job_id"])["payload"] == "hello"


def test_chunks_that_are_awaited_are_asked_for(wire):
    head = submit(EXPECTS + b"Transfer-Encoding: chunked\r\n", queue=b"expect")
    answers = expect(wire, head, b"5\r\nhello\r\n0\r\n\r\n" + canary("expect-canary"))
    assert [answer.status for answer in answers] == [100, 202, 202]


def test_the_second_request_may_expect_too(wire):
    head = submit(EXPECTS + b"Content-Length: 5\r\n", queue=b"expect")
    with wire.connect() as connection:
        connection.sendall(GET + head)
        first = read_until(connection, lambda stream: b"HTTP/1.1 100 " in stream)
        connection.sendall(b"hello" + canary("expect-canary"))
        answers = parse_answers(first + read_to_end(connection))
    assert [answer.status for answer in answers] == [200, 100, 202, 202]


def test_a_body_over_the_limit_is_not_asked_for(wire):
    answers = expect(wire, submit(EXPECTS + b"Content-Length: 4128769\r\n"))
    assert [answer.status for answer in answers] == [413]
    assert answers[0].closes


def test_a_bad_message_is_not_asked_for_its_body(wire):
    answers = expect(wire, submit(EXPECTS + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"))
    assert [answer.status for answer in answers] == [400]


def test_an_unknown_expectation_is_a_417(wire):
    with wire.connect() as connection:
        connection.sendall(submit(b"Expect: cake\r\nConnection: close\r\nContent-Length: 5\r\n"))
        stream = read_until(connection, lambda stream: b"expectation_failed" in stream)
    assert stream.startswith(b"HTTP/1.1 417 ")


def test_a_body_without_a_token_is_not_asked_for(guarded):
    head = submit(EXPECTS + b"Connection: close\r\nContent-Length: 5\r\n", queue=b"expect")
    with guarded.connect() as connection:
        connection.sendall(head)
        stream = read_until(connection, lambda stream: b"\r\n\r\n" in stream)
    assert stream.startswith(b"HTTP/1.1 401 ")
    assert not guarded.jobs("expect")


def test_a_body_with_a_token_is_asked_for(guarded):
    authorization = b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
    head = submit(EXPECTS + authorization + b"Content-Length: 5\r\n", queue=b"expect-token")
    answers = expect(guarded, head, b"hello" + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert [answer.status for answer in answers] == [100, 202, 200]
    assert "authorization" not in json.dumps(guarded.poll("expect-token")).lower()


def test_a_401_with_a_request_in_its_body_runs_nothing(guarded):
    message = submit(b"Content-Length: %d\r\n" % len(SMUGGLED), SMUGGLED, queue=b"no-token")
    answers = guarded.answers(message + canary("no-token"))
    assert {answer.status for answer in answers} == {401}
    assert len(answers) == (1 if answers[0].closes else 2)
    assert not guarded.jobs("no-token")
    assert not guarded.newly_smuggled()


def test_a_client_without_a_token_that_sends_everything_first_can_read_its_401(guarded):
    answers = sent_whole(guarded, submit(b"Content-Length: 4063232\r\n"), 4063232)
    assert {answer.status for answer in answers} == {401}


# == Nothing that is sent becomes a header of an answer

INJECTION = b"x%0d%0aX-Injected:%20yes%0d%0a%0d%0aHTTP/1.1%20200%20OK"


@pytest.mark.parametrize("target", [
    b"GET /api/jobs/" + INJECTION, b"GET /api/jobs/" + INJECTION + b"/result",
    b"DELETE /api/jobs/" + INJECTION, b"GET /" + INJECTION, b"POST /api/worker/complete/" + INJECTION,
    b"POST /api/submit?queue=" + INJECTION,
    b"POST /api/submit?" + INJECTION + b"=1", b"GET /api/worker/poll?queue=none&worker=" + INJECTION,
    b"POST /api/worker/complete/none?lease_token=" + INJECTION, b"GET /api/jobs?after=" + INJECTION,
    b"POST /api/admin/requeue/" + INJECTION, b"PUT /api/jobs/" + INJECTION,
], ids=lambda target: target.decode()[:40])
def test_a_target_adds_no_header_to_the_answer(wire, target):
    answers = wire.answers(line(target + b" HTTP/1.1") + canary("inject"))
    assert len(answers) == (1 if answers[0].closes else 2)
    for answer in answers:
        assert "x-injected" not in answer.headers


@pytest.mark.parametrize("key", [b"a\tb", b"caf\xe9", b"%0d%0aX-Injected:yes", b'"quoted; x=y"', b"x" * 3000])
def test_an_idempotency_key_adds_no_header_to_the_answer(wire, key):
    message = submit(b"Idempotency-Key: " + key + b"\r\nContent-Length: 5\r\n", b"hello", queue=b"key")
    answers = wire.answers(message + message + canary("key-canary"))
    statuses = [answer.status for answer in answers]
    assert statuses == [202, 202, 202] or set(statuses[:2]) == {400}, statuses
    for answer in answers:
        assert "x-injected" not in answer.headers


PREFERENCES = [b"respond-async", b'respond-async; x="y"', b"wait=0", b"RESPOND-ASYNC, wait=1"]


@pytest.mark.parametrize("preference", PREFERENCES)
def test_a_preference_is_a_header_of_one_line(wire, preference):
    """RFC 7240 2: parameters and case are the client's; the answer stays one strict head."""
    message = (b"POST /api/submit?queue=prefer HTTP/1.1\r\nHost: localhost\r\nPrefer: " + preference
               + b"\r\nContent-Length: 2\r\n\r\n{}")
    assert [answer.status for answer in wire.answers(message + canary("prefer-canary"))] == [202, 202]


PROPER_TYPES = [None, b"text/html", b"text/plain;charset=utf-8", b'a/b; c="d e"', b"image/svg+xml"]
ODD_TYPES = [b"text/html; charset=\xff", b"a" * 2000, b"x\ty", b"", b"text", b'a/b; c="', b"text/html, text/plain"]


@pytest.mark.parametrize("content_type", PROPER_TYPES + ODD_TYPES)
def test_a_workers_content_type_cannot_break_the_result(wire, content_type):
    wire.call("POST", "/api/submit?queue=types&wait=0", b"{}")
    job = wire.poll("types")
    fields = b"" if content_type is None else b"Content-Type: " + content_type + b"\r\n"
    path = f"POST /api/worker/complete/{job['job_id']}?lease_token={job['lease_token']} HTTP/1.1".encode()
    complete = with_fields(fields + b"Content-Length: 4\r\n", path) + b"<p/>"
    answers = wire.answers(complete + canary("types-canary"))
    assert answers[0].status == 200 or answers[0].status == 400 and content_type not in PROPER_TYPES
    if answers[0].status == 400:  # what is no media type may be refused; the job is still the worker's
        assert answers[0].json()["code"] == "invalid_parameter"
        wire.complete(job, b"<p/>")
    answers = wire.answers(line(f"GET /api/jobs/{job['job_id']}/result HTTP/1.1".encode()) + canary("types-canary"))
    assert [answer.status for answer in answers] == [200, 202]
    assert answers[0].body == b"<p/>"
    if content_type in PROPER_TYPES[1:]:
        assert answers[0].headers["content-type"] == content_type.decode()
    assert answers[0].headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answers[0].headers["content-security-policy"]


BROKEN_TYPES = ["text/html\r\nX-Injected: yes", "text/html\r\n\r\n<script>", "a\nb", "a\0b", "é", "\u2028"]


@pytest.mark.parametrize("content_type", BROKEN_TYPES)
def test_a_workers_content_type_over_grpc_adds_no_header_to_the_result(wire, content_type):
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    from worker_pb2_gen import worker_pb2

    wire.call("POST", "/api/submit?queue=types-grpc&wait=0", b"{}")
    if wire.server.grpc_port is None:
        pytest.skip("gRPC is off")
    stub = grpc_stub(wire.server)
    job = stub.RequestJob(worker_pb2.JobRequest(queues=["types-grpc"], wait_seconds=5), timeout=DEADLINE)
    result = worker_pb2.JobResult(job_id=job.id, payload="done", lease_token=job.lease_token,
                                  content_type=content_type)
    try:
        stub.CompleteJob(result, timeout=DEADLINE)
    except grpc.RpcError as error:  # to refuse it is as good
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        return
    answers = wire.answers(line(f"GET /api/jobs/{job.id}/result HTTP/1.1".encode()) + canary("types-canary"))
    assert [answer.status for answer in answers] == [200, 202]
    assert answers[0].body == b"done"
    assert "x-injected" not in answers[0].headers


@pytest.mark.parametrize("blank", [b"\xa0", b"\x85"], ids=["no-break space", "next line"])
def test_a_blank_beyond_ascii_makes_a_workers_content_type_none(wire, blank):
    """Unicode calls them white space; the grammar of a media type does not."""
    wire.call("POST", "/api/submit?queue=blanks&wait=0", b"{}")
    job = wire.poll("blanks")
    path = f"POST /api/worker/complete/{job['job_id']}?lease_token={job['lease_token']} HTTP/1.1".encode()
    complete = with_fields(b"Content-Type: text/html" + blank + b";x\r\nContent-Length: 4\r\n", path) + b"<p/>"
    assert [answer.status for answer in wire.answers(complete + canary("blanks-canary"))] == [200, 202]
    answers = wire.answers(line(f"GET /api/jobs/{job['job_id']}/result HTTP/1.1".encode()) + canary("blanks-canary"))
    assert [answer.status for answer in answers] == [200, 202]
    assert (answers[0].headers["content-type"], answers[0].body) == ("application/octet-stream", b"<p/>")


# A parameter makes it look like a media type, were it not for what stands before the semicolon.
SPLIT_TYPES = [
    "text/html\r\n\r\n;<script>alert(1)</script>", "text/html\r\n;X-Injected: yes", "text/html\n\n;", "text/html\r;x=1",
    "text/html \x0b;x=1", "text/html\u2028;x=1",
]


@pytest.mark.parametrize("content_type", SPLIT_TYPES)
@pytest.mark.parametrize("way", ["a row over http", "a call over grpc", "a row over grpc"])
def test_a_workers_content_type_with_a_line_end_never_splits_the_head_of_the_result(wire, way, content_type):
    queue = way.replace(" ", "-")
    job_id = wire.call("POST", f"/api/submit?queue={queue}&wait=0", b"{}")[1]["job_id"]
    token = wire.poll(queue)["lease_token"]
    if way == "a row over http":
        row = {"job_id": job_id, "lease_token": token, "payload": "done", "content_type": content_type}
        status, said = wire.call("POST", "/api/worker/complete", json.dumps({"results": [row]}).encode())
        assert (status, said["results"][0]["status"]) == (200, 200)
    else:
        pytest.importorskip("grpc", reason="grpcio is not installed")
        from worker_pb2_gen import worker_pb2 as pb

        stub = grpc_stub(wire.server)
        result = pb.JobResult(job_id=job_id, payload="done", lease_token=token, content_type=content_type)
        if way == "a call over grpc":
            assert stub.CompleteJob(result, timeout=DEADLINE).success
        else:
            assert stub.CompleteJobs(pb.JobResults(results=[result]), timeout=DEADLINE).results[0].status == 200
    answers = wire.answers(line(f"GET /api/jobs/{job_id}/result HTTP/1.1".encode()) + canary("split-canary"))
    assert [answer.status for answer in answers] == [200, 202]
    assert answers[0].body == (b'"done"' if way == "a row over http" else b"done")
    assert answers[0].headers["content-type"] == "application/octet-stream"
    assert "x-injected" not in answers[0].headers


# == What reaches the worker


def test_a_worker_sees_the_submitters_own_fields_and_no_others(wire):
    """RFC 9110 7.6.1: hop-by-hop fields end here, and so do those that Connection names."""
    fields = (b"x-trace-id: 1\r\nX-TRACE-ID: 2\r\nContent-Type: text/plain\r\nCookie: a=b\r\n"
              b"Authorization: Basic eA==\r\nProxy-Authorization: Basic eA==\r\n"
              b"Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n"
              b"TE: trailers\r\nTrailer: X-Sum\r\n"
              b"Upgrade: h2c\r\nProxy-Connection: close\r\nX-Old: caf\xe9\r\n"
              b"Transfer-Encoding: chunked\r\n")
    body = b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nAuthorization: Bearer x\r\n\r\n"
    message = submit(fields, body, queue=b"fields")
    assert [answer.status for answer in wire.answers(message + canary("fields-canary"))] == [202, 202]
    headers = wire.poll("fields")["headers"]
    assert headers["X-Trace-Id"] == "1, 2"
    assert headers["Content-Type"] == "text/plain"
    hidden = {"cookie", "authorization", "proxy-authorization", "connection", "x-hop", "keep-alive", "te",
              "trailer", "upgrade", "proxy-connection", "transfer-encoding", "x-sum"}
    assert not hidden & {name.lower() for name in headers}


def test_a_body_that_is_not_text_arrives_whole(wire):
    body = bytes(range(256))
    message = submit(b"Content-Length: 256\r\n", body, queue=b"binary")
    assert [answer.status for answer in wire.answers(message + canary("binary-canary"))] == [202, 202]
    job = wire.poll("binary")
    assert job["payload_encoding"] == "base64"
    assert base64.b64decode(job["payload"], validate=True) == body


# == Deadlines are absolute: dripping does not help

DRIPPED = 6.0  # seconds that a dripping client would go on


@dataclass
class Drip:
    """A slow client: what it sends at once, what it then sends for ever, and what it was told."""

    name: str
    opening: bytes
    drop: bytes = b""
    statuses: tuple = (408,)
    silence_will_do: bool = False
    refused_early: bool = False
    stream: bytearray = field(default_factory=bytearray)
    ended: float = 0.0


SIZED, CHUNKED = b"Content-Length: %d\r\n", b"Transfer-Encoding: chunked\r\n"


def dripped(fields, body=b""):
    return submit(fields, body, queue=b"drip")


SLOW = [
    Drip("a request line that drips", b"GET /", b"a"),
    Drip("header fields that drip", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"b"),
    Drip("a header field every now and then", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X-A: b\r\n"),
    Drip("half a head and silence", b"GET /health HTTP/1.1\r\nHost: loc"),
    Drip("one byte and silence", b"G"),
    Drip("empty lines for ever", b"", b"\r\n", (408, 400), silence_will_do=True, refused_early=True),
    Drip("a body that drips", dripped(SIZED % 1000), b"x"),
    Drip("half a body and silence", dripped(SIZED % 1000, b"x" * 500)),
    Drip("no body at all", dripped(SIZED % 5)),
    Drip("a body that was asked for and never comes", dripped(EXPECTS + SIZED % 5), b"", (100, 408)),
    Drip("chunks that drip", dripped(CHUNKED), b"1\r\nx\r\n"),
    Drip("a chunk extension that drips", dripped(CHUNKED, b"5;"), b"a"),
    Drip("trailers that drip", dripped(CHUNKED, b"1\r\nx\r\n0\r\n"), b"X-A: b\r\n"),
    Drip("a second request that drips", GET + b"GET /", b"a", (200, 408)),
    Drip("a connection that says nothing", b"", b"", (408,), silence_will_do=True),
    Drip("a connection that has said all", GET, b"", (200, 408), silence_will_do=True),
]
STEADY = 20  # pieces of 50 kB: slower than the body timeout alone, far faster than any floor rate


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    limits = ("--header-timeout", "1", "--body-timeout", "1", "--idle-timeout", "1")
    running = start(tmp_path_factory, "impatient", "--grpc-port", "off", *limits)
    yield running
    running.server.stop()


@pytest.fixture(scope="module")
def slow(impatient):
    """All slow clients at once, so that they cost one deadline; and those who must not be cut off."""
    body = b"x" * 50000 * STEADY
    close = b"Connection: close\r\n"
    steady = Drip("steady", submit(close + SIZED % len(body), queue=b"steady"))
    held = Drip("held", with_fields(SIZED % 2, b"POST /api/submit?queue=held HTTP/1.1") + b"{}")
    poll = Drip("poll", with_fields(close, b"GET /api/worker/poll?queue=none&wait=3 HTTP/1.1"))
    # Copies, as this may be made more than once, where other tests come in between.
    drips = [*(replace(drip, stream=bytearray()) for drip in SLOW), steady, held, poll]
    connections = {drip.name: impatient.connect() for drip in drips}
    run_drips(impatient, drips, connections, body)
    impatient.complete(impatient.poll("held"), b'"in the end"')
    with connections["held"] as connection:
        held.stream += read_until(connection, lambda stream: b"in the end" in stream)
    for connection in connections.values():
        connection.close()
    return {drip.name: drip for drip in drips}


def run_drips(wire, drips, connections, body):
    """Drip until all but the held one have ended, or time is up."""
    began = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for drip in drips:
            connections[drip.name].sendall(drip.opening)
            connections[drip.name].setblocking(False)
            selector.register(connections[drip.name], selectors.EVENT_READ, drip)
        next_drop, piece = began + EVERY, 0
        while len(selector.get_map()) > 1 and time.monotonic() < began + DRIPPED:
            for key, _ in selector.select(max(0.0, next_drop - time.monotonic())):
                hear(selector, key, began)
            if time.monotonic() >= next_drop:
                next_drop += EVERY
                for key in list(selector.get_map().values()):
                    with contextlib.suppress(ConnectionError, BlockingIOError):
                        key.fileobj.send(key.data.drop)
                if piece < STEADY:
                    send_whole(connections["steady"], body[:50000])
                    piece += 1
                assert wire.call("GET", "/health")[0] == 200  # the slow ones hold nobody up
        for connection in connections.values():
            connection.settimeout(DEADLINE)


def send_whole(connection, data):
    connection.settimeout(DEADLINE)
    connection.sendall(data)
    connection.setblocking(False)


def hear(selector, key, began):
    try:
        received = key.fileobj.recv(65536)
    except ConnectionResetError:
        received = b""
    key.data.stream += received
    if not received:
        key.data.ended = time.monotonic() - began
        selector.unregister(key.fileobj)


@pytest.mark.parametrize("name", [drip.name for drip in SLOW])
def test_a_slow_client_is_cut_off_at_an_absolute_time(slow, name):
    drip = slow[name]
    answers = parse_answers(bytes(drip.stream))
    print(f"ended after {drip.ended:.2f} s: {bytes(drip.stream)!r}")
    assert drip.ended < 4, "one second was the limit"
    assert drip.ended > 0.5 or drip.refused_early
    final = [answer for answer in answers if answer.status >= 400]
    if final or not drip.silence_will_do:
        assert final and final[-1].status in drip.statuses
        assert final[-1].closes
    before = drip.statuses[:-1] if len(drip.statuses) > 1 and drip.statuses[0] < 400 else ()
    assert [answer.status for answer in answers if answer.status < 400] == list(before)


def test_a_request_that_was_cut_off_is_never_run(slow, impatient):
    assert not impatient.jobs("drip")


def test_a_large_body_at_a_steady_rate_may_take_its_time(slow, impatient):
    assert [answer.status for answer in parse_answers(bytes(slow["steady"].stream))] == [202]
    assert len(impatient.jobs("steady")) == 1


def test_a_held_client_is_not_an_idle_one(slow):
    answers = parse_answers(bytes(slow["held"].stream))
    assert [answer.status for answer in answers] == [200]
    assert answers[0].json()["payload"] == "in the end"


def test_a_long_poll_is_not_an_idle_one(slow):
    assert [answer.status for answer in parse_answers(bytes(slow["poll"].stream))] == [204]
    assert slow["poll"].ended > 2.5


@pytest.mark.parametrize("version", ["1.2", "1.9"])
def test_a_later_version_of_http_1_is_answered_as_the_latest_known(wire, version):
    """RFC 9110, 2.5."""
    with wire.connect() as connection:
        for _ in range(2):  # it stays open, as with 1.1
            connection.sendall(f"GET /health HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
            stream = read_until(connection, lambda stream: b"ok" in stream)
            assert stream.startswith(b"HTTP/1.1 200 ") and b"Connection:" not in stream
        connection.sendall(f"GET /health HTTP/{version}\r\n\r\n".encode())
        assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")  # and needs a Host, as there


# == Afterwards: this stands last, since it looks at what the rest left behind


def test_no_connection_is_left_behind(wire):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("/proc is not here")
    folder = f"/proc/{wire.server.pid}/fd"

    def sockets():
        links = []
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                links.append(os.readlink(os.path.join(folder, name)))
        return [link for link in links if link.startswith("socket:")]

    # The listeners, the control connection, and what gRPC keeps.
    wait_until(lambda: len(sockets()) < 20, DEADLINE, f"the sockets to close: {len(sockets())}")


def test_every_log_line_is_one_event_and_holds_no_raw_bytes(wire):
    log = wire.server.log()
    assert "Traceback" not in log
    for text in log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[^ ]* [A-Z]+ [a-z]", text), text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", log)
    assert wire.call("GET", "/health") == (200, {"status": "ok"})
