"""Scores through a Triton Inference Server over gRPC."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from server.errors import BadScores, ScorerTimeout, ScorerUnavailable, ScoringError
from server.scoring.base import Scores
from server.scoring.model_config import INPUT, OUTPUT, check_config
from server.scoring.shapes import checked_features, checked_scores
from server.scoring.transport import PlainTensors, Transport
from server.scoring.versions import TritonVersions

log = logging.getLogger(__name__)

HEAL_AFTER_FAILURES = 3
HEAL_TIMEOUT_S = 30.0
RECONNECT_AFTER_TIMEOUTS = 3
DIAGNOSE_TIMEOUT_S = 10.0
"""Triton takes about a second per request to find that a model's process is gone, longer than a deadline should
be; requests that were given up are still in front."""

# What Triton, or gRPC on the way to it, means by each status. A status that is not here is a surprise and
# counts as unavailable; a test holds this table against grpc.StatusCode.
STATUS_TO_ERROR: dict[str, type[ScoringError]] = {
    "CANCELLED": ScorerUnavailable,  # our channel was closed under the call
    "UNKNOWN": ScorerUnavailable,
    "INVALID_ARGUMENT": BadScores,  # the model does not take our tensors
    "DEADLINE_EXCEEDED": ScorerTimeout,
    "NOT_FOUND": ScorerUnavailable,  # the model is not in the repository
    "ALREADY_EXISTS": ScorerUnavailable,
    "PERMISSION_DENIED": ScorerUnavailable,
    "UNAUTHENTICATED": ScorerUnavailable,
    "RESOURCE_EXHAUSTED": ScorerUnavailable,  # message or memory limits
    "FAILED_PRECONDITION": ScorerUnavailable,
    "ABORTED": ScorerUnavailable,
    "OUT_OF_RANGE": BadScores,
    "UNIMPLEMENTED": ScorerUnavailable,  # not a Triton server
    "INTERNAL": ScorerUnavailable,  # its process for the model is broken
    "UNAVAILABLE": ScorerUnavailable,  # not reachable, model not loaded, or its queue is full
    "DATA_LOSS": BadScores,
}

_CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's default doubles the pause up to two minutes; a restarted Triton is wanted back within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Otherwise a new channel shares, and keeps, the old one's dead connection.
    ("grpc.use_local_subchannel_pool", 1),
]


class TritonScorer:
    """A model on a Triton server. Called from one thread; connects on the first call.

    Checks the model's declared feature schema and tensors on connecting, after every failure, and whenever
    an answer comes from another version than the one before; nothing of an unchecked version is handed out.

    A model whose stub process was killed answers INTERNAL for ever while it says it is ready. After
    HEAL_AFTER_FAILURES such answers in a row the model is unloaded and loaded again, in a thread of its own
    because that outlasts a deadline. Should INTERNAL go on, the next try comes after twice as many. This
    needs Triton's explicit model control; without it Triton refuses, and that is logged. A deadline that is
    shorter than Triton's own patience sees timeouts instead: after RECONNECT_AFTER_TIMEOUTS in a row, the same
    thread asks once with more time, and reloads only if the answer is INTERNAL. Until it knows, nothing else is
    asked: abandoned requests would only queue up in front of its own.

    Args:
        tensors: how they travel (`open_transport`); plain if not given. Closed with the scorer.
        version: the only one that answers; 0: Triton's newest, until `pin` names another.
        versions: which versions a reload has to bring back; None: those that Triton chooses.
        heals: False for a version on trial: reloading it would unload the one that serves, too.

    Attributes:
        heals: reloads that went through. heal_failures: reloads that did not.
    """

    name = "triton"

    def __init__(
        self,
        address: str,
        model_name: str,
        feature_schema: str,
        n_features: int,
        tensors: Transport | None = None,
        version: int = 0,
        versions: TritonVersions | None = None,
        heals: bool = True,
    ) -> None:
        self._address = address
        self._tensors = PlainTensors() if tensors is None else tensors
        self._model = model_name
        self._feature_schema = feature_schema
        self._n_features = n_features
        self._client: InferenceServerClient | None = None
        self._model_accepted = False
        self._checked_version: str | None = None
        self._internal_in_a_row = 0
        self._heal_at = HEAL_AFTER_FAILURES
        self._healer: threading.Thread | None = None
        self._timeouts_in_a_row = 0
        self._diagnosing = False
        self._closed = False
        self._version = str(version or "")
        self._versions, self._may_heal = versions, heals
        self.heals = 0
        self.heal_failures = 0

    @property
    def transport(self) -> str:
        """How tensors travel now: "plain", "system_shm" or "cuda_shm"."""
        return self._tensors.name

    def score(self, features: NDArray[np.float32], deadline_s: float) -> Scores:
        """See Scorer.score. The only copies are those of the transport itself."""
        return self._answered(checked_features(features, self._n_features), deadline_s)

    def _answered(self, rows: Any, deadline_s: float) -> Scores:
        """The scores of rows that were checked, as the transport takes them."""
        if self._closed:
            raise ScorerUnavailable("the scorer is closed")
        if self._diagnosing:
            raise ScorerTimeout(f"{self._model} at {self._address} did not answer in time; finding out why")
        ends_at = time.monotonic() + deadline_s
        try:
            scores = self._ask(rows, ends_at)
        except InferenceServerException as error:
            raise self._failed(error) from error
        except ScoringError:
            self._tensors.failed()
            self._forget_checks()
            raise
        self._internal_in_a_row = self._timeouts_in_a_row = 0
        self._heal_at = HEAL_AFTER_FAILURES
        return scores

    def pin(self, version: int) -> None:
        """From the next call on only this version answers. Any thread."""
        self._version = str(version)

    def serve(self) -> None:
        """See VersionedScorer."""
        self._may_heal = True

    def close(self) -> None:
        """See Scorer.close. Waits a moment for a reload in progress."""
        self._closed = True
        self._tensors.close(self._client)
        self._disconnect()
        if self._healer is not None:
            self._healer.join(2.0)

    def _ask(self, rows: Any, ends_at: float) -> Scores:
        if self._client is None:
            self._client = self._connect()
        if not self._model_accepted:
            self._check(self._client, self._version, ends_at)
            self._model_accepted = True
        result = self._infer(self._client, rows, ends_at)
        version = str(result.get_response().model_version)
        label = f"{self._model}/{version}"
        values = self._decode(result, len(rows), label)
        if version != self._checked_version:
            self._check(self._client, version, ends_at)
            self._checked_version = version
        return Scores(values, label)

    def _infer(self, client: InferenceServerClient, rows: Any, ends_at: float) -> InferResult:
        for may_be_lost in (True, False):
            call = self._tensors.prepare(client, rows, _left_s(ends_at))
            try:
                return client.infer(
                    self._model, call.inputs, model_version=self._version, outputs=call.outputs,
                    client_timeout=_left_s(ends_at),
                )  # fmt: skip
            except InferenceServerException as error:
                if not (may_be_lost and self._tensors.is_lost(error)):
                    raise
                self._tensors.failed()
                self._forget_checks()  # a restarted Triton may have another model
                self._check(client, self._version, ends_at)
                self._model_accepted = True
        raise AssertionError("not reached: the second turn returns or raises")

    def _check(self, client: InferenceServerClient, version: str, ends_at: float) -> None:
        config, label = self._config_of(client, version, ends_at)
        check_config(config, label, self._feature_schema, self._n_features)

    def _config_of(self, client: InferenceServerClient, version: str, ends_at: float) -> tuple[ModelConfig, str]:
        """What Triton says about the model, and how errors name it."""
        reply = client.get_model_config(self._model, version, client_timeout=_left_s(ends_at))
        return reply.config, f"{self._model}/{version or 'newest'} at {self._address}"

    def _decode(self, result: InferResult, n_rows: int, label: str) -> NDArray[np.float32]:
        """float32[n_rows]."""
        declared = result.get_output(OUTPUT)
        if declared is None or declared.datatype != "FP32":
            found = "nothing" if declared is None else declared.datatype
            raise BadScores(f"{label} answered {found} as {OUTPUT}, wanted is FP32")
        return checked_scores(self._tensors.read(result, n_rows, label), n_rows, label)

    def _failed(self, error: InferenceServerException) -> ScoringError:
        """Translates, and counts what needs more than waiting."""
        self._tensors.failed()
        self._forget_checks()
        status = (error.status() or "UNKNOWN").removeprefix("StatusCode.")
        if status == "INTERNAL" and "shared memory size specified" in error.message():
            status = "OUT_OF_RANGE"  # the model answers more than one score per row
        kind = STATUS_TO_ERROR.get(status, ScorerUnavailable)
        if kind is ScorerTimeout:
            self._timeouts_in_a_row += 1
            if self._timeouts_in_a_row % RECONNECT_AFTER_TIMEOUTS == 0:
                self._disconnect()  # a peer that vanished without a word looks exactly like a slow one
                self._heal_in_background(self._heal_if_broken)
        else:
            self._timeouts_in_a_row = 0
        if status == "INTERNAL":
            self._internal_in_a_row += 1
            if self._internal_in_a_row >= self._heal_at and not self._is_healing():
                self._heal_at = 2 * self._internal_in_a_row
                self._heal_in_background(self._heal)
        return kind(f"{self._model} at {self._address}: {status}: {error.message()}")

    def _is_healing(self) -> bool:
        return self._healer is not None and self._healer.is_alive()

    def _heal_in_background(self, heal: Callable[[], None]) -> None:
        if self._may_heal and not self._is_healing():
            self._healer = threading.Thread(target=heal, name="triton-heal", daemon=True)
            self._healer.start()

    def _heal_if_broken(self) -> None:
        """Asks about one row with patience; a model that is only slow, or a Triton that hangs, is left alone."""
        self._diagnosing = True
        client = self._connect()
        tensors = self._probe()
        try:
            client.infer(self._model, tensors, model_version=self._version, client_timeout=DIAGNOSE_TIMEOUT_S)
        except InferenceServerException as error:
            broken = (error.status() or "").removeprefix("StatusCode.") == "INTERNAL"
        else:
            broken = False
        finally:
            self._diagnosing = False
            client.close()
        if broken:
            self._heal()

    def _probe(self) -> list[InferInput]:
        """One row for the model, which row does not matter."""
        row = np.zeros((1, self._n_features), np.float32)
        return [InferInput(INPUT, row.shape, "FP32").set_data_from_numpy(row)]

    def _heal(self) -> None:
        """Unloads and loads the model, on a connection of its own. Runs in the thread ``triton-heal``."""
        log.warning("%s at %s keeps failing inside; reloading it", self._model, self._address)
        client = self._connect()
        try:
            client.unload_model(self._model, client_timeout=HEAL_TIMEOUT_S)
            wanted = None if self._versions is None else self._versions.override()
            client.load_model(self._model, config=wanted, client_timeout=HEAL_TIMEOUT_S)
        except (InferenceServerException, ScoringError) as error:
            self.heal_failures += 1
            log.error("%s at %s could not be reloaded: %s", self._model, self._address, error)
        else:
            self.heals += 1
            log.warning("%s at %s was reloaded", self._model, self._address)
        finally:
            client.close()

    def _connect(self) -> InferenceServerClient:
        return InferenceServerClient(self._address, channel_args=_CHANNEL_ARGUMENTS)

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        self._forget_checks()
        if client is not None:
            client.close()

    def _forget_checks(self) -> None:
        self._model_accepted = False
        self._checked_version = None


def _left_s(ends_at: float) -> float:
    left_s = ends_at - time.monotonic()
    if left_s <= 0:
        raise ScorerTimeout("no time left before the deadline")
    return left_s
