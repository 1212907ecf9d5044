"""The load: processes apart from the server, clients in one, workers in another, each with all its connections.

Every server is driven by the same loop, for a bounded time, after a warm-up that does not count. Where several are
compared, their runs alternate (A B A B), so that what else the machine does hits all alike, and the median counts.
Linux only: processes are forked, CPU and memory are read from /proc.
"""
import multiprocessing
import os
import resource
import select
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import count

from protocols import Failure, Tally, clock, tags

fork = multiprocessing.get_context("fork")
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
# How long a load may take to come to its end after its time, or to be ready before it, before it counts as stuck.
PATIENCE = 60
runs = count(1)


# -- what the kernel says of a process -------------------------------------------------------------------------------


def cpu_seconds(pid):
    """User and system time of a process, its threads included, in seconds (to 10 ms)."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def cpu_fine(pid):
    """The same from the scheduler, to the nanosecond, for the threads that are alive."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
            total += int(file.read().split()[0])
    return total / 1e9


def rss_bytes(pid):
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * PAGE


def machine_busy_seconds():
    """CPU time that anybody used on this machine since it started, time stolen from it included."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


# Where data folders go; `--scratch` of run.py changes it.
scratch = {"folder": "/var/tmp", "best_sync_ms": 1e9}


def sync_ms(times=40):
    """The mean time of a fdatasync after a write of 200 bytes, here and now."""
    with tempfile.TemporaryFile(dir=scratch["folder"], buffering=0) as file:
        began = clock()
        for _ in range(times):
            file.write(b"x" * 200)
            os.fdatasync(file.fileno())
        spent = (clock() - began) / times * 1000
    scratch["best_sync_ms"] = min(scratch["best_sync_ms"], spent)
    return spent


def raise_file_limit():
    """As many sockets as this user may have; children inherit it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


# -- in the load's processes -----------------------------------------------------------------------------------------


def connect(port):
    """A connection that sends at once."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def drive(sockets, sides):
    """Runs each side (a generator, see protocols.py) on its socket until all have ended."""
    if len(sockets) == 1:
        return drive_one(sockets[0], sides[0])
    poll, handlers = select.epoll(), {}
    for sock, side in zip(sockets, sides, strict=True):
        handlers[sock.fileno()] = sock.recv, side.send, sock.sendall
        sock.sendall(next(side))
        poll.register(sock, select.EPOLLIN)
    ready = poll.poll
    while handlers:
        for number, _ in ready():
            recv, resume, sendall = handlers[number]
            data = recv(262144)
            if not data:
                raise Failure("the server closed a connection")
            try:
                out = resume(data)
            except StopIteration:
                del handlers[number]
                poll.unregister(number)
                continue
            if out:
                sendall(out)
    return None


def drive_one(sock, side):
    """The same for one socket, which needs no epoll: a client that blocks, as most do."""
    recv, resume, sendall = sock.recv, side.send, sock.sendall
    out = next(side)
    try:
        while True:
            if out:
                sendall(out)
            data = recv(262144)
            if not data:
                raise Failure("the server closed a connection")
            out = resume(data)
    except StopIteration:
        pass


def body(prepare, pipe):
    """A load process: prepares, says so, is told when the time counts, runs, reports."""
    try:
        go = prepare()
        pipe.send("ready")
        tally = Tally(*pipe.recv())
        go(tally)
        pipe.send((tally.count, tally.times, tally.last))
        pipe.recv()  # sockets stay open until the parent has seen what it wants to see
    except (EOFError, KeyboardInterrupt):
        pass
    except BaseException as error:
        text = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        try:
            pipe.send(Failure(text))
        except OSError:
            print(text, file=sys.stderr)
    os._exit(0)


def sockets_side(port, make, connections):
    """What a process does that drives `connections` sides, each made by `make(port, tally, index)`."""

    def prepare():
        sockets = [connect(port) for _ in range(connections)]
        return lambda tally: drive(sockets, [make(port, tally, index) for index in range(connections)])

    return prepare


class Process:
    """One load process, seen from the parent; it is ended by its pid."""

    def __init__(self, prepare):
        self.pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=body, args=(prepare, theirs), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self):
        return self.process.pid

    def expect(self, deadline):
        """The next thing it says; a Failure that it sends is raised."""
        if not self.pipe.poll(max(0, deadline - clock())):
            raise Failure("the load was stuck: no answer came")
        try:
            said = self.pipe.recv()
        except EOFError:
            raise Failure("a load process died") from None
        if isinstance(said, Failure):
            raise said
        return said

    def complain(self):
        """Raises what it died of, if it did; for one that is not meant to end."""
        if self.pipe.poll():
            self.expect(clock())

    def end(self):
        """Kills it, if it is still there."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


