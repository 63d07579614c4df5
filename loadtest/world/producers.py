"""Who tells what happens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world.settings import WorldSettings


class Producers:
    """Who tells what: media servers, apps, the checkout, and the control plane (ends, moderation).

    Numbered in the order in which a step's batches are delivered: a start comes before what it starts, and
    the last actions before an end.
    """

    def __init__(self, settings: WorldSettings) -> None:
        self._n_media, self._n_app = settings.media_producers, settings.app_producers
        self.ids = (
            *(f"media-{i}" for i in range(self._n_media)),
            *(f"app-{i}" for i in range(self._n_app)),
            "checkout-0",
            "control-0",
        )

    def media(self, stream: NDArray[np.int32]) -> NDArray[np.integer[Any]]:
        return stream % self._n_media

    def app(self, stream: NDArray[np.int32]) -> NDArray[np.integer[Any]]:
        return self._n_media + stream % self._n_app

    def checkout(self, stream: NDArray[np.int32]) -> NDArray[np.integer[Any]]:
        return np.full(len(stream), self._n_media + self._n_app, np.int16)

    def control(self, stream: NDArray[np.int32]) -> NDArray[np.integer[Any]]:
        return np.full(len(stream), self._n_media + self._n_app + 1, np.int16)
