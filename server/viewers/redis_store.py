"""Values in Redis. Imported only where ``viewers.embeddings.url`` is set."""

from __future__ import annotations

from collections.abc import Sequence

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from server.config import EmbeddingSettings
from server.errors import ConfigError, StoreError, StoreTimeout


class RedisStore:
    """One connection, made when first needed and again when it broke. A `server.viewers.embeddings.Store`.

    A command on a connection that broke meanwhile is tried once more on a new one; one that timed out is not.

    Raises:
        ConfigError: the URL cannot be understood. It is not repeated: it may hold a password.
    """

    def __init__(self, settings: EmbeddingSettings) -> None:
        self._timeout_ms = settings.timeout_ms
        try:
            self._client = redis.Redis.from_url(
                settings.url.get_secret_value(),
                socket_timeout=settings.timeout_ms / 1000,
                socket_connect_timeout=settings.timeout_ms / 1000,
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
                decode_responses=False,
            )
        except ValueError as error:
            raise ConfigError("viewers.embeddings.url: redis://[user:password@]host:port/number wanted") from error
        options = self._client.connection_pool.connection_kwargs
        self._where = options.get("path") or f"{options.get('host')}:{options.get('port')}"

    def get(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """See Store."""
        try:
            values: Sequence[bytes | None] = self._client.mget(list(keys))
        except redis.TimeoutError as error:
            raise StoreTimeout(f"Redis at {self._where} did not answer within {self._timeout_ms} ms") from error
        except redis.RedisError as error:
            raise StoreError(f"Redis at {self._where}: {type(error).__name__}: {error}") from error
        if len(values) != len(keys):
            raise StoreError(f"Redis at {self._where} answered {len(values)} values for {len(keys)} keys")
        return values

    def close(self) -> None:
        """See Store."""
        self._client.close()
