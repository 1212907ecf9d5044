"""What goes over the wire, byte by byte, and what must come back.

Each case is the bytes of one connection. The runner appends a canary (a submit to a queue of its own) and
then reads to the end of the stream, so that a case is a statement on three things: the answers, whether the
connection may be used any further, and what was executed. A canary that is answered after a refusal, or one
that was eaten as somebody's body, is how request smuggling shows.

`QUEUE` in a case is replaced by a queue name of the same length that no other case uses.
"""

import json
import re
from dataclasses import dataclass

# == Reading answers strictly

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HEAD = re.compile(
    rb"HTTP/1\.1 ([1-5][0-9][0-9]) [\t\x20-\x7e]*\r\n"
    rb"((?:" + TOKEN + rb":[ \t]*[\x21-\x7e\x80-\xff]?[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n"
)
# IMF-fixdate, the only form a server may send (RFC 9110 5.6.7).
DATE = re.compile(
    r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), [0-3][0-9] "
    r"(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) [0-9]{4} [0-2][0-9]:[0-5][0-9]:[0-6][0-9] GMT"
)
PROBLEM_MEMBERS = ("title", "status", "detail", "code", "error")


class Malformed(Exception):
    """An answer that a strict client would refuse."""


@dataclass
class Answer:
    """One response as it stood on the wire: lower-case names, the body after decoding."""

    status: int
    headers: dict
    body: bytes

    @property
    def closes(self):
        """Whether the server says that this is its last answer on the connection."""
        return "close" in self.headers.get("connection", "").lower()

    def json(self):
        return json.loads(self.body)


def parse_answers(stream, methods=()):
    """All responses in `stream`; `methods` tells the n-th final answer's request method (GET where unknown).

    Raises Malformed where the stream is not a clean sequence of complete responses.
    """
    answers, at = [], 0
    while at < len(stream):
        number = sum(1 for answer in answers if answer.status >= 200)
        if answers and answers[-1].closes:
            raise Malformed(f"bytes after an answer with Connection: close: {stream[at:at + 200]!r}")
        method = methods[number] if number < len(methods) else b"GET"
        answer, at = parse_answer(stream, at, method)
        answers.append(answer)
    return answers


def parse_answer(stream, at=0, method=b"GET"):
    """The response that starts at `at`, and where the next one starts."""
    head = HEAD.match(stream, at)
    if not head:
        raise Malformed(f"not a response head: {stream[at:at + 300]!r}")
    status, headers = int(head[1]), parse_fields(head[2])
    body, end = parse_body(stream, head.end(), status, headers, method)
    answer = Answer(status, headers, body)
    check_answer(answer, method)
    return answer, end


def parse_fields(block):
    headers = {}
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        key = name.decode("ascii").lower()
        if key in headers:  # not one field of ours is a list: twice is an injection or a slip
            raise Malformed(f"the field {key} stands twice")
        headers[key] = value.strip(b" \t").decode("latin-1")
    return headers


def parse_body(stream, at, status, headers, method):
    """The content and its end by RFC 9112 6.3; an answer that only ends with the connection is refused."""
    if status < 200 or status in (204, 304) or method == b"HEAD":
        return b"", at
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"] != "chunked" or "content-length" in headers:
            raise Malformed(f"bad framing: {headers}")
        return parse_chunks(stream, at)
    if not re.fullmatch("[0-9]+", headers.get("content-length", "")):
        raise Malformed(f"no length: {headers}")
    end = at + int(headers["content-length"])
    if end > len(stream):
        raise Malformed(f"body cut short: {len(stream) - at} of {end - at} bytes")
    return stream[at:end], end


def parse_chunks(stream, at):
    content = b""
    while True:
        size = re.compile(rb"([0-9a-fA-F]{1,8})\r\n").match(stream, at)
        if not size:
            raise Malformed(f"not a chunk: {stream[at:at + 60]!r}")
        at, length = size.end(), int(size[1], 16)
        if stream[at + length:at + length + 2] != b"\r\n":
            raise Malformed("a chunk without its CRLF")
        content += stream[at:at + length]
        at += length + 2
        if not length:
            return content, at


def check_answer(answer, method):
    """What holds for every answer of the server, whatever was asked."""
    headers, status = answer.headers, answer.status
    if status < 200:
        if status != 100 or "content-length" in headers:
            raise Malformed(f"unexpected interim answer {status} {headers}")
        return
    if not DATE.fullmatch(headers.get("date", "")):  # RFC 9110 6.6.1: a server with a clock sends Date
        raise Malformed(f"no proper Date: {headers}")
    if status in (204, 304):
        extra = {"content-length", "content-type", "transfer-encoding"} & headers.keys()
        if extra:  # RFC 9110 8.6, RFC 9112 6.1
            raise Malformed(f"{status} with {sorted(extra)}")
    if status == 405 and not re.fullmatch("[A-Z]+(, ?[A-Z]+)*", headers.get("allow", "")):  # RFC 9110 15.5.6
        raise Malformed(f"405 without Allow: {headers}")
    if status == 401 and not headers.get("www-authenticate", "").startswith("Bearer"):  # RFC 9110 15.5.2
        raise Malformed(f"401 without WWW-Authenticate: {headers}")
    if b"Traceback" in answer.body or b'File "' in answer.body:
        raise Malformed(f"a traceback in an answer: {answer.body!r}")
    if status >= 400:
        check_problem(answer, method)


def check_problem(answer, method):
    """A refusal carries application/problem+json (RFC 9457) that agrees with the status line."""
    if answer.headers.get("content-type", "").split(";")[0] != "application/problem+json":
        raise Malformed(f"{answer.status} as {answer.headers.get('content-type')}")
    if method == b"HEAD":
        return
    try:
        problem = json.loads(answer.body)
    except ValueError:
        raise Malformed(f"{answer.status} whose body is not JSON: {answer.body!r}") from None
    missing = [name for name in PROBLEM_MEMBERS if name not in problem]
    if missing or problem["status"] != answer.status or problem["error"] != problem["detail"]:
        raise Malformed(f"not the problem that was agreed: {problem}")


# == Cases

KEEPS, CLOSES, EITHER = "keeps", "closes", "either"


@dataclass(frozen=True)
class Case:
    """The bytes of a connection and what must follow.

    `answers`: for each final answer, the statuses that will do. `connection`: KEEPS (the canary is answered),
    CLOSES (Connection: close, and the canary is never run) or EITHER (as the last answer says).
    `codes`: what the problem's `code` may be. `names`: a text that the problem's detail must hold.
    `payload`: what the job in QUEUE must hold. `methods`: of the requests, where one is HEAD.
    `ends`: the client ends its stream after the canary, since the server would rightly wait for more.
    """

    name: str
    sent: bytes
    answers: tuple
    connection: str
    source: str = ""
    codes: tuple = ()
    names: str = ""
    payload: object = None
    methods: tuple = ()
    ends: bool = False


def statuses(wanted):
    """(200, (400, 505)) as sets, one for each answer."""
    return tuple({one} if isinstance(one, int) else set(one) for one in wanted)


def fine(name, sent, *wanted, **more):
    """Answered, and the connection goes on."""
    return Case(name, sent, statuses(wanted or (200,)), KEEPS, **more)


def stored(name, sent, payload, **more):
    """A submit whose body arrives as `payload`, and the connection goes on."""
    return Case(name, sent, statuses((202,)), KEEPS, payload=payload, **more)


def last(name, sent, *wanted, **more):
    """Answered as usual, but the connection ends with it."""
    return Case(name, sent, statuses(wanted or (200,)), CLOSES, **more)


def bad(name, sent, *wanted, **more):
    """Refused with an answer and a close: where the next message starts cannot be trusted."""
    more.setdefault("codes", ("bad_http", "http_version", "not_implemented", "uri_too_long",
                              "headers_too_large", "payload_too_large", "host_refused"))
    return Case(name, sent, statuses(wanted or (400,)), CLOSES, **more)


def unsure(name, sent, *wanted, **more):
    """The rules allow the connection to go on or to end; what happens must be what the answer says."""
    return Case(name, sent, statuses(wanted), EITHER, **more)


def line(request_line):
    """A request of which the request line is the point."""
    return request_line + b"\r\nHost: localhost\r\n\r\n"


def with_fields(fields, request_line=b"GET /health HTTP/1.1"):
    """A request of which the header fields are the point; `fields` carries its own CRLFs."""
    return request_line + b"\r\nHost: localhost\r\n" + fields + b"\r\n"


def with_host(host_lines, request_line=b"GET /health HTTP/1.1"):
    return request_line + b"\r\n" + host_lines + b"\r\n"


SUBMIT_LINE = b"POST /api/submit?queue=QUEUE&wait=0 HTTP/1.1"
OLD_SUBMIT_LINE = b"POST /api/submit?queue=QUEUE&wait=0 HTTP/1.0"


def submit(fields, body=b"", queue=b"QUEUE"):
    """A submit of which the framing is the point; `fields` carries its own CRLFs."""
    return with_fields(fields, SUBMIT_LINE.replace(b"QUEUE", queue)) + body


def chunked(body):
    return submit(b"Transfer-Encoding: chunked\r\n", body)


# What a smuggler hides in a body. It must never be run: no case sends it as a request of its own.
SMUGGLED = (b"POST /api/submit?queue=smuggled&wait=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n"
            b"smuggled")
SMUGGLED_SIZE = b"%d" % len(SMUGGLED)
SMUGGLES = b"Content-Length: " + SMUGGLED_SIZE + b"\r\n"
CHUNKED_SMUGGLED = b"%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"
SUBMIT_HELLO = submit(b"Content-Length: 5\r\n", b"hello")
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

