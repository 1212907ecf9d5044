"""The pure rules: which verb leads where, who may settle a job, how long a retry waits, how a payload travels."""

from __future__ import annotations

import base64
import json
import string
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

import jobqueue
from jobqueue import JobQueueError, as_json, check_lease, kind_of, moved, retry_delay

STATES = ("delayed", "pending", "processing", "completed", "failed", "expired", "cancelled")
FINAL = ("completed", "failed", "expired", "cancelled")
VERBS = (
    "ripen", "lease", "extend", "complete", "fail", "retry", "retry_now", "release", "give_back", "lapse",
    "expire", "cancel", "requeue",
)  # fmt: skip

# Where each verb leads from each state; what is not here must raise. Written out by hand, not taken from the code.
ALLOWED = {
    "delayed": {"ripen": "pending", "expire": "expired", "cancel": "cancelled", "requeue": "pending"},
    "pending": {
        "lease": "processing",
        "expire": "expired",
        "cancel": "cancelled",
        # A worker whose lease ran out, while nobody else has the job:
        "complete": "completed",
        "fail": "failed",
        "retry": "delayed",
        "retry_now": "pending",
        "release": "pending",
        "extend": "processing",
    },
    "processing": {
        "complete": "completed",
        "fail": "failed",
        "retry": "delayed",
        "retry_now": "pending",
        "release": "pending",
        "give_back": "pending",
        "lapse": "pending",
        "extend": "processing",
        "cancel": "cancelled",
    },
    "completed": {},
    "failed": {"requeue": "pending"},
    "expired": {"requeue": "pending"},
    "cancelled": {"requeue": "pending"},
}


def a_job(**fields) -> jobqueue.Job:
    plain = {
        "number": 7, "id": "a-job", "queue": "default", "priority": 0, "created": 1_700_000_000_000_000,
        "payload": b'{"x": 1}', "kind": "json", "headers": "{}", "attempts": 3,
    }  # fmt: skip
    return jobqueue.Job(**(plain | fields))


# -- the table


def test_the_states_and_the_final_ones_are_those_of_the_contract():
    assert jobqueue.STATES == STATES
    assert sorted(jobqueue.FINAL) == sorted(FINAL)


def test_the_table_has_no_state_or_verb_that_is_not_tested_here():
    assert {state for state, _ in jobqueue.TRANSITIONS} <= set(STATES)
    assert {verb for _, verb in jobqueue.TRANSITIONS} <= set(VERBS)
    assert set(jobqueue.TRANSITIONS.values()) <= set(STATES)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", STATES)
def test_a_verb_leads_where_the_table_says_or_raises_and_changes_nothing(state, verb):
    job = a_job(state=state)
    expected = ALLOWED[state].get(verb)
    if expected is not None:
        new = moved(job, verb, error="said so")
        assert new == job._replace(state=expected, error="said so")
        assert job.state == state
        return
    with pytest.raises(JobQueueError) as refused:
        moved(job, verb, error="said so")
    assert refused.value.job_id == job.id
    assert state in refused.value.detail
    assert verb in refused.value.detail
    assert refused.value.status == 409
    assert (refused.value.code == "job_finished") == (state in FINAL)
    assert job == a_job(state=state)


@pytest.mark.parametrize("state", ["pending", "processing"])
def test_requeueing_a_job_that_has_not_ended_says_just_that(state):
    with pytest.raises(JobQueueError) as refused:
        moved(a_job(state=state), "requeue")
    assert refused.value.code == "job_not_finished"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_is_unknown_raises_in_every_state(verb):
    for state in STATES:
        with pytest.raises(JobQueueError):
            moved(a_job(state=state), verb + "x")


# -- who may settle

