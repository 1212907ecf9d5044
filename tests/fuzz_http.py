"""Mutated requests by the thousand: no hang, no 500, no desync, nothing hidden in a body ever runs.

    python tests/fuzz_http.py http://127.0.0.1:3000 [COUNT [SEED]]

A message is made from (seed, number) alone, so that what a failure prints is enough to make it again. Beside
the server runs an outline of the grammar, as lenient as the rules allow and no more: it says how many
requests a stream can hold. More answers than that, or a job that only a misread body could have made, is a
desync.
"""

import collections
import http.client
import json
import random
import re
import socket
import sys
import time
import urllib.parse
from dataclasses import dataclass, field

from http_cases import CASES, GET, SMUGGLED, TOKEN, Malformed, line, parse_answers, submit, with_fields

DEADLINE = 10  # seconds, for any one connection; a hang is a failure
WINDOW = 24  # connections open at a time: the server works on some while answers of others are read
FRESH = 100  # messages between two looks at a fresh connection
SWEEP = 1000  # messages between two looks for jobs that should not be; the queues are emptied then
LARGEST = 4_128_768  # the server's default limit on a payload


class Found(AssertionError):
    """What the server did wrong, with all that is needed to see it again."""


# == The outline of the grammar: RFC 9112


@dataclass
class Outline:
    """What a stream can be read as: its requests, and whether it ends where the last one ends."""

    requests: list = field(default_factory=list)
    clean: bool = True
    rest: bytes = b""  # how the first thing that is no request begins

    @property
    def held(self):
        return any(request.held for request in self.requests)

    @property
    def leaves_open(self):
        """Whether the server may rightly wait: for the rest, for somebody else, for another request."""
        return not self.clean or self.held or not (self.requests and self.requests[-1].closes)

    @property
    def owed(self):
        """Whether all is to be answered: a client that ends its stream while it waits counts as gone."""
        return not self.leaves_open or not any(request.waits for request in self.requests)


@dataclass
class Request:
    method: bytes
    target: bytes
    closes: bool
    held: bool  # the answer may wait for somebody else
    waits: bool  # the answer may wait for the disk, or hand out a job: not owed once the stream has ended


FIELD = rb"(?:" + TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)"
HEAD = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/1\.([0-9])\r\n(" + FIELD + rb"*)\r\n")
EMPTY_LINES = re.compile(rb"(?:\r\n)*")
TOLD = re.compile(rb"^(content-length|transfer-encoding|host|connection|prefer):[ \t]*([^\r]*?)[ \t]*\r$",
                  re.IGNORECASE | re.MULTILINE)
