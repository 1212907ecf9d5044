"""LocalEngine keeps the contract of every engine, and what is its own: its threads, its memory, its folder."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
from local_engine import local_queues, open_engine, restart

import jobqueue
from engine_contract import HOUR, PATIENCE, STATES, EngineContract, Queue, refused
from jobqueue import Claim, LocalEngine, Settings
from support import wait_until


class TestLocalEngine(EngineContract):
    def make_engine(self, tmp_path, clock, **settings):
        return open_engine(tmp_path, clock, **settings)

    def restart(self, engine, tmp_path, clock, how, away, **settings):
        return restart(engine, clock, how, away, **settings)


@pytest.fixture
def make_queue(tmp_path, clock):
    """make_queue(**settings) -> Queue on a LocalEngine whose disk is not waited for."""
    with local_queues(tmp_path, clock, fsync="never") as make:
        yield make


@pytest.fixture
def queue(make_queue):
    return make_queue()


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("jobqueue")]


# -- memory: what is over leaves nothing behind


# What is over may lie about until it is as much as what is not, and 1,000 more: sweeping costs something, too.
ROUNDS, LEFT = 4_000, 2_100


def test_a_poll_that_was_answered_from_one_queue_leaves_nothing_in_the_line_of_another(queue):
    before = alive(jobqueue._Waiter), alive(jobqueue.Future)
    for _ in range(ROUNDS):
        waiter = queue.wait_for("a", "b", wait=300)
        queue.submit(queue="a")
        queue.complete(waiter.result(PATIENCE)[0])
    del waiter
    assert alive(jobqueue._Waiter) - before[0] < LEFT
    assert alive(jobqueue.Future) - before[1] < 30, "answers hold whole jobs"


def test_a_client_that_was_answered_early_is_not_remembered_until_its_wait_is_over(make_queue):
    queue = make_queue(keep_jobs=0)
    before = alive(jobqueue._Waiter), alive(jobqueue.Future)
    for _ in range(ROUNDS):
        client = queue.hold(wait=300)
        queue.complete(queue.take())
        client.result(PATIENCE)
    del client
    assert alive(jobqueue._Waiter) - before[0] < LEFT
    assert alive(jobqueue.Future) - before[1] < 30, "answers hold whole jobs"


@pytest.mark.parametrize("wait", [None, 300])
def test_clients_that_hang_up_are_forgotten_while_their_job_waits(queue, wait):
    queue.submit("x", key="k")
    before = alive(jobqueue.Future)
    for _ in range(ROUNDS):
        queue.hold("x", wait, key="k").cancel()
    assert alive(jobqueue.Future) - before < LEFT
    assert queue.engine.stats()["waiting_clients"] == 0


def test_pollers_that_hang_up_are_forgotten(queue):
    before = alive(jobqueue.Future)
    for _ in range(ROUNDS):
        queue.wait_for("a", "b", wait=300).cancel()
    assert alive(jobqueue.Future) - before < LEFT
    assert queue.engine.stats()["waiting_workers"] == 0


def test_a_crowd_that_hangs_up_while_others_come_and_go_disturbs_nobody(queue):
    job = queue.submit()
    crowd = [queue.engine.view(job.id, 50) for _ in range(10_000)]
    crowd += [queue.wait_for("nobody", wait=50) for _ in range(10_000)]
    leaving = threading.Thread(target=lambda: [future.cancel() for future in crowd])
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        leaving.start()
        while leaving.is_alive():
            for _ in range(100):
                queue.engine.view(job.id, 50).cancel()
                queue.wait_for("nobody", wait=50).cancel()
        leaving.join()
    finally:
        sys.setswitchinterval(switch_interval)
    queue.clock.advance(60)
    stats = queue.engine.stats()
    assert (stats["waiting_clients"], stats["waiting_workers"]) == (0, 0)
    waiter = queue.wait_for("nobody", wait=5)
    queue.clock.advance(5)
    assert waiter.result(PATIENCE) == [], "the timer thread has died"


def test_a_job_that_leaves_its_line_and_comes_back_again_and_again_stands_in_it_once(queue):
    first, second = queue.submit(), queue.submit()
    for _ in range(ROUNDS):
        queue.cancel(first)
        queue.requeue(first)
    (line,) = queue.engine._lanes["default"].heaps.values()
    assert len(line) < LEFT
    assert [queue.take().id, queue.take().id] == [first.id, second.id]
    assert queue.nothing()


def test_names_of_queues_that_nobody_uses_any_more_take_no_memory(make_queue):
    queue = make_queue(keep_jobs=0)
    for name in map(str, range(50)):
        queue.bring_to("completed", queue=name)
        queue.wait_for("poll-" + name, wait=10)
        queue.hold(queue="held-" + name, ttl=10)
        queue.pause("paused-" + name)
        queue.resume("paused-" + name)
    queue.advance(10)
    assert queue.engine.stats()["queues"] == {}


def test_the_work_that_has_passed_leaves_no_memory(make_queue):
    queue = make_queue(keep_jobs=10)

    def work(count: int) -> None:
        for number in range(count):
            queue.submit(number, delay=0 if number % 3 else 1, ttl=50 if number % 5 else None, key=str(number))
            queue.advance(1)
            job = queue.take(lease=30)
            if number % 7 == 0:
                queue.extend(job)
                queue.fail(job, delay=0)
                job = queue.take()
            queue.complete(job)

    work(200)
    gc.collect()
    before = len(gc.get_objects())
    work(1_500)
    gc.collect()
    assert len(gc.get_objects()) - before < 1_500


# -- threads


def test_an_engine_that_is_closed_leaves_no_thread(tmp_path, clock):
    before = own_threads()
    for number in range(3):
        engine = open_engine(tmp_path / str(number), clock)
        engine.stats()
        engine.close()
    wait_until(lambda: own_threads() == before, what="the threads of the closed engines to end")


def test_closing_again_does_nothing(tmp_path, clock):
    engine = open_engine(tmp_path, clock)
    engine.close()
    engine.close()


@pytest.mark.parametrize("state", STATES)
def test_no_timer_goes_off_for_what_has_passed_and_the_timer_lives_on(queue, state, caplog):
    for options in ({"ttl": 900}, {"lease": 700}):
        queue.bring_to(state, **options)
    for _ in range(12):
        queue.clock.advance(7 * 86_400 / 10)
        queue.engine.stats()
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    job = queue.submit(queue="new", delay=5)
    waiter = queue.wait_for("new")
    queue.clock.advance(5)
    assert waiter.result(PATIENCE)[0].id == job.id


def test_the_timer_acts_without_anybody_calling(queue):
    client, waiter = queue.hold(lease=5, attempts=1), queue.wait_for("nobody", wait=7)
    queue.take()
    held = queue.hold(queue="b", wait=9)
    expiring = queue.hold(queue="c", ttl=11)
    for seconds, future in ((5, client), (2, waiter), (2, held), (2, expiring)):
        queue.clock.advance(seconds)
        future.result(PATIENCE)


@pytest.fixture
def fails_once(monkeypatch):
    """fails_once(name): the next call of that function of the module finds no memory."""

    def begin(name):
        real, calls = getattr(jobqueue, name), []

        def called(*arguments):
            calls.append(arguments)
            if len(calls) == 1:
                raise MemoryError
            return real(*arguments)

        monkeypatch.setattr(jobqueue, name, called)
        return calls

    return begin


@pytest.mark.parametrize("options", [{"delay": 5}, {"lease": 5}], ids=lambda options: next(iter(options)))
def test_what_the_clock_brings_is_tried_again_after_a_mistake_and_the_timer_lives(queue, fails_once, caplog, options):
    job = queue.submit(**options)
    if "lease" in options:
        queue.take()
    waiter, calls = queue.wait_for(wait=300), fails_once("json_text")
    queue.clock.advance(5)
    wait_until(lambda: calls)
    wait_until(lambda: "not_done_in_time" in caplog.text)
    assert not waiter.done()
    queue.clock.advance(1)
    assert waiter.result(PATIENCE)[0].id == job.id
    assert queue.engine._timer_thread.is_alive()


def test_a_poll_is_answered_when_the_hand_over_to_it_finds_no_memory(queue, fails_once):
    waiter = queue.wait_for(wait=300)
    fails_once("lease_record")
    queue.submit_many(1)
    with pytest.raises(MemoryError):
        waiter.result(PATIENCE)
    assert queue.take().deliveries == 1
    assert queue.engine.stats()["waiting_workers"] == 0


def test_callbacks_run_outside_the_lock(queue):
    """A callback may call the engine: a worker's answer is written from it, and a write may fail and give back."""
    seen = []
    for number in range(3):
        queue.wait_for().add_done_callback(lambda future: (queue.engine.give_back(future.result()), seen.append(1)))
        client = queue.hold(number)
        client.add_done_callback(lambda future: seen.append(queue.engine.stats()["total"]))
    assert seen == [1, 1, 1]
    for _ in range(3):
        queue.complete(queue.take())
    assert seen == [1, 1, 1, 3, 3, 3]


