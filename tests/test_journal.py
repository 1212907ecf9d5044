"""The journal: what its bytes mean, torn or damaged, and what stays true while it is written, compacted and refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_engine import (
    compacting,
    crash_copy,
    journal_of,
    judge,
    lines_of,
    local_queues,
    open_engine,
    read_line,
    records_of,
    wait_for_compaction,
)

import jobqueue
from engine_contract import LEASE, PATIENCE, STATES, Queue, batch, come_back, durable, refused, submission
from jobqueue import Claim, DataError, Job, JobQueueError, JournalReader
from support import LONG, FakeClock, ServerProcess, wait_until
from wires import Client, WorkerOverHttp, ok

CASES = 200_000 if LONG else 20_000
MEMORY = Path("/dev/shm")


@pytest.fixture
def make_queue(tmp_path, clock):
    with local_queues(tmp_path, clock) as make:
        yield make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for files that are written ten thousand times: in memory where there is such a place."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path_factory.mktemp("journals")
        return
    path = MEMORY / f"jobqueue-journals-{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


# -- journals from real runs


def work(queue: Queue, rounds: int) -> None:
    """A bit of everything, the answers waited for, so that what is synced rises from line to line."""
    for number in range(rounds):
        queue.submit(number, key=str(number))
        queue.engine.submit(*submission({**queue.fields(), "payload": bytes([number, 255, 10]), "kind": "binary"}), 0)
        job = queue.take()
        if number % 3 == 0:
            queue.extend(job)
            queue.release(job)
            job = queue.take()
        elif number % 3 == 1:
            queue.fail(job, "line\nbreak \u2028", delay=0)
            job = queue.take()
        queue.complete(job, '"' + "r" * number + '"')


def busy(root: Path, clock: FakeClock, **settings: Any) -> bytes:
    queue = Queue(open_engine(root, clock, **settings), clock, again=None)
    work(queue, 4)
    queue.submit_many(3, ttl=5)
    queue.advance(5)
    data = journal_of(queue.engine).read_bytes()
    queue.engine.close()
    return data


def closed(root: Path, clock: FakeClock) -> bytes:
    engine = open_engine(root, clock)
    work(Queue(engine, clock, again=None), 3)
    engine.close()
    return journal_of(engine).read_bytes()


def idle(root: Path, clock: FakeClock) -> bytes:
    """The watermark itself is written when nothing else is."""
    engine = open_engine(root, clock)
    queue = Queue(engine, clock, again=None)
    work(queue, 2)
    wait_until(lambda: clock.sleepers() == 2)
    clock.advance(1)
    wait_until(lambda: b'"op":"synced"' in journal_of(engine).read_bytes())
    queue.submit()
    queue.take()
    data = journal_of(engine).read_bytes()
    engine.close()
    return data


def restarted(root: Path, clock: FakeClock) -> bytes:
    engine = open_engine(root, clock)
    queue = Queue(engine, clock, again=None)
    work(queue, 2)
    queue.engine = open_engine(crash_copy(engine, root.with_name(root.name + "-crashed")), clock)
    engine.close()
    work(queue, 2)
    data = journal_of(queue.engine).read_bytes()
    queue.engine.close()
    return data


def compacted(root: Path, clock: FakeClock) -> bytes:
    engine = open_engine(root, clock, compact_bytes=3_000, keep_jobs=3)
    queue = Queue(engine, clock, again=None)
    while engine.figures()["compactions_total"] < 2:
        work(queue, 1)
        wait_for_compaction()
    work(queue, 1)
    data = journal_of(engine).read_bytes()
    engine.close()
    return data


def young(root: Path, clock: FakeClock) -> bytes:
    engine = open_engine(root, clock)
    data = journal_of(engine).read_bytes()
    engine.close()
    return data


MAKERS = {
    "busy": busy,
    "unsynced": lambda root, clock: busy(root, clock, fsync="never"),
    "closed": closed,
    "idle": idle,
    "restarted": restarted,
    "compacted": compacted,
    "young": young,
}


@pytest.fixture(scope="module")
def journals(tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("runs")
    made = {name: make(root / name, FakeClock()) for name, make in MAKERS.items()}
    for data in made.values():
        assert judge(data) == ("whole", len(data))
    return made


# -- faults


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flipped(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def a_line_changed(change: Callable[[list[bytes], int, random.Random], Any]) -> Callable[[bytes, random.Random], bytes]:
    def fault(data: bytes, chance: random.Random) -> bytes:
        lines = lines_of(data)
        if lines:
            change(lines, chance.randrange(len(lines)), chance)
        return b"".join(lines)

    return fault


def swap(lines: list[bytes], at: int, chance: random.Random) -> None:
    other = chance.choice([max(0, at - 1), chance.randrange(len(lines))])
    lines[at], lines[other] = lines[other], lines[at]


def replace(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    return a_line_changed(lambda lines, at, chance: lines.__setitem__(at, change(lines[at], chance)))


def zero_page(data: bytes, chance: random.Random) -> bytes:
    """A page that the disk did not take; small ones, as the journals here are small."""
    size = chance.choice([64, 256, 512])
    start = chance.randrange(len(data)) // size * size
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def zero_tail(data: bytes, chance: random.Random) -> bytes:
    cut = truncated(data, chance)
    return cut + bytes(chance.choice([len(data) - len(cut), 1, 4096]))


def garbage(data: bytes, chance: random.Random) -> bytes:
    lines = lines_of(data)
    return data + chance.choice(
        [
            chance.randbytes(chance.randrange(1, 200)),
            b"\n",
            b"{}\n",
            b"null\n",
            b'{"crc":"00000000","seq":1,"synced":0,"op":"submit"}\n',
            chance.choice(lines),
            chance.choice(lines)[: chance.randrange(1, 40)],
            b"\r\n",
            data,
        ]
    )


def case_of_a_digit(line: bytes, chance: random.Random) -> bytes:
    return line[:8] + line[8:16].upper() + line[16:]


def a_byte_more(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + b"x" + data[at:]


def a_byte_less(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + data[at + 1 :]


FAULTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncated,
    "a bit flipped": flipped,
    "a bit flipped once more": flipped,
    "a line dropped": a_line_changed(lambda lines, at, chance: lines.pop(at)),
    "lines dropped": a_line_changed(lambda lines, at, chance: lines.__delitem__(slice(at, at + chance.randint(1, 5)))),
    "a line doubled": a_line_changed(lambda lines, at, chance: lines.insert(at, lines[at])),
    "a line elsewhere": a_line_changed(lambda lines, at, chance: lines.insert(chance.randrange(len(lines)), lines[at])),
    "lines swapped": a_line_changed(swap),
    "a line zeroed": replace(lambda line, chance: bytes(len(line))),
    "a line zeroed up to its end": replace(lambda line, chance: bytes(len(line) - 1) + b"\n"),
    "the newline lost": replace(lambda line, chance: line.rstrip(b"\n")),
    "a newline in the middle": replace(lambda line, chance: line[: len(line) // 2] + b"\n" + line[len(line) // 2 :]),
    "a newline for Windows": replace(lambda line, chance: line[:-1] + b"\r\n"),
    "a space more": replace(lambda line, chance: line[:-1] + b" \n"),
    "the checksum in capitals": replace(case_of_a_digit),
    "the checksum with a blank": replace(lambda line, chance: line[:8] + b" " + line[9:]),
    "a byte more": a_byte_more,
    "a byte less": a_byte_less,
    "a page zeroed": zero_page,
    "a tail of zeros": zero_tail,
    "garbage at the end": garbage,
}  # fmt: skip


def cases(journals: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Every truncation of every journal, then faults by chance: one, two or three in a file."""
    chance = random.Random(seed)
    truncations = [(name, at) for name, data in journals.items() for at in range(len(data))]
    if len(truncations) > count // 2:
        truncations = chance.sample(truncations, count // 2)
    for name, at in truncations:
        yield f"{name}, truncated at {at}", journals[name][:at]
    names = list(FAULTS)
    for number in range(count - len(truncations)):
        name, data = chance.choice(list(journals.items()))
        faults = [names[number % len(names)], *chance.choices(names, k=chance.choice([0, 0, 0, 1, 2]))]
        for fault in faults:
            if data:
                data = FAULTS[fault](data, chance)
        yield f"{name}, {', '.join(faults)}", data


def read(path: Path, data: bytes) -> tuple[str, int, int, list[dict[str, Any]]]:
    """What JournalReader makes of these bytes: its judgement, the offset, the torn bytes, the records before it."""
    path.write_bytes(data)
    reader, records = JournalReader(str(path)), []
    try:
        records.extend(reader)
    except DataError as error:
        assert str(path) in str(error)
        return "damaged", int(re.search(r"at byte (\d+)", str(error))[1]), 0, records
    return ("torn" if reader.torn else "whole"), reader.end, reader.torn, records


def assert_judged_rightly(what: str, path: Path, data: bytes) -> str:
    judgement, offset = judge(data)
    told, at, torn, records = read(path, data)
    assert (told, at) == (judgement, offset), what
    assert torn == (len(data) - offset if judgement == "torn" else 0), what
    before = [read_line(line) for line in lines_of(data[:offset])[1:]]
    assert [(record["seq"], record["op"]) for record in records] == [(line.seq, line.op) for line in before], what
    return judgement


@pytest.mark.timeout(3600 if LONG else 120)
def test_torn_and_damaged_journals_are_told_apart(journals, folder, seed):
    judged = dict.fromkeys(("whole", "torn", "damaged"), 0)
    for what, data in cases(journals, CASES, seed):
        judged[assert_judged_rightly(what, folder / "journal.jsonl", data)] += 1
    print(judged)
    assert sum(judged.values()) == CASES
    assert judged["whole"] > CASES / 400
    assert min(judged["torn"], judged["damaged"]) > CASES / 10


@pytest.mark.parametrize("name", ["young", "closed", "busy"])
def test_every_single_bit_of_a_line_counts(journals, folder, name):
    """All flips in three lines, one of them with a checksum that begins with zeros, which a number need not show."""
    data = journals[name]
    lines = lines_of(data)
    chosen = {1, len(lines) - 1, next((at for at, line in enumerate(lines) if line[8:9] == b"0"), 0)}
    for at in chosen:
        start = sum(map(len, lines[:at]))
        for bit in range(8 * len(lines[at])):
            place = start + bit // 8
            flipped = data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :]
            judgement = assert_judged_rightly(f"bit {bit} of line {at}", folder / "journal.jsonl", flipped)
            assert judgement != "whole"


