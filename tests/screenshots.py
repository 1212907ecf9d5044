"""Take the README's pictures of the dashboard: python tests/screenshots.py [SECONDS] -> docs/dashboard-*.png

A server with believable work on it runs for a minute, so that the plots have something to show.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from support import ROOT, ServerProcess, call, end_servers, start_server
from test_dashboard import Page, start_browser

SIZE = {"width": 1120, "height": 1000, "deviceScaleFactor": 2, "mobile": False}
WORK = {  # queue: (payload, seconds a job takes, seldom error)
    "default": ({"order": 4711, "action": "price", "items": [{"sku": "A-100", "count": 2}]}, 0.02, None),
    "emails": (
        {"to": "ada@example.org", "template": "welcome", "locale": "en"},
        0.05,
        "SMTPRecipientsRefused: 550 5.1.1 mailbox unavailable\n  at send (mailer.py:88)",
    ),
    "thumbnails": (
        {"image": "uploads/0042.jpg", "widths": [160, 640, 1920]},
        0.12,
        "UnidentifiedImageError: cannot identify image file",
    ),
}
JSON = {"Content-Type": "application/json"}


def post(server: ServerProcess, path: str, body: object = None) -> None:
    call(server.url, "POST", path, b"" if body is None else json.dumps(body), JSON)


def client(server: ServerProcess, end: threading.Event, queue: str, phase: float) -> None:
    """Submits and waits for the result, now faster, now slower."""
    while not end.is_set():
        post(server, f"/api/submit?queue={queue}&wait=5", WORK[queue][0])
        end.wait(0.12 + 0.1 * math.sin(time.monotonic() / 6 + phase))


def worker(server: ServerProcess, end: threading.Event, queue: str, name: str) -> None:
    rng = random.Random(name)
    _, takes, error = WORK[queue]
    while not end.is_set():
        answer = call(server.url, "GET", f"/api/worker/poll?queue={queue}&worker={name}&wait=2")
        if answer.status != 200:
            continue
        job = answer.json()
        end.wait(takes * rng.uniform(0.5, 1.8))
        if error and rng.random() < 0.01:
            path = f"/api/worker/fail/{job['job_id']}?retry=false&lease_token={job['lease_token']}"
            call(server.url, "POST", path, error)
        else:
            path = f"/api/worker/complete/{job['job_id']}?lease_token={job['lease_token']}"
            post(server, path, {"done": True})


def fill(server: ServerProcess) -> None:
    """What does not move: a delayed job, and a line that nobody works on while its queue is paused."""
    post(server, "/api/submit?queue=reports&wait=0&delay=3600", {"report": "monthly"})
    for day in range(1, 13):
        post(server, "/api/submit?queue=invoices&wait=0", {"day": day})
    post(server, "/api/admin/pause?queue=invoices")


def take(browser: object, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    path = ROOT / "docs" / f"dashboard-{scheme}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base64.b64decode(picture["data"]))
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KiB")


def main(seconds: float) -> None:
    end = threading.Event()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as after:
        after.callback(end_servers)
        server = start_server(Path(folder), "--grpc-port", "off")
        fill(server)
        crowd = []
        for number, queue in enumerate(WORK):
            crowd += [(client, queue, number * 2.0 + n / 3) for n in range(2)]
            crowd += [(worker, queue, f"{queue}-{n}") for n in (1, 2)]
        threads = [threading.Thread(target=run, args=(server, end, *rest)) for run, *rest in crowd]
        for thread in threads:
            thread.start()
        after.callback(lambda: [thread.join() for thread in threads])
        after.callback(end.set)
        browser = start_browser(Path(folder) / "profile")
        after.callback(browser.quit)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SIZE)
        page = Page(browser, server)
        page.until(lambda: page.all("#counts button"), "the counts")
        end.wait(seconds)
        for scheme in ("light", "dark"):
            take(browser, scheme)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 70)
