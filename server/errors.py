"""Every error liverank raises on purpose.

LiverankError
├── ConfigError            settings, rules or feature file: names the key and what is allowed
├── InvalidRequest         a caller's field is outside its limits      → INVALID_ARGUMENT
├── Unauthenticated        no credentials, or none that are valid     → UNAUTHENTICATED
├── Forbidden              valid credentials without this right       → PERMISSION_DENIED
├── NotFound               a stream nobody has heard of                → NOT_FOUND
├── Refused                well-formed, but unsafe to carry out now    → FAILED_PRECONDITION
│   ├── OffsetNotReached   min_offset was not applied in time          → FAILED_PRECONDITION
│   └── ModelRefused       a version of a model is not fit to serve    → FAILED_PRECONDITION
├── Overloaded             a bounded queue or pool is full             → RESOURCE_EXHAUSTED
│   └── RateLimited        a client asks more often than it may        → RESOURCE_EXHAUSTED
├── ResumeGone             a resume point is no longer remembered      → OUT_OF_RANGE
├── ReaderTooSlow          a subscriber fell behind its bounded buffer → ABORTED
├── Draining               starting, draining or stopped               → UNAVAILABLE
├── LogError               the durable log cannot be read or written   → UNAVAILABLE
│   └── LogFull            no space left to write to it                → RESOURCE_EXHAUSTED
├── StoreError             viewers' embeddings cannot be read (never reaches a caller: ranked without, and said so)
│   └── StoreTimeout       … within its time
├── SnapshotError          a snapshot cannot be written or used (never reaches a caller: an older one is used)
└── ScoringError           the model gave no usable scores (never reaches a caller: the ladder degrades)
    ├── ScorerUnavailable  not reachable, or its process is broken
    ├── SharedMemoryRefused  tensors cannot go through shared memory, and may go no other way
    ├── ScorerTimeout      no answer within the deadline
    ├── BadScores          wrong shape or dtype, or too few finite values
    └── SchemaMismatch     the model was built for another feature schema
"""

from __future__ import annotations


class LiverankError(Exception):
    """Base of every deliberate error."""


class ConfigError(LiverankError):
    """A settings, rules or feature file is wrong; the message names the key and what is allowed."""


class InvalidRequest(LiverankError):
    """A field of a request is outside its limits.

    Args:
        field: path of the field, such as ``requests[3].viewer_embedding``.
        problem: what was found and what is allowed.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Unauthenticated(LiverankError):
    """No credentials came with the call, or none that are valid now."""


class Forbidden(LiverankError):
    """The caller is known, but may not do this."""


class NotFound(LiverankError):
    """The stream is unknown or forgotten."""


class Refused(LiverankError):
    """The request is well-formed, but carrying it out would be unsafe."""


class OffsetNotReached(Refused):
    """The table did not reach the requested log offset before the deadline."""


class ModelRefused(Refused):
    """A version of a model is not fit to serve; the running one goes on."""


class Overloaded(LiverankError):
    """A bounded queue or pool is full; retry after ``retry_ms``."""

    def __init__(self, problem: str, retry_ms: int = 50) -> None:
        super().__init__(problem)
        self.retry_ms = retry_ms


class RateLimited(Overloaded):
    """A client asks more often than it may; its next call will be let through after ``retry_ms``."""


class ResumeGone(LiverankError):
    """The resume point is older than what is remembered."""


class ReaderTooSlow(LiverankError):
    """The subscriber fell behind its bounded buffer and must resync."""


class Draining(LiverankError):
    """The server is starting, draining or stopped."""


class LogError(LiverankError):
    """The durable log cannot be read or written."""


class LogFull(LogError):
    """There is no space left to write to the log; nothing was written."""


class StoreError(LiverankError):
    """The store of viewers' embeddings did not answer, or with an error."""


class StoreTimeout(StoreError):
    """The store did not answer in time."""


class SnapshotError(LiverankError):
    """A snapshot cannot be written, or is not what was written."""


class ScoringError(LiverankError):
    """The model gave no usable scores."""


class ScorerUnavailable(ScoringError):
    """The model server is not reachable, or its process is broken."""


class SharedMemoryRefused(ScoringError):
    """No shared memory for tensors: no room, no such memory, or Triton cannot map it."""


class ScorerTimeout(ScoringError):
    """No answer within the deadline."""


class BadScores(ScoringError):
    """The model's answer has the wrong shape or dtype, or too few finite values."""


class SchemaMismatch(ScoringError):
    """The model was built for another feature schema."""
