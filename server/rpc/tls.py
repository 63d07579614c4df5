"""The server's port: plain, TLS, or TLS with client certificates, whose files may change while it serves."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable

import grpc

from server.config import SecuritySettings
from server.errors import ConfigError
from server.security.gate import Gate

logger = logging.getLogger(__name__)


def _unheard(file: str, outcome: str, detail: str) -> None:
    """Nobody wants to know of reloads."""


class Certificates:
    """The certificate files, read again when a client connects and ``reload_ms`` have passed since they last were.

    Args:
        reloaded: told "certificates", "ok" or "failed", and why, each time they change.

    Raises:
        ConfigError: a file cannot be read, or key and certificate do not belong together.
    """

    def __init__(self, settings: SecuritySettings, reloaded: Callable[[str, str, str], None] = _unheard) -> None:
        self._settings, self._reloaded = settings, reloaded
        self._lock = threading.Lock()
        self._told = ""
        self._content = self._read()
        self._checked_s = time.monotonic()
        self._check(self._content)

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(self._content),
            self.changed,
            require_client_authentication=self._settings.client_ca_file is not None,
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificates, or None. Called by gRPC for each handshake.

        Files that cannot be used are told once and leave the old ones in place.
        """
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._checked_s < self._settings.reload_ms / 1000:
                return None
            self._checked_s = now_s
            try:
                content = self._read()
                if content == self._content:
                    return None
                self._content = content
                self._check(content)
            except ConfigError as error:
                if str(error) != self._told:
                    logger.error("the certificates stay as they were: %s", error)
                    self._reloaded("certificates", "failed", str(error))
                self._told = str(error)
                return None
            self._told = ""
        logger.info("certificates read again")
        self._reloaded("certificates", "ok", "")
        return self._configuration(content)

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        settings = self._settings
        found: list[bytes | None] = []
        for name in ("key_file", "cert_file", "client_ca_file"):
            path = getattr(settings, name)
            try:
                found.append(None if path is None else path.read_bytes())
            except OSError as error:
                raise ConfigError(f"security.{name}: {path} cannot be read: {error.strerror}") from error
        key, cert, client_ca = found
        assert key is not None and cert is not None
        return key, cert, client_ca

    def _check(self, content: tuple[bytes, bytes, bytes | None]) -> None:
        """gRPC would serve wrong files by failing every handshake; the standard library says what is wrong."""
        settings = self._settings
        assert settings.cert_file is not None and settings.key_file is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
        except (ssl.SSLError, OSError, ValueError) as error:
            why = "they do not belong together" if "MISMATCH" in str(error) else f"no usable PEM: {error}"
            raise ConfigError(f"security.cert_file, security.key_file: {why}") from error
        if settings.client_ca_file is not None:
            try:
                context.load_verify_locations(settings.client_ca_file)
            except (ssl.SSLError, OSError) as error:
                raise ConfigError(f"security.client_ca_file: no usable PEM: {error}") from error
        if self._read() != content:
            raise ConfigError("security.cert_file, security.key_file: they changed while they were read")

    def _configuration(self, content: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
        key, cert, client_ca = content
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=client_ca)


def bind(server: grpc.Server, address: str, settings: SecuritySettings, gate: Gate) -> int:
    """Binds ``address`` (HOST:PORT) and returns the port. Raises ConfigError when it or a file cannot be used."""
    credentials = Certificates(settings, gate.reloaded).credentials() if settings.cert_file is not None else None
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise ConfigError(f"serve.port: {address} cannot be bound: {error}") from error
