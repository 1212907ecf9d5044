"""The rows of the table: what is measured, against whom, and what is to be reached.

A row is a function that takes the options of the run and yields Figures. Its name is what `--only` takes.
"""
import contextlib
import random
import shutil
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from functools import partial

import load
import peers
import protocols as wire
from load import Process, clock, measure, median, side_by_side, sockets_side, sync_jobs
from protocols import Failure, tags

# (clients, workers) of a point, by the number of clients.
POINTS = {1: (1, 1), 8: (8, 4), 64: (64, 64)}
ROWS = {}


@dataclass
class Options:
    """What the command line asks for."""

    runs: int = 3
    seconds: float = 2.0
    long: bool = False


@dataclass
class Figure:
    """One line of the table. `judged` is what `at_least` and `aim` are held against: the ratio or the value."""

    name: str
    unit: str
    ours: float
    peer: str = ""
    theirs: float | None = None
    at_least: float | None = None
    aim: float | None = None
    judged: str = "ratio"
    less_is_better: bool = False
    row: str = ""
    notes: dict = field(default_factory=dict)

    @property
    def ratio(self):
        return self.ours / self.theirs if self.theirs else None

    @property
    def calm(self):
        """Whether most of its runs, on each side, had the machine to themselves; true where nobody looked."""
        sides = [self.notes[side] for side in ("ours", "theirs") if side in self.notes]
        return all(2 * side["calm_runs"] > len(side["runs"]) for side in sides)

    @property
    def reached(self):
        """'aim', 'at least', 'no', or '' where nothing is asked."""
        if self.at_least is None:
            return ""
        value = self.ratio if self.judged == "ratio" else self.ours
        sign = -1 if self.less_is_better else 1
        if sign * value >= sign * self.aim:
            return "aim"
        return "at least" if sign * value >= sign * self.at_least else "no"

    @property
    def shortfall(self):
        """How far it is from `at_least`: 1 is just reached, 2 is missed by half."""
        if self.at_least is None:
            return 0.0
        value = self.ratio if self.judged == "ratio" else self.ours
        return value / self.at_least if self.less_is_better else self.at_least / max(value, 1e-9)


def row(name, title):
    """Enters a function into the table of rows."""

    def enter(function):
        function.title = title
        ROWS[name] = function
        return function

    return enter


def notes(samples):
    """What stands in results.json beside a median: each run, and what the runs cost."""
    return {
        "runs": [round(sample.rate, 1) for sample in samples],
        "p50_ms": round(median(samples, "p50") * 1e3, 3),
        "p99_ms": round(median(samples, "p99") * 1e3, 3),
        "server_cpu_us": round(median(samples, "cpu") * 1e6, 1),
        "load_cpu_us": round(median(samples, "load_cpu") * 1e6, 1),
        "others_used_percent": [round(sample.foreign * 100) for sample in samples],
        "disk_sync_ms": [round(sample.sync_ms, 2) for sample in samples],
        "calm_runs": sum(load.unrest(sample) <= 1 for sample in samples),
        "repeated_runs": sum(sample.repeated for sample in samples),
    }


def both_notes(ours, theirs):
    return {"ours": notes(ours), "theirs": notes(theirs)}


# -- /health ---------------------------------------------------------------------------------------------------------


@row("health", "/health over 16 keep-alive connections, against the standard library's server")
def health(options):
    def side(server):
        gets = sockets_side(server.port, lambda port, tally, index: wire.http_get(port, tally), 16)
        return measure([gets], pids=server.pids, seconds=options.seconds)

    with peers.jobqueue() as ours, peers.stock_http() as stock:
        got = side_by_side(options.runs, ours=partial(side, ours), stock=partial(side, stock))
    yield Figure(
        "/health, 16 connections",
        "/s",
        median(got["ours"]),
        "stock handler",
        median(got["stock"]),
        at_least=3,
        aim=4,
        notes=both_notes(got["ours"], got["stock"]),
    )


# -- sync jobs against the peers -------------------------------------------------------------------------------------

