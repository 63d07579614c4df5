"""The gate in front of every handler, generic and generated alike: credentials first, then the message is parsed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import grpc

from server.errors import InvalidRequest, LiverankError
from server.recorder import Recorder
from server.rpc.direct import Call
from server.rpc.status import refuse, status_of
from server.security.access import ANYBODY, Identity
from server.security.gate import Gate, Grant
from server.security.roles import Access, access_of

MAX_AUDITED_CHARACTERS = 256
_CALLER: ContextVar[Identity] = ContextVar("caller", default=ANYBODY)


def caller() -> Identity:
    """Who made the call that this thread handles."""
    return _CALLER.get()


class Gatekeeper(grpc.ServerInterceptor):
    """Wraps each handler once, when its method is first called. Public methods are left as they are."""

    def __init__(self, gate: Gate, recorder: Recorder) -> None:
        self._gate, self._recorder = gate, recorder
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        wrapped = self._wrapped.get(details.method)
        if wrapped is None:
            handler = continuation(details)
            access = access_of(details.method)
            if handler is None or access.public:
                return handler  # not kept: anybody could fill the memory with made-up names
            wrapped = self._wrapped[details.method] = self._wrap(handler, access)
        return wrapped

    def _wrap(self, handler: grpc.RpcMethodHandler, access: Access) -> grpc.RpcMethodHandler:
        parse = parser_of(handler.request_deserializer)
        if not handler.request_streaming and not handler.response_streaming:
            unary = self._unary(handler.unary_unary, parse, access)
            return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
        streaming = self._streaming(
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream, parse, access,
            handler.request_streaming,
        )  # fmt: skip
        if not handler.response_streaming:
            raise NotImplementedError(f"{access.method}: a stream that is answered once")
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(streaming, None, handler.response_serializer)

    def _unary(
        self, method: Callable[[Any, grpc.ServicerContext], Any], parse: Callable[[bytes], Any], access: Access
    ) -> Callable[[bytes, grpc.ServicerContext], Any]:
        gate, recorder = self._gate, self._recorder

        def call(payload: bytes, context: grpc.ServicerContext) -> Any:
            identity = None
            try:
                identity = identify(gate, access, context)
                gate.allow(identity, access)
                request = parse(payload)
            except LiverankError as error:
                if access.audited and identity is not None:  # without credentials nobody can fill the audit log
                    self._audit(identity, access, context, status_of(error).name, None, str(error))
                refuse(recorder, access.name, error, context)
            _CALLER.set(identity)
            if not access.audited:
                return method(request, context)
            try:
                reply = method(request, context)
            except BaseException:
                code = context.code()
                self._audit(identity, access, context, code.name if code else "UNKNOWN", request, context.details())
                raise
            self._audit(identity, access, context, "OK", request)
            return reply

        return call

    def _streaming(
        self,
        method: Callable[[Any, grpc.ServicerContext], Iterable[Any]],
        parse: Callable[[bytes], Any],
        access: Access,
        many: bool,
    ) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
        gate, recorder = self._gate, self._recorder

        def call(incoming: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            def known() -> Identity:
                identity = gate.identify(access, authorization, lambda: names, lambda: peer)
                gate.check_role(identity, access)
                return identity

            try:
                authorization, names, peer = _authorization(context), _certificate_names(context), context.peer()
                identity = known()
                gate.charge(identity)
                grant = Grant(identity, known, context.cancel)
                gate.open(grant)
            except LiverankError as error:
                refuse(recorder, access.name, error, context)
            _CALLER.set(identity)
            try:
                request = self._messages(incoming, parse, grant) if many else parse(incoming)
                for reply in method(request, context):
                    if grant.refused is not None:
                        raise grant.refused
                    yield reply
            except LiverankError as error:  # ours; the method's own have become statuses inside it
                refuse(recorder, access.name, error, context)
            finally:
                gate.close(grant)

        return call

    def _messages(self, payloads: Iterator[bytes], parse: Callable[[bytes], Any], grant: Grant) -> Iterator[Any]:
        """The caller's messages, as long as it may send any."""
        first = True
        for payload in payloads:
            if grant.refused is not None:
                raise grant.refused
            if not first:
                self._gate.charge(grant.identity)  # the first came with the call
            first = False
            yield parse(payload)

    def _audit(
        self,
        identity: Identity,
        access: Access,
        context: grpc.ServicerContext,
        outcome: str,
        request: Any,
        detail: str | bytes = "",
    ) -> None:
        if self._gate.audit is None:
            return
        fields: dict[str, Any] = {"peer": context.peer(), "request": {} if request is None else _shortened(request)}
        if detail:
            fields["detail"] = (detail.decode() if isinstance(detail, bytes) else detail)[:MAX_AUDITED_CHARACTERS]
        self._gate.audit.write(identity.name, access.method.lstrip("/"), outcome, fields)


def identify(gate: Gate, access: Access, call: grpc.ServicerContext | Call) -> Identity:
    """Who makes the call. Raises Unauthenticated, RateLimited."""
    return gate.identify(access, _authorization(call), lambda: _certificate_names(call), call.peer)


def _authorization(context: grpc.ServicerContext | Call) -> str | None:
    found: str | None = None
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            if found is not None or not isinstance(value, str):
                return ""  # two of them: which one counts must not be a matter of taste
            found = value
    return found


def _certificate_names(context: grpc.ServicerContext | Call) -> list[str]:
    """Subject alternative names of the client's verified certificate; its common name if it has none."""
    return [name.decode(errors="replace") for name in context.peer_identities() or ()]


def parser_of(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    if deserializer is None:
        return lambda payload: payload

    def parse(payload: bytes) -> Any:
        try:
            return deserializer(payload)
        except Exception as error:
            raise InvalidRequest("request", f"not a valid message: {error}") from error

    return parse


def _shortened(request: Any) -> dict[str, Any]:
    """Scalar fields of a message, texts cut; of the others how many there are."""
    told: dict[str, Any] = {}
    for field, value in request.ListFields():
        if isinstance(value, str):
            told[field.name] = value[:MAX_AUDITED_CHARACTERS]
        elif isinstance(value, bool | int | float):
            told[field.name] = value
        else:
            told[f"{field.name}_count"] = len(value) if hasattr(value, "__len__") else 1
    return told
