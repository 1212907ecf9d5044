"""What every engine must do, whatever it keeps its jobs in.

A subclass says how to make an engine and how to start it again; every test here speaks through the verbs of
`jobqueue.Engine` alone, on a clock that is moved by hand:

    class TestMyEngine(EngineContract):
        def make_engine(self, tmp_path, clock, **settings): ...
        def restart(self, engine, tmp_path, clock, how, away, **settings): ...

Durations are this clock's; `PATIENCE` is what a real machine may need for what is due at once.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobqueue import Claim, Engine, Job, JobQueueError, Terms
from support import FakeClock

PATIENCE = 20
MONTH = 30 * 86_400
DAY = 86_400
HOUR = 3_600
LEASE, ATTEMPTS = 300, 3  # the defaults
STATES = ("delayed", "pending", "processing", "completed", "failed", "expired", "cancelled")
UNFINISHED = STATES[:3]


def refused(code: str, verb: Callable, *arguments: Any) -> JobQueueError:
    """The error that the verb raises, or that its future ends with; its code must be `code`."""
    with pytest.raises(JobQueueError) as raised:
        answer = verb(*arguments)
        if hasattr(answer, "result"):
            answer.result(PATIENCE)
    assert raised.value.code == code, raised.value.detail
    return raised.value


def submission(fields: dict[str, Any]) -> tuple[Terms, bytes, str]:
    """What the engine takes of a job's fields: its terms, the payload and its kind."""
    terms = Terms(**{name: value for name, value in fields.items() if name not in ("payload", "kind")})
    return terms, fields["payload"], fields["kind"]


def batch(jobs: Iterable[dict[str, Any]]) -> tuple[Terms, list[tuple[bytes, str]]]:
    """The same of many jobs with the same terms."""
    jobs = [submission(fields) for fields in jobs]
    assert len({terms for terms, _, _ in jobs}) == 1
    return jobs[0][0], [(payload, kind) for _, payload, kind in jobs]


class Queue:
    """An engine and its clock, with a short word for each thing that the tests do to them."""

    def __init__(self, engine: Engine, clock: FakeClock, again: Callable[[str, float], Engine]) -> None:
        self.engine, self.clock, self._again = engine, clock, again
        self._names = itertools.count(1)

    def restart(self, how: str = "stop", away: float = 0.0) -> None:
        """`away`: seconds on the wall clock while nobody runs; another boot has another monotonic one."""
        self.engine = self._again(how, away)

    def advance(self, seconds: float) -> None:
        """Let time pass, and have the engine see it: a verb never acts on what should have happened before it."""
        self.clock.advance(seconds)
        self.engine.stats()

    # -- clients

    def fields(self, payload: Any = None, **options: Any) -> dict[str, Any]:
        payload = str(next(self._names)) if payload is None else str(payload)
        plain = {
            "queue": "default", "priority": 0, "payload": payload.encode(), "kind": "json", "headers": "{}",
            "attempts": ATTEMPTS, "lease": None, "ttl": None, "delay": 0.0, "key": None,
        }  # fmt: skip
        return plain | options

    def hold(self, payload: Any = None, wait: float | None = None, tied: bool = False, **options: Any) -> Any:
        """A client that waits: the future of (job, replayed)."""
        return self.engine.submit(*submission(self.fields(payload, **options)), wait, tied)

    def submit(self, payload: Any = None, **options: Any) -> Job:
        return self.hold(payload, 0, **options).result(PATIENCE)[0]

    def submit_many(self, count: int, **options: Any) -> list[str]:
        return self.engine.submit_many(*batch(self.fields(**options) for _ in range(count))).result(PATIENCE)

    def view(self, job: Job | str) -> Job:
        return self.engine.view(job if isinstance(job, str) else job.id, 0).result(PATIENCE)

    def state(self, job: Job | str) -> str:
        return self.view(job).state

    def cancel(self, job: Job) -> Job:
        return self.engine.cancel(job.id).result(PATIENCE)

    # -- workers

    def wait_for(self, *queues: str, wait: float = 100, **claim: Any) -> Any:
        """A long poll: the future of a list of jobs."""
        return self.engine.poll(Claim(queues=queues or ("default",), wait=wait, **claim))

    def take(self, *queues: str, **claim: Any) -> Job:
        """The one job that a poll gets."""
        jobs = self.wait_for(*queues, wait=0, **claim).result(PATIENCE)
        assert len(jobs) == 1, f"expected one job, got {jobs}"
        return jobs[0]

    def nothing(self, *queues: str) -> bool:
        return self.wait_for(*queues, wait=0).result(PATIENCE) == []

    def complete(self, job: Job, result: Any = "done", claim: Claim | None = None) -> Any:
        answer = self.engine.complete(job.id, job.token, str(result).encode(), "json", None, claim)
        return answer if claim and claim.wait else answer.result(PATIENCE)

    def fail(self, job: Job, error: str = "broken", retry: bool = True, delay: float | None = None) -> Any:
        return self.engine.fail(job.id, job.token, error, retry, delay).result(PATIENCE)

    def release(self, job: Job) -> Any:
        return self.engine.release(job.id, job.token)

    def extend(self, job: Job, lease: float | None = None) -> Any:
        return self.engine.extend(job.id, job.token, lease)

    def requeue(self, job: Job) -> Job:
        return self.engine.requeue(job.id).result(PATIENCE)

    def pause(self, queue: str | None = None) -> Any:
        return self.engine.pause(queue, True).result(PATIENCE)

    def resume(self, queue: str | None = None) -> Any:
        return self.engine.pause(queue, False).result(PATIENCE)

    # -- everything at a glance

    def jobs(self, queue: str | None = None, state: str | None = None, limit: int = 100) -> list[Job]:
        """The whole listing, page by page."""
        found, after = [], None
        while True:
            page, after = self.engine.jobs(queue, state, limit, after)
            assert len(page) <= limit
            found += page
            if after is None:
                return found

    def payloads(self, **filters: Any) -> list[str]:
        return [job.payload.decode() for job in self.jobs(**filters)]

    def waiting_futures(self, futures: list[Any]) -> list[int]:
        """Which of them have no answer, once those that have one are there."""
        self.engine.stats()
        return [number for number, future in enumerate(futures) if not future.done()]

    def bring_to(self, state: str, **options: Any) -> Job:
        """A new job in that state, as the engine shows it."""
        if state == "delayed":
            return self.submit(delay=500, **options)
        if state == "expired":
            job = self.submit(**{"ttl": 5, **options})
            self.advance(job.ttl)
            return self.view(job)
        job = self.submit(**options)
        if state == "cancelled":
            return self.cancel(job)
        if state != "pending":
            job = self.take(options.get("queue", "default"))
        if state == "completed":
            return self.complete(job).job
        if state == "failed":
            return self.fail(job, retry=False).job
        return job


def durable(job: Job) -> Job:
    """A job without what lives in memory only."""
    return job._replace(seq=0)


def come_back(job: Job) -> Job:
    """The same, without the moment since which its lease runs, which is that of the restart."""
    return durable(job)._replace(extended=None)


# Each way in which a job comes (back) into line: (name, what stands before, the event). The event gets what stood.


def _with_job_in_hand(**options: Any) -> Callable[[Queue], Job]:
    def before(queue: Queue) -> Job:
        queue.submit("woken", **options)
        return queue.take()

    return before


def _with_final_job(queue: Queue) -> Job:
    queue.submit("woken")
    return queue.fail(queue.take(), retry=False).job


def _while_paused(name: str | None) -> Callable[[Queue], Job]:
    def before(queue: Queue) -> Job:
        queue.pause(name)
        return queue.submit("woken")

    return before


WAKE_SOURCES = {
    "submit": (lambda queue: None, lambda queue, _: queue.submit("woken")),
    "submit_many": (
        lambda queue: None,
        lambda queue, _: queue.engine.submit_many(*batch([queue.fields("woken")])).result(PATIENCE),
    ),
    "delay over": (lambda queue: queue.submit("woken", delay=5), lambda queue, _: queue.clock.advance(5)),
    "fail without delay": (_with_job_in_hand(), lambda queue, job: queue.fail(job, delay=0)),
    "fail with backoff": (
        lambda queue: queue.fail(_with_job_in_hand()(queue)).job,
        lambda queue, _: queue.clock.advance(1.2),
    ),
    "release": (_with_job_in_hand(), lambda queue, job: queue.release(job)),
    "give back": (_with_job_in_hand(), lambda queue, job: queue.engine.give_back([job])),
    "lease over": (_with_job_in_hand(lease=7), lambda queue, _: queue.clock.advance(7)),
    "resume of the queue": (_while_paused("default"), lambda queue, _: queue.resume("default")),
    "resume of all": (_while_paused(None), lambda queue, _: queue.resume()),
    "requeue": (_with_final_job, lambda queue, job: queue.requeue(job)),
    "requeue of all failed": (_with_final_job, lambda queue, _: queue.engine.requeue_some("failed", None, None)),
}
every_wake_source = pytest.mark.parametrize(
    ("before", "event"), WAKE_SOURCES.values(), ids=[name.replace(" ", "-") for name in WAKE_SOURCES]
)

# Ways in which a job in a worker's hands comes back into line at once, and what each does to the counts.
COMES_BACK = {
    "release": (lambda queue, job: queue.release(job), 0, 1),
    "give_back": (lambda queue, job: queue.engine.give_back([job]), 0, 0),
    "lapse": (lambda queue, job: queue.advance(LEASE), 1, 1),
    "fail": (lambda queue, job: queue.fail(job, delay=0), 1, 1),
}
every_way_back = pytest.mark.parametrize(("back", "failures", "deliveries"), COMES_BACK.values(), ids=COMES_BACK)
both_restarts = pytest.mark.parametrize("how", ["stop", "crash"])