FOLLOW = partial(wire.http_worker, follow=True)
POLL = partial(wire.http_worker, follow=False)


def against(options, clients, sides):
    """Sync jobs a second at one point for each of {name: (server, client, worker)}, in turn."""
    return side_by_side(
        options.runs,
        **{
            name: partial(sync_jobs, server, *POINTS[clients], client, worker, options.seconds)
            for name, (server, client, worker) in sides.items()
        },
    )


def started(stack, wanted):
    """Starts the peers of {name: (program, context manager, client, worker)} that are installed."""
    return {
        name: (stack.enter_context(start()), client, worker)
        for name, (program, start, client, worker) in wanted.items()
        if not peers.missing(program)
    }


BEANSTALK = "beanstalkd", wire.beanstalk_client, wire.beanstalk_worker
REDIS = "redis-server", wire.redis_client, wire.redis_worker


def wanted(peer, start):
    return peer[0], start, *peer[1:]


@row("durable", "sync jobs with --fsync always, against beanstalkd -f0 and Redis lists with appendfsync always")
def durable(options):
    targets = {
        "beanstalkd -f0": {1: (1.2, 1.7), 8: (2.5, 4), 64: (2.5, 4)},
        "Redis appendfsync always": {1: (1.5, 2), 8: (1.3, 2), 64: (1.8, 3)},
    }
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(peers.jobqueue("always"))
        sides = {"next": (ours, wire.http_client, FOLLOW), "poll": (ours, wire.http_client, POLL)}
        sides |= started(
            stack,
            {
                "beanstalkd -f0": wanted(BEANSTALK, partial(peers.beanstalkd, durable=True)),
                "Redis appendfsync always": wanted(REDIS, partial(peers.redis, durable=True)),
            },
        )
        for clients in POINTS:
            got = against(options, clients, sides)
            for style, said in (("next", "next=true"), ("poll", "poll + complete")):
                for peer, target in targets.items():
                    if peer in got:
                        yield sync_figure(f"durable, {said}", clients, got, style, peer, *target[clients])


def sync_figure(name, clients, got, style, peer, at_least=None, aim=None):
    """One line: sync jobs a second of ours in one style against one peer."""
    return Figure(
        f"{name}, {clients} client{'s' * (clients > 1)}",
        " jobs/s",
        median(got[style]),
        peer,
        median(got[peer]),
        at_least=at_least,
        aim=aim,
        notes={"clients": clients, "style": style} | both_notes(got[style], got[peer]),
    )


@row("memory", "sync jobs with --fsync never and next=true, against gearmand; also beanstalkd and Redis in memory")
def memory(options):
    targets = {1: (0.9, 1.2), 8: (0.5, 1), 64: (0.45, 1)}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(peers.jobqueue("never"))
        sides = {"next": (ours, wire.http_client, FOLLOW)} | started(
            stack,
            {
                "gearmand": ("gearmand", peers.gearmand, wire.gearman_client, wire.gearman_worker),
                "beanstalkd in memory": wanted(BEANSTALK, partial(peers.beanstalkd, durable=False)),
                "Redis in memory": wanted(REDIS, partial(peers.redis, durable=False)),
            },
        )
        for clients in POINTS:
            got = against(options, clients, sides)
            for peer in got:
                if peer != "next":
                    target = targets[clients] if peer == "gearmand" else (None, None)
                    yield sync_figure("in memory", clients, got, "next", peer, *target)


@row("queues", "sync jobs with --fsync never, against RQ, Huey and Celery on Redis in memory")
def queues(options):
    for kind in ("rq", "huey", "celery"):
        if peers.missing(kind):
            continue
        with peers.jobqueue("never") as ours, peers.python_queue(kind) as theirs:
            for clients in (1, 8):
                got = side_by_side(
                    options.runs,
                    **{
                        "next": partial(sync_jobs, ours, *POINTS[clients], wire.http_client, FOLLOW, options.seconds),
                        kind: partial(library_jobs, theirs, clients, options.seconds),
                    },
                )
                yield sync_figure("in memory", clients, got, "next", kind, 8, 15)


