#!/usr/bin/env python3
"""A job queue inside another program, with its worker in a thread of the same program.

    python examples/embedded.py

Other programs can submit to it and work for it over HTTP all the while, as to any jobqueue server.
"""

import http.client
import json
import logging
import tempfile
import threading
from pathlib import Path
from sys import path

path.insert(0, str(Path(__file__).resolve().parent.parent))  # where jobqueue.py is; not needed once it is installed

import jobqueue  # noqa: E402


def work(server: jobqueue.Server, started: threading.Event, given_up: threading.Event) -> None:
    """Take jobs of two queues until the server stops."""
    for job in server.jobs("sums", "long", worker="in-process"):
        try:
            if job.queue == "long":
                started.set()
                count_until_cancelled(job)
                given_up.set()
            else:
                job.complete(json.dumps({"sum": sum(json.loads(job.payload))}))
        except (TypeError, ValueError) as error:
            job.fail(str(error), retry=False)
        except jobqueue.JobQueueError as error:  # the job went on without us: drop the result
            logging.warning("job %s: %s", job.id, error.detail)


def count_until_cancelled(job) -> None:
    """Long work asks for more time now and then, and hears whether it is still wanted."""
    while job.extend(60):
        threading.Event().wait(0.01)  # a piece of the work
    print("the job was cancelled, the worker has stopped working on it")


def over_http(server: jobqueue.Server, method: str, target: str, body: bytes | None = None) -> dict:
    """What any other program would do."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, target, body)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def main() -> None:
    logging.basicConfig(level=logging.WARNING)  # the server logs to the logger "jobqueue" and prints nothing
    with (
        tempfile.TemporaryDirectory() as folder,
        jobqueue.Server(data_dir=folder, port=0, grpc_port=None, drain=5) as server,
    ):
        started, given_up = threading.Event(), threading.Event()
        worker = threading.Thread(target=work, args=(server, started, given_up))
        worker.start()

        # In the program: a future of the result's bytes.
        results = [server.submit(json.dumps(list(range(n))), queue="sums") for n in (10, 100, 1000)]
        print(*(result.result(timeout=30).decode() for result in results))

        # What went wrong is raised where the result would be.
        try:
            server.submit('["one", "two"]', queue="sums").result(timeout=30)
        except jobqueue.JobQueueError as error:
            print(f"{error.code}: {error.detail}")

        # A job that is cancelled while it runs.
        job_id = server.submit("count", queue="long").job_id
        started.wait(30)
        server.cancel(job_id)
        given_up.wait(30)
        print(server.job(job_id)["status"])

        # From outside, over HTTP.
        print(over_http(server, "POST", "/api/submit?queue=sums", b"[1, 2, 3]")["payload"])

        server.stop()  # what the end of the `with` block does too; the worker's loop ends by it
        worker.join()
    print("stopped")


if __name__ == "__main__":
    main()