LENGTH = re.compile(rb"[0-9]{1,10}")
CHUNK = re.compile(rb"([0-9a-fA-F]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
TRAILERS = re.compile(FIELD + rb"*\r\n")
NO_WAIT = re.compile(rb"[?&]wait=0(?:&|$)")
WAITS = re.compile(rb"submit|wait=|[?&]next=", re.IGNORECASE)


def outline(stream):
    found, at = Outline(), 0
    while True:
        at = EMPTY_LINES.match(stream, at).end()
        if at == len(stream):
            return found
        start = at
        head = HEAD.match(stream, at)
        told = head and fields_told(head)
        at = told is not None and head and end_of_body(stream, head.end(), told)
        if not at:
            found.clean, found.rest = False, stream[start:start + 5]
            return found
        request = request_of(head, told)
        found.requests.append(request)
        if request.closes:
            return found


def fields_told(head):
    """The fields that matter, as {name: [values]}; None where they contradict each other."""
    told = collections.defaultdict(list)
    for name, value in TOLD.findall(head[4]):
        told[name.lower()].append(value)
    hosts, lengths, codings = told[b"host"], told[b"content-length"], told[b"transfer-encoding"]
    if len(hosts) > 1 or not hosts and head[3] != b"0":
        return None
    if lengths and (codings or len(set(lengths)) > 1 or not LENGTH.fullmatch(lengths[0])):
        return None
    elements = [one.strip(b" \t") for one in b",".join(codings).lower().split(b",")]
    if codings and [one for one in elements if one] != [b"chunked"]:
        return None
    return told


def end_of_body(stream, at, told):
    """Where the message ends; 0 where it does not, or must be refused."""
    if told[b"transfer-encoding"]:
        return end_of_chunks(stream, at)
    size = int(told[b"content-length"][0]) if told[b"content-length"] else 0
    return at + size if size <= LARGEST and at + size <= len(stream) else 0


def end_of_chunks(stream, at):
    while chunk := CHUNK.match(stream, at):
        size = int(chunk[1], 16)
        if not size:
            trailers = TRAILERS.match(stream, chunk.end())
            return trailers.end() if trailers else 0
        at = chunk.end() + size
        if stream[at:at + 2] != b"\r\n":
            return 0
        at += 2
    return 0


def request_of(head, told):
    options = [one.strip() for one in b",".join(told[b"connection"]).lower().split(b",")]
    old = head[3] == b"0"
    closes = b"close" in options or old and (b"keep-alive" not in options or bool(told[b"transfer-encoding"]))
    held = bool(WAITS.search(head[2])) and not NO_WAIT.search(head[2]) or bool(told[b"prefer"])
    waits = held or head[1] not in (b"GET", b"HEAD") or b"poll" in head[2]
    return Request(head[1], head[2], closes, held, waits)


# == Messages

CANARY = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
SIZE = b"Content-Length: %d\r\n"


def post(target, body, fields=b""):
    return with_fields(fields + SIZE % len(body), b"POST " + target + b" HTTP/1.1") + body


VALID = [
    GET,
    line(b"HEAD /health HTTP/1.1"),
    line(b"GET /api/worker/poll?queue=fuzz0 HTTP/1.1"),
    line(b"GET /api/worker/poll?queue=fuzz0,fuzz1&max=4&worker=w&lease=5 HTTP/1.1"),
    line(b"GET /api/jobs?queue=fuzz0&limit=3&status=pending HTTP/1.1"),
    line(b"GET /api/jobs/6f1c-none?wait=0 HTTP/1.1"),
    line(b"GET /api/admin/stats HTTP/1.1"),
    line(b"GET /metrics HTTP/1.1"),
    line(b"DELETE /api/jobs/none HTTP/1.1"),
    line(b"GET http://localhost/health HTTP/1.1"),
    with_fields(b"Connection: keep-alive\r\n", b"GET /health HTTP/1.0"),
    submit(SIZE % 14, b'{"a":[1,2,3]} '),
    submit(b"Content-Type: text/plain\r\nIdempotency-Key: k\r\n" + SIZE % 5, b"hello"),
    submit(b"Prefer: respond-async, wait=1\r\n" + SIZE % 5, b"hello"),
    submit(b"Expect: 100-continue\r\n" + SIZE % 5, b"hello"),
    submit(SIZE % len(SMUGGLED), SMUGGLED),
    submit(b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    submit(b"Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n",
           b'3;a="b"\r\nhel\r\n2\r\nlo\r\n0\r\nX-Sum: 1\r\n\r\n'),
    submit(b"Transfer-Encoding: chunked\r\n", b"%X\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"),
    post(b"/api/submit?queue=fuzz0&priority=5&on_disconnect=cancel", b"hello world"),
    post(b"/api/jobs?queue=fuzz1", b"1\n2\n[3]\n", b"Content-Type: application/x-ndjson\r\n"),
    post(b"/api/worker/complete", b'{"results": [{"job_id": "a", "payload": "hello you"}]}'),
    post(b"/api/worker/complete/none?lease_token=t&next=true", b"{}"),
    post(b"/api/worker/fail/none?retry=true&delay=0", b"oops"),
    post(b"/api/worker/extend/none?lease=5", b""),
]
# The valid ones twice as often as the conformance cases, each of which is close to some border.
CASE_BYTES = [case.sent for _, case in CASES if len(case.sent) <= 1500]
CORPUS = [message.replace(b"QUEUE", b"fuzz0")
          for message in VALID * max(1, 2 * len(CASE_BYTES) // len(VALID)) + CASE_BYTES]
PIECES = [
    b"\r\n", b"\n", b"\r", b"\r\r\n", b"\r\n\r\n", b"\n\n", b" ", b"\t", b"\0", b":", b": ", b";", b",",
    b"\x0b", b"\x85", b"\xa0", b"\xff", b"%0d%0a", b"%00", b"%2f", b"/", b"//", b"..", b"?", b"&", b"=",
    b"#", b"+", b"-", b"0", b"1", b"9999999999", b"ffffffff", b"0x", b"chunked", b"identity",
    b"gzip, chunked", b"HTTP/1.1", b"HTTP/1.0", b"GET ", b"HEAD ",
    b"POST /api/submit?queue=fuzz0&wait=0 HTTP/1.1\r\n", b"Host: localhost\r\n", b"Host: evil.example\r\n",
    b"Content-Length: 0\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n", b" folded\r\n",
    b"0\r\n\r\n", b"5\r\nhello\r\n", GET, SMUGGLED,
]


def flip_a_bit(rnd, message):
    at = rnd.randrange(len(message))
    return message[:at] + bytes((message[at] ^ 1 << rnd.randrange(8),)) + message[at + 1:]


def put_a_byte(rnd, message):
    at = rnd.randrange(len(message))
    return message[:at] + bytes((rnd.randrange(256),)) + message[at + 1:]


def put_a_piece(rnd, message):
    at = rnd.randrange(len(message) + 1)
    return message[:at] + rnd.choice(PIECES) + message[at + rnd.choice((0, 0, 1, 2)):]


def put_a_piece_at_a_line(rnd, message):
    lines = message.split(b"\r\n")
    lines.insert(rnd.randrange(len(lines) + 1), rnd.choice(PIECES).removesuffix(b"\r\n"))
    return b"\r\n".join(lines)


def cut_out(rnd, message):
    at = rnd.randrange(len(message))
    return message[:at] + message[at + rnd.choice((1, 1, 2, 3, 10, 40)):]


def truncate(rnd, message):
    return message[:rnd.randrange(len(message) + 1)]


def splice(rnd, message):
    other = rnd.choice(CORPUS)
    return message[:rnd.randrange(len(message) + 1)] + other[rnd.randrange(len(other)):]


def double_a_line(rnd, message):
    lines = message.split(b"\r\n")
    lines.insert(rnd.randrange(len(lines) + 1), rnd.choice(lines))
    return b"\r\n".join(lines)


def drop_a_line(rnd, message):
    lines = message.split(b"\r\n")
    del lines[rnd.randrange(len(lines))]
    return b"\r\n".join(lines)


def swap_two_lines(rnd, message):
    lines = message.split(b"\r\n")
    one, other = rnd.randrange(len(lines)), rnd.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\r\n".join(lines)


def change_a_number(rnd, message):
    numbers = list(re.finditer(rb"[0-9]+", message))
    if not numbers:
        return message
    number = rnd.choice(numbers)
    value = int(number[0]) + rnd.choice((-1, 1, 2, 10, -10, 1 << 32, 1 << 64))
    written = rnd.choice((b"%d", b"0%d", b"+%d", b"%x")) % value
    return message[:number.start()] + written + message[number.end():]


def change_case(rnd, message):
    at = rnd.randrange(len(message))
    return message[:at] + message[at:at + 12].swapcase() + message[at + 12:]


def frame_anew(rnd, message):
    """A submit whose framing is put together at random, most of it wrong."""
    size = rnd.choice((len(message), len(message), len(message) + 1, max(0, len(message) - 1), 0))
    lengths = [b"Content-Length: %d\r\n", b"Content-Length:%d \r\n", b"content-length: 0%d\r\n"]
    fields = [length % size for length in lengths] + [
        b"Transfer-Encoding: chunked\r\n", b"transfer-encoding:CHUNKED\r\n",
        b"Transfer-Encoding: identity\r\n", b"X-A: b\r\n"]
    chosen = b"".join(rnd.sample(fields, rnd.choice((1, 1, 1, 2, 3))))
    return submit(chosen, chunks(rnd, message) if b"unked" in chosen.lower() else message, b"fuzz0")


def chunks(rnd, content):
    parts = []
    while content:
        size = rnd.randint(1, len(content))
        end = b"\r\n" if rnd.random() < 0.97 else rnd.choice((b"\n", b"\r", b"", b"\r\r\n", b"  "))
        shape = rnd.choice((b"%x", b"%X", b"0%x", b"%x;a=b", b'%x;a="b"')) if rnd.random() < 0.97 else b" %x"
        parts.append(shape % size + end + content[:size] + b"\r\n")
        content = content[size:]
    ends = (b"0\r\n\r\n", b"0\r\n\r\n", b"00\r\nX: y\r\n\r\n", b"0\n\r\n", b"0\r\n", b"")
    return b"".join(parts) + rnd.choice(ends)


MUTATIONS = [
    flip_a_bit, put_a_byte, put_a_piece, put_a_piece, put_a_piece_at_a_line, cut_out, truncate, splice,
    double_a_line, double_a_line, drop_a_line, swap_two_lines, change_a_number, change_a_number, change_case,
    frame_anew, frame_anew,
]


def message_of(seed, number):
    """The message of this number: a request or a few, mutated, and the canary."""
    rnd = random.Random(seed * 1_000_003 + number)
    message = rnd.choice(CORPUS)
    for _ in range(rnd.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        message = rnd.choice(MUTATIONS)(rnd, message) or GET
    if rnd.random() < 0.2:
        message += rnd.choice(CORPUS)
    return message + CANARY


# == The run


@dataclass
class Report:
    """What was sent, and what came back."""

    seed: int
    sent: int = 0
    skipped: int = 0
    seconds: float = 0.0
    statuses: collections.Counter = field(default_factory=collections.Counter)

    def __str__(self):
        rate = self.sent / self.seconds if self.seconds else 0
        return (f"JOBQUEUE_SEED={self.seed}: {self.sent} fuzzed requests in {self.seconds:.1f} s "
                f"({rate:.0f}/s), {self.skipped} skipped, answers {dict(sorted(self.statuses.items()))}")


def run(url, count, seed):
    """Send `count` mutated requests; return a Report.

    Raises Found at the first thing that is wrong.
    """
    parts = urllib.parse.urlsplit(url)
    address = (parts.hostname, parts.port)
    report, window, began, number = Report(seed), collections.deque(), time.monotonic(), 0
    while report.sent < count:
        number += 1
        message = message_of(seed, number)
        outlined = outline(message)
        if not_to_be_sent(outlined):
            report.skipped += 1
            continue
        window.append(send(address, number, message, outlined))
        report.sent += 1
        if len(window) >= WINDOW:
            collect(report, *window.popleft())
        if report.sent % FRESH == 0:
            look_afresh(address, seed, number)
        if report.sent % SWEEP == 0:
            sweep(address, seed, number)
    while window:
        collect(report, *window.popleft())
    look_afresh(address, seed, number)
    sweep(address, seed, number)
    report.seconds = time.monotonic() - began
    return report


def not_to_be_sent(outlined):
    """Mutation may make a proper request of what was hidden, or of one that would wipe out the evidence."""
    return any(b"smuggled" in request.target or b"/admin/" in request.target and request.method != b"GET"
               for request in outlined.requests)


def send(address, number, message, outlined):
    connection = socket.socket()
    connection.settimeout(DEADLINE)
    connection.connect(address)
    try:
        connection.sendall(message)
        if outlined.leaves_open:
            connection.shutdown(socket.SHUT_WR)  # or the server would rightly wait
    except OSError:
        pass  # refused before it was sent whole: what was said is still to be read
    return connection, number, message, outlined


def collect(report, connection, number, message, outlined):
    """Read one connection to its end and judge it."""
    stream, problem = b"", None
    try:
        with connection:
            while received := connection.recv(65536):
                stream += received
    except TimeoutError:
        problem = f"no end within {DEADLINE} s"
    except ConnectionResetError:
        if outlined.owed:
            problem = "reset, so that an answer may be lost"
    problem = problem or judge(report, stream, outlined)
    if problem:
        requests = [(request.method, request.target) for request in outlined.requests]
        raise Found(f"{problem}\nJOBQUEUE_SEED={report.seed}, message {number}\nsent:     {message!r}\n"
                    f"answered: {stream!r}\nthe stream holds {requests}, clean={outlined.clean}")


def judge(report, stream, outlined):
    """What is wrong with the answers, or None."""
    requests = outlined.requests
    try:
        finals = final_answers(stream, outlined)
    except Malformed as error:
        return str(error)
    for answer in finals:
        report.statuses[answer.status] += 1
        if answer.status == 500:
            return "an internal error"
    if len(finals) > len(requests) + (not outlined.clean):
        return f"{len(finals)} answers to {len(requests)} requests"
    if len(finals) > len(requests) and (finals[-1].status < 400 or not finals[-1].closes):
        return "what is no request was not refused with a close"
    if len(finals) < len(requests) and outlined.owed and not (finals and finals[-1].closes):
        return f"{len(finals)} answers to {len(requests)} requests, and no Connection: close"
    return next(filter(None, map(mismatch, finals, requests)), None)


def final_answers(stream, outlined):
    """The answers but for 100 Continue.

    The refusal of a HEAD may have a body where it was refused before its method meant anything.
    """
    methods = [request.method for request in outlined.requests] + [outlined.rest.strip()]
    readings = [methods] + [[*methods[:at], b"GET"] for at, method in enumerate(methods) if method == b"HEAD"]
    for reading in readings:
        try:
            answers = parse_answers(stream, reading)
        except Malformed as error:
            malformed = error
        else:
            return [answer for answer in answers if answer.status >= 200]
    raise malformed


def mismatch(answer, request):
    """An answer that belongs to another request."""
    path = re.sub(rb"^[a-z]+://[^/?]*", b"", request.target, flags=re.IGNORECASE).partition(b"?")[0]
    if answer.body.replace(b" ", b"") == b'{"status":"ok"}' and path.rstrip(b"/") not in (b"/health", b"/ready"):
        return f"the answer of /health to {request.target!r}"
    if answer.status == 202 and request.method != b"POST":
        return f"a 202 to {request.method!r} {request.target!r}"
    if answer.status == 204 and not path.startswith((b"/api/", b"*")):
        return f"a 204 to {request.target!r}"
    return None


def ask(address, method, path):
    connection = http.client.HTTPConnection(*address, timeout=DEADLINE)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def look_afresh(address, seed, number):
    """A canary on a connection of its own."""
    try:
        answer = ask(address, "GET", "/health")
    except (OSError, http.client.HTTPException, ValueError) as error:
        answer = repr(error)
    if answer != (200, {"status": "ok"}):
        raise Found(f"/health on a fresh connection: {answer}\nJOBQUEUE_SEED={seed}, by message {number}")


def sweep(address, seed, number):
    """Nothing that was hidden in a body may be in its queue; then empty all queues, to stay small."""
    status, page = ask(address, "GET", "/api/jobs?queue=smuggled")
    if status != 200 or page["jobs"]:
        raise Found(f"what was hidden in a body ran: {page}\nJOBQUEUE_SEED={seed}, by message {number}")
    status, page = ask(address, "DELETE", "/api/admin/clear")
    if status != 200:
        raise Found(f"clear: {status} {page}\nJOBQUEUE_SEED={seed}, at message {number}")


if __name__ == "__main__":
    COUNT = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    SEED = int(sys.argv[3]) if len(sys.argv) > 3 else random.SystemRandom().randrange(1 << 32)
    print(f"JOBQUEUE_SEED={SEED}", flush=True)
    print(run(sys.argv[1], COUNT, SEED))
