"""Unary gRPC calls at a constant rate of arrivals, for a few microseconds each: raw HTTP/2, one thread.

grpc's own client takes about 0.2 ms of CPU per call. On a machine that it shares with the server, ten times the peak of
the server would leave the server half of the machine, and the figures would be the client's.

The frames of a call are the same bytes each time but for the number of the stream. The client asks for a header table
of size 0, so that replies spell their headers out and a status is found by looking for its name. What is sent and what
has come is looked at once per STEP_S, and not per frame: each latency is up to that much too long.
What is not understood ends the flood with an error; it is never counted as a reply.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc

from loadtest.bench.catalogue import as_bytes, rank_requests
from loadtest.faults.http2 import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    connect,
    frame,
    request_headers,
)

STEP_S = 0.002
AFTER_S = 0.25
"""How long after its time a flood may still send what it could not send in time."""
CONNECTIONS = 2
TIMEOUT_S = 5.0
"""Every call's deadline; told to the server, too."""
RANK = "/liverank.v1.Ranking/Rank"
SHED = "RESOURCE_EXHAUSTED"
OVERLOADED = b"overload: "
"""How a reply's reasons begin when fewer candidates were scored."""
QUERIES = 256
_HINT, _STATUS = b"\x16grpc-retry-pushback-ms", b"\x0bgrpc-status"
_STATUS_NAMES = {str(code.value[0]).encode(): code.name for code in grpc.StatusCode}
_HEADER_TABLE_SIZE, _MAX_STREAMS, _INITIAL_WINDOW = 1, 3, 4  # RFC 9113, 6.5.2
_FIRST_WINDOW, _WINDOW = 65_535, 2**31 - 1
_READ_BYTES = 1 << 20


class FloodError(Exception):
    """The server said what this client cannot count."""


@dataclass
class Found:
    """What came of calls. latencies_s: of those answered with OK, from when each was due; hints_ms: of those refused
    with a hint; degraded: answered with fewer candidates scored."""

    latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    hints_ms: list[int] = field(default_factory=list)
    degraded: int = 0


class _Connection:
    """One HTTP/2 connection, without a lock, a thread or a wait."""

    def __init__(self, address: str, found: Found) -> None:
        self._found = found
        self._socket = connect(address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = struct.pack(">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW, _WINDOW)
        self._out = bytearray(PREFACE + frame(SETTINGS, 0, 0, settings))
        self._grant(_WINDOW - _FIRST_WINDOW)
        self._in = bytearray()
        self._consumed = 0  # bytes of DATA since the last grant
        self._next_stream = 1
        self._window, self._stream_window, self._most_streams = _FIRST_WINDOW, _FIRST_WINDOW, 2**31
        self.due_s: dict[int, float] = {}
        """When each call in hand was due, by stream; oldest first."""
        self._bodies: dict[int, bytes] = {}
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def send(self, call: tuple[bytes, bytes, bytes], due_s: float) -> bool:
        """Takes a call (see `_as_frames`), to be written by `turn`; False when the server allows no more just now."""
        size = len(call[2])
        if size > self._window or size > self._stream_window or len(self.due_s) >= self._most_streams:
            return False
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        number = stream.to_bytes(4, "big")
        self._out += b"".join((call[0], number, call[1], number, call[2]))
        self._window -= size
        self.due_s[stream] = due_s
        return True

    def turn(self) -> None:
        """Writes and reads what can be written and read without waiting."""
        if self._out:
            with contextlib.suppress(BlockingIOError):
                del self._out[: self._socket.send(self._out)]
        try:
            came = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        if not came:
            raise FloodError("the server closed the connection")
        self._in += came
        self._read()

    def forget_late(self, now_s: float) -> None:
        """Gives up calls whose deadline passed without a word of the server."""
        while self.due_s:
            stream, due_s = next(iter(self.due_s.items()))
            if now_s - due_s < TIMEOUT_S:
                return
            del self.due_s[stream]
            self._bodies.pop(stream, None)
            self._found.errors[grpc.StatusCode.DEADLINE_EXCEEDED.name] += 1

    # --- inside -------------------------------------------------------------------------------

    def _read(self) -> None:
        data, at, size, now_s = bytes(self._in), 0, len(self._in), time.monotonic()
        while at + 9 <= size:
            length = int.from_bytes(data[at : at + 3], "big")
            begin, end = at + 9, at + 9 + length
            if end > size:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : begin], "big")
            if kind == HEADERS:
                if not flags & END_HEADERS or flags & PADDED:
                    raise FloodError(f"HEADERS with flags {flags:#x}")
                if flags & END_STREAM:
                    self._ended(stream, data[begin:end], now_s)
            elif kind == DATA:
                if flags & PADDED:
                    raise FloodError("padded DATA")
                self._consumed += length
                if stream in self.due_s:
                    self._bodies[stream] = self._bodies.get(stream, b"") + data[begin:end]
            else:
                self._other(kind, flags, stream, data[begin:end])
            at = end
        del self._in[:at]
        if self._consumed > _WINDOW // 2:
            self._grant(self._consumed)
            self._consumed = 0

    def _ended(self, stream: int, trailers: bytes, now_s: float) -> None:
        due_s, body = self.due_s.pop(stream, None), self._bodies.pop(stream, b"")
        if due_s is None:  # given up before
            return
        status = _STATUS_NAMES.get(_value(trailers, _STATUS) or b"")
        if status is None:
            raise FloodError(f"no status in {trailers!r}")
        if status == "OK":
            self._found.latencies_s.append(now_s - due_s)
            self._found.degraded += OVERLOADED in body
            return
        self._found.errors[status] += 1
        if (hint := _value(trailers, _HINT)) is not None:
            self._found.hints_ms.append(int(hint))

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            if stream == 0:
                self._window += int.from_bytes(payload, "big")
        elif kind == PING and not flags & ACK:
            self._out += frame(PING, ACK, 0, payload)
        elif kind == SETTINGS and not flags & ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == _INITIAL_WINDOW:
                    self._stream_window = value
                elif key == _MAX_STREAMS:
                    self._most_streams = value
            self._out += frame(SETTINGS, ACK, 0)
        elif kind == RST_STREAM and self.due_s.pop(stream, None) is not None:
            self._bodies.pop(stream, None)
            self._found.errors[f"RST_STREAM {int.from_bytes(payload, 'big')}"] += 1
        elif kind == GOAWAY:
            raise FloodError(f"GOAWAY {payload[8:].decode(errors='replace')}")

    def _grant(self, more_bytes: int) -> None:
        self._out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", more_bytes))