# Each state with each way in which its latest lease ended (None: in force), and the answer to a caller who brings
# that lease's token, another token, none:
#   yes       may settle it            lost      409 lease_lost
#   again     did so before, where the verb is the one it ended by; otherwise the word behind the slash
#   finished  409 job_finished         unleased  409 job_not_leased
# "-" stands where the engine never comes: there any refusal will do, but no "yes" that the table would not take.
SETTLES = """
    delayed     -          -               lost      unleased
    delayed     lapse      -               lost      unleased
    delayed     complete   -               lost      unleased
    delayed     fail       again/lost      lost      unleased
    delayed     release    -               lost      unleased
    delayed     give_back  -               lost      unleased
    delayed     requeue    lost            lost      unleased
    pending     -          -               lost      unleased
    pending     lapse      yes             lost      yes
    pending     complete   -               lost      unleased
    pending     fail       again/lost      lost      unleased
    pending     release    again/lost      lost      unleased
    pending     give_back  lost            lost      unleased
    pending     requeue    lost            lost      unleased
    processing  -          yes             lost      yes
    processing  lapse      -               lost      yes
    processing  complete   -               lost      yes
    processing  fail       -               lost      yes
    processing  release    -               lost      yes
    processing  give_back  -               lost      yes
    processing  requeue    -               lost      yes
    completed   -          -               finished  finished
    completed   lapse      -               finished  finished
    completed   complete   again/finished  finished  finished
    completed   fail       -               finished  finished
    completed   release    -               finished  finished
    completed   give_back  -               finished  finished
    completed   requeue    -               finished  finished
    failed      -          -               finished  finished
    failed      lapse      finished        finished  finished
    failed      complete   -               finished  finished
    failed      fail       again/finished  finished  finished
    failed      release    -               finished  finished
    failed      give_back  -               finished  finished
    failed      requeue    -               finished  finished
    expired     -          -               finished  finished
    expired     lapse      finished        finished  finished
    expired     complete   -               finished  finished
    expired     fail       again/finished  finished  finished
    expired     release    again/finished  finished  finished
    expired     give_back  finished        finished  finished
    expired     requeue    finished        finished  finished
    cancelled   -          finished        finished  finished
    cancelled   lapse      finished        finished  finished
    cancelled   complete   -               finished  finished
    cancelled   fail       again/finished  finished  finished
    cancelled   release    again/finished  finished  finished
    cancelled   give_back  finished        finished  finished
    cancelled   requeue    finished        finished  finished
"""
CODES = {"lost": "lease_lost", "finished": "job_finished", "unleased": "job_not_leased"}
ROWS = [line.split() for line in SETTLES.strip().splitlines()]
SETTLED_BY = ("-", "lapse", "complete", "fail", "release", "give_back", "requeue")


def answer_of(job: jobqueue.Job, token: str | None, verb: str) -> str:
    try:
        return "yes" if check_lease(job, token, verb) else "again"
    except JobQueueError as refused:
        assert refused.job_id == job.id
        return next(word for word, code in CODES.items() if code == refused.code)


def test_the_table_of_settling_is_complete():
    assert [(state, settled) for state, settled, *_ in ROWS] == [
        (state, settled) for state in STATES for settled in SETTLED_BY
    ]


@pytest.mark.parametrize("verb", ["complete", "fail", "release", "extend"])
@pytest.mark.parametrize(("state", "settled", "own", "other", "none"), ROWS)
def test_only_the_holder_of_the_lease_settles_a_job(state, settled, own, other, none, verb):
    job = a_job(state=state, token="own", settled=None if settled == "-" else settled)
    if own != "-":
        first, _, otherwise = own.partition("/")
        expected = otherwise if first == "again" and verb != settled else first
        assert answer_of(job, "own", verb) == expected
    assert answer_of(job, "other", verb) == other
    assert answer_of(job, "", verb) == other
    assert answer_of(job, None, verb) == none


@pytest.mark.parametrize("verb", ["complete", "fail", "release", "extend"])
@pytest.mark.parametrize("state", ["delayed", "pending", "expired", "cancelled"])
def test_a_job_that_was_never_handed_out_cannot_be_settled(state, verb):
    expected = "job_finished" if state in FINAL else "job_not_leased"
    with pytest.raises(JobQueueError) as refused:
        check_lease(a_job(state=state), None, verb)
    assert refused.value.code == expected
    with pytest.raises(JobQueueError) as refused:
        check_lease(a_job(state=state), "guessed", verb)
    assert refused.value.code == ("job_finished" if state in FINAL else "lease_lost")


# -- retries


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 64), (8, 128), (9, 256), (10, 300), (11, 300), (100, 300)],
)
def test_a_retry_waits_twice_as_long_each_time_up_to_300_seconds_give_or_take_a_fifth(failures, seconds):
    delays = [retry_delay(failures) for _ in range(500)]
    assert seconds * 0.8 <= min(delays) < seconds * 0.9
    assert seconds * 1.1 < max(delays) <= seconds * 1.2


