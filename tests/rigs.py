"""What breaks things on purpose: quick restarts, private mounts, power cuts, traced servers, C shims.

Everything made here goes away with its process, also where the tests are killed: mounts live in a mount
namespace of their own, loop devices are released with their last mount.
"""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checker import Wire
from support import LONG, READY, ROOT, DidNotStart, wait_until

# The figures of `make test-long` take hours; those of `make test` must not.
FIGURES = [pytest.mark.long, pytest.mark.timeout(4 * 3600)] if LONG else [pytest.mark.timeout(120)]


def needs(*tools):
    """Return a mark that skips a test, and says why, where one of these programs is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def needs_root():
    """Return a mark that skips a test that mounts, where that cannot be done."""
    tried = (
        subprocess.run(["unshare", "-m", "true"], capture_output=True) if shutil.which("unshare") else None
    )
    allowed = os.geteuid() == 0 and tried is not None and tried.returncode == 0
    return pytest.mark.skipif(not allowed, reason="needs root and leave to mount (unshare -m)")


# == Quick starts ============================================================================================
# Starting Python and compiling the module takes longer than all that a test of one fault does. A parent that
# has imported what the module imports forks a child for each start; it runs the file from its first line.

_PARENT = r"""
import ctypes, importlib.machinery, importlib.util, json, os, signal, sys
path = sys.argv[1]
loader = importlib.machinery.SourceFileLoader("jobqueue", path)
code = loader.get_code("jobqueue")  # from __pycache__
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("jobqueue", loader))
sys.modules["jobqueue"] = module
loader.exec_module(module)  # for what it imports
del sys.modules["jobqueue"]
def child(order):
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the parent
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.closerange(3, 64)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    sys.argv = [path, *order["argv"]]
    if order["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    main = type(sys)("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    exec(code, main.__dict__)
print("ready", flush=True)
while line := sys.stdin.readline():
    order = json.loads(line)
    if "argv" in order:
        pid = os.fork()
        if pid == 0:
            child(order)
            sys.exit(0)
        print(pid, flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
"""


class QuickStarts:
    """Starts servers quickly. With private_mounts, what is mounted with run() exists for them alone; with recent, the
    file of the journal's last records has so many bytes, so that it is often full."""

    def __init__(self, tmp_path, env=None, private_mounts=False, recent=None):
        self.tmp_path = tmp_path
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("JOBQUEUE_") and name not in ("PORT", "GRPC_PORT")
        }
        prefix = ["unshare", "-m"] if private_mounts else []
        script = ROOT / "jobqueue.py"
        if recent is not None:
            usual, source = "    SIZE = 256 * KIB\n", script.read_text()
            assert source.count(usual) == 1
            script = tmp_path / "jobqueue.py"
            script.write_text(source.replace(usual, f"    SIZE = {recent}\n"))
        self.parent = subprocess.Popen(
            [*prefix, sys.executable, "-c", _PARENT, str(script)],
            env={**clean, **(env or {})},
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.parent.stdout.readline() == "ready\n", "the parent of the servers did not start"
        self.private_mounts = private_mounts
        self.running = set()
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in list(self.running):
            server.kill()
        self.parent.stdin.close()
        self.parent.stdout.close()
        self.parent.wait(30)

    def start(self, *flags, data_dir=None, ready=True, stopped=False):
        """Start a server; wait until it serves, unless told otherwise; raise DidNotStart.

        stopped: it stands still before its first line, for a tracer to attach; go() lets it run.
        """
        self.count += 1
        log = self.tmp_path / f"log-{self.count}"
        argv = [
            "--data-dir",
            str(data_dir or self.tmp_path / "data"),
            "--port",
            "0",
            "--grpc-port",
            "off",
            *flags,
        ]
        pid = int(self.order(argv=argv, log=str(log), stopped=stopped))
        server = QuickServer(self, pid, log)
        self.running.add(server)
        if stopped:
            wait_until(lambda: _state(pid) == "T", what="the stopped server")
        elif ready:
            server.wait_ready()
        return server

    def order(self, **what):
        """Ask the parent for something; return the line it answers."""
        self.parent.stdin.write(json.dumps(what) + "\n")
        self.parent.stdin.flush()
        return self.parent.stdout.readline()

    def path(self, path):
        """Return where this process finds a path of theirs, which may lie on a private mount."""
        return Path(f"/proc/{self.parent.pid}", f"root{path}") if self.private_mounts else Path(path)

    def run(self, *command):
        """Run a program among the private mounts; raise where it fails."""
        inside = ["nsenter", "-t", str(self.parent.pid), "-m", *map(str, command)]
        done = subprocess.run(inside, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{command}: {done.stderr.strip()}")


class QuickServer:
    """One server of QuickStarts."""

    def __init__(self, starts, pid, log_path):
        self.starts, self.pid, self.log_path = starts, pid, log_path
        self.port, self.grpc_port, self.url, self.code = 0, None, "", None

    def log(self):
        """All it wrote so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def ended(self):
        """True once it has ended, whether or not anybody asked for its exit code."""
        return self.code is not None or _state(self.pid) in "ZX"

    def wait_ready(self, timeout=30):
        """Wait until it serves; raise DidNotStart where it ends instead."""
        wait_until(lambda: READY.search(self.log()) or self.ended(), timeout, "the server to be ready")
        ready = READY.search(self.log())
        if not ready:
            raise DidNotStart(self.wait(), self.log())
        self.url, self.port = ready[1], int(ready[2])
        grpc_port = ready[3].rpartition(":")[2]
        self.grpc_port = int(grpc_port) if grpc_port.isdigit() else None

    def go(self):
        """Let a stopped one run."""
        os.kill(self.pid, signal.SIGCONT)

    def wait(self, timeout=30):
        """Wait for its end; return the exit code (-9 after a kill)."""
        if self.code is None:
            wait_until(self.ended, timeout, f"the server to end; its log:\n{self.log()}")
            self.code = int(self.starts.order(wait=self.pid))
            self.starts.running.discard(self)
        return self.code

    def kill(self):
        """kill -9, and wait for the end."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def stop(self):
        """SIGTERM, and wait for the end."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


# == Disks ===================================================================================================

FS_IOC_GOINGDOWN = 0x8004587D
NOLOGFLUSH = 2  # what is in memory is lost, the file system's own journal too


class Disk:
    """A small ext4 in a file, whose power can be cut."""

    def __init__(self, starts, image, mount_point, size="64M"):
        self.starts, self.image, self.mount_point = starts, image, mount_point
        mount_point.mkdir()
        subprocess.run(["truncate", "-s", size, image], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard", image], check=True)
        try:
            self.mount()
        except OSError as error:
            pytest.skip(f"needs loop devices: {error}")

    def mount(self):
        """Mount it; after a cut, ext4 recovers from its own journal here. Not every file system writes a file out
        when it is renamed over another, so this one does not either."""
        self.starts.run("mount", "-o", "loop,noauto_da_alloc", self.image, self.mount_point)

    def cut_power(self):
        """Lose all that is not on the disk, now; return the moment before which all was well."""
        fd = os.open(self.starts.path(self.mount_point), os.O_RDONLY)
        try:
            moment = time.monotonic()
            fcntl.ioctl(fd, FS_IOC_GOINGDOWN, struct.pack("I", NOLOGFLUSH))
        finally:
            os.close(fd)
        return moment

    def unmount(self):
        """Unmount it; those who used it have ended."""
        self.starts.run("umount", self.mount_point)


# == Traced servers ==========================================================================================

# Every call that changes something on a disk, and open, which may create. "?": not on every architecture.
CHANGES = (
    "openat",
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "fdatasync",
    "fsync",
    "ftruncate",
    "fallocate",
    "?rename",
    "?renameat",
    "renameat2",
    "?unlink",
    "unlinkat",
    "?link",
    "linkat",
    "?mkdir",
    "mkdirat",
    "copy_file_range",
    "sendfile",
)


def our_files(data):
    """Return the paths of a data folder that a tracer should watch."""
    names = ["", ".lock", "reserve", "journal.jsonl", "journal.jsonl.new", "journal.jsonl.recent"]
    names += [f"journal.jsonl.torn-{number}" for number in range(4)]
    return [str(data / name).rstrip("/") for name in names]


@contextlib.contextmanager
def traced(server, *inject, paths, calls=CHANGES):
    """Trace a server's calls on paths, with faults: traced(server, "write:error=EIO:when=3", paths=...).

    Gives a Trace. The counts of `when` are each thread's own, and begin with the tracing.
    """
    command = ["strace", "-f", "-e", f"trace={','.join(calls)}", "-p", str(server.pid)]
    for path in paths:
        command += ["-P", str(path)]
    for fault in inject:
        command += ["-e", f"inject={fault}"]
    out = server.log_path.with_suffix(".strace")
    with open(out, "wb") as stream:
        tracer = subprocess.Popen(command, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True)
    trace = Trace(out)
    try:
        wait_until(
            lambda: b" attached" in out.read_bytes() or tracer.poll() is not None, what="strace to attach"
        )
        assert tracer.poll() is None, f"strace did not attach: {trace.text()}"
        yield trace
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)  # detaches; the server runs on
        tracer.wait(30)


class Trace:
    """What a tracer has seen."""

    def __init__(self, path):
        self.path = path

    def text(self):
        """All of it."""
        return self.path.read_text(errors="replace")

    def counts(self):
        """Return {call: how often the thread that made it most often made it}."""
        most, by_thread = {}, {}
        for line in self.text().splitlines():
            found = re.match(r"(?:\[pid +(\d+)\] )?(\w+)\(", line)
            if found:
                by_thread[found.groups()] = by_thread.get(found.groups(), 0) + 1
        for (_, name), count in by_thread.items():
            most[name] = max(most.get(name, 0), count)
        return most


# == Compaction ==============================================================================================

COMPACT = (
    "--compact-bytes",
    "20000",
)  # begin as soon as that much, and twice what is alive, is in the journal


def grow(load, port, data):
    """Write to the journal until it is compacted: a job fails again and again, with much to say.

    Leases are shorter than a drain is patient: a server that stops between a poll and its fail leaves a job leased.
    """
    wire, rng = Wire(port), random.Random(load.seed)
    before = os.stat(data / "journal.jsonl").st_ino
    load.act("client_async", wire, rng)
    load.act("client_batch", wire, rng)
    deadline = time.monotonic() + 20
    while os.stat(data / "journal.jsonl").st_ino == before or (data / "journal.jsonl.new").exists():
        assert time.monotonic() < deadline, "never compacted"
        load.act("worker_fail_at_length", wire, rng, lease=15)
        load.act("client_async", wire, rng)
    wire.close()


# == C shims =================================================================================================


def build_shim(tmp_path, name, source):
    """Compile C to a library for LD_PRELOAD; return its path."""
    code, library = tmp_path / f"{name}.c", tmp_path / f"{name}.so"
    code.write_text(source)
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, code, "-ldl"], check=True)
    return library


NO_SYNC = """
int fsync(int fd) { return 0; }
int fdatasync(int fd) { return 0; }
int sync_file_range(int fd, long long from, long long to, unsigned int flags) { return 0; }
void sync(void) {}
int syncfs(int fd) { return 0; }
"""

# For the files of a compaction and their folder; what is acknowledged is synced by fdatasync.
SLOW_FSYNC = """
#include <sys/syscall.h>
#include <unistd.h>
int fsync(int fd) { int result = syscall(SYS_fsync, fd); usleep(150000); return result; }
"""

# A sync that says it is done and is done a moment later: an acknowledgement sent before its sync.
LATE_SYNC = r"""
#include <pthread.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
static void *later(void *fd) {
    usleep(20000);
    syscall(SYS_fsync, (int)(intptr_t)fd);
    close((int)(intptr_t)fd);
    return 0;
}
int fdatasync(int fd) {
    pthread_t thread;
    if (!pthread_create(&thread, 0, later, (void *)(intptr_t)dup(fd))) pthread_detach(thread);
    return 0;
}
int fsync(int fd) { return fdatasync(fd); }
"""

_JOURNAL_WRITES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static ssize_t (*real)(int, const void *, size_t);
static int is_journal(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = fd > 2 ? readlink(link, path, sizeof path - 1) : -1;
    if (size < 0) return 0;
    path[size] = 0;
    return strstr(path, "/journal.jsonl") != 0;
}
static ssize_t journal_write(int fd, const void *data, size_t size);
ssize_t write(int fd, const void *data, size_t size) {
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return is_journal(fd) ? journal_write(fd, data, size) : real(fd, data, size);
}
"""

# Each write to a journal stays in memory until the next one: what a buffered file object does.
LATE_WRITE = (
    _JOURNAL_WRITES
    + r"""
static ssize_t journal_write(int fd, const void *data, size_t size) {
    static char *kept; static size_t kept_size; static int kept_fd = -1;
    if (kept_size && kept_fd == fd) real(fd, kept, kept_size);
    kept = realloc(kept, size); memcpy(kept, data, size); kept_size = size; kept_fd = fd;
    return size;
}
"""
)

# The system may take less of a write than it was given, and the rest when it is asked again.
WRITE_IN_PIECES = (
    _JOURNAL_WRITES
    + r"""
static ssize_t journal_write(int fd, const void *data, size_t size) {
    return real(fd, data, size > 1 ? size / 2 : size);
}
"""
)

# The wall clock, moved by as many seconds as the file named in WALL_CLOCK_OFFSET holds.
WALL_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long long *offset;
__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("WALL_CLOCK_OFFSET"), O_RDONLY);
    offset = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, fd, 0);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += *offset;
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec; now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (out) *out = precise.tv_sec;
    return precise.tv_sec;
}
"""
