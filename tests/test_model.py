"""The engine against a model of it: a plain dict, written from the contract and not from the engine.

Hypothesis, or chance, chooses what clients, workers, administrators, time and crashes do; after each step the engine
must show exactly the jobs that the model has. A failure is shrunk to a short story that shows it.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import jobqueue
from engine_contract import batch, submission
from jobqueue import Claim, JobQueueError

# Hypothesis shrinks a failure best, and takes four times as long for a step as the engine and the model together.
STEPS_BY_HYPOTHESIS, STEPS_BY_CHANCE, LONG_STEPS = 8_000, 42_000, 2_000_000
FINAL = ("completed", "failed", "expired", "cancelled")
LEASE, KEEP, KEEP_FAILED, KEEP_JOBS, MAX_JOBS = 30, 100, 200, 6, 25
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# A small journal is compacted every few dozen steps. Nothing is synced: what is written is what a kill -9 leaves,
# and a torn restart cuts anywhere behind the last record that was known to be on the disk.
SETTINGS = jobqueue.Settings(
    fsync="never", reserve=0, compact_bytes=6_000, lease=LEASE, keep_completed=KEEP, keep_failed=KEEP_FAILED,
    keep_jobs=KEEP_JOBS, max_jobs=MAX_JOBS,
)  # fmt: skip


class Job(NamedTuple):
    """A job as the model sees it. `due` ends its delay, its lease or its keeping, whichever its state has."""

    number: int
    id: str
    queue: str
    priority: int
    payload: bytes
    attempts: int
    lease: float | None
    ttl: float | None
    key: str | None
    state: str
    failures: int = 0
    deliveries: int = 0
    result: bytes | None = None
    error: str | None = None
    token: str | None = None
    ended_by: str | None = None  # how the latest lease ended: the verb, or "lapse"; None while it is in force
    lease_seconds: float | None = None
    delay: float = 0.0
    due: float = 0.0  # monotonic, as expires is
    expires: float | None = None
    due_wall: int = 0  # the same in microseconds of the wall clock, for a restart
    expires_wall: int | None = None
    ended: float = 0.0  # monotonic

    @property
    def shown(self) -> tuple:
        """What the engine must show of it."""
        return (
            self.id, self.number, self.queue, self.priority, self.payload, self.state, self.failures, self.deliveries,
            self.result, self.error, self.token,
        )  # fmt: skip


def shown(job: jobqueue.Job) -> tuple:
    return (
        job.id, job.number, job.queue, job.priority, job.payload, job.state, job.failures, job.deliveries,
        job.result, job.error, job.token,
    )  # fmt: skip


class Refused(Exception):
    """The model's refusal; the argument is the code."""


class Waiting(NamedTuple):
    """Somebody who waits: a poll (with its claim) or a client (for a job)."""

    future: Any
    since: int  # rises
    until: float | None
    claim: Claim | None = None
    job_id: str | None = None
    tied: bool = False
    outcome_of: str | None = None  # the poll came with the completion of this job


class StillClock:
    """Time that only the machine moves, and a timer's thread that sleeps through it.

    Each verb settles what the clock has brought before it does anything, so a run is the same each time.
    """

    def __init__(self, now: float, wall: float) -> None:
        self.now, self.ahead, self.released = now, wall - now, False

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.ahead

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        if threading.current_thread().name == "jobqueue-timer":
            condition.wait_for(lambda: self.released)
        else:
            condition.wait()


def microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


def voided(token: str | None) -> dict[str, Any]:
    """Who ends a lease without its token ends it for the holder, too, whose own call is no repetition of it."""
    return {"token": None} if token is None else {}