# -- what holds where nothing else was said

KIB, MIB, HOUR, DAY = 1024, 1024**2, 3600, 24 * 3600

# What users were promised: written out by hand, since whoever has not set a figure relies on it.
DEFAULTS = {
    "host": "127.0.0.1", "port": 3000, "grpc_port": 50051, "data_dir": "data",
    "tokens": None, "tls_cert": None, "tls_key": None, "tls_client_ca": None, "allow_host": (), "insecure": False,
    "lease": 300, "attempts": 3, "drain": 30,
    "fsync": "always", "fsync_interval": 0.05, "reserve": 1 * MIB,
    "keep_completed": 1 * HOUR, "keep_failed": 7 * DAY, "keep_jobs": 10_000, "keep_bytes": 256 * MIB,
    # 4 MiB less 64 KiB: with its headers it fits what a gRPC client takes.
    "max_payload": 4_128_768, "max_batch": 16 * MIB, "max_request_line": 8 * KIB, "max_headers": 32 * KIB,
    "max_connections": 4096, "max_held": 3072, "max_jobs": 2_000_000, "max_bytes": 1024 * MIB,
    "header_timeout": 10, "body_timeout": 10, "idle_timeout": 120,
    "access_log": False, "log_format": "text", "log_level": "info",
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_not_set_is_what_was_promised(name):
    (setting,) = [setting for setting in jobqueue.SETTINGS if setting.name == name]
    assert setting.default == DEFAULTS[name]
    assert type(setting.default) is type(DEFAULTS[name])  # False is 0, else
    assert getattr(jobqueue.Settings(), name) == DEFAULTS[name]


# -- payloads

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
# A surrogate can be written escaped alone.
json_texts = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    json_values,
    st.just(True),
    st.sampled_from([None, 0, 3]),
) | st.builds(
    lambda value: json.dumps(value, ensure_ascii=False).encode(errors="replace").decode(),
    json_values,
)
any_text = st.text().map(lambda text: text.encode(errors="replace"))
anything = st.binary(max_size=60) | any_text | json_texts.map(str.encode)


@pytest.mark.parametrize(
    "data",
    [
        b"0", b"-0", b"1.0", b"1E400", b"12345678901234567890123", b"true", b"null", b'""', b'"\\ud800"', b"[]",
        b" {\n\t}\r ", b'{"a":1,"a":2}', '"ä€😀\u2028"'.encode(), b'"\x7f"', b"1" * 10_000, b"[" * 500 + b"]" * 500,
    ],
)  # fmt: skip
def test_strict_json_is_json(data):
    assert kind_of(data) == "json"
    assert as_json("json", data) == data.decode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"NaN", b"[NaN]", b"Infinity", b"-Infinity", b'{"x":-Infinity}', b"01", b"+1", b"1.", b".5", b"0x1",
        b"'a'", b"{a:1}", b'{"a":1,}', b"[1,]", b"[1 2]", b"True", b'"\n"', b'"\x00"', b'"a', b"1 1", b"\xef\xbb\xbf{}",
        "\u00a01".encode(), b"// no\n1", b"hello", "١".encode(), b"1_000",
    ],
)  # fmt: skip
def test_other_utf_8_is_text(data):
    assert kind_of(data) == "text"
    assert json.loads(as_json("text", data)) == data.decode()