CHUNK_RULE = "RFC 9112 7.1"
BOTH_RULE = "RFC 9112 6.3, 3rd rule"
PARAMETER, HOST, SITE = ("invalid_parameter",), ("host_refused",), ("cross_site",)

# -- the request line: RFC 9112 3

METHODS = [
    fine("GET", GET),
    fine("HEAD has no body", line(b"HEAD /health HTTP/1.1"), methods=(b"HEAD",), source="RFC 9110 9.3.2"),
    unsure("a method in lower case is another method", line(b"get /health HTTP/1.1"), (405, 501),
           source="RFC 9110 9.1"),
    unsure("mixed case too", line(b"Get /health HTTP/1.1"), (405, 501), source="RFC 9110 9.1"),
    unsure("an unknown method", line(b"BREW /health HTTP/1.1"), (405, 501), source="RFC 9110 9.1"),
    unsure("a method of odd token characters", line(b"!#$%&'*+-.^_`|~ /health HTTP/1.1"), (405, 501),
           source="RFC 9110 5.6.2"),
    unsure("a known method of another route", line(b"PATCH /health HTTP/1.1"), 405, source="RFC 9110 15.5.6"),
    unsure("TRACE is not echoed", line(b"TRACE /health HTTP/1.1"), (405, 501), source="RFC 9110 9.3.8"),
    unsure("a body under an unknown method is not a request",
           with_fields(SMUGGLES, b"BREW /health HTTP/1.1") + SMUGGLED, (405, 501),
           source="RFC 9112 6: the framing does not depend on the method"),
    bad("a method with @", line(b"G@T /health HTTP/1.1"), source="RFC 9110 5.6.2"),
    bad("a method with brackets", line(b"GET() /health HTTP/1.1"), source="RFC 9110 5.6.2"),
    bad("a method with an umlaut", line(b"G\xc3\x84T /health HTTP/1.1"), source="RFC 9110 5.6.2"),
    bad("a method with a colon", line(b"GET: /health HTTP/1.1"), source="RFC 9110 5.6.2"),
    bad("no method", line(b" /health HTTP/1.1"), source="RFC 9112 3"),
    bad("a very long method", line(b"A" * 9000 + b" /health HTTP/1.1"), (400, 414, 501), source="RFC 9112 3"),
]

