"""Messages from one process to another through shared memory: one side writes, the other reads, in order.

The memory is a ring of bytes without a name in the file system; its descriptor and that of an eventfd(2) are handed to
the other process over a Unix socket. The eventfd counts the messages: adding to it wakes the reader, and what the
reader takes from it tells how many messages are there. So nobody polls, and the kernel orders the memory: a message
that was counted is complete. The only other word that is shared is how far the reader has come.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kernels.rings import SKIP, lay_messages

HEADER_BYTES = 64
_LENGTH = struct.Struct("<q")


class RingClosed(Exception):
    """The other side is gone, or this one was closed."""


class _Ring:
    """What both ends share. A message takes 8 bytes more than its own, rounded up to 8."""

    def __init__(self, memory: int, event: int) -> None:
        self.memory, self.event = memory, event
        size = os.fstat(memory).st_size
        self.capacity_bytes = size - HEADER_BYTES
        self._map = mmap.mmap(memory, size)
        self._view = memoryview(self._map)
        self._words = self._view[:HEADER_BYTES].cast(
            "Q"
        )  # one word is written and read as a whole; by struct it is not
        self._at = 0  # bytes written, or read, since the beginning
        self._lock = threading.Lock()
        self._closed = False

    @property
    def done(self) -> int:
        """Bytes that the reader has taken since the beginning."""
        return self._words[0]

    def release(self) -> None:
        """Gives memory and descriptors back; this end raises RingClosed from now on. Any thread, but for a reader
        only after its `take` came back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._words.release()
            self._view.release()
            self._let_go()
            self._map.close()
            os.close(self.memory)
            os.close(self.event)

    def _let_go(self) -> None:
        """Of what else refers to the memory."""


class RingWriter(_Ring):
    """The end that writes."""

    def __init__(self, memory: int, event: int) -> None:
        super().__init__(memory, event)
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8, offset=HEADER_BYTES)

    def _let_go(self) -> None:
        self._bytes = None

    def put(self, messages: Sequence[bytes]) -> int:
        """Writes as many of ``messages`` as fit, in order, and tells the reader; returns how many. Any thread.

        A message of up to half the ring always fits once the reader has taken all.

        Raises:
            RingClosed: this end was released.
        """
        with self._lock:
            if self._closed:
                raise RingClosed
            written = 0
            for message in messages:
                if not self._write(message):
                    break
                written += 1
            if written:
                os.eventfd_write(self.event, written)
            return written

    def put_rows(
        self,
        heads: NDArray[np.uint8],
        common: bytes,
        rows: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        which: NDArray[np.int64],
    ) -> int:
        """Like `put`, for messages that lie in columns; arguments as of `kernels.rings.lay_messages`. Any thread."""
        with self._lock:
            if self._closed or self._bytes is None:
                raise RingClosed
            shared = np.frombuffer(common, np.uint8)
            self._at, written = lay_messages(self._bytes, self._at, self.done, heads, shared, rows, offsets, which)
            if written:
                os.eventfd_write(self.event, written)
            return written

    def _write(self, message: bytes) -> bool:
        need = 8 + (len(message) + 7 & ~7)
        place = self._at % self.capacity_bytes
        skipped = self.capacity_bytes - place if place + need > self.capacity_bytes else 0
        if self._at + skipped + need - self.done > self.capacity_bytes:
            return False
        if skipped:
            _LENGTH.pack_into(self._view, HEADER_BYTES + place, SKIP)
            self._at += skipped
            place = 0
        at = HEADER_BYTES + place
        _LENGTH.pack_into(self._view, at, len(message))
        self._view[at + 8 : at + 8 + len(message)] = message
        self._at += need
        return True


class RingReader(_Ring):
    """The end that reads.

    Args:
        waits: whether it has a thread of its own, which waits in `take`; else somebody waits for ``event``, and then
            calls `take_what_is_there`.
    """

    def __init__(self, memory: int, event: int, waits: bool = True) -> None:
        super().__init__(memory, event)
        self._woken = False
        os.set_blocking(event, waits)

    def take(self) -> list[bytes]:
        """Waits for messages and returns all that were counted. One thread only.

        Raises:
            RingClosed: `wake` was called, this end was released, or what is in the ring is no message.
        """
        if self._closed:
            raise RingClosed
        count = os.eventfd_read(self.event)
        if self._woken:
            raise RingClosed
        return self._take(count)

    def take_what_is_there(self) -> list[bytes]:
        """Like `take`, for a reader that does not wait: maybe nothing. One thread; any may `release` meanwhile."""
        with self._lock:
            if self._closed:
                raise RingClosed
            try:
                return self._take(os.eventfd_read(self.event))
            except BlockingIOError:
                return []

    def _take(self, count: int) -> list[bytes]:
        messages = [self._read() for _ in range(count)]
        self._tell_done()
        return messages

    def _tell_done(self) -> None:
        self._words[0] = self._at

    def _read(self) -> bytes:
        place = self._at % self.capacity_bytes
        (length,) = _LENGTH.unpack_from(self._view, HEADER_BYTES + place)
        if length == SKIP:
            self._at += self.capacity_bytes - place
            place = 0
            (length,) = _LENGTH.unpack_from(self._view, HEADER_BYTES)
        if not 0 <= length <= self.capacity_bytes - place - 8:
            raise RingClosed(f"no message: a length of {length} at {place}")
        at = HEADER_BYTES + place + 8
        self._at += 8 + (length + 7 & ~7)
        return bytes(self._view[at : at + length])

    def wake(self) -> None:
        """Makes `take` raise RingClosed, now and later. Any thread."""
        self._woken = True
        os.eventfd_write(self.event, 1)


def new_ring(capacity_bytes: int) -> tuple[int, int]:
    """Descriptors of memory and event for a ring of ``capacity_bytes``, a positive multiple of 8."""
    if capacity_bytes <= 0 or capacity_bytes % 8:
        raise ValueError(f"capacity_bytes: a positive multiple of 8 wanted, got {capacity_bytes}")
    memory = os.memfd_create("liverank-ring", os.MFD_CLOEXEC)
    os.ftruncate(memory, HEADER_BYTES + capacity_bytes)
    return memory, os.eventfd(0, os.EFD_CLOEXEC)