@pytest.mark.parametrize(
    "data",
    [b"\xff", b'{"x":"\xe4"}', b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80", bytes(range(256))],
)
def test_what_is_not_utf_8_is_binary(data):
    assert kind_of(data) == "binary"
    assert base64.b64decode(json.loads(as_json("binary", data)), validate=True) == data


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_json_nested_deeply_is_json_and_travels_verbatim(depth):
    data = b"[" * depth + b"]" * depth
    assert kind_of(data) == "json"
    assert as_json("json", data) == data.decode()
    for broken in (data[:-1], data + b"]", data[:-1] + b"}", data + b",1"):
        assert kind_of(broken) == "text"


@pytest.mark.parametrize("depth", [10, 1_000, 20_000])
@pytest.mark.parametrize("before, behind", [(b" ", b""), (b"", b"\n"), (b"\r\n\t ", b" \r\n")])
def test_json_nested_deeply_is_json_with_white_space_around_it_too(depth, before, behind):
    data = before + b"[" * depth + b"]" * depth + behind
    assert kind_of(data) == "json"
    assert as_json("json", data) == data.decode()
    for broken in (before + data[len(before) + 1 :], data + b"]", data + b",1", b"\x0b" + data, b"1" + data):
        assert kind_of(broken) == "text"


# What may be put into a JSON text, or cut out of it, to break it or not.
PIECES = (
    "[", "]", "{", "}", ",", ":", '"', '"a"', '"a":', '"[":', '{"a":', "[[],", "0", "01", "-", "-0", "1.5E+3",
    ".5", "1.", "1e", "true", "null", "nul", "\\", '\\"', "\\u12aF", "\\u12", "\\x", " ", "\n", "\t", "\x00", "\x01",
    "\x02", "\x0b", "\x7f", "\u00a0", "ä", "k", "(", ";", "NaN",
)  # fmt: skip


@st.composite
def nearly_json(draw) -> str:
    text = draw(json_texts)
    for at, cut, piece in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2), st.sampled_from(PIECES)))):
        at %= len(text) + 1
        text = text[:at] + piece + text[at + cut :]
    return text


def nested(text: str, depth: int, array: bool) -> bytes:
    opening, closing = ("[", "]") if array else ('{"a":', "}")
    return (opening * depth + text + closing * depth).encode(errors="replace")


@given(json_texts | nearly_json(), st.booleans())
@example('"\\\\"', True)
@example('"\\\\\\""', False)
@example('1,"a":2', False)
@example('1,"a":2', True)
@example("1,2", False)
@example('"a\t", "b"', True)
def test_what_json_is_does_not_depend_on_how_deep_it_is_nested(text, array):
    """Deeper than Python's own parser follows, another one says: it must say the same."""
    shallow, deep = nested(text, 200, array), nested(text, 3000, array)
    assert kind_of(deep) == kind_of(shallow)
    body = b'{"results": [{"job_id": "a", "payload": %b, "lease_token": "]"}]}'
    if kind_of(shallow) == "json":
        assert jobqueue.batch_members(body % deep)[0]["payload"].encode() == deep
    else:
        with pytest.raises(JobQueueError):
            jobqueue.batch_members(body % shallow)
        with pytest.raises(JobQueueError):
            jobqueue.batch_members(body % deep)


SIZE = 200_000
DEEP = {
    "lists": "[" * SIZE + "]" * SIZE,
    "objects": '{"a":' * SIZE + "1" + "}" * SIZE,
    "both": '[{"a":' * SIZE + "1" + "}]" * SIZE,
    "values on the way": "[0," * SIZE + "1" + "]" * SIZE,
    "siblings": "[" * 2000 + "[]," * SIZE + "1" + "]" * 2000,
    "numbers": "[" * 2000 + "0," * SIZE + "1" + "]" * 2000,
    "strings": "[" * 2000 + '"[",' * SIZE + "1" + "]" * 2000,
    "escapes": "[" * 2000 + '"' + '\\"\\u0000\\n' * SIZE + '"' + "]" * 2000,
}


@pytest.mark.parametrize("shape", DEEP)
def test_deep_json_is_not_gone_through_in_python(shape):
    """So that a body of megabytes does not stop everybody else: fewer lines are run than it has thousands of bytes."""
    data, lines = DEEP[shape].encode(), [0]

    def trace(frame, event, argument):
        lines[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        kind = kind_of(data)
    finally:
        sys.settrace(before)
    assert kind == "json"
    assert lines[0] < len(data) / 1000


@given(json_values)
@example(1e308)
@example("\ud800")
def test_whatever_a_json_library_prints_is_json_and_travels_verbatim(value):
    data = json.dumps(value).encode()
    assert kind_of(data) == "json"
    assert as_json("json", data).encode() == data


@given(anything)
def test_every_payload_comes_out_as_it_went_in(data):
    kind = kind_of(data)
    text = as_json(kind, data)
    value = json.loads(text)
    if kind == "json":
        assert text.encode() == data
    elif kind == "text":
        assert value.encode() == data
    else:
        assert base64.b64decode(value, validate=True) == data


# -- records

words = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=12)
moments = st.integers(0, 4_102_444_800_000_000)
spans = st.integers(0, 2_592_000) | st.floats(0, 2_592_000)


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


