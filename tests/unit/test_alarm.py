"""Waiting for a notice or for another process: nothing is missed, and nobody polls."""

from __future__ import annotations

import os
import threading
import time

import pytest

from server.alarm import MOST_DESCRIPTOR, Alarm

LONG_S = 30.0


def waiting(alarm: Alarm, held: threading.Event) -> tuple[threading.Thread, list[float]]:
    """A thread that waits, and how long it did."""
    took_s: list[float] = []

    def run() -> None:
        with alarm:
            held.set()
            begun_s = time.monotonic()
            alarm.wait(LONG_S)
            took_s.append(time.monotonic() - begun_s)

    thread = threading.Thread(target=run)
    thread.start()
    held.wait()
    return thread, took_s


@pytest.mark.parametrize("watches", [False, True])
def test_a_notice_given_at_any_time_after_the_lock_was_held_ends_the_wait(watches: bool) -> None:
    alarm, event = Alarm(), os.eventfd(0)
    if watches:
        alarm.watch(event)
    for _ in range(50):
        thread, took_s = waiting(alarm, threading.Event())
        with alarm:  # only once it waits
            alarm.notify()
            alarm.notify()
        thread.join()
        assert took_s[0] < LONG_S


def test_what_can_be_read_ends_each_wait_until_it_was_read() -> None:
    alarm, event = Alarm(), os.eventfd(0)
    alarm.watch(event)
    thread, took_s = waiting(alarm, threading.Event())
    os.eventfd_write(event, 1)
    thread.join()
    assert took_s[0] < LONG_S
    with alarm:
        alarm.wait(LONG_S)
    os.eventfd_read(event)
    with alarm:
        begun_s = time.monotonic()
        alarm.wait(0.0005)
        assert time.monotonic() - begun_s >= 0.0005
    alarm.forget(event)
    os.close(event)


def test_a_descriptor_that_is_forgotten_and_closed_during_a_wait_does_no_harm() -> None:
    alarm = Alarm()
    for _ in range(20):
        event = os.eventfd(0)
        alarm.watch(event)
        thread, took_s = waiting(alarm, threading.Event())
        alarm.forget(event)
        os.close(event)
        thread.join()
        assert took_s[0] < LONG_S


def test_a_wait_ends_when_something_to_watch_is_added() -> None:
    alarm, event = Alarm(), os.eventfd(1)
    thread, took_s = waiting(alarm, threading.Event())
    alarm.watch(event)
    thread.join()
    assert took_s[0] < LONG_S
    os.close(event)


@pytest.mark.parametrize("watches", [False, True])
def test_a_notice_to_nobody_does_not_end_the_next_wait(watches: bool) -> None:
    alarm, event = Alarm(), os.eventfd(0)
    if watches:
        alarm.watch(event)
    with alarm:
        alarm.notify()
        begun_s = time.monotonic()
        alarm.wait(0.002)
        assert time.monotonic() - begun_s >= 0.002


def test_a_descriptor_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="descriptor"):
        Alarm().watch(MOST_DESCRIPTOR + 1)
