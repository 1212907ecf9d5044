"""The dashboard in a real browser: what it shows is the server's, and its buttons change the server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import ServerProcess, call, wait_until

pytest.importorskip("selenium", reason="selenium is not installed: the dashboard is not tested in a browser")

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="chromium or chromedriver is missing (apt install chromium chromium-driver)",
)
QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
    "--window-size=1200,1000"
)
ADMIN = "admin-token-4711"


def start_browser(profile: Path) -> webdriver.Chrome:
    """A headless Chromium with a new profile, which keeps its console and its requests for us to read."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*QUIET.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    os.environ["SE_OFFLINE"] = "true"  # selenium is not to look for another driver
    chrome = start_browser(tmp_path_factory.mktemp("profile"))
    yield chrome
    chrome.quit()


class Page:
    """The dashboard of one server, as its user sees it."""

    def __init__(self, browser: webdriver.Chrome, server: ServerProcess, path: str = "/") -> None:
        self.browser = browser
        self.url = server.url
        # What earlier pages logged is not this one's.
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(self.url + path)

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def until(self, predicate: Callable[[], Any], what: str = "") -> Any:
        def ask() -> Any:
            with contextlib.suppress(StaleElementReferenceException):
                return predicate()
            return None

        return wait_until(ask, 10, what)

    def shows(self, selector: str, words: str) -> None:
        def look() -> bool:
            return any(words in found.text for found in self.all(selector))

        self.until(look, f"{words!r} in {selector}")

    def button(self, name: str, within: str = "body") -> WebElement:
        """The button that a user would call by this name."""

        def look() -> WebElement | None:
            fits = (b for b in self.all(f"{within} button") if name in (b.accessible_name, b.text))
            return next((b for b in fits if b.is_displayed() and b.is_enabled()), None)

        return self.until(look, f"a button {name!r}")

    def click(self, name: str, within: str = "body") -> None:
        self.button(name, within).click()

    def ids(self) -> list[str]:
        return self.js("return [...document.querySelectorAll('#jobs a')].map(a => a.textContent)")

    def open_job(self, job_id: str) -> None:
        self.until(lambda: job_id in self.ids(), f"job {job_id} in the list")
        self.find(f"#jobs tr[data-key='{job_id}'] a").click()
        self.until(lambda: self.text("#jobname") == job_id, "the job's own window")

    def requested(self, *methods: str) -> list[str]:
        """The addresses of all requests (with these methods) since this was last asked."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [e["params"]["request"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [request["url"] for request in sent if not methods or request["method"] in methods]


@pytest.fixture
def show(browser: webdriver.Chrome) -> Iterator[Callable[..., Page]]:
    """show(server): the page, loaded, and with its first figures."""

    def load(server: ServerProcess, path: str = "/") -> Page:
        page = Page(browser, server, path)
        page.until(lambda: page.all("#counts button"), "the counts")
        return page

    yield load
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture
def running(process: Callable[..., ServerProcess]) -> ServerProcess:
    return process("--grpc-port", "off", "--fsync", "never")


def submit_many(server: ServerProcess, count: int, **query: Any) -> list[str]:
    options = "&".join(f"{name}={value}" for name, value in query.items())
    lines = "\n".join(map(str, range(count)))
    answer = call(server.url, "POST", f"/api/jobs?{options}", lines, {"Content-Type": "application/x-ndjson"})
    return answer.json()["job_ids"]


def submit(server: ServerProcess, payload: str = "{}", **query: Any) -> str:
    options = "&".join(f"{name}={value}" for name, value in {"wait": 0, **query}.items())
    answer = call(server.url, "POST", f"/api/submit?{options}", payload)
    assert answer.status == 202, answer.body
    return answer.json()["job_id"]


def poll(server: ServerProcess, queue: str = "default") -> dict[str, Any] | None:
    answer = call(server.url, "GET", f"/api/worker/poll?queue={queue}&worker=w-1")
    return answer.json() if answer.status == 200 else None


def fail(server: ServerProcess, error: str = "no luck", payload: str = "{}", **query: Any) -> str:
    """Submit a job and let it fail for good."""
    job_id = submit(server, payload, **query)
    assert poll(server, query.get("queue", "default"))["job_id"] == job_id
    assert call(server.url, "POST", f"/api/worker/fail/{job_id}?retry=false", error).status == 200
    return job_id


def job(server: ServerProcess, job_id: str) -> dict[str, Any]:
    return call(server.url, "GET", f"/api/jobs/{job_id}").json()


def stats(server: ServerProcess) -> dict[str, Any]:
    return call(server.url, "GET", "/api/admin/stats").json()


# -- the page itself


def test_the_page_loads_without_an_error_a_violation_or_a_request_to_anybody_else(show, running):
    submit(running, '{"n": 1}')
    fail(running, queue="emails")
    page = show(running)
    page.until(lambda: len(page.ids()) == 2)
    page.until(lambda: page.all("#rateplot path"), "a plot, which takes two looks at the server")
    page.open_job(page.ids()[0])
    page.browser.find_element(By.ID, "shut").click()

    assert page.browser.get_log("browser") == []
    elsewhere = [url for url in page.requested() if not url.startswith((page.url + "/", "data:", "about:"))]
    assert elsewhere == []


def test_a_script_that_slipped_in_would_not_run(show, running):
    page = show(running)
    page.js(
        """
        const attempts = [
          () => {
            const script = document.createElement("script");
            script.append("window.ran = 1");
            document.body.append(script);
          },
          () => document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.ran = 2'>"),
          () => setTimeout("window.ran = 3", 0),
        ];
        for (const attempt of attempts) try { attempt(); } catch { /* refused at once */ }
        """
    )
    page.browser.execute_async_script("fetch('http://127.0.0.1:9/').catch(() => 0).then(arguments[0])")
    assert page.js("return window.ran") is None
    refusals = " ".join(entry["message"] for entry in page.browser.get_log("browser"))
    assert "http://127.0.0.1:9/" in refusals and "Content Security Policy" in refusals


def test_it_shows_counts_queues_workers_and_jobs(show, running):
    submit(running, queue="emails")
    submit(running, queue="reports", delay=100)
    failed = fail(running, "the printer is on fire", queue="paper")
    page = show(running)
    page.until(lambda: len(page.ids()) == 3)

    counts = [tile.text.split() for tile in page.all("#counts button")]
    assert ["1", "pending"] in counts and ["1", "delayed"] in counts and ["1", "failed"] in counts
    assert [row.text for row in page.all("#queues th")] == ["emails", "paper", "reports"]
    page.shows("#workers tr", "w-1")
    page.shows("#jobs tr", "the printer is on fire")

    page.click("1 failed", "#counts")
    page.until(lambda: page.ids() == [failed], "the failed job alone")
    page.click("1 failed", "#counts")
    page.until(lambda: len(page.ids()) == 3, "all jobs again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(show, running, browser, scheme):
    fail(running, "a-long-word-" * 30, queue="q" * 64)
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page = show(running)
    page.until(page.ids)
    assert page.js("return document.documentElement.scrollWidth") == 360
    page.open_job(page.ids()[0])
    assert page.js("return document.documentElement.scrollWidth") == 360
    assert page.js("const d = document.getElementById('detail'); return d.scrollWidth <= d.clientWidth")
    lightness = "return Number(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])"
    assert (page.js(lightness) > 128) == (scheme == "light")


def test_a_hidden_tab_asks_the_server_nothing(show, running):
    page = show(running)
    page.until(lambda: page.js("return !live.busy"))
    page.js("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    page.requested()
    page.js("refresh()")  # what the timer calls
    assert page.js("return live.busy") is False and page.requested() == []
    page.js("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.until(lambda: any("stats" in url for url in page.requested()), "a look at the server")


def test_a_server_that_is_gone_is_said_and_found_again(show, process, running, browser):
    low = {"width": 1200, "height": 400, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", low)
    page = show(running)
    page.js("scrollTo(0, document.body.scrollHeight)")
    running.kill()
    page.shows("#banner", "does not answer")
    # Where one has scrolled to: nothing covers it.
    in_sight = """
        const box = document.getElementById('trouble').getBoundingClientRect();
        return scrollY > 100 && document.elementFromPoint(box.x + 5, box.y + 5)?.id === 'trouble';
    """
    page.until(lambda: page.js(in_sight), "the alarm in sight")
    page.find("#search").send_keys("00000000-0000-4000-8000-000000000000", Keys.ENTER)
    page.shows("#note", "The server did not answer")
    again = process("--grpc-port", "off", "--port", str(running.port))
    submit(again, queue="after")
    page.click("Try now")
    page.until(lambda: not page.find("#banner").is_displayed(), "the end of the alarm")
    page.shows("#queues th", "after")


# -- what is on it is text


def test_markup_stays_text_wherever_it_comes_from(show, running):
    evil = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    job_id = fail(running, evil, payload=evil)
    page = show(running)
    page.open_job(job_id)
    blocks = [block.text for block in page.all("#detail pre")]
    assert blocks == [evil, evil]
    assert page.all("#detail script, #detail img, #jobs img") == []
    assert page.js("return window.ran") is None


def test_a_result_is_shown_as_text_and_linked(show, running):
    job_id = submit(running)
    poll(running)
    call(running.url, "POST", f"/api/worker/complete/{job_id}", "<b>bold</b>", {"Content-Type": "text/html"})
    page = show(running)
    page.open_job(job_id)
    assert page.all("#detail pre")[-1].text == "<b>bold</b>"
    link = page.find("#result")
    assert link.get_attribute("href") == f"{running.url}/api/jobs/{job_id}/result"
    assert "noopener" in link.get_attribute("rel")


def test_a_payload_is_shown_digit_by_digit(show, running):
    job_id = submit(running, '{"n": 12345678901234567890, "x": 1.0, "a": 1, "a": 2, "s": "\\"}{", "e": []}')
    page = show(running)
    page.open_job(job_id)
    shown = page.text("#detail pre")
    assert [line.strip() for line in shown.splitlines()] == [
        "{",
        '"n": 12345678901234567890,',
        '"x": 1.0,',
        '"a": 1,',
        '"a": 2,',
        '"s": "\\"}{",',
        '"e": []',
        "}",
    ]


def test_deeply_nested_json_is_shown_at_once(show, running):
    deep = {submit(running, "[" * depth + "]" * depth): depth for depth in (60, 5000, 32000)}
    page = show(running)
    for job_id, depth in deep.items():
        page.open_job(job_id)
        shown = page.js("return document.querySelector('#body pre').textContent")
        assert shown.replace("\n", "").replace(" ", "") == "[" * depth + "]" * depth
        assert len(shown) < 300_000 and " " * 81 not in shown
        page.click("Close", "#detail")
    assert page.text("#note") == ""


def test_what_the_page_cannot_show_is_not_put_down_to_the_server(show, running):
    submit(running)
    page = show(running)
    page.until(page.ids)
    page.js("showJob = () => { throw new RangeError('Invalid string length'); }")
    page.find("#jobs a").click()
    page.shows("#note", "This page cannot show the answer: Invalid string length")


def test_a_mark_that_turns_lines_around_is_shown_instead_of_obeyed(show, running):
    job_id = fail(running, "no luck with \u202egpj.exe", payload="\u2066text")
    page = show(running)
    page.open_job(job_id)
    assert [block.text for block in page.all("#detail pre")] == ["no luck with \\u202egpj.exe", "\\u2066text"]
    assert "no luck with \\u202egpj.exe" in page.text("#jobs tr")
    assert page.find("#jobs .soft").get_attribute("title") == "no luck with \\u202egpj.exe"


def test_a_heavy_payload_is_cut_and_says_so(show, running):
    job_id = submit(running, "a\\" * 2_000_000)
    page = show(running)
    page.open_job(job_id)
    page.shows("#body h3", "the first 64 KiB")
    assert page.js("return document.querySelector('#body pre').textContent.length") == 65536


# -- finding jobs


def test_older_and_newer_go_through_all_jobs(show, running):
    newest_first = submit_many(running, 60)[::-1]
    page = show(running)
    for name, start in [(None, 0), ("Older", 25), ("Older", 50), ("Newer", 25), ("Newer", 0)]:
        if name:
            page.click(name)
        page.until(lambda start=start: page.ids() == newest_first[start : start + 25], f"jobs from {start}")
        assert page.find("#older").is_enabled() == (start < 50)
        assert page.find("#newer").is_enabled() == (start > 0)


def test_pages_are_counted_once_and_end_where_the_jobs_end(show, running):
    submit_many(running, 15_000, queue="many")  # the server looks at 5,000 a request
    few = submit_many(running, 50, queue="few")[::-1]
    page = show(running)
    page.find("#queue option[value=few]").click()
    page.until(lambda: page.ids() == few[:25], "the newest of the queue")
    page.js("for (const press of [1, 2]) document.getElementById('older').click()")
    page.until(lambda: page.ids() == few[25:], "the next ones")
    assert "Page 2, 25 jobs" in page.text("#pagesays")
    page.js(
        """
        window.told = [];
        const tell = () => told.push(document.getElementById("pagesays").textContent);
        new MutationObserver(tell).observe(document.getElementById("pagesays"), { childList: true });
        """
    )
    page.click("Older")
    page.shows("#note", "No older ones.")
    assert page.ids() == few[25:] and "Page 2, 25 jobs" in page.text("#pagesays")
    assert any("Looking through older jobs, request 3" in words for words in page.js("return told"))
    seen = page.js("return view.turn")
    page.js("refresh()")
    page.until(lambda: page.js("return view.turn > arguments[0] && !live.busy", seen), "another look at the server")
    assert not page.find("#older").is_enabled()


def test_a_state_that_is_rare_fills_its_page_all_the_same(show, running):
    rare = [fail(running, queue="rare") for _ in range(2)]
    submit_many(running, 1500, queue="many")
    page = show(running)
    page.find("#status option[value=failed]").click()
    page.until(lambda: page.ids() == rare[::-1], "both failed jobs")


def test_a_job_is_found_by_its_id_and_by_words_on_the_page(show, running):
    wanted = fail(running, "the printer is on fire")
    submit_many(running, 30, queue="many")
    page = show(running)
    page.until(lambda: len(page.ids()) == 25)
    page.find("#search").send_keys(wanted.upper(), Keys.ENTER)  # it is on the second page
    page.shows("#jobname", wanted)
    page.click("Close", "#detail")
    page.find("#search").clear()
    page.click("Older")
    page.until(lambda: wanted in page.ids())
    page.find("#search").send_keys("PRINTER")
    page.until(lambda: page.ids() == [wanted], "the one job with that word")


def test_an_unknown_id_is_said(show, running):
    page = show(running)
    page.find("#search").send_keys("00000000-0000-4000-8000-000000000000", Keys.ENTER)
    page.shows("#note", "00000000-0000-4000-8000-000000000000")
    assert not page.find("#detail").is_displayed()


# -- its buttons change the server


def test_cancel_ends_a_waiting_job(show, running):
    job_id = submit(running)
    page = show(running)
    page.open_job(job_id)
    page.click("Cancel job")
    page.shows("#jobstate", "cancelled")
    assert job(running, job_id)["status"] == "cancelled"


def test_cancel_asks_first_where_a_worker_is_at_it(show, running):
    job_id = submit(running)
    poll(running)
    page = show(running)
    page.open_job(job_id)
    page.click("Cancel job")
    page.click("Let it run", "#ask")
    page.click("Cancel job")
    assert job(running, job_id)["status"] == "processing"
    page.click("Cancel it", "#ask")
    page.shows("#jobstate", "cancelled")
    assert job(running, job_id)["status"] == "cancelled"


def test_a_double_click_counts_once(show, running, browser):
    job_id = submit(running)
    page = show(running)
    page.open_job(job_id)
    page.requested()
    # Requeue comes to where Cancel job was.
    ActionChains(browser).double_click(page.button("Cancel job")).perform()
    page.shows("#jobstate", "cancelled")
    assert len(page.requested("DELETE", "POST")) == 1
    page.js("for (const press of [1, 2]) document.getElementById('requeue').click()")
    page.shows("#jobstate", "pending")
    assert len(page.requested("DELETE", "POST")) == 1
    assert job(running, job_id)["status"] == "pending"


def test_requeue_puts_a_failed_or_delayed_job_in_line(show, running):
    failed, delayed = fail(running), submit(running, delay=1000)
    page = show(running)
    for job_id in (failed, delayed):
        page.open_job(job_id)
        page.click("Requeue")
        page.shows("#jobstate", "pending")
        assert poll(running)["job_id"] == job_id
        page.click("Close", "#detail")


def test_a_refused_action_says_why(show, running):
    job_id = submit(running)
    page = show(running)
    page.open_job(job_id)
    # Another operator is faster, and this page has not looked since.
    page.js("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    call(running.url, "DELETE", f"/api/jobs/{job_id}")
    page.click("Cancel job")
    page.shows("#detail .note.bad", call(running.url, "DELETE", f"/api/jobs/{job_id}").json()["detail"])


def test_requeue_all_failed_of_one_queue_or_of_all(show, running):
    one, other = fail(running, queue="a"), fail(running, queue="b")
    page = show(running)
    page.until(lambda: len(page.ids()) == 2)
    page.find("#queue option[value=a]").click()
    page.shows("#pagesays", "Page 1, 1 job,")
    page.click("Requeue all 1 failed")
    assert page.text("#asktext") == "1 failed job of queue a goes back in line."
    page.click("Not now", "#ask")
    page.click("Requeue all 1 failed")
    assert job(running, one)["status"] == "failed"
    page.click("Requeue them", "#ask")
    page.shows("#note", "1 job requeued.")
    assert job(running, one)["status"] == "pending"
    assert job(running, other)["status"] == "failed"
    fail(running, queue="c")
    page.js("refresh()")
    page.find("#queue option[value='']").click()
    page.click("Requeue all 2 failed")
    assert page.text("#asktext") == "2 failed jobs of every queue go back in line."
    page.click("Requeue them", "#ask")
    page.until(lambda: job(running, other)["status"] == "pending")


def test_pause_holds_one_queue_and_resume_lets_it_go(show, running):
    held, free = submit(running, queue="held"), submit(running, queue="free")
    page = show(running)
    page.click("Pause queue held")
    page.shows("#queues tr", "held paused")
    assert poll(running, "held") is None
    assert poll(running, "free")["job_id"] == free
    page.click("Resume queue held")
    page.button("Pause queue held")
    assert poll(running, "held")["job_id"] == held


def test_pause_all_holds_every_queue(show, running):
    job_id, held = submit(running), submit(running, queue="held")
    page = show(running)
    page.click("Pause queue held")
    page.click("Pause all")
    page.click("Not now", "#ask")
    page.click("Pause all")
    assert stats(running)["paused"] is False
    page.click("Pause every queue", "#ask")
    page.button("Resume all")
    assert poll(running) is None
    # A queue's own button would change nothing now.
    assert [button.is_enabled() for button in page.all("#queues button")] == [False, False]
    page.click("Resume all")
    page.shows("#note", "those paused one by one too")
    page.button("Pause queue held")
    assert poll(running)["job_id"] == job_id and poll(running, "held")["job_id"] == held


def test_clear_asks_first_and_no_means_no(show, running):
    submit(running)
    page = show(running)
    for decline in (Keys.ENTER, Keys.ESCAPE):  # the button that keeps them has the focus
        page.click("Clear…")
        assert "1 job" in page.text("#asktext")
        page.browser.switch_to.active_element.send_keys(decline)
        page.until(lambda: not page.find("#ask").is_displayed())
        assert not any("/clear" in url for url in page.requested())
        assert stats(running)["total"] == 1
    page.click("Clear…")
    page.click("Clear everything")
    page.shows("#note", "1 job cleared.")
    assert stats(running)["total"] == 0
    page.until(lambda: page.ids() == [])


def test_a_job_is_cancelled_with_the_keyboard_alone(show, running):
    job_id = submit(running)
    page = show(running)
    page.until(page.ids)

    def focused() -> WebElement:
        return page.browser.switch_to.active_element

    def tab_to(name: str) -> None:
        for _ in range(40):
            focused().send_keys(Keys.TAB)
            if name in (focused().accessible_name, focused().text):
                # Whoever goes by keyboard has to see where they are.
                assert focused().value_of_css_property("outline-style") == "solid"
                return
        raise AssertionError(f"{name!r} is not within reach of the Tab key")

    tab_to(job_id)
    focused().send_keys(Keys.ENTER)
    page.shows("#jobname", job_id)
    tab_to("Cancel job")
    focused().send_keys(Keys.SPACE)
    page.shows("#jobstate", "cancelled")
    assert job(running, job_id)["status"] == "cancelled"
    focused().send_keys(Keys.ESCAPE)
    page.until(lambda: not page.find("#detail").is_displayed())
    assert focused().text == job_id


# -- who gets in


def test_a_token_is_asked_for_and_kept_in_this_tab_only(process, browser, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"admin {ADMIN} ops\nclient client-token-4711 web\n")
    tokens.chmod(0o600)
    server = process("--grpc-port", "off", "--tokens", str(tokens))

    page = Page(browser, server)
    page.until(lambda: page.find("#login").is_displayed(), "the question for a token")
    for wrong, why in [("wrong-token", "refused"), ("client-token-4711", "scope")]:
        page.find("#token").send_keys(wrong, Keys.ENTER)
        page.shows("#login .note", why)
    page.find("#token").send_keys(ADMIN, Keys.ENTER)
    page.until(lambda: page.all("#counts button"), "the counts")
    assert not page.find("#login").is_displayed()
    page.shows("#nojobs", 'curl -H "Authorization: Bearer TOKEN" -d')

    assert page.js("return Object.values(sessionStorage)") == [ADMIN]
    elsewhere = page.js("return [localStorage.length, document.cookie, location.href]")
    assert elsewhere == [0, "", server.url + "/"]
    browser.refresh()
    page.until(lambda: page.all("#counts button"), "the counts, without a question")

    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(server.url)
    page.until(lambda: page.find("#login").is_displayed(), "the question, in another tab")
    browser.close()
    browser.switch_to.window(first)

    page.click("Token")
    page.click("Forget")
    page.until(lambda: page.find("#login").is_displayed(), "the question again")
    assert page.js("return sessionStorage.length") == 0


def test_a_result_behind_a_token_is_saved(process, browser, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"admin {ADMIN}\n")
    tokens.chmod(0o600)
    server = process("--grpc-port", "off", "--tokens", str(tokens))
    bearer = {"Authorization": f"Bearer {ADMIN}"}
    job_id = call(server.url, "POST", "/api/submit?wait=0", "{}", bearer).json()["job_id"]
    assert call(server.url, "GET", "/api/worker/poll", headers=bearer).status == 200
    assert call(server.url, "POST", f"/api/worker/complete/{job_id}", "<b>result</b>", bearer).status == 200

    folder = tmp_path / "downloads"
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    page = Page(browser, server)
    page.until(lambda: page.find("#login").is_displayed())
    page.find("#token").send_keys(ADMIN, Keys.ENTER)
    page.open_job(job_id)
    page.find("#result").click()
    saved = folder / f"{job_id}.result"
    page.until(lambda: saved.exists() and saved.read_bytes() == b"<b>result</b>", "the saved result")
