"""The wire of each server, as little of it as a load needs, written by hand.

One side of a connection is a generator: it yields the bytes to send and is given the bytes that came. So the same
loop (load.py) drives them all, and what is measured is the servers, not four client libraries of different quality.

A job is 100 bytes of JSON that carry a tag; its result is a function of that tag. Every answer is checked for it:
an answer that went to the wrong client ends the run.
"""
import re
import struct
import time
from itertools import count

clock = time.monotonic

TAG = re.compile(rb"~\d{3}-\d{4}-\d{8}")
TAG_LENGTH = 18
PAYLOAD_BYTES = 100


class Failure(Exception):
    """What came is not what the protocol promises; the message says what it was."""


class Tally:
    """Counts what was done between `begin` and `end` (monotonic), and how long each took."""

    def __init__(self, begin, end):
        self.begin, self.end = begin, end
        self.count, self.times, self.last = 0, [], begin

    def done(self, started, count=1):
        """Counts what began at `started`; true means: the time is over, finish."""
        now = clock()
        if self.begin <= now < self.end:
            self.count += count
            self.times.append(now - started)
            self.last = now
        return now >= self.end


def tags(run, index):
    """The tags of one client of one run; none comes twice in a benchmark, so a stale answer is seen."""
    for number in count(1):
        yield b"~%03d-%04d-%08d" % (run % 1000, index, number)


def payload(tag, size=PAYLOAD_BYTES):
    """A job of `size` bytes."""
    return b'{"tag":"%b","text":"%b"}' % (tag, b"x" * (size - 20 - len(tag)))


def result(tag):
    """What a worker makes of a job."""
    return b'{"done":"%b"}' % tag


def tag_of(data):
    """The tag of the job in what a worker was given."""
    found = TAG.search(data)
    if found is None:
        raise Failure(f"a job without a tag: {data[:300]!r}")
    return found[0]


# -- HTTP, for jobqueue ----------------------------------------------------------------------------------------------

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
JOB_ID = re.compile(rb'"job_id" ?: ?"([^"]+)"')
TOKEN = re.compile(rb'"lease_token" ?: ?"([^"]+)"')
NEXT = re.compile(rb'"next" ?: ?\{')
STATUS_200 = re.compile(rb'"status" ?: ?200\b')
# A long poll's wait, longer than any measurement.
WAIT = 60


def request(port, method, path, body=b"", content_type=b"application/json"):
    """A request with the headers that an ordinary client sends."""
    head = b"%b %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n" % (method, path, port)
    if method == b"GET":
        return head + b"\r\n"
    return head + b"Content-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (content_type, len(body), body)


def answer(data):
    """(status, body) of the response that `data` holds, or None while it is not whole."""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return None
    length = CONTENT_LENGTH.search(data, 0, head)
    end = head + 4 + (int(length[1]) if length else 0)
    if len(data) < end:
        return None
    return data[9:12], data[head + 4 : end]


def exchange(message, *allowed):
    """Sends one request, returns the body of its answer, which must have one of the `allowed` statuses."""
    data = yield message
    while (got := answer(data)) is None:
        data += yield b""
    if got[0] not in allowed:
        raise Failure(f"{message[:120]!r} was answered with {data[:300]!r}")
    return got[1]


def http_get(port, tally, path=b"/health"):
    """Asks for one path again and again."""
    message = request(port, b"GET", path)
    while True:
        started = clock()
        yield from exchange(message, b"200")
        if tally.done(started):
            return


def http_client(port, tally, names, path=b"/api/submit"):
    """Submits a job, waits for its result, checks it, again."""
    head = request(port, b"POST", path, payload(next(names)))[:-PAYLOAD_BYTES]
    for tag in names:
        started = clock()
        body = yield from exchange(head + payload(tag), b"200")
        if tag not in body:
            raise Failure(f"the answer to {tag!r} was {body!r}")
        if tally.done(started):
            return


def http_worker(port, tally, follow=True, queue=b"default"):
    """Takes jobs and completes them: with `follow` in one round trip a job (next=true), else with a poll for each."""
    poll = request(port, b"GET", b"/api/worker/poll?queue=%b&wait=%d" % (queue, WAIT))
    more = b"&next=true&queue=%b&wait=%d" % (queue, WAIT) if follow else b""
    job = b""
    while True:
        while not job:
            job = yield from exchange(poll, b"200", b"204")
        done = result(tag_of(job))
        path = b"/api/worker/complete/%b?lease_token=%b%b" % (JOB_ID.search(job)[1], TOKEN.search(job)[1], more)
        body = yield from exchange(request(port, b"POST", path, done), b"200")
        following = NEXT.search(body) if follow else None
        job = body[following.end() :] if following else b""


