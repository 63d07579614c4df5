"""Fair between clients by rows, earliest deadline first within a round. Pure: no clock, no lock."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Generic

from server.batching.base import T, Waiting

_FORGET_ABOVE = 64


@dataclass
class _Client(Generic[T]):
    calls: deque[Waiting[T]] = field(default_factory=deque)
    start: int = 0
    """Virtual start of its next call: rows of every client's fair share that had been handed out by then."""


class FairQueue(Generic[T]):
    """Start-time fair queueing: the client that got the fewest rows goes next; first in, first out per client.

    A client that was idle starts at the present virtual time, so it neither owes nor has saved up anything.
    Clients in the same round, ``round_rows`` rows of virtual time, go by the deadline of their first call.
    Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996. A step costs O(log clients).
    """

    def __init__(self, round_rows: int) -> None:
        self._round_rows = round_rows
        self._clients: dict[str, _Client[T]] = {}
        self._heads: list[tuple[int, float, int, str]] = []  # round, deadline of the first call, tie, client
        self._virtual = 0
        self._pushed = 0
        self._calls = 0

    def __bool__(self) -> bool:
        return self._calls > 0

    def push(self, item: Waiting[T]) -> None:
        """Queues a call behind the others of its client."""
        client = self._clients.get(item.client)
        if client is None:
            self._forget_idle()
            client = self._clients[item.client] = _Client()
        client.calls.append(item)
        self._calls += 1
        if len(client.calls) == 1:
            client.start = max(client.start, self._virtual)
            self._offer(item.client, client)

    def pop(self, room_rows: int) -> Waiting[T] | None:
        """The next call, unless it has more rows than there is room: none overtakes it then."""
        while self._heads:
            entry = self._heads[0]
            client = self._clients[entry[3]]
            while client.calls and client.calls[0].gone:
                client.calls.popleft()
            if not client.calls:
                heapq.heappop(self._heads)
                continue
            head = client.calls[0]
            if head.deadline_s != entry[1]:  # its first call went another way
                heapq.heappop(self._heads)
                self._offer(entry[3], client)
                continue
            if len(head) > room_rows:
                return None
            heapq.heappop(self._heads)
            client.calls.popleft()
            head.gone = True
            self._virtual = max(self._virtual, client.start)
            client.start += len(head)
            if client.calls:
                self._offer(entry[3], client)
            self.left()
            return head
        return None

    def left(self) -> None:
        """A call left: by its turn, or marked as gone."""
        self._calls -= 1
        if not self._calls:  # idle: nobody owes anything
            self._clients.clear()
            self._heads.clear()
            self._virtual = 0

    def _offer(self, name: str, client: _Client[T]) -> None:
        self._pushed += 1
        key = (client.start // self._round_rows, client.calls[0].deadline_s, self._pushed, name)
        heapq.heappush(self._heads, key)

    def _forget_idle(self) -> None:
        """Clients come and go; those without calls that owe nothing need not be remembered."""
        if len(self._clients) > 2 * len(self._heads) + _FORGET_ABOVE:
            offered = {entry[3] for entry in self._heads}
            self._clients = {name: c for name, c in self._clients.items() if name in offered or c.start > self._virtual}