def library_jobs(server, clients, seconds):
    """Sync jobs a second of a Python queue, by its own client library: a process for each four clients."""
    run = next(load.runs)
    processes = max(1, clients // 4)
    sides = [library_side(server, run, number, clients // processes) for number in range(processes)]
    return measure(sides, pids=server.pids, seconds=seconds)


def library_side(server, run, number, threads):
    """What a process does that submits jobs from `threads` threads through a library."""

    def prepare():
        import os

        os.environ.update(server.env_for_clients)
        call = LIBRARIES[server.queue]()
        call("~warm-up")

        def one(tally, index):
            for tag in tags(run, number * threads + index):
                began = clock()
                said = call(tag.decode())
                if tag.decode() not in str(said):
                    raise Failure(f"{server.queue}: the answer to {tag!r} was {said!r}")
                if tally.done(began):
                    return

        def go(tally):
            crowd = [threading.Thread(target=one, args=(tally, index)) for index in range(threads)]
            for thread in crowd:
                thread.start()
            for thread in crowd:
                thread.join()

        return go

    return prepare


def rq_call():
    import tasks

    queue = tasks.rq_queue()
    return lambda tag: queue.enqueue(tasks.work, tag).latest_result(timeout=load.PATIENCE).return_value


def huey_call():
    import tasks

    return lambda tag: tasks.huey_work(tag).get(blocking=True, timeout=load.PATIENCE)


def celery_call():
    import tasks

    return lambda tag: tasks.celery_work.delay(tag).get(timeout=load.PATIENCE)


LIBRARIES = {"rq": rq_call, "huey": huey_call, "celery": celery_call}


# -- jobqueue against itself -----------------------------------------------------------------------------------------


def fill(server, jobs, query=b"", size=wire.PAYLOAD_BYTES, connections=1):
    """Puts `jobs` pending jobs into a server."""
    run, batches = next(load.runs), -(-jobs // 1000 // connections)

    def make(port, tally, index):
        return wire.http_intake(port, tally, tags(run, index), query=query, size=size, batches=batches)

    return measure([sockets_side(server.port, make, connections)], pids=server.pids, drain=True)


def drain(server, size=32, connections=4):
    """Completes all pending jobs in batches."""

    def make(port, tally, index):
        return wire.http_batch_worker(port, tally, size)

    return measure([sockets_side(server.port, make, connections)], pids=server.pids, drain=True)


@row("history", "sync jobs with 10,000 finished jobs kept, against none kept")
def history(options):
    with peers.jobqueue("never") as full, peers.jobqueue("never", keep_jobs=0) as empty:
        for server in (full, empty):
            fill(server, 10_000)
            drain(server)
        sides = {
            "full": (full, wire.http_client, FOLLOW),
            "empty": (empty, wire.http_client, FOLLOW),
        }
        got = against(options, 8, sides)
        kept = number_of(full, "completed")
        if kept < 9_000:  # it is trimmed in steps
            raise Failure(f"10,000 finished jobs should be kept, there are {kept}")
    yield Figure(
        "10,000 finished jobs kept, 8 clients",
        " jobs/s",
        median(got["full"]),
        "none kept",
        median(got["empty"]),
        at_least=0.95,
        aim=1,
        notes=both_notes(got["full"], got["empty"]),
    )


def ask(server, method, path, body=b""):
    """One request from this process; the body of its answer."""
    out = {}

    def once():
        out["body"] = yield from wire.exchange(
            wire.request(server.port, method, path, body), b"200", b"202", b"204"
        )

    with load.connect(server.port) as sock:
        load.drive_one(sock, once())
    return out["body"]


@row("cpu", "server CPU for a sync job, 8 clients and 4 workers")
def cpu(options):
    targets = {"never": (110, 70), "always": (140, 90)}
    with peers.jobqueue("never") as never, peers.jobqueue("always") as always:
        got = against(
            options,
            8,
            {
                "never, next=true": (never, wire.http_client, FOLLOW),
                "always, next=true": (always, wire.http_client, FOLLOW),
                "never, poll + complete": (never, wire.http_client, POLL),
                "always, poll + complete": (always, wire.http_client, POLL),
            },
        )
    for name, samples in got.items():
        at_least, aim = targets[name.partition(",")[0]]
        yield Figure(
            f"CPU a sync job, {name}",
            " µs",
            median(samples, "cpu") * 1e6,
            at_least=at_least,
            aim=aim,
            judged="value",
            less_is_better=True,
            notes={"ours": notes(samples)},
        )


BIG = {"max_jobs": 5_000_000, "max_bytes": 8 << 30}


@row("intake", "durable intake: POST /api/jobs, 1,000 lines of 100 bytes each, 4 connections")
def intake(options):
    samples = []
    for _ in range(options.runs):
        with peers.jobqueue("always", **BIG) as server:
            run = next(load.runs)
            side = sockets_side(
                server.port, lambda port, tally, index, run=run: wire.http_intake(port, tally, tags(run, index)), 4
            )
            samples.append(load.calm_run(partial(measure, [side], pids=server.pids, seconds=options.seconds)))
    yield Figure(
        "durable ndjson intake",
        " lines/s",
        median(samples),
        at_least=40_000,
        aim=80_000,
        judged="value",
        notes={"ours": notes(samples)},
    )


@row("batch", "poll max=32 and batch complete, durable, 4 workers")
def batch(options):
    samples = []
    with peers.jobqueue("always", **BIG) as server:
        for _ in range(options.runs):
            fill(server, 40_000)
            samples.append(drain(server))
            samples[-1].sync_ms = load.sync_ms()
    yield Figure(
        "poll 32 + batch complete",
        " jobs/s",
        median(samples),
        at_least=15_000,
        aim=30_000,
        judged="value",
        notes={"ours": notes(samples)},
    )


# -- gRPC ------------------------------------------------------------------------------------------------------------


def grpc_side(port, threads, size=0):
    """A process with `threads` gRPC workers, each taking a job (or `size` with one call) and completing it."""

    def prepare():
        import sys

        sys.path.insert(0, str(peers.HERE.parent))
        import grpc

        from worker_pb2_gen import worker_pb2 as pb
        from worker_pb2_gen import worker_pb2_grpc

        stub = worker_pb2_grpc.WorkerServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))

        def single():
            job = stub.RequestJob(pb.JobRequest())
            done = stub.CompleteJob(pb.JobResult(job_id=job.id, payload='{"done":1}', lease_token=job.lease_token))
            if not done.success:
                raise Failure(f"CompleteJob of {job.id} did not succeed")
            return 1

        def batch():
            jobs = stub.RequestJobs(pb.JobRequest(max=size)).jobs
            results = [pb.JobResult(job_id=job.id, payload='{"done":1}', lease_token=job.lease_token) for job in jobs]
            done = stub.CompleteJobs(pb.JobResults(results=results)).results
            if not jobs or [item.status for item in done] != [200] * len(jobs):
                raise Failure(f"{len(jobs)} jobs were completed with {done}")
            return len(jobs)

        work, failed = (batch if size else single), []

        def one(tally):
            try:
                while True:
                    began = clock()
                    if tally.done(began, work()):
                        return
            except BaseException as error:
                failed.append(error)

        def go(tally):
            crowd = [threading.Thread(target=one, args=(tally,)) for _ in range(threads)]
            for thread in crowd:
                thread.start()
            for thread in crowd:
                thread.join()
            if failed:
                raise failed[0]

        return go

    return prepare


def grpc_run(server, port, options, size=0, filled=0):
    """One run with 8 gRPC workers in two processes."""
    if filled:
        ask(server, b"DELETE", b"/api/admin/clear")
        fill(server, filled)
    sides = [grpc_side(port, 4, size) for _ in range(2)]
    return measure(sides, pids=server.pids, seconds=options.seconds)


@row("grpc", "gRPC RequestJob + CompleteJob, against the same two calls of a bare service; batches of 32")
def grpc(options):
    if peers.missing("grpc"):
        return
    with peers.jobqueue("always", True, **BIG) as always, peers.jobqueue("never", True, **BIG) as never:
        with peers.stock_grpc() as stock:
            got = side_by_side(
                options.runs,
                always=partial(grpc_run, always, always.grpc_port, options, filled=20_000),
                never=partial(grpc_run, never, never.grpc_port, options, filled=20_000),
                stock=partial(grpc_run, stock, stock.port, options),
            )
        batches = side_by_side(
            options.runs, batches=partial(grpc_run, always, always.grpc_port, options, size=32, filled=100_000)
        )["batches"]
    for name in ("always", "never"):
        yield Figure(
            f"gRPC RequestJob + CompleteJob, fsync {name}",
            " pairs/s",
            median(got[name]),
            "bare service",
            median(got["stock"]),
            at_least=0.75,
            aim=0.9,
            notes=both_notes(got[name], got["stock"]),
        )
    yield Figure(
        "gRPC batches of 32, fsync always",
        " jobs/s",
        median(batches),
        at_least=4_000,
        aim=10_000,
        judged="value",
        notes={"ours": notes(batches)},
    )


# -- crowds ----------------------------------------------------------------------------------------------------------


def crowd_size(options):
    return 10_000 if options.long else 5_000


def room_for(clients):
    """The settings with which a server holds that many clients."""
    if load.raise_file_limit() < clients + 200:
        raise Failure(f"{clients} sockets need a higher `ulimit -n`")
    return {"max_connections": clients + 200, "max_held": clients + 100, **BIG}


def number_of(server, name):
    """A number from the stats."""
    import json

    return json.loads(ask(server, b"GET", b"/api/admin/stats"))[name]


def until(condition, seconds=load.PATIENCE, what="it"):
    """Waits until a condition holds."""
    deadline = clock() + seconds
    while not condition():
        if clock() > deadline:
            raise Failure(f"{what} did not happen in {seconds} s")
        time.sleep(0.02)


def hold(server, clients):
    """A process with that many clients, each waiting for its own job; returns when the server holds them all."""
    run = next(load.runs)
    names = [next(tags(run, index % 10_000)) for index in range(clients)]

    def make(port, tally, index):
        return wire.http_held(port, tally, names[index])

    holder = Process(sockets_side(server.port, make, clients))
    try:
        holder.expect(clock() + load.PATIENCE)
        holder.pipe.send((clock(), clock() + 3600))
        until(lambda: number_of(server, "waiting_clients") >= clients, what=f"holding {clients} clients")
        holder.complain()
    except BaseException:
        holder.end()
        raise
    return holder


@row("held", "held clients: memory each, and all answered in one sweep (5,000; --long: 10,000)")
def held(options):
    clients = crowd_size(options)
    with peers.jobqueue("always", **room_for(clients)) as server:
        ask(server, b"GET", b"/health")
        before = load.rss_bytes(server.pid)
        holder = hold(server, clients)
        try:
            each = (load.rss_bytes(server.pid) - before) / clients / 1000
            began = clock()
            drain(server, size=100)
            count, _, last = holder.expect(clock() + load.PATIENCE)
        finally:
            holder.end()
    if count != clients:
        raise Failure(f"only {count} of {clients} held clients had their own answer")
    yield Figure(
        f"memory of a held client, {clients:,} of them", " KB", each, at_least=40, aim=25, judged="value",
        less_is_better=True,
    )  # fmt: skip
    yield Figure(
        f"{clients:,} held clients answered in one sweep", " s", last - began, at_least=5 * clients / 10_000,
        aim=2 * clients / 10_000, judged="value", less_is_better=True,
    )  # fmt: skip


@row("hangup", "a crowd of held clients hangs up at once: /health meanwhile (5,000; --long: 10,000)")
def hangup(options):
    clients = crowd_size(options)
    with peers.jobqueue("always", **room_for(clients)) as server:
        calm = open_files(server)
        holder = hold(server, clients)
        worst, stop = [], threading.Event()
        probe = threading.Thread(target=probe_health, args=(server, worst, stop))
        probe.start()
        try:
            time.sleep(0.5)
            quiet = max(worst)
            worst.clear()
            began = clock()
            holder.end()
            until(lambda: open_files(server) <= calm + 20, what="letting go of the clients that left")
            gone = clock() - began
            time.sleep(0.5)
        finally:
            stop.set()
            probe.join()
            holder.end() if holder.process.is_alive() else None
    yield Figure(
        f"{clients:,} clients hang up: slowest /health", " ms", max(worst) * 1e3, "before", quiet * 1e3,
        at_least=1000, aim=250, judged="value", less_is_better=True, notes={"probes": len(worst)},
    )  # fmt: skip
    yield Figure(
        f"{clients:,} clients hang up: all gone after", " s", gone, at_least=3, aim=1, judged="value",
        less_is_better=True,
    )  # fmt: skip


def open_files(server):
    """How many descriptors the server has open."""
    import os

    return len(os.listdir(f"/proc/{server.pid}/fd"))


def probe_health(server, spent, stop):
    """Asks /health again and again over one connection, and notes how long each took."""
    message = wire.request(server.port, b"GET", b"/health")
    with load.connect(server.port) as sock:
        while not stop.is_set():
            began = clock()
            sock.sendall(message)
            if not sock.recv(65536).startswith(b"HTTP/1.1 200"):
                raise Failure("/health failed")
            spent.append(clock() - began)
            time.sleep(0.002)


# -- depth -----------------------------------------------------------------------------------------------------------

QUEUES = [b"depth%d" % number for number in range(4)]


@row("depth", "200,000 jobs pending (--long: 1,000,000): a submit-poll-complete round trip, against an empty queue")
def depth(options):
    jobs = 1_000_000 if options.long else 200_000
    with peers.jobqueue("never", **BIG) as deep, peers.jobqueue("never", **BIG) as empty:
        queries = [
            b"?queue=%b&priority=%d%b" % (queue, priority, delay)
            for queue in QUEUES
            for priority in (0, 2, 5, 7, 9)
            for delay in (b"", b"", b"", b"&delay=3600")
        ]
        for query in queries:
            fill(deep, jobs // len(queries), query)
        got = side_by_side(options.runs * 3, deep=partial(round_trips, deep), empty=partial(round_trips, empty))
    ours, theirs = (median(got[name], "p50") * 1e6 for name in ("deep", "empty"))
    yield Figure(
        f"{jobs:,} pending: p50 of a round trip", " µs", ours, "empty queue", theirs, at_least=1.2, aim=1.05,
        less_is_better=True, notes=both_notes(got["deep"], got["empty"]),
    )  # fmt: skip


def round_trips(server, trips=1000):
    """Round trips over one connection: submit without waiting, poll, complete; queues and priorities mixed."""
    run = next(load.runs)

    def make(port, tally, index):
        dice, names = random.Random(run), tags(run, index)
        for number in range(trips + trips // 5):
            queue, began = dice.choice(QUEUES), clock()
            path = b"/api/submit?wait=0&queue=%b&priority=%d" % (queue, dice.randrange(10))
            yield from wire.exchange(wire.request(port, b"POST", path, wire.payload(next(names))), b"202")
            job = yield from wire.exchange(
                wire.request(port, b"GET", b"/api/worker/poll?queue=" + queue), b"200"
            )
            path = b"/api/worker/complete/%b?lease_token=%b" % (wire.JOB_ID.search(job)[1], wire.TOKEN.search(job)[1])
            yield from wire.exchange(wire.request(port, b"POST", path, wire.result(wire.tag_of(job))), b"200")
            if number >= trips // 5:  # the first ones warm up
                tally.done(began)

    return measure([sockets_side(server.port, make, 1)], pids=server.pids, drain=True)


# -- at rest, at the start -------------------------------------------------------------------------------------------


@row("idle", "an idle server: CPU over 10 s, memory, and from the start to the first /health, without and with gRPC")
def idle(options):
    kinds = [
        ("without gRPC", False, (0.25, 0.15), (25, 18)),
        ("without gRPC, compiled", False, (0.25, 0.15), (25, 18)),
        ("with gRPC", True, (0.6, 0.4), (60, 45)),
        ("with gRPC, compiled", True, (0.6, 0.4), (60, 45)),
    ]
    if peers.missing("grpc"):
        del kinds[2:]
    start_once(kinds[-1][1], compiled=True)  # now there is a compiled copy
    starts = {name: [] for name, _, _, _ in kinds}
    for _ in range(max(5, options.runs)):
        for name, grpc, _, _ in kinds:
            starts[name].append(start_once(grpc, "compiled" in name))
    shutil.rmtree(compiled_copies())
    for name, _, (at_least, aim), _ in kinds:
        spent = [seconds for seconds, _ in starts[name]]
        yield Figure(
            f"start to first /health, {name}", " s", statistics.median(spent), at_least=at_least, aim=aim,
            judged="value", less_is_better=True, notes={"runs": [round(value, 3) for value in spent]},
        )  # fmt: skip
    for name, _, _, (at_least, aim) in kinds:
        yield Figure(
            f"memory at rest, {name}", " MB", statistics.median(rss for _, rss in starts[name]) / 1e6,
            at_least=at_least, aim=aim, judged="value", less_is_better=True,
        )  # fmt: skip
    with peers.jobqueue(grpc=kinds[-1][1]) as server:
        ask(server, b"GET", b"/health")
        time.sleep(1)
        before, began = load.cpu_fine(server.pid), clock()
        time.sleep(10)
        share = (load.cpu_fine(server.pid) - before) / (clock() - began) * 100
    # The aim is 0; what a timer that fires once a minute costs is less than this.
    yield Figure("idle CPU over 10 s", " %", share, at_least=0.2, aim=0.01, judged="value", less_is_better=True)


def compiled_copies():
    return f"{load.scratch['folder']}/jobqueue-bench-compiled"


def start_once(grpc, compiled=False):
    """Starts a server, asks until /health answers; (seconds, resident bytes). `compiled`: by `python -m jobqueue`."""
    port = peers.free_port()
    with peers.folder() as path:
        command, env = peers.jobqueue_command(path, "always", grpc, port), {}
        if compiled:
            command[1:2] = ["-m", "jobqueue"]
            env = {"PYTHONPATH": str(peers.config["server"].parent), "PYTHONDONTWRITEBYTECODE": ""}
            env["PYTHONPYCACHEPREFIX"] = compiled_copies()
        began = clock()
        server = peers.Server("jobqueue", command, port, path, env)
        try:
            server.wait(server.listening)
            ask(server, b"GET", b"/health")
            spent = clock() - began
            time.sleep(0.3)  # gRPC's own threads start after the first answer
            return spent, load.rss_bytes(server.pid)
        finally:
            server.stop()


@row("restart", "a restart with 200,000 pending jobs of 200 bytes (--long: 1,000,000): time, memory")
def restart(options):
    jobs = 1_000_000 if options.long else 200_000
    limit, aim = 15 * jobs / 1e6, 7.5 * jobs / 1e6
    with peers.jobqueue("never", **BIG) as server:
        empty = load.rss_bytes(server.pid)
        fill(server, jobs, size=200, connections=4)
        for how, said in ((signal.SIGTERM, "a clean stop"), (signal.SIGKILL, "kill -9")):
            server.stop(how)
            server.start()
            peers.jobqueue_ready(server)
            ask(server, b"GET", b"/health")
            spent = clock() - server.began
            if number_of(server, "pending") != jobs:
                raise Failure(f"{number_of(server, 'pending')} of {jobs} jobs came back after {said}")
            yield Figure(
                f"restart with {jobs:,} pending, after {said}", " s", spent, at_least=limit, aim=aim,
                judged="value", less_is_better=True,
            )  # fmt: skip
        each = (load.rss_bytes(server.pid) - empty) / jobs
    yield Figure(
        f"memory of a pending job of 200 bytes, {jobs:,} of them", " bytes", each, at_least=1500, aim=1000,
        judged="value", less_is_better=True,
    )  # fmt: skip
