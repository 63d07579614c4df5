"""Everything that an edge does not do itself goes on to the engine's own port, as bytes, whatever the method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

_OWN = ("grpc-", ":", "user-agent", "te", "content-type")
_RECONNECT_MS = 500
NO_DEADLINE_S = 1e9
"""grpc writes "no deadline" as a time in the far future."""


class Proxy(grpc.GenericRpcHandler):
    """Hands calls of any method on, message by message, with their metadata and deadline; and the answers back.

    Each open call holds a thread here, as it does in the engine's process. The other side decides on credentials.

    Args:
        address: of the engine's port, such as ``unix:/run/liverank/engine.sock``.
    """

    def __init__(self, address: str, max_message_bytes: int) -> None:
        self.channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS),
            ],
        )

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        ask = self.channel.stream_stream(handler_call_details.method)

        def forward(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            left_s = context.time_remaining()
            timeout_s = None if left_s is None or left_s > NO_DEADLINE_S else left_s
            call = ask(_until_gone(messages), timeout=timeout_s, metadata=_passed_on(context.invocation_metadata()))
            if not context.add_callback(call.cancel):
                call.cancel()
            # Early where the method sends it early: who watches waits for it before anything happens.
            context.send_initial_metadata(tuple(call.initial_metadata() or ()))
            try:
                yield from call
            except grpc.RpcError:
                context.set_trailing_metadata(call.trailing_metadata() or ())
                context.abort(call.code(), call.details() or "")
            context.set_trailing_metadata(call.trailing_metadata() or ())

        return grpc.stream_stream_rpc_method_handler(forward)

    def close(self) -> None:
        self.channel.close()


def _until_gone(messages: Iterator[bytes]) -> Iterator[bytes]:
    """The caller's messages; a caller that vanishes sends no more, and its call is cancelled elsewhere."""
    try:
        yield from messages
    except grpc.RpcError:
        return


def _passed_on(metadata: Any) -> tuple[tuple[str, Any], ...]:
    """What the caller itself wrote."""
    return tuple((key, value) for key, value in metadata or () if not key.startswith(_OWN))
