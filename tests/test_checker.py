"""The checker must notice a server that lies. Each lie is told with a history and jobs made up for it."""

import copy

import pytest

from checker import Call, History, check, new_result

PAYLOAD = b"a payload"
RESULT = new_result(PAYLOAD)
JOB = {"job_id": "1", "status": "completed", "payload": "a payload", "result": RESULT}
SHOWN = {"job_id": "1", "payload": "a payload", "lease_token": "t", "attempt": 1}


def honest():
    """A history of one job, and what an honest server holds after it."""
    calls = [
        Call("submit", 1, 2, 202, {"job_id": "1"}, payloads=[PAYLOAD]),
        Call("poll", 3, 4, 200, jobs=[dict(SHOWN)], lease=60),
        Call("complete", 5, 6, 200, {"job_id": "1"}, job_id="1", token="t", result=RESULT),
    ]
    return calls, {"1": copy.deepcopy(JOB)}


def lost(calls, jobs):
    del jobs["1"]


def changed_payload(calls, jobs):
    jobs["1"]["payload"] = "another"


def not_final(calls, jobs):
    jobs["1"]["status"] = "pending"
    del calls[2]


def reverted(calls, jobs):
    jobs["1"]["status"] = "failed"


def another_result(calls, jobs):
    jobs["1"]["result"] = new_result(PAYLOAD)


def result_of_another(calls, jobs):
    calls[2].result = jobs["1"]["result"] = new_result(b"another")


def stranger(calls, jobs):
    jobs["2"] = {**JOB, "job_id": "2", "payload": "nobody sent this"}


def twice(calls, jobs):
    jobs["2"] = {**JOB, "job_id": "2"}


def ran_though_refused(calls, jobs):
    calls[0].status = 507


def completed_twice(calls, jobs):
    calls.append(Call("complete", 7, 8, 200, {"job_id": "1"}, job_id="1", token="t", result=RESULT))


def handed_out_when_final(calls, jobs):
    calls.append(Call("poll", 7, 8, 200, jobs=[dict(SHOWN)], lease=60))


def with_two_workers(calls, jobs):
    calls.insert(2, Call("poll", 4, 5, 200, jobs=[{**SHOWN, "lease_token": "u", "attempt": 2}], lease=60))


def attempts_went_back(calls, jobs):
    calls[1].lease = 0
    calls[1].jobs[0]["attempt"] = 2
    calls.insert(2, Call("poll", 4.5, 5, 200, jobs=[{**SHOWN, "lease_token": "u", "attempt": 1}], lease=60))


def lease_lost(calls, jobs):
    calls.insert(2, Call("complete", 4, 5, 409, {"code": "lease_lost"}, job_id="1", token="t", result=RESULT))


def cancelled_and_completed(calls, jobs):
    calls.append(Call("cancel", 4, 5, 200, {}, job_id="1"))


def cleared_and_there(calls, jobs):
    calls.append(Call("clear", 7, 8, 200, {}))


def another_answer_to_the_client(calls, jobs):
    calls[0].status, calls[0].answer = 200, {"job_id": "1", "payload": new_result(PAYLOAD)}


def half_a_batch(calls, jobs):
    calls.append(Call("submit", 1, 2, None, payloads=[b"a payload", b"the other half"], batch=True))


def a_key_that_names_two(calls, jobs):
    calls[0].key = "k"
    calls.append(Call("submit", 7, 8, 202, {"job_id": "2"}, payloads=[PAYLOAD], key="k"))


def unknown_to_its_worker(calls, jobs):
    calls.insert(2, Call("complete", 4, 5, 404, {}, job_id="1", token="t", result=RESULT))


def server_error(calls, jobs):
    calls.append(Call("poll", 7, 8, 500, {}))


LIES = [
    lost,
    changed_payload,
    not_final,
    reverted,
    another_result,
    result_of_another,
    stranger,
    twice,
    ran_though_refused,
    completed_twice,
    handed_out_when_final,
    with_two_workers,
    attempts_went_back,
    lease_lost,
    cancelled_and_completed,
    cleared_and_there,
    another_answer_to_the_client,
    half_a_batch,
    a_key_that_names_two,
    unknown_to_its_worker,
    server_error,
]


def test_an_honest_server_passes():
    calls, jobs = honest()
    assert check(History(calls), None, jobs=jobs)["completed"] == 1


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_is_noticed(lie):
    calls, jobs = honest()
    lie(calls, jobs)
    with pytest.raises(AssertionError, match="promises broken"):
        check(History(calls), None, jobs=jobs)


def test_an_outcome_that_was_never_read_may_be_either():
    calls, jobs = honest()
    calls[0].status = calls[2].status = None
    check(History(calls), None, jobs=jobs)
    check(History(calls[:1]), None, jobs={})