def http_batch_worker(port, tally, size=32):
    """Takes `size` jobs with one poll and completes them with one request; ends when there is nothing left."""
    poll = request(port, b"GET", b"/api/worker/poll?max=%d" % size)
    while True:
        started = clock()
        body = yield from exchange(poll, b"200")
        ids, tokens, names = JOB_ID.findall(body), TOKEN.findall(body), TAG.findall(body)
        if not ids:
            return
        if not len(ids) == len(tokens) == len(names):
            raise Failure(f"a batch with {len(ids)} ids, {len(tokens)} tokens, {len(names)} tags: {body[:600]!r}")
        items = b",".join(
            b'{"job_id":"%b","lease_token":"%b","payload":%b}' % (job_id, token, result(tag))
            for job_id, token, tag in zip(ids, tokens, names, strict=True)
        )
        body = yield from exchange(
            request(port, b"POST", b"/api/worker/complete", b'{"results":[%b]}' % items), b"200"
        )
        if len(STATUS_200.findall(body)) != len(ids):
            raise Failure(f"a batch of {len(ids)} was answered with {body[:600]!r}")
        if tally.done(started, len(ids)):
            return


def http_intake(port, tally, names, lines=1000, query=b"", size=PAYLOAD_BYTES, batches=None):
    """Sends jobs by the thousand, a payload a line, `batches` times or until the time is over."""
    body = b"\n".join(payload(next(names), size) for _ in range(lines)) + b"\n"
    message = request(port, b"POST", b"/api/jobs" + query, body, b"application/x-ndjson")
    for number in count(1):
        started = clock()
        ids = yield from exchange(message, b"202")
        if ids.count(b"-") < lines:  # an id is a UUID
            raise Failure(f"{lines} lines were answered with {ids[:300]!r}")
        if tally.done(started, lines) or number == batches:
            return


def http_held(port, tally, tag):
    """Submits one job and waits for it, however long."""
    started = clock()
    body = yield from exchange(request(port, b"POST", b"/api/submit", payload(tag)), b"200")
    if tag not in body:
        raise Failure(f"the answer to {tag!r} was {body!r}")
    tally.done(started)


# -- beanstalkd ------------------------------------------------------------------------------------------------------
# A reply goes through a tube of the client's own. All that can go in one send does: the client's delete, put and
# reserve; the worker's put of the reply, delete and reserve.

RESERVED = re.compile(rb"RESERVED (\d+) (\d+)\r\n")
BAD = b"NOT_FOUND", b"OUT_OF_MEMORY", b"INTERNAL_ERROR", b"DRAINING", b"BAD_FORMAT", b"BURIED", b"UNKNOWN"


def beanstalk_job(data):
    """Waits for a whole RESERVED in what comes; returns its id and its body."""
    while True:
        found = RESERVED.search(data)
        if found and len(data) >= found.end() + int(found[2]) + 2:
            return found[1], data[found.end() : found.end() + int(found[2])]
        if not found and data.startswith(BAD):
            raise Failure(f"beanstalkd answered {data[:200]!r}")
        data += yield b""


def beanstalk_lines(message, lines):
    """Sends `message`, waits for that many lines."""
    data = yield message
    while data.count(b"\r\n") < lines:
        data += yield b""


def beanstalk_client(port, tally, names):
    """Puts a job, reserves the reply, deletes it, again."""
    tag = next(names)
    yield from beanstalk_lines(b"use jobs\r\nwatch %b\r\nignore default\r\n" % tag[1:9], 3)
    delete = b""
    for tag in names:
        started = clock()
        job = payload(tag)
        data = yield b"%bput 0 0 300 %d\r\n%b\r\nreserve\r\n" % (delete, len(job), job)
        job_id, body = yield from beanstalk_job(data)
        if tag not in body:
            raise Failure(f"the answer to {tag!r} was {body!r}")
        delete = b"delete %b\r\n" % job_id
        if tally.done(started):
            yield from beanstalk_lines(delete, 1)
            return