VERSIONS = [
    bad("HTTP/0.9", b"GET /health\r\n", (400, 505), source="RFC 9112 2.3"),
    bad("HTTP/0.9 with a trailing space", b"GET /health \r\n\r\n", (400, 505), source="RFC 9112 3"),
    bad("the method alone", line(b"GET"), (400, 505), source="RFC 9112 3"),
    last("HTTP/1.0 closes", with_fields(b"", b"GET /health HTTP/1.0"), source="RFC 9112 9.3"),
    unsure("HTTP/1.0 with keep-alive", with_fields(b"Connection: keep-alive\r\n", b"GET /health HTTP/1.0"),
           200, source="RFC 9112 9.3"),
    last("HTTP/1.0 with close and keep-alive: close wins",
         with_fields(b"Connection: keep-alive, close\r\n", b"GET /health HTTP/1.0"), source="RFC 9112 9.3"),
    last("HTTP/1.0 needs no Host", b"GET /health HTTP/1.0\r\n\r\n", source="RFC 9112 3.2"),
    unsure("HTTP/1.2 is 1.1 or unknown", line(b"GET /health HTTP/1.2"), (200, 505), source="RFC 9110 2.5"),
    unsure("HTTP/1.9 is 1.1 or unknown", line(b"GET /health HTTP/1.9"), (200, 505), source="RFC 9110 2.5"),
    bad("HTTP/0.0", line(b"GET /health HTTP/0.0"), (400, 505), source="RFC 9110 2.5"),
    bad("HTTP/0.9 by name", line(b"GET /health HTTP/0.9"), (400, 505), source="RFC 9110 2.5"),
    bad("HTTP/2.0", line(b"GET /health HTTP/2.0"), 505, source="RFC 9110 15.6.6"),
    bad("HTTP/3.0", line(b"GET /health HTTP/3.0"), 505, source="RFC 9110 15.6.6"),
    bad("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505), source="RFC 9113 3.4"),
    bad("no minor version", line(b"GET /health HTTP/1"), (400, 505), source="RFC 9112 2.3"),
    bad("an empty minor version", line(b"GET /health HTTP/1."), (400, 505), source="RFC 9112 2.3"),
    bad("two digits", line(b"GET /health HTTP/1.10"), (400, 505), source="RFC 9112 2.3"),
    bad("a leading zero", line(b"GET /health HTTP/01.1"), (400, 505), source="RFC 9112 2.3"),
    bad("three numbers", line(b"GET /health HTTP/1.1.1"), (400, 505), source="RFC 9112 2.3"),
    bad("lower case: the name is case-sensitive", line(b"GET /health http/1.1"), (400, 505),
        source="RFC 9112 2.3"),
    bad("a sign", line(b"GET /health HTTP/+1.1"), (400, 505), source="RFC 9112 2.3"),
    bad("a superscript digit", line(b"GET /health HTTP/1.\xb9"), (400, 505), source="RFC 9112 2.3"),
    bad("an Arabic digit", line(b"GET /health HTTP/1.\xd9\xa1"), (400, 505), source="RFC 9112 2.3"),
    bad("another protocol", line(b"GET /health ICY/1.1"), (400, 505), source="RFC 9112 2.3"),
    bad("a space in the version", line(b"GET /health HTTP/ 1.1"), (400, 505), source="RFC 9112 2.3"),
    bad("something after the version", line(b"GET /health HTTP/1.1 HTTP/1.1"), (400, 505),
        source="RFC 9112 3"),
    bad("a version glued to junk", line(b"GET /health HTTP/1.1x"), (400, 505), source="RFC 9112 2.3"),
    bad("a version glued to a NUL", line(b"GET /health HTTP/1.1\0"), (400, 505), source="RFC 9112 2.3"),
]

SPACES = [
    bad("two spaces before the target", line(b"GET  /health HTTP/1.1"), source="RFC 9112 3"),
    bad("two spaces before the version", line(b"GET /health  HTTP/1.1"), source="RFC 9112 3"),
    bad("a space after the version", line(b"GET /health HTTP/1.1 "), (400, 505), source="RFC 9112 3"),
    bad("a tab for a space", line(b"GET\t/health HTTP/1.1"), source="RFC 9112 3"),
    bad("a tab before the version", line(b"GET /health\tHTTP/1.1"), (400, 505), source="RFC 9112 3"),
    bad("a form feed for a space", line(b"GET\x0c/health HTTP/1.1"), source="RFC 9112 3"),
    bad("a vertical tab in the line", line(b"GET /health\x0b HTTP/1.1"), source="RFC 9112 3"),
    bad("a no-break space for a space", line(b"GET\xa0/health HTTP/1.1"), source="RFC 9112 3"),
    bad("a space in the target", line(b"GET /hea lth HTTP/1.1"), source="RFC 9112 3.2"),
    bad("a space in the query", line(b"GET /api/jobs?queue=a b HTTP/1.1"), source="RFC 9112 3.2"),
    bad("a leading tab", line(b"\tGET /health HTTP/1.1"), source="RFC 9112 3"),
    fine("one empty line before the request line", b"\r\n" + GET, source="RFC 9112 2.2: at least one"),
    unsure("some empty lines before the request line", b"\r\n\r\n\r\n" + GET, (200, 400),
           source="RFC 9112 2.2"),
    unsure("very many empty lines", b"\r\n" * 20000 + GET, (200, 400, 414, 431), source="RFC 9112 2.2"),
    bad("a bare LF before the request line", b"\n" + GET, source="RFC 9112 2.2"),
    bad("a bare CR before the request line", b"\r" + GET, source="RFC 9112 2.2"),
    bad("a space and an empty line before the request line", b" \r\n" + GET, source="RFC 9112 2.2"),
    bad("bare LF ends every line", b"GET /health HTTP/1.1\nHost: localhost\n\n",
        source="RFC 9112 2.2, strict"),
    bad("bare LF ends the request line", b"GET /health HTTP/1.1\nHost: localhost\r\n\r\n",
        source="RFC 9112 2.2, strict"),
    bad("bare CR ends the request line", b"GET /health HTTP/1.1\rHost: localhost\r\n\r\n",
        source="RFC 9112 2.2"),
    bad("two CRs end the request line", b"GET /health HTTP/1.1\r\r\nHost: localhost\r\n\r\n", (400, 505),
        source="RFC 9112 2.2"),
    bad("a bare CR in the target", line(b"GET /hea\rlth HTTP/1.1"), source="RFC 9112 2.2"),
    bad("LF CR in place of CR LF", b"GET /health HTTP/1.1\n\rHost: localhost\n\r\n\r", source="RFC 9112 2.2"),
]

TARGETS = [
    fine("absolute-form of this host",
         with_host(b"Host: localhost\r\n", b"GET http://localhost/health HTTP/1.1"), source="RFC 9112 3.2.2"),
    fine("absolute-form by address",
         with_host(b"Host: 127.0.0.1\r\n", b"GET http://127.0.0.1/health HTTP/1.1"), source="RFC 9112 3.2.2"),
    fine("absolute-form in capitals", line(b"GET HTTP://LOCALHOST/health HTTP/1.1"),
         source="RFC 9110 4.2.3: scheme and host are case-insensitive"),
    fine("absolute-form without a path is the root", line(b"GET http://localhost HTTP/1.1"),
         source="RFC 9110 4.2.3"),
    stored("absolute-form with a query",
           with_fields(b"Content-Length: 5\r\n",
                       b"POST http://localhost/api/submit?queue=QUEUE&wait=0 HTTP/1.1") + b"hello",
           "hello", source="RFC 9112 3.2.2"),
    unsure("absolute-form of this host, Host of another",
           with_host(b"Host: evil.example\r\n", b"GET http://localhost/health HTTP/1.1"), (200, 400, 403),
           source="RFC 9112 3.2.2: the target counts; to refuse is safe"),
    bad("absolute-form of another host", line(b"GET http://evil.example/health HTTP/1.1"), (400, 403, 421),
        source="RFC 9112 3.2.2"),
    bad("absolute-form of another host that starts like ours",
        line(b"GET http://localhost.evil.example/health HTTP/1.1"), (400, 403, 421)),
    bad("absolute-form with a user", line(b"GET http://localhost@evil.example/health HTTP/1.1"),
        (400, 403, 421), source="RFC 9110 4.2.4"),
    bad("absolute-form with our name as the user", line(b"GET http://a:b@localhost/health HTTP/1.1"),
        (400, 403, 421), source="RFC 9110 4.2.4"),
    bad("absolute-form of another scheme", line(b"GET ftp://localhost/health HTTP/1.1"), (400, 403, 421),
        source="RFC 9112 3.2.2"),
    bad("absolute-form without a host", line(b"GET http:///health HTTP/1.1"), (400, 403, 421),
        source="RFC 9110 4.2.1: an empty host is invalid"),
    bad("a scheme without slashes", line(b"GET http:/health HTTP/1.1"), (400, 403, 421)),
    bad("absolute-form with a bad port", line(b"GET http://localhost:http/health HTTP/1.1"), (400, 403, 421)),
    unsure("authority-form of CONNECT", line(b"CONNECT localhost:80 HTTP/1.1"), (400, 404, 405, 501),
           source="RFC 9110 9.3.6"),
    bad("authority-form with GET", line(b"GET localhost:80 HTTP/1.1"), source="RFC 9112 3.2.3"),
    unsure("OPTIONS *", line(b"OPTIONS * HTTP/1.1"), (200, 204, 400, 404, 405, 501), source="RFC 9112 3.2.4"),
    unsure("OPTIONS of a route", line(b"OPTIONS /health HTTP/1.1"), (200, 204, 405), source="RFC 9110 9.3.7"),
    bad("* with GET", line(b"GET * HTTP/1.1"), source="RFC 9112 3.2.4: only OPTIONS"),
    bad("no slash at the start", line(b"GET health HTTP/1.1"), source="RFC 9112 3.2.1"),
    bad("a query alone", line(b"GET ?a=b HTTP/1.1"), source="RFC 9112 3.2.1"),
    unsure("a fragment", line(b"GET /health#top HTTP/1.1"), (400, 404), source="RFC 9112 3.2"),
    bad("a NUL in the target", line(b"GET /health\0 HTTP/1.1"), source="RFC 9112 3.2"),
    bad("a control character in the target", line(b"GET /hea\x01lth HTTP/1.1"), source="RFC 9112 3.2"),
    bad("an escape sequence in the target", line(b"GET /\x1b[31mhealth HTTP/1.1"), source="RFC 9112 3.2"),
    bad("DEL in the target", line(b"GET /health\x7f HTTP/1.1"), source="RFC 9112 3.2"),
    unsure("raw UTF-8 in the target", line(b"GET /h\xc3\xa9alth HTTP/1.1"), (400, 404),
           source="RFC 9112 3.2"),
    unsure("a raw high byte in the target", line(b"GET /health\xff HTTP/1.1"), (400, 404),
           source="RFC 9112 3.2"),
    unsure("a quote in the path", line(b'GET /health" HTTP/1.1'), (400, 404), source="RFC 3986 3.3"),
    unsure("a line of nearly 8 KiB", line(b"GET /" + b"a" * 8100 + b" HTTP/1.1"), 404),
    bad("a line over 8 KiB", line(b"GET /" + b"a" * 8300 + b" HTTP/1.1"), 414, source="RFC 9110 15.5.15"),
    bad("a query over 8 KiB", line(b"GET /health?" + b"a" * 8300 + b" HTTP/1.1"), 414,
        source="RFC 9110 15.5.15"),
    bad("a line that never ends", b"GET /" + b"a" * 65536, 414, source="RFC 9110 15.5.15"),
    bad("a line of junk that never ends", b"\x00\xff" * 32768, (400, 414), source="RFC 9112 3"),
    bad("a TLS greeting on the plain port",
        bytes.fromhex("1603010200010001fc0303") + b"\x00" * 40 + b"\r\n\r\n", source="RFC 9112 3"),
]

# -- header fields: RFC 9112 5, RFC 9110 5

FIELDS = [
    fine("no space after the colon", with_fields(b"X-A:b\r\n"), source="RFC 9112 5"),
    fine("much space around the value", with_fields(b"X-A: \t  b \t \r\n"), source="RFC 9112 5.1"),
    fine("an empty value", with_fields(b"X-A:\r\nX-B: \r\n"), source="RFC 9110 5.5"),
    fine("a tab in the value", with_fields(b"X-A: b\tc\r\n"), source="RFC 9110 5.5"),
    fine("odd token characters in the name", with_fields(b"!#$%&'*+-.^_`|~09azAZ: b\r\n"),
         source="RFC 9110 5.6.2"),
    fine("high bytes in the value", with_fields(b"X-A: caf\xe9 \xc3\xa9 \xff\r\n"),
         source="RFC 9110 5.5: obs-text"),
    fine("a colon in the value", with_fields(b"X-A: b: c::\r\n"), source="RFC 9112 5"),
    fine("names in any case", with_host(b"hOST: localhost\r\ncONTENT-lENGTH: 0\r\n"), source="RFC 9110 5.1"),
    fine("100 fields", with_fields(b"".join(b"X-%d: b\r\n" % n for n in range(98)))),
    fine("nearly 32 KiB of fields",
         with_fields(b"".join(b"X-%d: %s\r\n" % (n, b"b" * 1000) for n in range(29)))),
    unsure("1,000 short fields", with_fields(b"".join(b"X-%d: b\r\n" % n for n in range(1000))), (200, 431)),
    bad("over 32 KiB of fields", with_fields(b"".join(b"X-%d: %s\r\n" % (n, b"b" * 1000) for n in range(34))),
        431, source="RFC 6585 5"),
    bad("one field over 32 KiB", with_fields(b"X-A: " + b"b" * 40000 + b"\r\n"), 431, source="RFC 6585 5"),
    bad("a name over 32 KiB", with_fields(b"X" * 40000 + b": b\r\n"), 431, source="RFC 6585 5"),
    bad("too many fields", with_fields(b"X-A: b\r\n" * 20000), 431, source="RFC 6585 5"),
    bad("fields that never end", with_fields(b"X-A: " + b"b" * 100000), 431, source="RFC 6585 5"),
    bad("obs-fold with a space", with_fields(b"X-A: b\r\n c\r\n"), source="RFC 9112 5.2"),
    bad("obs-fold with a tab", with_fields(b"X-A: b\r\n\tc\r\n"), source="RFC 9112 5.2"),
    bad("obs-fold of nothing", with_fields(b"X-A: b\r\n \r\n"), source="RFC 9112 5.2"),
    bad("obs-fold hides a length", submit(b"X-A: b\r\n Content-Length: 5\r\n", b"hello"),
        source="RFC 9112 5.2"),
    bad("space before the first field", with_host(b" Host: localhost\r\n"), source="RFC 9112 2.2"),
    bad("space before the colon", with_fields(b"X-A : b\r\n"), source="RFC 9112 5.1"),
    bad("a tab before the colon", with_fields(b"X-A\t: b\r\n"), source="RFC 9112 5.1"),
    bad("space before the colon of a length", submit(b"Content-Length : 5\r\n", b"hello"),
        source="RFC 9112 5.1"),
    bad("space before the colon of Host", with_host(b"Host : localhost\r\n"), source="RFC 9112 5.1"),
    bad("bare CR in a value", with_fields(b"X-A: b\rc\r\n"), source="RFC 9112 2.2"),
    bad("bare CR hides a field", with_fields(b"X-A: b\rContent-Length: 5\r\n"), source="RFC 9112 2.2"),
    bad("CR CR LF", with_fields(b"X-A: b\r\r\n"), source="RFC 9112 2.2"),
    bad("CR CR LF ends the fields", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\r\n",
        source="RFC 9112 2.2"),
    bad("bare LF ends a field", with_fields(b"X-A: b\nX-B: c\r\n"), source="RFC 9112 2.2, strict"),
    bad("bare LF ends the fields", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n",
        source="RFC 9112 2.2, strict"),
    bad("LF LF ends the fields", b"GET /health HTTP/1.1\r\nHost: localhost\n\n",
        source="RFC 9112 2.2, strict"),
    bad("bare LF hides a length", submit(b"X-A: b\nContent-Length: 5\r\n", b"hello"), source="RFC 9112 2.2"),
    bad("NUL in a value", with_fields(b"X-A: b\0c\r\n"), source="RFC 9110 5.5"),
    bad("NUL in a name", with_fields(b"X\0A: b\r\n"), source="RFC 9110 5.6.2"),
    bad("a control character in a value", with_fields(b"X-A: b\x01c\r\n"), source="RFC 9110 5.5"),
    bad("an escape sequence in a value", with_fields(b"X-A: \x1b[2J\r\n"), source="RFC 9110 5.5"),
    bad("DEL in a value", with_fields(b"X-A: b\x7fc\r\n"), source="RFC 9110 5.5"),
    bad("a control character behind 30,000 spaces", with_fields(b"X-A:" + b" " * 30_000 + b"\x01\r\n"),
        source="RFC 9110 5.5"),
    fine("30,000 spaces and no value", with_fields(b"X-A:" + b" " * 30_000 + b"\r\n"), source="RFC 9110 5.5"),
    bad("a vertical tab at a value's start", with_fields(b"X-A: \x0bb\r\n"), source="RFC 9110 5.5"),
    bad("a form feed at a value's end", with_fields(b"X-A: b\x0c\r\n"), source="RFC 9110 5.5"),
    bad("no name", with_fields(b": b\r\n"), source="RFC 9110 5.1"),
    bad("no colon", with_fields(b"X-A\r\n"), source="RFC 9112 5"),
    bad("no colon in the last field", with_fields(b"X-A: b\r\nGET /health HTTP/1.1\r\n"),
        source="RFC 9112 5"),
    bad("a length behind a no-break space", submit(b"Content-Length: \xa05\r\n", b"hello"),
        source="RFC 9110 5.6.3"),
    bad("a space in the name", with_fields(b"X A: b\r\n"), source="RFC 9110 5.6.2"),
    bad("brackets in the name", with_fields(b"X(A): b\r\n"), source="RFC 9110 5.6.2"),
    bad("a quote in the name", with_fields(b'"X-A": b\r\n'), source="RFC 9110 5.6.2"),
    bad("an @ in the name", with_fields(b"X@A: b\r\n"), source="RFC 9110 5.6.2"),
    bad("a slash in the name", with_fields(b"X/A: b\r\n"), source="RFC 9110 5.6.2"),
    bad("a high byte in the name", with_fields(b"X\xe9A: b\r\n"), source="RFC 9110 5.6.2"),
    bad("a long s in the name", with_fields(b"Ho\xc5\xbft: evil.example\r\n"), source="RFC 9110 5.6.2"),
    bad("a control character in the name", with_fields(b"X\x01A: b\r\n"), source="RFC 9110 5.6.2"),
    bad("a next-line character in the name", with_fields(b"X\x85A: b\r\n"), source="RFC 9110 5.6.2"),
    fine("a next-line character in a value ends no line", with_fields(b"X-A: b\x85Content-Length: 5\r\n"),
         source="RFC 9110 5.5: obs-text; only CRLF ends a line"),
    fine("U+2028 in a value ends no line", with_fields(b"X-A: b\xe2\x80\xa8Content-Length: 5\r\n"),
         source="RFC 9110 5.5: obs-text; only CRLF ends a line"),
]

def at_host(host_lines):
    """A request to a route whose data no other site's page may see (DNS rebinding)."""
    return with_host(host_lines, b"GET /api/jobs/none HTTP/1.1")


HOSTS = [
    bad("no Host", b"GET /health HTTP/1.1\r\n\r\n", source="RFC 9112 3.2"),
    bad("no Host but an absolute-form", b"GET http://localhost/health HTTP/1.1\r\n\r\n",
        source="RFC 9112 3.2"),
    bad("two Hosts alike", with_host(b"Host: localhost\r\nHost: localhost\r\n"), source="RFC 9112 3.2"),
    bad("two Hosts that differ", with_host(b"Host: localhost\r\nHost: evil.example\r\n"),
        source="RFC 9112 3.2"),
    bad("two Hosts in two cases", with_host(b"Host: localhost\r\nHOST: 127.0.0.1\r\n"),
        source="RFC 9112 3.2"),
    bad("two Hosts in HTTP/1.0",
        with_host(b"Host: localhost\r\nHost: evil.example\r\n", b"GET /health HTTP/1.0"),
        source="RFC 9112 3.2: any request message"),
    fine("Host by name", with_host(b"Host: localhost\r\n")),
    fine("Host with a port", with_host(b"Host: localhost:3000\r\n")),
    fine("Host in capitals", with_host(b"Host: LocalHost\r\n"), source="RFC 9110 4.2.3"),
    fine("Host by address", with_host(b"Host: 127.0.0.1\r\n")),
    fine("Host by another address", with_host(b"Host: 192.0.2.7:80\r\n")),
    fine("Host by IPv6 address", with_host(b"Host: [::1]:3000\r\n"), source="RFC 3986 3.2.2"),
    unsure("another Host on an open route", with_host(b"Host: evil.example\r\n"), (200, 403)),
    fine("a known Host on a route with data", at_host(b"Host: [::1]:80\r\n"), 404),
    unsure("an empty Host", at_host(b"Host:\r\n"), (400, 403), source="without tokens: an address or localhost"),
    unsure("another Host", at_host(b"Host: evil.example\r\n"), 403, codes=HOST),
    unsure("a Host that starts like ours", at_host(b"Host: localhost.evil.example\r\n"), 403, codes=HOST),
    unsure("a Host that starts like an address", at_host(b"Host: 127.0.0.1.evil.example\r\n"), 403,
           codes=HOST),
    unsure("a Host that ends like ours", at_host(b"Host: evil-localhost\r\n"), 403, codes=HOST),
    unsure("Host with a user", at_host(b"Host: localhost@evil.example\r\n"), (400, 403),
           source="RFC 9110 7.2: uri-host and port only"),
    unsure("Host with our name as the user", at_host(b"Host: evil@localhost\r\n"), (400, 403),
           source="RFC 9110 7.2"),
    unsure("Host with two ports", at_host(b"Host: localhost:1:2\r\n"), (400, 403), source="RFC 9110 7.2"),
    unsure("Host with a port that is no number", at_host(b"Host: localhost:http\r\n"), (400, 403),
           source="RFC 9110 7.2"),
    unsure("Host with a path", at_host(b"Host: localhost/health\r\n"), (400, 403), source="RFC 9110 7.2"),
    unsure("Host with a space", at_host(b"Host: localhost evil.example\r\n"), (400, 403),
           source="RFC 9110 7.2"),
    unsure("a list of Hosts", at_host(b"Host: localhost, evil.example\r\n"), (400, 403),
           source="RFC 9110 7.2"),
    unsure("an unclosed IPv6 Host", at_host(b"Host: [::1\r\n"), (400, 403), source="RFC 3986 3.2.2"),
    unsure("Host with a high byte", at_host(b"Host: localhost\xe9\r\n"), (400, 403), source="RFC 9110 7.2"),
    unsure("a submit for another Host is not run",
           with_host(b"Host: evil.example\r\nContent-Length: 5\r\n", SUBMIT_LINE) + b"hello",
           403, codes=HOST),
    unsure("a refused Host with a request in its body",
           with_host(b"Host: evil.example\r\n" + SMUGGLES, SUBMIT_LINE) + SMUGGLED,
           403, codes=HOST),
]

CONNECTIONS = [
    last("Connection: close", with_fields(b"Connection: close\r\n"), source="RFC 9112 9.6"),
    last("Connection: Close in a list", with_fields(b"Connection: x-a, CLOSE ,keep-alive\r\n"),
         source="RFC 9110 7.6.1: case-insensitive"),
    last("close in the second of two fields", with_fields(b"Connection: x-a\r\nConnection: close\r\n"),
         source="RFC 9110 5.3"),
    fine("Connection: keep-alive", with_fields(b"Connection: keep-alive\r\n"), source="RFC 9112 9.3"),
    fine("Connection: closed is not close", with_fields(b"Connection: closed, not-close\r\n"),
         source="RFC 9110 7.6.1"),
    fine("a no-break space is no space around close",
         with_fields(b"Connection: \xa0close\r\nConnection: close\x85\r\n"), source="RFC 9110 5.6.3"),
    last("a next-line character is no space around keep-alive",
         with_fields(b"Connection: \x85keep-alive\r\n", b"GET /health HTTP/1.0"), source="RFC 9110 5.6.3"),
    fine("an upgrade to h2c is not taken up",
         with_fields(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
         source="RFC 9110 7.8"),
    fine("an upgrade to websocket is not taken up",
         with_fields(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                     b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"),
         source="RFC 9110 7.8"),
    stored("Connection cannot take the length away",
           submit(b"Connection: Content-Length, Host\r\nContent-Length: 5\r\n", b"hello"), "hello",
           source="RFC 9110 7.6.1: the framing is read first"),
    last("a close after a submit", submit(b"Connection: close\r\nContent-Length: 5\r\n", b"hello"), 202,
         payload="hello", source="RFC 9112 9.6"),
    last("a close in the second request", GET + with_fields(b"Connection: close\r\n"), 200, 200,
         source="RFC 9112 9.6"),
]

# -- framing: RFC 9112 6

LENGTHS = [
    stored("Content-Length", SUBMIT_HELLO, "hello", source="RFC 9110 8.6"),
    stored("no length is no body", submit(b""), "", source="RFC 9112 6.3, 7th rule"),
    stored("Content-Length: 0", submit(b"Content-Length: 0\r\n"), "", source="RFC 9110 8.6"),
    stored("leading zeros", submit(b"Content-Length: 0000000005\r\n", b"hello"), "hello",
           source="RFC 9110 8.6: 1*DIGIT"),
    stored("space around the length", submit(b"Content-Length: \t 5 \t\r\n", b"hello"), "hello",
           source="RFC 9112 5.1"),
    stored("a request as a body", submit(SMUGGLES, SMUGGLED), SMUGGLED.decode(), source="RFC 9112 6.3"),
    stored("a body that starts with CRLF", submit(b"Content-Length: 4\r\n", b"\r\n\r\n"), "\r\n\r\n",
           source="RFC 9112 6.3"),
    fine("GET with a request in its body", with_fields(SMUGGLES) + SMUGGLED, source="RFC 9110 9.3.1"),
    fine("HEAD with a request in its body", with_fields(SMUGGLES, b"HEAD /health HTTP/1.1") + SMUGGLED,
         methods=(b"HEAD",), source="RFC 9110 9.3.2"),
    unsure("DELETE with a request in its body",
           with_fields(SMUGGLES, b"DELETE /api/jobs/none HTTP/1.1") + SMUGGLED, 404, source="RFC 9110 9.3.5"),
    unsure("404 with a request in its body", with_fields(SMUGGLES, b"POST /nowhere HTTP/1.1") + SMUGGLED,
           404),
    unsure("405 with a request in its body", with_fields(SMUGGLES, b"POST /health HTTP/1.1") + SMUGGLED, 405),
    unsure("a bad parameter with a request in its body",
           with_fields(SMUGGLES, b"POST /api/submit?what=5 HTTP/1.1") + SMUGGLED, 400, codes=PARAMETER),
    unsure("the same length twice", submit(b"Content-Length: 5\r\nContent-Length: 5\r\n", b"hello"),
           (202, 400), source="RFC 9112 6.3, 5th rule: as one or refused"),
    bad("two lengths", submit(b"Content-Length: 0\r\nContent-Length: " + SMUGGLED_SIZE + b"\r\n", SMUGGLED),
        source="RFC 9112 6.3, 5th rule"),
    bad("two lengths, the longer first",
        submit(b"Content-Length: " + SMUGGLED_SIZE + b"\r\nContent-Length: 0\r\n", SMUGGLED),
        source="RFC 9112 6.3, 5th rule"),
    bad("two lengths that are the same number",
        submit(b"Content-Length: 5\r\nContent-Length: 05\r\n", b"hello"),
        source="RFC 9112 6.3, 5th rule: identical values only"),
    bad("two lengths under HTTP/1.0",
        with_host(b"Content-Length: 0\r\nContent-Length: 5\r\n", OLD_SUBMIT_LINE) + b"hello",
        source="RFC 9112 6.3"),
    bad("a list of lengths", submit(b"Content-Length: 5, 5\r\n", b"hello"),
        source="RFC 9112 6.3: [0-9] only"),
    bad("a list of lengths that differ", submit(b"Content-Length: 5, 0\r\n", b"hello"),
        source="RFC 9112 6.3"),
    bad("+5", submit(b"Content-Length: +5\r\n", b"hello"), source="RFC 9110 8.6"),
    bad("a plus before a request", submit(b"Content-Length: +" + SMUGGLED_SIZE + b"\r\n", SMUGGLED),
        source="RFC 9110 8.6"),
    bad("-1", submit(b"Content-Length: -1\r\n", SMUGGLED), source="RFC 9110 8.6"),
    bad("-0", submit(b"Content-Length: -0\r\n", SMUGGLED), source="RFC 9110 8.6"),
    bad("0x5", submit(b"Content-Length: 0x5\r\n", b"hello"), source="RFC 9110 8.6"),
    bad("5 5", submit(b"Content-Length: 5 5\r\n", b"hello"), source="RFC 9110 8.6"),
    bad("an empty length", submit(b"Content-Length:\r\n", SMUGGLED), source="RFC 9110 8.6"),
    bad("5.0", submit(b"Content-Length: 5.0\r\n", b"hello"), source="RFC 9110 8.6"),
    bad("5e0", submit(b"Content-Length: 5e0\r\n", b"hello"), source="RFC 9110 8.6"),
    bad("1_0, which Python's int takes", submit(b"Content-Length: 1_0\r\n", b"hellohello"),
        source="RFC 9110 8.6"),
    bad("a superscript digit, which Python's isdigit takes", submit(b"Content-Length: \xb2\r\n", b"he"),
        source="RFC 9110 8.6"),
    bad("an Arabic digit, which Python's int takes", submit("Content-Length: ٥\r\n".encode(), b"hello"),
        source="RFC 9110 8.6"),
    bad("five", submit(b"Content-Length: five\r\n", b"hello"), source="RFC 9110 8.6"),
    bad("5;a=b", submit(b"Content-Length: 5;a=b\r\n", b"hello"), source="RFC 9110 8.6"),
    bad('"5"', submit(b'Content-Length: "5"\r\n', b"hello"), source="RFC 9110 8.6"),
    bad("a vertical tab before the digits", submit(b"Content-Length: \x0b5\r\n", b"hello"),
        source="RFC 9110 5.5"),
    bad("11 digits", submit(b"Content-Length: 00000000005\r\n", b"hello"), source="at most ten digits"),
    bad("11 digits, large", submit(b"Content-Length: 99999999999\r\n", b"hello"), (400, 413)),
    bad("10 digits, large", submit(b"Content-Length: 9999999999\r\n", b"hello"), 413,
        source="RFC 9110 15.5.14"),
    bad("4,000 digits", submit(b"Content-Length: " + b"9" * 4000 + b"\r\n", b"hello"), (400, 413)),
    bad("a length of 2^64 and 5", submit(b"Content-Length: 18446744073709551621\r\n", b"hello"), (400, 413)),
    bad("a bad length on a GET", with_fields(b"Content-Length: x\r\n"), source="RFC 9112 6.3"),
    bad("a bad length on a HEAD", with_fields(b"Content-Length: x\r\n", b"HEAD /health HTTP/1.1"),
        methods=(b"HEAD",), source="RFC 9112 6.3; RFC 9110 9.3.2: no content even then"),
    bad("a bad length on an unknown path", with_fields(b"Content-Length: 5,6\r\n", b"POST /nowhere HTTP/1.1"),
        source="RFC 9112 6.3"),
    stored("Content_Length is another field", submit(b"Content_Length: 0\r\nContent-Length: 5\r\n", b"hello"),
           "hello", source="RFC 9110 5.6.2: _ is not -"),
    Case("a body shorter than its length is never run", submit(b"Content-Length: 9999\r\n", b"hello"),
         statuses((400,)), CLOSES, source="RFC 9112 8", ends=True),
    Case("a body cut short that nobody wants",
         b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc",
         statuses((404,)), CLOSES, source="RFC 9112 8", ends=True),
    Case("a length over the bytes to come eats the canary as content",
         submit(b"Content-Length: 1000\r\n", b"x"), statuses((400,)), CLOSES, source="RFC 9112 8", ends=True),
]

ENCODINGS = [
    stored("chunked", chunked(HELLO), "hello", source=CHUNK_RULE),
    stored("Chunked in capitals", submit(b"Transfer-Encoding: CHUNKED\r\n", HELLO), "hello",
           source="RFC 9112 7: case-insensitive"),
    stored("space around chunked", submit(b"Transfer-Encoding: \t chunked \t\r\n", HELLO), "hello",
           source="RFC 9112 5.1"),
    fine("chunked on a GET, a request in its body",
         with_fields(b"Transfer-Encoding: chunked\r\n") + CHUNKED_SMUGGLED,
         source="RFC 9110 9.3.1"),
    unsure("chunked on an unknown path, a request in its body",
           with_fields(b"Transfer-Encoding: chunked\r\n", b"POST /nowhere HTTP/1.1") + CHUNKED_SMUGGLED,
           404),
    bad("length and chunked",
        submit(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
        source=BOTH_RULE),
    bad("chunked and length",
        submit(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n" + SMUGGLED),
        source=BOTH_RULE),
    bad("chunked and length 0", submit(b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", HELLO),
        source=BOTH_RULE),
    bad("length and chunked on a GET",
        with_fields(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n", source=BOTH_RULE),
    bad("length and an unknown coding", submit(b"Content-Length: 5\r\nTransfer-Encoding: cow\r\n", b"hello"),
        (400, 501), source=BOTH_RULE),
    bad("identity", submit(b"Transfer-Encoding: identity\r\n", SMUGGLED), (400, 501),
        source="RFC 9112 7: no longer a coding"),
    bad("identity and a length", submit(b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n", b"hello"),
        (400, 501), source="RFC 9112 6.3"),
    bad("gzip", submit(b"Transfer-Encoding: gzip\r\n", SMUGGLED), (400, 501),
        source="RFC 9112 6.3, 4th rule"),
    bad("gzip, chunked", submit(b"Transfer-Encoding: gzip, chunked\r\n", HELLO), (400, 501),
        source="RFC 9112 6.1: a coding that is not understood is a 501"),
    bad("chunked, gzip", submit(b"Transfer-Encoding: chunked, gzip\r\n", HELLO), (400, 501),
        source="RFC 9112 6.3, 4th rule"),
    bad("chunked, identity", submit(b"Transfer-Encoding: chunked, identity\r\n", HELLO), (400, 501),
        source="RFC 9112 6.3, 4th rule"),
    bad("chunked, chunked", submit(b"Transfer-Encoding: chunked, chunked\r\n", HELLO), (400, 501),
        source="RFC 9112 6.1: not more than once"),
    bad("chunked twice in two fields",
        submit(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", HELLO), (400, 501),
        source="RFC 9112 6.1"),
    bad("chunked and identity in two fields",
        submit(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", HELLO), (400, 501),
        source="RFC 9112 6.3, 4th rule"),
    bad("identity and chunked in two fields",
        submit(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", HELLO), (400, 501),
        source="RFC 9112 6.1"),
    bad("xchunked", submit(b"Transfer-Encoding: xchunked\r\n", HELLO), (400, 501), source="RFC 9112 6.1"),
    bad("chunkedx", submit(b"Transfer-Encoding: chunkedx\r\n", HELLO), (400, 501), source="RFC 9112 6.1"),
    bad("x chunked", submit(b"Transfer-Encoding: x chunked\r\n", HELLO), (400, 501), source="RFC 9112 6.1"),
    bad('"chunked" in quotes', submit(b'Transfer-Encoding: "chunked"\r\n', HELLO), (400, 501),
        source="RFC 9112 7"),
    bad("chunked with a parameter", submit(b"Transfer-Encoding: chunked;q=1\r\n", HELLO), (400, 501),
        source="RFC 9112 7.1: chunked has none"),
    bad("an empty coding", submit(b"Transfer-Encoding:\r\n", SMUGGLED), (400, 501), source="RFC 9112 6.1"),
    unsure("an empty element beside chunked", submit(b"Transfer-Encoding: , chunked\r\n", HELLO),
           (202, 400, 501), source="RFC 9110 5.6.1.2"),
    bad("a vertical tab before chunked", submit(b"Transfer-Encoding: \x0bchunked\r\n", HELLO), (400, 501),
        source="RFC 9110 5.5"),
    bad("a no-break space before chunked", submit(b"Transfer-Encoding: \xa0chunked\r\n", HELLO), (400, 501),
        source="RFC 9110 5.5: not white space"),
    bad("space before the colon of chunked", submit(b"Transfer-Encoding : chunked\r\n", HELLO),
        source="RFC 9112 5.1"),
    bad("chunked on a folded line", submit(b"Transfer-Encoding:\r\n chunked\r\n", HELLO),
        source="RFC 9112 5.2"),
    bad("a length and chunked behind a bare LF",
        submit(b"Content-Length: 5\r\nX-A: b\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
        source="RFC 9112 2.2"),
    stored("Transfer_Encoding is another field",
           submit(b"Transfer_Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n"), 0,
           source="RFC 9110 5.6.2: _ is not -"),
    stored("TE is not Transfer-Encoding", submit(b"TE: trailers, chunked\r\nContent-Length: 5\r\n", b"hello"),
           "hello", source="RFC 9110 10.1.4"),
    last("chunked in HTTP/1.0 is faulty, and never the last word on a connection that goes on",
         with_fields(b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n", OLD_SUBMIT_LINE) + HELLO,
         (202, 400, 501), source="RFC 9112 6.1"),
]

CHUNKS = [
    stored("no chunk but the last", chunked(b"0\r\n\r\n"), "", source=CHUNK_RULE),
    stored("several chunks", chunked(b"1\r\nh\r\n3\r\nell\r\n1\r\no\r\n0\r\n\r\n"), "hello",
           source=CHUNK_RULE),
    stored("size in small letters", chunked(b"a\r\n0123456789\r\n0\r\n\r\n"), "0123456789",
           source=CHUNK_RULE),
    stored("size in capitals", chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), "0123456789", source=CHUNK_RULE),
    stored("size with leading zeros", chunked(b"0005\r\nhello\r\n0\r\n\r\n"), "hello", source=CHUNK_RULE),
    stored("an extension", chunked(b"5;a=b\r\nhello\r\n0\r\n\r\n"), "hello", source="RFC 9112 7.1.1"),
    stored("an extension without a value", chunked(b"5;a\r\nhello\r\n0\r\n\r\n"), "hello",
           source="RFC 9112 7.1.1"),
    stored("a quoted extension", chunked(b'5;a="b c;d"\r\nhello\r\n0\r\n\r\n'), "hello",
           source="RFC 9112 7.1.1"),
    stored("an extension on the last chunk", chunked(b"5\r\nhello\r\n0;a=b\r\n\r\n"), "hello",
           source="RFC 9112 7.1.1"),
    unsure("space before an extension", chunked(b"5 ;a=b\r\nhello\r\n0\r\n\r\n"), (202, 400),
           source="RFC 9112 7.1.1: BWS"),
    stored("a last chunk of several zeros", chunked(b"5\r\nhello\r\n000\r\n\r\n"), "hello",
           source="RFC 9112 7.1: 1*(0)"),
    stored("CRLF as data", chunked(b"4\r\n\r\n\r\n\r\n0\r\n\r\n"), "\r\n\r\n", source=CHUNK_RULE),
    stored("what looks like a last chunk as data", chunked(b"5\r\n0\r\n\r\n\r\n0\r\n\r\n"), 0,
           source=CHUNK_RULE),
    stored("a request as data", chunked(CHUNKED_SMUGGLED),
           SMUGGLED.decode(), source=CHUNK_RULE),
    bad("size with 0x", chunked(b"0x5\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("size with a plus", chunked(b"+5\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("size with a minus", chunked(b"-5\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("a last chunk of -0", chunked(b"5\r\nhello\r\n-0\r\n\r\n"), source=CHUNK_RULE),
    bad("size with an underscore, which Python's int takes", chunked(b"0_5\r\nhello\r\n0\r\n\r\n"),
        source=CHUNK_RULE),
    bad("size with a space before", chunked(b" 5\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("size with a space after", chunked(b"5 \r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("size with a tab after", chunked(b"5\t\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("size that is not hexadecimal", chunked(b"g\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("size with junk after it", chunked(b"5x\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("size in Arabic digits", chunked("٥\r\nhello\r\n0\r\n\r\n".encode()), source=CHUNK_RULE),
    bad("an empty size", chunked(b"\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("an extension without a size", chunked(b";a=b\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("size of 17 digits", chunked(b"10000000000000005\r\nhello\r\n0\r\n\r\n"), (400, 413),
        source="RFC 9112 7.1: no integer overflow"),
    bad("size of 2^64-1", chunked(b"ffffffffffffffff\r\nhello\r\n0\r\n\r\n"), (400, 413), source=CHUNK_RULE),
    bad("size of 2^32 and 5", chunked(b"100000005\r\nhello\r\n0\r\n\r\n"), (400, 413), source=CHUNK_RULE),
    bad("size of very many zeros", chunked(b"0" * 10000 + HELLO), (400, 413, 431)),
    bad("bare LF after the size", chunked(b"5\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("bare CR after the size", chunked(b"5\rhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("CR CR LF after the size", chunked(b"5\r\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("no CRLF after the data", chunked(b"5\r\nhello0\r\n\r\n"), source=CHUNK_RULE),
    bad("bare LF after the data", chunked(b"5\r\nhello\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("bare CR after the data", chunked(b"5\r\nhello\r0\r\n\r\n"), source=CHUNK_RULE),
    bad("two bytes that are not CRLF after the data", chunked(b"5\r\nhelloXX0\r\n\r\n"), source=CHUNK_RULE),
    bad("data longer than its size", chunked(b"3\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("data shorter than its size", chunked(b"7\r\nhello\r\n0\r\n\r\n"), source=CHUNK_RULE),
    bad("bare LF in an extension", chunked(b"5;a\nb\r\nhello\r\n0\r\n\r\n"), source="RFC 9112 7.1.1"),
    bad("bare LF in an extension hides a request",
        chunked(b"2;\n" + b"xx\r\n%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"),
        source="RFC 9112 7.1.1"),
    bad("bare CR in an extension", chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"), source="RFC 9112 7.1.1"),
    bad("NUL in an extension", chunked(b"5;a\0\r\nhello\r\n0\r\n\r\n"), source="RFC 9112 7.1.1"),
    bad("a very long extension", chunked(b"5;" + b"a" * 20000 + b"\r\nhello\r\n0\r\n\r\n"), (400, 413, 431),
        source="RFC 9112 7.1.1: limit the total length"),
    bad("very much extension in little data",
        chunked((b"1;" + b"a" * 2000 + b"\r\nx\r\n") * 3000 + b"0\r\n\r\n"), (400, 413, 431),
        source="RFC 9112 7.1.1: limit the total length"),
    bad("no CRLF after the last chunk", chunked(b"5\r\nhello\r\n0\r\n"), source=CHUNK_RULE),
    bad("bare LF after the last chunk", chunked(b"5\r\nhello\r\n0\r\n\n"), source=CHUNK_RULE),
    bad("bare LF for the last size line", chunked(b"5\r\nhello\r\n0\n\r\n"), source=CHUNK_RULE),
    bad("over the limit in one chunk", chunked(b"400000\r\n" + b"a" * 0x400000 + b"\r\n0\r\n\r\n"), 413,
        source="RFC 9110 15.5.14"),
    bad("over the limit in many chunks",
        chunked((b"10000\r\n" + b"a" * 0x10000 + b"\r\n") * 65 + b"0\r\n\r\n"), 413,
        source="RFC 9110 15.5.14"),
    bad("over the limit by its size alone", chunked(b"7fffffff\r\n"), 413, source="RFC 9110 15.5.14"),
    Case("a chunk that does not end is never run", chunked(b"fff\r\nhello"), statuses((400,)), CLOSES,
         source="RFC 9112 8", ends=True),
]

TRAILERS = [
    stored("a trailer", chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"), "hello", source="RFC 9112 7.1.2"),
    stored("two trailers", chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-B:\r\n\r\n"), "hello",
           source="RFC 9112 7.1.2"),
    stored("a length in a trailer is ignored",
           chunked(b"5\r\nhello\r\n0\r\nContent-Length: " + SMUGGLED_SIZE + b"\r\n\r\n"), "hello",
           source="RFC 9110 6.5.1"),
    stored("a coding in a trailer is ignored",
           chunked(b"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n"), "hello",
           source="RFC 9110 6.5.1"),
    stored("a Host in a trailer is ignored", chunked(b"5\r\nhello\r\n0\r\nHost: evil.example\r\n\r\n"),
           "hello", source="RFC 9110 6.5.1"),
    stored("a close in a trailer is ignored", chunked(b"5\r\nhello\r\n0\r\nConnection: close\r\n\r\n"),
           "hello", source="RFC 9110 6.5.1"),
    bad("a trailer without a colon", chunked(b"5\r\nhello\r\n0\r\nX-Sum\r\n\r\n"), source="RFC 9112 7.1.2"),
    bad("a trailer with a space in its name", chunked(b"5\r\nhello\r\n0\r\nX Sum: 1\r\n\r\n"),
        source="RFC 9112 7.1.2"),
    bad("a trailer with a space before the colon", chunked(b"5\r\nhello\r\n0\r\nX-Sum : 1\r\n\r\n"),
        source="RFC 9112 5.1"),
    bad("a folded trailer", chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n 2\r\n\r\n"), source="RFC 9112 5.2"),
    bad("a trailer that a bare LF ends", chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\n\r\n"),
        source="RFC 9112 2.2"),
    bad("a NUL in a trailer", chunked(b"5\r\nhello\r\n0\r\nX-Sum: \0\r\n\r\n"), source="RFC 9110 5.5"),
    bad("a control character behind 30,000 spaces in a trailer",
        chunked(b"5\r\nhello\r\n0\r\nX-Sum:" + b" " * 30_000 + b"\x01\r\n\r\n"), source="RFC 9110 5.5"),
    stored("30,000 spaces in a trailer", chunked(b"5\r\nhello\r\n0\r\nX-Sum:" + b" " * 30_000 + b"\r\n\r\n"), "hello",
           source="RFC 9112 7.1.2"),
    bad("a very long trailer", chunked(b"5\r\nhello\r\n0\r\nX-Sum: " + b"1" * 100000 + b"\r\n\r\n"),
        (400, 431), source="RFC 6585 5"),
    bad("very many trailers", chunked(b"5\r\nhello\r\n0\r\n" + b"X-A: b\r\n" * 20000 + b"\r\n"), (400, 431),
        source="RFC 6585 5"),
    bad("a request in place of a trailer", chunked(b"5\r\nhello\r\n0\r\n" + SMUGGLED),
        source="RFC 9112 7.1.2"),
]

BODIES = [
    bad("a declared length over the limit, no body sent", submit(b"Content-Length: 4128769\r\n"), 413,
        source="RFC 9110 15.5.14"),
    bad("over the limit on a complete",
        with_fields(b"Content-Length: 9000000\r\n", b"POST /api/worker/complete/none HTTP/1.1"), (404, 413),
        codes=("payload_too_large", "job_not_found")),
    bad("a body over the limit on a GET", with_fields(b"Content-Length: 9000000\r\n"), (200, 400, 413)),
    stored("a JSON body",
           submit(b"Content-Type: application/json\r\nContent-Length: 17\r\n", b'{"a":1.0,"a":[1]}'),
           {"a": [1]}),
    unsure("ndjson under another type",
           with_fields(b"Content-Type: text/plain\r\nContent-Length: 2\r\n",
                       b"POST /api/jobs?queue=QUEUE HTTP/1.1") + b"1\n",
           415, codes=("unsupported_media_type",), source="RFC 9110 15.5.16"),
    unsure("an unknown expectation", submit(b"Expect: 200-ok\r\nContent-Length: 5\r\n", b"hello"), 417,
           codes=("expectation_failed",), source="RFC 9110 10.1.1"),
    unsure("a known expectation behind a no-break space",
           submit(b"Expect: \xa0100-continue\r\nContent-Length: 5\r\n", b"hello"), 417,
           codes=("expectation_failed",), source="RFC 9110 5.6.3"),
    unsure("one known and one unknown expectation",
           submit(b"Expect: 100-continue, cake\r\nContent-Length: 5\r\n", b"hello"), 417,
           codes=("expectation_failed",), source="RFC 9110 10.1.1"),
    unsure("an unknown expectation with a request as a body",
           submit(b"Expect: cake\r\nContent-Length: " + SMUGGLED_SIZE + b"\r\n", SMUGGLED), 417,
           codes=("expectation_failed",), source="RFC 9110 10.1.1"),
    stored("an expectation whose body is sent at once",
           submit(b"Expect: 100-continue\r\nContent-Length: 5\r\n", b"hello"), "hello",
           source="RFC 9110 10.1.1"),
    stored("an expectation in capitals", submit(b"Expect: 100-Continue\r\nContent-Length: 5\r\n", b"hello"),
           "hello", source="RFC 9110 10.1.1: case-insensitive"),
    stored("an expectation with chunks",
           submit(b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n", HELLO), "hello",
           source="RFC 9110 10.1.1"),
    fine("an expectation without a body", with_fields(b"Expect: 100-continue\r\n"), source="RFC 9110 10.1.1"),
    last("an expectation in HTTP/1.0 is ignored",
         with_fields(b"Expect: 100-continue\r\nContent-Length: 5\r\n", OLD_SUBMIT_LINE) + b"hello",
         202, payload="hello", source="RFC 9110 10.1.1"),
    unsure("an expectation on an unknown path, the body is sent all the same",
           with_fields(b"Expect: 100-continue\r\n" + SMUGGLES, b"POST /nowhere HTTP/1.1") + SMUGGLED,
           404, source="RFC 9110 10.1.1"),
    bad("an expectation over the limit", submit(b"Expect: 100-continue\r\nContent-Length: 5000000\r\n"), 413,
        source="RFC 9110 10.1.1"),
]

# -- order on one connection: RFC 9112 9.3.2

PIPELINES = [
    fine("two requests in one write", GET + GET, 200, 200),
    fine("answers of every kind in the order of the requests",
         GET + line(b"GET /nowhere HTTP/1.1") + SUBMIT_HELLO + line(b"HEAD /health HTTP/1.1")
         + line(b"GET /api/worker/poll?queue=none HTTP/1.1") + GET,
         200, 404, 202, 200, 204, 200, methods=(b"GET", b"GET", b"POST", b"HEAD", b"GET", b"GET"),
         payload="hello"),
    fine("a chunked and a measured body", chunked(HELLO) + GET, 202, 200, payload="hello"),
    fine("fifty requests", GET * 50, *[200] * 50),
    fine("an empty line between requests", GET + b"\r\n" + GET, 200, 200, source="RFC 9112 2.2"),
    stored("a CRLF after a body, as old clients send it", SUBMIT_HELLO + b"\r\n", "hello",
           source="RFC 9112 2.2"),
    bad("junk after a body", SUBMIT_HELLO + b"{}", 202, 400, source="RFC 9112 3"),
    bad("a bad request after a good one", GET + with_fields(b"X : y\r\n"), 200, 400),
    bad("a bad request after a HEAD has a body", line(b"HEAD /health HTTP/1.1") + b"X Y\r\n\r\n", 200, 400,
        methods=(b"HEAD", b"GET"), source="RFC 9112 6.3: by the method of its own request"),
    bad("a 404 after a HEAD has a body", line(b"HEAD /health HTTP/1.1") + line(b"GET /nowhere HTTP/1.1")
        + with_fields(b"X : y\r\n"), 200, 404, 400, methods=(b"HEAD", b"GET", b"GET")),
    bad("a good request after a bad one", GET + with_fields(b"X : y\r\n") + GET, 200, 400),
    last("nothing is answered after close", with_fields(b"Connection: close\r\n") + GET + GET),
]

# -- paths: no decoding, no cleaning, one route or none

PATHS = [
    fine("a slash at the end", line(b"GET /health/ HTTP/1.1")),
    stored("a slash at the end before a query",
           with_fields(b"Content-Length: 5\r\n", b"POST /api/submit/?queue=QUEUE&wait=0 HTTP/1.1") + b"hello",
           "hello"),
    fine("an empty query", line(b"GET /health? HTTP/1.1")),
] + [
    unsure(f"{path.decode('ascii')} is no route", line(b"GET " + path + b" HTTP/1.1"), 404,
           codes=("not_found", "job_not_found"))
    for path in (
        b"//", b"//health", b"/health//", b"///", b"/./health", b"/health/.", b"/health/..", b"/x/../health",
        b"/../health", b"/health/../health", b"//localhost/health", b"/HEALTH", b"/Health", b"/health;a=b",
        b"/health.json", b"/healthx", b"/health/x", b"/%68ealth", b"/health%2F", b"/health%2f", b"/%2Fhealth",
        b"/health%00", b"/health%20", b"/health%0d%0a", b"/health%3Fa", b"/%2e/health", b"/%2e%2e/health",
        b"/x/%2e%2e/health", b"/x/%2E%2E/health", b"/x/..%2fhealth", b"/x%2f..%2fhealth",
        b"/%252e%252e/health",
        b"/api", b"/api/", b"/api//submit", b"/api%2Fadmin%2Fstats", b"/api/admin%2Fstats",
        b"/api/./admin/stats",
        b"/api/jobs/../admin/stats", b"/api/jobs/%2e%2e/admin/stats", b"/api/jobs/..%2fadmin%2fstats",
        b"/api/jobs/x%2fresult", b"/api/jobs//result", b"/api/jobs/x/y/result", b"/api/worker%2Fpoll",
        b"/api/worker//poll", b"/.git/config", b"/etc/passwd", b"/%c0%ae%c0%ae/etc/passwd", b"/jobqueue.py",
        b"/data/journal.jsonl", b"/..%5c..%5cjournal.jsonl",
    )
] + [
    unsure("a cut percent sequence", line(b"GET /health% HTTP/1.1"), (400, 404), source="RFC 3986 2.1"),
    unsure("a percent sequence that is none", line(b"GET /health%zz HTTP/1.1"), (400, 404),
           source="RFC 3986 2.1"),
    unsure("a backslash", line(b"GET \\health HTTP/1.1"), (400, 404), source="RFC 3986 3.3"),
    unsure("a backslash after the slash", line(b"GET /\\health HTTP/1.1"), (400, 404), source="RFC 3986 3.3"),
    unsure("clear behind %2F", line(b"DELETE /api/admin%2Fclear HTTP/1.1"), 404),
    unsure("clear behind //", line(b"DELETE //api/admin/clear HTTP/1.1"), 404),
    unsure("clear behind dots", line(b"DELETE /api/x/../admin/clear HTTP/1.1"), 404),
    unsure("clear behind %2e", line(b"DELETE /api/%61dmin/clear HTTP/1.1"), 404),
    unsure("submit behind %2F",
           with_fields(b"Content-Length: 5\r\n",
                       b"POST /api%2Fsubmit?queue=QUEUE&wait=0 HTTP/1.1") + b"hello",
           404),
    unsure("submit behind //",
           with_fields(b"Content-Length: 5\r\n", b"POST //api/submit?queue=QUEUE&wait=0 HTTP/1.1") + b"hello",
           404),
]


# -- query parameters: a 400 that names what is wrong, and nothing is stored


def asks(query):
    return b"POST /api/submit?" + query + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"


def refused(query, names, status=400):
    return unsure(f"?{query.decode('latin-1')}", asks(b"queue=QUEUE&wait=0&" + query), status,
                  codes=("invalid_parameter", "bad_http"), names=names)


PARAMETERS = [
    stored("percent-encoded values", asks(b"queue=QUEUE&priority=%35&wait=%30"), "hello",
           source="RFC 3986 2.1"),
    stored("all that there are",
           asks(b"queue=QUEUE&priority=9&delay=0&ttl=60&lease=60&attempts=2&wait=0&on_disconnect=cancel"),
           "hello"),
    unsure("an empty parameter between two", asks(b"queue=QUEUE&&wait=0"), (202, 400)),
    unsure("a percent-encoded name", asks(b"queue=QUEUE&%77ait=0"), (202, 400)),
    unsure("a queue of 65 characters", asks(b"wait=0&queue=" + b"a" * 65), 400, codes=PARAMETER,
           names="queue"),
    unsure("a queue with a space", asks(b"wait=0&queue=a+b"), 400, codes=PARAMETER, names="queue"),
    unsure("a queue with a plus", asks(b"wait=0&queue=a%2Bb"), 400, codes=PARAMETER, names="queue"),
    unsure("a queue with a slash", asks(b"wait=0&queue=a%2Fb"), 400, codes=PARAMETER, names="queue"),
    unsure("a queue with a NUL", asks(b"wait=0&queue=a%00"), 400, codes=PARAMETER, names="queue"),
    unsure("a queue with a line end", asks(b"wait=0&queue=a%0A"), 400, codes=PARAMETER, names="queue"),
    unsure("a queue that is not UTF-8", asks(b"wait=0&queue=%ff"), 400,
           codes=("invalid_parameter", "bad_http")),
    unsure("a queue in other letters", asks(b"wait=0&queue=%C3%A9"), 400, codes=PARAMETER, names="queue"),
    unsure("an empty queue", asks(b"wait=0&queue="), 400, codes=PARAMETER, names="queue"),
    unsure("a queue without =", asks(b"wait=0&queue"), 400, codes=PARAMETER, names="queue"),
    unsure("a queue twice", asks(b"wait=0&queue=QUEUE&queue=other"), 400, codes=PARAMETER, names="queue"),
    unsure("a broken percent sequence", asks(b"wait=0&queue=%zz"), 400,
           codes=("invalid_parameter", "bad_http")),
    unsure("a cut percent sequence in a value", asks(b"wait=0&queue=a%"), 400,
           codes=("invalid_parameter", "bad_http")),
    refused(b"what=5", "what"),
    refused(b"Queue=a", "Queue"),
    refused(b"=5", ""),
    refused(b"priority=", "priority"),
    refused(b"priority=10", "priority"),
    refused(b"priority=-1", "priority"),
    refused(b"priority=1.5", "priority"),
    refused(b"priority=+5", "priority"),
    refused(b"priority=1_0", "priority"),
    refused(b"priority=%D9%A3", "priority"),
    refused(b"priority=0x5", "priority"),
    refused(b"priority=high", "priority"),
    refused(b"priority=3&priority=4", "priority"),
    refused(b"priority=" + b"9" * 5000, "priority"),
    refused(b"delay=nan", "delay"),
    refused(b"delay=inf", "delay"),
    refused(b"delay=-1", "delay"),
    refused(b"delay=1e999", "delay"),
    refused(b"delay=2592001", "delay"),
    refused(b"delay=soon", "delay"),
    refused(b"ttl=nan", "ttl"),
    refused(b"ttl=-5", "ttl"),
    refused(b"lease=0", "lease"),
    refused(b"lease=43201", "lease"),
    refused(b"attempts=0", "attempts"),
    refused(b"attempts=101", "attempts"),
    refused(b"on_disconnect=explode", "on_disconnect"),
    refused(b"priority=3;attempts=2", "priority"),
    unsure("a wait over the limit or malformed on poll", line(b"GET /api/worker/poll?wait=301 HTTP/1.1"), 400,
           codes=PARAMETER, names="wait"),
    unsure("a wait that is no number", line(b"GET /api/worker/poll?wait=nan HTTP/1.1"), 400, codes=PARAMETER,
           names="wait"),
    unsure("an unknown parameter on poll", line(b"GET /api/worker/poll?what=5 HTTP/1.1"), 400,
           codes=PARAMETER, names="what"),
    unsure("a bad max on poll", line(b"GET /api/worker/poll?max=0 HTTP/1.1"), 400, codes=PARAMETER,
           names="max"),
    unsure("a bad limit on the list", line(b"GET /api/jobs?limit=x HTTP/1.1"), 400, codes=PARAMETER,
           names="limit"),
    unsure("a bad state on the list", line(b"GET /api/jobs?status=lost HTTP/1.1"), 400, codes=PARAMETER,
           names="status"),
    unsure("a bad cursor on the list", line(b"GET /api/jobs?after=%00%ff HTTP/1.1"), 400,
           codes=("invalid_parameter", "bad_http")),
]

# -- browsers of other sites, and what a header must not do

SITES = [
    unsure("a cross-site submit", submit(b"Sec-Fetch-Site: cross-site\r\nContent-Length: 5\r\n", b"hello"),
           403, codes=SITE),
    unsure("a submit from another origin",
           submit(b"Origin: http://evil.example\r\nContent-Length: 5\r\n", b"hello"), 403, codes=SITE),
    unsure("a submit from a null origin", submit(b"Origin: null\r\nContent-Length: 5\r\n", b"hello"), 403,
           codes=SITE),
    unsure("a cross-site poll, a GET that changes state",
           with_fields(b"Sec-Fetch-Site: cross-site\r\n", b"GET /api/worker/poll?queue=none HTTP/1.1"), 403,
           codes=SITE),
    unsure("a cross-site clear",
           with_fields(b"Sec-Fetch-Site: cross-site\r\n", b"DELETE /api/admin/clear HTTP/1.1"), 403,
           codes=SITE),
    unsure("a cross-site submit with a request as a body",
           submit(b"Origin: http://evil.example\r\nContent-Length: " + SMUGGLED_SIZE + b"\r\n", SMUGGLED),
           403, codes=SITE),
    stored("a submit of this origin",
           submit(b"Sec-Fetch-Site: same-origin\r\nOrigin: http://localhost\r\nContent-Length: 5\r\n",
                  b"hello"),
           "hello"),
    stored("a cookie opens nothing and harms nothing",
           submit(b"Cookie: a=b\r\nContent-Length: 5\r\n", b"hello"), "hello"),
]

# -- known path, wrong method: 405 and Allow (RFC 9110 15.5.6)

ALLOWED = {  # path: the methods it has
    b"/health": "GET, HEAD", b"/ready": "GET, HEAD", b"/metrics": "GET, HEAD", b"/openapi.json": "GET, HEAD",
    b"/": "GET, HEAD", b"/api/submit": "POST", b"/api/jobs": "GET, HEAD, POST",
    b"/api/jobs/none": "GET, HEAD, DELETE", b"/api/jobs/none/result": "GET, HEAD", b"/api/worker/poll": "GET",
    b"/api/worker/complete": "POST", b"/api/worker/complete/none": "POST", b"/api/worker/fail/none": "POST",
    b"/api/worker/release/none": "POST", b"/api/worker/extend/none": "POST", b"/api/admin/stats": "GET, HEAD",
    b"/api/admin/clear": "DELETE", b"/api/admin/next": "GET, HEAD", b"/api/admin/pause": "POST",
    b"/api/admin/resume": "POST", b"/api/admin/requeue": "POST", b"/api/admin/requeue/none": "POST",
    b"/api/admin/workers": "GET, HEAD",
}
WRONG_METHODS = [
    unsure(f"PUT {path.decode('ascii')}", line(b"PUT " + path + b" HTTP/1.1"), 405,
           codes=("method_not_allowed",))
    for path in ALLOWED
] + [
    unsure("HEAD of a submit", line(b"HEAD /api/submit HTTP/1.1"), 405, methods=(b"HEAD",)),
    unsure("HEAD of a poll", line(b"HEAD /api/worker/poll HTTP/1.1"), 405, methods=(b"HEAD",)),
    unsure("HEAD of a clear", line(b"HEAD /api/admin/clear HTTP/1.1"), 405, methods=(b"HEAD",)),
    unsure("GET of a clear", line(b"GET /api/admin/clear HTTP/1.1"), 405),
    unsure("POST of a clear", line(b"POST /api/admin/clear HTTP/1.1"), 405),
    unsure("GET of a submit", line(b"GET /api/submit HTTP/1.1"), 405),
    unsure("GET of a complete", line(b"GET /api/worker/complete/none HTTP/1.1"), 405),
    unsure("X-HTTP-Method-Override does nothing",
           with_fields(b"X-HTTP-Method-Override: DELETE\r\nX-HTTP-Method: DELETE\r\n",
                       b"GET /api/admin/clear HTTP/1.1"),
           405),
]

GROUPS = {
    "method": METHODS, "version": VERSIONS, "space": SPACES, "target": TARGETS, "field": FIELDS,
    "host": HOSTS,
    "connection": CONNECTIONS, "length": LENGTHS, "encoding": ENCODINGS, "chunk": CHUNKS, "trailer": TRAILERS,
    "body": BODIES, "pipeline": PIPELINES, "path": PATHS, "parameter": PARAMETERS, "site": SITES,
    "wrong method": WRONG_METHODS,
}
CASES = [(f"{group}: {case.name}", case) for group, cases in GROUPS.items() for case in cases]
