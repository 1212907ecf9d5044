"""The tests' own clock: a test that trusts a wrong one proves nothing."""

from __future__ import annotations

import threading

import pytest

from support import FakeClock, wait_until


class Sleeper:
    """A thread that sleeps on the clock until its own deadline, as a timer does."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self.clock = clock
        self.condition = threading.Condition()
        self.notified = False
        self.woke_at: float | None = None
        self._deadline = clock.monotonic() + seconds
        self.thread = threading.Thread(target=self._sleep, daemon=True)
        self.thread.start()

    def _sleep(self) -> None:
        with self.condition:
            while not self.notified and (left := self._deadline - self.clock.monotonic()) > 0:
                self.clock.wait(self.condition, left)
        self.woke_at = self.clock.monotonic()

    def ended(self) -> bool:
        self.thread.join(10)
        return not self.thread.is_alive()


def test_a_sleeper_wakes_when_the_clock_has_passed_its_deadline_and_not_before():
    clock = FakeClock(monotonic=0)
    sleeper = Sleeper(clock, 5)
    wait_until(lambda: clock.sleepers() == 1)
    clock.advance(4.5)
    wait_until(lambda: clock.sleepers() == 1, what="the sleeper to look and sleep again")
    assert sleeper.woke_at is None
    clock.advance(0.5)
    assert sleeper.ended()
    assert sleeper.woke_at == 5


def test_a_sleeper_wakes_when_it_is_notified():
    clock = FakeClock()
    sleeper = Sleeper(clock, 5)
    wait_until(lambda: clock.sleepers() == 1)
    with sleeper.condition:
        sleeper.notified = True
        sleeper.condition.notify()
    assert sleeper.ended()
    assert clock.sleepers() == 0


def test_a_clock_that_moves_between_a_look_and_the_sleep_is_not_slept_through():
    clock = FakeClock()
    clock.monotonic()
    clock.advance(5)
    condition = threading.Condition()
    with condition:
        clock.wait(condition, 5)  # returns at once: those 5 s began before the move
    assert clock.sleepers() == 0


@pytest.mark.parametrize("jump", [30 * 86_400, -30 * 86_400])
def test_a_jump_moves_the_wall_clock_alone(jump):
    clock = FakeClock()
    before = clock.monotonic(), clock.time()
    clock.jump(jump)
    assert (clock.monotonic(), clock.time()) == (before[0], before[1] + jump)
    clock.advance(1)
    assert (clock.monotonic(), clock.time()) == (before[0] + 1, before[1] + jump + 1)


def test_many_sleepers_wake_together():
    clock = FakeClock()
    sleepers = [Sleeper(clock, seconds) for seconds in range(1, 51)]
    wait_until(lambda: clock.sleepers() == 50)
    clock.advance(50)
    assert all(sleeper.ended() for sleeper in sleepers)


def test_wait_until_gives_up_and_says_what_it_waited_for():
    with pytest.raises(AssertionError, match="in vain for the moon"):
        wait_until(lambda: False, timeout=0.02, what="the moon")