class Model:
    """What is there, by the contract. A verb changes it or raises Refused."""

    def __init__(self, clock: StillClock) -> None:
        self.clock = clock
        self.jobs: dict[str, Job] = {}
        self.keys: dict[str, str] = {}
        self.paused: set[str] = set()
        self.all_paused = False
        self.forgotten: dict[str, Job] = {}
        self.drift = 0  # microseconds by which the wall clock was set, and moments not yet

    def copy(self) -> tuple:
        return dict(self.jobs), dict(self.keys), set(self.paused), self.all_paused, dict(self.forgotten)

    def put_back(self, saved: tuple) -> None:
        jobs, keys, paused, self.all_paused, forgotten = saved
        self.jobs, self.keys, self.paused, self.forgotten = dict(jobs), dict(keys), set(paused), dict(forgotten)

    # -- time

    def wall(self) -> int:
        return microseconds(self.clock.time())

    def settle(self) -> None:
        """What time has brought."""
        now = self.clock.now
        for job in list(self.jobs.values()):
            over = job.expires is not None and job.expires <= now
            if job.state in ("delayed", "pending") and over:
                self.end(job, "expired")
            elif job.state == "delayed" and job.due <= now:
                self.set(job, state="pending")
            elif job.state == "processing" and job.due <= now:
                job = self.set(job, failures=job.failures + 1, ended_by="lapse", state="pending")
                if job.failures >= job.attempts:
                    error = f"the lease of {job.lease_seconds:g} s ran out on attempt {job.failures}"
                    self.end(job, "failed", error=error)
                elif over:
                    self.end(job, "expired")
            elif job.state in FINAL and job.due <= now:
                self.forget(job)

    def clock_is_set(self, seconds: float) -> None:
        """By 10 s or more in all, moments move along."""
        self.drift += microseconds(seconds)
        if abs(self.drift) >= 10_000_000:
            self.shift(self.drift)
            self.drift = 0

    def shift(self, by: int) -> None:
        for jobs in (self.jobs, self.forgotten):
            for job in list(jobs.values()):
                expires = job.expires_wall and job.expires_wall + by
                jobs[job.id] = job._replace(due_wall=job.due_wall + by, expires_wall=expires)

    def restarted(self) -> None:
        """What a restart brings back, from the times on the wall: nothing waits longer than its own span."""
        wall, now = self.wall(), self.clock.now

        self.drift = 0

        def left(moment: int, span: float) -> float:
            return min(span, max(0.0, (moment - wall) / 1e6))

        for job in list(self.jobs.values()):
            if job.ttl is not None and job.state not in FINAL:
                job = self.set(job, expires=now + left(job.expires_wall, job.ttl))
            if job.state == "delayed":
                self.set(job, due=now + left(job.due_wall, job.delay))
            elif job.state == "processing":
                self.set(job, due=now + job.lease_seconds)
            elif job.state in FINAL:
                keep = KEEP_FAILED if job.state == "failed" else KEEP
                due = now + left(job.due_wall, keep)
                self.set(job, due=due, ended=due - keep)
        self.keys = {job.key: job.id for job in sorted(self.jobs.values()) if job.key is not None}

    # -- changes

    def set(self, job: Job, **changes: Any) -> Job:
        job = self.jobs[job.id] = job._replace(**changes)
        return job

    def end(self, job: Job, state: str, **changes: Any) -> Job:
        keep = KEEP_FAILED if state == "failed" else KEEP
        now = self.clock.now
        due_wall = self.wall() + microseconds(keep)
        return self.set(job, state=state, due=now + keep, due_wall=due_wall, ended=now, **changes)

    def forget(self, job: Job) -> None:
        self.forgotten[job.id] = self.jobs.pop(job.id)
        if self.keys.get(job.key) == job.id:
            del self.keys[job.key]

    def find(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise Refused("job_not_found")
        return self.jobs[job_id]

    def may_settle(self, job: Job, token: str | None, verb: str) -> bool:
        """True: yes. False: it did so before, with the same token."""
        own = token is not None and token == job.token
        if own and job.ended_by == verb:
            return False
        if job.state in FINAL:
            raise Refused("job_finished")
        if token is None:
            if job.state == "processing" or (job.state, job.ended_by) == ("pending", "lapse"):
                return True
            raise Refused("job_not_leased")
        if own and job.ended_by in (None, "lapse"):
            return True
        raise Refused("lease_lost")

    # -- the line

    def available(self, queue: str) -> list[Job]:
        """What may be handed out of a queue, in order."""
        if self.all_paused or queue in self.paused:
            return []
        now = self.clock.now
        line = [
            job
            for job in self.jobs.values()
            if job.queue == queue and job.state == "pending" and (job.expires is None or job.expires > now)
        ]
        return sorted(line, key=lambda job: (-job.priority, job.number))

    def next_jobs(self, claim: Claim) -> list[Job]:
        line = itertools.chain.from_iterable(self.available(queue) for queue in claim.queues)
        return list(itertools.islice(line, claim.max))

    def hand_out(self, given: jobqueue.Job, claim: Claim) -> None:
        job = self.jobs[given.id]
        seconds = claim.lease or job.lease or LEASE
        job = self.set(
            job, state="processing", token=given.token, ended_by=None, deliveries=job.deliveries + 1,
            lease_seconds=seconds, due=self.clock.now + seconds,
        )  # fmt: skip
        assert shown(given) == job.shown
        assert given.lease_seconds == seconds


# -- what can be chosen

QUEUES = ("a", "b")
POLLS = (("a",), ("b",), ("a", "b"), ("b", "a"))
SUBMITS = [
    {"queue": queue, "priority": priority, "delay": delay, "ttl": ttl, "lease": lease, "attempts": attempts}
    for attempts in (3, 1, 2)
    for lease in (None, 2)
    for ttl in (None, None, 4, 12)
    for delay in (0.0, 0.0, 3.0)
    for priority in (0, 9)
    for queue in QUEUES
]
CLAIMS = [
    Claim(queues, max=count, lease=lease, wait=wait)
    for wait in (0.0, 0.0, 6.0)
    for lease in (None, 5, 1)
    for count in (1, 3)
    for queues in POLLS
]
ADMINISTRATION = [
    *["requeue_failed", "requeue_expired", "requeue_cancelled"] * 2,
    *["pause_a", "pause_all", "resume_a", "resume_all", "resume_all"],
    "clear",
]
RETRIES = [(True, None), (True, 0), (True, 0), (True, 2.5), (False, None)]
AFTER = {
    "ripen": "pending", "lease": "processing", "extend": "processing", "complete": "completed", "fail": "failed",
    "retry": "delayed", "retry_now": "pending", "release": "pending", "give_back": "pending", "lapse": "pending",
    "expire": "expired", "cancel": "cancelled", "requeue": "pending",
}  # fmt: skip
TAILS = {"nothing": b"", "zeros": bytes(500), "garbage": b"garbage\nmore", "half a line": b'{"crc":"'}
STEPS_OF_TIME = ["next", "next", "before", "after", 0.5, 1.0, 3.0, 10.0, 40.0, 250.0]

SOME = range(8)  # which of those that are there, the latest first
ANY = range(40)
TOKENS = ["own", "own", "own", "none", "wrong"]
SOME_WITH_TOKENS = [
    *([(first, "own"), (second, token)] for first in range(3) for second in range(4) for token in TOKENS[2:]),
    *([(0, "own"), (1, "none"), (2, "own"), (third, "own")] for third in range(6)),
    [],
]

STEPS: dict[str, tuple[int, Callable, dict[str, Any]]] = {}


def step(weight: int = 4, when: Callable[[Any], Any] = lambda machine: True, **choices: Any) -> Callable:
    """A rule of the machine, whose arguments are taken from `choices`, and which is possible `when`."""

    def made(method: Callable) -> Callable:
        STEPS[method.__name__] = (weight, when, choices)
        strategies = {name: st.sampled_from(list(values)) for name, values in choices.items()}
        return precondition(when)(rule(**strategies)(method))

    return made


def has_handed(machine: Any) -> bool:
    return bool(machine.handed)


def has_jobs(machine: Any) -> bool:
    return bool(machine.model.jobs)




class EngineMachine(RuleBasedStateMachine):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="jobqueue-model-", dir=MEMORY))
        self.folders = itertools.count()
        self.names = itertools.count(1)
        self.waiting: list[Waiting] = []
        self.handed: list[tuple[str, str]] = []  # every (job, token) that a worker ever got, the latest last
        self.tokens: set[str] = set()
        self.doubtful: set[str | None] = set()  # keys
        self.clock = StillClock(1_000.0, 1_700_000_000.0)
        self.model = Model(self.clock)
        self.engine = self.open(self.root / "0")
        self.order = itertools.count()
        self.saved: dict[int, tuple] = {}  # the model after each verb of this run, by the number of the last record
        self.begin()

    def open(self, folder: Path) -> jobqueue.LocalEngine:
        settings = copy.copy(SETTINGS)
        settings.data_dir = str(folder)
        return jobqueue.LocalEngine(settings, self.clock)

    def begin(self) -> None:
        """The first record of a run only says that it began."""
        self.saved = {self.engine.journal.synced - 1: self.model.copy()}
        self.lately = 0  # steps since the last restart, which costs as much as ten of them

    def wait_for_compaction(self) -> None:
        """So that the same story gives the same file; what happens meanwhile is tested elsewhere."""
        if self.engine.journal.size > SETTINGS.compact_bytes:
            for thread in threading.enumerate():
                if thread.name == "jobqueue-compact":
                    thread.join()

    def remember(self) -> None:
        self.saved[self.engine.journal.seq] = self.model.copy()

    def teardown(self) -> None:
        self.close()
        shutil.rmtree(self.root)

    def close(self) -> None:
        self.clock.released = True
        self.engine.close()

    # -- one step

    def both(self, verb: Callable[[], Any], expected: Callable[[], Any]) -> tuple[Any, Any]:
        """Run a verb on both sides. The answers, or (None, None) where both refuse for the same reason."""
        self.model.settle()
        try:
            answer = verb()
            answer = answer.result(0) if isinstance(answer, jobqueue.Future) and answer.done() else answer
            code = None
        except JobQueueError as error:
            answer, code = None, error.code
        try:
            wanted, refused = expected(), None
        except Refused as refusal:
            wanted, refused = None, str(refusal)
        assert code == refused, f"the engine says {code or 'yes'}, the contract {refused or 'yes'}"
        return answer, wanted

    def check(self) -> None:
        """After each step: who has been answered, and whether both sides show the same."""
        type(self).steps += 1
        self.lately += 1
        self.see_polls()
        self.model.settle()
        jobs, cursor = self.engine.jobs(None, None, 1_000, None)
        assert cursor is None
        self.wait_for_compaction()
        self.see_polls()
        self.forget({job.id for job in jobs})
        expected = sorted(self.model.jobs.values(), reverse=True)
        assert [job.id for job in jobs] == [job.id for job in expected]
        for job, there in zip(jobs, expected, strict=True):
            assert shown(job) == there.shown
        self.see_clients()
        for who in self.waiting:
            assert who.until is None or who.until > self.clock.now, "still waiting although its time is over"
            if who.claim:
                assert not self.model.next_jobs(who.claim), "a job and a worker wait for each other"
        self.remember()

    def forget(self, there: set[str]) -> None:
        """Finished jobs that are too many: the oldest are gone."""
        model = self.model
        final = sorted((job for job in model.jobs.values() if job.state in FINAL), key=lambda job: job.ended)
        gone = [job for job in final if job.id not in there]
        assert len(gone) == max(0, len(final) - KEEP_JOBS)
        if gone:
            kept = [job.ended for job in final if job.id in there]
            assert max(job.ended for job in gone) <= min(kept, default=gone[-1].ended), "not the oldest went"
        for job in gone:
            model.forget(job)

    def see_polls(self) -> None:
        """Jobs that were handed to polls in line. Which poll gets which job is free where several come at once, but
        nobody is passed over, and no better job is left behind."""
        answered = [who for who in self.waiting if who.claim and who.future.done()]
        for who in answered:
            self.waiting.remove(who)
            answer = who.future.result(0)
            if who.outcome_of:
                outcome, answer = answer, [answer.next] if answer.next else []
                assert outcome.job.state == "completed"
                assert outcome.job.id == who.outcome_of
            if not answer:
                assert who.until <= self.clock.now, "answered empty before its time"
                continue
            assert len(answer) <= who.claim.max
            order = [(who.claim.queues.index(job.queue), -job.priority, job.number) for job in answer]
            assert order == sorted(order)
            for job in answer:
                line = self.model.available(job.queue)
                assert job.id in [there.id for there in line], "handed out although it may not be"
                self.hand_out(job, who.claim)
                for other in self.waiting:
                    if other.claim and job.queue in other.claim.queues and not other.future.done():
                        assert other.since > who.since, "one who waited longer was passed over"

    def hand_out(self, given: jobqueue.Job, claim: Claim) -> None:
        assert given.token not in self.tokens, "a token was given twice"
        self.tokens.add(given.token)
        self.handed.append((given.id, given.token))
        self.model.hand_out(given, claim)

    def see_clients(self) -> None:
        for who in [who for who in self.waiting if who.job_id]:
            job = self.model.jobs.get(who.job_id) or self.model.forgotten.get(who.job_id)
            late = who.until is not None and who.until <= self.clock.now
            over = job is None or job.state in FINAL or late
            assert who.future.done() == over
            if not over:
                continue
            self.waiting.remove(who)
            if job is None:
                assert isinstance(who.future.exception(0), JobQueueError)
                assert who.future.exception(0).code == "job_cleared"
                continue
            told, _ = who.future.result(0)
            assert told.id == job.id
            # A wait that ended in the same step of time may have ended before the job did.
            assert told.state == job.state or (late and told.state not in FINAL)

    def wait(self, future: Any, seconds: float | None, **what: Any) -> None:
        until = None if seconds is None else self.clock.now + seconds
        self.waiting.append(Waiting(future, next(self.order), until, **what))

    def pick(self, which: int) -> tuple[str, str]:
        return self.handed[-1 - which % len(self.handed)]

    def token(self, own: str, which: str) -> str | None:
        return {"own": own, "none": None, "wrong": "guessed"}[which]

    # -- clients

    def new_job(self, given: dict[str, Any], job: jobqueue.Job) -> Job:
        model, fields = self.model, dict(given)
        fields.pop("kind"), fields.pop("headers")
        wall, now = model.wall(), self.clock.now
        made = Job(job.number, job.id, state="delayed" if fields["delay"] else "pending", **fields)
        made = made._replace(due=now + made.delay, due_wall=wall + microseconds(made.delay))
        if made.ttl is not None:
            made = made._replace(expires=now + made.ttl, expires_wall=wall + microseconds(made.ttl))
        assert made.number > max((other.number for other in model.jobs.values()), default=0)
        model.jobs[made.id] = made
        if made.key is not None:
            model.keys[made.key] = made.id
        return made

    def room(self, count: int) -> None:
        if sum(job.state not in FINAL for job in self.model.jobs.values()) + count > MAX_JOBS:
            raise Refused("queue_full")

    def fields(self, options: dict[str, Any], key: str | None = None, payload: int | None = None) -> dict[str, Any]:
        payload = next(self.names) if payload is None else payload
        return {**options, "payload": b"%d" % payload, "kind": "json", "headers": "{}", "key": key}

    @step(10, options=SUBMITS, wait=[0, 0, 5, None], tied=[False, True])
    def submit(self, options: dict[str, Any], wait: float | None, tied: bool) -> None:
        self.do_submit(self.fields(options), wait, tied)

    @step(5, key="kl", payload=[0, 1], options=SUBMITS, wait=[0, 5])
    def submit_with_key(self, key: str, payload: int, options: dict[str, Any], wait: float) -> None:
        if key in self.doubtful:
            return
        self.do_submit(self.fields(options, key, payload), wait, False)

    def do_submit(self, given: dict[str, Any], wait: float | None, tied: bool) -> None:
        model = self.model

        def expected() -> str | None:
            known = model.keys.get(given["key"])
            if known is None:
                self.room(1)
            elif (model.jobs[known].payload, model.jobs[known].queue) != (given["payload"], given["queue"]):
                raise Refused("key_reused")
            return known

        future, known = self.both(lambda: FutureOf(self.engine.submit(*submission(given), wait, tied)), expected)
        if future is not None:
            self.accepted(given, future.future, known, wait, tied)
        self.check()

    def accepted(self, given: dict[str, Any], future: Any, known: str | None, wait: float | None, tied: bool) -> None:
        job = None if known else self.newest()
        if known is None:
            known = self.new_job(given, job).id
            replayed = False
        else:
            replayed = True
        if wait == 0 or self.model.jobs[known].state in FINAL:
            job, was_there = future.result(0)
            assert (job.id, was_there) == (known, replayed)
            return
        self.wait(future, wait, job_id=known, tied=tied)

    def newest(self) -> jobqueue.Job:
        return self.engine.jobs(None, None, 1, None)[0][0]

    @step(3, options=SUBMITS, count=[1, 2, 3, 4, 5])
    def submit_many(self, options: dict[str, Any], count: int) -> None:
        fields = [self.fields(options) for _ in range(count)]
        ids, _ = self.both(lambda: self.engine.submit_many(*batch(fields)), lambda: self.room(count))
        if ids is not None:
            jobs, _ = self.engine.jobs(None, None, count, None)
            assert [job.id for job in reversed(jobs)] == ids
            for given, job in zip(fields, reversed(jobs), strict=True):
                self.new_job(given, job)
        self.check()

    @step(2, has_jobs, which=ANY)
    def cancel(self, which: int) -> None:
        self.model.settle()
        if not self.model.jobs:
            return
        jobs = sorted(self.model.jobs.values(), reverse=True)
        job = jobs[which % len(jobs)]

        def expected() -> None:
            if self.model.find(job.id).state in FINAL:
                raise Refused("job_finished")
            self.model.end(self.model.jobs[job.id], "cancelled")

        self.both(lambda: self.engine.cancel(job.id), expected)
        self.check()

    @step(2, lambda machine: machine.waiting, which=SOME)
    def hang_up(self, which: int) -> None:
        self.settle_both()
        if not self.waiting:
            return
        who = self.waiting.pop(which % len(self.waiting))
        assert who.future.cancel()
        if who.tied and not any(other.job_id == who.job_id for other in self.waiting):
            self.model.end(self.model.jobs[who.job_id], "cancelled")
        self.check()

    def settle_both(self) -> None:
        """Let both sides see the time, so that what is chosen next is chosen from what is there."""
        self.model.settle()
        self.engine.stats()
        self.check()

    # -- workers

    @step(12, claim=CLAIMS)
    def poll(self, claim: Claim) -> None:
        future, expected = self.both(lambda: FutureOf(self.engine.poll(claim)), lambda: self.model.next_jobs(claim))
        self.got(future.future, claim, expected)
        self.check()

    def got(self, future: Any, claim: Claim, expected: list[Job]) -> None:
        if not expected and claim.wait:
            self.wait(future, claim.wait, claim=claim)
            return
        jobs = future.result(0)
        assert [job.id for job in jobs] == [job.id for job in expected]
        for job in jobs:
            self.hand_out(job, claim)

    @step(6, has_handed, which=SOME, token=TOKENS, claim=[None, *CLAIMS[::3]])
    def complete(self, which: int, token: str, claim: Claim | None) -> None:
        job_id, own = self.pick(which)
        result = b"%d" % next(self.names)
        model, given = self.model, self.token(own, token)

        def expected() -> bool:
            job = model.find(job_id)
            if not model.may_settle(job, given, "complete"):
                return True
            model.end(job, "completed", result=result, ended_by="complete", **voided(given))
            return False

        claim = claim and claim._replace(max=1)
        future, duplicate = self.both(
            lambda: FutureOf(self.engine.complete(job_id, given, result, "json", None, claim)), expected
        )
        if future is not None:
            following = self.model.next_jobs(claim) if claim else []
            if claim and claim.wait and not following:
                self.wait(future.future, claim.wait, claim=claim, outcome_of=job_id)
            else:
                outcome = future.future.result(0)
                assert (outcome.job.id, outcome.duplicate) == (job_id, duplicate)
                assert ([outcome.next.id] if outcome.next else []) == [job.id for job in following]
                if outcome.next:
                    self.hand_out(outcome.next, claim)
        self.check()

    @step(2, has_handed, which=SOME_WITH_TOKENS)
    def complete_many(self, which: list[tuple[int, str]]) -> None:
        picked = [(*self.pick(number), token) for number, token in which]
        results = [(job_id, self.token(own, token), b"%d" % next(self.names), "json", None)
                   for job_id, own, token in picked]
        model = self.model

        def expected() -> list[str]:
            answers = []
            for job_id, token, result, *_ in results:
                try:
                    job = model.find(job_id)
                    fresh = model.may_settle(job, token, "complete")
                    if fresh:
                        model.end(job, "completed", result=result, ended_by="complete", **voided(token))
                    answers.append("fresh" if fresh else "duplicate")
                except Refused as refusal:
                    answers.append(str(refusal))
            return answers

        outcomes, answers = self.both(lambda: self.engine.complete_many(results), expected)
        told = [
            outcome.code if isinstance(outcome, JobQueueError) else "duplicate" if outcome.duplicate else "fresh"
            for outcome in outcomes
        ]
        there = {job.id for job in self.engine.jobs(None, None, 1_000, None)[0]}
        for (job_id, *_), answer, wanted in zip(results, told, answers, strict=True):
            # Those that end first may push out an older one that is asked for later.
            assert answer == wanted or (answer == "job_not_found" and job_id not in there and wanted != "fresh")
        self.check()

    @step(6, has_handed, which=SOME, token=TOKENS, retry=RETRIES)
    def fail(self, which: int, token: str, retry: tuple[bool, float | None]) -> None:
        retry, delay = retry
        job_id, own = self.pick(which)
        error = f"error {next(self.names)}"
        model, given = self.model, self.token(own, token)

        def expected() -> str:
            job = model.find(job_id)
            if not model.may_settle(job, given, "fail"):
                return "duplicate"
            failures = job.failures + (job.ended_by != "lapse")  # a lease that ran out has been counted
            job = model.set(job, failures=failures, error=error, ended_by="fail", **voided(given))
            if not retry or failures >= job.attempts:
                return model.end(job, "failed").state
            if job.ttl is not None and job.expires <= self.clock.now:  # while the worker had it
                return model.end(job, "expired").state
            return model.set(job, state="pending" if delay == 0 else "delayed").state

        outcome, state = self.both(lambda: self.engine.fail(job_id, given, error, retry, delay), expected)
        if outcome is not None:
            assert outcome.duplicate == (state == "duplicate")
            if state == "delayed":
                self.delayed(job_id, delay, outcome.job)
        self.check()

    def delayed(self, job_id: str, delay: float | None, told: jobqueue.Job) -> None:
        """The backoff is random within its bounds, so the engine says what it is."""
        assert told.state == "delayed"
        if delay is None:
            middle = min(300, 2 ** (told.failures - 1))
            assert 0.8 * middle <= told.delay <= 1.2 * middle
        else:
            assert told.delay == delay
        job = self.model.jobs[job_id]
        wall = self.model.wall() + microseconds(told.delay)
        self.model.set(job, delay=told.delay, due=self.clock.now + told.delay, due_wall=wall)

    @step(4, has_handed, which=SOME, token=TOKENS)
    def release(self, which: int, token: str) -> None:
        job_id, own = self.pick(which)
        model, given = self.model, self.token(own, token)

        def expected() -> bool:
            job = model.find(job_id)
            if not model.may_settle(job, given, "release"):
                return True
            model.set(job, state="pending", ended_by="release", **voided(given))
            return False

        outcome, duplicate = self.both(lambda: self.engine.release(job_id, given), expected)
        assert outcome is None or outcome.duplicate == duplicate
        self.check()

    @step(4, has_handed, which=SOME, token=TOKENS, lease=[None, 4, 50])
    def extend(self, which: int, token: str, lease: float | None) -> None:
        job_id, own = self.pick(which)
        model, given = self.model, self.token(own, token)

        def expected() -> str:
            job = model.find(job_id)
            if job.state == "cancelled" and job.token is not None and given in (None, job.token):
                return "cancelled"  # the worker is told
            model.may_settle(job, given, "extend")
            seconds = lease or job.lease_seconds
            # A lease that had run out is in force again: no attempt was lost.
            failures = job.failures - (job.ended_by == "lapse")
            due = self.clock.now + seconds
            model.set(job, state="processing", ended_by=None, failures=failures, lease_seconds=seconds, due=due)
            return "processing"

        outcome, state = self.both(lambda: self.engine.extend(job_id, given, lease), expected)
        assert outcome is None or outcome.job.state == state
        self.check()

    @step(3, has_handed, which=SOME, count=[1, 2, 3])
    def give_back(self, which: int, count: int) -> None:
        picked = [self.pick(which + n) for n in range(count)]
        model = self.model
        given = [jobqueue.Job(0, job_id, "", 0, 0, b"", "json", "{}", 1, token=token) for job_id, token in picked]

        def expected() -> None:
            for job_id, token in picked:
                job = model.jobs.get(job_id)
                if job and (job.state, job.token) == ("processing", token):
                    model.set(job, state="pending", ended_by="give_back", deliveries=job.deliveries - 1)

        self.both(lambda: self.engine.give_back(given), expected)
        self.check()

    # -- administrators

    @step(3, has_jobs, which=ANY)
    def requeue(self, which: int) -> None:
        self.model.settle()
        if not self.model.jobs:
            return
        jobs = sorted(self.model.jobs.values(), reverse=True)
        job = jobs[which % len(jobs)]
        self.both(lambda: self.engine.requeue(job.id), lambda: self.requeued(job.id))
        self.check()

    def requeued(self, job_id: str) -> None:
        model = self.model
        job = model.find(job_id)
        if job.state == "completed":
            raise Refused("job_finished")
        if job.state in ("pending", "processing"):
            raise Refused("job_not_finished")
        job = model.set(job, state="pending", failures=0, error=None, ended_by="requeue")
        if job.ttl is not None:
            model.set(job, expires=self.clock.now + job.ttl, expires_wall=model.wall() + microseconds(job.ttl))

    @step(4, what=ADMINISTRATION)
    def administer(self, what: str) -> None:
        verb, _, which = what.partition("_")
        if verb == "clear":
            count, expected = self.both(self.engine.clear, self.cleared)
            assert count == expected
        elif verb == "requeue":
            answer, expected = self.both(
                lambda: self.engine.requeue_some(which, None, None), lambda: self.requeued_all(which)
            )
            assert answer == (expected, None)
        else:
            queue = None if which == "all" else which
            names, expected = self.both(
                lambda: self.engine.pause(queue, verb == "pause"), lambda: self.set_paused(queue, verb == "pause")
            )
            assert names == expected
        self.check()

    def cleared(self) -> int:
        count = len(self.model.jobs)
        self.model.jobs.clear()
        self.model.keys.clear()
        self.model.forgotten.clear()
        return count

    def requeued_all(self, state: str) -> int:
        jobs = [job for job in self.model.jobs.values() if job.state == state]
        for job in jobs:
            self.requeued(job.id)
        return len(jobs)

    def set_paused(self, queue: str | None, paused: bool) -> Any:
        model = self.model
        if queue is None:
            model.all_paused = paused
            if not paused:
                model.paused.clear()
        elif paused:
            model.paused.add(queue)
        else:
            model.paused.discard(queue)
        return "all" if model.all_paused else sorted(model.paused)

    @step(3, claim=CLAIMS)
    def look(self, claim: Claim) -> None:
        """All that only shows: the head of the line, the counts, a page of the listing."""
        model = self.model
        job, expected = self.both(lambda: self.engine.peek(claim.queues), lambda: model.next_jobs(claim))
        assert (job and job.id) == (expected[0].id if expected else None)
        stats = self.engine.stats()
        states = [job.state for job in model.jobs.values()]
        assert stats["total"] == len(states)
        for state in ("delayed", "pending", "completed", "failed", "expired", "cancelled"):
            assert stats[state] == states.count(state)
        assert stats["running"] == states.count("processing")
        assert stats["waiting_clients"] == sum(bool(who.job_id) for who in self.waiting)
        assert stats["waiting_workers"] == sum(bool(who.claim) for who in self.waiting)
        page, cursor = self.engine.jobs("a", None, claim.max, None)
        expected = sorted((job for job in model.jobs.values() if job.queue == "a"), reverse=True)
        assert [job.id for job in page] == [job.id for job in expected[: claim.max]]
        if cursor is not None:
            rest, _ = self.engine.jobs("a", None, 1_000, cursor)
            assert [job.id for job in rest] == [job.id for job in expected[claim.max :]]
        self.check()

    # -- time

    @step(14, by=STEPS_OF_TIME)
    def advance(self, by: str | float) -> None:
        self.clock.now += self.seconds(by) if isinstance(by, str) else by
        self.settle_both()

    def seconds(self, by: str) -> float:
        """Up to the next deadline, just before it, or past it."""
        moments = [job.due for job in self.model.jobs.values() if job.state != "pending"]
        moments += [job.expires for job in self.model.jobs.values() if job.state not in FINAL and job.expires]
        moments += [who.until for who in self.waiting if who.until is not None]
        ahead = min((moment for moment in moments if moment > self.clock.now), default=self.clock.now) - self.clock.now
        # On a grid of whole microseconds, so that no rounding of a moment on the wall is left to chance.
        ticks = math.ceil(ahead * 64) + {"next": 0, "before": -1, "after": 1}[by]
        return max(0, ticks) / 64

    @step(1, seconds=[2_592_000.0, -2_592_000.0, 5.0, -5.0])
    def set_the_wall_clock(self, seconds: float) -> None:
        self.clock.ahead += seconds
        self.model.clock_is_set(seconds)
        self.settle_both()

    # -- the end of the process

    @step(
        3,
        lambda machine: machine.lately > 4,
        how=["stop", "crash", "torn", "torn", "torn"],
        away=[0.0, 0.0, 3.0, 150.0, -1_000.0],
        at=[n / 50 for n in range(51)],
        tail=TAILS,
    )
    def restart(self, how: str, away: float, at: float, tail: str) -> None:
        """A clean stop, a kill -9, or a power cut that leaves the file cut anywhere behind what was synced."""
        folder = self.root / str(next(self.folders) + 1)
        old = Path(self.engine.journal.folder)
        self.settle_both()
        if how == "stop":
            self.close()
            old.rename(folder)
        else:
            folder.mkdir()
            data = (old / "journal.jsonl").read_bytes()
            if how == "torn":
                data = self.tear(data, at) + TAILS[tail]
            (folder / "journal.jsonl").write_bytes(data)
            self.close()
            shutil.rmtree(old)
        self.see_the_end()
        # Another boot: the monotonic clock counts from elsewhere, and somebody may have set the wall clock.
        self.clock = self.model.clock = StillClock(self.clock.now % 977 + 10, self.clock.time() + away)
        self.engine = self.open(folder)
        self.begin()
        self.restored()
        self.check()

    def tear(self, data: bytes, at: float) -> bytes:
        """Cut the file behind what was synced, and set the model back to what it then holds."""
        ends, records, end, synced, compacted = {}, {}, 0, 0, 0
        for line in data.splitlines(keepends=True):
            record = json.loads(line)
            end += len(line)
            ends[record["seq"]], records[record["seq"]] = end, record
            synced = max(synced, record["synced"])
            if record["op"] in ("journal", "meta", "job"):
                compacted = record["seq"]
        cut = ends[synced] + round(at * (end - ends[synced]))
        last = max(seq for seq, end in ends.items() if end <= cut)
        known = max(seq for seq in self.saved if seq <= last)
        if known < compacted:  # those records are no longer there to go on from
            last = known = min(seq for seq in self.saved if seq >= compacted)
            cut = ends[last]
        self.model.put_back(self.saved[known])
        for seq in range(max(known, compacted) + 1, last + 1):
            self.redo(records[seq])
        return data[:cut]

    def redo(self, record: dict[str, Any]) -> None:
        """The cut is in the middle of what wrote several records: those that are whole took effect."""
        model, verb = self.model, record["op"]
        if verb == "clear":
            self.cleared()
        elif verb == "pause":
            self.set_paused(record["queue"], record["paused"])
        elif verb in ("submit", "batch"):
            for made in record.get("jobs", [record]):
                fields = {name: made[name] for name in Job._fields if name in made}
                fields["payload"] = made["payload"].encode()
                job = Job(**{"lease": None, "ttl": None, "key": None, "state": "pending", **fields})
                model.jobs[job.id] = job._replace(due_wall=made.get("available", 0), expires_wall=made.get("expires"))
        elif verb == "clock":
            model.shift(record["shift"])
        elif "id" in record:
            job = model.jobs.get(record["id"]) or model.forgotten.pop(record["id"])
            names = ("failures", "deliveries", "error", "token", "lease_seconds", "delay")
            changes = {name: record[name] for name in names if name in record}
            job = model.set(job, state=AFTER[verb], ended_by=record.get("settled", job.ended_by), **changes)
            if "result" in record:
                job = model.set(job, result=record["result"].encode())
            if "expires" in record:
                job = model.set(job, expires_wall=record["expires"])
            if job.state in FINAL:
                keep = microseconds(KEEP_FAILED if job.state == "failed" else KEEP)
                model.set(job, due_wall=record["finished"] + keep)
            elif job.state == "delayed":
                model.set(job, due_wall=record["available"])

    def restored(self) -> None:
        """A job that was forgotten for being one too many may come back, since nobody wrote that down."""
        forgotten = self.model.forgotten
        for job in self.engine.jobs(None, None, 1_000, None)[0]:
            if job.id not in self.model.jobs and job.id in forgotten:
                self.model.jobs[job.id] = forgotten.pop(job.id)
                # Its key may have become a later job's, forgotten or not: then nobody can say whose it is from now on.
                others = [*forgotten.values(), *self.model.jobs.values()]
                if any(other.key == job.key and other.number > job.number for other in others):
                    self.doubtful.add(job.key)
        self.model.restarted()
        self.model.settle()
        there = {job.id for job in self.engine.jobs(None, None, 1_000, None)[0]}
        self.forget(there)

    def see_the_end(self) -> None:
        """Everybody has an answer when the engine has closed."""
        for who in self.waiting:
            assert who.future.done()
            if who.claim:
                answer = who.future.result(0)
                assert answer.next is None if who.outcome_of else answer == []
        self.waiting.clear()


