"""The servers that are measured: started on loopback and free ports with temporary folders, ended by their pids.

Every peer runs with its own defaults but for what the comparison itself asks for (durability, a free port, no log).
"""
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import load
from load import PATIENCE, clock
from protocols import Failure

HERE = Path(__file__).resolve().parent
# What `--server` of run.py changes.
config = {"server": HERE.parent / "jobqueue.py"}


def free_port():
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def missing(name):
    """Why this peer cannot be measured here, or None."""
    if name in PROGRAMS:
        return None if shutil.which(name) else f"{name} is not installed"
    needed = {"rq": ("rq", "redis"), "huey": ("huey", "redis"), "celery": ("celery", "redis")}.get(name, (name,))
    absent = [module for module in needed if importlib.util.find_spec(module) is None]
    if absent:
        return f"{', '.join(absent)} not installed in {sys.executable}"
    return missing("redis-server") if len(needed) > 1 else None


class Server:
    """A running server: its port, its process, its folder."""

    def __init__(self, name, command, port, folder, env=None):
        self.name, self.command, self.port, self.folder = name, command, port, folder
        self.env = {**os.environ, **(env or {})}
        self.helpers = []  # processes that belong to it: the workers of a Python queue
        self.log = folder / f"{name}.log"
        self.start()

    def start(self):
        """Starts the process (again, in the same folder)."""
        with open(self.log, "ab") as log:
            self.began = clock()
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, env=self.env
            )

    @property
    def pid(self):
        return self.process.pid

    @property
    def pids(self):
        return [self.process.pid, *(helper.pid for helper in self.helpers)]

    def wait(self, ready):
        """Waits until `ready()` is true; returns it."""
        deadline = clock() + PATIENCE
        while not (got := ready()):
            if self.process.poll() is not None or clock() > deadline:
                text = self.log.read_text(errors="replace")[-600:]
                raise Failure(f"{self.name} did not start (exit code {self.process.poll()}): {text}")
            time.sleep(0.002)
        return got

    def listening(self):
        """Whether the port takes connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except OSError:
            return False
        return True

    def stop(self, how=signal.SIGTERM):
        """Ends the process and waits for it."""
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def folder():
    """A temporary folder on the disk that is measured."""
    path = Path(tempfile.mkdtemp(prefix="jobqueue-bench-", dir=load.scratch["folder"]))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def running(name, command, port, env=None):
    """A server for the length of a `with`. {folder} in its command is its own folder."""
    with folder() as path:
        server = Server(name, [part.format(folder=path) for part in command], port, path, env)
        try:
            server.wait(server.listening)
            yield server
        finally:
            server.stop()


# -- jobqueue --------------------------------------------------------------------------------------------------------

READY = re.compile(r" ready http=\S+:(\d+) grpc=(?:\S+:(\d+)|off)")


def jobqueue_command(path, fsync="always", grpc=False, port=0, **flags):
    """The command line of a jobqueue server; `max_held=5` is `--max-held 5`."""
    command = [sys.executable, str(config["server"]), "--data-dir", str(path / "data"), "--fsync", fsync]
    command += ["--port", str(port), "--grpc-port", "0" if grpc else "off"]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def jobqueue_ready(server):
    """Waits for the ready line of this start; notes the ports."""
    def ready():
        found = READY.findall(server.log.read_text(errors="replace"))
        return found[-1] if len(found) > server.starts else None

    http, grpc = server.wait(ready)
    server.starts += 1
    server.port, server.grpc_port = int(http), int(grpc) if grpc else None
    server.ready_after = clock() - server.began


@contextlib.contextmanager
def jobqueue(fsync="always", grpc=False, **flags):
    """A jobqueue server that is ready."""
    with folder() as path:
        server = Server("jobqueue", jobqueue_command(path, fsync, grpc, **flags), None, path)
        server.starts = 0
        try:
            jobqueue_ready(server)
            yield server
        finally:
            server.stop()


# -- the peers -------------------------------------------------------------------------------------------------------


def beanstalkd(durable):
    """beanstalkd: in memory, or with its log synced at each write."""
    port = free_port()
    command = ["beanstalkd", "-l", "127.0.0.1", "-p", str(port)]
    return running("beanstalkd", command + (["-b", "{folder}", "-f0"] if durable else []), port)


def redis(durable):
    """Redis: without a file, or with an append-only file synced at each write."""
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", "{folder}", "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "always"] if durable else ["--appendonly", "no"]
    return running("redis-server", command, port)


def gearmand():
    """gearmand in memory, as it always is without a database."""
    port = free_port()
    command = ["gearmand", "--listen", "127.0.0.1", "--port", str(port), "--log-file", "none"]
    command += ["--pid-file", "{folder}/pid", "--user", "root" if os.geteuid() == 0 else os.environ.get("USER", "")]
    return running("gearmand", command, port)


def stock_http():
    """The standard library's HTTP server."""
    port = free_port()
    return running("stock-http", [sys.executable, str(HERE / "stock_http.py"), str(port)], port)