def test_a_flip_of_a_leading_zero_of_the_checksum_is_seen(folder):
    """int(" 123abc", 16) is a number, too."""
    header = jobqueue.journal_line(0, 1, '{"op":"journal","version":1,"writer":"test"}')
    bodies = (jobqueue.journal_line(1, 1, f'{{"op":"synced","n":{number}}}') for number in itertools.count())
    line = next(line for line in bodies if line[8:9] == b"0")
    assert read(folder / "journal.jsonl", header + line)[0] == "whole"
    assert read(folder / "journal.jsonl", header + line.replace(b'"0', b'" ', 1))[0] == "damaged"


def test_whatever_a_power_cut_does_to_what_was_not_synced_the_start_finds_all_that_was(tmp_path, folder, clock, seed):
    """Not by the rule of the watermark, but by what the engine told: all that it had synced is there."""
    chance = random.Random(seed)
    engine = open_engine(tmp_path / "run", clock, fsync="interval", fsync_interval=1)
    queue = Queue(engine, clock, again=None)
    work(queue, 3)
    wait_until(lambda: clock.sleepers() == 2)
    clock.advance(1)
    wait_until(lambda: engine.journal.synced == engine.journal.seq)
    synced, size = engine.journal.synced, engine.journal.size
    work(queue, 6)
    data = journal_of(engine).read_bytes()
    engine.close()
    for _ in range(4_000 if LONG else 1_000):
        tail = bytearray(data[size : chance.randrange(size, len(data) + 1)])
        for _ in range(chance.randrange(4)):  # pages of it that did not reach the disk
            if tail:
                start = chance.randrange(len(tail)) // 128 * 128
                tail[start : start + 128] = bytes(len(tail[start : start + 128]))
        damaged = data[:size] + tail + bytes(chance.choice([0, 0, 4096]))
        judgement, _, _, records = read(folder / "journal.jsonl", damaged)
        assert judgement != "damaged"
        assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
        assert len(records) >= synced


# -- the whole engine on such files


def listing(engine: jobqueue.LocalEngine) -> list[Job]:
    jobs, after = engine.jobs(None, None, 10_000, None)
    assert after is None
    return [durable(job) for job in jobs]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", "reserve")}


def test_the_engine_starts_on_what_is_torn_and_refuses_what_is_damaged(journals, folder, clock, seed):
    some = random.Random(seed).sample(list(cases(journals, 2_000, seed)), 1_500 if LONG else 150)
    settings = {"reserve": 0, "fsync": "never"}
    for number, (what, data) in enumerate(some):
        judgement, offset = judge(data)
        here, clean = folder / f"{number}", folder / f"{number}-clean"
        here.mkdir()
        (here / "journal.jsonl").write_bytes(data)
        (here / "journal.jsonl.new").write_bytes(b"left over from a compaction")
        if judgement == "damaged":
            with pytest.raises(DataError, match=f"byte {offset}"):
                open_engine(here, clock, **settings)
            assert files(here)["journal.jsonl"] == data, what
            assert not [name for name in files(here) if "torn" in name], what
        else:
            clean.mkdir()
            (clean / "journal.jsonl").write_bytes(data[:offset])
            expected, engine = open_engine(clean, clock, **settings), open_engine(here, clock, **settings)
            assert listing(engine) == listing(expected), what
            engine.close()
            expected.close()
            torn = {name: held for name, held in files(here).items() if name != "journal.jsonl"}
            assert torn == ({"journal.jsonl.torn-1": data[offset:]} if judgement == "torn" else {}), what
            assert judge(files(here)["journal.jsonl"])[0] == "whole", what
        shutil.rmtree(here)
        shutil.rmtree(clean, ignore_errors=True)


def test_a_torn_tail_is_reported_in_one_line_that_says_where_it_went(tmp_path, journals, clock, caplog):
    path = tmp_path / "journal.jsonl"
    for number in (1, 2):
        data = journals["unsynced"][:-10]
        path.write_bytes(data)
        caplog.clear()
        open_engine(tmp_path, clock).close()
        (line,) = [record.getMessage() for record in caplog.records if "torn_tail file" in record.getMessage()]
        offset = judge(data)[1]
        for part in (str(path), f"offset={offset}", f"bytes={len(data) - offset}", f"journal.jsonl.torn-{number}"):
            assert part in line
        assert (tmp_path / f"journal.jsonl.torn-{number}").read_bytes() == data[offset:]


def test_damage_is_refused_with_file_and_offset_again_and_again_until_it_is_mended(tmp_path, journals, clock):
    data = journals["closed"]
    at = len(data) // 2
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for _ in range(2):
        with pytest.raises(DataError) as refusal:
            open_engine(tmp_path, clock)
        offset = sum(map(len, lines_of(data[:at])[:-1]))
        assert str(path) in str(refusal.value)
        assert f"byte {offset}" in str(refusal.value)
    path.write_bytes(data)
    open_engine(tmp_path, clock).close()


def test_a_record_that_does_not_follow_from_those_before_it_is_refused_and_named(tmp_path, clock):
    path = tmp_path / "journal.jsonl"
    lines = [
        jobqueue.journal_line(0, 2, '{"op":"journal","version":1,"writer":"test"}'),
        jobqueue.journal_line(1, 2, '{"op":"meta","last_number":0,"all_paused":false,"paused":[]}'),
        jobqueue.journal_line(2, 2, '{"op":"cancel","id":"nobody","finished":1}'),
    ]
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match="record 2") as refusal:
        open_engine(tmp_path, clock)
    assert str(path) in str(refusal.value)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("length", [0, 1, 40])
