"""The access file: tokens and certificate names with their roles.

[token.feed]                                  # the name in the token
hashes = ["sha256:…:…"]                       # one or more, so that an old and a new one can overlap
roles = ["reader"]
expires = 2027-01-01T00:00:00Z                # optional; not accepted from then on
requests_per_second = 500                     # optional; instead of security.requests_per_second

[certificate."media-1.example.com"]           # a subject alternative name, or the common name without any
roles = ["producer"]
producer_ids = ["media-1", "media-1-backup"]  # optional; default: its own name. ["*"]: any
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.errors import ConfigError, Unauthenticated
from server.security import tokens
from server.security.roles import ALL_ROLES, Role

ANY_PRODUCER = "*"
MAX_NAME_BYTES = 64
CACHE_ENTRIES = 4096


@dataclass(frozen=True)
class Identity:
    """Who calls. name: "token:feed", "certificate:media-1.example.com" or "peer:10.0.0.7".

    producer_ids: what it may write into EventBatch.producer_id; None: anything. expires_ms: Unix, 0 never.
    requests_per_second: its own rate, None: that of the settings.
    """

    name: str
    roles: frozenset[Role]
    producer_ids: frozenset[str] | None = None
    expires_ms: int = 0
    requests_per_second: float | None = None

    def may_produce_as(self, producer_id: str) -> bool:
        """Whether it may publish under this producer_id."""
        return self.producer_ids is None or producer_id in self.producer_ids


ANYBODY = Identity("anybody", ALL_ROLES)
"""Whoever calls a server without an access file."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    roles: tuple[Role, ...] = Field(min_length=1)
    producer_ids: tuple[str, ...] | None = Field(None, min_length=1)
    expires: AwareDatetime | None = None
    requests_per_second: float | None = Field(None, ge=0.0, le=1e9)

    @field_validator("producer_ids")
    @classmethod
    def _fit(cls, ids: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for i, producer_id in enumerate(ids or ()):
            if not 1 <= len(producer_id.encode()) <= MAX_NAME_BYTES:
                raise ValueError(f"[{i}]: 1 to {MAX_NAME_BYTES} bytes wanted")
        return ids

    def identity(self, kind: str, name: str) -> Identity:
        ids = frozenset(self.producer_ids or (name,))
        expires: datetime | None = self.expires
        return Identity(
            name=f"{kind}:{name}",
            roles=frozenset(self.roles),
            producer_ids=None if ANY_PRODUCER in ids else ids,
            expires_ms=int(expires.timestamp() * 1000) if expires else 0,
            requests_per_second=self.requests_per_second,
        )


class _Token(_Entry):
    hashes: tuple[str, ...] = Field(min_length=1, max_length=16)

    @field_validator("hashes")
    @classmethod
    def _are_hashes(cls, hashes: tuple[str, ...]) -> tuple[str, ...]:
        for i, hashed in enumerate(hashes):
            if not tokens.is_hash(hashed):
                raise ValueError(f"[{i}]: sha256:SALT:DIGEST wanted, as `liverank token hash` prints it")
        return hashes


_Model = TypeVar("_Model", bound=_Entry)


class AccessList:
    """A checked access file. Any thread may ask it; it never changes, a new file is a new list.

    Tokens that were accepted are remembered (at most ``CACHE_ENTRIES``), so that a call costs a look-up and no hash.
    """

    def __init__(self, by_token: Mapping[str, tuple[Identity, tuple[str, ...]]], by_name: Mapping[str, Identity]):
        self._by_token, self._by_name = by_token, by_name
        self._accepted: dict[str, Identity] = {}

    def __len__(self) -> int:
        return len(self._by_token) + len(self._by_name)

    @classmethod
    def parse(cls, content: bytes, where: str) -> AccessList:
        """Checks a file's bytes.

        Raises:
            ConfigError: names the entry, the key and what is allowed; never repeats a value.
        """
        try:
            values = tomllib.loads(content.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            problem = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ConfigError(f"{where}: {problem}") from None
        if extra := set(values) - {"token", "certificate"}:
            raise ConfigError(f"{where}: unknown {sorted(extra)}; only [token.NAME] and [certificate.NAME] are allowed")
        by_token, by_name = {}, {}
        for name, table in _tables(values, "token", where):
            if not tokens.NAME.fullmatch(name):
                raise ConfigError(f"{where}: token.{name[:40]}: 1 to 32 letters, digits, - and _ wanted")
            entry = _check(_Token, table, f"{where}: token.{name}")
            by_token[name] = (entry.identity("token", name), entry.hashes)
        for name, table in _tables(values, "certificate", where):
            if not 1 <= len(name.encode()) <= 253:
                raise ConfigError(f"{where}: certificate.{name[:40]}: a name of 1 to 253 bytes wanted")
            by_name[name] = _check(_Entry, table, f"{where}: certificate.{name}").identity("certificate", name)
        if not by_token and not by_name:  # also half of a file that is being written
            raise ConfigError(f"{where}: at least one [token.NAME] or [certificate.NAME] wanted")
        return cls(by_token, by_name)

    def identify(self, token: str | None, names: Iterable[str], now_ms: int) -> Identity:
        """Who comes with this token, or, without one, with a certificate of these names.

        Raises:
            Unauthenticated: says what is missing or wrong, and nothing about what would have been right.
        """
        identity = self._of_token(token) if token is not None else self._of_names(names)
        if identity.expires_ms and now_ms >= identity.expires_ms:
            raise Unauthenticated(f"the credentials of {identity.name} have expired")
        return identity

    def _of_token(self, token: str) -> Identity:
        known = self._accepted.get(token)
        if known is not None:
            return known
        identity, hashes = self._by_token.get(tokens.name_of(token), (None, ()))
        # Every hash is tried, whichever fits, and an unknown name costs about as much as a known one.
        fits = [tokens.matches(token, hashed) for hashed in hashes or (_NOBODY,)]
        if identity is None or not any(fits):
            raise Unauthenticated("authorization: this token is not, or no longer, accepted")
        if len(self._accepted) >= CACHE_ENTRIES:
            self._accepted.clear()
        self._accepted[token] = identity
        return identity

    def _of_names(self, names: Iterable[str]) -> Identity:
        came = False
        for name in names:
            came = True
            if (identity := self._by_name.get(name)) is not None:
                return identity
        if came:
            raise Unauthenticated("the client certificate's name is not in the access file")
        raise Unauthenticated("authorization: 'Bearer TOKEN' wanted in the metadata, got none")


_NOBODY = "sha256:" + "00" * tokens.SALT_BYTES + ":" + "00" * 32


def _tables(values: dict[str, Any], kind: str, where: str) -> Iterable[tuple[str, dict[str, Any]]]:
    tables = values.get(kind, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"{where}: {kind}: [{kind}.NAME] tables wanted")
    return tables.items()


def _check(model: type[_Model], table: dict[str, Any], where: str) -> _Model:
    try:
        return model(**table)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_input=False))
        raise ConfigError(f"{where}: {faults}") from None
