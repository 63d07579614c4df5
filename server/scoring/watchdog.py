"""Stops what takes too long, with one thread for all: starting one for each call costs more than a small model."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watch:
    """One run. expired: it was told to stop."""

    __slots__ = ("due_s", "expired", "stop")

    def __init__(self, due_s: float, stop: Callable[[], None]) -> None:
        self.due_s, self.stop, self.expired = due_s, stop, False


class Watchdog:
    """Calls what stops a run once its time is over. Any number of threads; its own begins with the first run.

    While runs follow each other it sleeps through them: it is woken only for one that is due before it would look by
    itself, and looks once per such time. Without runs it sleeps.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: set[Watch] = set()
        self._looks_s = -math.inf  # when the thread looks next; -inf: there is none yet
        self._seen = False  # whether there was a run since it last looked

    @contextmanager
    def watching(self, due_s: float, stop: Callable[[], None]) -> Iterator[Watch]:
        """Inside, ``stop`` is called once ``due_s`` (monotonic) has passed; never after it."""
        watch = Watch(due_s, stop)
        with self._changed:
            self._watched.add(watch)
            self._seen = True
            if self._looks_s == -math.inf:
                self._looks_s = due_s
                threading.Thread(target=self._run, name="watchdog", daemon=True).start()
            elif due_s < self._looks_s:
                self._changed.notify()
        try:
            yield watch
        finally:
            with self._changed:
                self._watched.discard(watch)

    def _run(self) -> None:
        with self._changed:
            slept_s = 0.0
            while True:
                now_s = time.monotonic()
                for watch in [w for w in self._watched if w.due_s <= now_s]:
                    self._watched.discard(watch)
                    watch.expired = True
                    watch.stop()
                self._looks_s = min((w.due_s for w in self._watched), default=math.inf)
                if self._looks_s == math.inf and self._seen:  # another is likely to come before it would be due
                    self._looks_s = now_s + slept_s
                self._seen = False
                slept_s = max(0.0, self._looks_s - now_s)
                self._changed.wait(None if self._looks_s == math.inf else slept_s)