utf8 = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
bodies = anything.map(lambda data: (data, kind_of(data)))


@st.composite
def jobs(draw) -> jobqueue.Job:
    payload, kind = draw(bodies)
    result, result_kind = draw(maybe(bodies)) or (None, None)
    return jobqueue.Job(
        number=draw(st.integers(1, 1 << 40)), id=draw(words), queue=draw(words), priority=draw(st.integers(0, 9)),
        created=draw(moments), payload=payload, kind=kind,
        headers=json.dumps(draw(st.dictionaries(words, utf8, max_size=3)), ensure_ascii=False),
        attempts=draw(st.integers(1, 100)), lease=draw(maybe(spans)), ttl=draw(maybe(spans)), key=draw(maybe(utf8)),
        state=draw(st.sampled_from(STATES)), delay=draw(spans), available=draw(maybe(moments)),
        expires=draw(maybe(moments)), failures=draw(st.integers(0, 100)), deliveries=draw(st.integers(0, 1000)),
        token=draw(maybe(words)), lease_seconds=draw(maybe(spans)),
        settled=draw(maybe(st.sampled_from(SETTLED_BY[1:]))), worker=draw(maybe(utf8)),
        started=draw(maybe(moments)), finished=draw(maybe(moments)), result=result, result_kind=result_kind,
        content_type=draw(maybe(utf8)),
        error=draw(maybe(utf8)), seq=draw(st.integers(0, 1 << 40)),
    )  # fmt: skip


@given(jobs(), maybe(words), spans, utf8, moments, bodies, maybe(utf8))
def test_the_ways_of_every_job_are_those_of_the_table(job, token, seconds, worker, moment, body, content_type):
    """Spelled out in the code, as values and as records; both must be what the general way makes."""
    job = job._replace(state="pending")
    leased = job.leased("token", seconds, worker, moment, 8)
    lease = {
        "token": "token", "lease_seconds": seconds, "settled": None, "worker": worker, "started": moment,
        "deliveries": job.deliveries + 1,
    }  # fmt: skip
    assert leased == moved(job, "lease", **lease, seq=8)
    record = json.loads(jobqueue.lease_record(job, "token", seconds, worker, moment))
    assert record == {"op": "lease", "id": job.id, **lease}
    end = {"settled": "complete", "finished": moment, "result": body[0], "result_kind": body[1]}
    ended = leased.completed(token, moment, *body, content_type, 9)
    assert ended == moved(leased, "complete", **end, token=token, content_type=content_type, seq=9)
    record = json.loads(jobqueue.complete_record(leased, token, moment, *body, content_type))
    assert moved(leased, record.pop("op"), **jobqueue.unpack({**record, "id": job.id})) == ended._replace(
        seq=8, token=None if token is None else "token",
        content_type=job.content_type if content_type is None else content_type,
    )  # fmt: skip
    assert job.recorded(5) == job._replace(seq=5)


@given(jobs())
def test_a_new_job_comes_back_from_its_record_as_it_was(job):
    kept = {name: value for name, value in job._asdict().items() if name in jobqueue.Terms._fields}
    plain = job._replace(**{name: jobqueue.Job._field_defaults[name] for name in jobqueue.Job._fields[12:]})
    new = plain._replace(delay=job.delay, expires=job.expires)
    if job.delay:
        new = new._replace(state="delayed", available=job.created)
    record = json.loads(jobqueue.submit_text(new, jobqueue.Terms(**kept)))
    assert jobqueue.Job(**jobqueue.unpack(record)) == new


@given(jobs())
def test_a_job_comes_back_from_its_record_as_it_was(job):
    line = jobqueue.journal_line(5, 3, '{"op":"job",' + jobqueue.job_text(job)[1:])
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    record = json.loads(line)
    for name in ("crc", "seq", "synced", "op"):
        del record[name]
    assert jobqueue.Job(**jobqueue.unpack(record)) == job._replace(seq=0)