def test_a_file_without_a_whole_first_line_is_refused(tmp_path, journals, clock, length):
    """It is never made in place, so this was not a crash."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(journals["busy"][:length])
    with pytest.raises(DataError, match="byte 0"):
        open_engine(tmp_path, clock)
    assert path.stat().st_size == length


def test_a_newer_format_is_refused_with_the_version_that_is_needed(tmp_path, clock):
    newer = jobqueue.Journal.VERSION + 1
    path = tmp_path / "journal.jsonl"
    data = jobqueue.journal_line(0, 0, json.dumps({"op": "journal", "version": newer, "writer": "jobqueue 9.8.7"}))
    path.write_bytes(data)
    with pytest.raises(DataError) as refusal:
        open_engine(tmp_path, clock)
    for part in (str(path), f"format {newer}", f"format {jobqueue.Journal.VERSION}", "jobqueue 9.8.7"):
        assert part in str(refusal.value)
    assert path.read_bytes() == data


def test_an_older_format_would_be_read(tmp_path, clock, monkeypatch):
    """The rule of change: a reader takes every version up to its own."""
    engine = open_engine(tmp_path, clock)
    job = Queue(engine, clock, again=None).submit()
    engine.close()
    monkeypatch.setattr(jobqueue.Journal, "VERSION", jobqueue.Journal.VERSION + 1)
    engine = open_engine(tmp_path, clock)
    assert [found.id for found in listing(engine)] == [job.id]
    engine.close()


# -- the golden journals of this format and of those before

GOLDEN = Path(__file__).with_name("golden")
NOW = GOLDEN / f"journal-{jobqueue.Journal.VERSION}"
each_format = pytest.mark.parametrize("golden", sorted(GOLDEN.glob("journal-*")), ids=lambda path: path.name)

CAFE = "caf\u00e9 \u2028 text".encode()

# What tests/golden/make.py did, by the payload of each job; times are seconds after its first moment.
# payload: queue, state, priority, attempts, failures, deliveries, result, error, key, ttl, delay, lease_seconds
GOLDEN_JOBS = {
    b'"delayed"': ("default", "delayed", 0, 3, 0, 0, None, None, None, None, 86400, None),
    b'"pending"': ("default", "pending", 9, 3, 0, 0, None, None, "a key", None, 0, None),
    b'"processing"': ("default", "processing", 0, 5, 0, 1, None, None, None, None, 0, 4000),
    b'"extended"': ("default", "processing", 0, 3, 0, 1, None, None, None, None, 0, 7200),
    b'"completed"': ("default", "completed", 0, 3, 0, 1, b'{"r": 1.0}', None, None, None, 0, 300),
    CAFE: ("default", "completed", 0, 3, 0, 1, b"plain \x01 text", None, None, None, 0, 300),
    b"\x00\xff binary": ("default", "completed", 0, 3, 0, 1, b"\xfe\x00", None, None, None, 0, 300),
    b'"failed"': ("default", "failed", 0, 1, 1, 1, None, "no more \u2028 attempts", None, None, 0, 300),
    b'"gave up"': ("default", "failed", 0, 3, 1, 1, None, "no use", None, None, 0, 300),
    b'"lost"': ("default", "failed", 0, 1, 1, 1, None, "the lease of 60 s ran out on attempt 1", None, None, 0, 60),
    b'"expired"': ("default", "expired", 0, 3, 0, 0, None, None, None, 30, 0, None),
    b'"cancelled"': ("default", "cancelled", 0, 3, 0, 0, None, None, None, None, 0, None),
    b'"retried"': ("default", "delayed", 0, 3, 1, 1, None, "later", None, None, 43200, 300),
    b'"retried at once"': ("default", "pending", 0, 3, 1, 1, None, "now", None, None, 0, 300),
    b'"released"': ("default", "pending", 0, 3, 0, 1, None, None, None, None, 0, 300),
    b'"given back"': ("default", "pending", 0, 3, 0, 0, None, None, None, None, 0, 300),
    b'"lapsed"': ("default", "pending", 0, 3, 1, 1, None, None, None, None, 0, 60),
    b'"requeued"': ("default", "pending", 0, 3, 0, 1, None, None, None, 90000, 0, 300),
    b'"ripe"': ("default", "pending", 0, 3, 0, 0, None, None, None, None, 30, None),
    b'"batch 1"': ("batch", "pending", 5, 3, 0, 0, None, None, None, None, 0, None),
    b'"batch 2"': ("batch", "pending", 5, 3, 0, 0, None, None, None, None, 0, None),
    b'"held"': ("paused", "pending", 0, 3, 0, 0, None, None, None, None, 0, None),
}  # fmt: skip
GOLDEN_LINE = ["pending", "retried at once", "released", "given back", "lapsed", "requeued", "ripe"]
GOLDEN_BEGIN, GOLDEN_END = 1_700_000_000.0, 1_700_000_600.0


def test_the_golden_journal_has_every_kind_of_record():
    records = [record for path in NOW.iterdir() for record in records_of(path.read_bytes())]
    kinds = {verb for _, verb in jobqueue.TRANSITIONS}
    kinds |= {"journal", "meta", "job", "submit", "batch", "clear", "pause", "open", "close", "synced"}
    assert {record["op"] for record in records} == kinds


@each_format
def test_the_golden_journal_is_read_as_it_was_written(tmp_path, golden):
    shutil.copyfile(golden / "journal.jsonl", tmp_path / "journal.jsonl")
    clock = FakeClock(wall=GOLDEN_END)
    queue = Queue(open_engine(tmp_path, clock), clock, again=None)
    jobs = queue.jobs()
    found = {
        job.payload: (
            job.queue, job.state, job.priority, job.attempts, job.failures, job.deliveries, job.result, job.error,
            job.key, job.ttl, job.delay, job.lease_seconds,
        )
        for job in jobs
    }  # fmt: skip
    assert found == GOLDEN_JOBS
    by_payload = {job.payload: job for job in jobs}
    assert [job.number for job in jobs] == sorted((job.number for job in jobs), reverse=True)
    assert by_payload[b'"completed"'].content_type == "application/vnd.golden+json"
    assert by_payload[b'"completed"'].worker == "golden worker"
    assert by_payload[b"\x00\xff binary"].result_kind == "binary"
    assert by_payload[b'"delayed"'].headers == '{"Content-Type":"text/x-golden","X-Trace-Id":"é"}'
    assert by_payload[b'"delayed"'].created == GOLDEN_BEGIN * 1e6
    # It is alive: the line is in order, the tokens are good, the pause holds, the key is taken.
    assert queue.nothing("paused")
    taken = queue.wait_for("default", max=99, wait=0).result(PATIENCE)
    assert [json.loads(job.payload) for job in taken] == GOLDEN_LINE
    assert queue.complete(by_payload[b'"extended"']).job.state == "completed"
    assert queue.complete(by_payload[b'"completed"']).duplicate
    assert queue.hold('"pending"', 0, key="a key").result(PATIENCE)[1]
    queue.advance(86_400)
    assert queue.state(by_payload[b'"delayed"']) == "pending"
    queue.engine.close()


@each_format
def test_the_golden_journal_of_a_crash_is_read_as_it_was_written(tmp_path, golden):
    shutil.copyfile(golden / "crashed.jsonl", tmp_path / "journal.jsonl")
    engine = open_engine(tmp_path, FakeClock(wall=GOLDEN_BEGIN))
    assert [(job.payload, job.state) for job in listing(engine)] == [
        (b'"held"', "pending"),
        (b'"processing"', "processing"),
        (b'"failed"', "failed"),
        (CAFE, "completed"),
        (b'"completed"', "completed"),
        (b'"delayed"', "delayed"),
    ]
    assert engine.stats()["queues"]["paused"]["paused"]
    engine.close()


def test_the_golden_journal_can_be_made_again(tmp_path):
    """So that the script is there, and works, when a later format needs a golden journal of its own."""
    script = GOLDEN / "make.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=60, capture_output=True)
    made, golden = ((path / "journal.jsonl").read_bytes() for path in (tmp_path, NOW))
    ops = [[record["op"] for record in records_of(data) if record["op"] != "synced"] for data in (made, golden)]
    assert ops[0] == ops[1]


# -- start and stop


def test_a_clean_stop_leaves_a_closing_record_and_the_next_start_says_nothing(make_queue, caplog):
    queue = make_queue()
    queue.bring_to("processing")
    queue.engine.close()
    last = records_of(journal_of(queue.engine).read_bytes())[-1]
    assert (last["op"], last["synced"]) == ("close", last["seq"] - 1)
    caplog.clear()
    queue.restart("stop")
    assert not caplog.records
    queue.bring_to("completed")


def test_a_stop_that_was_not_clean_is_logged_at_the_next_start(make_queue, caplog):
    queue = make_queue()
    queue.submit()
    caplog.clear()
    queue.restart("crash")
    assert [record.levelname for record in caplog.records if "unclean_stop" in record.getMessage()] == ["WARNING"]
    caplog.clear()
    queue.restart("stop")
    assert not caplog.records


@pytest.mark.parametrize("unsynced", [0, 1, 50])
def test_what_is_not_known_to_be_on_the_disk_is_written_once_more_after_an_unclean_stop(
    make_queue, monkeypatch, unsynced
):
    """And where it stands, so that it takes no room; after a clean stop nothing is."""
    queue = make_queue()
    for _ in range(20):
        queue.submit()
    monkeypatch.setattr(queue.engine.journal, "durable", False)  # so that nobody waits, and nothing is synced
    monkeypatch.setattr(jobqueue, "_sync_data", lambda fd: None)
    for _ in range(unsynced):
        queue.submit()
    copy = crash_copy(queue.engine, Path(queue.engine.journal.folder).with_name("copy")) / "journal.jsonl"
    data, inode = copy.read_bytes(), copy.stat().st_ino
    written = []
    write_all = jobqueue._write_all
    monkeypatch.setattr(jobqueue, "_write_all", lambda fd, data: (written.append(data), write_all(fd, data)))
    engine = open_engine(copy.parent, queue.clock)
    assert copy.stat().st_ino == inode
    assert copy.read_bytes().startswith(data)
    assert data.endswith(written[0])
    # What answers waited for is synced in the recent file alone: the journal's own last sync was at the start.
    assert records_of(written[0])[0]["seq"] == 3 and written[0].count(b"\n") == 20 + unsynced
    engine.close()
    written.clear()
    engine = open_engine(copy.parent, queue.clock)
    assert [line[:1] for line in written] == [b"\n", b"{"] and json.loads(written[1])["op"] == "open"
    engine.close()


def test_the_last_lines_of_a_file_are_found_across_its_pieces(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(jobqueue, "MIB", 16)
    for _ in range(200):
        lines = [rng.randbytes(rng.randrange(40)).replace(b"\n", b"-") + b"\n" for _ in range(rng.randrange(12))]
        path = tmp_path / "lines"
        path.write_bytes(b"".join(lines) + b"torn")
        with open(path, "rb") as file:
            end = sum(map(len, lines))
            for count in range(len(lines) + 1):
                last = lines[len(lines) - count :]
                assert jobqueue._last_lines(file.fileno(), end, count) == end - sum(map(len, last))


@pytest.mark.parametrize("how", ["stop", "crash"])
def test_restarts_without_work_do_not_make_the_journal_grow_without_bound(make_queue, how):
    queue = make_queue(compact_bytes=4_000)
    queue.submit()
    for _ in range(60):
        queue.restart(how) if how == "stop" else self_crash(queue)
        queue.engine.stats()
        wait_for_compaction()
    assert journal_of(queue.engine).stat().st_size < 10_000


def self_crash(queue: Queue) -> None:
    """A crash that leaves no trail of folders."""
    old = Path(queue.engine.journal.folder)
    copy = crash_copy(queue.engine, old.with_name("copy"))
    queue.engine.close()
    shutil.rmtree(old)
    copy.rename(old)
    queue.engine = open_engine(old, queue.clock, compact_bytes=4_000)


def test_what_a_compaction_left_over_is_removed_at_the_start(make_queue, tmp_path):
    queue = make_queue()
    job = queue.submit()
    queue.engine.close()
    left = Path(queue.engine.journal.path + ".new")
    left.write_bytes(b"half of a compaction")
    queue.restart("stop")
    assert not left.exists()
    assert [found.id for found in queue.jobs()] == [job.id]


def test_a_second_engine_on_the_same_folder_is_refused_and_the_first_goes_on(make_queue, clock):
    queue = make_queue()
    job = queue.submit()
    folder = Path(queue.engine.journal.folder)
    before = files(folder)
    for _ in range(2):  # a refused attempt does not take the lock away
        with pytest.raises(DataError, match="in use"):
            open_engine(folder, clock)
    assert files(folder) == before
    assert queue.take().id == job.id
    queue.engine.close()
    assert (folder / ".lock").exists()
    queue.restart("stop")


def test_the_folder_is_locked_through_a_compaction(make_queue, clock):
    queue = make_queue(compact_bytes=2_000, keep_jobs=1)
    while queue.engine.figures()["compactions_total"] < 1:
        queue.bring_to("completed")
        wait_for_compaction()
    with pytest.raises(DataError, match="in use"):
        open_engine(Path(queue.engine.journal.folder), clock)


def test_another_process_is_refused_too(make_queue, tmp_path):
    queue = make_queue()
    folder = queue.engine.journal.folder
    program = "import sys, jobqueue; jobqueue.LocalEngine(jobqueue.Settings(data_dir=sys.argv[1]), jobqueue.Clock())"
    command = [sys.executable, "-c", program, folder]
    ended = subprocess.run(command, cwd=Path(jobqueue.__file__).parent, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "in use" in ended.stderr


def test_files_are_for_their_owner_alone(make_queue):
    queue = make_queue()
    queue.submit()
    folder = Path(queue.engine.journal.folder)
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_files_are_for_their_owner_alone_also_where_the_folder_is_for_all(tmp_path, journals, clock):
    (tmp_path / "journal.jsonl").touch(0o600)
    (tmp_path / "journal.jsonl").write_bytes(journals["unsynced"][:-10])
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        open_engine(tmp_path, clock).close()
    finally:
        os.umask(before)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"journal.jsonl", "journal.jsonl.torn-1"} <= names
    for name in names:
        assert (tmp_path / name).stat().st_mode & 0o077 == 0, name


# -- compaction while serving


def churn(queue: Queue, until: Callable[[], bool], queue_name: str = "churn") -> None:
    """Jobs that come and go, until the condition holds."""
    for _ in range(20_000):
        if until():
            return
        queue.bring_to("completed", queue=queue_name)
    raise AssertionError("waited in vain")


def compact(queue: Queue) -> None:
    """Start it again with a limit that its journal has passed: a compaction begins with the first verb."""
    queue.engine.close()
    folder = Path(queue.engine.journal.folder)
    queue.engine = open_engine(folder, queue.clock, fsync="never", compact_bytes=1, keep_jobs=0)
    queue.engine.stats()


def compactions(queue: Queue) -> int:
    return queue.engine.figures()["compactions_total"]


def test_a_compaction_leaves_the_content_as_it_was(make_queue):
    queue = make_queue(compact_bytes=30_000, fsync="never", keep_jobs=100)
    for state in STATES:
        queue.bring_to(state, queue=state, key=state)
    queue.engine.submit(*submission({**queue.fields(), "payload": b"\xff\x00\n", "kind": "binary"}), 0).result(PATIENCE)
    queue.pause("paused")
    kept = {job.id: come_back(job) for job in queue.jobs()}
    churn(queue, lambda: compactions(queue) >= 3)
    wait_for_compaction()
    for how in ("crash", "stop"):
        queue.restart(how)
        found = {job.id: come_back(job) for job in queue.jobs() if job.id in kept}
        unfinished = [job_id for job_id, job in kept.items() if job.state in STATES[:3]]
        assert [found[job_id] for job_id in unfinished] == [kept[job_id] for job_id in unfinished]
        assert queue.nothing("paused")
        assert queue.engine.stats()["queues"]["paused"]["paused"]


def test_no_number_is_given_twice_though_all_is_cleared_and_compacted(make_queue):
    """A number is a cursor for listings, too."""
    queue = make_queue(fsync="never")
    last = [queue.submit("x" * 1_000) for _ in range(50)][-1].number
    queue.engine.clear().result(PATIENCE)
    compact(queue)
    wait_until(lambda: compactions(queue) == 1)
    queue.restart("crash")
    assert queue.submit().number > last


def test_records_are_numbered_without_a_gap_through_compactions(make_queue):
    queue = make_queue(compact_bytes=10_000, fsync="never", keep_jobs=5)
    queue.submit_many(20, queue="stays")
    churn(queue, lambda: compactions(queue) >= 4)
    wait_for_compaction()
    queue.submit()
    data = journal_of(queue.engine).read_bytes()
    assert judge(data) == ("whole", len(data))
    lines = [read_line(line) for line in lines_of(data)]
    assert lines[-1].seq == queue.engine.journal.seq
    assert lines[0].op == "journal"
    assert lines[0].synced >= lines[0].seq


def test_the_journal_follows_what_is_alive_and_not_what_has_passed(make_queue):
    queue = make_queue(compact_bytes=20_000, fsync="never", keep_jobs=10)
    queue.submit_many(50, queue="stays")
    rounds = 3_000
    for number in range(rounds):
        queue.bring_to("completed", queue="churn")
        if number % 100 == 0:
            wait_for_compaction()
    for _ in range(3):  # one may have been under way, and another become due since
        queue.submit()
        wait_for_compaction()
    assert journal_of(queue.engine).stat().st_size < 60_000, "3,000 jobs have passed, 60 are there"
    folder = Path(queue.engine.journal.folder)
    assert sorted(files(folder)) == ["journal.jsonl"]


def written(server: ServerProcess) -> int:
    """Bytes that it gave to write(2) so far, for whatever file; what goes out through sockets does not count."""
    return int(re.search(r"^wchar: (\d+)$", Path(f"/proc/{server.pid}/io").read_text(), re.MULTILINE)[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc to see by how much a process writes")
def test_a_job_costs_the_disk_as_much_with_thousands_of_finished_ones_as_with_ten(process):
    """The original wrote its whole history with every operation, and was slow once it had one."""
    server = process("--grpc-port", "off")
    client, worker = Client(server), WorkerOverHttp(server)

    def finish(count: int) -> None:
        lines = b'"another"\n' * count
        ok(client.call("POST", "/api/jobs", lines, {"Content-Type": "application/x-ndjson"}), 202)
        while jobs := worker.poll_many(1000):
            worker.complete_many(*[(job, b'"done"') for job in jobs])

    def one_job() -> int:
        before = written(server)
        client.put(b'"a payload"')
        worker.complete(worker.poll(), b'"a result"')
        return written(server) - before

    finish(10)
    few = min(one_job() for _ in range(10))  # of several: a pause may bring a watermark along
    finish(4_000)
    assert client.stats()["completed"] == 4_020
    many = min(one_job() for _ in range(10))
    assert few > 100, "it is not seen what it writes"
    assert few - 100 < many < few + 100, "numbers have more digits by now, and that is all"


def test_a_slow_compaction_does_not_put_the_next_one_off(make_queue, monkeypatch):
    """What was written while it ran is dead, and says nothing about how much is alive."""
    queue = make_queue(compact_bytes=20_000, fsync="never", keep_jobs=10)
    queue.submit_many(50, queue="stays")
    goes_on, fsync = threading.Event(), os.fsync

    def slow(fd: int) -> None:
        assert goes_on.wait(PATIENCE)
        fsync(fd)

    monkeypatch.setattr(jobqueue, "_sync_file", slow)
    churn(queue, compacting)
    for _ in range(1_000):
        queue.bring_to("completed", queue="churn")
    goes_on.set()
    wait_for_compaction()
    queue.submit()
    wait_for_compaction()
    assert journal_of(queue.engine).stat().st_size < 60_000


@pytest.mark.parametrize(
    ("payload", "kind"), [(b"\x01" * 1_000, "text"), (b'"' + b'\\"' * 500 + b'"', "json"), (b"\xff" * 1_000, "binary")]
)
def test_a_journal_that_is_all_alive_is_not_compacted_again_and_again(make_queue, payload, kind):
    """However much longer the payloads are in the file than in memory."""
    queue = make_queue(compact_bytes=20_000, fsync="never")
    for _ in range(60):
        queue.engine.submit(*submission({**queue.fields(), "payload": payload, "kind": kind}), 0)
    for _ in range(40):
        queue.release(queue.take())
        wait_for_compaction()
    assert compactions(queue) <= 2


def test_what_happens_while_a_compaction_runs_is_not_lost(make_queue):
    """Clients, workers and compactions at the same time; then a crash."""
    queue = make_queue(compact_bytes=10_000, keep_jobs=50)
    ended = threading.Event()
    kept: list[str] = []

    def client(number: int) -> None:
        while not ended.is_set():
            kept.append(queue.submit(number, queue=f"stays-{number}").id)
            for _ in range(5):
                queue.hold(queue="work", wait=0)

    def worker() -> None:
        while not ended.is_set():
            for job in queue.wait_for("work", wait=0, max=10).result(PATIENCE):
                queue.engine.complete(job.id, job.token, b"1", "json", None, None)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    threads += [threading.Thread(target=worker) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: compactions(queue) >= 5, 60)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    before = {job.id: durable(job) for job in queue.jobs(limit=10_000)}
    queue.restart("crash")
    after = {job.id: durable(job) for job in queue.jobs(limit=10_000)}
    assert set(kept) <= after.keys()
    # Of those that ended in the same moment of a clock that stands still, others may be kept.
    unfinished = {job_id for job_id, job in before.items() if job.finished is None}
    assert unfinished == {job_id for job_id, job in after.items() if job.finished is None}
    assert all(after[job_id] == before[job_id] for job_id in after.keys() & before.keys())


def test_a_batch_that_is_submitted_while_polls_wait_and_a_compaction_is_due_is_whole_after_a_restart(make_queue):
    queue = make_queue(compact_bytes=5_000, fsync="never")
    waiters = [queue.wait_for(wait=100) for _ in range(3)]
    ids = queue.submit_many(300)
    assert [waiter.result(PATIENCE)[0].id for waiter in waiters] == ids[:3]
    wait_for_compaction()
    queue.take()
    queue.restart("crash")
    assert [job.id for job in reversed(queue.jobs())] == ids


def test_a_kill_at_any_moment_of_a_compaction_finds_everything(make_queue, clock, tmp_path):
    queue = make_queue(compact_bytes=1 << 30, fsync="never", keep_jobs=0)
    payload = '"' + "x" * 300 + '"'
    queue.engine.submit_many(*batch(queue.fields(payload, queue="stays") for _ in range(1_000))).result(PATIENCE)
    expected = sorted(job.id for job in queue.jobs(limit=10_000))
    for _ in range(3_000):
        queue.engine.give_back(queue.engine.poll(Claim(("stays",))).result(PATIENCE))
    compact(queue)
    copies = []
    while compacting():
        copies.append(crash_copy(queue.engine, tmp_path / f"copy-{len(copies)}"))
        if len(copies) > 50:
            wait_for_compaction()
    wait_until(lambda: compactions(queue) == 1)
    copies.append(crash_copy(queue.engine, tmp_path / "last"))
    for copy in copies[:: max(1, len(copies) // 12)] + copies[-2:]:
        engine = open_engine(crash(copy), clock, reserve=0)
        assert sorted(job.id for job in listing(engine)) == expected
        engine.close()


def crash(folder: Path) -> Path:
    """A copy of a copy: one that was opened is no longer what the crash left."""
    fresh = folder.with_name(folder.name + "-opened")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder, fresh)
    return fresh


def test_verbs_go_on_while_a_compaction_runs_and_it_needs_no_memory_for_the_content(make_queue):
    queue = make_queue(compact_bytes=1 << 30, fsync="never", keep_jobs=0)
    payload = '"' + "x" * 20_000 + '"'
    queue.engine.submit_many(*batch(queue.fields(payload, queue="stays") for _ in range(800))).result(PATIENCE)
    for _ in range(2):
        queue.engine.submit_many(*batch(queue.fields(payload, queue="goes") for _ in range(1_000))).result(PATIENCE)
        for job in queue.wait_for("goes", max=1_000, wait=0).result(PATIENCE):
            queue.engine.cancel(job.id)
    tracemalloc.start()
    try:
        compact(queue)
        tracemalloc.reset_peak()
        loaded, verbs = tracemalloc.get_traced_memory()[0], 0
        while compacting():
            queue.release(queue.take("stays"))
            verbs += 1
        peak = tracemalloc.get_traced_memory()[1] - loaded
    finally:
        tracemalloc.stop()
    assert compactions(queue) == 1
    assert verbs > 3
    assert peak < 8 << 20, f"{peak >> 20} MiB for a file of 16"


def test_a_stop_during_a_compaction_leaves_nothing_behind_and_loses_nothing(make_queue):
    queue = make_queue(compact_bytes=1 << 30, fsync="never", keep_jobs=0)
    payload = '"' + "x" * 2_000 + '"'
    for count in (3_000, 5_000):
        queue.engine.submit_many(*batch(queue.fields(payload, queue=str(count)) for _ in range(count))).result(PATIENCE)
    for job in queue.jobs(queue="5000", limit=5_000):
        queue.engine.cancel(job.id)
    ids = sorted(job.id for job in queue.jobs(limit=10_000))
    compact(queue)
    assert compacting()
    queue.engine.close()
    assert not compacting()
    assert sorted(files(Path(queue.engine.journal.folder))) == ["journal.jsonl"]
    queue.restart("stop")
    assert sorted(job.id for job in queue.jobs(limit=10_000)) == ids


def test_a_compaction_that_cannot_be_written_leaves_the_journal_as_it_is(make_queue, caplog):
    queue = make_queue(compact_bytes=5_000, fsync="never", keep_jobs=3)
    Path(queue.engine.journal.path + ".new").mkdir()  # so that it cannot be opened
    for _ in range(100):
        queue.bring_to("completed")
    wait_for_compaction()
    assert compactions(queue) == 0
    assert [record.levelname for record in caplog.records if "compaction_failed" in record.getMessage()] == ["WARNING"]
    Path(queue.engine.journal.path + ".new").rmdir()
    queue.advance(11)
    queue.bring_to("completed")
    wait_for_compaction()
    assert compactions(queue) == 1
    queue.restart("crash")
    assert queue.engine.stats()["completed"] == 3


def test_a_compaction_while_no_file_can_be_opened_is_no_failed_disk(make_queue, monkeypatch):
    """As where the program around it has used up what it may open, in the moment after the switch."""
    queue = make_queue(compact_bytes=5_000, fsync="always", keep_jobs=3)
    replace, opened, full = os.replace, os.open, threading.Event()

    def replaced(*names):
        replace(*names)
        full.set()

    def refused(*arguments, **named):
        if full.is_set():
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(*arguments, **named)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "open", refused)
    while not full.is_set():
        queue.bring_to("completed")
    wait_for_compaction()
    assert compactions(queue) == 1
    queue.bring_to("completed")
    assert queue.engine.journal.failure is None
    full.clear()
    queue.restart("crash")
    assert queue.engine.stats()["completed"] == 3


# -- what waits for the disk


@pytest.fixture
def slow_disk(monkeypatch) -> Any:
    """A disk whose next syncs wait for `slow_disk.set()`; `clear()` makes them wait again."""
    gate, real = threading.Event(), jobqueue._sync_data

    def sync(fd: int) -> None:
        assert gate.wait(PATIENCE)
        real(fd)

    gate.set()
    monkeypatch.setattr(jobqueue, "_sync_data", sync)
    yield gate
    gate.set()


def waits(queue: Queue) -> dict[str, Callable[[], Any]]:
    """Futures of answers that tell somebody that something is so for good."""
    engine, jobs = queue.engine, [queue.bring_to("processing", queue=str(number)) for number in range(6)]
    failed = queue.bring_to("failed", queue="failed")
    return {
        "a submit": lambda: queue.hold(wait=0),
        "a batch": lambda: engine.submit_many(*batch([queue.fields(), queue.fields()])),
        "a completion": lambda: engine.complete(jobs[0].id, jobs[0].token, b"1", "json", None, None),
        "a completion with the next": lambda: engine.complete(jobs[1].id, jobs[1].token, b"1", "json", None, Claim()),
        "completions": lambda: engine.complete_many([(jobs[2].id, jobs[2].token, b"1", "json", None)]),
        "a failure": lambda: engine.fail(jobs[3].id, jobs[3].token, "broken", True, None),
        "a failure for good": lambda: engine.fail(jobs[4].id, jobs[4].token, "broken", False, None),
        "a cancellation": lambda: engine.cancel(jobs[5].id),
        "a requeue": lambda: engine.requeue(failed.id),
        "a pause": lambda: engine.pause("x", True),
        "a clear": lambda: engine.clear(),
    }


ANSWERS = (
    "a submit", "a batch", "a completion", "a completion with the next", "completions", "a failure",
    "a failure for good", "a cancellation", "a requeue", "a pause", "a clear",
)  # fmt: skip


@pytest.mark.parametrize("what", ANSWERS)
def test_nobody_is_told_before_the_disk_has_it(make_queue, slow_disk, what):
    queue = make_queue()
    verb = waits(queue)[what]
    slow_disk.clear()
    future = verb()
    assert not future.done()
    slow_disk.set()
    future.result(PATIENCE)


def test_nobody_is_told_before_the_disk_has_it_also_after_a_compaction(make_queue, slow_disk):
    queue = make_queue(compact_bytes=5_000, keep_jobs=3)
    churn(queue, lambda: compactions(queue) == 1)
    wait_for_compaction()
    slow_disk.clear()
    futures = [queue.hold(wait=0) for _ in range(3)]
    assert not any(future.done() for future in futures)
    slow_disk.set()
    for future in futures:
        future.result(PATIENCE)


@pytest.mark.parametrize("what", ANSWERS)
@pytest.mark.parametrize("fsync", ["interval", "never"])
def test_with_another_setting_nobody_waits_for_the_disk(make_queue, slow_disk, what, fsync):
    """The negative control of the test above, too."""
    queue = make_queue(fsync=fsync)
    verb = waits(queue)[what]
    slow_disk.clear()
    assert verb().done()
    slow_disk.set()


def test_a_client_gets_its_result_only_when_the_disk_has_it(make_queue, slow_disk):
    queue = make_queue()
    client = queue.hold("x", key="k")
    job = queue.take()
    slow_disk.clear()
    queue.engine.complete(job.id, job.token, b"1", "json", None, None)
    viewer, attached = queue.engine.view(job.id, 0), queue.hold("x", key="k")
    duplicate = queue.engine.complete(job.id, job.token, b"1", "json", None, None)
    for future in (client, viewer, attached, duplicate):
        assert not future.done()
    slow_disk.set()
    for future in (client, viewer, attached, duplicate):
        future.result(PATIENCE)


def test_workers_do_not_wait_for_the_disk(make_queue, slow_disk):
    queue = make_queue()
    waiter = queue.wait_for()
    slow_disk.clear()
    accepted = queue.hold(wait=0)
    job = waiter.result(PATIENCE)[0]
    queue.extend(job)
    queue.release(job)
    queue.engine.give_back([queue.take()])
    queue.take()
    assert not accepted.done()
    slow_disk.set()


def test_one_sync_serves_all_that_wait_for_it(make_queue, slow_disk):
    queue = make_queue()
    before = sum(queue.engine.figures()["fsync_seconds"].counts)
    slow_disk.clear()
    futures = [queue.hold(wait=0) for _ in range(200)]
    slow_disk.set()
    for future in futures:
        future.result(PATIENCE)
    assert sum(queue.engine.figures()["fsync_seconds"].counts) - before <= 3


def test_the_time_of_a_commit_is_that_of_a_sync_or_two_however_long_others_keep_coming(make_queue, clock, monkeypatch):
    """What is measured is how long the first of those waited whom this sync serves, not how long somebody did."""
    queue, real, syncs = make_queue(), jobqueue._sync_data, 40
    arrived: list[Any] = []

    def sync(fd: int) -> None:
        """Takes a second, and before it is over three more have come."""
        if syncs * 3 > len(arrived):
            arrived.extend(queue.hold(wait=0) for _ in range(3))
        clock.advance(1)
        real(fd)

    before = queue.engine.figures()
    commits, syncings = ((sum(before[name].counts), before[name].sum) for name in ("commit_seconds", "fsync_seconds"))
    monkeypatch.setattr(jobqueue, "_sync_data", sync)
    queue.submit()
    wait_until(lambda: len(arrived) == syncs * 3)
    for future in arrived:
        future.result(PATIENCE)
    figures = queue.engine.figures()
    count = sum(figures["commit_seconds"].counts) - commits[0]
    assert count >= syncs, "each sync served somebody"
    assert figures["fsync_seconds"].sum - syncings[1] == pytest.approx(count)
    assert 1 <= (figures["commit_seconds"].sum - commits[1]) / count <= 2


def test_a_record_never_says_that_something_was_synced_which_was_not(make_queue, slow_disk):
    """The watermark is what damage is judged by: one too high would refuse a journal that is only torn."""
    queue = make_queue()
    queue.submit()
    synced = queue.engine.journal.synced
    slow_disk.clear()
    for _ in range(20):
        queue.hold(wait=0)
    lines = [read_line(line) for line in lines_of(journal_of(queue.engine).read_bytes())]
    assert max(line.synced for line in lines) <= synced
    slow_disk.set()
    queue.submit()
    queue.submit()
    lines = [read_line(line) for line in lines_of(journal_of(queue.engine).read_bytes())]
    assert lines[-1].synced >= lines[-2].seq - 1


def test_every_interval_that_saw_a_record_ends_in_a_sync(make_queue, clock):
    queue = make_queue(fsync="interval", fsync_interval=5)
    journal = queue.engine.journal
    for _ in range(4):
        before = journal.synced
        for _ in range(5):
            queue.submit()
        assert journal.synced == before
        wait_until(lambda: clock.advance(5) or journal.synced == journal.seq)


def test_without_syncs_the_watermark_stays(make_queue, clock):
    queue = make_queue(fsync="never")
    opened = queue.engine.journal.synced
    for _ in range(4):
        queue.submit()
        wait_until(lambda: clock.sleepers() == 2)
        clock.advance(100)
    wait_until(lambda: clock.sleepers() == 2)
    assert queue.engine.journal.synced == opened
    assert queue.engine.journal.seq == opened + 4


def test_a_pause_in_the_work_writes_the_watermark_so_that_a_later_flip_is_found(make_queue, clock):
    queue = make_queue()
    job = queue.submit()
    wait_until(lambda: clock.sleepers() == 2)
    clock.advance(1)
    wait_until(lambda: records_of(journal_of(queue.engine).read_bytes())[-1]["op"] == "synced")
    data = journal_of(queue.engine).read_bytes()
    at = data.rindex(job.id.encode())
    assert judge(data[:at] + b"?" + data[at + 1 :])[0] == "damaged"
    size = len(data)
    clock.advance(100)
    queue.engine.stats()
    assert journal_of(queue.engine).stat().st_size == size, "an idle engine writes nothing more"


# -- what the disk refuses


@contextmanager
def full_disk(queue: Queue, room: int) -> Iterator[None]:
    """The file may grow by `room` bytes and no more: what is longer is written short, then refused with EFBIG. From
    then on no compaction makes room."""
    queue.engine._compact_again = float("inf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (queue.engine.journal.size + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything(queue: Queue) -> tuple:
    stats = queue.engine.stats()
    return [durable(job) for job in queue.jobs()], stats, queue.engine.peek(("default", "p", "d", "e"))


REFUSED = {
    "submit": lambda queue, jobs: queue.submit("new"),
    "submit with a key": lambda queue, jobs: queue.submit("new", key="new"),
    "a batch": lambda queue, jobs: queue.submit_many(5),
    "poll": lambda queue, jobs: queue.take("p"),
    "complete": lambda queue, jobs: queue.complete(jobs["processing"]),
    "complete with the next": lambda queue, jobs: queue.complete(jobs["processing"], claim=Claim()),
    "fail": lambda queue, jobs: queue.fail(jobs["processing"]),
    "fail without delay": lambda queue, jobs: queue.fail(jobs["processing"], delay=0),
    "fail for good": lambda queue, jobs: queue.fail(jobs["processing"], retry=False),
    "release": lambda queue, jobs: queue.release(jobs["processing"]),
    "extend": lambda queue, jobs: queue.extend(jobs["processing"]),
    "cancel": lambda queue, jobs: queue.cancel(jobs["pending"]),
    "requeue": lambda queue, jobs: queue.requeue(jobs["expired"]),
    "pause": lambda queue, jobs: queue.pause("p"),
    "pause of all": lambda queue, jobs: queue.pause(),
    "clear": lambda queue, jobs: queue.engine.clear().result(PATIENCE),
}


@pytest.mark.parametrize("room", [0, 10])
@pytest.mark.parametrize("verb", REFUSED)
def test_what_the_disk_refused_did_not_happen_and_can_be_done_later(make_queue, verb, room):
    queue = make_queue(fsync="never")
    jobs = {
        "pending": queue.submit(queue="p"),
        "expired": queue.bring_to("expired", queue="e", ttl=50),
        "processing": queue.bring_to("processing", queue="r"),
        "delayed": queue.submit(queue="d", delay=50),
    }
    before, data = everything(queue), journal_of(queue.engine).read_bytes()
    with full_disk(queue, room):
        for _ in range(2):
            error = refused("disk_full", REFUSED[verb], queue, jobs)
            assert error.status == 507
    assert everything(queue) == before
    assert journal_of(queue.engine).read_bytes() == data
    REFUSED[verb](queue, jobs)
    assert everything(queue) != before
    queue.restart("crash")
    assert judge(journal_of(queue.engine).read_bytes())[0] == "whole"


def counts(queue: Queue) -> dict[str, Any]:
    """What is counted of the jobs that workers ended or lost, and what ann has (completed, failed)."""
    names = ("retries_total", "leases_lapsed_total", "late_completions_total", "duplicate_completions_total")
    totals = {name: count for name, count in queue.engine.figures().items() if name in names}
    assert len(totals) == len(names)
    (ann,) = [seen for seen in queue.engine.workers_seen() if seen["worker"] == "ann"]
    return totals | {"ann": (ann["completed"], ann["failed"])}


COUNTED = {
    "complete": (lambda queue, job: queue.complete(job), {"ann": (1, 0)}),
    "complete with the next": (lambda queue, job: queue.complete(job, claim=Claim()), {"ann": (1, 0)}),
    "complete many": (
        lambda queue, job: queue.engine.complete_many([(job.id, job.token, b"1", "json", None)]).result(PATIENCE),
        {"ann": (1, 0)},
    ),
    "fail": (lambda queue, job: queue.fail(job), {"ann": (0, 1), "retries_total": 1}),
    "fail without delay": (lambda queue, job: queue.fail(job, delay=0), {"ann": (0, 1), "retries_total": 1}),
    "fail for good": (lambda queue, job: queue.fail(job, retry=False), {"ann": (0, 1)}),
}


@pytest.mark.parametrize("room", [0, 10])
@pytest.mark.parametrize("verb", COUNTED)
def test_what_the_disk_refused_is_not_counted_until_it_is_done(make_queue, verb, room):
    queue = make_queue(fsync="never")
    queue.submit()
    job = queue.take(worker="ann")
    before, (call, counted) = counts(queue), COUNTED[verb]
    with full_disk(queue, room):
        for _ in range(3):
            if verb == "complete many":
                assert call(queue, job)[0].code == "disk_full"
            else:
                refused("disk_full", call, queue, job)
    assert counts(queue) == before
    call(queue, job)
    assert counts(queue) == before | counted


def test_a_lost_lease_and_a_late_completion_are_counted_once_though_the_disk_refused_them(make_queue):
    queue = make_queue(fsync="never")
    queue.submit(lease=5)
    job = queue.take(worker="ann")
    with full_disk(queue, 0):
        for _ in range(5):  # it is tried again and again
            queue.advance(5)
        assert (queue.state(job), counts(queue)["leases_lapsed_total"]) == ("processing", 0)
    queue.advance(5)
    assert (queue.state(job), counts(queue)["leases_lapsed_total"]) == ("pending", 1)
    with full_disk(queue, 0):
        for _ in range(3):
            refused("disk_full", queue.complete, job)
        assert (counts(queue)["late_completions_total"], counts(queue)["ann"]) == (0, (0, 0))
    queue.complete(job)
    assert (counts(queue)["late_completions_total"], counts(queue)["ann"]) == (1, (1, 0))


def test_jobs_that_could_not_be_given_back_come_back_when_their_lease_is_over(make_queue):
    queue = make_queue(fsync="never")
    queue.submit_many(3)
    jobs = queue.wait_for(max=3).result(PATIENCE)
    with full_disk(queue, 0):
        queue.engine.give_back(jobs)
    queue.advance(LEASE)
    assert len(queue.wait_for(max=3, wait=0).result(PATIENCE)) == 3


@pytest.mark.parametrize("what", ["lease", "delay", "ttl"])
def test_what_time_brings_on_a_full_disk_is_done_when_there_is_room(make_queue, what):
    queue = make_queue(fsync="never")
    job = queue.submit(**{"delay": {"delay": 5}, "ttl": {"ttl": 5}, "lease": {"lease": 5}}[what])
    if what == "lease":
        queue.take()
    with full_disk(queue, 0):
        queue.advance(5)
        assert queue.nothing()
        queue.advance(5)
    queue.advance(5)
    assert queue.state(job) == {"delay": "pending", "ttl": "expired", "lease": "pending"}[what]


def test_a_poll_that_takes_several_keeps_those_that_the_disk_took(make_queue):
    queue = make_queue(fsync="never")
    queue.submit_many(5)
    with full_disk(queue, 300):
        jobs = queue.wait_for(max=5, wait=0).result(PATIENCE)
    assert len(jobs) == 1
    assert queue.engine.stats()["running"] == 1
    assert queue.complete(jobs[0]).job.state == "completed"


def test_a_batch_of_results_keeps_those_that_the_disk_took(make_queue):
    queue = make_queue(fsync="never")
    queue.submit_many(5)
    jobs = queue.wait_for(max=5, wait=0).result(PATIENCE)
    results = [(job.id, job.token, b"1" * 1_000, "json", None) for job in jobs]
    with full_disk(queue, 3_000):
        outcomes = queue.engine.complete_many(results).result(PATIENCE)
        assert [getattr(outcome, "code", "taken") for outcome in outcomes] == ["taken"] * 2 + ["disk_full"] * 3
    assert [queue.state(job) for job in jobs] == ["completed"] * 2 + ["processing"] * 3
    outcomes = queue.engine.complete_many(results).result(PATIENCE)
    assert [outcome.duplicate for outcome in outcomes] == [True] * 2 + [False] * 3


def test_a_worker_does_not_wait_for_a_job_beside_one_that_the_disk_refuses_to_lease(make_queue):
    queue = make_queue(fsync="never")
    job, other = queue.bring_to("processing"), queue.submit()
    with full_disk(queue, 290):
        outcome = queue.complete(job, claim=Claim(wait=100)).result(PATIENCE)
    assert (outcome.job.state, outcome.next) == ("completed", None)
    assert queue.take().id == other.id


def test_what_cannot_be_written_as_text_takes_no_poll_and_no_job_along(make_queue):
    queue = make_queue()
    waiter = queue.wait_for()
    with pytest.raises(UnicodeEncodeError):
        queue.submit(headers='{"X": "\ud800"}')
    assert queue.engine.stats()["total"] == 0
    job = queue.submit()
    assert [given.id for given in waiter.result(PATIENCE)] == [job.id]
    other = queue.submit()
    with pytest.raises(UnicodeEncodeError):
        queue.take(worker="\ud800")
    assert queue.take().id == other.id


def test_a_completion_that_the_disk_took_is_told_even_if_the_next_job_cannot_be_leased(make_queue):
    queue = make_queue(fsync="never")
    job, other = queue.bring_to("processing"), queue.submit()
    room = len(b'{"crc":"00000000","seq":999,"synced":999,}') + 250
    with full_disk(queue, room):
        outcome = queue.complete(job, claim=Claim())
    assert (outcome.job.state, outcome.next) == ("completed", None)
    assert queue.state(other) == "pending"


def test_a_waiting_worker_learns_that_the_disk_is_full_and_the_job_stays(make_queue):
    queue = make_queue(fsync="never")
    job = queue.submit(delay=5)
    waiter = queue.wait_for()
    with full_disk(queue, 200):  # room for the end of the delay, not for the lease
        queue.clock.advance(5)
        queue.engine.stats()
        refused("disk_full", waiter.result, PATIENCE)
    assert queue.take().id == job.id


def test_a_job_that_is_let_go_after_its_ttl_on_a_full_disk_is_not_stuck(make_queue):
    queue = make_queue(fsync="never")
    job = queue.bring_to("processing", ttl=10)
    queue.advance(11)
    with full_disk(queue, 110):  # room for one short record
        try:
            queue.release(job)
        except JobQueueError as error:
            assert error.code == "disk_full"
            assert queue.state(job) == "processing"
            queue.advance(LEASE)
    queue.advance(2)
    assert queue.state(job) == "expired"


def test_space_is_held_in_reserve(make_queue):
    queue = make_queue(reserve=200_000)
    reserve = Path(queue.engine.journal.folder) / "reserve"
    assert reserve.stat().st_size == 200_000
    assert reserve.stat().st_blocks * 512 >= 200_000, "it must take the space, not only claim it"
    queue.restart("stop")
    assert reserve.stat().st_size == 200_000


@pytest.mark.parametrize("size", [50_000, 0])
def test_what_a_larger_reserve_held_is_given_back(tmp_path, clock, size):
    folder = tmp_path / "data"
    open_engine(folder, clock, reserve=200_000).close()
    open_engine(folder, clock, reserve=size).close()
    assert sum(file.stat().st_size for file in folder.glob("reserve")) == size


def test_without_a_reserve_there_is_no_such_file(make_queue):
    queue = make_queue(reserve=0)
    assert not (Path(queue.engine.journal.folder) / "reserve").exists()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_the_file_system_cannot_allocate_the_reserve_is_written(make_queue, monkeypatch, code):
    """As NFS with musl, where the C library does not do it instead."""

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    queue = make_queue(reserve=50_000)
    queue.submit()
    assert (Path(queue.engine.journal.folder) / "reserve").stat().st_blocks * 512 >= 50_000


class SmallDisk:
    """In place of the write call of the journal: `free` bytes, and what the reserve gives back when it is cut."""

    def __init__(self, queue: Queue, monkeypatch: Any, free: int) -> None:
        self.free, self.reserve = free, queue.engine.journal._reserve
        self.path = Path(queue.engine.journal.folder) / "reserve"
        self.held = self.path.stat().st_size
        self.real = jobqueue._write_all
        monkeypatch.setattr(jobqueue, "_write_all", self.write)
        monkeypatch.setattr(os, "posix_fallocate", self.allocate)

    def write(self, fd: int, data: bytes) -> None:
        size = self.path.stat().st_size
        self.free, self.held = self.free + self.held - size, size
        taken, self.free = min(self.free, len(data)), max(0, self.free - len(data))
        self.real(fd, data[:taken])
        if taken < len(data):
            self.free += taken  # it will be cut off again
            raise OSError(errno.ENOSPC, "No space left on device")

    def allocate(self, fd: int, offset: int, length: int) -> None:
        if length - self.held > self.free:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.truncate(fd, length)


def test_on_a_full_disk_submits_are_refused_completions_land_and_service_resumes_by_itself(make_queue, monkeypatch):
    queue = make_queue(fsync="never", reserve=50_000)
    jobs = [queue.bring_to("processing") for _ in range(20)]
    disk = SmallDisk(queue, monkeypatch, free=2_000)
    accepted = []
    with pytest.raises(JobQueueError) as full:
        for number in range(1_000):
            accepted.append(queue.submit(number, queue="new").id)
    assert full.value.code == "disk_full"
    for job in jobs:
        refused("disk_full", queue.submit)
        assert queue.complete(job).job.state == "completed"
    assert disk.path.stat().st_size == 0
    disk.free += 100_000  # somebody has made room
    accepted.append(queue.submit(queue="new").id)
    assert disk.path.stat().st_size == 50_000, "the reserve is there again"
    monkeypatch.undo()
    queue.restart("crash")
    assert [job.id for job in reversed(queue.jobs(queue="new"))] == accepted
    assert queue.engine.stats()["completed"] == len(jobs)


# -- when the disk cannot be trusted any more


@pytest.fixture
def broken_queue(tmp_path, clock, monkeypatch) -> Iterator[tuple[Queue, threading.Event, Callable[[], None]]]:
    """(queue, failed, break_it): after break_it() each sync fails with EIO; `failed` is set when the engine says so."""
    failed = threading.Event()
    engine = jobqueue.LocalEngine(jobqueue.Settings(data_dir=str(tmp_path / "data")), clock, failed.set)

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    yield Queue(engine, clock, again=None), failed, lambda: monkeypatch.setattr(jobqueue, "_sync_data", broken)
    engine.close()


@pytest.mark.parametrize("what", ANSWERS)
def test_a_sync_that_fails_stops_the_engine_and_whoever_waits_learns_that_the_outcome_is_unknown(broken_queue, what):
    queue, failed, break_it = broken_queue
    verb = waits(queue)[what]
    held = queue.hold(queue="held")
    break_it()
    error = refused("outcome_unknown", verb)
    assert error.status == 503
    if what not in ("a batch", "completions", "a pause", "a clear"):
        assert error.job_id
    assert failed.wait(PATIENCE)
    assert queue.engine.journal.failure is not None
    # Nothing is acknowledged any more, and nothing is handed out as if it were.
    for refuse in (queue.submit, lambda: queue.submit_many(2), lambda: queue.engine.clear().result(PATIENCE)):
        refused("outcome_unknown", refuse)
    assert not held.done() or isinstance(held.exception(0), JobQueueError)


def test_a_failed_sync_is_said_once_with_what_to_do(broken_queue, caplog):
    queue, failed, break_it = broken_queue
    break_it()
    for _ in range(3):
        refused("outcome_unknown", queue.submit)
    assert failed.wait(PATIENCE)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert queue.engine.journal.path in line
    assert "start again" in line


def test_a_failed_sync_leaves_no_closing_record(broken_queue, clock):
    queue, failed, break_it = broken_queue
    job = queue.submit()
    break_it()
    refused("outcome_unknown", queue.submit)
    queue.engine.close()
    data = journal_of(queue.engine).read_bytes()
    assert records_of(data)[-1]["op"] != "close"
    assert job.id.encode() in data


def test_a_half_written_record_that_cannot_be_cut_off_stops_the_engine(broken_queue, monkeypatch, clock):
    queue, failed, _ = broken_queue
    job = queue.submit()
    ftruncate = os.ftruncate

    def stuck(fd: int, size: int) -> None:
        if fd == queue.engine.journal._file:
            raise OSError(errno.EIO, "Input/output error")
        ftruncate(fd, size)

    monkeypatch.setattr(os, "ftruncate", stuck)
    with full_disk(queue, 10):
        refused("outcome_unknown", queue.submit)
    assert failed.wait(PATIENCE)
    refused("outcome_unknown", queue.submit)
    monkeypatch.undo()
    queue.engine.close()
    engine = open_engine(Path(queue.engine.journal.folder), clock)
    assert [found.id for found in listing(engine)] == [job.id]
    assert list(Path(engine.journal.folder).glob("*.torn-1"))
    engine.close()


def test_the_checksum_is_the_usual_one(make_queue):
    """CRC-32 as in zlib, over all that follows it in its line: a few lines of any language can verify a journal."""
    queue = make_queue()
    queue.bring_to("completed")
    for line in lines_of(journal_of(queue.engine).read_bytes()):
        record = json.loads(line)
        assert list(record)[:4] == ["crc", "seq", "synced", "op"]
        assert int(record["crc"], 16) == zlib.crc32(line[len('{"crc":"01234567",') :])


def test_a_journal_that_could_not_be_cut_back_names_the_job_that_may_be_there(make_queue, monkeypatch):
    """A client without a key could not find it otherwise, and would hand it in twice."""
    queue = make_queue()

    def short(fd: int, data: bytes) -> None:
        os.write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(jobqueue, "_write_all", short)
    monkeypatch.setattr(os, "ftruncate", refuse)
    error = refused("outcome_unknown", queue.submit)
    assert re.fullmatch(r"[0-9a-f-]{36}", error.job_id)


# -- a disk that refuses for a while


@pytest.fixture
def refusing(make_queue, monkeypatch) -> Iterator[tuple[Queue, threading.Event, list[bytes]]]:
    """(queue, full, tries): while `full` is set each write fails, and is noted."""
    queue, full, tries = make_queue(reserve=0), threading.Event(), []
    write_all = jobqueue._write_all

    def write(fd: int, data: bytes) -> None:
        if full.is_set():
            tries.append(data)
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(fd, data)

    monkeypatch.setattr(jobqueue, "_write_all", write)
    return queue, full, tries


def test_what_is_due_by_the_thousand_is_tried_once_a_second_on_a_full_disk(refusing, caplog):
    queue, full, tries = refusing
    for _ in range(300):
        queue.submit(delay=5)
    full.set()
    for _ in range(20):
        queue.advance(0.5)
    assert 3 <= len(tries) <= 20
    assert len(caplog.records) <= 20
    full.clear()
    queue.advance(2)
    assert queue.engine.stats()["pending"] == 300


def test_disk_full_is_a_figure_as_long_as_writes_are_refused(refusing):
    queue, full, _ = refusing
    assert queue.engine.figures()["disk_full"] == 0
    full.set()
    refused("disk_full", queue.submit)
    assert queue.engine.figures()["disk_full"] == 1
    full.clear()
    queue.submit()
    assert queue.engine.figures()["disk_full"] == 0


def test_a_client_that_hung_up_while_the_disk_was_full_still_cancels_its_job(refusing):
    queue, full, _ = refusing
    future = queue.hold(tied=True)
    full.set()
    assert future.cancel()
    job = queue.jobs()[0]
    assert queue.state(job) == "pending"
    full.clear()
    queue.advance(1)
    assert queue.state(job) == "cancelled"


def test_a_page_of_requeued_jobs_is_written_whole_or_not_at_all(refusing):
    queue, full, _ = refusing
    jobs = [queue.bring_to("failed") for _ in range(3)]
    full.set()
    refused("disk_full", queue.engine.requeue_some, "failed", None, None)
    assert [queue.state(job) for job in jobs] == ["failed"] * 3
    full.clear()
    assert queue.engine.requeue_some("failed", None, None) == (3, None)
    queue.restart("crash")
    assert [queue.state(job) for job in jobs] == ["pending"] * 3


def test_the_journal_stays_small_after_a_compaction_when_nothing_was_alive(make_queue):
    queue = make_queue(compact_bytes=10_000, keep_jobs=2)
    for _ in range(40):
        queue.submit()
    queue.engine.clear().result(PATIENCE)
    wait_for_compaction()
    for _ in range(150):
        queue.bring_to("completed", payload=b"x" * 1000)
        wait_for_compaction()
        assert queue.engine.journal.size < 60_000


def test_without_a_thread_for_it_a_compaction_is_put_off(make_queue, monkeypatch, caplog):
    queue = make_queue(compact_bytes=1_000, keep_jobs=1)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(5):
            queue.bring_to("completed")
    assert queue.engine.figures()["compactions_total"] == 0
    assert sum("compaction_failed" in record.getMessage() for record in caplog.records) == 1
    queue.advance(10)
    queue.bring_to("completed")
    wait_for_compaction()
    assert queue.engine.figures()["compactions_total"] >= 1  # a quick one may be followed by a second


def test_room_that_was_given_back_once_is_not_counted_as_given_back_again(make_queue, monkeypatch):
    """Else the half of the reserve that is for results would go to leases, half by half."""
    queue = make_queue()
    journal = queue.engine.journal
    monkeypatch.setattr(journal._reserve, "fill", lambda: False)  # as on a full disk
    assert journal.spend()
    for _ in range(10):
        queue.engine.pause("p", True).result(PATIENCE)
    began = journal._spent_at
    assert began < journal.size
    assert not journal.spend()
    assert journal._spent_at == began


def test_on_a_full_disk_there_is_one_compaction_in_ten_seconds_also_where_nothing_is_alive(make_queue, monkeypatch):
    queue = make_queue()
    for _ in range(5):
        queue.submit()
    queue.engine.clear().result(PATIENCE)
    monkeypatch.setattr(queue.engine.journal._reserve, "fill", lambda: False)
    queue.engine.journal.spend()  # as after a write that was refused; the compaction itself has room
    queue.engine._disk_full()
    for _ in range(50):
        queue.engine.peek(("default",))
        wait_for_compaction()
    assert queue.engine.figures()["compactions_total"] == 1


def test_a_compaction_of_a_full_disk_does_not_put_off_the_next_one_once_there_is_room(make_queue, monkeypatch):
    """Or the journal fills the disk itself in the seconds until then."""
    queue = make_queue(compact_bytes=10_000, keep_jobs=1)
    with monkeypatch.context() as patch:
        patch.setattr(queue.engine.journal._reserve, "fill", lambda: False)
        for _ in range(3):
            queue.bring_to("completed")
        queue.engine.journal.spend()
        queue.engine._disk_full()
        queue.engine.peek(("default",))
        wait_for_compaction()
    assert queue.engine.figures()["compactions_total"] == 1
    for _ in range(30):
        queue.bring_to("completed", payload=b"x" * 1000)
        wait_for_compaction()
    assert queue.engine.figures()["compactions_total"] > 1
    assert queue.engine.journal.size < 20_000


def test_after_a_crash_the_name_of_the_file_is_on_the_disk_before_anything_is_acknowledged(make_queue, monkeypatch):
    """The crash may have come between a compaction's rename and the sync of its folder."""
    queue = make_queue()
    queue.submit()
    copy = crash_copy(queue.engine, Path(queue.engine.journal.folder).with_name("copy"))
    done: list[str] = []
    for name in ("_sync_folder", "_sync_data", "_write_all"):
        real = getattr(jobqueue, name)
        monkeypatch.setattr(
            jobqueue, name, lambda *given, name=name, real=real: (done.append(name), real(*given))[1]
        )
    engine = open_engine(copy, queue.clock)
    assert "_sync_folder" in done
    rest = done[done.index("_sync_folder") :]
    assert "_write_all" in rest, "the opening record comes after it"
    engine.close()


def test_that_a_job_is_cancelled_already_is_told_once_that_is_on_the_disk(make_queue, monkeypatch):
    queue = make_queue()
    job, real, goes_on = queue.submit(), jobqueue._sync_data, threading.Event()

    def slow(fd: int) -> None:
        assert goes_on.wait(PATIENCE)
        real(fd)

    monkeypatch.setattr(jobqueue, "_sync_data", slow)
    first, second = (queue.engine.cancel(job.id) for _ in range(2))
    assert not (first.done() or second.done())
    goes_on.set()
    assert first.result(PATIENCE).state == "cancelled"
    refused("job_finished", lambda: second)


def test_whoever_cancels_for_the_second_time_when_the_disk_fails_is_told_which_job(make_queue, monkeypatch):
    queue = make_queue()
    job, goes_on = queue.submit(), threading.Event()

    def fails(fd: int) -> None:
        assert goes_on.wait(PATIENCE)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(jobqueue, "_sync_data", fails)
    both = [queue.engine.cancel(job.id) for _ in range(2)]
    goes_on.set()
    assert [refused("outcome_unknown", lambda one=one: one).job_id for one in both] == [job.id] * 2
