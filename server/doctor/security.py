"""The access file, the certificates, and what anybody could do who reaches the port."""

from __future__ import annotations

from collections.abc import Iterator

from server.config import is_loopback
from server.doctor.base import Context, Finding, fail, ok, warn
from server.errors import ConfigError


def security(context: Context) -> Iterator[Finding]:
    """Whether the files of [security] can be used, and an open server is one on purpose."""
    from server.rpc.tls import Certificates
    from server.security.gate import read_access

    serve, settings = context.settings.serve, context.settings.security
    if settings.access_file is None:
        told = f"no security.access_file: whoever reaches {serve.host} may publish and administer"
        if is_loopback(serve.host):
            yield ok("security.access", told)
        else:  # the settings allow it, or they would not have been read
            yield warn("security.access", told, "Make sure that a proxy in front asks who calls; see docs/security.md.")
    else:
        try:
            _, access = read_access(settings.access_file)
            yield ok("security.access", f"{len(access)} entries in {settings.access_file}")
        except ConfigError as error:
            yield fail("security.access", str(error), "Correct the file; `liverank token new` prints entries.")
    if settings.cert_file is None:
        yield (
            ok("security.tls", "no TLS")
            if is_loopback(serve.host)
            else warn(
                "security.tls",
                f"no TLS on {serve.host}",
                "Make sure that a proxy in front encrypts; see docs/security.md.",
            )
        )
        return
    try:
        Certificates(settings)
        yield ok("security.tls", "TLS" if settings.client_ca_file is None else "TLS with client certificates")
    except ConfigError as error:
        yield fail("security.tls", str(error), "Correct the files named; docs/security.md shows how to make them.")
