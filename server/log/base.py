"""What makes an acknowledgement durable: an append-only log of accepted batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Record:
    """One batch as it was accepted.

    offset: from 1, rising. applied_ms: the stamp as of which the table applies it; never decreases along the log.
    payload: the serialised EventBatch, byte for byte as received.
    """

    offset: int
    applied_ms: int
    payload: bytes


class EventLog(Protocol):
    """Used by one writer thread; `read` before writing begins. Offsets have no gaps."""

    @property
    def first_offset(self) -> int:
        """Offset of the oldest record there is; of the next one in an empty log."""
        ...

    @property
    def last(self) -> Record | None:
        """The newest record (its payload may be empty), or None in an empty log."""
        ...

    def append(self, records: Sequence[Record]) -> None:
        """Writes all or none; durable when it returns.

        Raises:
            LogFull: no space left. LogError: any other reason. Nothing of it was written.
        """
        ...

    def read(self, after_offset: int) -> Iterator[Record]:
        """Records with a larger offset, in order. Raises LogError on a gap or damage."""
        ...

    def continue_after(self, offset: int, stamp_ms: int) -> None:
        """The next record appended will be ``offset`` + 1, although the log ends before: a snapshot covers the rest."""
        ...

    def close(self) -> None:
        """Releases the files; idempotent."""
        ...
