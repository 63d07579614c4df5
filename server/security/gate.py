"""The gate: every call passes it. Who calls, may they, how often; and which open calls must end now."""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from server.clock import Clock
from server.config import SecuritySettings
from server.errors import ConfigError, Forbidden, LiverankError, Overloaded, RateLimited, Unauthenticated
from server.security.access import ANYBODY, AccessList, Identity
from server.security.audit import AuditLog
from server.security.rates import Rates
from server.security.roles import Access
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

_REASONS: dict[type[LiverankError], str] = {
    Unauthenticated: "unauthenticated",
    Forbidden: "forbidden",
    RateLimited: "rate",
    Overloaded: "open_streams",
}


class Grant:
    """An open streaming call. ``refused`` is set once its credentials are no longer good."""

    def __init__(self, identity: Identity, check: Callable[[], object], end: Callable[[], object]) -> None:
        self.identity = identity
        self._check, self._end = check, end
        self.refused: LiverankError | None = None

    def look(self) -> None:
        """Checks the credentials again; a call refused at an earlier look, which nothing ended since, is cut off."""
        if self.refused is not None:
            self._end()
            return
        try:
            self._check()
        except LiverankError as error:
            self.refused = error


class Gate:
    """Thread-safe. ``start`` watches the access file; until then it is as it was when this was built.

    Raises:
        ConfigError: the access file or the audit file cannot be used.
    """

    def __init__(self, settings: SecuritySettings, clock: Clock, metrics: Metrics) -> None:
        self._settings, self._clock, self._metrics = settings, clock, metrics
        self._content = b""
        self._access: AccessList | None = None
        if settings.access_file is not None:
            self._content, self._access = read_access(settings.access_file)
        self._unreadable = False
        self._rates = Rates(settings.burst_s)
        self.audit: AuditLog | None = None
        if settings.audit_file is not None:
            self.audit = AuditLog(settings.audit_file, settings.audit_max_bytes, metrics.audit_lost.inc)
        self._grants: set[Grant] = set()
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="access-watch", daemon=True)

    # --- calls --------------------------------------------------------------------------------

    def identify(
        self,
        access: Access,
        authorization: str | None,
        names: Callable[[], Iterable[str]],
        peer: Callable[[], str],
    ) -> Identity:
        """Who calls.

        Args:
            authorization: the call's metadata of that name; if it is there, it alone counts.
            names, peer: asked only when needed; those of the verified client certificate, and the address of the
                other side as gRPC writes it.

        Raises:
            Unauthenticated, RateLimited.
        """
        if self._access is None:
            limited = self._settings.requests_per_second or self._settings.max_open_streams_per_client
            return replace(ANYBODY, name=f"peer:{host_of(peer())}") if limited or access.audited else ANYBODY
        try:
            token = None if authorization is None else bearer(authorization)
            return self._access.identify(token, names() if token is None else (), self._clock.now_ms())
        except Unauthenticated as error:
            counted = self._counted(error)
        # Whoever tries tokens is slowed down by address.
        self._take(f"peer:{host_of(peer())}", self._settings.requests_per_second)
        raise counted

    def allow(self, identity: Identity, access: Access) -> None:
        """Whether this caller may call the method, and now. Raises Forbidden, RateLimited."""
        self.check_role(identity, access)
        self.charge(identity)

    def check_role(self, identity: Identity, access: Access) -> None:
        """Raises Forbidden, naming the role that is missing."""
        if identity.roles & access.roles:
            return
        wanted = " or ".join(sorted(access.roles)) or "one that nobody can have"
        has = " and ".join(sorted(identity.roles))
        raise self._counted(Forbidden(f"{access.name}: {identity.name} has the role {has}; {wanted} is wanted"))

    def charge(self, identity: Identity) -> None:
        """Counts a request of an identity. Raises RateLimited."""
        self._take(identity.name, self._rate(identity))

    def charge_more(self, identity: Identity, requests: int) -> None:
        """Counts ``requests`` more for a call that has been let through: the next ones wait for them."""
        self._rates.overdraw(identity.name, self._rate(identity), requests)

    def open(self, grant: Grant) -> None:
        """Notes an open streaming call. Raises Overloaded when the client has too many."""
        most = self._settings.max_open_streams_per_client
        name = grant.identity.name
        with self._lock:
            if not most or self._open[name] < most:
                self._open[name] += 1
                self._grants.add(grant)
                return
        raise self._counted(Overloaded(f"{name}: {most} streaming calls are open already"))

    def close(self, grant: Grant) -> None:
        """The streaming call is over."""
        with self._lock:
            self._grants.discard(grant)
            self._open[grant.identity.name] -= 1
            if not self._open[grant.identity.name]:
                del self._open[grant.identity.name]

    def _rate(self, identity: Identity) -> float:
        own = identity.requests_per_second
        return self._settings.requests_per_second if own is None else own

    def _take(self, client: str, rate: float) -> None:
        try:
            self._rates.take(client, rate)
        except RateLimited as error:
            raise self._counted(error) from None

    def _counted(self, error: LiverankError) -> LiverankError:
        self._metrics.auth_refused.labels(_REASONS[type(error)]).inc()
        return error

    # --- the file -----------------------------------------------------------------------------

    def start(self) -> None:
        """Looks at the access file and at open calls every ``reload_ms`` from now on."""
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.audit is not None:
            self.audit.close()

    def look(self) -> None:
        """Takes over a changed access file, then ends calls whose credentials are no longer good.

        A call that is busy ends with its status at the next message; one that is still open at the next look
        is cancelled.
        """
        if self._access is not None:
            self._reload()
        with self._lock:
            grants = list(self._grants)
        for grant in grants:
            grant.look()

    def _watch(self) -> None:
        while not self._stopping.wait(self._settings.reload_ms / 1000):
            self.look()

    def _reload(self) -> None:
        """A file that cannot be used changes nothing, and is told once; it must not lock everybody out."""
        path = self._settings.access_file
        assert path is not None
        try:
            content = _read(path)
        except ConfigError as error:
            if not self._unreadable:
                self._unreadable = True
                self._reload_failed(error)
            return
        self._unreadable = False
        if content == self._content:
            return
        self._content = content
        try:
            self._access = _parse(path, content)
        except ConfigError as error:
            self._reload_failed(error)
            return
        logger.info("access file read again: %d entries", len(self._access))
        self.reloaded("access", "ok", f"{len(self._access)} entries")

    def _reload_failed(self, error: ConfigError) -> None:
        logger.error("the access list stays as it was: %s", error)
        self.reloaded("access", "failed", str(error))

    def reloaded(self, file: str, outcome: str, detail: str) -> None:
        """Counts and audits that a file was read again while serving: "access" or "certificates"."""
        self._metrics.security_reloads.labels(file, outcome).inc()
        if self.audit is not None:
            self.audit.write("server", f"reload:{file}", outcome, {"detail": detail} if detail else {})


def read_access(path: Path) -> tuple[bytes, AccessList]:
    """The access file's bytes, and what they say. Raises ConfigError."""
    content = _read(path)
    return content, _parse(path, content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"security.access_file: {path} cannot be read: {error.strerror}") from error


def _parse(path: Path, content: bytes) -> AccessList:
    return AccessList.parse(content, f"security.access_file: {path}")


def host_of(peer: str) -> str:
    """The address in gRPC's "ipv4:1.2.3.4:567"; of IPv6 the /64, which one client has to itself."""
    family, _, rest = peer.partition(":")
    if family == "ipv4":
        return rest.rpartition(":")[0]
    if family == "ipv6":
        text = rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")[0].strip("[]").partition("%")[0]
        try:
            address = ipaddress.IPv6Address(text)
        except ValueError:
            return rest
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return peer


def bearer(authorization: str) -> str:
    """The token of an authorization header. Raises Unauthenticated."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("authorization: 'Bearer TOKEN' wanted")
    return token
