#!/usr/bin/env python3
"""A worker over gRPC: gives each job's payload to a command, and hands in what the command prints.

    python examples/worker_grpc.py sha256sum                            # the payload on standard input
    python examples/worker_grpc.py --queue archive --folder files gzip -c   # the payload names a file in ./files

It extends the lease while the command runs, kills the command when the job was cancelled or its lease is lost, and
gets its next job with the answer to the last. SIGTERM and SIGINT let the running job finish. A server that is away is
asked again; one that refuses this worker ends it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where worker_pb2_gen is

import grpc  # noqa: E402

from worker_pb2_gen import worker_pb2 as pb  # noqa: E402
from worker_pb2_gen.worker_pb2_grpc import WorkerServiceStub  # noqa: E402

WAIT = 20  # seconds that a poll waits for a job
# What it asks for, or who it is, is wrong, and will be so next time.
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Worker:
    def __init__(self, target: str, queue: str, lease: float, command: list[str], folder: Path | None) -> None:
        self._channel = grpc.insecure_channel(target)
        self._stub = WorkerServiceStub(self._channel)
        self._command, self._folder = command, folder
        self._wish = pb.JobRequest(
            queues=queue.split(","), wait_seconds=WAIT, lease_seconds=lease, worker=f"grpc-{os.getpid()}"
        )
        self._stopping = False
        self._polling: grpc.Future | None = None

    def stop(self, *_: object) -> None:
        """Finish the job at hand, take no other. A poll is cut short; whoever hangs up leaves the line."""
        self._stopping = True
        if self._polling is not None:
            self._polling.cancel()

    def work(self) -> None:
        job = None
        while not self._stopping:
            job = job or self._poll()
            if job is not None:
                job = self._do(job)
        if job is not None:  # it came with the last answer, and we are leaving
            self._say(self._stub.ReleaseJob, pb.JobLease(job_id=job.id, lease_token=job.lease_token))
        self._channel.close()

    def _poll(self) -> pb.Job | None:
        self._polling = self._stub.RequestJob.future(self._wish, wait_for_ready=True)
        if self._stopping:  # the signal came just before
            self._polling.cancel()
        try:
            return self._polling.result()
        except grpc.FutureCancelledError:
            return None
        except grpc.RpcError as error:
            if error.code() in REFUSED:
                raise SystemExit(f"the server refuses this worker: {error.details()}") from None
            if error.code() == grpc.StatusCode.UNAVAILABLE:  # the server restarts
                time.sleep(1)
            elif error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED):
                raise
            return None
        finally:
            self._polling = None

    def _do(self, job: pb.Job) -> pb.Job | None:
        """Do a job, hand the result in, and return the next job, if one is in line."""
        code, output, error = self._run(job)
        if code is None:
            return None  # it is no longer ours
        if code:
            self._say(self._stub.FailJob, pb.JobFailure(job_id=job.id, lease_token=job.lease_token, error=error))
            return None
        result = pb.JobResult(job_id=job.id, lease_token=job.lease_token, next=not self._stopping)
        result.next_request.CopyFrom(self._wish)
        result.next_request.wait_seconds = 0  # a wait would stand in the way of a signal: polls do the waiting
        try:
            result.payload = output.decode()
        except UnicodeDecodeError:
            result.payload_bytes = output
        answer = self._say(self._stub.CompleteJob, result)
        return answer.next if answer is not None and answer.HasField("next") else None

    def _run(self, job: pb.Job) -> tuple[int | None, bytes, str]:
        """Exit code (None: the job is no longer ours), what it printed, and what it complained about."""
        payload = job.payload_bytes or job.payload.encode()
        if self._folder is not None:
            path = (self._folder / payload.decode(errors="replace")).resolve()
            if not path.is_relative_to(self._folder) or not path.is_file():
                return 2, b"", f"{path.name} is not a file in the folder"
            payload = path.read_bytes()
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C at the terminal is for the worker, which lets the command finish.
        with subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        ) as command:
            done, lost = threading.Event(), threading.Event()
            threading.Thread(target=self._keep, args=(job, command, done, lost), daemon=True).start()
            try:
                output, complaint = command.communicate(payload)
            finally:
                done.set()
        return None if lost.is_set() else command.returncode, output, complaint[-2000:].decode(errors="replace")

    def _keep(self, job: pb.Job, command: subprocess.Popen, done: threading.Event, lost: threading.Event) -> None:
        """Extend the lease at a third of it; kill the command where that is in vain."""
        lease = pb.JobLease(job_id=job.id, lease_token=job.lease_token, lease_seconds=job.lease_seconds)
        while not done.wait(job.lease_seconds / 3):
            try:
                if not self._stub.ExtendLease(lease).cancelled:
                    continue
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
                    continue  # the server is away: it comes back
            lost.set()
            command.kill()
            return

    def _say(self, method: grpc.UnaryUnaryMultiCallable, message: object) -> object | None:
        """Repeated until the server has heard it, through its restart too: the lease token makes that safe."""
        while True:
            try:
                return method(message, timeout=60, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    print(f"job {message.job_id}: {error.details()}", file=sys.stderr)
                    return None
                time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="127.0.0.1:50051", help="HOST:PORT of the server (%(default)s)")
    parser.add_argument("--queue", default="default", help="queues, comma-separated, in order (%(default)s)")
    parser.add_argument("--lease", type=float, default=60, help="seconds of a lease (%(default)s)")
    parser.add_argument("--folder", type=Path, help="payloads are names of files in this folder")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("COMMAND is missing")
    folder = options.folder and options.folder.resolve()
    worker = Worker(options.target, options.queue, options.lease, options.command, folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, worker.stop)
    worker.work()


if __name__ == "__main__":
    main()
