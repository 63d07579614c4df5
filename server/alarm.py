"""A lock with a way to wait, as threading.Condition is, that also ends when other processes have something to say."""

from __future__ import annotations

import os
import select
import threading
from types import TracebackType

MOST_DESCRIPTOR = 1023
"""select(2) knows no larger one; poll(2) knows no waits below a millisecond."""


class Alarm:
    """One thread waits; any thread notifies. A wait may end for no reason."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._told = threading.Condition(self._lock)  # half the price, where no descriptor is watched
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watched: list[int] = []
        self._waits = False  # for a descriptor, that of notices among them

    def __enter__(self) -> Alarm:
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __del__(self) -> None:
        os.close(self._event)

    def notify(self) -> None:
        """Ends the wait, if there is one. With the lock held."""
        if self._waits:
            self._waits = False
            os.eventfd_write(self._event, 1)
        else:
            self._told.notify()

    def wait(self, timeout_s: float) -> None:
        """Gives the lock away until notified, until a watched descriptor has something to read, or for so long. With
        the lock held, once."""
        if not self._watched:
            self._told.wait(timeout_s)
            return
        self._waits, watched = True, self._watched
        self._lock.release()
        try:
            select.select((self._event, *watched), (), (), timeout_s)
        except OSError:
            # One of them was closed just now.
            if watched is self._watched:
                raise
        finally:
            self._lock.acquire()
            if not self._waits:
                os.eventfd_read(self._event)
            self._waits = False

    def watch(self, descriptor: int) -> None:
        """From now on waits end while there is something to read from it. Any thread.

        Raises:
            ValueError: it is too large a number.
        """
        if descriptor > MOST_DESCRIPTOR:
            raise ValueError(f"descriptor: at most {MOST_DESCRIPTOR} can be waited for, got {descriptor}")
        with self:
            self._watched = [*self._watched, descriptor]
            self.notify()

    def forget(self, descriptor: int) -> None:
        """Before it is closed. Any thread."""
        with self:
            self._watched = [one for one in self._watched if one != descriptor]
            self.notify()