# -- the end of an engine


def test_a_verb_on_a_closed_engine_is_refused_and_is_not_a_disk_failure(tmp_path, clock, caplog):
    failed = threading.Event()
    engine = LocalEngine(Settings(data_dir=str(tmp_path)), clock, failed.set)
    queue = Queue(engine, clock, again=lambda *how: engine)
    job = queue.bring_to("processing")
    engine.close()
    for verb, *arguments in (
        (queue.complete, job),
        (queue.fail, job),
        (queue.release, job),
        (queue.extend, job),
        (queue.submit,),
        (engine.cancel, job.id),
        (engine.clear,),
        (engine.pause, None, True),
    ):
        with pytest.raises(jobqueue.JobQueueError):
            answer = verb(*arguments)
            answer.result(PATIENCE)
    refused("draining", engine.poll, Claim(wait=50))
    assert not failed.wait(0.1)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_two_engines_on_two_folders_know_nothing_of_each_other(make_queue):
    first, second = make_queue(), make_queue()
    job = first.submit("x", key="k")
    assert second.nothing()
    assert not second.hold("y", 0, key="k").result(PATIENCE)[1]
    refused("job_not_found", second.engine.view, job.id, 0)
    second.engine.clear().result(PATIENCE)
    assert first.take().id == job.id


def test_an_hour_of_idleness_changes_nothing(queue):
    job = queue.submit()
    for _ in range(60):
        queue.clock.advance(60)
    assert queue.take().id == job.id
    assert HOUR == 60 * 60


# -- a restart at once: what is due by then is settled by the first verb


def test_what_came_due_while_the_server_was_down_is_settled_before_the_first_answer(queue):
    queue.submit(delay=10)
    queue.submit(queue="e", ttl=10)
    queue.restart("crash", away=60)
    stats = queue.engine.stats()
    assert (stats["delayed"], stats["pending"], stats["expired"]) == (0, 1, 1)
