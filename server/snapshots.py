"""The snapshot thread: copies the table between two batches, writes the copy, then shortens the log."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError

from server.config import Settings
from server.engine import Engine
from server.errors import Draining, LogError, SnapshotError
from server.live.state import StateBuffer
from server.log.snapshot import Contents, SnapshotFolder, manifest_of
from server.log.trim import LogTrimmer
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

RETRY_S = 5.0
TRIM_PAUSE_S = 0.02


class Snapshots:
    """Takes one every ``snapshot.every_ms`` while the table changes. The engine only waits for the copy.

    Args:
        log: name of the log the offsets are of.
        trimmer: shortens the log to what the kept snapshots need; None: somebody else does.
    """

    def __init__(
        self,
        engine: Engine,
        folder: SnapshotFolder,
        settings: Settings,
        log: str,
        trimmer: LogTrimmer | None,
        metrics: Metrics,
    ) -> None:
        self._engine, self._folder, self._settings, self._log = engine, folder, settings, log
        self._trimmer, self._metrics = trimmer, metrics
        self._buffer = StateBuffer()
        self._taking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._taken_offset = 0

    def start(self, offset: int) -> None:
        """Begins; the newest snapshot is of ``offset`` (0: there is none)."""
        self._taken_offset = offset
        self._metrics.snapshot_offset.set(offset)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; a snapshot being written is finished."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        every_s = self._settings.snapshot.every_ms / 1000
        wait_s = every_s
        try:
            self._buffer.reserve(self._engine.table)
        except MemoryError:
            logger.exception("no memory for snapshots; asking again at the first")
        while not self._stop.wait(wait_s):
            wait_s = every_s
            try:
                if self._engine.applier.offset > self._taken_offset:
                    self.take()
                self._trim()
            except (Draining, CancelledError):
                return
            except (SnapshotError, LogError) as error:
                logger.error("%s; trying again", error)
                wait_s = min(every_s, RETRY_S)
            except Exception:
                # Serving does not depend on snapshots: the log stays, and with it everything.
                logger.exception("unexpected fault while taking a snapshot")
                self._metrics.snapshots.labels("failed").inc()

    def take(self) -> int:
        """Takes a snapshot now; returns its offset. Any thread but the engine's.

        Raises:
            SnapshotError: it could not be written. Draining: the engine stops.
        """
        with self._taking:
            started_s = time.monotonic()
            self._buffer.reserve(self._engine.table)
            contents = self._engine.call(self._capture).result()
            try:
                path = self._folder.write(contents)
            except SnapshotError:
                self._metrics.snapshots.labels("failed").inc()
                raise
            self._taken_offset = contents.manifest.offset
            self._folder.prune(self._settings.snapshot.keep)
            self._metrics.snapshots.labels("written").inc()
            self._metrics.snapshot_bytes.set(path.stat().st_size)
            self._metrics.snapshot_offset.set(self._taken_offset)
            self._metrics.snapshot_seconds.observe(time.monotonic() - started_s)
            return self._taken_offset

    def _capture(self) -> Contents:
        """On the engine thread: nothing but copies."""
        started_s = time.monotonic()
        engine, applier = self._engine, self._engine.applier
        state = self._buffer.capture(engine.table)
        newest, ends = engine.ends.export()
        manifest = manifest_of(
            state, offset=applier.offset, stamp_ms=applier.stamp_ms,
            record_crc=applier.crc(), table_ms=applier.table_ms, log=self._log,
            feature_schema=engine.features.schema, ends_newest=newest,
        )  # fmt: skip
        self._metrics.snapshot_pause_seconds.observe(time.monotonic() - started_s)
        return Contents(manifest, state, ends)

    def _trim(self) -> None:
        """Deletes what neither the kept snapshots nor ``log.retain_records`` need; only once all are there."""
        if self._trimmer is None:
            return
        oldest = self._folder.oldest_offset(self._settings.snapshot.keep)
        before = oldest - self._settings.log.retain_records
        while before > 1 and (deleted := self._step(self._trimmer, before)):
            self._metrics.log_trimmed.inc(deleted)
            if self._stop.wait(TRIM_PAUSE_S):
                return

    def _step(self, trimmer: LogTrimmer, before: int) -> int:
        try:
            return trimmer.step(before)
        except LogError:
            self._metrics.log_errors.labels("trim").inc()
            raise
