"""What a verb costs with 200,000 jobs in line, next to what it costs with few.

    python tests/test_scale.py [JOBS]        prints the table

As a test it only sees what grows with the number of jobs: a factor of a few, on a machine that does other things, too.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from local_engine import open_engine  # noqa: E402

import jobqueue  # noqa: E402
from engine_contract import Queue, submission  # noqa: E402

FEW, MANY = 5_000, 200_000
QUEUES = [f"queue-{number}" for number in range(20)]
SAMPLES = 1_000


def fill(queue: Queue, count: int) -> None:
    """Jobs in mixed queues, with mixed priorities, delays and ttls; a part of them in workers' hands, and finished."""
    chance = random.Random(count)
    for number in range(count):
        fields = queue.fields(
            queue=chance.choice(QUEUES),
            priority=chance.randrange(10),
            delay=chance.choice([0.0, 0.0, 0.0, chance.uniform(1_000, 100_000)]),
            ttl=chance.choice([None, None, chance.uniform(100_000, 1_000_000)]),
            key=str(number) if number % 10 == 0 else None,
        )
        queue.engine.submit(*submission(fields), 0)
    for name in QUEUES:
        for job in queue.wait_for(name, wait=0, max=count // 400).result(60):
            queue.complete(job) if job.number % 2 else None


def round_trip(queue: Queue) -> None:
    queue.submit(queue="trip")
    queue.complete(queue.take("trip"))


def in_the_crowd(verb: Callable[[Queue, Any], Any]) -> Callable[[Queue], None]:
    """A verb on the first job of a full line, which another joins at its end."""

    def call(queue: Queue) -> None:
        name = QUEUES[next(queue.turns) % len(QUEUES)]
        queue.submit(queue=name)
        verb(queue, queue.take(name))

    return call


def _cancel(queue: Queue) -> None:
    queue.cancel(queue.submit(queue=QUEUES[0], delay=5_000.0))


def _requeue(queue: Queue) -> None:
    queue.requeue(queue.cancel(queue.submit(queue=QUEUES[1])))


VERBS: dict[str, Callable[[Queue], Any]] = {
    "submit, poll, complete": round_trip,
    "submit to a full line": lambda queue: queue.submit(queue=QUEUES[2], priority=5),
    "submit with a delay": lambda queue: queue.submit(queue=QUEUES[3], delay=4_000.0, ttl=9_000.0),
    "submit with a known key": lambda queue: queue.hold("0", 0, key="again").result(60),
    "submit, poll, release": in_the_crowd(lambda queue, job: queue.release(job)),
    "submit, poll, extend, give back": in_the_crowd(
        lambda queue, job: (queue.extend(job, 900), queue.engine.give_back([job]))
    ),
    "submit, poll, fail with backoff": in_the_crowd(lambda queue, job: queue.fail(job, delay=7_000.0)),
    "submit to a full line, poll, complete": in_the_crowd(lambda queue, job: queue.complete(job)),
    "long poll that ends at once": lambda queue: queue.wait_for("nobody", wait=50).cancel(),
    "submit, cancel": _cancel,
    "submit, cancel, requeue": _requeue,
    "peek": lambda queue: queue.engine.peek(tuple(QUEUES[:3])),
    "view": lambda queue: queue.view(queue.some),
    "a page of the listing": lambda queue: queue.engine.jobs(None, None, 20, None),
    "stats": lambda queue: queue.engine.stats(),
}


def measure(count: int, samples: int = SAMPLES) -> dict[str, float]:
    """Microseconds of each verb, the median, with that many jobs in the engine."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        settings = {"fsync": "never", "keep_jobs": 5_000, "compact_bytes": 1 << 34}
        engine = open_engine(Path(root), jobqueue.Clock(), **settings)
        queue = Queue(engine, None, again=None)
        queue.turns = iter(range(1 << 40))
        queue.some = queue.submit("0", key="again", delay=50_000.0).id
        fill(queue, count)
        figures = {}
        for name, verb in VERBS.items():
            times = []
            for _ in range(samples):
                begin = time.perf_counter()
                verb(queue)
                times.append(time.perf_counter() - begin)
            figures[name] = statistics.median(times) * 1e6
        engine.close()
    return figures


@pytest.mark.long
def test_no_verb_grows_with_the_number_of_jobs():
    few, many = measure(FEW), measure(MANY)
    for name in VERBS:
        print(f"{name:32}{few[name]:10.1f} us{many[name]:10.1f} us")
    grown = {name: (few[name], many[name]) for name in VERBS if many[name] > 3 * few[name] + 20}
    assert not grown, "microseconds with few jobs, with many"


def main(count: int = MANY) -> None:
    few, many = measure(FEW), measure(count)
    print(f"{'microseconds (median)':32}{FEW:>10,} jobs{count:>10,} jobs")
    for name in VERBS:
        print(f"{name:32}{few[name]:10.1f}     {many[name]:10.1f}     {100 * (many[name] / few[name] - 1):+6.0f} %")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
