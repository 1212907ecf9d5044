#!/usr/bin/env python3
"""A client that survives restarts of the server: submits a payload, waits for the result, and writes its bytes.

    python examples/client.py '{"x": 1}'
    python examples/client.py --queue archive - < photo.png > photo.png.gz      # the payload from standard input

The key makes repeating safe: the same key attaches to the same job, also after a crash of the server or of this
program (give it the same --key then). Exit code 1: the job ended without a result, standard error says why.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.parse
import uuid

WAIT = 60  # seconds that one request waits; shorter than what a proxy in between allows


class Client:
    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=WAIT + 30)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def run(self, payload: bytes, queue: str, key: str, content_type: str) -> bytes:
        """The bytes of the result; SystemExit with the reason where there is none."""
        query = urllib.parse.urlencode({"queue": queue, "wait": WAIT})
        headers = {"Idempotency-Key": key, "Content-Type": content_type}
        status, answer = self._call("POST", f"/api/submit?{query}", payload, headers)
        job = json.loads(answer)
        while status == 202:  # the wait was over, or the server stopped: look again, for as long as it takes
            status, answer = self._call("GET", f"/api/jobs/{job['job_id']}?wait={WAIT}")
            if status == 200 and json.loads(answer)["status"] in ("delayed", "pending", "processing"):
                status = 202
        if status == 200:  # the result as the worker gave it; where the job has none, this says why
            status, answer = self._call("GET", f"/api/jobs/{job['job_id']}/result")
        if status != 200:
            raise SystemExit(json.loads(answer)["detail"])
        return answer

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body. Repeated while the server is away or cannot take it now: the key makes that safe."""
        while True:
            try:
                self._connection.request(method, path, body, {**self._headers, **(headers or {})})
                answer = self._connection.getresponse()
                content = answer.read()
                if answer.status != 503:
                    return answer.status, content
                pause = int(answer.headers.get("Retry-After", 1))
            except (OSError, http.client.HTTPException) as error:
                print(f"{error or type(error).__name__}; trying again", file=sys.stderr)
                pause = 1
            self._connection.close()
            time.sleep(pause)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default=os.environ.get("JOBQUEUE_URL", "http://127.0.0.1:3000"), help="(%(default)s)")
    parser.add_argument("--queue", default="default", help="(%(default)s)")
    parser.add_argument("--key", default=str(uuid.uuid4()), help="the same key is the same job (a new one)")
    parser.add_argument("--type", default="application/octet-stream", help="the payload's Content-Type (%(default)s)")
    parser.add_argument("payload", help="the payload, or - to read it from standard input")
    options = parser.parse_args()
    payload = sys.stdin.buffer.read() if options.payload == "-" else options.payload.encode()
    client = Client(options.url, os.environ.get("JOBQUEUE_TOKEN"))
    sys.stdout.buffer.write(client.run(payload, options.queue, options.key, options.type))


if __name__ == "__main__":
    main()
