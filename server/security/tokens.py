"""Bearer tokens and what is kept of them.

A token is ``NAME.SECRET``; the secret is 32 random bytes. The access file holds a salted SHA-256 of the whole
token. A slow hash (scrypt) defends guessable secrets; 256 random bits cannot be guessed at any speed, while 50 ms
per check would let anybody without a token keep the server busy. The salt makes hashes of one token in two files
differ. Because somebody may hash a token of their own, one that is too short to be random is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from server.errors import ConfigError

SALT_BYTES, SECRET_BYTES, LEAST_SECRET_CHARACTERS, MOST_TOKEN_CHARACTERS = 16, 32, 32, 256
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_TOKEN = re.compile(rf"({NAME.pattern})\.([!-~]{{{LEAST_SECRET_CHARACTERS},}})")
_HASH = re.compile(rf"sha256:([0-9a-f]{{{2 * SALT_BYTES}}}):([0-9a-f]{{64}})")


def new_token(name: str) -> str:
    """A fresh token for ``name``. Raises ConfigError when the name is not one."""
    if not NAME.fullmatch(name):
        raise ConfigError("token name: 1 to 32 letters, digits, - and _ wanted, not beginning with - or _")
    return f"{name}.{secrets.token_urlsafe(SECRET_BYTES)}"


def name_of(token: str) -> str:
    """The name in front of the secret; "" when this is no token."""
    if len(token) > MOST_TOKEN_CHARACTERS:
        return ""
    found = _TOKEN.fullmatch(token)
    return found[1] if found else ""


def hash_token(token: str) -> str:
    """What the access file keeps: ``sha256:SALT:DIGEST`` in hex.

    Raises:
        ConfigError: it is no token, or its secret is too short; the message does not repeat it.
    """
    if not name_of(token):
        raise ConfigError(
            f"token: NAME.SECRET wanted, the secret of {LEAST_SECRET_CHARACTERS} or more printable characters "
            f"without spaces, {MOST_TOKEN_CHARACTERS} characters at most in all"
        )
    salt = secrets.token_bytes(SALT_BYTES)
    return f"sha256:{salt.hex()}:{_digest(salt, token).hex()}"


def is_hash(text: str) -> bool:
    """Whether ``text`` looks like what `hash_token` gives."""
    return _HASH.fullmatch(text) is not None


def matches(token: str, hashed: str) -> bool:
    """Whether ``hashed`` was made from ``token``; takes the same time wherever they differ."""
    found = _HASH.fullmatch(hashed)
    if found is None:
        return False
    return hmac.compare_digest(_digest(bytes.fromhex(found[1]), token), bytes.fromhex(found[2]))


def _digest(salt: bytes, token: str) -> bytes:
    return hashlib.sha256(salt + token.encode()).digest()