def stock_grpc():
    """A gRPC service with nothing behind it."""
    port = free_port()
    return running("stock-grpc", [sys.executable, str(HERE / "stock_grpc.py"), str(port)], port)


# Tried on two cores that others used too, 5 runs each in turn, at 1 and 8 clients: RQ's SimpleWorker (no fork a job)
# 1, 2, 4 processes; Huey 4 threads, 2 and 4 processes; Celery solo 1 and 2, 4 threads, prefork 2 and 4. RQ with 4
# was slower; between the others the runs overlap, so none is known to be the best one.
QUEUE_WORKERS = {
    "rq": ("rq.cli worker -q -w rq.SimpleWorker -u redis://127.0.0.1:{port}/1 -P {here}", 1),
    "huey": ("huey.bin.huey_consumer tasks.huey -w 4 -q", 1),
    "celery": ("celery -A tasks worker -P solo -l ERROR --without-gossip -n w{n}", 2),
}


@contextlib.contextmanager
def python_queue(name):
    """RQ, Huey or Celery: a Redis of its own without a file, and its worker processes."""
    arguments, processes = QUEUE_WORKERS[name]
    with redis(durable=False) as broker, contextlib.ExitStack() as stack:
        env = {"BENCH_REDIS": str(broker.port), "BENCH_QUEUE": name, "PYTHONPATH": str(HERE)}
        broker.queue, broker.env_for_clients = name, env
        for number in range(processes):
            command = [sys.executable, "-m"]
            command += [part.format(port=broker.port, here=HERE, n=number) for part in arguments.split()]
            worker = Server(f"{name}-{number}", command, broker.port, broker.folder, env)
            stack.callback(worker.stop)
            broker.helpers.append(worker)
        yield broker


# -- what they are ---------------------------------------------------------------------------------------------------

VERSION = re.compile(rb'__version__ = "([^"]+)"')
PROGRAMS = {"beanstalkd": "-v", "redis-server": "--version", "gearmand": "--version"}


def versions():
    """What is measured here, and what is missing: {name: version or reason}."""
    source = config["server"].read_bytes()
    found = {"jobqueue": f"{VERSION.search(source)[1].decode()} (SHA-256 {hashlib.sha256(source).hexdigest()[:16]})"}
    for name, flag in PROGRAMS.items():
        found[name] = missing(name) or re.search(
            r"\d+\.\d+[\w.+]*", subprocess.run([name, flag], capture_output=True, text=True, check=False).stdout
        )[0]
    for name in ("rq", "huey", "celery", "redis", "grpcio", "protobuf"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine():
    """The machine's description, with what its disk takes for a sync."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*:\s*(.*)", file.read())
    with open("/proc/meminfo") as file:
        memory = int(re.search(r"MemTotal:\s*(\d+)", file.read())[1])
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "filesystem": filesystem(load.scratch["folder"]),
        "fdatasync_ms": round(load.sync_ms(200), 3),
    }


def filesystem(path):
    """The kind of file system that a folder is on."""
    kind, longest = "unknown", -1
    path = str(Path(path).resolve())
    with open("/proc/mounts") as file:
        for line in file:
            _, mount, this, *_ = line.split()
            inside = path == mount or path.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) > longest:
                kind, longest = this, len(mount)
    return kind