def beanstalk_worker(port, tally):
    """Reserves a job, puts the reply into its client's tube, deletes it, again."""
    yield from beanstalk_lines(b"watch jobs\r\nignore default\r\n", 2)
    data = yield b"reserve\r\n"
    while True:
        job_id, body = yield from beanstalk_job(data)
        tag = tag_of(body)
        done = result(tag)
        data = yield b"use %b\r\nput 0 0 300 %d\r\n%b\r\ndelete %b\r\nreserve\r\n" % (
            tag[1:9],
            len(done),
            done,
            job_id,
        )


# -- Redis lists -----------------------------------------------------------------------------------------------------
# BRPOP takes a job out of the list before it is done: a worker that dies loses it. The pattern that does not (LMOVE
# to a list of the worker's own, LREM when done) costs a write more; so this is Redis at its fastest, not its safest.


def resp(*parts):
    """A Redis command."""
    return b"*%d\r\n%b" % (len(parts), b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts))


def redis_popped(data):
    """Waits for the array that BRPOP answers, perhaps after a LPUSH's integer; returns the value."""
    while True:
        parts = data.split(b"\r\n")
        wanted = 6 if data[:1] == b"*" else 7
        if len(parts) >= wanted:
            return parts[wanted - 2]
        if data[:1] == b"-":
            raise Failure(f"Redis answered {data[:200]!r}")
        data += yield b""


def redis_client(port, tally, names):
    """Pushes a job, pops its reply, again."""
    pop = resp(b"BRPOP", next(names)[1:9], b"0")
    for tag in names:
        started = clock()
        data = yield resp(b"LPUSH", b"jobs", payload(tag)) + pop
        body = yield from redis_popped(data)
        if tag not in body:
            raise Failure(f"the answer to {tag!r} was {body!r}")
        if tally.done(started):
            return


def redis_worker(port, tally):
    """Pops a job, pushes the reply to its client's list, again."""
    pop = resp(b"BRPOP", b"jobs", b"0")
    data = yield pop
    while True:
        tag = tag_of((yield from redis_popped(data)))
        data = yield resp(b"LPUSH", tag[1:9], result(tag)) + pop


# -- Gearman ---------------------------------------------------------------------------------------------------------

CAN_DO, PRE_SLEEP, NOOP, SUBMIT_JOB, JOB_CREATED = 1, 4, 6, 7, 8
GRAB_JOB, NO_JOB, JOB_ASSIGN, WORK_COMPLETE = 9, 10, 11, 13
HEADER = struct.Struct(">4sII")


def gearman(kind, body=b""):
    """A request packet."""
    return HEADER.pack(b"\0REQ", kind, len(body)) + body


def gearman_packet(data):
    """Waits for a whole packet; returns its kind, its body and what came after it."""
    while True:
        if len(data) >= 12:
            magic, kind, length = HEADER.unpack_from(data)
            if magic != b"\0RES":
                raise Failure(f"gearmand answered {data[:200]!r}")
            if len(data) >= 12 + length:
                return kind, data[12 : 12 + length], data[12 + length :]
        data += yield b""


def gearman_client(port, tally, names):
    """Submits a foreground job, waits for its result, again."""
    for tag in names:
        started = clock()
        data = yield gearman(SUBMIT_JOB, b"jobs\0\0" + payload(tag))
        kind = None
        while kind != WORK_COMPLETE:
            kind, body, data = yield from gearman_packet(data)
            if kind not in (JOB_CREATED, WORK_COMPLETE):
                raise Failure(f"gearmand sent packet {kind}: {body!r}")
        if tag not in body:
            raise Failure(f"the answer to {tag!r} was {body!r}")
        if tally.done(started):
            return


def gearman_worker(port, tally):
    """Grabs a job, sends its result and grabs the next in one send; sleeps when there is none."""
    grab = gearman(GRAB_JOB)
    data = yield gearman(CAN_DO, b"jobs") + grab
    while True:
        kind, body, data = yield from gearman_packet(data)
        if kind == JOB_ASSIGN:
            handle = body[: body.index(b"\0")]
            send = gearman(WORK_COMPLETE, handle + b"\0" + result(tag_of(body))) + grab
        elif kind == NO_JOB:
            send = gearman(PRE_SLEEP)
        elif kind == NOOP:
            send = grab
        else:
            raise Failure(f"gearmand sent packet {kind}: {body!r}")
        data += yield send
