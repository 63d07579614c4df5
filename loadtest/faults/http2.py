"""Just enough raw HTTP/2: to behave badly (connections that say nothing, messages that stop half-way), and cheaply."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS, PADDED = 1, 1, 4, 8


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def greeting() -> bytes:
    """What a client says first."""
    return PREFACE + frame(SETTINGS, 0, 0)


def request_headers(path: str, *more: tuple[str, str]) -> bytes:
    """The headers of a gRPC call, spelled out (no table, no Huffman): the same bytes whatever was sent before."""
    headers = (
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "127.0.0.1"),
        ("content-type", "application/grpc"), ("te", "trailers"), *more,
    )  # fmt: skip
    return b"".join(
        b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode() for name, value in headers
    )


def call(path: str, stream: int = 1) -> bytes:
    """The opening of a gRPC call."""
    return frame(HEADERS, END_HEADERS, stream, request_headers(path))


def half_message(payload: bytes, stream: int = 1) -> bytes:
    """A DATA frame with the first half of a message that announces its whole length."""
    return frame(DATA, 0, stream, struct.pack(">BI", 0, len(payload)) + payload[: len(payload) // 2])


def connect(address: str) -> socket.socket:
    """A plain TCP connection to ``host:port``."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10.0)


def reset(connection: socket.socket) -> None:
    """Closes with RST, as a machine that lost its power is seen sooner or later."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
