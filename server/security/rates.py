"""How often each client may ask: a token bucket per identity."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from server.errors import RateLimited

MAX_CLIENTS = 10_000
_ONE = 1.0 - 1e-6  # who waits as long as it was told must not fail by a rounding error


class Rates:
    """Buckets of ``burst_s`` seconds' worth of requests that refill at each client's rate. Thread-safe.

    A call passes while its bucket holds one request, and may then `overdraw` it: so a batch that is larger than the
    bucket is possible, and paid for by waiting. Of more than `MAX_CLIENTS` clients the one not seen for
    longest is forgotten, which gives it a full bucket.
    """

    def __init__(self, burst_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._burst_s, self._now_s = burst_s, now_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client → (left, when)
        self._lock = threading.Lock()

    def take(self, client: str, rate: float) -> None:
        """Takes one request out of the client's bucket; a rate of 0 means no limit.

        Raises:
            RateLimited: with the time after which one request will pass.
        """
        if not rate:
            return
        now_s = self._now_s()
        full = max(1.0, rate * self._burst_s)
        with self._lock:
            left, at_s = self._buckets.get(client, (full, now_s))
            left = min(full, left + (now_s - at_s) * rate)
            if left >= _ONE:
                self._buckets[client] = (left - 1.0, now_s)
                self._buckets.move_to_end(client)
                if len(self._buckets) > MAX_CLIENTS:
                    self._buckets.popitem(last=False)
                return
        wait_ms = max(1, math.ceil((_ONE - left) / rate * 1000))
        raise RateLimited(f"{client}: more than {rate:g} requests per second; retry after {wait_ms} ms", wait_ms)

    def overdraw(self, client: str, rate: float, requests: int) -> None:
        """Takes ``requests`` more for the call that was just let through, whether they are there or not."""
        if not rate:
            return
        with self._lock:
            if client in self._buckets:
                left, at_s = self._buckets[client]
                self._buckets[client] = (left - requests, at_s)
