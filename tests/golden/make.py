#!/usr/bin/env python3
"""Makes the golden journal of a format, through a real run: every kind of record, and a job in every state.

    python tests/golden/make.py tests/golden/journal-2

crashed.jsonl is the journal of a first run, as a crash would have left it. journal.jsonl is what became of it: it was
compacted, did crash, and a second run came to a clean stop. A journal that was released is never made again: each later
release must read it as it is. What it must find there stands in tests/test_journal.py.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

from local_engine import crash_copy, journal_of, open_engine  # noqa: E402

import jobqueue  # noqa: E402
from engine_contract import Queue, batch, submission  # noqa: E402
from support import FakeClock, wait_until  # noqa: E402

HEADERS = '{"Content-Type":"text/x-golden","X-Trace-Id":"é"}'


def no_chance() -> None:
    """Ids and tokens that are the same in every run."""
    numbers = random.Random(1)
    os.urandom = numbers.randbytes
    secrets.token_hex = lambda size: numbers.randbytes(size).hex()
    random.seed(1)


def put(to: Queue, payload: bytes, headers: str = HEADERS, **options: object) -> jobqueue.Job:
    fields = {**to.fields(**options), "payload": payload, "kind": jobqueue.kind_of(payload), "headers": headers}
    return to.engine.submit(*submission(fields), 0).result(10)[0]


def take(queue: Queue, payload: bytes, **claim: object) -> jobqueue.Job:
    """Hand out the job that was put last; nothing else is in the line."""
    job = queue.take(worker="golden worker", **claim)
    assert job.payload == payload
    return job


def complete(queue: Queue, job: jobqueue.Job, result: bytes, content_type: str | None = None) -> None:
    kind = jobqueue.kind_of(result)
    queue.engine.complete(job.id, job.token, result, kind, content_type, None).result(10)


def before_the_crash(queue: Queue) -> None:
    """What the second run reads back: forgotten jobs, and one of each lasting state."""
    put(queue, b'"forgotten"', headers=json.dumps({"X-Long": "x" * 10_000}))
    queue.engine.clear().result(10)
    put(queue, b'"delayed"', delay=86_400.0)
    put(queue, b'"completed"')
    complete(queue, take(queue, b'"completed"'), b'{"r": 1.0}', "application/vnd.golden+json")
    put(queue, "café \u2028 text".encode())
    complete(queue, take(queue, "café \u2028 text".encode()), b"plain \x01 text")
    put(queue, b'"failed"', attempts=1)
    queue.fail(take(queue, b'"failed"'), "no more \u2028 attempts")
    put(queue, b'"processing"', attempts=5)
    take(queue, b'"processing"', lease=4_000)
    queue.pause("paused")
    queue.pause("resumed")
    put(queue, b'"held"', queue="paused")


def after_the_crash(queue: Queue) -> None:
    """Every verb, on jobs that end where the test expects them."""
    queue.resume("resumed")
    put(queue, b"\x00\xff binary")
    complete(queue, take(queue, b"\x00\xff binary"), b"\xfe\x00")
    put(queue, b'"extended"')
    queue.extend(take(queue, b'"extended"'), 7_200)
    put(queue, b'"gave up"')
    queue.fail(take(queue, b'"gave up"'), "no use", retry=False)
    put(queue, b'"retried"')
    queue.fail(take(queue, b'"retried"'), "later", delay=43_200.0)
    put(queue, b'"cancelled"')
    queue.cancel(queue.jobs()[0])
    put(queue, b'"lost"', attempts=1)
    take(queue, b'"lost"', lease=60)

    # Those that go back into line, each behind a pause until the next is out.
    put(queue, b'"retried at once"')
    retried = take(queue, b'"retried at once"')
    put(queue, b'"released"')
    released = take(queue, b'"released"')
    put(queue, b'"given back"')
    given = take(queue, b'"given back"')
    put(queue, b'"lapsed"')
    take(queue, b'"lapsed"', lease=60)
    put(queue, b'"requeued"', ttl=90_000.0)
    requeued = take(queue, b'"requeued"')
    queue.fail(requeued, "not yet", retry=False)
    queue.pause()
    queue.fail(retried, "now", delay=0)
    queue.release(released)
    queue.engine.give_back([given])
    queue.requeue(requeued)
    put(queue, b'"expired"', ttl=30.0)
    put(queue, b'"ripe"', delay=30.0)
    queue.advance(60)
    queue.resume()
    queue.pause("paused")
    put(queue, b'"pending"', priority=9, key="a key")
    jobs = [
        {**queue.fields(queue="batch", priority=5), "payload": payload, "headers": HEADERS}
        for payload in (b'"batch 1"', b'"batch 2"')
    ]
    queue.engine.submit_many(*batch(jobs)).result(10)


def main(target: Path) -> None:
    no_chance()
    clock = FakeClock(wall=1_700_000_000.0)
    with tempfile.TemporaryDirectory() as root:
        first = open_engine(Path(root) / "first", clock)
        before_the_crash(Queue(first, clock, again=None))
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(journal_of(first), target / "crashed.jsonl")
        # Started again with a limit that it has passed, it compacts its journal.
        first.close()
        first = open_engine(Path(root) / "first", clock, compact_bytes=1)
        wait_until(lambda: first.figures()["compactions_total"] == 1)
        second = open_engine(crash_copy(first, Path(root) / "second"), clock)
        first.close()
        queue = Queue(second, clock, again=None)
        after_the_crash(queue)
        # The watermark is written when nothing else has been for a while.
        while True:
            wait_until(lambda: clock.sleepers() >= 2)
            clock.advance(1)
            if b'"op":"synced"' in journal_of(second).read_bytes():
                break
        second.close()
        shutil.copyfile(journal_of(second), target / "journal.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
