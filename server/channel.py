"""Channels to a server: plain, TLS or mutual TLS, with a token; for the command line, benches and tests.

Set by ``LIVERANK_CLIENT__*`` variables or by the options of the command. TLS is used when a CA or a client
certificate is given or ``LIVERANK_CLIENT__TLS=true``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.config import is_loopback
from server.errors import ConfigError


class ClientSettings(BaseSettings):
    """How to reach a server. Variables ``LIVERANK_CLIENT__TOKEN_FILE`` and so on fill what is not given."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="LIVERANK_CLIENT__", hide_input_in_errors=True
    )
    tls: bool = False
    ca_file: Path | None = Field(None, description="PEM; who may have signed the server's certificate; none: the OS's")
    cert_file: Path | None = Field(None, description="PEM, the client's certificate")
    key_file: Path | None = Field(None, description="PEM, its key")
    token: SecretStr | None = None
    token_file: Path | None = Field(None, description="its first line is the token")
    server_name: str | None = Field(None, description="name in the server's certificate, if not that of the address")

    @property
    def uses_tls(self) -> bool:
        return self.tls or self.ca_file is not None or self.cert_file is not None


def client_settings(**given: Any) -> ClientSettings:
    """Settings from what is given and is not None, then from the environment. Raises ConfigError."""
    try:
        return ClientSettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_input=False))
        raise ConfigError(f"LIVERANK_CLIENT: {faults}") from None


def open_channel(
    address: str, settings: ClientSettings | None = None, options: Sequence[tuple[str, Any]] = ()
) -> grpc.Channel:
    """A channel to HOST:PORT; by default as the environment says.

    Raises:
        ConfigError: a file cannot be read, or a token would travel unencrypted beyond this machine.
    """
    settings = settings or client_settings()
    token = _token(settings)
    options = list(options)
    if settings.uses_tls:
        if (settings.cert_file is None) != (settings.key_file is None):
            raise ConfigError("LIVERANK_CLIENT: cert_file and key_file: both or none wanted")
        if settings.server_name:
            options.append(("grpc.ssl_target_name_override", settings.server_name))
        credentials = grpc.ssl_channel_credentials(
            _bytes("ca_file", settings.ca_file),
            _bytes("key_file", settings.key_file),
            _bytes("cert_file", settings.cert_file),
        )
        channel = grpc.secure_channel(address, credentials, options)
    elif token and not is_loopback(address.rpartition(":")[0]):
        raise ConfigError(f"LIVERANK_CLIENT: a token goes to {address} over TLS only; set ca_file or tls")
    else:
        channel = grpc.insecure_channel(address, options)
    return grpc.intercept_channel(channel, _WithToken(token)) if token else channel


def _token(settings: ClientSettings) -> str:
    if settings.token is not None:
        return settings.token.get_secret_value()
    content = _bytes("token_file", settings.token_file)
    return content.decode(errors="replace").partition("\n")[0].strip() if content else ""


def _bytes(name: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"LIVERANK_CLIENT: {name}: {path} cannot be read: {error.strerror}") from error


class _Details(NamedTuple):
    """gRPC's own type, which has no name to import: an interceptor must make a new one to add metadata."""

    method: str
    timeout: float | None
    metadata: list[tuple[str, str]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _WithToken(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to each call; gRPC's own call credentials refuse channels without TLS, loopback included."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def _call(self, proceed: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._header]
        taken = (details.credentials, details.wait_for_ready, details.compression)
        return proceed(_Details(details.method, details.timeout, metadata, *taken), request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._call(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._call(continuation, client_call_details, request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._call(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._call(continuation, client_call_details, request_iterator)
