"""What happens at set times of a scenario: ends, bursts, raids, new rules, a new model."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from liverank.v1 import admin_pb2, admin_pb2_grpc

from loadtest.load.publisher import Publisher
from loadtest.load.scenario import Action, End, Raid, ReloadRules, Scenario, Start, SwapModel
from server.errors import ConfigError

TIMEOUT_S = 15.0
_EXTRA_RULE = '\n[rule.load_test]\nboost = 0.01\nwhen = [{ feature = "viewers", above = 1e9, until = 1e8 }]\n'


class Actions:
    """A thread that carries them out on time and remembers what came of each.

    Args:
        rules_file: of the server, if it is ours: changed before each reload, so that something is really reloaded.
        model_folder: ``<repository>/<model>`` of the server; None: unknown, so that models cannot be swapped.

    Attributes:
        done: per action {"at_s", "do", "told", "ok"}.

    Raises:
        ConfigError: the scenario swaps the model and ``model_folder`` is None or holds none.
    """

    def __init__(
        self,
        scenario: Scenario,
        publisher: Publisher,
        channel: grpc.Channel,
        rules_file: Path | None,
        model_folder: Path | None,
    ) -> None:
        self.done: list[dict[str, Any]] = []
        self._planned, self._publisher = scenario.actions, publisher
        self._admin = admin_pb2_grpc.AdminStub(channel)
        self._rules_file, self._model_folder = rules_file, model_folder
        if any(isinstance(action, SwapModel) for _, action in self._planned):
            if model_folder is None:
                raise ConfigError("swap_model: --model-folder wanted: REPOSITORY/MODEL that the server reads")
            newest_version(model_folder)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="actions", daemon=True)
        self._begun_s = 0.0

    def start(self, begun_s: float) -> None:
        self._begun_s = begun_s
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT_S + 10.0)

    def _run(self) -> None:
        for at_s, action in self._planned:
            if self._stop.wait(max(0.0, self._begun_s + at_s - time.monotonic())):
                return
            begun_s = time.monotonic()
            entry: dict[str, Any] = {"at_s": round(begun_s - self._begun_s, 3), "do": action.do}
            try:
                entry |= {"told": self._carry_out(action), "ok": True}
            except grpc.RpcError as error:
                entry |= {"told": f"{error.code().name}: {error.details()}", "ok": False}
            except (OSError, RuntimeError, TimeoutError) as error:
                entry |= {"told": str(error) or type(error).__name__, "ok": False}
            self.done.append(entry)

    def _carry_out(self, action: Action) -> str:
        if isinstance(action, End):
            before = len(self._publisher.fleet.live)
            taken_s = self._publisher.soon(lambda fleet, now_ms: fleet.ends(action.share, now_ms)).result(TIMEOUT_S)
            return f"{before - len(self._publisher.fleet.live)} streams ended, acknowledged in {taken_s * 1000:.0f} ms"
        if isinstance(action, Start):
            taken_s = self._publisher.soon(lambda fleet, now_ms: fleet.starts(action.streams, now_ms)).result(TIMEOUT_S)
            return f"{action.streams} streams started, acknowledged in {taken_s * 1000:.0f} ms"
        if isinstance(action, Raid):
            self._publisher.raid(action.place, action.joins, action.chats, action.over_s)
            return f"{action.joins} joins and {action.chats} chats on place {action.place} over {action.over_s:g} s"
        if isinstance(action, ReloadRules):
            return self._reload()
        return self._swap()

    def _reload(self) -> str:
        if self._rules_file is not None:
            text = self._rules_file.read_text()
            # Every other time the rule that the time before added goes away again.
            changed = text.removesuffix(_EXTRA_RULE) if text.endswith(_EXTRA_RULE) else text + _EXTRA_RULE
            _replace(self._rules_file, lambda beside: beside.write_text(changed))
        begun_s = time.monotonic()
        reply = self._admin.ReloadRules(admin_pb2.ReloadRulesRequest(), timeout=TIMEOUT_S)
        taken_ms = (time.monotonic() - begun_s) * 1000
        return f"{reply.rules} rules, hash {reply.rules_hash[:8]}, in {taken_ms:.0f} ms"

    def _swap(self) -> str:
        """Only a version that appears complete is ever seen: it is copied elsewhere, then renamed."""
        assert self._model_folder is not None
        version = newest_version(self._model_folder)
        target = self._model_folder / str(version + 1)
        source = self._model_folder / str(version)
        _replace(target, lambda beside: shutil.copytree(source, beside))
        begun_s = time.monotonic()
        wanted = f"/{version + 1}"
        while time.monotonic() - begun_s < TIMEOUT_S and not self._stop.is_set():
            named = self._admin.Status(admin_pb2.StatusRequest(), timeout=TIMEOUT_S).model_version
            if named.endswith(wanted):
                return f"version {version + 1} serves after {(time.monotonic() - begun_s) * 1000:.0f} ms"
            self._stop.wait(0.05)
        raise TimeoutError(f"version {version + 1} did not serve within {TIMEOUT_S:.0f} s; {named or 'none'} does")


def newest_version(model_folder: Path) -> int:
    """The highest version in ``REPOSITORY/MODEL``. Raises ConfigError when there is none."""
    found = [int(p.parent.name) for p in model_folder.glob("*/model.onnx") if p.parent.name.isdecimal()]
    if not found:
        raise ConfigError(f"{model_folder}: holds no <version>/model.onnx")
    return max(found)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    write(beside)
    beside.rename(path)