class EngineContract:
    """The tests. A subclass named Test... provides the two methods below."""

    def make_engine(self, tmp_path: Path, clock: FakeClock, **settings: Any) -> Engine:
        """A new engine whose data, if it keeps any, is under tmp_path."""
        raise NotImplementedError

    def restart(
        self, engine: Engine, tmp_path: Path, clock: FakeClock, how: str, away: float, **settings: Any
    ) -> Engine:
        """Another engine on the same data: after a clean stop (`how` is "stop") or a kill -9 ("crash"), and after
        `clock.jump(away)` in between."""
        raise NotImplementedError

    @pytest.fixture
    def make_queue(self, tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., Queue]]:
        """make_queue(**settings) -> Queue; closed when the test ends."""
        made: list[Queue] = []

        def make(**settings: Any) -> Queue:
            folder = tmp_path / f"queue-{len(made)}"
            queue = Queue(self.make_engine(folder, clock, **settings), clock, again=lambda *how: again(*how))

            def again(how: str, away: float) -> Engine:
                return self.restart(queue.engine, folder, clock, how, away, **settings)

            made.append(queue)
            return queue

        yield make
        for queue in made:
            queue.engine.close()

    @pytest.fixture
    def queue(self, make_queue: Callable[..., Queue]) -> Queue:
        return make_queue()

    # -- order

    def test_the_oldest_job_comes_first(self, queue):
        for name in range(5):
            queue.submit(name)
        assert [queue.take().payload for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert queue.nothing()

    def test_a_higher_priority_comes_first_then_the_older_job(self, queue):
        for name, priority in enumerate([0, 9, 5, 9, 0, 1]):
            queue.submit(name, priority=priority)
        assert [queue.take().payload for _ in range(6)] == [b"1", b"3", b"2", b"5", b"0", b"4"]

    def test_the_jobs_of_a_batch_come_in_their_order(self, queue):
        ids = queue.submit_many(20)
        assert len(set(ids)) == 20
        assert [job.id for job in queue.wait_for(max=20).result(PATIENCE)] == ids

    @every_way_back
    def test_a_job_that_comes_back_has_its_old_place(self, queue, back, failures, deliveries):
        queue.submit("high", priority=5)
        first, second, third = (queue.submit(name) for name in ("first", "second", "third"))
        assert queue.take().payload == b"high"
        job = queue.take()
        assert job.id == first.id
        back(queue, job)
        jobs = queue.wait_for(max=9).result(PATIENCE)
        assert [job.id for job in jobs if job.payload != b"high"] == [first.id, second.id, third.id]

    @every_way_back
    def test_attempts_are_counted_apart_from_deliveries(self, queue, back, failures, deliveries):
        queue.submit()
        job = queue.take()
        assert (job.failures, job.deliveries) == (0, 1)
        back(queue, job)
        seen = queue.view(job.id)
        assert (seen.state, seen.failures, seen.deliveries) == ("pending", failures, deliveries)
        assert queue.take().deliveries == deliveries + 1

    def test_a_requeued_job_has_its_old_place(self, queue):
        first = queue.submit()
        queue.submit()
        queue.fail(queue.take(), retry=False)
        queue.requeue(first)
        assert queue.take().id == first.id

    def test_a_delayed_job_has_its_place_by_age_once_the_delay_is_over(self, queue):
        delayed = queue.submit(delay=10)
        queue.submit()
        queue.advance(10)
        assert queue.take().id == delayed.id

    def test_queues_are_served_in_the_order_of_the_poll(self, queue):
        queue.submit("a", queue="a", priority=0)
        queue.submit("b", queue="b", priority=9)
        queue.submit("c", queue="c")
        assert queue.take("b", "a").payload == b"b"
        assert queue.take("b", "a").payload == b"a"
        assert queue.nothing("b", "a")
        assert queue.take("c").payload == b"c"

    def test_a_poll_without_a_queue_is_for_the_default_one(self, queue):
        queue.submit(queue="other")
        assert queue.nothing()
        job = queue.submit()
        assert queue.engine.poll(Claim()).result(PATIENCE)[0].id == job.id

    def test_a_poll_takes_up_to_max_jobs_from_its_queues_in_order(self, queue):
        for name, lane in enumerate("abab"):
            queue.submit(name, queue=lane)
        jobs = queue.wait_for("b", "a", max=3).result(PATIENCE)
        assert [job.payload for job in jobs] == [b"1", b"3", b"0"]
        assert len({job.token for job in jobs}) == 3
        jobs = queue.wait_for("b", "a", max=3).result(PATIENCE)
        assert [job.payload for job in jobs] == [b"2"]

    def test_a_poll_that_names_a_queue_twice_gets_a_job_once(self, queue):
        job = queue.submit()
        waiter = queue.wait_for("default", "default", max=5)
        assert [taken.id for taken in waiter.result(PATIENCE)] == [job.id]
        waiter = queue.wait_for("default", "default", max=5)
        other = queue.submit()
        assert [taken.id for taken in waiter.result(PATIENCE)] == [other.id]

    def test_peek_shows_the_job_that_a_poll_would_get_and_leaves_it(self, queue):
        assert queue.engine.peek(("default",)) is None
        queue.submit(queue="other")
        job = queue.submit()
        for _ in range(2):
            seen = queue.engine.peek(("nobody", "default", "other"))
            assert (seen.id, seen.state) == (job.id, "pending")
        assert queue.take().id == job.id

    # -- delay

    def test_a_delayed_job_is_handed_out_when_its_delay_is_over_and_not_before(self, queue):
        job = queue.submit(delay=10)
        assert job.state == "delayed"
        queue.advance(9.99)
        assert queue.nothing()
        assert queue.state(job) == "delayed"
        queue.advance(0.01)
        assert queue.state(job) == "pending"
        assert queue.take().id == job.id

    def test_a_delay_of_a_month_is_kept(self, queue):
        job = queue.submit(delay=MONTH)
        queue.advance(MONTH - 1)
        assert queue.nothing()
        queue.advance(1)
        assert queue.take().id == job.id

    def test_many_delays_end_in_their_own_time(self, queue):
        for seconds in (30, 10, 20, 10, 40):
            queue.submit(seconds, delay=seconds)
        for expected in ([], [b"10", b"10"], [b"20"], [b"30"], [b"40"]):
            assert [job.payload for job in queue.wait_for(wait=0, max=9).result(PATIENCE)] == expected
            queue.advance(10)

    # -- ttl

    def test_a_job_that_nobody_took_in_time_expires(self, queue):
        client = queue.hold(ttl=10)
        queue.advance(9.99)
        assert not client.done()
        queue.clock.advance(0.01)
        job, _ = client.result(PATIENCE)
        assert job.state == "expired"
        assert job.finished is not None
        assert queue.nothing()
        refused("job_finished", queue.engine.complete, job.id, None, b"1", "json", None, None)

    def test_a_delayed_job_expires_too(self, queue):
        job = queue.submit(delay=50, ttl=10)
        queue.advance(10)
        assert queue.state(job) == "expired"
        queue.advance(50)
        assert queue.nothing()

    def test_a_worker_that_has_the_job_may_complete_it_after_its_ttl(self, queue):
        queue.submit(ttl=10)
        job = queue.take()
        queue.advance(11)
        assert queue.state(job) == "processing"
        queue.extend(job)
        assert queue.complete(job).job.state == "completed"

    @pytest.mark.parametrize("back", ["release", "give_back", "fail"])
    def test_a_job_that_comes_back_after_its_ttl_expires(self, queue, back):
        client = queue.hold(ttl=10)
        job = queue.take()
        waiter = queue.wait_for()
        queue.advance(11)
        COMES_BACK[back][0](queue, job)
        assert client.result(PATIENCE)[0].state == "expired"
        assert queue.state(job) == "expired"
        assert queue.waiting_futures([waiter]) == [0]

    def test_a_job_whose_retry_would_come_after_its_ttl_expires_by_then(self, queue):
        client = queue.hold(ttl=10)
        job = queue.take()
        queue.advance(8)
        assert queue.fail(job, delay=100).job.state == "delayed"
        queue.advance(2)
        assert client.result(PATIENCE)[0].state == "expired"

    def test_a_retry_after_the_ttl_does_not_keep_the_client_waiting_for_its_delay(self, queue):
        client = queue.hold(ttl=10)
        job = queue.take()
        queue.advance(11)
        queue.fail(job, delay=100)
        queue.advance(1)
        assert queue.state(job) == "expired"
        assert client.result(PATIENCE)[0].state == "expired"

    @pytest.mark.parametrize("steps", [(20,), (5, 15), (10, 10), (5, 5, 10), (4, 4, 4, 4, 4)])
    @pytest.mark.parametrize(("lease", "ttl"), [(5, 10), (10, 5), (10, 10)])
    def test_a_job_is_never_handed_out_after_its_ttl_in_whatever_steps_time_passes(self, queue, lease, ttl, steps):
        client = queue.hold(lease=lease, ttl=ttl, attempts=9)
        queue.take()
        waiters = [queue.wait_for(wait=300) for _ in range(3)]
        passed = 0
        for step in steps:
            passed += step
            queue.advance(step)
            for waiter in [waiter for waiter in waiters if waiter.done()]:
                assert passed < ttl, "handed out when its ttl was over"
                waiters.remove(waiter)
                waiter.result()
        # The last lease may run on, but then the job is out of line.
        queue.advance(lease)
        assert client.result(PATIENCE)[0].state == "expired"
        assert queue.waiting_futures(waiters) == list(range(len(waiters)))

    @pytest.mark.parametrize(("delay", "ttl"), [(5, 10), (10, 10), (9, 10)])
    def test_a_delay_and_a_ttl_that_end_in_one_step_of_time_end_in_expired(self, queue, delay, ttl):
        waiter = queue.wait_for(wait=300)
        job = queue.submit(delay=delay, ttl=ttl)
        queue.advance(20)
        assert queue.state(job) == "expired"
        assert not waiter.done()

    def test_a_crowd_of_jobs_whose_ttl_ends_at_once_is_not_handed_out(self, queue):
        queue.submit_many(2_500, ttl=10)
        queue.clock.advance(11)
        assert queue.wait_for(wait=0, max=1_000).result(PATIENCE) == []
        assert queue.engine.peek(("default",)) is None

    # -- lease

    @pytest.mark.parametrize(
        ("of_poll", "of_job", "expected"), [(None, None, LEASE), (None, 20, 20), (40, 20, 40), (40, None, 40)]
    )
    def test_a_lease_lasts_what_the_poll_says_else_the_job_else_the_server(self, queue, of_poll, of_job, expected):
        queue.submit(lease=of_job)
        job = queue.take(lease=of_poll)
        assert job.lease_seconds == expected
        queue.advance(expected - 0.01)
        assert queue.state(job) == "processing"
        queue.advance(0.01)
        assert queue.state(job) == "pending"

    def test_a_lost_lease_goes_to_the_next_worker(self, queue):
        queue.submit()
        old = queue.take(worker="old")
        queue.advance(LEASE)
        new = queue.take(worker="new")
        assert (new.id, new.worker, new.failures, new.deliveries) == (old.id, "new", 1, 2)
        assert new.token != old.token

    def test_a_job_whose_leases_all_run_out_has_failed(self, queue):
        client = queue.hold(attempts=2)
        for _ in range(2):
            assert not client.done()
            queue.take()
            queue.advance(LEASE)
        job, _ = client.result(PATIENCE)
        assert (job.state, job.failures) == ("failed", 2)
        assert job.error
        assert queue.nothing()

    def test_extend_counts_from_now(self, queue):
        queue.submit()
        job = queue.take()
        queue.advance(200)
        assert queue.extend(job, 50).job.lease_seconds == 50
        queue.advance(49.99)
        assert queue.state(job) == "processing"
        queue.advance(0.01)
        assert queue.state(job) == "pending"

    def test_extend_without_a_figure_is_for_as_long_as_before(self, queue):
        queue.submit(lease=40)
        job = queue.take()
        for _ in range(5):
            queue.advance(39)
            assert queue.extend(job).job.lease_seconds == 40
        queue.advance(39.99)
        assert queue.state(job) == "processing"

    def test_extend_takes_a_job_back_that_nobody_else_has(self, queue):
        queue.submit()
        job = queue.take()
        queue.advance(LEASE)
        assert queue.extend(job).job.state == "processing"
        assert queue.nothing()
        assert queue.complete(job).job.state == "completed"

    def test_one_delivery_costs_one_attempt_also_when_it_was_extended_too_late(self, queue):
        queue.submit(attempts=9)
        job = queue.take()
        queue.advance(LEASE)
        queue.extend(job)
        assert queue.fail(job).job.failures == 1

    def test_extend_tells_a_worker_that_the_job_was_cancelled(self, queue):
        job = queue.bring_to("processing")
        queue.cancel(job)
        assert queue.extend(job).job.state == "cancelled"
        assert queue.engine.extend(job.id, None, None).job.state == "cancelled"
        refused("job_finished", queue.engine.extend, job.id, "guessed", None)

    # -- fencing

    @pytest.mark.parametrize("verb", ["complete", "fail", "release"])
    def test_the_same_call_again_is_a_duplicate_and_changes_nothing(self, queue, verb):
        job = queue.bring_to("processing")
        call = getattr(queue, verb)
        assert not call(job).duplicate
        before = queue.view(job)
        again = call(job)
        assert again.duplicate
        assert durable(queue.view(job)) == durable(before) == durable(again.job)

    def test_the_first_result_stays(self, queue):
        job = queue.bring_to("processing")
        queue.complete(job, "1")
        assert queue.complete(job, "2").duplicate
        refused("job_finished", queue.engine.complete, job.id, "other", b"3", "json", None, None)
        refused("job_finished", queue.engine.complete, job.id, None, b"4", "json", None, None)
        assert queue.view(job).result == b"1"

    def test_an_unknown_job_is_not_found(self, queue):
        for verb, *arguments in (
            (queue.engine.complete, "nobody", None, b"1", "json", None, None),
            (queue.engine.complete, "nobody", "token", b"1", "json", None, None),
            (queue.engine.fail, "nobody", None, "broken", True, None),
            (queue.engine.release, "nobody", None),
            (queue.engine.extend, "nobody", None, None),
            (queue.engine.cancel, "nobody"),
            (queue.engine.requeue, "nobody"),
            (queue.engine.view, "nobody", 0),
        ):
            assert refused("job_not_found", verb, *arguments).job_id == "nobody"

    @pytest.mark.parametrize("state", ["pending", "delayed"])
    def test_a_job_that_was_never_handed_out_cannot_be_settled(self, queue, state):
        job = queue.bring_to(state)
        before = queue.view(job)
        for verb, *arguments in (
            (queue.engine.complete, job.id, None, b"1", "json", None, None),
            (queue.engine.fail, job.id, None, "broken", True, None),
            (queue.engine.release, job.id, None),
            (queue.engine.extend, job.id, None, None),
        ):
            refused("job_not_leased", verb, *arguments)
        refused("lease_lost", queue.engine.complete, job.id, "guessed", b"1", "json", None, None)
        assert durable(queue.view(job)) == durable(before)

    def test_a_worker_without_a_token_may_settle_the_job_that_is_in_hand_or_has_lapsed(self, queue):
        for settle in (
            lambda job: queue.engine.complete(job.id, None, b"1", "json", None, None).result(PATIENCE),
            lambda job: queue.engine.fail(job.id, None, "broken", False, None).result(PATIENCE),
            lambda job: queue.engine.release(job.id, None),
            lambda job: queue.engine.extend(job.id, None, 60),
        ):
            settle(queue.bring_to("processing"))
            job = queue.bring_to("processing")
            queue.advance(LEASE)
            assert queue.state(job) == "pending"
            settle(job)
            queue.engine.clear().result(PATIENCE)

    @pytest.mark.parametrize("verb", ["complete", "fail", "release"])
    def test_what_another_did_without_a_token_is_not_taken_for_a_repetition_of_ones_own_call(self, queue, verb):
        job = queue.bring_to("processing")
        {
            "complete": lambda: queue.engine.complete(job.id, None, b"0", "json", None, None).result(PATIENCE),
            "fail": lambda: queue.engine.fail(job.id, None, "theirs", True, 5).result(PATIENCE),
            "release": lambda: queue.engine.release(job.id, None),
        }[verb]()
        with pytest.raises(JobQueueError) as lost:
            getattr(queue, verb)(job)
        assert lost.value.code == ("job_finished" if verb == "complete" else "lease_lost")

    @every_way_back
    def test_only_a_lease_that_ran_out_may_be_settled_late(self, queue, back, failures, deliveries):
        queue.submit()
        job = queue.take()
        back(queue, job)
        late = [queue.engine.complete, job.id, job.token, b"1", "json", None, None]
        tokenless = [queue.engine.complete, job.id, None, b"1", "json", None, None]
        if back is COMES_BACK["lapse"][0]:
            assert late[0](*late[1:]).result(PATIENCE).job.state == "completed"
        else:
            refused("lease_lost", *late)
            refused("job_not_leased", *tokenless)

    def test_a_job_that_is_in_other_hands_refuses_the_old_worker(self, queue):
        queue.submit()
        old = queue.take()
        queue.advance(LEASE)
        new = queue.take()
        for verb, *arguments in (
            (queue.engine.complete, old.id, old.token, b"1", "json", None, None),
            (queue.engine.fail, old.id, old.token, "broken", True, None),
            (queue.engine.release, old.id, old.token),
            (queue.engine.extend, old.id, old.token, None),
        ):
            refused("lease_lost", verb, *arguments)
        assert queue.complete(new).job.state == "completed"

    def test_a_late_failure_is_not_counted_twice(self, queue):
        queue.submit()
        job = queue.take()
        queue.advance(LEASE)
        after = queue.fail(job, "late", delay=0).job
        assert (after.failures, after.error) == (1, "late")
        assert queue.take().failures == 1

    def test_a_late_release_puts_the_job_nowhere_else(self, queue):
        queue.submit()
        job = queue.take()
        queue.advance(LEASE)
        assert queue.release(job).job.state == "pending"
        assert len(queue.wait_for(wait=0, max=9).result(PATIENCE)) == 1

    @pytest.mark.parametrize(
        "order", list(itertools.permutations(["expire", "old", "poll", "new"])), ids=lambda order: "-".join(order)
    )
    def test_expiry_poll_and_both_completions_in_every_order_leave_one_result(self, queue, order):
        client = queue.hold("x")
        old = queue.take()
        new = None
        lapsed, ended_by = False, None
        for step in order:
            if step == "expire":
                queue.advance(LEASE)
                lapsed = lapsed or new is None
            elif step == "poll":
                jobs = queue.wait_for(wait=0).result(PATIENCE)
                # Handed out again exactly when the lease is over and the job has not come to its end.
                assert bool(jobs) == (lapsed and ended_by is None)
                new = jobs[0] if jobs else None
            elif step == "old":
                if ended_by:
                    refused("job_finished", queue.complete, old, "old")
                elif new:
                    refused("lease_lost", queue.complete, old, "old")
                else:
                    assert queue.complete(old, "old").job.state == "completed"
                    ended_by = b"old"
            elif new:
                assert not queue.complete(new, "new").duplicate
                assert ended_by is None
                ended_by = b"new"
        if ended_by is None:
            assert not client.done()
        else:
            assert client.result(PATIENCE)[0].result == ended_by
            assert queue.view(old).result == ended_by

    @pytest.mark.parametrize("first", ["cancel", "complete", "fail"])
    @pytest.mark.parametrize("second", ["cancel", "complete", "fail"])
    def test_of_cancel_complete_and_fail_the_first_wins(self, queue, first, second):
        job = queue.bring_to("processing")
        verbs = {
            "cancel": lambda: queue.cancel(job),
            "complete": lambda: queue.complete(job),
            "fail": lambda: queue.fail(job, retry=False),
        }
        verbs[first]()
        state = queue.state(job)
        if first == second != "cancel":
            assert verbs[second]().duplicate
        else:
            refused("job_finished", verbs[second])
        assert queue.state(job) == state == {"cancel": "cancelled", "complete": "completed", "fail": "failed"}[first]

    # -- fail

    def test_a_failed_attempt_is_tried_again_after_the_backoff(self, queue):
        queue.submit(attempts=4)
        for failures in (1, 2, 3):
            job = queue.fail(queue.take(), f"error {failures}").job
            assert (job.state, job.failures, job.error) == ("delayed", failures, f"error {failures}")
            assert 0.8 <= job.delay / 2 ** (failures - 1) <= 1.2
            queue.advance(0.79 * 2 ** (failures - 1))
            assert queue.nothing()
            queue.advance(0.42 * 2 ** (failures - 1))
        job = queue.fail(queue.take(), "the last").job
        assert (job.state, job.failures, job.error) == ("failed", 4, "the last")

    def test_the_worker_may_say_how_long_a_retry_waits(self, queue):
        queue.submit()
        job = queue.fail(queue.take(), delay=77).job
        assert (job.state, job.delay) == ("delayed", 77)
        queue.advance(76.99)
        assert queue.nothing()
        queue.advance(0.01)
        assert queue.take().id == job.id

    def test_a_retry_without_delay_is_back_in_line_at_once(self, queue):
        queue.submit()
        assert queue.fail(queue.take(), delay=0).job.state == "pending"
        queue.take()

    def test_fail_without_retry_ends_the_job_and_tells_the_client_why(self, queue):
        client = queue.hold(attempts=100)
        queue.fail(queue.take(), "no use", retry=False)
        job, _ = client.result(PATIENCE)
        assert (job.state, job.error, job.failures) == ("failed", "no use", 1)

    @pytest.mark.parametrize("attempts", [1, 2, 100])
    def test_a_job_is_tried_as_often_as_it_says(self, queue, attempts):
        job = queue.submit(attempts=attempts)
        for _ in range(attempts):
            queue.fail(queue.take(), delay=0)
        assert queue.state(job) == "failed"
        assert queue.nothing()

    def test_releasing_for_ever_costs_no_attempt(self, queue):
        queue.submit(attempts=1)
        for deliveries in range(1, 20):
            job = queue.take()
            assert (job.failures, job.deliveries) == (0, deliveries)
            queue.release(job)
        assert queue.complete(queue.take()).job.state == "completed"

    # -- give back

    def test_a_reply_that_was_not_delivered_gives_the_job_to_the_next_worker_uncounted(self, queue):
        queue.submit()
        lost = queue.take()
        waiter = queue.wait_for()
        queue.engine.give_back([lost])
        job = waiter.result(PATIENCE)[0]
        assert (job.id, job.failures, job.deliveries) == (lost.id, 0, 1)
        refused("lease_lost", queue.complete, lost)

    def test_giving_back_what_is_no_longer_in_hand_does_nothing(self, queue):
        queue.submit()
        job = queue.take()
        queue.advance(LEASE)
        other = queue.take()
        queue.engine.give_back([job])
        assert queue.view(other).token == other.token
        assert queue.state(other) == "processing"
        queue.complete(other)
        queue.engine.give_back([job, other])
        assert queue.state(other) == "completed"
        queue.engine.clear().result(PATIENCE)
        queue.engine.give_back([job, other])

    # -- long polls

    @every_wake_source
    def test_a_long_poll_wakes_for(self, queue, before, event):
        stood = before(queue)
        waiter = queue.wait_for()
        assert queue.waiting_futures([waiter]) == [0]
        event(queue, stood)
        assert [job.payload for job in waiter.result(PATIENCE)] == [b"woken"]

    @every_wake_source
    def test_one_event_wakes_one_waiter_the_one_that_waits_longest(self, queue, before, event):
        stood = before(queue)
        waiters = [queue.wait_for() for _ in range(3)]
        event(queue, stood)
        assert len(waiters[0].result(PATIENCE)) == 1
        assert queue.waiting_futures(waiters) == [1, 2]

    @every_wake_source
    def test_a_worker_that_completes_and_waits_for_the_next_wakes_for(self, queue, before, event):
        queue.submit("mine", queue="mine")
        mine = queue.take("mine")
        stood = before(queue)
        waiter = queue.complete(mine, claim=Claim(wait=100))
        assert queue.waiting_futures([waiter]) == [0]
        assert queue.state(mine) == "completed"
        event(queue, stood)
        outcome = waiter.result(PATIENCE)
        assert (outcome.job.id, outcome.next.payload) == (mine.id, b"woken")

    @every_wake_source
    def test_a_waiter_that_hung_up_leaves_the_line(self, queue, before, event):
        stood = before(queue)
        gone, there = queue.wait_for(), queue.wait_for()
        assert gone.cancel()
        event(queue, stood)
        assert [job.payload for job in there.result(PATIENCE)] == [b"woken"]
        assert gone.cancelled()

    def test_a_job_is_not_lost_on_a_line_of_waiters_that_all_hung_up(self, queue):
        for waiter in [queue.wait_for() for _ in range(5)]:
            waiter.cancel()
        job = queue.submit()
        assert (queue.state(job), queue.view(job).deliveries) == ("pending", 0)
        assert queue.take().id == job.id

    def test_a_long_poll_ends_empty_when_its_wait_is_over(self, queue):
        waiter = queue.wait_for(wait=20)
        queue.advance(19.99)
        assert not waiter.done()
        queue.clock.advance(0.01)
        assert waiter.result(PATIENCE) == []
        job = queue.submit()
        assert queue.take().id == job.id

    def test_waits_that_end_together_all_end(self, queue):
        waiters = [queue.wait_for(wait=20) for _ in range(2_500)]
        queue.clock.advance(20)
        assert all(waiter.result(PATIENCE) == [] for waiter in waiters)

    def test_a_batch_wakes_as_many_waiters_as_it_fills(self, queue):
        waiters = [queue.wait_for(max=2) for _ in range(5)]
        ids = queue.submit_many(3)
        waiting = queue.waiting_futures(waiters)
        assert waiting in ([2, 3, 4], [3, 4])
        got = [job.id for waiter in waiters[: waiting[0]] for job in waiter.result(PATIENCE)]
        assert got == ids

    def test_a_waiter_on_several_queues_is_answered_once(self, queue):
        waiter, other = queue.wait_for("a", "b"), queue.wait_for("b")
        queue.submit(queue="a")
        assert len(waiter.result(PATIENCE)) == 1
        job = queue.submit(queue="b")
        assert [taken.id for taken in other.result(PATIENCE)] == [job.id]
        assert queue.nothing("a", "b")

    @pytest.mark.parametrize("names", ["ab", "ba"])
    def test_nobody_is_passed_over_when_several_queues_fill_at_once(self, queue, names):
        queue.pause()
        for name in names:
            queue.submit(name, queue=name)
        first, second = queue.wait_for("b"), queue.wait_for("b", "a")
        queue.resume()
        assert queue.waiting_futures([first, second]) == []
        assert [job.payload for job in first.result(PATIENCE)] == [b"b"]
        assert [job.payload for job in second.result(PATIENCE)] == [b"a"]

    def test_a_waiter_is_not_woken_for_another_queue(self, queue):
        waiter = queue.wait_for("a", "b")
        queue.submit(queue="c")
        assert queue.waiting_futures([waiter]) == [0]

    def test_a_poll_in_line_does_not_get_a_job_that_ended_before(self, queue):
        queue.cancel(queue.submit())
        job = queue.submit(delay=5)
        queue.cancel(job)
        waiter = queue.wait_for(wait=50)
        queue.advance(10)
        assert not waiter.done()

    # -- clients that wait

    def test_a_client_gets_the_result_when_the_worker_has_handed_it_in(self, queue):
        client = queue.hold("x")
        job = queue.take()
        assert not client.done()
        queue.engine.complete(job.id, job.token, b"\xff\x00", "binary", "image/png", None).result(PATIENCE)
        job, replayed = client.result(PATIENCE)
        assert (job.state, job.result, job.result_kind) == ("completed", b"\xff\x00", "binary")
        assert (job.content_type, replayed) == ("image/png", False)

    def test_a_client_that_does_not_wait_learns_that_the_job_is_accepted(self, queue):
        job, replayed = queue.hold(wait=0).result(PATIENCE)
        assert (job.state, replayed) == ("pending", False)

    def test_a_wait_that_is_over_shows_the_job_as_it_stands_and_the_job_goes_on(self, queue):
        client = queue.hold(wait=5)
        queue.take()
        queue.advance(4.99)
        assert not client.done()
        queue.clock.advance(0.01)
        job, _ = client.result(PATIENCE)
        assert job.state == "processing"
        assert queue.complete(job).job.state == "completed"

    def test_a_view_waits_for_the_end(self, queue):
        job = queue.submit()
        short, long, gone = (queue.engine.view(job.id, wait) for wait in (5, 50, 50))
        gone.cancel()
        queue.clock.advance(5)
        assert short.result(PATIENCE).state == "pending"
        assert not long.done()
        queue.complete(queue.take())
        assert long.result(PATIENCE).state == "completed"
        assert queue.engine.view(job.id, 50).result(PATIENCE).state == "completed"

    def test_all_who_wait_for_a_job_get_its_end(self, queue):
        clients = [queue.hold("x", key="k") for _ in range(10)]
        clients[3].cancel()
        queue.complete(queue.take(), "7")
        for number, client in enumerate(clients):
            if number != 3:
                job, replayed = client.result(PATIENCE)
                assert (job.result, replayed) == (b"7", number > 0)

    def test_a_client_that_hangs_up_does_not_cancel_its_job(self, queue):
        queue.hold("x").cancel()
        assert queue.complete(queue.take()).job.state == "completed"

    def test_a_tied_job_is_cancelled_when_its_client_hangs_up(self, queue):
        waiting, in_hand = queue.hold("a", tied=True), queue.hold("b", tied=True, queue="b")
        job = queue.take("b")
        waiting.cancel()
        in_hand.cancel()
        assert [seen.state for seen in queue.jobs()] == ["cancelled", "cancelled"]
        assert queue.extend(job).job.state == "cancelled"
        assert queue.nothing()

    def test_a_tied_job_stays_while_another_client_waits_for_it(self, queue):
        tied, other = queue.hold("x", tied=True, key="k"), queue.hold("x", key="k")
        tied.cancel()
        assert queue.complete(queue.take()).job.state == "completed"
        assert other.result(PATIENCE)[0].state == "completed"

    def test_the_last_tied_client_that_hangs_up_cancels_the_job(self, queue):
        first, second = (queue.hold("x", tied=True, key="k") for _ in range(2))
        first.cancel()
        assert queue.jobs()[0].state == "pending"
        second.cancel()
        assert queue.jobs()[0].state == "cancelled"

    def test_a_tied_client_that_got_its_answer_cancels_nothing(self, queue):
        client = queue.hold("x", wait=5, tied=True)
        queue.clock.advance(5)
        job, _ = client.result(PATIENCE)
        assert not client.cancel()
        assert queue.state(job) == "pending"

    def test_cancel_answers_those_who_wait(self, queue):
        clients = [queue.hold(name, queue=name, delay=delay) for name, delay in (("a", 0), ("b", 0), ("c", 9))]
        queue.take("b")
        for job in queue.jobs():
            assert queue.cancel(job).state == "cancelled"
        assert [client.result(PATIENCE)[0].state for client in clients] == ["cancelled"] * 3
        assert queue.nothing("a", "b", "c")

    @pytest.mark.parametrize("state", ["completed", "failed", "expired", "cancelled"])
    def test_a_final_job_cannot_be_cancelled(self, queue, state):
        job = queue.bring_to(state)
        refused("job_finished", queue.engine.cancel, job.id)
        assert durable(queue.view(job)) == durable(job)

    # -- the idempotency key

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("how", [None, "stop", "crash"])
    def test_a_key_attaches_to_its_job_in_every_state_also_after_a_restart(self, queue, state, how):
        job = queue.bring_to(state, payload="x", key="k")
        if how:
            queue.restart(how)
        again, replayed = queue.hold("x", 0, key="k").result(PATIENCE)
        assert (again.id, replayed) == (job.id, True)
        assert len(queue.jobs()) == 1

    def test_a_key_that_is_used_for_another_payload_or_queue_is_refused(self, queue):
        job = queue.submit("x", key="k")
        for options in ({"payload": "y"}, {"payload": "x", "queue": "other"}):
            error = refused("key_reused", functools.partial(queue.hold, wait=0, key="k", **options))
            assert error.job_id == job.id
        queue.restart("crash")
        refused("key_reused", functools.partial(queue.hold, "y", 0, key="k"))
        assert len(queue.jobs()) == 1

    def test_a_client_attached_by_key_gets_the_result(self, queue):
        queue.submit("x", key="k")
        job = queue.take()
        attached = queue.hold("x", key="k")
        queue.complete(job, "5")
        (job, replayed), (same, _) = attached.result(PATIENCE), queue.hold("x", key="k").result(PATIENCE)
        assert (job.result, replayed, same.result) == (b"5", True, b"5")

    def test_a_key_is_free_when_its_job_is_forgotten(self, make_queue):
        queue = make_queue(keep_completed=60)
        queue.submit("x", key="k")
        queue.complete(queue.take())
        queue.advance(59.99)
        assert queue.hold("x", 0, key="k").result(PATIENCE)[1]
        queue.advance(0.01)
        job, replayed = queue.hold("y", 0, key="k").result(PATIENCE)
        assert (job.state, replayed) == ("pending", False)
        queue.restart("crash")
        assert queue.hold("y", 0, key="k").result(PATIENCE) == (durable(job), True)

    def test_two_keys_are_two_jobs(self, queue):
        assert queue.submit("x", key="k").id != queue.submit("x", key="l").id
        assert queue.submit("x").id != queue.submit("x").id

    # -- batches

    def test_complete_many_answers_each_in_its_place(self, queue):
        first, second, lost, final = (queue.bring_to("processing") for _ in range(4))
        queue.complete(final, "before")
        queue.release(lost)
        results = [(first.id, first.token), ("nobody", None), (lost.id, lost.token), (second.id, None)]
        results += [(final.id, None), (first.id, first.token)]
        outcomes = queue.engine.complete_many([(*pair, b"1", "json", None) for pair in results]).result(PATIENCE)
        codes = [outcome.code if isinstance(outcome, JobQueueError) else outcome.job.state for outcome in outcomes]
        assert codes == ["completed", "job_not_found", "lease_lost", "completed", "job_finished", "completed"]
        assert [outcomes[0].duplicate, outcomes[3].duplicate, outcomes[5].duplicate] == [False, False, True]
        assert queue.view(final).result == b"before"

    def test_complete_many_of_nothing_is_nothing(self, queue):
        assert queue.engine.complete_many([]).result(PATIENCE) == []

    def test_a_completion_brings_the_next_job(self, queue):
        queue.submit("a")
        queue.submit("b")
        outcome = queue.complete(queue.take(), claim=Claim(worker="w", lease=60))
        assert (outcome.job.state, outcome.next.payload, outcome.next.lease_seconds) == ("completed", b"b", 60)
        assert queue.complete(outcome.next, claim=Claim()).next is None

    def test_a_duplicate_completion_brings_the_next_job_too(self, queue):
        first = queue.bring_to("processing")
        queue.complete(first)
        job = queue.submit()
        outcome = queue.complete(first, claim=Claim())
        assert (outcome.duplicate, outcome.next.id) == (True, job.id)

    def test_a_completion_that_is_refused_brings_no_job(self, queue):
        job = queue.bring_to("cancelled")
        other = queue.submit()
        refused("job_finished", queue.engine.complete, job.id, None, b"1", "json", None, Claim())
        assert queue.state(other) == "pending"

    def test_a_completion_whose_wait_for_the_next_is_over_says_so(self, queue):
        waiter = queue.complete(queue.bring_to("processing"), claim=Claim(wait=30))
        queue.clock.advance(30)
        outcome = waiter.result(PATIENCE)
        assert (outcome.job.state, outcome.next) == ("completed", None)

    def test_a_worker_that_hangs_up_while_it_waits_for_the_next_has_completed(self, queue):
        job = queue.bring_to("processing")
        queue.complete(job, claim=Claim(wait=30)).cancel()
        assert queue.state(job) == "completed"
        other = queue.submit()
        assert queue.state(other) == "pending"

    # -- listing

    def test_a_listing_is_newest_first_and_can_be_narrowed(self, queue):
        for name in range(6):
            queue.submit(name, queue="ab"[name % 2])
        queue.take("a")
        assert queue.payloads() == ["5", "4", "3", "2", "1", "0"]
        assert queue.payloads(queue="a") == ["4", "2", "0"]
        assert queue.payloads(state="pending") == ["5", "4", "3", "2", "1"]
        assert queue.payloads(queue="a", state="processing") == ["0"]
        assert queue.payloads(queue="nobody") == []

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
    def test_pages_make_the_whole_listing(self, queue, limit):
        for name in range(7):
            queue.submit(name)
        assert queue.payloads(limit=limit) == ["6", "5", "4", "3", "2", "1", "0"]
        assert queue.payloads(limit=limit, state="pending") == ["6", "5", "4", "3", "2", "1", "0"]

    def test_a_cursor_holds_while_jobs_come_and_go(self, make_queue):
        queue = make_queue(keep_jobs=0)
        jobs = [queue.submit(name) for name in range(10)]
        page, after = queue.engine.jobs(None, None, 3, None)
        assert [job.payload for job in page] == [b"9", b"8", b"7"]
        queue.submit("new")
        for gone in (7, 6, 3):  # the last one of the page among them
            queue.cancel(jobs[gone])
        page, after = queue.engine.jobs(None, None, 3, after)
        assert [job.payload for job in page] == [b"5", b"4", b"2"]
        queue.restart("crash")
        page, after = queue.engine.jobs(None, None, 3, after)
        assert [job.payload for job in page] == [b"1", b"0"]
        assert after is None

    def test_a_listing_finds_the_old_jobs_behind_many_that_are_forgotten(self, make_queue):
        queue = make_queue(keep_jobs=0)
        old = queue.submit_many(5_000, queue="old")
        for job_id in queue.submit_many(6_000, queue="gone"):
            queue.engine.cancel(job_id)
        assert sorted(job.id for job in queue.jobs(limit=1_000)) == sorted(old)

    # -- retention

    @pytest.mark.parametrize("state", ["completed", "cancelled", "expired", "failed"])
    def test_a_finished_job_is_kept_for_its_time_and_no_longer(self, queue, state):
        job = queue.bring_to(state)
        keep = 7 * DAY if state == "failed" else HOUR
        queue.advance(keep - 1)
        assert queue.state(job) == state
        queue.clock.advance(1)
        refused("job_not_found", queue.engine.view, job.id, 0)
        assert queue.jobs() == []
        assert queue.engine.stats()["total"] == 0

    def test_the_oldest_finished_jobs_go_when_there_are_too_many(self, make_queue):
        queue = make_queue(keep_jobs=3)
        for name in range(5):
            queue.submit(name)
            queue.clock.advance(1)
            job = queue.take()
            queue.complete(job) if name % 2 else queue.fail(job, retry=False)
        waiting = queue.submit("waiting")
        assert queue.payloads() == ["waiting", "4", "3", "2"]
        assert queue.state(waiting) == "pending"

    def test_the_oldest_finished_jobs_go_when_they_are_too_large(self, make_queue):
        queue = make_queue(keep_bytes=10_000)
        for name in range(5):
            queue.submit(name)
            queue.clock.advance(1)
            queue.complete(queue.take(), '"' + "x" * 3_000 + '"')
        assert queue.payloads() == ["4", "3", "2"]

    def test_unfinished_jobs_are_never_forgotten(self, make_queue):
        queue = make_queue(keep_jobs=0, keep_bytes=0, keep_completed=0, keep_failed=0)
        kept = [queue.submit(delay=100 * DAY), queue.submit(), queue.bring_to("processing", lease=12 * HOUR, queue="a")]
        for _ in range(10):
            job = queue.bring_to("completed", queue="b")
            refused("job_not_found", queue.engine.view, job.id, 0)
        assert {job.id for job in queue.jobs()} == {job.id for job in kept}

    def test_a_client_gets_its_result_also_when_nothing_is_kept(self, make_queue):
        queue = make_queue(keep_jobs=0)
        client = queue.hold("x")
        queue.complete(queue.take(), "9")
        assert client.result(PATIENCE)[0].result == b"9"

    def test_a_requeued_job_is_not_forgotten(self, queue):
        job = queue.bring_to("cancelled")
        queue.advance(HOUR - 1)
        queue.requeue(job)
        queue.advance(HOUR)
        assert queue.state(job) == "pending"

    # -- pause

    def test_a_paused_queue_hands_out_nothing_and_takes_everything_else(self, queue):
        before = queue.submit("before")
        in_hand = queue.take()
        assert queue.pause("default") == ["default"]
        after = queue.submit("after")
        assert queue.nothing()
        assert queue.engine.peek(("default",)) is None
        assert queue.complete(in_hand).job.id == before.id
        other = queue.submit(queue="other")
        assert queue.take("default", "other").id == other.id
        assert queue.resume("default") == []
        assert queue.take().id == after.id

    def test_a_pause_of_all_holds_every_queue_also_new_ones(self, queue):
        assert queue.pause() == "all"
        queue.submit(queue="a")
        queue.submit(queue="b")
        assert queue.nothing("a", "b")
        queue.resume()
        assert len(queue.wait_for("a", "b", max=9).result(PATIENCE)) == 2

    def test_a_resume_of_all_resumes_each_queue(self, queue):
        queue.pause("a")
        queue.pause("b")
        queue.resume()
        queue.submit(queue="a")
        queue.take("a", "b")

    @both_restarts
    def test_a_pause_outlives_a_restart(self, queue, how):
        queue.submit(queue="a")
        queue.submit(queue="b")
        queue.pause("a")
        queue.restart(how)
        assert queue.nothing("a")
        queue.take("b")
        queue.restart(how)
        assert queue.nothing("a")
        queue.resume("a")
        queue.restart(how)
        queue.take("a")
        queue.submit(queue="a")
        queue.pause()
        queue.restart(how)
        assert queue.nothing("a")
        assert queue.engine.stats()["paused"] is True

    # -- clear

    def test_clear_forgets_everything_and_answers_those_who_wait(self, queue):
        for state in STATES:
            queue.bring_to(state, queue=state, key=state, payload=state)
        clients = [queue.hold(name, queue="w", delay=delay) for name, delay in (("a", 0), ("b", 50))]
        viewer = queue.engine.view(queue.jobs(queue="w")[0].id, 100)
        assert queue.engine.clear().result(PATIENCE) == len(STATES) + 2
        for client in (*clients, viewer):
            assert refused("job_cleared", client.result, PATIENCE).job_id
        assert queue.jobs() == []
        assert queue.engine.clear().result(PATIENCE) == 0
        assert queue.nothing(*STATES, "w")
        assert queue.engine.stats()["total"] == 0
        queue.advance(8 * DAY)  # no timer of what is gone goes off
        assert queue.jobs() == []
        assert not queue.hold("pending", 0, key="pending", queue="other").result(PATIENCE)[1]

    def test_a_job_in_hand_when_the_queue_is_cleared_is_not_found(self, queue):
        job = queue.bring_to("processing")
        queue.engine.clear().result(PATIENCE)
        for verb, *arguments in (
            (queue.engine.complete, job.id, job.token, b"1", "json", None, None),
            (queue.engine.fail, job.id, job.token, "broken", True, None),
            (queue.engine.release, job.id, job.token),
            (queue.engine.extend, job.id, job.token, None),
        ):
            refused("job_not_found", verb, *arguments)

    def test_a_long_poll_waits_on_after_clear(self, queue):
        waiter = queue.wait_for()
        queue.engine.clear().result(PATIENCE)
        job = queue.submit()
        assert waiter.result(PATIENCE)[0].id == job.id

    @both_restarts
    def test_what_was_cleared_does_not_come_back(self, queue, how):
        queue.pause("a")
        for state in STATES:
            queue.bring_to(state, queue=state)
        page, after = queue.engine.jobs(None, None, 2, None)
        queue.engine.clear().result(PATIENCE)
        queue.restart(how)
        assert queue.jobs() == []
        job = queue.submit()
        assert job.number > page[0].number, "a number was given twice: an old cursor would be wrong"
        queue.submit(queue="a")
        assert queue.nothing("a"), "clear forgets jobs, not pauses"

    # -- requeue

    @pytest.mark.parametrize("state", ["failed", "expired", "cancelled"])
    def test_a_job_that_ended_badly_can_be_requeued_with_all_its_attempts(self, queue, state):
        job = queue.bring_to(state)
        back = queue.requeue(job)
        assert (back.state, back.failures, back.error, back.finished) == ("pending", 0, None, None)
        for _ in range(ATTEMPTS):
            assert queue.state(job) == "pending"
            queue.fail(queue.take(), delay=0)
        assert queue.state(job) == "failed"

    @pytest.mark.parametrize("state", ["completed", "pending", "processing"])
    def test_a_job_that_did_not_end_badly_is_not_requeued(self, queue, state):
        job = queue.bring_to(state, ttl=50)
        before = queue.view(job)
        code = {"completed": "job_finished"}.get(state, "job_not_finished")
        refused(code, queue.engine.requeue, job.id)
        assert durable(queue.view(job)) == durable(before)
        queue.advance(51)
        assert queue.state(job) == {"pending": "expired"}.get(state, state), "the refused requeue changed the ttl"

    def test_a_refused_requeue_leaves_nothing_behind_that_goes_off_later(self, queue):
        job = queue.bring_to("completed", ttl=50)
        refused("job_finished", queue.engine.requeue, job.id)
        for _ in range(3):
            queue.advance(HOUR)
        job = queue.submit(delay=5)
        waiter = queue.wait_for()
        queue.clock.advance(5)  # without a verb: the engine's own timer must still be alive
        assert waiter.result(PATIENCE)[0].id == job.id

    def test_a_requeued_job_has_its_whole_ttl_again(self, queue):
        job = queue.bring_to("expired", ttl=10)
        queue.requeue(job)
        queue.advance(9.99)
        assert queue.state(job) == "pending"
        queue.advance(0.01)
        assert queue.state(job) == "expired"

    def test_the_worker_of_a_requeued_job_has_lost_it(self, queue):
        job = queue.bring_to("processing")
        queue.cancel(job)
        queue.requeue(job)
        refused("lease_lost", queue.complete, job)
        refused("job_not_leased", queue.engine.complete, job.id, None, b"1", "json", None, None)

    def test_jobs_are_requeued_by_state_and_queue(self, queue):
        for name in range(4):
            queue.fail(queue.bring_to("processing", payload=name, queue="ab"[name % 2]), retry=False)
        queue.bring_to("cancelled", queue="a")
        assert queue.engine.requeue_some("failed", "a", None) == (2, None)
        assert [queue.take("a").payload for _ in range(2)] == [b"0", b"2"]
        assert queue.engine.requeue_some("failed", None, None) == (2, None)
        assert queue.engine.requeue_some("cancelled", None, None) == (1, None)
        assert queue.engine.requeue_some("expired", None, None) == (0, None)

    def test_a_requeue_of_all_reaches_every_job(self, queue):
        ids = queue.submit_many(2_500, queue="a")
        for job_id in ids:
            queue.engine.cancel(job_id)
        total, after = queue.engine.requeue_some("cancelled", None, None)
        while after is not None:
            count, after = queue.engine.requeue_some("cancelled", None, after)
            total += count
        assert total == 2_500
        assert queue.engine.stats()["pending"] == 2_500

    def test_a_requeue_of_all_reaches_the_old_jobs_behind_many_that_are_forgotten(self, make_queue):
        queue = make_queue(keep_completed=10)
        job = queue.bring_to("failed")
        for job_id in queue.submit_many(1_500):
            queue.engine.cancel(job_id)
        queue.advance(10)
        total, after = queue.engine.requeue_some("failed", None, None)
        while after is not None:
            count, after = queue.engine.requeue_some("failed", None, after)
            total += count
        assert (total, queue.state(job)) == (1, "pending")

    # -- drain

    def test_a_draining_engine_accepts_and_hands_out_nothing_and_takes_results(self, queue):
        client = queue.hold("x", key="k")
        job = queue.take()
        mine = queue.bring_to("processing")
        waiters = [queue.wait_for(), queue.complete(mine, claim=Claim(wait=50))]
        queue.submit(queue="other")
        drained = queue.engine.drain()
        assert waiters[0].result(PATIENCE) == []
        assert waiters[1].result(PATIENCE).next is None
        refused("draining", queue.hold)
        refused("draining", queue.engine.submit_many, *batch([queue.fields()]))
        assert queue.nothing("other", "default")
        late, later = queue.wait_for("other", wait=50), queue.wait_for("other", wait=0.5)
        queue.advance(0.5)
        assert later.result(PATIENCE) == [] and not late.done()
        queue.advance(0.5)
        assert late.result(PATIENCE) == [], "a second is enough not to be asked at once again"
        last = queue.wait_for("other", wait=50)
        assert not drained.done()
        assert queue.complete(job, "5", claim=Claim(("other",))).next is None
        drained.result(PATIENCE)
        assert client.result(PATIENCE)[0].result == b"5"
        assert queue.hold("x", 0, key="k").result(PATIENCE)[1], "who asks for what is there gets it"
        queue.engine.close()
        assert last.result(PATIENCE) == []

    def test_a_drain_with_nothing_in_progress_is_over_at_once(self, queue):
        queue.submit()
        queue.engine.drain().result(PATIENCE)
        queue.engine.drain().result(PATIENCE)

    @pytest.mark.parametrize(
        "way", ["complete", "fail for good", "cancel", "clear", *COMES_BACK, "lease over, the last one"]
    )
    def test_a_drain_is_over_when_the_last_job_has_left_its_worker_by(self, queue, way):
        attempts = 1 if way == "lease over, the last one" else 3
        job = queue.bring_to("processing", attempts=attempts)
        drained = queue.engine.drain()
        assert not drained.done()
        {
            "complete": lambda: queue.complete(job),
            "fail for good": lambda: queue.fail(job, retry=False),
            "cancel": lambda: queue.cancel(job),
            "clear": lambda: queue.engine.clear().result(PATIENCE),
            "release": lambda: queue.release(job),
            "give_back": lambda: queue.engine.give_back([job]),
            "fail": lambda: queue.fail(job),
            "lapse": lambda: queue.clock.advance(LEASE),
            "lease over, the last one": lambda: queue.clock.advance(LEASE),
        }[way]()
        drained.result(PATIENCE)
        assert queue.nothing()

    def test_a_drain_waits_for_a_worker_that_took_its_job_back(self, queue):
        job, other = queue.bring_to("processing"), queue.bring_to("processing", lease=1_000)
        queue.advance(LEASE)
        drained = queue.engine.drain()
        queue.extend(job)
        queue.complete(other)
        assert not drained.done()
        queue.complete(job)
        drained.result(PATIENCE)

    def test_clients_still_waiting_at_the_end_get_the_job_as_it_stands(self, queue):
        clients = [queue.hold("a"), queue.hold("b", delay=50, wait=500)]
        queue.take()
        waiter = queue.wait_for()
        queue.engine.close()
        assert [client.result(PATIENCE)[0].state for client in clients] == ["processing", "delayed"]
        assert waiter.result(PATIENCE) == []
        queue.restart("stop")
        assert [job.state for job in queue.jobs()] == ["delayed", "processing"]

    # -- caps

    def test_a_full_queue_refuses_and_takes_again_when_a_job_has_ended(self, make_queue):
        queue = make_queue(max_jobs=3)
        queue.submit(queue="a")
        queue.submit(queue="b", delay=50)
        job = queue.bring_to("processing")
        refused("queue_full", functools.partial(queue.hold, wait=0))
        refused("queue_full", queue.engine.submit_many, *batch([queue.fields()]))
        assert len(queue.jobs()) == 3
        queue.release(job)
        refused("queue_full", functools.partial(queue.hold, wait=0))
        queue.complete(queue.take())
        queue.submit()

    def test_a_batch_that_does_not_fit_is_refused_whole(self, make_queue):
        queue = make_queue(max_jobs=5)
        queue.submit("x")
        refused("queue_full", queue.engine.submit_many, *batch(queue.fields() for _ in range(5)))
        assert queue.payloads() == ["x"]
        assert queue.engine.stats()["pending"] == 1
        assert len(queue.submit_many(4)) == 4

    def test_a_queue_that_is_full_of_bytes_refuses(self, make_queue):
        queue = make_queue(max_bytes=10_000)
        big = '"' + "x" * 4_000 + '"'
        queue.submit(big)
        queue.submit(big)
        refused("queue_full", functools.partial(queue.hold, big, 0))
        refused("queue_full", queue.engine.submit_many, *batch([queue.fields(big)]))
        queue.complete(queue.take(), big)
        queue.submit(big)

    def test_a_known_key_attaches_also_when_the_queue_is_full(self, make_queue):
        queue = make_queue(max_jobs=1)
        job = queue.submit("x", key="k")
        assert queue.hold("x", 0, key="k").result(PATIENCE)[0].id == job.id

    # -- restart

    @both_restarts
    def test_every_job_comes_back_as_it_was(self, queue, how):
        for state in STATES:
            queue.bring_to(state, queue=state, priority=3, key=state, lease=400, ttl=None if state != "expired" else 5)
        queue.fail(queue.bring_to("processing", queue="r"), "text \u2028 \U0001f600", delay=90)
        queue.extend(queue.bring_to("processing", queue="x"), 77)
        raw = {**queue.fields(), "payload": b"\xff\x00\n", "kind": "binary"}
        binary, _ = queue.engine.submit(*submission(raw), 0).result(PATIENCE)
        before = [come_back(job) for job in queue.jobs()]
        queue.restart(how)
        assert [come_back(job) for job in queue.jobs()] == before
        queue.restart(how)
        assert [come_back(job) for job in queue.jobs()] == before
        assert queue.view(binary).payload == b"\xff\x00\n"

    @both_restarts
    def test_the_line_comes_back_in_order(self, queue, how):
        for name, priority in enumerate([0, 9, 5, 9, 0, 1]):
            queue.submit(name, priority=priority)
        lapsed, released = queue.take(lease=10), queue.take()
        queue.advance(10)
        queue.release(released)
        queue.restart(how)
        assert lapsed.payload == b"1"
        assert [queue.take().payload for _ in range(6)] == [b"1", b"3", b"2", b"5", b"0", b"4"]

    @both_restarts
    def test_a_worker_does_not_notice_a_restart(self, queue, how):
        queue.submit(lease=100)
        job = queue.take()
        queue.advance(99)
        queue.restart(how)
        assert queue.nothing()
        queue.advance(99.9)
        assert queue.state(job) == "processing", "a lease in force is re-armed in full"
        assert queue.extend(job).job.lease_seconds == 100
        assert queue.complete(job).job.state == "completed"
        queue.restart(how)
        assert queue.complete(job).duplicate

    @both_restarts
    def test_a_lease_that_is_not_renewed_after_a_restart_runs_out(self, queue, how):
        queue.submit(lease=100, attempts=2)
        queue.take()
        queue.advance(100)
        queue.take()
        queue.restart(how)
        queue.advance(100)
        job = queue.jobs()[0]
        assert (job.state, job.failures, job.deliveries) == ("failed", 2, 2)

    @both_restarts
    def test_a_late_worker_may_still_complete_after_a_restart(self, queue, how):
        job = queue.bring_to("processing")
        queue.advance(LEASE)
        queue.restart(how)
        assert queue.complete(job).job.state == "completed"

    @both_restarts
    def test_what_a_worker_was_told_holds_after_a_restart(self, queue, how):
        done, failed, released = (queue.bring_to("processing") for _ in range(3))
        queue.complete(done)
        queue.fail(failed)
        queue.release(released)
        queue.restart(how)
        assert queue.complete(done).duplicate
        assert queue.fail(failed).duplicate
        assert queue.release(released).duplicate

    @both_restarts
    def test_delay_ttl_and_retention_go_on_after_a_restart(self, queue, how):
        delayed, retried = queue.submit(delay=100), queue.bring_to("processing", queue="r")
        expiring, done = queue.submit(ttl=200, queue="e"), queue.bring_to("completed", queue="c")
        queue.fail(retried, delay=100)
        queue.advance(60)
        queue.restart(how)
        queue.advance(39)
        assert [queue.state(job) for job in (delayed, retried)] == ["delayed", "delayed"]
        queue.advance(1)
        assert [queue.state(job) for job in (delayed, retried)] == ["pending", "pending"]
        queue.advance(99)
        assert queue.state(expiring) == "pending"
        queue.advance(1)
        assert queue.state(expiring) == "expired"
        queue.advance(HOUR - 201)
        assert queue.state(done) == "completed"
        queue.advance(1)
        refused("job_not_found", queue.engine.view, done.id, 0)

    @both_restarts
    def test_time_passes_while_the_server_is_down(self, queue, how):
        delayed, expiring = queue.submit(delay=100), queue.submit(ttl=100, queue="e")
        done, in_hand = queue.bring_to("completed", queue="c"), queue.bring_to("processing", queue="p")
        queue.restart(how, away=2 * HOUR)
        assert queue.take().id == delayed.id
        assert queue.state(expiring) == "expired"
        refused("job_not_found", queue.engine.view, done.id, 0)
        assert queue.state(in_hand) == "processing"

    def test_a_restart_costs_no_attempt(self, queue):
        job = queue.bring_to("processing", attempts=1)
        for how in ("stop", "crash") * 3:
            queue.restart(how)
        assert (queue.view(job).failures, queue.view(job).deliveries) == (0, 1)

    # -- the wall clock

    @pytest.mark.parametrize("jump", [MONTH, -MONTH])
    def test_a_wall_clock_that_jumps_changes_nothing(self, queue, jump):
        delayed, expiring = queue.submit(delay=50), queue.submit(ttl=60, queue="e")
        done = queue.bring_to("completed", queue="c")
        leased, failed = queue.bring_to("processing", queue="p", lease=70), queue.bring_to("processing", queue="f")
        queue.fail(failed, delay=50)
        waiter, client = queue.wait_for("nobody", wait=80), queue.hold(queue="w", wait=80)
        queue.clock.jump(jump)
        queue.advance(49)
        assert [queue.state(job) for job in (delayed, failed)] == ["delayed", "delayed"]
        queue.advance(1)
        assert [queue.state(job) for job in (delayed, failed)] == ["pending", "pending"]
        queue.advance(9)
        assert queue.state(expiring) == "pending"
        queue.advance(1)
        assert queue.state(expiring) == "expired"
        queue.advance(9)
        assert queue.state(leased) == "processing"
        queue.advance(1)
        assert queue.state(leased) == "pending"
        queue.advance(9)
        assert queue.waiting_futures([waiter, client]) == [0, 1]
        queue.clock.advance(1)
        assert waiter.result(PATIENCE) == []
        assert client.result(PATIENCE)[0].state == "pending"
        queue.advance(HOUR - 81)
        assert queue.state(done) == "completed"
        queue.advance(1)
        refused("job_not_found", queue.engine.view, done.id, 0)

    @both_restarts
    @pytest.mark.parametrize("jump", [MONTH, -MONTH])
    def test_a_wall_clock_that_jumped_changes_nothing_at_the_next_restart_either(self, queue, how, jump):
        """As on a machine that gets the time from the network a while after its start."""
        delayed, expiring = queue.submit(delay=50), queue.submit(ttl=60, queue="e")
        done, again = queue.bring_to("completed", queue="c", key="k"), queue.bring_to("failed", queue="f")
        queue.clock.jump(jump)
        later = queue.submit(delay=50, queue="l")
        queue.restart(how)
        queue.restart(how)
        queue.advance(49)
        states = [queue.state(job) for job in (delayed, expiring, done, again, later)]
        assert states == ["delayed", "pending", "completed", "failed", "delayed"]
        queue.advance(1)
        assert [queue.state(job) for job in (delayed, later)] == ["pending", "pending"]
        queue.advance(10)
        assert queue.state(expiring) == "expired"
        queue.advance(HOUR - 61)
        assert queue.state(done) == "completed"
        queue.advance(1)
        refused("job_not_found", queue.engine.view, done.id, 0)
        assert queue.state(again) == "failed"
        assert queue.engine.stats()["queues"]["l"]["oldest_pending_seconds"] == HOUR

    @both_restarts
    def test_a_wall_clock_set_back_while_the_server_was_down_makes_no_job_wait_longer(self, queue, how):
        delayed, retried = queue.submit(delay=100), queue.bring_to("processing", queue="r")
        queue.fail(retried, delay=100)
        expiring, done = queue.submit(ttl=100, queue="e"), queue.bring_to("completed", queue="c")
        leased = queue.bring_to("processing", queue="p", lease=100)
        queue.restart(how, away=-MONTH)
        queue.advance(100)
        states = [queue.state(job) for job in (delayed, retried, expiring, leased, done)]
        assert states == ["pending", "pending", "expired", "pending", "completed"]
        queue.advance(HOUR - 100)
        refused("job_not_found", queue.engine.view, done.id, 0)

    @both_restarts
    def test_a_wall_clock_set_on_while_the_server_was_down_leaves_leases_alone(self, queue, how):
        leased = queue.bring_to("processing", lease=100, ttl=50)
        queue.restart(how, away=MONTH)
        queue.advance(99)
        assert queue.state(leased) == "processing"
        assert queue.complete(leased).job.state == "completed"

    # -- what is told about the whole

    def test_the_counts_are_those_of_the_jobs(self, queue):
        empty = queue.engine.stats()
        assert (empty["total"], empty["pending"], empty["running"], empty["completed"]) == (0, 0, 0, 0)
        for lane in "ab":
            for state in STATES:
                queue.bring_to(state, queue=lane)
        for how in (None, "stop", "crash"):
            if how:
                queue.restart(how)
            stats = queue.engine.stats()
            jobs = queue.jobs()
            assert stats["total"] == len(jobs) == 2 * len(STATES)
            for state in STATES:
                word = {"processing": "running"}.get(state, state)
                assert stats[word] == sum(job.state == state for job in jobs)
                for lane in "ab":
                    assert stats["queues"][lane][word] == sum((job.state, job.queue) == (state, lane) for job in jobs)

    def test_the_age_of_the_oldest_pending_job_is_told(self, queue):
        queue.submit(queue="a", priority=0)
        queue.advance(30)
        queue.submit(queue="a", priority=9)
        queue.advance(12)
        assert queue.engine.stats()["queues"]["a"]["oldest_pending_seconds"] == pytest.approx(42)
        queue.take("a")
        assert queue.engine.stats()["queues"]["a"]["oldest_pending_seconds"] == pytest.approx(42)
        queue.take("a")
        assert queue.engine.stats()["queues"]["a"]["oldest_pending_seconds"] is None

    def test_those_who_wait_are_counted(self, queue):
        clients, workers = [queue.hold(queue="a") for _ in range(3)], [queue.wait_for() for _ in range(4)]

        def waiting() -> tuple[int, int]:
            stats = queue.engine.stats()
            return stats["waiting_clients"], stats["waiting_workers"]

        assert waiting() == (3, 4)
        clients[0].cancel()
        workers[0].cancel()
        assert waiting() == (2, 3)
        queue.complete(queue.take("a"))
        queue.complete(queue.take("a"))
        queue.submit()
        assert waiting() == (1, 2)
        queue.advance(100)
        assert waiting() == (1, 0)
        queue.engine.clear().result(PATIENCE)
        assert waiting() == (0, 0)

    def test_the_workers_that_polled_are_known(self, queue):
        queue.submit()
        job = queue.take(worker="one")
        waiter = queue.wait_for("default", "b", worker="two")
        queue.wait_for(wait=0)
        seen = {worker["worker"]: worker for worker in queue.engine.workers_seen()}
        assert list(seen) == ["one", "two"]
        assert (seen["one"]["jobs_running"], seen["one"]["waiting"]) == (1, 0)
        assert (seen["two"]["jobs_running"], seen["two"]["waiting"]) == (0, 1)
        assert seen["two"]["queues"] == ["default", "b"]
        waiter.cancel()
        queue.complete(job)
        queue.submit()
        queue.fail(queue.take(worker="one"))
        seen = {worker["worker"]: worker for worker in queue.engine.workers_seen()}
        assert (seen["one"]["completed"], seen["one"]["failed"], seen["one"]["jobs_running"]) == (1, 1, 0)
        assert list(seen) == ["two", "one"], "the latest last"

    # -- many threads

    def test_under_many_threads_each_client_gets_the_result_of_its_own_job_once(self, queue):
        each, ended = 60, threading.Event()
        wrong: list[str] = []
        handed_out: list[str] = []

        def client(number: int) -> None:
            for turn in range(each):
                name = number * 1_000 + turn
                future = queue.hold(name, attempts=100)
                queue.wait_for("nobody").cancel()
                job, _ = future.result(PATIENCE)
                if job.result != b"%d" % (name * 2):
                    wrong.append(f"{name} got {job.result} ({job.state})")

        def worker(number: int) -> None:
            for turn in itertools.count():
                poll = queue.wait_for(wait=100, max=1 + number % 3)
                if turn % 5 == 4 and poll.cancel():
                    continue
                for job in poll.result(PATIENCE):
                    handed_out.append(job.id)
                    step = (turn + job.deliveries) % 4
                    if step == 3 and job.deliveries < 5:
                        queue.release(job)
                    elif step == 2 and job.deliveries < 5:
                        queue.fail(job, delay=0)
                    else:
                        queue.complete(job, int(job.payload) * 2)
                if ended.is_set():
                    return

        clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
        workers = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
        for thread in (*workers, *clients):
            thread.start()
        for thread in clients:
            thread.join()
        ended.set()
        queue.engine.drain()  # ends the long polls
        for thread in workers:
            thread.join()
        assert not wrong
        assert queue.engine.stats()["completed"] == len(clients) * each
        assert all(job.deliveries == handed_out.count(job.id) for job in queue.jobs())
