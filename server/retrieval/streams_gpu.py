"""What is derived about each row, worked out on the device; the host keeps a copy of what it decides by."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.rules_gpu import UNASSESSED
from server.live.features import Features, FeatureSet
from server.live.queue import DeviceQueue
from server.live.table import LiveTable
from server.retrieval.streams import StreamState
from server.rules.rulebook import RuleBook


class DeviceStreamState(StreamState):
    """`StreamState` whose features, rule bits and boosts are computed by the GPU's kernels.

    Bits and boosts come back with every assessment (8 bytes per row, on the tick, never on the request path), so that
    liveness answers, views and the last check on the host read the same values as the device. Owned by the engine
    thread; the table's accumulators must be ``queue``.
    """

    def __init__(self, table: LiveTable, features: FeatureSet, book: RuleBook, queue: DeviceQueue) -> None:
        super().__init__(table, features, book)
        self._queue, self._device = queue, queue.device
        self._program = self._device.load_features(features.program())
        self._rules = self._device.load_rules(book.program(features.names), len(features))

    def set_book(self, book: RuleBook) -> None:
        """See `StreamState`."""
        super().set_book(book)
        self._rules = self._device.load_rules(book.program(self._features.names), len(self._features))
        self._device.columns["rule_bits"][:] = UNASSESSED
        self._device.columns["boost"][:] = 0.0

    def forget_changed_sessions(self, slots: NDArray[np.int32]) -> NDArray[np.int32]:
        """See `StreamState`."""
        changed = super().forget_changed_sessions(slots)
        self._queue.forget(changed)
        return changed

    def apply_moderation(self, slots: NDArray[np.int32], now_ms: int) -> None:
        """See `StreamState`."""
        super().apply_moderation(slots, now_ms)
        if len(slots):
            self._queue.flush()
            self._device.refresh_built_in(self._device.send_slots(slots), now_ms)

    def assess(self, slots: NDArray[np.int32], now_ms: int) -> Features:
        """See `StreamState`. Waits for the device."""
        n = len(slots)
        if n == 0:
            width = len(self._features)
            return Features(np.zeros((0, width), np.float32), np.zeros((0, width), np.uint8))
        self._queue.flush()
        self._device.set_reported(self._rules, self._features.reported(self._table.counters_seen))
        at = self._device.send_slots(slots)
        values, states = self._device.features(self._program, at, n, now_ms, self._table.landmark_ms)
        self._device.assess(values, at, self._rules, now_ms)
        t = self._device.tensors
        rows = at.to(torch.int64)
        self.rule_bits[slots] = self._device.to_host(t["rule_bits"][rows]).view(np.uint32)
        self.boost[slots] = self._device.to_host(t["boost"][rows])
        return Features(self._device.to_host(values), self._device.to_host(states))

    def forget_trend(self) -> None:
        """See `StreamState`."""
        super().forget_trend()
        self._queue.flush()
        self._device.tensors["trend"].fill_(float("nan"))

    def set_trend(self, slots: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
        """See `StreamState`."""
        super().set_trend(slots, scores)
        if len(slots):
            self._queue.flush()  # a session that was forgotten must not lose its new score afterwards
            at = self._device.send_slots(slots).to(torch.int64)
            device = self._device.tensors["trend"].device
            self._device.tensors["trend"].index_copy_(0, at, torch.from_numpy(scores).to(device))