class FutureOf:
    """Keeps `both` from looking into a future whose answer depends on the model."""

    def __init__(self, future: Any) -> None:
        self.future = future


Story = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def quiet():
    """Nobody reads the log lines of ten thousand restarts."""
    logger = logging.getLogger("jobqueue")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def told(story: Story, luck: int) -> Exception | None:
    """Let it happen; what went wrong, if anything did. `luck` is what the engine's backoff draws from."""
    random.seed(luck)
    machine = EngineMachine()
    try:
        for name, arguments in story:
            if STEPS[name][1](machine):
                getattr(machine, name)(**arguments)
    except Exception as error:
        return error
    finally:
        machine.teardown()
    return None


def shortened(story: Story, luck: int, seconds: float) -> Story:
    """The story without the steps that it fails without, as far as time allows."""
    until, size = time.monotonic() + seconds, len(story)
    while size := size // 2:
        at = len(story) - size
        while at >= 0 and time.monotonic() < until:
            shorter = story[:at] + story[at + size :]
            if told(shorter, luck):
                story = shorter
            at -= size
    return story


def tell_stories(steps: int, seed: int, length: int = 150) -> None:
    """Stories by chance: what Hypothesis does with more thought, at ten times the speed."""
    chance = random.Random(seed)
    names, weights = list(STEPS), [weight for weight, *_ in STEPS.values()]
    while steps > 0:
        story = [
            (name, {argument: chance.choice(list(values)) for argument, values in STEPS[name][2].items()})
            for name in chance.choices(names, weights, k=length)
        ]
        steps -= length
        luck = chance.randrange(1 << 32)
        if told(story, luck):
            story = shortened(story, luck, seconds=30)
            for name, arguments in story:
                print(f"    machine.{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
            raise told(story, luck) or AssertionError("the story fails, but not always")


def let_hypothesis_choose(steps: int, seed: int, examples: int) -> None:
    for number in itertools.count(seed):
        machine = hypothesis.seed(number)(type("EngineMachine", (EngineMachine,), {}))
        run_state_machine_as_test(
            machine,
            settings=hypothesis.settings(
                max_examples=examples,
                stateful_step_count=100,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
        steps -= machine.steps
        if steps <= 0:
            return


@pytest.fixture
def short_shrinking(monkeypatch):
    """A failure is reported before the test is timed out, with what was found by then."""
    monkeypatch.setattr("hypothesis.internal.conjecture.engine.MAX_SHRINKING_SECONDS", 40, raising=False)


@pytest.mark.timeout(300)
def test_the_engine_does_what_a_plain_dict_does_when_hypothesis_chooses(seed, quiet, short_shrinking):
    let_hypothesis_choose(STEPS_BY_HYPOTHESIS, seed, examples=80)


@pytest.mark.timeout(300)
def test_the_engine_does_what_a_plain_dict_does_in_stories_by_chance(seed, quiet):
    tell_stories(STEPS_BY_CHANCE, seed)


@pytest.mark.long
def test_the_engine_does_what_a_plain_dict_does_for_long(seed, quiet, short_shrinking):
    let_hypothesis_choose(20 * STEPS_BY_HYPOTHESIS, seed, examples=1_000)
    tell_stories(LONG_STEPS, seed)
