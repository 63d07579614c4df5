"""The way into Ranking: admission before a message is read, then credentials, then the handler; and the way out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.admission.gate import Admission
from server.batching.base import Priority
from server.recorder import Recorder
from server.rpc.auth import identify, parser_of
from server.rpc.direct import Call, DirectMethod, Refusal
from server.rpc.status import turned_away, verdict
from server.security.access import Identity
from server.security.gate import Gate
from server.security.roles import access_of

PRIORITY_HEADER = "liverank-priority"

Handler = Callable[[Any, Call, Priority, Identity], None]
"""Takes the parsed message; sees to it that the call is answered. What it raises becomes the call's status."""


class Turnstile:
    """Makes direct methods of handlers. What it turns away costs no message, no credentials and no thread."""

    def __init__(self, admission: Admission, gate: Gate, recorder: Recorder) -> None:
        self._admission, self._gate, self._recorder = admission, gate, recorder

    def method(
        self, path: str, parse: Callable[[bytes], Any], handler: Handler, pool: ThreadPoolExecutor | None = None
    ) -> DirectMethod:
        """A method of Ranking.

        Args:
            path: "/package.Service/Method".
            pool: where it is handled, if that takes longer than a call should hold up others.
        """
        access, parse = access_of(path), parser_of(parse)
        batch = None if access.name == "Rank" else Priority.BATCH
        admission, gate, recorder = self._admission, self._gate, self._recorder

        def judge(call: Call) -> Refusal | None:
            priority = batch or _priority(call)
            client = call.peer()
            shed = admission.enter(client, priority)
            if shed is not None:
                return turned_away(recorder, access.name, shed)
            call.priority = priority
            call.left = lambda: admission.leave(client, priority)
            return None

        def handle(call: Call, payload: bytes) -> None:
            try:
                identity = identify(gate, access, call)
                gate.allow(identity, access)
                handler(parse(payload), call, call.priority, identity)
            except Exception as error:  # noqa: BLE001 - mapped, or logged with its traceback
                call.refuse(verdict(recorder, access.name, error))

        if pool is None:
            return DirectMethod(judge, handle)
        return DirectMethod(judge, lambda call, payload: _hand_over(pool, handle, call, payload))


def _hand_over(pool: ThreadPoolExecutor, handle: Callable[[Call, bytes], None], call: Call, payload: bytes) -> None:
    pool.submit(handle, call, payload)


def _priority(call: Call) -> Priority:
    """INTERACTIVE, unless the caller says otherwise."""
    for key, value in call.invocation_metadata():
        if key == PRIORITY_HEADER and value == "batch":
            return Priority.BATCH
    return Priority.INTERACTIVE