def _as_frames(path: str, payload: bytes) -> tuple[bytes, bytes, bytes]:
    """The bytes of a call before, between and after the two places where its stream's number stands."""
    headers = request_headers(path, ("grpc-timeout", f"{TIMEOUT_S * 1000:.0f}m"))
    message = struct.pack(">BI", 0, len(payload)) + payload
    opening, data = frame(HEADERS, END_HEADERS, 0, headers), frame(DATA, END_STREAM, 0, message)
    return opening[:5], opening[9:] + data[:5], data[9:]


def _value(block: bytes, name: bytes) -> bytes | None:
    """Value of a header that is spelled out in a block; its name comes with its length in front."""
    at = block.find(name)
    if at < 0:
        return None
    begin = at + len(name) + 1
    return block[begin : begin + block[begin - 1]]


class Flooder:
    """One generator. Arrivals have a constant rate, whatever the server does."""

    def __init__(self, address: str, payloads: list[bytes], path: str = RANK, connections: int = CONNECTIONS) -> None:
        self._found = Found()
        self._calls = [_as_frames(path, payload) for payload in payloads]
        self._connections = [_Connection(address, self._found) for _ in range(connections)]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def run(self, rate_per_s: float, seconds: float, after_s: float = AFTER_S) -> dict[str, Any]:
        """Floods for ``seconds``, then waits for what was sent. A call that is late is sent nevertheless, up to
        ``after_s`` after these seconds, and its latency counts from when it was due; what the server's windows or the
        time did not allow is ``unsent``.

        Raises:
            FloodError: the server said what cannot be counted, such as GOAWAY.
        """
        found = self._found
        found.__init__()  # type: ignore[misc]
        planned, sent, worst_s = round(rate_per_s * seconds), 0, 0.0
        begun_s, used_s = time.monotonic(), time.process_time()
        while sent < planned and (now_s := time.monotonic()) < begun_s + seconds + after_s:
            while sent < planned and (due_s := begun_s + sent / rate_per_s) <= now_s:
                call = self._calls[sent % len(self._calls)]
                if not self._connections[sent % len(self._connections)].send(call, due_s):
                    break
                worst_s = max(worst_s, now_s - due_s)
                sent += 1
            self._turn(now_s)
        wall_s = max(seconds, time.monotonic() - begun_s)
        while any(connection.due_s for connection in self._connections):
            self._turn(time.monotonic())
        return {
            "latencies_ms": [round(s * 1000, 2) for s in found.latencies_s],
            "errors": dict(found.errors),
            "hints_ms": found.hints_ms,
            "degraded": found.degraded,
            "sent": sent,
            "wall_s": wall_s,
            "unsent": planned - sent,
            "worst_send_delay_ms": round(worst_s * 1000, 1),
            "cpu_s": time.process_time() - used_s,
        }

    def _turn(self, now_s: float) -> None:
        for connection in self._connections:
            connection.turn()
            connection.forget_late(now_s)
        time.sleep(max(0.0, now_s + STEP_S - time.monotonic()))


def main() -> None:
    """One generator process; prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--rate", type=float, required=True, help="arrivals per second")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--settle", type=float, required=True, help="seconds before it measures")
    options = parser.parse_args()
    flooder = Flooder(options.address, as_bytes(rank_requests(QUERIES)))
    flooder.run(options.rate, options.settle)
    print(json.dumps(flooder.run(options.rate, options.seconds)))


if __name__ == "__main__":
    main()
