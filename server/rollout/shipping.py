"""The control plane: push, shadow, canary, promote, rollback, each persisted, audited, and undone by itself if need be.

Order of things in a step: what is to be is checked, done, then written to the rollout file, then to the audit log. A
promotion is written before it is done and a rollback after it: a crash in between leaves the decision that was made,
and a full disk never keeps a bad version in service.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from server.clock import Clock
from server.config import RolloutSettings
from server.errors import Draining, LiverankError, ModelRefused, NotFound, Refused, ScorerUnavailable, ScoringError
from server.rollout.base import ServingPath
from server.rollout.guard import verdict
from server.rollout.intake import Diff, diff, examine
from server.rollout.ledger import Ledger
from server.rollout.listing import Gauges, Listing, listing_of
from server.rollout.repository import Facts, Repository
from server.rollout.state import Rollout, Stage
from server.rollout.store import RolloutFile
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
MEND_EVERY_S = 1.0
PUSH_WAIT_S = 5.0
"""For whoever loads or unloads versions just now."""
RESUME_WAIT_S = 5.0
"""For what the rollout file says to be in force again after a start."""
OURSELVES = "server"


class Shipping:
    """Thread-safe. ``start`` resumes what the rollout file says and watches canaries from then on.

    Args:
        paths: by model. repositories: likewise.

    Raises:
        ConfigError: the rollout file cannot be used.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        file: RolloutFile,
        paths: Mapping[str, ServingPath],
        repositories: Mapping[str, Repository],
        ledger: Ledger,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._settings, self._file, self._paths, self._repositories = settings, file, paths, repositories
        self._ledger, self._clock, self._metrics, self._gauges = ledger, clock, metrics, Gauges(metrics)
        self._rollouts = {model: Rollout() for model in paths} | file.load()
        self._lock = threading.RLock()  # of the state; held for moments only
        self._pushing = threading.Lock()  # of what is loaded; taken before the other, held as long as loading takes
        self._resumed = {model: threading.Event() for model in paths}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rollout", daemon=True)
        self._mend_again_s = 0.0

    def start(self) -> None:
        """After the engine has started."""
        for repository in self._repositories.values():
            repository.sweep()
        for model, path in self._paths.items():
            if not self._rollouts[model].held:
                self._resumed[model].set()  # there is nothing to go on with
            self._gauges.stands(path, self._rollouts[model])
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._ledger.close()

    # --- what there is ------------------------------------------------------------------------

    def rollout(self, model: str) -> Rollout:
        """Where it stands. Raises NotFound."""
        self._path(model)
        return self._rollouts[model]

    def listing(self, model: str, history: int = 20) -> Listing:
        """Everything about one model. Raises NotFound."""
        path = self._path(model)
        return listing_of(path, self._repositories[model], self._rollouts[model], self._ledger.newest(model, history))

    @property
    def models(self) -> list[str]:
        return sorted(self._paths)

    def diff(self, model: str, first: int, second: int) -> Diff:
        """See intake.diff."""
        return diff(self._path(model), self._repositories[model], first, second)

    # --- steps --------------------------------------------------------------------------------

    def push(self, model: str, version: int, files: Mapping[str, bytes], who: str, why: str) -> Facts:
        """Takes a version in: checked in a process of its own, placed, loaded, warmed; asked by nobody yet.

        Args:
            files: contents by name; empty: it is in the repository already.

        Raises:
            ModelRefused, Refused: nothing changed. ScorerUnavailable is told as Refused.
        """
        path = self._path(model)
        with self._ledger.step(model, version, "push", who, why):
            self._wait_until_resumed(model)
            if not self._pushing.acquire(timeout=PUSH_WAIT_S):
                raise Refused("another push is on its way")
            try:
                return self._push(path, version, files)
            except ScoringError as error:
                raise ModelRefused(f"{model}/{version}: {error}") from error
            finally:
                self._pushing.release()

    def _push(self, path: ServingPath, version: int, files: Mapping[str, bytes]) -> Facts:
        model, repository = path.model, self._repositories[path.model]
        with self._lock:
            before = self._rollouts[model]
            before.may_push(version)
            answering = before.serving or path.answering()
            if not answering:
                raise Refused(
                    f"no version of {model} answers now; a first one is put into the repository, not pushed (see its "
                    "state in `liverank model list`)"
                )
            if not before.serving:
                if version == answering:
                    raise Refused(f"version {version} serves already")
                self._save(model, before.pinned(answering))
                path.pin(answering)  # or an in-process scorer would serve the new version as soon as it is there
        staged = repository.stage(version, files) if files else repository.path(version)
        placed = False
        try:
            if not staged.is_dir():
                raise ModelRefused(f"{model}/{version} is not in the repository, and no files came with the call")
            facts = examine(self._settings, path, repository, staged, version)
            if files:
                repository.note(staged, facts)
                placed = repository.place(staged, version)
            with self._lock:
                held = self._rollouts[model].held
            path.versions.hold([*held, version])
            path.warm(version)
            with self._lock:  # meanwhile others may have rolled back what serves
                now = self._rollouts[model].pushed(version, self._clock.now_ms())
                old = self._rollouts[model].candidate
                self._save(model, now)
            if old and old not in now.held:
                path.forget(old)
            path.versions.keep(now.held)
            self._gauges.stands(path, self._rollouts[model])
            return facts
        except BaseException:
            path.forget(version)
            with self._lock:
                held = self._rollouts[model].held
            if version not in held:
                path.versions.keep(held)
                if placed:
                    repository.remove(repository.path(version))
            if files and staged.name != str(version):
                repository.remove(staged)
            raise

    def shadow(self, model: str, version: int, percent: float, who: str, why: str) -> Rollout:
        """Scores a share of the traffic by the candidate; nobody sees it. Raises Refused."""
        path = self._path(model)
        with self._ledger.step(model, version, "shadow", who, why, percent=percent), self._stepping(model) as before:
            now = before.shadowed(version, percent, self._clock.now_ms())
            self._save(model, now)
            if before.stage is Stage.SHADOW:
                path.share(percent, 0.0)
            else:
                path.begin(version, percent)
            self._gauges.stands(path, self._rollouts[model])
            return now

    def canary(self, model: str, version: int, percent: float, hold_ms: int, who: str, why: str) -> Rollout:
        """Serves a share of the viewers by the candidate. Raises Refused."""
        path = self._path(model)
        fields = {"percent": percent, "hold_ms": hold_ms}
        with self._ledger.step(model, version, "canary", who, why, **fields), self._stepping(model) as before:
            now = before.canaried(version, percent, hold_ms, self._clock.now_ms())
            if before.stage is not Stage.PUSHED and (ends := self._verdict(path)):
                raise Refused(f"{model}/{version} would be rolled back at once: {ends[0]}: {ends[1]}")
            self._save(model, now)
            if before.stage is Stage.PUSHED:
                path.begin(version, 100.0)
            path.share(100.0, percent)  # a column that viewers are ranked by is scored every time
            self._gauges.stands(path, self._rollouts[model])
            return now

    def promote(self, model: str, version: int, force: bool, who: str, why: str) -> Rollout:
        """Serves everybody by the candidate, in one step. Raises Refused; nothing changed then."""
        path = self._path(model)
        with self._ledger.step(model, version, "promote", who, why, force=force), self._stepping(model) as before:
            now = before.promoted(version, force, self._clock.now_ms())
            self._save(model, now)
            try:
                path.promote(version)
            except (LiverankError, TimeoutError) as error:
                self._save(model, before)
                raise Refused(f"{model}/{version} was not promoted: {error}") from error
            if before.previous and before.previous not in now.held:
                path.forget(before.previous)
            self._gauges.stands(path, self._rollouts[model])
        self._let_go(path)
        return now

    def rollback(self, model: str, who: str, why: str, guardrail: str = "") -> Rollout:
        """Ends the trial; without one, serves the version before. Raises Refused: there is nothing to go back to."""
        path = self._path(model)
        version = self._rollouts[model].candidate or self._rollouts[model].serving
        fields = {"guardrail": guardrail} if guardrail else {}
        with self._ledger.step(model, version, "rollback", who, why, **fields), self._lock:
            before = self._rollouts[model]
            now = before.rolled_back(self._clock.now_ms())
            if before.candidate:
                path.end()
            else:
                path.restore(now.serving)
            self._rollouts[model] = now
            gone = before.candidate or before.serving
            if gone not in now.held:
                path.forget(gone)
            self._metrics.rollbacks.labels(model, guardrail or "asked").inc()
            self._gauges.stands(path, self._rollouts[model])
            try:
                self._save(model, now)
            except Refused as error:
                raise Refused(f"rolled back, but a restart will not know of it: {error}") from error
        self._let_go(path)
        return now

    @contextmanager
    def _stepping(self, model: str) -> Iterator[Rollout]:
        """Inside, nobody else takes a step; where the rollout stands. Not for `rollback`, which waits for nothing."""
        self._wait_until_resumed(model)
        with self._lock:
            yield self._rollouts[model]

    def _wait_until_resumed(self, model: str) -> None:
        """A candidate that is not open yet can neither score nor serve. Raises Refused."""
        if not self._resumed[model].wait(RESUME_WAIT_S):
            raise Refused(f"{model}: the versions of before the restart are not loaded yet; try again")

    def _let_go(self, path: ServingPath) -> None:
        """Unloads what nobody needs at once, in a thread: whoever rolls back waits neither for that nor for a push."""

        def tidy() -> None:
            with self._pushing:
                path.versions.keep(self._rollouts[path.model].held)

        threading.Thread(target=tidy, name="rollout-unload", daemon=True).start()

    # --- watching -----------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_EVERY_S):
            for model, path in self._paths.items():
                try:
                    self.look(model, path)
                except Draining:
                    return
                except Exception:  # a fault here must not leave canaries unwatched
                    logger.exception("unexpected fault while watching %s", model)
                    self._metrics.rpc_errors.labels("rollout", "internal").inc()

    def look(self, model: str, path: ServingPath) -> None:
        """One look: resumes, mends, ends or moves on what is due."""
        resumed = self._resumed[model]
        if time.monotonic() >= self._mend_again_s and (path.is_troubled() or not resumed.is_set()):
            self._mend_again_s = time.monotonic() + MEND_EVERY_S
            self._mend(path)
        if not resumed.is_set():
            self._resume(model, path)
        self._gauges.shows(path, self._rollouts[model])
        with self._lock:
            rollout = self._rollouts[model]
            if rollout.stage is not Stage.CANARY or not resumed.is_set():
                return
            if ends := self._verdict(path):
                guardrail, seen = ends
                logger.error("%s/%d is rolled back: %s: %s", model, rollout.candidate, guardrail, seen)
                self.rollback(model, OURSELVES, f"{guardrail}: {seen}", guardrail)
            elif percent := rollout.climbs(self._clock.now_ms()):
                if path.trial.compared < self._settings.min_refreshes:
                    return  # nothing was seen yet that would speak for more
                why = f"held {rollout.percent:g} % for {rollout.hold_ms / 1000:g} s"
                self.canary(model, rollout.candidate, percent, rollout.hold_ms, OURSELVES, why)

    def _verdict(self, path: ServingPath) -> tuple[str, str] | None:
        serving, candidate, faults, _ = path.viewers()
        return verdict(self._settings, path.trial, faults, serving, candidate)

    def _mend(self, path: ServingPath) -> None:
        try:
            if path.versions.mend():
                self._metrics.rollout_mends.labels(path.model).inc()
        except ScoringError as error:
            logger.warning("%s: %s", path.model, error)

    def _resume(self, model: str, path: ServingPath) -> None:
        """After a start: the candidate goes on where it stood, as soon as it can be asked.

        Until then it can be rolled back, and no other step is taken: one that began a trial would have it begun again.
        """
        try:
            with self._pushing:
                rollout = self._rollouts[model]
                if rollout.held:
                    path.versions.hold(rollout.held)
                if rollout.candidate:
                    path.warm(rollout.candidate)
        except ScorerUnavailable as error:
            logger.warning("%s: %s", model, error)
            self._stopping.wait(MEND_EVERY_S)
            return
        except ScoringError as error:
            logger.error("%s: %s", model, error)
            with self._lock:
                if self._rollouts[model] == rollout:  # and nobody rolled it back meanwhile
                    self._resumed[model].set()
                    if rollout.candidate:
                        self.rollback(model, OURSELVES, f"after a restart: {error}", "errors")
            return
        with self._lock:
            if self._rollouts[model] != rollout:
                path.forget(rollout.candidate)  # rolled back while it was opened; the next look goes on from there
                return
            if rollout.stage in (Stage.SHADOW, Stage.CANARY):
                serves = rollout.percent if rollout.stage is Stage.CANARY else 0.0
                scores = 100.0 if rollout.stage is Stage.CANARY else rollout.percent
                path.begin(rollout.candidate, scores)
                path.share(scores, serves)
            self._resumed[model].set()
        self._gauges.stands(path, self._rollouts[model])

    # --- keeping ------------------------------------------------------------------------------

    def _path(self, model: str) -> ServingPath:
        if (path := self._paths.get(model)) is None:
            raise NotFound(f"model: {', '.join(self._paths) or 'none'} wanted, got {model[:64]!r}")
        return path

    def _save(self, model: str, rollout: Rollout) -> None:
        self._file.save({**self._rollouts, model: rollout})
        self._rollouts[model] = rollout
