"""Which role each method of the API asks for. A method that is not listed here is refused to everybody."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """A right. None includes another: an identity lists all it has."""

    READER = "reader"
    PRODUCER = "producer"
    ADMIN = "admin"


ALL_ROLES = frozenset(Role)


@dataclass(frozen=True)
class Access:
    """What a call of a method takes.

    roles: any one of them is enough. public: open without credentials. audited: written to the audit log.
    """

    method: str
    roles: frozenset[Role]
    public: bool = False
    audited: bool = False

    @property
    def name(self) -> str:
        """The bare name of the method, as in metrics."""
        return self.method.rpartition("/")[2]


def _table() -> dict[str, Access]:
    reader, producer, admin = frozenset({Role.READER}), frozenset({Role.PRODUCER}), frozenset({Role.ADMIN})
    return {
        access.method: access
        for access in (
            Access("/liverank.v1.Ranking/Rank", reader),
            Access("/liverank.v1.Ranking/RankBatch", reader),
            Access("/liverank.v1.Ranking/Explain", reader),
            Access("/liverank.v1.Liveness/CheckLive", reader),
            Access("/liverank.v1.Liveness/WatchEnded", reader),
            # The media server's own truth about what it publishes.
            Access("/liverank.v1.Liveness/Reconcile", producer, audited=True),
            Access("/liverank.v1.Ingest/Publish", producer),
            Access("/liverank.v1.Admin/Status", admin, audited=True),
            Access("/liverank.v1.Admin/BlockStream", admin, audited=True),
            Access("/liverank.v1.Admin/UnblockStream", admin, audited=True),
            Access("/liverank.v1.Admin/ReloadRules", admin, audited=True),
            Access("/liverank.v1.Admin/PushModel", admin, audited=True),
            Access("/liverank.v1.Admin/ShadowModel", admin, audited=True),
            Access("/liverank.v1.Admin/CanaryModel", admin, audited=True),
            Access("/liverank.v1.Admin/PromoteModel", admin, audited=True),
            Access("/liverank.v1.Admin/RollbackModel", admin, audited=True),
            Access("/liverank.v1.Admin/ListModels", admin, audited=True),
            Access("/liverank.v1.Admin/DiffModels", admin, audited=True),
            # Load balancers and orchestrators probe without credentials; the answer is one bit.
            Access("/grpc.health.v1.Health/Check", ALL_ROLES, public=True),
            Access("/grpc.health.v1.Health/List", ALL_ROLES, public=True),
            Access("/grpc.health.v1.Health/Watch", ALL_ROLES, public=True),
            # Tells nothing that is not in proto/, but an open call of it holds a thread.
            Access("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", ALL_ROLES),
        )
    }


ACCESS = _table()


def access_of(method: str) -> Access:
    """What ``method`` ("/package.Service/Method") takes; nobody has the roles of one that is not listed."""
    return ACCESS.get(method) or Access(method, frozenset())
