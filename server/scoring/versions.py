"""Which versions of a model are there to answer: on Triton under explicit model control, or as files for this process.

Triton is told by the whole list, each time (`version_policy.specific` in place of the file's): it loads what is new,
unloads what is not named, and leaves the others alone. A version that does not load changes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from google.protobuf.json_format import MessageToJson
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from server.errors import BadScores, ScorerUnavailable, ScoringError
from server.scoring.model_config import parse_config

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 60.0
ASK_TIMEOUT_S = 2.0
_NOBODY_THERE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN")


class Versions(Protocol):
    """Makes versions of one model ready to answer. Thread-safe."""

    def hold(self, versions: Iterable[int]) -> None:
        """From now on exactly these; an empty list: whatever is there.

        Raises:
            ScorerUnavailable: nobody is there to load them. BadScores: one cannot be loaded; as before.
        """
        ...

    def keep(self, versions: Iterable[int]) -> None:
        """Lets go of all but these, now or, if nobody is there to be told, later."""
        ...

    def mend(self) -> bool:
        """Brings back held versions that got lost, as after a restart of Triton; True when some were."""
        ...


class LocalVersions:
    """Files of ``model_repository/model_name``; each scorer loads its own version."""

    def __init__(self, model_repository: Path, model_name: str) -> None:
        self._folder = model_repository / model_name

    def hold(self, versions: Iterable[int]) -> None:
        """See Versions."""
        for version in versions:
            if not (self._folder / str(version) / "model.onnx").is_file():
                raise BadScores(f"{self._folder / str(version)} holds no model.onnx")

    def keep(self, versions: Iterable[int]) -> None:
        """See Versions. Scorers that are closed let go."""

    def mend(self) -> bool:
        """See Versions. Nothing gets lost."""
        return False


class TritonVersions:
    """See Versions.

    Args:
        model_repository: the folder that Triton serves, as this process sees it.
    """

    def __init__(self, address: str, model_name: str, model_repository: Path) -> None:
        self._address, self._model, self._folder = address, model_name, model_repository / model_name
        self._held: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def hold(self, versions: Iterable[int]) -> None:
        """See Versions. Takes as long as Triton needs to load, a minute at most."""
        wanted = tuple(sorted(set(versions)))
        with self._lock:
            before, self._held = self._held, wanted
            try:
                if wanted:
                    self._load()
            except ScoringError:
                self._held = before
                raise

    def keep(self, versions: Iterable[int]) -> None:
        """See Versions."""
        with self._lock:
            self._held = tuple(sorted(set(versions)))
            try:
                if self._held:
                    self._load()
            except ScoringError as error:  # what is loaded too many costs memory and nothing else
                log.warning("%s", error)

    def mend(self) -> bool:
        """See Versions."""
        with self._lock:
            if not self._held or not self._missing():
                return False
            log.warning("%s at %s lost a version of %s; loading them", self._model, self._address, list(self._held))
            self._load()
            return True

    def override(self) -> str | None:
        """The configuration to load the model with, as JSON, or None: the file's own. Raises BadScores."""
        if not self._held:
            return None
        try:
            config = parse_config((self._folder / "config.pbtxt").read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise BadScores(f"scoring.model_repository must be the folder that Triton serves: {error}") from error
        config.version_policy.Clear()
        config.version_policy.specific.versions.extend(self._held)
        text: str = MessageToJson(config, preserving_proto_field_name=True)
        return text

    def _missing(self) -> list[int]:
        """Held versions that do not answer. Raises ScorerUnavailable when Triton does not."""
        client = InferenceServerClient(self._address)
        try:
            return [
                version
                for version in self._held
                if not client.is_model_ready(self._model, str(version), client_timeout=ASK_TIMEOUT_S)
            ]
        except InferenceServerException as error:
            raise ScorerUnavailable(f"Triton at {self._address}: {error}") from error
        finally:
            client.close()

    def _load(self) -> None:
        config = self.override()
        client = InferenceServerClient(self._address)
        try:
            client.load_model(self._model, config=config, client_timeout=LOAD_TIMEOUT_S)
        except InferenceServerException as error:
            status = (error.status() or "UNKNOWN").removeprefix("StatusCode.")
            kind = ScorerUnavailable if status in _NOBODY_THERE else BadScores
            told = " ".join(error.message().split())
            raise kind(f"Triton at {self._address} did not load {self._model}: {told}") from error
        finally:
            client.close()
        if missing := self._missing():  # a version without a folder is passed over in silence
            raise BadScores(f"Triton at {self._address} has no {self._model}/{missing[0]}: not in its repository?")