# -- one measurement -------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One run at one point."""

    rate: float  # done a second
    count: int
    seconds: float
    p50: float = 0.0  # seconds
    p99: float = 0.0
    cpu: float = 0.0  # CPU seconds that the server took for each
    load_cpu: float = 0.0  # the same for the load's processes together
    foreign: float = 0.0  # share of the machine that others used meanwhile
    sync_ms: float = 0.0  # what a sync of the disk took, before or after, the longer one
    repeated: int = 0  # how many runs before it were dropped because others used the machine


def quantile(times, share):
    """The value below which that share lies."""
    return sorted(times)[min(len(times) - 1, int(len(times) * share))] if times else 0.0


def measure(clients, workers=(), pids=(), seconds=2.0, warmup=0.5, drain=False):
    """Runs client and worker processes against a server with these pids for `seconds` after a warm-up.

    With `drain` the clients end by themselves when nothing is left, and the time counts from their start to the last
    thing done.
    """
    workers = [Process(prepare) for prepare in workers]
    clients = [Process(prepare) for prepare in clients]
    everybody = clients + workers
    try:
        for process in everybody:
            process.expect(clock() + PATIENCE)
        begin = clock() + (0 if drain else warmup)
        end = begin + (3600 if drain else seconds)
        for process in workers + clients:
            process.pipe.send((begin, end))
        time.sleep(max(0, begin - clock()))
        before = reading(pids, everybody)
        if not drain:
            time.sleep(max(0, end - clock()))
            after = reading(pids, everybody)
        reports = [process.expect(clock() + PATIENCE) for process in clients]
        if drain:
            after = reading(pids, everybody)
            end = max(last for _, _, last in reports)
        for process in workers:
            process.complain()
    finally:
        for process in everybody:
            process.end()
    return sample(reports, end - begin, before, after)


def reading(pids, processes):
    """CPU seconds so far of the server, of the load, of the machine."""
    return sum(map(cpu_seconds, pids)), sum(cpu_seconds(process.pid) for process in processes), machine_busy_seconds()


def sample(reports, seconds, before, after):
    """What the reports of the clients say, with the CPU that it took."""
    total = sum(report[0] for report in reports)
    if not total:
        raise Failure("nothing was done in the time")
    times = [spent for report in reports for spent in report[1]]
    server, load, machine = (late - early for late, early in zip(after, before, strict=True))
    return Sample(
        rate=total / seconds,
        count=total,
        seconds=seconds,
        p50=quantile(times, 0.5),
        p99=quantile(times, 0.99),
        cpu=server / total,
        load_cpu=load / total,
        foreign=max(0.0, machine - server - load) / seconds / os.cpu_count(),
    )


def sync_jobs(server, clients, workers, client, worker, seconds):
    """Sync jobs a second: `clients` connections submit and wait, `workers` connections take and complete."""
    run = next(runs)
    return measure(
        [sockets_side(server.port, lambda port, tally, index: client(port, tally, tags(run, index)), clients)],
        [sockets_side(server.port, lambda port, tally, index: worker(port, tally), workers)],
        server.pids,
        seconds,
    )


# A run is repeated, at most so often, when others used more than this share of the CPU meanwhile, or when the disk was
# slower by more than this factor than at its best (probed before and after the run); the calmest one is kept. That
# looks at the machine alone, never at the figure; how often it happened stands in results.json.
CALM_CPU, CALM_DISK, REPEATS = 0.2, 2.0, 2


def unrest(sample):
    """How far a run was from calm; 1 is the limit."""
    return max(sample.foreign / CALM_CPU, sample.sync_ms / scratch["best_sync_ms"] / CALM_DISK)


def calm_run(side):
    """One run, repeated while the machine is busy with something else."""
    tries = []
    while not tries or (unrest(tries[-1]) > 1 and len(tries) <= REPEATS):
        before = sync_ms()
        tries.append(side())
        tries[-1].sync_ms = max(before, sync_ms())
    calmest = min(tries, key=unrest)
    calmest.repeated = len(tries) - 1
    return calmest


def side_by_side(times, **sides):
    """Runs the sides in turn, `times` times over, and returns the samples of each."""
    samples = {name: [] for name in sides}
    for _ in range(times):
        for name, side in sides.items():
            samples[name].append(calm_run(side))
    return samples


def median(samples, what="rate"):
    """The median of one figure over the runs."""
    return statistics.median(getattr(sample, what) for sample in samples)
